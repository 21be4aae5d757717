r"""Scouts by heat: chains at p^(1/T) walk out of a known mode and into narrow ones, which no slope from afar leads to.

A mode of half the width in each of D coordinates is the uphill end of a 2^-D-th of the directions at most, so scouts
that set out at random pass by it. At a temperature T where both modes are wide enough to walk between them, chains stay
in it for a share of about 2^(-D (1 - 1/T)) of their steps. So a few hundred of them at four temperatures, looked after
every other trajectory, find it up to D of about 12; in 20 dimensions nothing that looks at values and gradients does.

Source: Neal (1996), "Sampling from multimodal distributions using tempered transitions", Statistics and Computing 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.fit.modes import near
from flowvi.fit.whiten import Start
from flowvi.objectives import Target

__all__ = ["MAX_DIM", "MAX_SCOUTS", "wander"]

TEMPERATURES = (4.0, 10.0, 25.0, 60.0)
CHAINS = 64  # at each temperature
LOOKS, LEAST_LOOKS, MOST_LOOKS = 32, 6, 128  # in 7 dimensions, and bounds elsewhere: each doubles what is needed
HOPELESS_DIM = 17  # from where on more looks don't help
MOST_WORK = 2e8
"""Data points whose density is asked for, but for the least looks; not seconds, so that bits are the same."""

TRAJECTORIES, LEAPS = 2, 3
STEP, MOST_STEP = 0.6, 0.9  # of a leap, in sds at the chain's temperature
COOL_STEPS = 4  # uphill, after which a chain from a known mode's basin is back there where it is nearly Gaussian
MAX_SCOUTS = 128

MAX_DIM = 50
"""The largest D at which this can find what other scouts don't."""


@torch.no_grad()
def wander(
    known: Sequence[Start],
    target: Target,
    generator: torch.Generator,
    *,
    num_data: int = 0,
    num_temperatures: int = len(TEMPERATURES),
) -> Tensor:
    """Points from where the way uphill may not lead back to a known mode.

    Args:
        known: Gaussians of the modes that are known, the best first.
        target: log p and its gradient.
        generator: where the randomness comes from.
        num_data: data points behind log p: with many of them there are fewer looks.
        num_temperatures: how many of the four are used, the lowest first: how far it goes.

    Returns:
        (S, D), with S at most 128; often none.
    """
    loc, root = known[0].loc, known[0].scale_tril
    dim = len(loc)
    heat = loc.new_tensor(TEMPERATURES[:num_temperatures]).repeat_interleave(CHAINS)
    full = root.dim() == 2

    def place(x: Tensor) -> Tensor:
        return loc + (x @ root.mT if full else x * root)

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        """Log p and its gradient in the mode's own sds; -inf and 0 where they are not finite."""
        log_p, grad = target.value_and_grad(place(x))
        grad = grad.to(root)
        pull = grad @ root if full else grad * root
        log_p, pull = log_p.to(x), pull.to(x)  # the target has a dtype of its own
        fine = log_p.isfinite() & pull.isfinite().all(-1)
        return torch.where(fine, log_p, -math.inf), torch.where(fine[:, None], pull, 0.0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(loc)

    x = heat.sqrt()[:, None] * noise(len(heat), dim)
    log_p, pull = at(x)
    for _ in range(6):  # nearer to the known mode, until it is finite
        x = torch.where(log_p.isfinite()[:, None], x, 0.5 * x)
        log_p, pull = at(x)
    here = _Points(x, log_p, pull)
    step = torch.full_like(heat, STEP)
    calls = TRAJECTORIES * LEAPS + COOL_STEPS
    affordable = MOST_WORK / (calls * len(heat) * max(1, num_data))
    needed = LOOKS if dim >= HOPELESS_DIM else round(LOOKS * 2.0 ** (dim - 7))
    looks = max(LEAST_LOOKS, int(min(MOST_LOOKS, needed, affordable)))
    found: list[Tensor] = []
    for _ in range(looks):
        for _ in range(TRAJECTORIES):
            jitter = 0.8 + 0.4 * float(
                torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
            )
            uniform = torch.rand(len(heat), generator=generator, dtype=torch.float64, device=generator.device).to(loc)
            here, gain = _trajectory(here, noise(len(heat), dim), jitter * step, heat, uniform, at)
            step = torch.where(_by_temperature(gain.clamp_max(0.0).exp()) > 0.7, 1.1 * step, 0.8 * step)
            step = step.clamp(1e-3, MOST_STEP)
        cool = _cooled(here, at)
        ended = place(cool.x[cool.log_p.isfinite()])
        found.append(ended[~near(known, ended).any(1)])
    scouts = torch.cat(found)
    if len(scouts) > MAX_SCOUTS:
        order = torch.randperm(len(scouts), generator=generator, device=generator.device)
        scouts = scouts[order[:MAX_SCOUTS].to(scouts.device)]
    return scouts


class _Points(NamedTuple):
    """Chains' places x (C, D) in the known mode's sds, log p (C,) and its gradient there (C, D)."""

    x: Tensor
    log_p: Tensor
    pull: Tensor

    def replaced(self, where: Tensor, new: _Points) -> _Points:
        """Those of the new ones where it says so."""
        return _Points(
            *(torch.where(where if o.dim() == 1 else where[:, None], n, o) for o, n in zip(self, new, strict=True))
        )


At = Callable[[Tensor], tuple[Tensor, Tensor]]


def _trajectory(
    here: _Points, momentum: Tensor, step: Tensor, heat: Tensor, uniform: Tensor, at: At
) -> tuple[_Points, Tensor]:
    """One trajectory of HMC at p^(1/T) for each chain, and the log of its chance to be taken."""
    leap = (step * heat.sqrt())[:, None]  # of x; the momentum has unit scale
    x, log_p, pull, p = *here, momentum
    for _ in range(LEAPS):
        half = p + 0.5 * leap * pull / heat[:, None]
        x = x + leap * half
        log_p, pull = at(x)
        p = half + 0.5 * leap * pull / heat[:, None]
    gain = (log_p - here.log_p) / heat - 0.5 * (p.square() - momentum.square()).sum(-1)
    gain = torch.where(here.log_p.isfinite(), torch.where(gain.isnan(), -math.inf, gain), math.inf)
    gain = torch.where(x.isfinite().all(-1), gain, -math.inf)
    return here.replaced(uniform.log() < gain, _Points(x, log_p, pull)), gain


def _cooled(here: _Points, at: At) -> _Points:
    """A few steps uphill, the first of them Newton's if the mode is the known one and Gaussian."""
    length = torch.ones_like(here.log_p)
    for _ in range(COOL_STEPS):
        x = here.x + length[:, None] * here.pull
        new = _Points(x, *at(x))
        better = new.log_p > here.log_p
        here = here.replaced(better, new)
        length = torch.where(better, length, 0.3 * length)
    return here


def _by_temperature(x: Tensor) -> Tensor:
    """Each chain's value replaced by the mean of its temperature's."""
    return x.view(-1, CHAINS).mean(1).repeat_interleave(CHAINS)
