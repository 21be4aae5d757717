r"""Scouts by heat: chains at p^(1/T) walk out of a known mode and into narrow ones, which no slope from afar leads to.

A mode of half the width in each of D coordinates is the uphill end of a 2^-D-th of the directions at most, so scouts
that set out at random pass by it. At a temperature T where both modes are wide enough to walk between them, chains stay
in it for a share of about 2^(-D (1 - 1/T)) of their steps. So a few hundred of them at four temperatures, looked after
every other trajectory, find it up to D of about 12; in 20 dimensions nothing that looks at values and gradients does.

Source: Neal (1996), "Sampling from multimodal distributions using tempered transitions", Statistics and Computing 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowvi.objectives import Target

__all__ = ["MAX_DIM", "wander"]

TEMPERATURES = (4.0, 10.0, 25.0, 60.0)
CHAINS = 64  # at each temperature
LOOKS, LEAST_LOOKS, MOST_LOOKS = 32, 6, 256  # in 7 dimensions, and bounds elsewhere: each doubles what is needed
HOPELESS_DIM = 17  # from where on more looks don't help
TRAJECTORIES, LEAPS = 2, 3
STEP, MOST_STEP = 0.6, 0.9  # of a leap, in sds at the chain's temperature
COOL_STEPS = 4  # uphill, after which a chain from a known mode's basin is back there where it is nearly Gaussian
MAX_SCOUTS = 128

MAX_DIM = 50
"""The largest D at which this can find what other scouts don't."""


@torch.no_grad()
def wander(
    loc: Tensor,
    root: Tensor,
    target: Target,
    generator: torch.Generator,
    *,
    reach: float,
    num_temperatures: int = len(TEMPERATURES),
) -> Tensor:
    """Points from where the way uphill may not lead back to a known mode.

    Args:
        loc: the known mode's mean (D,).
        root: its scales, (D, D) or (D,).
        target: log p and its gradient.
        generator: where the randomness comes from.
        reach: distance from the known mode, in its own sds, within which a point is back there.
        num_temperatures: how many of the four are used, the lowest first: how far it goes.

    Returns:
        (S, D), with S at most 128; often none.
    """
    dim = len(loc)
    heat = loc.new_tensor(TEMPERATURES[:num_temperatures]).repeat_interleave(CHAINS)
    full = root.dim() == 2

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        """Log p and its gradient in the mode's own sds; -inf and 0 where they are not finite."""
        z = loc + (x @ root.mT if full else x * root)
        log_p, grad = target.value_and_grad(z)
        pull = grad @ root if full else grad * root
        fine = log_p.isfinite() & pull.isfinite().all(-1)
        return torch.where(fine, log_p, -math.inf), torch.where(fine[:, None], pull, 0.0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(loc)

    x = heat.sqrt()[:, None] * noise(len(heat), dim)
    log_p, pull = at(x)
    for _ in range(6):  # nearer to the known mode, until it is finite
        x = torch.where(log_p.isfinite()[:, None], x, 0.5 * x)
        log_p, pull = at(x)
    step = torch.full_like(heat, STEP)
    found: list[Tensor] = []
    looks = LOOKS if dim >= HOPELESS_DIM else max(LEAST_LOOKS, min(MOST_LOOKS, round(LOOKS * 2.0 ** (dim - 7))))
    for _ in range(looks):
        for _ in range(TRAJECTORIES):
            momentum = noise(len(heat), dim)
            jitter = 0.8 + 0.4 * torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
            leap = (step * float(jitter) * heat.sqrt())[:, None]  # of x; the momentum has unit scale
            new_x, new_log_p, new_pull, p = x, log_p, pull, momentum
            for _ in range(LEAPS):
                half = p + 0.5 * leap * new_pull / heat[:, None]
                new_x = new_x + leap * half
                new_log_p, new_pull = at(new_x)
                p = half + 0.5 * leap * new_pull / heat[:, None]
            gain = (new_log_p - log_p) / heat - 0.5 * (p.square() - momentum.square()).sum(-1)
            gain = torch.where(log_p.isfinite(), torch.nan_to_num(gain, nan=-math.inf), math.inf)
            uniform = torch.rand(len(heat), generator=generator, dtype=torch.float64, device=generator.device).to(loc)
            taken = uniform.log() < gain
            x, pull = torch.where(taken[:, None], new_x, x), torch.where(taken[:, None], new_pull, pull)
            log_p = torch.where(taken, new_log_p, log_p)
            step = torch.where(_by_temperature(gain.clamp_max(0.0).exp()) > 0.7, 1.1 * step, 0.8 * step)
            step = step.clamp(1e-3, MOST_STEP)
        cool, cool_log_p, cool_pull = x, log_p, pull
        length = torch.ones_like(heat)
        for _ in range(COOL_STEPS):
            new_x = cool + length[:, None] * cool_pull
            new_log_p, new_pull = at(new_x)
            better = new_log_p > cool_log_p
            cool = torch.where(better[:, None], new_x, cool)
            cool_log_p = torch.where(better, new_log_p, cool_log_p)
            cool_pull = torch.where(better[:, None], new_pull, cool_pull)
            length = torch.where(better, length, 0.3 * length)
        found.append(cool[(cool.norm(dim=-1) > reach) & cool_log_p.isfinite()])
    scouts = torch.cat(found)
    if len(scouts) > MAX_SCOUTS:
        order = torch.randperm(len(scouts), generator=generator, device=generator.device)
        scouts = scouts[order[:MAX_SCOUTS].to(scouts.device)]
    return loc + (scouts @ root.mT if full else scouts * root)


def _by_temperature(x: Tensor) -> Tensor:
    """Each chain's value replaced by the mean of its temperature's."""
    return x.view(-1, CHAINS).mean(1).repeat_interleave(CHAINS)
