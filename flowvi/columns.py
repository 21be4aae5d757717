"""What a user sees of draws, as columns: the coordinates of z, and the sites' own values where these are others.

A scale is judged on its own scale as well as on the logarithm's: a flow that is right in log tau can be far off in the
mean and sd of tau, when its upper tail is too heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowvi.targets import LogDensity
from flowvi.targets.sites import element_name

__all__ = ["columns"]

MAX_ELEMENTS = 30_000_000
"""More values than that are not made: the coordinates of z alone have to do."""

CHUNK = 4_000_000
"""Values that the model is asked for at once, deterministic sites among them."""


@torch.no_grad()
def columns(density: LogDensity, z: Tensor) -> tuple[Tensor, Callable[[int], str]]:
    """The columns of draws, and a column's name.

    Args:
        density: the target.
        z: draws, (S, D).

    Returns:
        (S, D + C), and the name of a column such as "tau" or "theta[2]".
    """
    wanted = sum(math.prod(site.shape) for site in density.sites)
    if density.path != "graph" or len(z) * wanted > MAX_ELEMENTS:
        return z, density.coordinate_name
    made = wanted + sum(math.prod(site.shape) for site in density.deterministic)
    parts = [density.constrain(part) for part in z.split(max(1, CHUNK // max(1, made)))]
    found, names, start = [z], [density.coordinate_name(d) for d in range(density.dim)], 0
    for site in density.sites:
        size = math.prod(site.unconstrained_shape)
        own = z[:, start : start + size]
        value = torch.cat([part[site.name].reshape(len(part[site.name]), -1) for part in parts])
        start += size
        if value.shape != own.shape or not torch.equal(value, own.to(value)):
            found.append(value.to(z))
            names += [element_name(site.name, tuple(site.shape), i) for i in range(value.shape[1])]
    return torch.cat(found, 1), names.__getitem__
