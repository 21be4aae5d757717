r"""Scouts from a scan: log p at very many places around the known mode, once each; where it stands out they set out.

Beyond some distance a far mode's density is above what is left of the known one's, however narrow it is: of half its
width, d sds away, in a ball of radius 2 d / 3 whose centre is 4 d / 3 away. A direction at random meets that ball with
a chance that falls like 2^-D, so of 2^(D + 6) places a few are in it, and values alone are cheap. There log p is far
above that of other places equally far out. Beyond 16 dimensions no number of places that can be paid for does it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowvi.fit.whiten import Start
from flowvi.targets import LogDensity

__all__ = ["NUM_SCOUTS", "stand_out"]

NUM_SCOUTS = 16
LEAST_DIM, MOST_DIM = 3, 16
"""Below, scouts that set out at random find everything; above, so many places find nothing."""

NEAREST, FARTHEST = 1.2, 8.0
"""How far out to look, times sqrt(D) sds."""

MOST_PLACES, PLACES_AT_0 = 2**21, 2**6
MOST_WORK = 5e7
"""Data points whose density is asked for at most; not seconds, so that bits are the same."""

SHELL = 1024
"""Places that are equally far out, about, and are looked at together."""

CANDIDATES, SAME_WAY = 2048, 0.25
"""How many of the outstanding are considered, and the cosine from which on two are in the same direction."""


@torch.no_grad()
def stand_out(known: Start, density: LogDensity, generator: torch.Generator, num_data: int = 0) -> Tensor:
    """Places (S, D) where log p is far above what it is elsewhere at their distance, in different directions.

    Args:
        known: the Gaussian of the best known mode.
        density: the target.
        generator: where the randomness comes from.
        num_data: data points behind log p: with many of them it looks at fewer places.

    Returns:
        (16, D), or (0, D) where D is too small or too large for it to help.
    """
    loc, root = known.loc, known.scale_tril
    dim, device = len(loc), loc.device
    if not LEAST_DIM <= dim <= MOST_DIM:
        return loc.new_empty(0, dim)
    num = int(min(MOST_PLACES, PLACES_AT_0 * 2.0**dim, MOST_WORK / max(1, num_data)))
    shells = max(1, num // SHELL)
    best: list[tuple[Tensor, Tensor]] = []
    edges = torch.linspace(math.log(NEAREST), math.log(FARTHEST), shells + 1).exp() * dim**0.5
    for inner, outer in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        x = torch.randn(min(num, SHELL), dim, generator=generator, dtype=torch.float64, device=device)
        share = torch.rand(len(x), 1, generator=generator, dtype=torch.float64, device=device)
        x = ((inner + (outer - inner) * share) * torch.nn.functional.normalize(x, dim=1)).to(loc)
        z = loc + (x @ root.mT if root.dim() == 2 else x * root)
        log_p = density(z).double()
        log_p = torch.where(log_p.isfinite(), log_p, -math.inf)
        middle = log_p.median()
        spread = (log_p - middle).abs().median()
        excess = (log_p - middle) / (spread + 1e-3 * middle.abs() + 1e-300)
        top = excess.nan_to_num(nan=-math.inf).topk(min(len(x), max(8, CANDIDATES // shells)))
        best.append((top.values, x[top.indices]))
    excess, x = (torch.cat(part) for part in zip(*best, strict=True))
    order = excess.argsort(descending=True, stable=True)[:CANDIDATES]
    direction = torch.nn.functional.normalize(x[order].double(), dim=1)
    chosen: list[int] = []
    for i in range(len(order)):
        if len(chosen) < NUM_SCOUTS and (not chosen or bool((direction[chosen] @ direction[i]).max() < SAME_WAY)):
            chosen.append(i)
    x = x[order[torch.tensor(chosen, device=device)[torch.arange(NUM_SCOUTS, device=device) % len(chosen)]]]
    return loc + (x @ root.mT if root.dim() == 2 else x * root)
