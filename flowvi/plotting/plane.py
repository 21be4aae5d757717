"""Densities on the plane, for pictures: a flow cut after k layers, exact values on a grid, and where to look."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowvi.checks import is_count, shown
from flowvi.energies import Grid
from flowvi.errors import DimensionError, OptionError
from flowvi.flow import Flow
from flowvi.random_state import kept
from flowvi.targets import LogDensity, as_density
from flowvi.transforms import Affine, PlanarStack, RadialStack

__all__ = ["Box", "Function", "exact", "first_layers", "num_layers", "on_grid", "target_function", "wide_box", "window"]

Box = tuple[tuple[float, float], ...]
"""One (low, high) for each of the two coordinates."""

Function = Callable[[Tensor], Tensor]
"""z (S, 2) -> a normalized log density (S,)."""

VISIBLE = 2e-3  # of the highest density: what a window must show
COARSE = 120  # cells along each side, to find that window
CHUNK = 65536


def num_layers(flow: Flow) -> int:
    """K: a planar or radial stack counts its layers, any other transform is one; an affine layer at the end is none.

    Raises:
        OptionError: the flow is not a chain of maps.
    """
    if hasattr(flow, "flows"):
        raise OptionError(
            "a mixture of flows is not one chain of layers: show one of its parts, such as flow.flows[0]."
        )
    return sum(_count(layer) for layer in _split(flow)[0])


def first_layers(flow: Flow, k: int) -> Flow:
    """The flow's first k layers, and the affine layer at its end; parameters are copies.

    Args:
        flow: a flow.
        k: from 0 to `num_layers(flow)`.

    Returns:
        A flow with the same base.

    Raises:
        OptionError: k is not in [0, K].

    Example:
        >>> import flowvi
        >>> flow = flowvi.Flow(2, [flowvi.transforms.PlanarStack(2, 8), flowvi.transforms.Affine(2)])
        >>> first_layers(flow, 3).transforms[0]
        PlanarStack(D=2, K=3)
    """
    if not is_count(k, 0) or k > num_layers(flow):
        raise OptionError(f"k must be from 0 to {num_layers(flow)}, the flow's layers, got {shown(k)}.")
    layers, end = _split(flow)
    kept: list[Any] = []
    left = k
    for layer in layers:
        if left <= 0:
            break
        part = copy.deepcopy(layer)
        if left < _count(layer):
            part.num_flows = left
            for name, value in layer.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(value.detach()[:left].clone()))
        kept.append(part)
        left -= _count(layer)
    return Flow(flow.base_dist, [*kept, *copy.deepcopy(end)])


def exact(flow: Flow) -> Function:
    """The flow's log density in float64 where its base allows it, so that a picture shows q and not rounding."""
    if flow.dim != 2:
        raise DimensionError(
            f"this picture shows densities with D = 2, and the flow has D = {flow.dim}: plot_marginals shows any D."
        )
    plain = type(flow) is Flow and flow.has_standard_base and all(isinstance(t, nn.Module) for t in flow.transforms)
    if not plain:  # another base, or a mixture of flows
        return lambda z: flow.log_prob(z.to(flow.dtype)).double()
    return Flow(2, [copy.deepcopy(t).double() for t in flow.transforms], validate_args=False).log_prob


def target_function(target: Any, box: Box) -> Function:
    """The target's normalized log density: with its own log Z where it is known, else by quadrature on the box.

    Args:
        target: a `LogDensity`, an energy, or a callable z (S, 2) -> log p (S,).
        box: holds nearly all of the mass.
    """
    if not isinstance(target, LogDensity):
        if not callable(target) and not hasattr(target, "log_density"):
            raise OptionError(f"target must be an energy or a callable z (S, 2) -> log p (S,), not {shown(target)}.")
        target = as_density(target, dim=None if hasattr(target, "log_density") else 2, dtype=torch.float64)
    if target.dim != 2:
        raise DimensionError(f"this picture shows densities with D = 2, and the target has D = {target.dim}.")
    log_density = target.full

    def values(z: Tensor) -> Tensor:
        return torch.cat([log_density(part).double() for part in z.split(CHUNK)])

    log_z = target.log_normalizer
    if log_z is None:
        grid = Grid.midpoints(box, 2 * COARSE)
        with torch.no_grad():
            log_p = values(grid.z.reshape(-1, 2)).nan_to_num(nan=-math.inf)
        log_z = float((log_p + grid.weights.reshape(-1).log()).logsumexp(0))
    return lambda z: values(z) - log_z


def wide_box(flow: Flow, target: Any = None) -> Box:
    """A box that holds nearly all of q, and of the target where it knows its own."""
    with torch.no_grad(), kept():
        z = flow.sample(torch.Size([4000])).double()
    low, middle, high = z.quantile(torch.tensor([0.02, 0.5, 0.98]).to(z), dim=0)
    half = 3 * torch.maximum(high - middle, middle - low)
    boxes = [tuple(zip((middle - half).tolist(), (middle + half).tolist(), strict=True))]
    if isinstance(getattr(target, "box", None), tuple):
        boxes.append(target.box)
    return tuple((min(b[i][0] for b in boxes), max(b[i][1] for b in boxes)) for i in range(2))


def window(functions: Sequence[Function], box: Box) -> Box:
    """The part of the box where any of the densities is to be seen, with a margin."""
    seen = np.zeros((COARSE, COARSE), bool)
    for function in functions:
        density = on_grid(function, box, COARSE)
        seen |= density > VISIBLE * density.max()
    sides = []
    for axis, (low, high) in enumerate(box):
        at = np.flatnonzero(seen.any(1 - axis))
        cell = (high - low) / COARSE
        first, last = low + cell * at[0], low + cell * (at[-1] + 1)
        margin = 0.06 * (last - first)
        sides.append((float(first - margin), float(last + margin)))
    return tuple(sides)


@torch.no_grad()
def on_grid(function: Function, box: Box, num: int) -> np.ndarray:
    """The density at the centres of num x num cells, (num, num); axis 0 is z_1. NaN counts as 0."""
    z = Grid.midpoints(box, num).z.reshape(-1, 2)
    log_density = torch.cat([function(part).double() for part in z.split(CHUNK)])
    return log_density.exp().nan_to_num(nan=0.0).reshape(num, num).numpy()


def _split(flow: Flow) -> tuple[list[Any], list[Any]]:
    """The layers, and the affine layer at the end, if there is one."""
    layers = list(flow.transforms)
    return (layers[:-1], layers[-1:]) if layers and isinstance(layers[-1], Affine) else (layers, [])


def _count(layer: Any) -> int:
    return layer.num_flows if isinstance(layer, (PlanarStack, RadialStack)) else 1
