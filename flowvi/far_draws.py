"""Draws of q that lie far out where the target has next to nothing, so seldom that a diagnosis has none of them.

A flow that is right on the logarithm of a scale can have one draw in a hundred thousand whose scale is hundreds of sds
too large. The importance weights of ten thousand draws don't know of it, and the sd of many draws is decided by it. So
many more draws are made, which is cheap, and the target is asked at those few alone that lie outside of nearly all
that were seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flowvi.columns import columns
from flowvi.targets import LogDensity

__all__ = ["overshoot"]

_SEEN = 5
"""A draw is far in a column where fewer of those that were seen lie so far out."""


@torch.no_grad()
def overshoot(
    z: Tensor, log_evidence: float, further: Iterable[tuple[Tensor, Tensor]], density: LogDensity
) -> tuple[float, str]:
    """How much far draws of q that the target hasn't enlarge an sd.

    With t the distance from a column's mean in sds, and w = p(z) / (Z q(z)), the far draws add t^2 to a variance of 1
    where they should add w t^2.

    Args:
        z: Draws of q that were diagnosed (S, D).
        log_evidence: log Z.
        further: Further draws z (s, D) with their log q (s,), a chunk at a time.
        density: The target, of all data.

    Returns:
        The largest relative excess of an sd, at least 0, and the column's name.
    """
    seen, name = columns(density, z)
    seen = seen.double()
    mean, sd = seen.mean(0), seen.std(0)
    still = ~(sd > 1e-6 * mean.abs())  # a constant; or not finite, of which others tell
    sd[still] = torch.inf
    bound = ((seen - mean) / sd).square().nan_to_num(0.0).topk(min(_SEEN, len(seen)), 0).values[-1]
    num, excess = 0, torch.zeros_like(mean)
    parts = (part for chunk in further for part in zip(*(x.split(len(z)) for x in chunk), strict=True))
    for more, log_q in parts:  # not more at once than was seen: of too many, `columns` has not all
        values = columns(density, more)[0][:, : len(mean)].double()
        square = ((values - mean) / sd).square().nan_to_num(0.0)
        far = (square > bound) & ~still
        row = far.any(1)
        num += len(more)
        if not row.any():
            continue
        log_w = density(more[row]).double() - log_q[row].double() - log_evidence
        weight = log_w.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf).exp()
        excess += (torch.where(far[row], square[row], 0.0) * (1 - weight[:, None])).sum(0)
    sds = (1 + (excess / max(num, 1)).clamp_min(0)).sqrt() - 1
    return float(sds.max()), name(int(sds.argmax()))
