"""Which modes hang together: a path between two of them along which the density hardly dips.

Starts that settled in parts of one curved posterior look like modes. Between such parts a string of points, drawn
uphill across its own direction, finds a ridge; between separate modes there is a valley that it can't avoid.

Source: E, Ren & Vanden-Eijnden (2007), "Simplified and improved string method", J. Chem. Phys. 126.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.fit.modes import _Gaussians
from flowvi.fit.whiten import Start
from flowvi.objectives import Target

__all__ = ["connected"]

NUM_POINTS, NUM_STEPS = 21, 80
STEP, LONGEST = 0.1, 0.15
DIP = 2.0
"""A dip in log p, in nats below the lower of the two ends, that still counts as a path."""


@torch.no_grad()
def connected(modes: Sequence[Start], target: Target) -> list[list[int]]:
    """The modes in groups: within one a path leads from each to each, possibly over others.

    Args:
        modes: Gaussians, such as `flowvi.fit.modes.distinct` gives.
        target: log p and its gradient.

    Returns:
        The numbers of the modes of each group; one group for one connected posterior.
    """
    groups: list[list[int]] = []
    for i in range(len(modes)):
        joined = [group for group in groups if any(_path(modes[i], modes[j], target) for j in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted(sum(joined, [i])))
    return sorted(groups)


def _path(a: Start, b: Start, target: Target) -> bool:
    """Whether a string between two means finds a way without a dip."""
    both = _Gaussians([a, b])
    root = (both.tril @ both.tril.mT).mean(0) if both.full else both.tril.square().mean(0).diag()
    tril = torch.linalg.cholesky(root)
    ends = torch.linalg.solve_triangular(tril, (both.loc - both.loc[0]).mT, upper=False).mT
    share = torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64, device=ends.device).unsqueeze(1)
    x = ends[0] + share * (ends[1] - ends[0])
    for _ in range(NUM_STEPS):
        log_p, grad = target.value_and_grad((both.loc[0] + x @ tril.mT).to(a.loc.dtype))
        log_p = torch.nan_to_num(log_p.double(), nan=-torch.inf)
        if bool(log_p.min() >= torch.minimum(log_p[0], log_p[-1]) - DIP):
            return True
        pull = torch.nan_to_num(grad.double() @ tril)
        along = torch.nn.functional.normalize(x[2:] - x[:-2], dim=1)
        across = pull[1:-1] - (pull[1:-1] * along).sum(1, keepdim=True) * along
        move = STEP * across
        length = torch.linalg.vector_norm(move, dim=1, keepdim=True)
        x[1:-1] += move * (LONGEST / length.clamp_min(1e-12)).clamp_max(1.0)
        x = _evenly(x)
    return False


def _evenly(x: Tensor) -> Tensor:
    """The same string with its points at equal distances."""
    at = torch.cat([x.new_zeros(1), torch.linalg.vector_norm(x.diff(dim=0), dim=1).cumsum(0)])
    goal = torch.linspace(0, 1, len(x), dtype=x.dtype, device=x.device) * at[-1]
    right = torch.searchsorted(at, goal).clamp(1, len(x) - 1)
    share = ((goal - at[right - 1]) / (at[right] - at[right - 1]).clamp_min(1e-12)).unsqueeze(1)
    return x[right - 1] + share * (x[right] - x[right - 1])
