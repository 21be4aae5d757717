"""Exact draws where the flow is poor: many chains of HMC in the flow's coordinates, run until they agree."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from flowvi.bridge import log_evidence
from flowvi.chains import MIN_LENGTH, Agreement, Chains, agreement, describe_separation
from flowvi.checks import flags_or_none, instances, is_number, shown, whole_numbers
from flowvi.errors import InterruptedWarning, OptionError
from flowvi.hmc import FlowCoordinates, HMCInfo, HMCState, Tuning, hmc_step
from flowvi.hmc_tuning import estimate_scale, jitter, tune, warm_up
from flowvi.posterior import Posterior
from flowvi.progress import Bar, wanted
from flowvi.refined import DIVERGENCE_LIMIT, RefinedDiagnostics, RefinedPosterior
from flowvi.short_run import ShortRun, finite_start, symmetric_kl
from flowvi.threads import one_thread_if_small

__all__ = ["RefinedDiagnostics", "RefinedPosterior", "ShortRun", "refine", "symmetric_kl"]

NUM_CHAINS = 128
WARM_UP, RETUNE = 200, 60
FIRST_ROUND = 100
MAX_STEPS = 20_000  # of each chain, for a run without a time limit
UNSETTLED = 1.05  # an R-hat above which a round counts as warm-up
STUCK = 1.2  # an R-hat that two rounds, each twice as long as the last, ought to bring down
ACCEPTANCES = (0.8, 0.9, 0.95)  # the next one where too many steps diverge
POOL = 4096  # draws of the flow to start from
MAX_ELEMENTS = 2**24  # of the kept z: beyond it every second draw is dropped


def refine(
    posterior: Posterior,
    *,
    num_chains: int | None = None,
    ess: float = 4000.0,
    rhat: float = 1.01,
    time_limit: float | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> RefinedPosterior:
    """Moves draws of q to the target by HMC in the flow's coordinates, until the chains agree.

    The chains start at draws of q, resampled by importance weights as far as these leave many of them. A warm-up
    tunes step size, trajectory length and a mass matrix across the chains; then rounds of 100 steps, 200, 400, ...
    are run until R-hat (split, rank-normalized, by ArviZ) of every unconstrained coordinate is below `rhat` and the
    bulk and tail ESS reach `ess`. A round that ends far from agreement counts as warm-up, and its draws are dropped.
    Where too many steps diverge the steps are made smaller.

    The result is exact up to Monte Carlo error if the chains agree, and says so if they don't. It can't know of
    a mode that no chain visits. Called on a refined posterior, it goes on from where its chains stand.

    Source: see `flowvi.hmc` and `flowvi.hmc_tuning`.

    Args:
        posterior: What to refine.
        num_chains: C, at least 4; 128, or as many as before.
        ess: The bulk and tail ESS to reach in every coordinate; 4000 leaves an error of .016 sd in a mean.
        rhat: The R-hat to reach.
        time_limit: Seconds; None runs up to 20,000 steps of each chain. Either end is told by the verdict.
        seed: Makes the call reproducible by itself; None continues the posterior's own sequence.
        progress: Whether a bar is shown; None shows it in a terminal or notebook.

    Returns:
        A posterior whose draws are the chains'. Its `diagnose()` has the verdict, `unrefined` is what it was made of.

    Raises:
        OptionError: An argument can't be used.
        NonFiniteError: The target is finite at no draw of the flow.
    """
    if num_chains is not None:
        whole_numbers(4, num_chains=num_chains)
    _check_above("ess", ess, 0.0)
    _check_above("rhat", rhat, 1.0)
    if time_limit is not None:
        _check_above("time_limit", time_limit, 0.0)
    instances(Posterior, posterior=posterior)
    flags_or_none(progress=progress)
    start = time.perf_counter()
    unrefined = posterior.unrefined if isinstance(posterior, RefinedPosterior) else posterior
    target = FlowCoordinates(posterior.flow, posterior.density)
    before = posterior.chains if isinstance(posterior, RefinedPosterior) else None
    generator = posterior._generator(seed, "refine")
    count = num_chains or (before.num_chains if before else NUM_CHAINS)
    spec = posterior.flow.spec
    size = count * target.dim * max(1, spec.num_flows if spec else 1)
    with one_thread_if_small(size), wanted(progress):
        state, tuning = _start(target, before, count, generator)
        with _Watch(start + time_limit if time_limit else math.inf, progress) as watch:
            if before is None or before.num_chains != count:
                state, tuning = warm_up(state, target, tuning, WARM_UP, generator, on_step=watch.step)
            kept, chains = _run(target, state, tuning, generator, watch, rhat=rhat, ess=ess)
        positions, log_densities = kept.positions()
        evidence, evidence_se = log_evidence(
            target.log_density, positions, log_densities, float(len(positions)) * count / 4, generator
        )
        chains = replace(chains, log_evidence=evidence, log_evidence_se=evidence_se)
    seconds = time.perf_counter() - start
    if chains.stopped == "interrupted":
        warnings.warn(InterruptedWarning("stopped by Ctrl-C; this is what the chains have so far."), stacklevel=2)
    facts = {
        "num_chains": count,
        "draws_per_chain": chains.z.shape[1],
        "steps_per_chain": watch.steps,
        "step_size": chains.step_size,
        "trajectory": chains.trajectory,
        "rhat": rhat,
        "ess": ess,
        "stopped": chains.stopped,
    }
    return RefinedPosterior(
        unrefined,
        chains,
        goal_r_hat=rhat,
        goal_ess=ess,
        timing=unrefined.timing | {"refine": seconds + posterior.timing.get("refine", 0.0)},
        config=unrefined.config | {"refine": facts},
    )


def _start(
    target: FlowCoordinates, before: Chains | None, num: int, generator: torch.Generator
) -> tuple[HMCState, Tuning]:
    """Where the chains begin: where they stood, or at draws of q, resampled by tempered importance weights."""
    identity = torch.ones(target.dim, dtype=torch.float64, device=target.device)
    if before is not None and before.num_chains == num:
        return target(before.position), Tuning(before.step_size, before.trajectory, before.scale)
    position = target.draw(max(POOL, 4 * num), generator)
    _, log_p, log_q = target.values(position)
    log_w = torch.where(log_p.isfinite() & log_q.isfinite(), log_p - log_q, -torch.inf)
    if bool(log_w.isfinite().any()):
        weights = _tempered(log_w, 2 * num)
        position = position[torch.multinomial(weights, len(weights), replacement=True, generator=generator)]
    pieces = iter(position.split(num))
    return finite_start(target, lambda: next(pieces, position[:num]), num), Tuning(1.0, 1.0, identity)


def _tempered(log_w: Tensor, least: float) -> Tensor:
    """Weights w^beta with the largest beta up to 1 that leaves an effective number of `least` draws.

    So chains start near the target where q allows, and not all of them at a few points where it doesn't.
    """

    def at(beta: float) -> Tensor:
        return torch.where(log_w.isfinite(), beta * log_w, -torch.inf).softmax(0)

    def enough(beta: float) -> bool:
        return float(1 / at(beta).square().sum()) >= least

    if enough(1.0):
        return at(1.0)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return at(low)


def _run(
    target: FlowCoordinates,
    state: HMCState,
    tuning: Tuning,
    generator: torch.Generator,
    watch: _Watch,
    *,
    rhat: float,
    ess: float,
) -> tuple[_Kept, Chains]:
    """Growing rounds of steps, until the chains agree or there is a reason to stop; the last round's draws."""
    kept, length, level = _Kept(target), FIRST_ROUND, 0
    unsettled: list[tuple[float, bool]] = []
    lengths = jitter()
    try:
        while True:
            watch.phase = "sampling"
            for _ in range(length):
                state, info = hmc_step(state, target, tuning, tuning.trajectory * next(lengths), generator)
                kept.add(state, info)
                if watch.step(state, info) and kept.steps >= MIN_LENGTH:
                    break
            found = agreement(kept.z, limit=rhat)
            watch.r_hat = found.r_hat
            sharp = kept.divergences > DIVERGENCE_LIMIT * kept.transitions and level + 1 < len(ACCEPTANCES)
            if found.r_hat < rhat and min(found.ess_bulk, found.ess_tail) >= ess and not sharp:
                return kept, kept.chains(state, tuning, "converged")
            if found.r_hat <= UNSETTLED and not sharp:
                stopped = watch.over()
                length = _further(kept.steps, found, rhat, ess)
            else:
                apart = describe_separation(kept.z[:, :, found.worst]) is not None
                unsettled += [] if sharp else [(found.r_hat, apart)]
                stopped = watch.over() or ("stuck" if _is_stuck(unsettled) else None)
            if stopped:
                return kept, kept.chains(state, tuning, stopped)
            if found.r_hat > UNSETTLED or sharp:
                level += sharp
                watch.phase = "warm-up"
                tuning = replace(tuning, scale=estimate_scale(kept.positions()[0]))
                moved, tuned, _ = tune(
                    state, target, tuning, RETUNE, generator, acceptance=ACCEPTANCES[level], on_step=watch.step
                )
                if stopped := watch.over():
                    return kept, kept.chains(state, tuning, stopped)
                state, tuning, kept, length = moved, tuned, _Kept(target), 2 * length
    except KeyboardInterrupt:
        if kept.steps < MIN_LENGTH:
            raise
        return kept, kept.chains(state, tuning, "interrupted")


def _further(steps: int, found: Agreement, rhat: float, ess: float) -> int:
    """How many steps more: R-hat^2 - 1 falls as 1 / n, the ESS grows as n."""
    factor = max((found.r_hat**2 - 1) / (rhat**2 - 1), ess / max(min(found.ess_bulk, found.ess_tail), 1e-3 * ess), 1.0)
    return int(min(max(1.1 * factor * steps - steps, steps / 4), 2 * steps))


def _is_stuck(rounds: list[tuple[float, bool]]) -> bool:
    """Whether R-hat stays up, round by round, each twice as long: a walk that is only slow halves R-hat - 1.

    Args:
        rounds: R-hat of each round, and whether its chains sat in separate places.
    """
    if len(rounds) < 3 or rounds[-1][0] < STUCK:
        return False
    stays = rounds[-1][0] - 1 > 0.6 * (rounds[-3][0] - 1)
    return stays and (len(rounds) > 3 or all(apart for _, apart in rounds[-3:]))


class _Kept:
    """The draws of a run; every second one is dropped whenever they outgrow the memory set aside."""

    def __init__(self, target: FlowCoordinates) -> None:
        self.target = target
        self.steps, self.transitions, self.divergences = 0, 0, 0
        self._accepted, self._every = 0.0, 1
        self._states: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, state: HMCState, info: HMCInfo) -> None:
        """Counts a step, and keeps its draws if it is their turn."""
        if self.steps % self._every == 0:
            log_q = self.target.log_base(state.position) - state.log_det
            self._states.append((state.z, state.log_p, log_q, state.position))
            if len(self._states) * state.z.numel() > MAX_ELEMENTS:
                self._states, self._every = self._states[::2], 2 * self._every
        self.steps += 1
        self.transitions += len(info.divergent)
        self.divergences += int(info.divergent.sum())
        self._accepted += float(info.acceptance.mean())

    @property
    def z(self) -> Tensor:
        """(C, n, D)."""
        return torch.stack([s[0] for s in self._states], 1)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Where the later half of the steps led, e (n, C, D), and the target's log density there (n, C)."""
        later = self._states[len(self._states) // 2 :]
        position = torch.stack([s[3] for s in later])
        log_w = torch.stack([s[1] - s[2] for s in later])
        return position, log_w + self.target.log_base(position)

    def chains(self, state: HMCState, tuning: Tuning, stopped: str) -> Chains:
        """All of it as plain data."""
        return Chains(
            z=self.z.to(self.target.density.dtype),
            log_p=torch.stack([s[1] for s in self._states], 1),
            log_q=torch.stack([s[2] for s in self._states], 1),
            position=state.position,
            step_size=tuning.step_size,
            trajectory=tuning.trajectory,
            scale=tuning.scale,
            acceptance=self._accepted / self.steps,
            divergences=self.divergences,
            transitions=self.transitions,
            stopped=stopped,
        )


class _Watch:
    """The clock, the number of steps, and the bar."""

    def __init__(self, deadline: float, progress: bool | None) -> None:
        self.deadline = deadline
        self.steps, self.phase, self.r_hat = 0, "warm-up", math.nan
        self._bar = Bar(desc="refine", unit="step", disable=None if progress is None else not progress)

    def step(self, _: HMCState, info: HMCInfo) -> bool:
        """Counts a step; whether it is time to stop."""
        self.steps += 1
        if not self._bar.disable:
            seen = "" if math.isnan(self.r_hat) else f", R-hat {self.r_hat:.3f}"
            self._bar.set_postfix_str(f"{self.phase}{seen}, {info.num_leapfrog} leapfrog", refresh=False)
            self._bar.update()
        return self.over() is not None

    def over(self) -> str | None:
        """Why the run must end now, or None."""
        if time.perf_counter() > self.deadline:
            return "time limit"
        return "step limit" if self.steps >= MAX_STEPS else None

    def __enter__(self) -> _Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _check_above(name: str, value: float, least: float) -> None:
    if not (is_number(value) and value > least):
        raise OptionError(f"{name} must be a number above {least:g}, got {shown(value)}.")
