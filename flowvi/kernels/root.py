"""The scalar equation behind a planar layer's inverse: p + m tanh(p) = c, solved to rounding for every m > -1."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_STEPS = 100


def planar_root(c: Tensor, one_plus_m: Tensor) -> Tensor:
    """The root p of p + m tanh(p) = c, elementwise.

    The left side is odd and increasing, so p = sign(c) p(|c|). For p >= 0 it is concave where m >= 0 and convex
    where m < 0, so Newton's method goes to the root monotonically from below or from above, from the better
    of two bounds: tanh p <= 1 and tanh p <= p. It stops where rounding stops it; no bisection is needed.

    Args:
        c: right sides, any shape.
        one_plus_m: 1 + m > 0, of a shape that broadcasts with c.

    Returns:
        p, of the broadcast shape.
    """
    c, one_plus_m = torch.broadcast_tensors(c, one_plus_m)
    m = one_plus_m - 1
    target = c.abs()
    by_one, by_slope = target - m, target / one_plus_m
    rising = m >= 0  # the bounds are below the root
    p = torch.where(rising, torch.maximum(by_one, by_slope), torch.minimum(by_one, by_slope))
    tolerance = 2 * torch.finfo(c.dtype).eps
    for step in range(_MAX_STEPS):
        t = torch.tanh(p)
        tt = t * t
        move = (p + m * t - target) / (tt + (1 - tt) * one_plus_m)
        new = p - move
        # A step against the monotone direction is rounding: the root is reached.
        moving = torch.where(rising, new > p, new < p) & (move.abs() > tolerance * p)
        p = torch.where(moving, new, p)
        if step % 4 == 3 and not bool(moving.any()):
            break
    return torch.copysign(p, c)
