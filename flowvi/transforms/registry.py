"""Flows by name: `register` one, list the `available` ones, and build K layers of any `flow=` argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch.distributions.transforms import Transform as TorchTransform

from flowvi.errors import OptionError, UnknownFlowError
from flowvi.transforms.affine import affine
from flowvi.transforms.planar import planar, planar_stack
from flowvi.transforms.radial import radial, radial_stack

Factory = Callable[..., TorchTransform]


@dataclass(frozen=True)
class FlowEntry:
    """What is known of a registered flow.

    Attributes:
        factory: factory(input_dim, **options) -> one layer.
        stack: stack(input_dim, num_flows, **options) -> K layers fused into one transform, where there is one.
        description: one line for `available`.
    """

    factory: Factory
    stack: Factory | None = None
    description: str = ""


_REGISTRY: dict[str, FlowEntry] = {}


def register(
    name: str,
    factory: Factory,
    *,
    stack: Factory | None = None,
    description: str = "",
    overwrite: bool = False,
) -> None:
    """Give a flow a name that works in every ``flow=`` argument.

    Args:
        name: the name.
        factory: factory(input_dim, **options) -> a transform of R^D; one layer.
        stack: stack(input_dim, num_flows, **options) -> K layers as one transform, if there is a faster way
            than K layers in a row.
        description: one line: fast direction, number of parameters, path score.
        overwrite: whether an existing name may be replaced.

    Raises:
        OptionError: the name is taken, or the factory is not callable.

    Example:
        >>> import flowvi
        >>> from flowvi.transforms import Planar
        >>> flowvi.transforms.register("mine", lambda input_dim: Planar(input_dim), overwrite=True)
        >>> "mine" in flowvi.transforms.available()
        True
    """
    if not callable(factory):
        raise OptionError(f"factory must be callable as factory(input_dim, **options), not {factory!r}.")
    if name in _REGISTRY and not overwrite:
        raise OptionError(f"a flow named {name!r} is registered already: choose another name, or overwrite=True.")
    _REGISTRY[name] = FlowEntry(factory, stack, description)


def available() -> dict[str, str]:
    """The registered flows: name -> one line on it."""
    return {name: entry.description for name, entry in sorted(_REGISTRY.items())}


def lookup(name: str) -> FlowEntry:
    """The entry of a registered name.

    Raises:
        UnknownFlowError: no flow has this name; the message lists those that are there.
    """
    entry = _REGISTRY.get(name)
    if entry is None:
        near = get_close_matches(name, _REGISTRY, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownFlowError(
            f"there is no flow named {name!r}.{hint} Available: {', '.join(sorted(_REGISTRY))}. "
            f"Add your own with flowvi.transforms.register(name, factory)."
        )
    return entry


def build(flow: str | Factory, input_dim: int, num_flows: int, **options: Any) -> list[TorchTransform]:
    """K layers of a flow, as a list of transforms from the base outwards (one, if the flow has a fused stack).

    Args:
        flow: a registered name, or a factory(input_dim, **options) such as Pyro's own helpers.
        input_dim: D.
        num_flows: K; 0 gives no layer.
        **options: what the factory takes.

    Raises:
        UnknownFlowError: the name is not registered.
        OptionError: num_flows or an option can't be used, or the factory returned something else.
    """
    if not isinstance(num_flows, int) or isinstance(num_flows, bool) or num_flows < 0:
        raise OptionError(f"num_flows must be a non-negative integer, not {num_flows!r}.")
    if num_flows == 0:
        return []
    if isinstance(flow, str):
        entry = lookup(flow)
    elif callable(flow):
        entry = FlowEntry(flow)
    else:
        raise OptionError(f"flow must be a name or a factory(input_dim, **options), not {flow!r}.")
    try:
        if entry.stack is not None:
            layers = [entry.stack(input_dim, num_flows, **options)]
        else:
            layers = [entry.factory(input_dim, **options) for _ in range(num_flows)]
    except TypeError as e:
        raise OptionError(f"flow {flow!r} could not be built with options {options}: {e}") from e
    for layer in layers:
        if not isinstance(layer, TorchTransform):
            raise OptionError(f"the factory of flow {flow!r} returned {type(layer).__name__}, not a transform.")
    return layers


register(
    "planar",
    planar,
    stack=planar_stack,
    description="planar layers, fused; fast both ways (inverse by Newton); K (2 D + 1) parameters; path score",
)
register(
    "radial",
    radial,
    stack=radial_stack,
    description="radial layers, fused; fast both ways (closed form); K (D + 2) parameters; path score",
)
register(
    "affine",
    affine,
    description="one affine map (kind='diag' | 'low_rank' | 'full'); fast both ways; path score",
)
