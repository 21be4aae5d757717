"""Draws of many Markov chains, and whether they agree: R-hat, bulk and tail ESS by ArviZ, divergences.

R-hat compares the spread between chains with that inside of them; split and rank-normalized it sees trends, and
differences in scale, too. It says that chains agree, not that they have been everywhere: what no chain has visited
shows nowhere.

Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), "Rank-normalization, folding, and localization: an
improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16(2).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowvi.errors import OptionError

__all__ = ["Agreement", "Chains", "agreement", "describe_separation", "split_rhat"]

MIN_LENGTH = 8  # draws of a chain; R-hat needs 4 in each half
_WORST = 16  # coordinates that are looked at first
_PROBABILITIES = (0.05, 0.95)  # of the tail ESS

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Chains:
    """The draws of C chains, n of each, and where they stand.

    Attributes:
        z: Draws on the unconstrained space (C, n, D).
        log_p: The target's log density at them (C, n).
        log_q: The flow's (C, n).
        position: The chains' last points in the flow's coordinates (C, D).
        step_size: The leapfrog step that made the draws.
        trajectory: The mean length of a trajectory.
        scale: L of the mass matrix, (D, D) or (D,).
        acceptance: The mean acceptance probability.
        divergences: Steps with an energy error that was not finite or above 1000 nats.
        transitions: Steps that made the draws, over all chains; more than C n where they were thinned.
        stopped: Why the run ended: "converged", "time limit", "stuck", "interrupted" or "step limit".
        log_evidence: Log Z by bridge sampling; NaN where it wasn't estimated.
        log_evidence_se: Its standard error; infinite where it can't be relied on.
    """

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    position: Tensor
    step_size: float
    trajectory: float
    scale: Tensor
    acceptance: float
    divergences: int
    transitions: int
    stopped: str
    log_evidence: float = math.nan
    log_evidence_se: float = math.inf

    @property
    def num_chains(self) -> int:
        """C."""
        return self.z.shape[0]

    @property
    def num_draws(self) -> int:
        """Draws of all chains together, C n."""
        return self.z.shape[0] * self.z.shape[1]


@dataclass(frozen=True)
class Agreement:
    """How far chains agree, at the worst coordinate of z.

    Attributes:
        r_hat: The largest R-hat (split, rank-normalized); inf where it can't be had.
        worst: The coordinate it belongs to.
        ess_bulk: The smallest bulk ESS.
        ess_tail: The smallest tail ESS (of the 5% and 95% quantiles).
    """

    r_hat: float
    worst: int
    ess_bulk: float
    ess_tail: float


def agreement(z: Tensor, *, limit: float = 0.0) -> Agreement:
    """R-hat and ESS of all coordinates, by ArviZ.

    The coordinates with the largest plain R-hat are looked at first. If one of them exceeds the limit the rest are
    left out: the answer is no already.

    Args:
        z: Draws (C, n, D).
        limit: An R-hat above which the rest doesn't matter; 0 takes all coordinates in any case.

    Returns:
        The worst of each number.
    """
    if z.shape[1] < MIN_LENGTH or not bool(z.isfinite().all()):
        return Agreement(np.inf, 0, 0.0, 0.0)
    rhat, ess = _find_functions()
    order = split_rhat(z).nan_to_num(nan=np.inf).argsort(descending=True)
    draws = z.double().cpu().numpy()
    parts = [order[:_WORST].tolist(), order[_WORST:].tolist()]
    worst, r_hat, bulk, tail = 0, 0.0, np.inf, np.inf
    for i, part in enumerate(parts):
        if not part or (i and limit and r_hat > limit):
            continue
        for k in part:
            x = draws[:, :, k]
            with np.errstate(all="ignore"):
                value, *sizes = float(rhat(x)), float(ess(x, "bulk")), float(ess(x, "tail"))
            value = value if np.isfinite(value) else np.inf  # a coordinate on which nothing moved
            if value > r_hat:
                r_hat, worst = value, k
            bulk, tail = min(bulk, sizes[0]), min(tail, sizes[1])
    bulk, tail = (value if np.isfinite(value) else 0.0 for value in (bulk, tail))
    return Agreement(r_hat, worst, bulk, tail)


def split_rhat(z: Tensor) -> Tensor:
    """The plain split R-hat of each coordinate, without ranks: quick.

    Args:
        z: Draws (C, n, D).

    Returns:
        (D,).
    """
    half = z.shape[1] // 2
    halves = torch.cat([z[:, :half], z[:, half : 2 * half]]).double()
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    return ((half - 1) / half + between / within).sqrt()


def describe_separation(x: Tensor) -> str | None:
    """Words for chains that sit in separate places, or None where they rather move slowly through one.

    Separate are places where the sorted means of the chains leave a gap wider than twice a chain's own sd.

    Args:
        x: Draws of one coordinate (C, n).

    Returns:
        Such as "50 of 128 chains sit near -3.1, the rest near 2.9", or None.
    """
    means, order = x.double().mean(1).sort()
    spread = x.double().std(1)[order]
    gaps = means.diff()
    # a chain that is stuck has no spread of its own, so its neighbours' is asked as well
    at = int(gaps.argmax())
    if not float(gaps[at]) > 2 * float(torch.maximum(spread[: at + 1].median(), spread[at + 1 :].median())):
        return None
    low, high = means[: at + 1], means[at + 1 :]
    return (
        f"{len(low)} of {len(means)} chains sit near {float(low.median()):.3g}, {len(high)} near "
        f"{float(high.median()):.3g}"
    )


def _find_functions() -> tuple[Callable[[_Array], float], Callable[[_Array, str], float]]:
    """R-hat and ESS of (C, n), from ArviZ 1.x's parts or from ArviZ 0.x."""
    problem: Exception | None = None
    for name in ("arviz_stats.base", "arviz"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # ArviZ 0.23 dies of an AttributeError beside an older arviz-plots
            problem = error
            continue
        if name == "arviz_stats.base":
            stats = module.array_stats
            return stats.rhat, lambda x, kind, f=stats.ess: f(x, method=kind, prob=_prob(kind))
        if hasattr(module, "rhat"):
            return module.rhat, lambda x, kind, f=module.ess: f(x, method=kind, prob=_prob(kind))
    raise OptionError(f"R-hat needs ArviZ: pip install arviz, or arviz-stats. ({problem!r})") from problem


def _prob(kind: str) -> Any:
    return _PROBABILITIES if kind == "tail" else None
