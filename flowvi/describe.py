"""What print() says of flows and guides: whose, of which layers, over which latents, with how many parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from pyro.poutine.messenger import unwrap
from torch import nn

__all__ = ["head", "layer_lines", "model_name", "num_parameters", "site_lines", "unset"]

MAX_SITES = 30


def num_parameters(module: nn.Module) -> str:
    """How many numbers can be learnt, in words."""
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def model_name(guide: Any) -> str:
    """What the model of a guide is called."""
    model = unwrap((guide._model or (None,))[0])  # Pyro's guides keep it inside of handlers
    return "a model that was not kept" if model is None else str(getattr(model, "__name__", type(model).__name__))


def unset(guide: Any, flow: Any, num_flows: int) -> str:
    """A guide before its first call, in one line."""
    name = flow if isinstance(flow, str) else getattr(flow, "__name__", type(flow).__name__)
    return f"<{type(guide).__name__} of {model_name(guide)}: {name} K = {num_flows}, not called yet>"


def head(guide: Any, dim: str) -> str:
    """The first line of a guide that knows its latents."""
    return f"{type(guide).__name__} of {model_name(guide)}, {dim}, {num_parameters(guide)}"


def layer_lines(base: str, layers: Iterable[Any]) -> list[str]:
    """A flow from its base to the last layer; equal ones in a row share a line."""
    lines = [f"  base  {base}"]
    for words, same in groupby(repr(layer) for layer in layers):
        count = len(list(same))
        lines.append(f"  ->    {words if count == 1 else f'{count} x {words}'}")
    return lines


def site_lines(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The latents with their shapes."""
    width = max(len(name) for name in shapes)
    lines = [f"  {name:<{width}}  {tuple(shape)}" for name, shape in list(shapes.items())[:MAX_SITES]]
    return lines + ([f"  ... {len(shapes) - MAX_SITES} more"] if len(shapes) > MAX_SITES else [])
