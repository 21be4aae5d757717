"""Values of a target's sites as a user gives them, and the density of a flow at them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowvi.checks import as_tensor
from flowvi.errors import DimensionError, OptionError
from flowvi.flow import Flow
from flowvi.targets.density import LogDensity

__all__ = ["flatten", "log_prob_at"]


def flatten(values: Mapping[str, Any] | Any, density: LogDensity) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Latent values with one batch dimension, and the batch shape they had.

    Args:
        values: latent site name -> value of shape (*batch, *shape); or the value, where there is one site.
        density: the target, with its sites.

    Raises:
        OptionError: a latent site is missing, or a value isn't a tensor of numbers.
        DimensionError: a value's shape doesn't fit its site, or two batches differ.
    """
    sites = density.sites
    if not isinstance(values, Mapping):
        if len(sites) != 1:
            raise OptionError(
                f"values must be a dict with the sites {', '.join(s.name for s in sites)}, got {type(values).__name__}."
            )
        values = {sites[0].name: values}
    missing = [site.name for site in sites if site.name not in values]
    if missing:
        raise OptionError(f"values lacks the latent sites {', '.join(missing)}: log_prob needs them all.")
    flat: dict[str, Tensor] = {}
    batches: dict[str, tuple[int, ...]] = {}
    for site in sites:
        what = f"the value of site {site.name!r}"
        value = as_tensor(what, values[site.name], density.dtype, density.device)
        split = value.ndim - len(site.shape)
        if split < 0 or tuple(value.shape[split:]) != tuple(site.shape):
            raise DimensionError(
                f"site {site.name!r} has shape {tuple(site.shape)}, with batch dimensions in front if "
                f"wanted; got {tuple(value.shape)}."
            )
        batches[site.name] = tuple(value.shape[:split])
        flat[site.name] = value.reshape(math.prod(batches[site.name]), *site.shape)
    if len(set(batches.values())) > 1:
        raise DimensionError(f"the batch dimensions of the values must agree, got {batches}.")
    return flat, next(iter(batches.values()))


def log_prob_at(values: Mapping[str, Tensor], flow: Flow, density: LogDensity) -> Tensor:
    """Log q (S,) at values (S, *shape) of the sites: -inf outside of a support, NaN at NaN."""
    z, log_jacobian = density.unconstrain(values)
    ok = z.isfinite().all(-1) & log_jacobian.isfinite()  # not so outside of the support
    safe = torch.where(ok[:, None], z, 0.0)
    log_q = flow.log_prob(safe.to(flow.dtype)).to(density.dtype) + log_jacobian
    nan = torch.stack([v.isnan().reshape(len(v), -1).any(-1) for v in values.values()]).any(0)
    log_q = torch.where(ok, log_q, -math.inf)
    return torch.where(nan, math.nan, log_q)
