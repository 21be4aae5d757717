r"""Scouts from a scan: log p at very many places around the known mode, once each; where it stands out they set out.

A second mode of half the width is above what the known one leaves in a ball: if it is d sds away, of radius 2 d / 3,
with its centre 4 d / 3 away. Few directions meet that ball, but values alone are cheap, and in it log p is far above
that of other places equally far out.

- Outside: a share of about 2^-D of the directions meets it, and more where d is small beside sqrt(D). Up to 16
  dimensions a few of 2^(D + 6) places do, up to 20 of 2^20 if d is 6; beyond them no number that can be paid for.
- Inside the known mode's bulk, a few sds from its centre, where in many dimensions no draw comes: about one place in a
  thousand, however high D is.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from flowvi.fit.whiten import Start
from flowvi.targets import LogDensity

__all__ = ["NUM_SCOUTS", "stand_out"]

NUM_SCOUTS = 16
"""From the outside, and as many from the inside."""

LEAST_DIM, MOST_DIM = 3, 20
"""Below, scouts that set out at random find everything; above, nothing outside is found."""

NEAREST, MIDDLE, FARTHEST = 1.0, 1.2, 8.0
"""How far out to look: inside from 1 sd to 1.2 sqrt(D) sds, and outside to 8 sqrt(D)."""

PLACES_INSIDE, PLACES_AT_0, MOST_PLACES = 2**15, 2**6, 2**20
MOST_WORK = 5e7
"""Data points whose density is asked for at most; not seconds, so that bits are the same."""

SHELL, LEAST_SHELL, AT_ONCE = 4096, 256, 2**22
"""Places that are equally far out, about, and are looked at together: fewer where they have more data than that."""

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
        (32, D), (16, D) above 20 dimensions, and (0, D) where D is so small that it doesn't help.
    """
    dim = len(known.loc)
    found = [known.loc.new_empty(0, dim)]
    affordable = int(MOST_WORK / max(1, num_data))
    shell = max(LEAST_SHELL, min(SHELL, AT_ONCE // max(1, num_data)))
    middle = MIDDLE * dim**0.5
    if dim >= LEAST_DIM:
        found.append(_between(NEAREST, middle, min(PLACES_INSIDE, affordable), shell, known, density, generator))
    if LEAST_DIM <= dim <= MOST_DIM:
        num = min(PLACES_AT_0 * 2**dim, MOST_PLACES, affordable)
        found.append(_between(middle, FARTHEST * dim**0.5, num, shell, known, density, generator))
    return torch.cat(found)


def _between(
    inner: float, outer: float, num: int, shell: int, known: Start, density: LogDensity, generator: torch.Generator
) -> Tensor:
    """What stands out (16, D) among about so many places at distances between these, in sds."""
    dim, device = len(known.loc), known.loc.device
    shells = max(1, num // shell)
    edges = torch.linspace(math.log(inner), math.log(outer), shells + 1).exp().tolist()
    best: list[tuple[Tensor, Tensor]] = []
    for low, high in itertools.pairwise(edges):
        x = torch.randn(min(num, shell), dim, generator=generator, dtype=torch.float64, device=device)
        share = torch.rand(len(x), 1, generator=generator, dtype=torch.float64, device=device)
        x = ((low + (high - low) * share) * torch.nn.functional.normalize(x, dim=1)).to(known.loc)
        log_p = density(known.place(x)).double()
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
    again = torch.arange(NUM_SCOUTS, device=device) % len(chosen)
    return known.place(x[order[torch.tensor(chosen, device=device)[again]]])
