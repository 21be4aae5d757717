"""Label switching: modes that are one mode with the elements of some sites in another order.

In a mixture model with K exchangeable components every mode has K! copies. All of them together are the posterior, but
the mean of one component's location over all of them says nothing. Such modes are told here by their draws: the means
of all sites agree, in sds, after one permutation of the elements, and do not without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from flowvi.fit.modes import _Gaussians
from flowvi.fit.whiten import Start
from flowvi.targets import LogDensity

__all__ = ["label_switching"]

NUM_DRAWS = 512
ALIKE = 1.0
"""Means that differ by less, in sds, agree."""

MAX_ALL = 6
"""The largest K of which all permutations are tried; of a larger one only exchanges of two elements."""


@torch.no_grad()
def label_switching(modes: Sequence[Start], density: LogDensity) -> str | None:
    """Says so in words if some modes are copies of others with permuted elements.

    A site takes part with each axis of K elements. A single number in (0, 1), such as the weight of the first of two
    components, takes part as x -> 1 - x.

    Args:
        modes: Gaussians on the unconstrained space, such as `flowvi.fit.modes.distinct` gives.
        density: for the map to the sites.

    Returns:
        One or two sentences, or None where nothing of the kind was found.
    """
    if len(modes) < 2:
        return None
    moments = [_moments(mode, density) for mode in modes]
    units = {s.name for s in density.sites if s.shape.numel() == 1 and s.support in (constraints.unit_interval,)}
    copies, names = {0}, set()
    for i, j in itertools.combinations(range(len(modes)), 2):
        moved = _exchanged(moments[i], moments[j], units)
        if moved:
            copies |= {i, j}
            names |= moved
    if not names:
        return None
    order = [site.name for site in density.sites if site.name in names]
    what = f"the elements of {_and(order)}" + (" are" if len(order) == 1 else ", taken together, are")
    return (
        f"Label switching: {len(copies)} of {len(modes)} modes are copies of each other in which {what} in another "
        f"order. Means and sds of single elements mix them up; fix the order (such as constraints.ordered_vector), or "
        f"look at what does not depend on it."
    )


def _moments(mode: Start, density: LogDensity) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and sd of each latent site under a Gaussian."""
    generator = torch.Generator(density.device).manual_seed(0)
    values = density.constrain(_Gaussians([mode]).sample(NUM_DRAWS, generator).to(density.dtype))
    sites = {site.name: values[site.name].double() for site in density.sites}
    return {name: (x.mean(0), x.std(0)) for name, x in sites.items()}


def _exchanged(
    a: Mapping[str, tuple[Tensor, Tensor]], b: Mapping[str, tuple[Tensor, Tensor]], units: set[str]
) -> set[str]:
    """The sites whose elements are in another order in b, all in the same one; empty if b is no such copy of a."""
    fixed = {name for name in a if _alike(a[name], b[name])}
    if len(fixed) == len(a):
        return set()
    rest = [name for name in a if name not in fixed]
    sizes = {size for name in rest for size in a[name][0].shape if size > 1}
    if not sizes and set(rest) <= units:
        return set()  # a number and its complement alone are no labels
    for size in sorted(sizes):
        for order in _orders(size):
            if all(_matches(a[name], b[name], order, name in units) for name in rest):
                return set(rest)
    return set()


def _matches(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], order: tuple[int, ...], unit: bool) -> bool:
    """Whether a site of b is that of a in this order, along one of its axes."""
    if unit and len(order) == 2:
        return _alike((1 - a[0], a[1]), b)
    axes = [axis for axis, size in enumerate(a[0].shape) if size == len(order)]
    return any(_alike((a[0].movedim(x, 0)[list(order)], a[1].movedim(x, 0)[list(order)]), _front(b, x)) for x in axes)


def _front(pair: tuple[Tensor, Tensor], axis: int) -> tuple[Tensor, Tensor]:
    return pair[0].movedim(axis, 0), pair[1].movedim(axis, 0)


def _alike(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Whether two vectors of means agree, in sds."""
    sd = ((a[1].square() + b[1].square()) / 2).sqrt().clamp_min(1e-12)
    return bool(((a[0] - b[0]).abs() / sd < ALIKE).all())


def _orders(size: int) -> Iterator[tuple[int, ...]]:
    """Permutations of K elements but for the identity; beyond `MAX_ALL` only exchanges of two."""
    identity = tuple(range(size))
    if size <= MAX_ALL:
        yield from (order for order in itertools.permutations(identity) if order != identity)
        return
    for i, j in itertools.combinations(range(size), 2):
        order = list(identity)
        order[i], order[j] = j, i
        yield tuple(order)


def _and(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
