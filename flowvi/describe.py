"""What print() says of flows, guides and fits: whose, of which layers, over which latents, and how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pyro.poutine.messenger import unwrap
from torch import nn

if TYPE_CHECKING:
    from flowvi.history import History

__all__ = [
    "fit_words",
    "flow_words",
    "head",
    "layer_lines",
    "model_name",
    "num_parameters",
    "site_lines",
    "unset",
]

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


def flow_words(flow: Any, config: Mapping[str, Any]) -> str:
    """A fitted flow: how many parts, its name, its layers and whether it has a funnel.

    Args:
        flow: a `Flow`, or a mixture of some.
        config: what the engine decided.
    """
    spec = flow.spec
    name = str(config.get("flow", "a flow of your own") if spec is None else spec.name)
    count = config.get("num_flows") if spec is None else spec.num_flows
    words = name if count is None else f"{name} K = {count}"
    parts = len(config.get("weights", ()))
    if parts:
        words = (f"{parts} x " if parts > 1 else "") + f"{config['flow']} K = {config['num_flows']}"
    specs = [part.spec for part in getattr(flow, "flows", [flow])]
    funnel = any(s is not None and s.num_flows and s.funnels for s in specs)
    return words + (" with a funnel" if funnel else "")


def fit_words(config: Mapping[str, Any], history: History, timing: Mapping[str, float]) -> str:
    """What follows a fit's flow: steps, particles, annealing and seconds, as far as they are known."""
    words = [""]
    if config.get("num_steps") is not None:
        particles = config.get("num_particles")
        words.append(f"{config['num_steps']} steps" + (f" of {particles} particles" if particles else ""))
    if "anneal" in config:
        words.append("annealed" if config["anneal"] else "not annealed")
    if history.skipped_steps:
        words.append(f"{history.skipped_steps} steps skipped as not finite")
    if timing:
        words.append(f"{timing.get('total', sum(timing.values())):.1f} s")
    stopped = config.get("stopped", "finished")
    return ", ".join(words) + ("" if stopped == "finished" else f"; it stopped: {stopped}")
