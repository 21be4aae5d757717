"""Which modes hang together: a path between two of them along which the density hardly dips.

Starts that settled in parts of one curved posterior look like modes. Between such parts a string of points, drawn
uphill across its own direction, finds a ridge; between separate modes there is a valley that it can't avoid.

Source: E, Ren & Vanden-Eijnden (2007), "Simplified and improved string method", J. Chem. Phys. 126.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.fit.modes import _Gaussians
from flowvi.fit.whiten import Start
from flowvi.objectives import Target

__all__ = ["connected", "paths", "straight"]

NUM_POINTS, NUM_STEPS = 21, 80
STEP, LONGEST = 0.1, 0.15
DIP = 2.0
"""A dip in log p, in nats below the lower of the two ends, that still counts as a path."""

STRAIGHT_DIP = 0.5
"""The same for a straight line, on which a density with one mode and no bend has no dip at all."""


def connected(modes: Sequence[Start], target: Target) -> list[list[int]]:
    """The modes in groups: within one a path leads from each to each, possibly over others.

    Args:
        modes: Gaussians, such as `flowvi.fit.modes.distinct` gives.
        target: log p and its gradient.

    Returns:
        The numbers of the modes of each group; one group for one connected posterior.
    """
    pairs = list(itertools.combinations(range(len(modes)), 2))
    found = paths([(modes[i], modes[j]) for i, j in pairs], target) if pairs else []
    groups = [[i] for i in range(len(modes))]
    for (i, j), joined in zip(pairs, found, strict=True):
        if joined:
            both = [group for group in groups if i in group or j in group]
            groups = [group for group in groups if group not in both] + [sorted(itertools.chain(*both))]
    return sorted(groups)


@torch.no_grad()
def paths(pairs: Sequence[tuple[Start, Start]], target: Target, dip: float = DIP) -> list[bool]:
    """Whether a string between two means finds a way without a dip, for several pairs at once.

    Args:
        pairs: of Gaussians, at least one.
        target: log p and its gradient.
        dip: the largest that counts as none, in nats.
    """
    ends = [_Gaussians(pair) for pair in pairs]
    roots = [both.tril @ both.tril.mT if both.full else both.tril.square().diag_embed() for both in ends]
    tril = torch.linalg.cholesky(torch.stack([root.mean(0) for root in roots]))
    loc = torch.stack([both.loc[:1] for both in ends])
    way = torch.stack([both.loc[1:] for both in ends]) - loc
    way = torch.linalg.solve_triangular(tril, way.mT, upper=False).mT
    x = torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64, device=loc.device).unsqueeze(1) * way
    found = torch.zeros(len(pairs), dtype=torch.bool, device=loc.device)
    left = torch.arange(len(pairs), device=loc.device)
    for _ in range(NUM_STEPS):
        z = (loc[left] + x @ tril[left].mT).to(pairs[0][0].loc.dtype)
        log_p, grad = target.value_and_grad(z.flatten(0, 1))
        log_p = torch.nan_to_num(log_p.double(), nan=-torch.inf).view(x.shape[:2])
        level = log_p.amin(1) >= torch.minimum(log_p[:, 0], log_p[:, -1]) - dip
        found[left[level]] = True
        if bool(level.all()):
            break
        pull = torch.nan_to_num(grad.double().view_as(x) @ tril[left])
        left, x, pull = left[~level], x[~level], pull[~level]
        along = torch.nn.functional.normalize(x[:, 2:] - x[:, :-2], dim=-1)
        across = pull[:, 1:-1] - (pull[:, 1:-1] * along).sum(-1, keepdim=True) * along
        move = STEP * across
        length = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
        x[:, 1:-1] += move * (LONGEST / length.clamp_min(1e-12)).clamp_max(1.0)
        x = _evenly(x)
    return found.tolist()


@torch.no_grad()
def straight(places: Tensor, modes: Sequence[Tensor], target: Target) -> Tensor:
    """Whether a straight line to any of the modes is without a dip.

    Args:
        places: where to begin (S, D).
        modes: where to end (D,) each.
        target: log p.

    Returns:
        (S,), bool.
    """
    share = torch.linspace(0, 1, NUM_POINTS // 2 + 1, dtype=places.dtype, device=places.device)
    found = torch.zeros(len(places), dtype=torch.bool, device=places.device)
    for mode in modes:
        z = places[:, None] + share[:, None] * (mode - places)[:, None]
        log_p = target.value_and_grad(z.reshape(-1, places.shape[1]))[0].view(len(places), -1)
        log_p = torch.nan_to_num(log_p, nan=-torch.inf)
        found |= log_p.amin(1) >= torch.minimum(log_p[:, 0], log_p[:, -1]) - STRAIGHT_DIP
    return found


def _evenly(x: Tensor) -> Tensor:
    """The same strings (P, n, D) with their points at equal distances."""
    at = torch.linalg.vector_norm(x.diff(dim=1), dim=-1).cumsum(1)
    at = torch.cat([torch.zeros_like(at[:, :1]), at], 1)
    goal = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device) * at[:, -1:]
    right = torch.searchsorted(at, goal).clamp(1, x.shape[1] - 1)
    before, after = at.gather(1, right - 1), at.gather(1, right)
    share = ((goal - before) / (after - before).clamp_min(1e-12)).unsqueeze(-1)
    rows = right.unsqueeze(-1).expand_as(x)
    left = x.gather(1, rows - 1)
    return left + share * (x.gather(1, rows) - left)
