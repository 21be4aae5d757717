r"""Tuning of many chains by what they do together: step size, trajectory length and scale.

- The step size h by dual averaging on the harmonic mean of the acceptance probabilities, which no chain can leave
  behind: log h moves by the running mean of (goal - acceptance).
- The mean length of the trajectories by ChEES: stochastic ascent on E[(|e' - mean|^2 - |e - mean|^2)^2] / 4, the rate
  at which squared distances from the mean change. It needs many chains, since the mean is theirs.
- The scale L by the covariance of the chains.

Sources: Hoffman, Radul, Sountsov (2021), "An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian
Monte Carlo", AISTATS; Hoffman & Gelman (2014), JMLR 15, section 3.2 (dual averaging).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from flowvi.hmc import HMCInfo, HMCState, Tuning, hmc_step

__all__ = ["estimate_scale", "jitter", "tune", "warm_up"]

FULL_SCALE_LIMIT = 500
"""The largest D at which L is a full triangle; above it is diagonal."""

TRAJECTORY = 1.5  # about a quarter of the period of N(0, I), where a step forgets its start
FLOOR, EARLY_FLOOR = 0.02, 0.3  # acceptances count as at least this: early on, chains in bad spots matter less
WINDOWS = (0.05, 0.1, 0.2, 0.35, 0.6)  # where a warm-up estimates L anew
EARLY_LEAPFROG = 8  # at most so many in the first window, twice as many in the next: a poor L isn't worth more


def jitter(start: int = 0) -> Iterator[float]:
    """Multiples of the mean length, spread evenly over (0, 2): van der Corput's sequence in base 2."""
    n = start
    while True:
        n += 1
        value, bit, rest = 0.0, 1.0, n
        while rest:
            bit /= 2
            value += bit * (rest & 1)
            rest >>= 1
        yield 2 * value


def estimate_scale(positions: Tensor) -> Tensor:
    """L from what C chains did in n steps: the root of their covariance, drawn towards its diagonal.

    The n draws of a chain count as n / 4: neighbours resemble each other, and L need not be exact.

    Args:
        positions: e (n, C, D).

    Returns:
        L, lower triangular (D, D), or its diagonal (D,) where D is above 500.
    """
    num, chains, dim = positions.shape
    rows = positions.reshape(-1, dim)
    rows = rows - rows.mean(0)
    variance = rows.square().mean(0).clamp(min=1e-20)
    if dim > FULL_SCALE_LIMIT:
        return variance.sqrt()
    effective = chains * max(1.0, num / 4)
    # an exact multiple of the covariance is undone exactly, so no shrinking where it is well known
    weight = 1.0 - 1e-9 if effective > 8 * dim else effective / (effective + dim)
    sd = variance.sqrt()
    correlation = (rows / sd).mT @ (rows / sd) / len(rows) * weight
    correlation.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    return sd if bool(failed) else sd[:, None] * factor


class _DualAveraging:
    """log h from acceptance probabilities (Hoffman & Gelman 2014, algorithm 5)."""

    def __init__(self, step_size: float, goal: float, floor: float) -> None:
        self.goal, self.floor = goal, floor
        self.center = math.log(10 * step_size)
        self.count, self.error, self.mean = 0, 0.0, 0.0

    def update(self, acceptance: Tensor) -> float:
        harmonic = 1 / float(acceptance.clamp(min=self.floor).reciprocal().mean())
        self.count += 1
        share = 1 / (self.count + 10)
        self.error = (1 - share) * self.error + share * (self.goal - harmonic)
        log_step = self.center - math.sqrt(self.count) / 0.05 * self.error
        power = self.count**-0.75
        self.mean = power * log_step + (1 - power) * self.mean
        return math.exp(log_step)

    @property
    def averaged(self) -> float:
        return math.exp(self.mean)


class _Chees:
    """Ascent on E[(|e' - mean|^2 - |e - mean|^2)^2] / 4 over the log of the mean length, by Adam."""

    RATE = 0.05

    def __init__(self, trajectory: float) -> None:
        self.log_length = math.log(trajectory)
        self.count, self.first, self.second = 0, 0.0, 0.0

    def update(self, before: HMCState, info: HMCInfo, tuning: Tuning, length: float) -> float:
        weight = info.acceptance.clamp(min=0.0)
        if bool(weight.sum() > 0):
            weight = weight / weight.sum()
            proposal = torch.where(weight[:, None] > 0, info.proposal, 0.0)
            start = tuning.whiten(before.position - before.position.mean(0))
            end = tuning.whiten(proposal - weight @ proposal)
            gain = end.square().sum(1) - start.square().sum(1)
            slope = float(weight @ (gain * (end * info.momentum).sum(1))) * length
            if math.isfinite(slope):
                self._ascend(slope)
        return math.exp(self.log_length)

    def _ascend(self, slope: float) -> None:
        self.count += 1
        slope = min(max(slope, -1e100), 1e100)  # its square is a float
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.95 * self.second + 0.05 * slope**2
        first, second = self.first / (1 - 0.9**self.count), self.second / (1 - 0.95**self.count)
        self.log_length += self.RATE * first / (math.sqrt(second) + 1e-30)


def tune(
    state: HMCState,
    target: Callable[[Tensor], HMCState],
    tuning: Tuning,
    num_steps: int,
    generator: torch.Generator,
    *,
    acceptance: float = 0.8,
    floor: float = FLOOR,
    on_step: Callable[[HMCState, HMCInfo], bool] | None = None,
) -> tuple[HMCState, Tuning, Tensor]:
    """Step size and length for a given scale, from the start: a search, then dual averaging and ChEES.

    Args:
        state: Where the chains are.
        target: e (C, D) -> state.
        tuning: Its scale is kept.
        num_steps: Trajectories, at least 1.
        generator: Where the randomness comes from.
        acceptance: What the harmonic mean of the acceptance probabilities is steered to.
        floor: What each of them counts at least.
        on_step: Called after every step; True ends the tuning.

    Returns:
        The state, the tuning, and the positions (n, C, D).
    """
    tuning = replace(tuning, step_size=_search(state, target, tuning, generator), trajectory=TRAJECTORY)
    step, chees = _DualAveraging(tuning.step_size / 4, acceptance, floor), _Chees(tuning.trajectory)
    positions: list[Tensor] = []
    for multiple in jitter():
        before, length = state, tuning.trajectory * multiple
        state, info = hmc_step(before, target, tuning, length, generator)
        h = step.update(info.acceptance)
        longest = 0.5 * tuning.max_leapfrog * h
        trajectory = chees.update(before, info, tuning, length)
        chees.log_length = min(max(chees.log_length, math.log(h)), math.log(longest))
        tuning = replace(tuning, step_size=h, trajectory=min(max(trajectory, h), longest))
        positions.append(state.position)
        stop = on_step is not None and on_step(state, info)
        if stop or len(positions) >= num_steps:
            break
    return state, replace(tuning, step_size=step.averaged), torch.stack(positions)


def _search(state: HMCState, target: Callable[[Tensor], HMCState], tuning: Tuning, generator: torch.Generator) -> float:
    """The first of 1, 1/2, 1/4, ... at which single leapfrog steps are mostly accepted."""
    h = 1.0
    for _ in range(30):
        _, info = hmc_step(state, target, replace(tuning, step_size=h), h, generator)
        if float(info.acceptance.mean()) > 0.6:
            break
        h /= 2
    return h


def warm_up(
    state: HMCState,
    target: Callable[[Tensor], HMCState],
    tuning: Tuning,
    num_steps: int,
    generator: torch.Generator,
    *,
    acceptance: float = 0.8,
    on_step: Callable[[HMCState, HMCInfo], bool] | None = None,
) -> tuple[HMCState, Tuning]:
    """From a start to tuned chains: in growing windows, each of which tunes h and the length and estimates L anew.

    Chains that are still in a place of no weight at the end of an early window, more than 30 + 5 D nats below the
    median, are set to where others are.

    Args:
        state: Where the chains are.
        target: e (C, D) -> state.
        tuning: The scale to begin with.
        num_steps: Trajectories in all.
        generator: Where the randomness comes from.
        acceptance: As for `tune`.
        on_step: Called after every step; True ends the warm-up.

    Returns:
        The state and the tuning.
    """
    ended, most = False, tuning.max_leapfrog

    def watch(now: HMCState, info: HMCInfo) -> bool:
        nonlocal ended
        ended = on_step is not None and on_step(now, info)
        return ended

    edges = [0, *(max(1, round(part * num_steps)) for part in WINDOWS), num_steps]
    for i, (start, end) in enumerate(pairwise(edges)):
        if end <= start or ended:
            continue
        early = i < len(WINDOWS)
        given = replace(tuning, max_leapfrog=min(most, EARLY_LEAPFROG * 2**i) if early else most)
        floor = EARLY_FLOOR if early else FLOOR
        state, tuning, positions = tune(
            state, target, given, end - start, generator, acceptance=acceptance, floor=floor, on_step=watch
        )
        if early and not ended:
            tuning = replace(tuning, scale=estimate_scale(positions))
            state = _gather(state, generator)
    return state, replace(tuning, max_leapfrog=most)


def _gather(state: HMCState, generator: torch.Generator) -> HMCState:
    """The chains, those in a place of no weight set to where others are, by chance."""
    chains, dim = state.position.shape
    # >= because the median is good itself, where densities are so large that 30 nats are lost to rounding
    good = state.log_density >= state.log_density.median() - (30 + 5 * dim)
    others = good.nonzero().flatten()
    chosen = torch.randint(len(others), (chains,), generator=generator, device=others.device)
    return state.where(good, state.take(others[chosen]))
