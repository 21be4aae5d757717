"""Densities in two dimensions: a flow's beside its target's, and after each of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.distributions import constraints

from flowvi.checks import as_array, instances, positive_integers, shown
from flowvi.errors import OptionError
from flowvi.flow import Flow
from flowvi.plotting import plane
from flowvi.plotting.axes import panels, unrefined
from flowvi.posterior import Posterior

__all__ = ["plot_density", "plot_layers"]

DENSITY_COLOURS = "viridis"


def plot_density(
    q: Flow | Posterior, target: Any = None, *, box: plane.Box | None = None, num: int = 250, ax: Any = None
) -> np.ndarray:
    """The density of a 2-D flow, q(z), beside its target's, p(z) / Z, on one scale of colours.

    Both are exact, evaluated on a grid in float64. Where a target's Z is not known, the grid's own integral is taken.
    Of a model's posterior the unconstrained coordinates are shown.

    Args:
        q: a flow with D = 2, or a posterior.
        target: an energy, or a callable z (S, 2) -> log p (S,), normalized or not. None: a posterior's own target; no
            second panel beside a flow.
        box: the window, ((low, high), (low, high)); None finds where there is something to see.
        num: cells along each side.
        ax: two axes, or one where there is no target.

    Returns:
        The axes used, (2,) or (1,): the flow's, then the target's.

    Raises:
        DimensionError: D is not 2.
        OptionError: too few axes.
    """
    flow, posterior = _flow_of(q)
    positive_integers(num=num)
    box = None if box is None else _window(box)
    if target is None and posterior is not None:
        target = posterior.density
    titles, functions = [_flow_title(flow, posterior)], [plane.exact(flow)]
    wide = plane.wide_box(flow, target) if box is None else box
    if target is not None:
        titles.append(f"target: {getattr(target, 'name', None) or type(target).__name__}")
        functions.append(plane.target_function(target, wide))
    box = plane.window(functions, wide) if box is None else box
    axes = panels(ax, len(functions), size=(3.4, 3.2))[: len(functions)]
    images = [plane.on_grid(function, box, num) for function in functions]
    top = float(np.quantile(images[-1], 0.9999))
    for axis, title, image in zip(axes, titles, images, strict=True):
        shown = _draw_density(axis, image, box, top, posterior)
        axis.set_title(title, fontsize="medium")
    _name_coordinates(axes, posterior)
    axes[0].figure.colorbar(shown, ax=list(axes), label="density", extend="max", shrink=0.85)
    return axes


def plot_layers(
    q: Flow | Posterior,
    ks: Sequence[int] | None = None,
    *,
    box: plane.Box | None = None,
    num: int = 200,
    ax: Any = None,
) -> np.ndarray:
    """How z_0 becomes z_K: the exact density of the flow cut after its first k layers, for several k.

    The affine layer at a flow's end is kept in every panel, so that all are in the target's coordinates.

    Args:
        q: a flow with D = 2, or a posterior.
        ks: the numbers of layers, from 0 to K; None takes six of them in even steps.
        box: the window, as for `plot_density`.
        num: cells along each side.
        ax: as many axes as ks.

    Returns:
        The axes used, (len(ks),).

    Raises:
        DimensionError: D is not 2.
        OptionError: a k is not in [0, K], or too few axes.
    """
    flow, posterior = _flow_of(q)
    positive_integers(num=num)
    box = None if box is None else _window(box)
    total = plane.num_layers(flow)
    if ks is not None and (not isinstance(ks, Sequence | np.ndarray) or isinstance(ks, str | bytes) or not len(ks)):
        raise OptionError(f"ks must be numbers of layers from 0 to {total}, not {shown(ks)}.")
    ks = sorted({round(total * i / 5) for i in range(6)}) if ks is None else list(ks)
    functions = [plane.exact(plane.first_layers(flow, k)) for k in ks]
    box = plane.window(functions, plane.wide_box(flow)) if box is None else box
    height = 2.0
    if not _has_sites(posterior):
        height *= min(2.0, max(0.4, (box[1][1] - box[1][0]) / (box[0][1] - box[0][0])))
    axes = panels(ax, len(ks), size=(2.3, height + 1.0))[: len(ks)]
    for axis, k, function in zip(axes, ks, functions, strict=True):
        image = plane.on_grid(function, box, num)
        # The shape is the message: each panel has its own scale of colours.
        _draw_density(axis, image, box, float(np.quantile(image, 0.9999)), posterior)
        axis.set_title(
            f"all {k} layers" if k == total else "no layer" if k == 0 else f"{k} layer{'s' * (k > 1)}",
            fontsize="medium",
        )
    _name_coordinates(axes, posterior)
    return axes


def _flow_of(q: Any) -> tuple[Flow, Posterior | None]:
    """The flow, and the posterior where it is one."""
    instances(Flow, Posterior, q=q)
    return (q.flow, q) if isinstance(q, Posterior) else (q, None)


def _window(box: Any) -> plane.Box:
    """A box in two dimensions, checked."""
    pairs = as_array("box", box)
    if pairs.shape != (2, 2) or not np.isfinite(pairs).all() or not (pairs[:, 0] < pairs[:, 1]).all():
        raise OptionError(f"box must be ((low, high), (low, high)), finite with low < high, not {shown(box)}.")
    return tuple((float(low), float(high)) for low, high in pairs)


def _flow_title(flow: Flow, posterior: Posterior | None) -> str:
    """The flow's name, K, whether it has a funnel, and KL where it is known."""
    name = "flow"
    if flow.spec is not None:
        name = f"{flow.spec.name}, K = {flow.spec.num_flows}"
        name += ", funnel" if flow.spec.num_flows and flow.spec.funnels else ""
    kl = None if posterior is None else unrefined(posterior).diagnose().kl
    return name if kl is None else f"{name} (KL {kl:.2g} nats)"


def _has_sites(posterior: Posterior | None) -> bool:
    """Whether the coordinates are a model's sites, each with units of its own."""
    return posterior is not None and posterior.density.model is not None


def _draw_density(axis: Any, density: np.ndarray, box: plane.Box, top: float, posterior: Posterior | None) -> Any:
    """An image of a density (n, n) whose axis 0 is z_1."""
    extent = (*box[0], *box[1])
    colours = {"cmap": DENSITY_COLOURS, "vmin": 0, "vmax": top}
    ratio = (box[0][1] - box[0][0]) / (box[1][1] - box[1][0])
    aspect = "equal" if 1 / 3 < ratio < 3 and not _has_sites(posterior) else "auto"
    return axis.imshow(density.T, origin="lower", extent=extent, interpolation="bilinear", aspect=aspect, **colours)


def _name_coordinates(axes: np.ndarray, posterior: Posterior | None) -> None:
    """Axis labels: z_1 and z_2, or a model's sites; the vertical one on the first panel only."""
    names = ["$z_1$", "$z_2$"]
    if posterior is not None and _has_sites(posterior):
        names = []
        for site in posterior.density.sites:
            support = site.support
            while hasattr(support, "base_constraint"):
                support = support.base_constraint
            words = "" if isinstance(support, type(constraints.real)) else " (unconstrained)"
            size = site.unconstrained_shape.numel()
            names += [posterior.density.coordinate_name(len(names) + i) + words for i in range(size)]
    for axis in axes:
        axis.grid(False)
        axis.set_xlabel(names[0])
    axes[0].set_ylabel(names[1])
    for axis in axes[1:]:
        axis.set_yticklabels([])
