r"""The evidence log Z from the draws of Markov chains: bridge sampling against a Gaussian.

A Gaussian g is fitted to half of the chains, in the coordinates in which they walk, where a good flow has made the
target nearly Gaussian. Draws of g, which has Z = 1, and the other half of the chains then give the target's Z, with
w = target / g, as the solution of

    Z = mean_g[w / (s_1 w + s_2 Z)] / mean_chains[1 / (s_1 w + s_2 Z)],

where s_1 and s_2 are the shares of the two samples. It has the smallest variance of all such ratios, and needs that
the two overlap, not that one covers the other.

Sources: Meng & Wong (1996), "Simulating ratios of normalizing constants via a simple identity", Statistica Sinica 6;
Fruehwirth-Schnatter (2004), "Estimating marginal likelihoods for mixture and Markov switching models using bridge
sampling techniques", Econometrics Journal 7 (the standard error, here with the spread between chains).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowvi.hmc import Tuning
from flowvi.hmc_tuning import estimate_scale

__all__ = ["bridge", "log_evidence"]

OVERLAP = 50.0  # effective draws of g that the estimate must rest on

_Array = NDArray[np.float64]


@torch.no_grad()
def log_evidence(
    log_density: Callable[[Tensor], Tensor],
    positions: Tensor,
    log_densities: Tensor,
    ess: float,
    generator: torch.Generator,
    *,
    num_draws: int = 4096,
) -> tuple[float, float]:
    """Log Z of a target from the draws of its chains, and a standard error.

    Done twice, with the halves of the chains exchanged.

    Args:
        log_density: The target, e (S, D) -> (S,).
        positions: The chains' draws e (n, C, D), C at least 4.
        log_densities: The target at them (n, C).
        ess: What they are worth together.
        generator: Where the draws of the Gaussian come from.
        num_draws: Of the Gaussian, for each half.

    Returns:
        Log Z and its standard error, at least half the difference of the two; infinite where Gaussian and target
        overlap too little to tell.
    """
    found = []
    for half in range(2):
        fit, rest = positions[:, half::2], slice(1 - half, None, 2)
        center, scale = fit.mean((0, 1)), estimate_scale(fit)
        log_scale = float((scale.diagonal() if scale.ndim == 2 else scale).log().sum())
        unit = torch.empty(num_draws, len(center), dtype=fit.dtype, device=fit.device).normal_(generator=generator)
        constant = log_scale + 0.5 * len(center) * math.log(2 * math.pi)
        drawn = center + Tuning(1.0, 1.0, scale).along(unit)
        of_gaussian = log_density(drawn) + 0.5 * unit.square().sum(1) + constant
        offset = (positions[:, rest] - center).flatten(0, 1)
        standard = Tuning(1.0, 1.0, scale).whiten(offset)
        of_chains = log_densities[:, rest] + 0.5 * standard.square().sum(1).view(len(positions), -1) + constant
        found.append(bridge(of_gaussian.cpu().numpy(), of_chains.mT.cpu().numpy(), ess / 2))
    (a, a_se), (b, b_se) = found
    return (a + b) / 2, max(math.hypot(a_se, b_se) / 2, abs(a - b) / 2)


def bridge(log_w: _Array, log_w_chains: _Array, ess: float) -> tuple[float, float]:
    """Log Z by bridge sampling from log weights log target - log g.

    Args:
        log_w: At independent draws of g (S,); not finite ones count as zero.
        log_w_chains: At the chains' draws (C, n).
        ess: What these are worth together.

    Returns:
        Log Z and its standard error, infinite where fewer than 50 draws of g carry the estimate; NaN and infinite
        where no weight is finite.
    """
    g = np.where(np.isfinite(log_w), log_w, -np.inf)
    if not (np.isfinite(g).any() and np.isfinite(log_w_chains).all()):
        return math.nan, math.inf
    share = float(np.clip(ess / (ess + g.size), 0.01, 0.99))
    log_s1, log_s2 = math.log(share), math.log(1 - share)

    def log_mean(x: _Array) -> float:
        top = x.max()
        return float(top + np.log(np.exp(x - top).mean()))

    log_z = float(np.median(log_w_chains))
    for _ in range(1000):
        of_g = g - np.logaddexp(log_s1 + g, log_s2 + log_z)
        of_chains = -np.logaddexp(log_s1 + log_w_chains, log_s2 + log_z)
        change = log_mean(of_g) - log_mean(of_chains) - log_z
        log_z += change
        if abs(change) < 1e-8:
            break
    over_g = np.exp(of_g - log_mean(of_g))
    over_chains = np.exp(of_chains - log_mean(of_chains)).mean(1)
    variance = over_g.var(ddof=1) / over_g.size + over_chains.var(ddof=1) / over_chains.size
    carried = over_g.sum() ** 2 / np.square(over_g).sum()
    return log_z, float(np.sqrt(variance)) if carried > OVERLAP else math.inf
