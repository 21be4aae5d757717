"""Flows by name: `register` one, list the `available` ones, and build K layers of any `flow=` argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch.distributions.transforms import Transform as TorchTransform

from flowvi.checks import flags, positive_integers, positive_numbers, shown, whole_numbers
from flowvi.errors import FlowVIError, OptionError, UnknownFlowError
from flowvi.transforms.affine import affine
from flowvi.transforms.autoregressive import conditional_iaf, conditional_maf, iaf, iaf_stack, maf, maf_stack
from flowvi.transforms.conditional_affine import conditional_affine
from flowvi.transforms.coupling import conditional_nice, conditional_real_nvp, nice, real_nvp
from flowvi.transforms.funnel import conditional_funnel, funnel, funnel_stack
from flowvi.transforms.guests import adapt, stack_of
from flowvi.transforms.mixing import conditional_householder, householder
from flowvi.transforms.planar import planar, planar_stack
from flowvi.transforms.radial import radial, radial_stack
from flowvi.transforms.spline import conditional_neural_spline, neural_spline, neural_spline_stack
from flowvi.transforms.stack_conditional import conditional_planar_stack, conditional_radial_stack
from flowvi.transforms.sylvester import conditional_sylvester, sylvester, sylvester_stack
from flowvi.transforms.tails import conditional_tails, tails

Factory = Callable[..., TorchTransform]


@dataclass(frozen=True)
class FlowEntry:
    """What is known of a registered flow.

    Attributes:
        factory: factory(input_dim, **options) -> one layer.
        stack: stack(input_dim, num_flows, **options) -> all K layers, where they are not K equal ones in a row:
            one fused transform, or a list (such as couplings whose halves alternate).
        conditional: conditional(input_dim, context_dim, **options) -> one conditional layer, or all K of them where
            it takes num_flows; where there is one.
        num_flows: K, where a user does not say.
        lr: the largest step size of a fit, where a user does not say: networks take smaller ones than layers.
        description: one line for `available`.
    """

    factory: Factory
    stack: Callable[..., TorchTransform | list[TorchTransform]] | None = None
    conditional: Callable[..., Any] | None = None
    num_flows: int = 4
    lr: float = 1e-2
    description: str = ""


_REGISTRY: dict[str, FlowEntry] = {}


def register(
    name: str,
    factory: Factory,
    *,
    stack: Callable[..., TorchTransform | list[TorchTransform]] | None = None,
    conditional: Callable[..., Any] | None = None,
    num_flows: int = 4,
    lr: float = 1e-2,
    description: str = "",
    overwrite: bool = False,
) -> None:
    """Give a flow a name that works in every ``flow=`` argument.

    Args:
        name: the name.
        factory: factory(input_dim, **options) -> a transform of R^D; one layer.
        stack: stack(input_dim, num_flows, **options) -> all K layers as one transform or a list, where they are
            not K equal ones in a row.
        conditional: conditional(input_dim, context_dim, **options) -> one conditional layer, or all K of them where
            it takes num_flows; ``condition(context)`` gives a transform.
        num_flows: K, where a user does not say.
        lr: the largest step size of a fit, where a user does not say.
        description: one line: fast direction, number of parameters, path score.
        overwrite: whether an existing name may be replaced.

    Raises:
        OptionError: the name is taken, the factory is not callable, or another argument can't be used.

    Example:
        >>> import flowvi
        >>> from flowvi.transforms import Planar
        >>> flowvi.transforms.register("mine", Planar, overwrite=True)
        >>> "mine" in flowvi.transforms.available()
        True
    """
    if not isinstance(name, str) or not name:
        raise OptionError(f"name must be a word, not {shown(name)}.")
    if not callable(factory):
        raise OptionError(f"factory must be callable as factory(input_dim, **options), not {shown(factory)}.")
    for what, value in (("stack", stack), ("conditional", conditional)):
        if value is not None and not callable(value):
            raise OptionError(f"{what} must be callable or None, not {shown(value)}.")
    positive_integers(num_flows=num_flows)
    positive_numbers(lr=lr)
    flags(overwrite=overwrite)
    if name in _REGISTRY and not overwrite:
        raise OptionError(f"a flow named {name!r} is registered already: choose another name, or overwrite=True.")
    _REGISTRY[name] = FlowEntry(factory, stack, conditional, num_flows, lr, description)


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
        flow: a registered name, or a factory(input_dim, **options): Pyro's own helpers, a zuko flow class, yours.
        input_dim: D.
        num_flows: K; 0 gives no layer.
        **options: what the factory takes.

    Raises:
        UnknownFlowError: the name is not registered.
        OptionError: num_flows or an option can't be used, or the factory returned something else.
    """
    whole_numbers(num_flows=num_flows)
    positive_integers(input_dim=input_dim)
    if num_flows == 0:
        return []
    if isinstance(flow, str):
        entry = lookup(flow)
    elif callable(flow):
        entry = FlowEntry(flow, stack=stack_of(flow))
    else:
        raise OptionError(f"flow must be a name or a factory(input_dim, **options), not {shown(flow)}.")
    try:
        if entry.stack is not None:
            stacked = entry.stack(input_dim, num_flows, **options)
            layers = stacked if isinstance(stacked, list) else [stacked]
        else:
            layers = [entry.factory(input_dim, **options) for _ in range(num_flows)]
    except FlowVIError:
        raise
    except Exception as e:  # the factory is the user's, and so is what it may raise
        raise OptionError(f"flow {shown(flow)} could not be built with options {options}: {e!r}") from e
    return [adapt(layer, input_dim) for layer in layers]


register(
    "planar",
    planar,
    stack=planar_stack,
    conditional=conditional_planar_stack,
    num_flows=32,
    lr=4e-2,
    description="planar layers, fused; fast both ways (inverse by Newton); K (2 D + 1) parameters; path score",
)
register(
    "radial",
    radial,
    stack=radial_stack,
    conditional=conditional_radial_stack,
    num_flows=32,
    lr=4e-2,
    description="radial layers, fused; fast both ways (closed form); K (D + 2) parameters; path score",
)
register(
    "affine",
    affine,
    conditional=conditional_affine,
    num_flows=1,
    description="one affine map (kind='diag' | 'low_rank' | 'full'); fast both ways; path score",
)
register(
    "iaf",
    iaf,
    stack=iaf_stack,
    conditional=conditional_iaf,
    num_flows=4,
    description=(
        "inverse autoregressive layers, orderings alternating; fast forward, D steps back; K (H (H + 3 D + 2) + 2 D) "
        "parameters at two hidden layers of H (default max(32, 2 D)); path score up to D = 16"
    ),
)
register(
    "maf",
    maf,
    stack=maf_stack,
    conditional=conditional_maf,
    num_flows=8,
    description=(
        "masked autoregressive layers, orderings alternating; fast inverse (density), D steps forward; parameters as "
        "iaf; path score"
    ),
)
register(
    "nice",
    nice,
    stack=nice,
    conditional=conditional_nice,
    num_flows=8,
    description=(
        "additive coupling layers, mixing='perm' | 'orth' | 'none'; keeps volumes; fast both ways; K (H (H + D + 2) + "
        "D / 2) parameters at two hidden layers of H (default 32); path score"
    ),
)
register(
    "real_nvp",
    real_nvp,
    stack=real_nvp,
    conditional=conditional_real_nvp,
    num_flows=8,
    description=(
        "affine coupling layers, mixing='perm' | 'orth' | 'none'; fast both ways; K (H (H + 3 D / 2 + 2) + D) "
        "parameters at two hidden layers of H (default 32); path score"
    ),
)
register(
    "funnel",
    funnel,
    stack=funnel_stack,
    conditional=conditional_funnel,
    num_flows=2,
    lr=4e-2,
    description=(
        "scales that are exp of a linear function of the coordinates before (after, by turns): funnels, hierarchies; "
        "fast forward, D steps back; K D (D - 1) / 2 parameters; path score"
    ),
)
register(
    "householder",
    householder,
    stack=householder,
    conditional=conditional_householder,
    num_flows=1,
    description="K pairs of Householder reflections: a rotation; fast both ways; 2 K D parameters; path score; D >= 2",
)
register(
    "neural_spline",
    neural_spline,
    stack=neural_spline_stack,
    conditional=conditional_neural_spline,
    num_flows=4,
    description=(
        "rational-quadratic splines (kind='coupling' | 'autoregressive'); fast both ways (coupling); "
        "K (H (H + D/2 + 2) + (H + 1) (3 B - 1) D/2) parameters at two hidden layers of H (32) and B bins (16); "
        "path score"
    ),
)
register(
    "sylvester",
    sylvester,
    stack=sylvester_stack,
    conditional=conditional_sylvester,
    num_flows=8,
    description=(
        "Sylvester layers of M neurons (kind='orthogonal' | 'householder' | 'triangular'); fast forward, M steps back; "
        "K (D M + M^2 + 2 M) parameters, M = D up to 32; path score"
    ),
)
register(
    "tails",
    tails,
    conditional=conditional_tails,
    num_flows=1,
    description="power-law tails of each coordinate, for a last layer; fast both ways; 2 D K parameters; path score",
)
