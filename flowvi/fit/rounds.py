"""The flow chosen by the engine: rounds of training, more layers where they pay, and a stop that says why.

After each round fresh draws tell how far the ELBO is below the log evidence. The goal is a small gap; on the
way there a round follows as long as the last one gained, and where it did not, the stack grows by layers that
start at the identity, so that nothing learnt is lost. A Gaussian that is already the answer gets no layers.

Once the gap is small a covering round (`flowvi.CoveringELBO`) comes before more layers: the ELBO forgives what is too
narrow, and this does not. On eight schools it brought the worst error of an sd from .07 to .03 in half a second, and
on Neal's funnel k-hat from .9 to .6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from flowvi.diagnostics import judge, khat_limit
from flowvi.fit.checkpoint import Checkpoint
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.fit.engine import Record, Schedule, optimize, saved_schedule, seconds_per_step
from flowvi.flow import Flow
from flowvi.objectives import ELBO
from flowvi.random_state import kept
from flowvi.targets import LogDensity
from flowvi.transforms import PlanarStack

SECONDS = 60.0
"""The default time limit of all rounds."""

GOAL_PER_DIM, GOAL_PER_DIM_WHITENED = 4e-4, 1.5e-3
"""The gap, in nats for each dimension, that is good enough: a joint divergence adds up over dimensions.

An energy is a picture, and its KL is the result; for a model this means errors of about .03 sd."""

GAUSSIAN_GOAL_PER_DIM = 1e-3
"""The same for the Gaussian to be the answer; of the six reference posteriors in `experiments truth` two are below it,
where its means and sds are within .02 of the truth, and the others above, where an sd is up to .15 off."""

CLOSE = 0.5
"""The gap below which the Gaussian is close enough for annealing to do harm, whatever the starts said; and any q for
weights to be more signal than noise, so that a covering round pays."""

COVERED = 2.5
"""After such a round the goal is so many times as wide: what is left of the gap is spread, and no sd too small."""

TAIL = 0.1
"""A gap below this part of the goal is too small for k-hat to matter."""

FIRST, GROW, MAX_FLOWS = 32, 4, 512
NUM_DRAWS = 8192
ROUND_STEPS, CLOSE_STEPS, MIN_STEPS = 1000, 500, 250
LR_FALL = math.sqrt(0.5)
WORSE, MAX_WORSE = 0.5, 4
"""A round that ends so many nats below its start, beyond the noise, was one with steps too large: it is made again with
a quarter of them, so often at most."""

ROUNDS = "rounds"
"""The part of a checkpoint that is the rounds'."""


@dataclass(frozen=True)
class Check:
    """What fresh draws say after a round.

    Attributes:
        num_flows: K.
        num_steps: the round's steps.
        elbo: on fresh draws.
        elbo_se: its standard error.
        gap: log evidence - ELBO.
        gap_se: its standard error.
        khat: of the importance weights.
        seconds: the round took.
        covering: whether it was a covering round.
    """

    num_flows: int
    num_steps: int
    elbo: float
    elbo_se: float
    gap: float
    gap_se: float
    khat: float
    seconds: float
    covering: bool = False

    def reaches(self, goal: float) -> bool:
        """Whether the gap is below the goal, beyond its noise."""
        return self.gap + 2 * self.gap_se < goal

    def is_enough(self, goal: float) -> bool:
        """Whether the goal is reached, which is wider after a covering round."""
        return self.reaches(COVERED * goal if self.covering else goal)

    def has_tail(self, goal: float) -> bool:
        """Whether the largest weights are too large, and the gap is not so small that this is nothing."""
        return not self.khat < khat_limit(NUM_DRAWS) and self.gap > TAIL * goal


@dataclass(frozen=True)
class Round:
    """What is to be done in one.

    Attributes:
        num_flows: K.
        num_steps: steps, if the time allows them.
        lr: the largest step size.
        covering: 0 on the ELBO; 1 for a covering round, 2 for the second one in a row.
    """

    num_flows: int
    num_steps: int
    lr: float
    covering: int = 0


def following(this: Round, last: Check, *, learning: bool, covers: bool, goal: float, lr: float) -> Round | str:
    """The round that follows, or why none does.

    Args:
        this: the one that was made.
        last: the check of what came of it.
        learning: whether it gained so much that more steps are the next thing to try.
        covers: whether there may be covering rounds.
        goal: the gap, in nats, that is small enough.
        lr: the largest step size of the first round.
    """
    covers = covers and last.reaches(CLOSE)
    mendable = covers and last.has_tail(goal) and this.covering < 2
    if last.is_enough(goal) and not mendable:
        return f"the gap to the log evidence, {last.gap:.2g} nats, is small enough"
    if this.covering and last.is_enough(goal):
        return replace(this, num_steps=2 * this.num_steps, covering=2)
    if covers and not this.covering:
        return replace(this, num_steps=max(CLOSE_STEPS, this.num_steps // 2), lr=this.lr / 4, covering=1)
    if learning and not this.covering:
        return replace(this, num_steps=2 * this.num_steps, lr=this.lr * LR_FALL)
    if this.num_flows < MAX_FLOWS:
        return Round(min(this.num_flows * GROW, MAX_FLOWS), max(2 * ROUND_STEPS, this.num_steps), lr / 2)
    return f"it has {MAX_FLOWS} layers, the most there may be, at a gap of {last.gap:.2g} nats"


@torch.no_grad()
def check(
    flow: Flow,
    density: LogDensity,
    generator: torch.Generator,
    *,
    num_steps: int,
    seconds: float,
    num_draws: int = NUM_DRAWS,
    covering: bool = False,
) -> Check:
    """Fresh draws of q, weighed."""
    z, log_q = flow.rsample_and_log_prob(num_draws, generator=generator)
    log_p = torch.cat([density.full(part) for part in z.split(1024)])
    found = judge(log_p.double().cpu().numpy(), log_q.double().cpu().numpy(), dim=flow.dim)
    spec = flow.spec
    assert spec is not None
    return Check(
        num_flows=spec.num_flows,
        num_steps=num_steps,
        elbo=found.elbo,
        elbo_se=found.elbo_se,
        gap=found.gap,
        gap_se=found.gap_se,
        khat=found.khat,
        seconds=round(seconds, 2),
        covering=covering,
    )


def grow(flow: Flow, num_flows: int, seed: int) -> Flow:
    """The same density with more planar layers: the new ones are the identity, in random directions.

    Args:
        flow: a planar stack and funnels, or nothing, and an affine layer.
        num_flows: K of the larger flow.
        seed: of the directions.
    """
    spec = flow.spec
    assert spec is not None
    with kept(seed):
        larger = Flow.from_spec(replace(spec, num_flows=num_flows), dtype=flow.dtype, device=flow.device)
    with torch.no_grad():
        stack, *_, affine = larger.transforms
        old = flow.transforms[0]
        if isinstance(old, PlanarStack):
            for new_p, p in zip(stack.parameters(), old.parameters(), strict=True):
                new_p[: len(p)] = p
            for new, same in zip(larger.transforms[1:-1], flow.transforms[1:-1], strict=True):
                new.load_state_dict(same.state_dict())
        affine.load_state_dict(flow.transforms[-1].state_dict())
    return larger


def run_rounds(
    flow: Flow,
    density: LogDensity,
    make_objective: Callable[[int | None, bool], ELBO],
    *,
    lr: float,
    first_steps: int,
    annealed: bool,
    whitened: bool,
    covers: bool,
    seconds: float,
    seed: int,
    generator: torch.Generator,
    progress: bool | None,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Flow, Record, list[Check]]:
    """Train, check, and go on while it pays.

    How many steps a round has depends on the time they take, so it is part of a checkpoint: the round that a crash
    cut off goes on to the bit; the length of a later one is measured anew.

    Args:
        flow: affine alone (K = 0), at its start.
        density: the target.
        make_objective: the number of steps -> the annealed estimator; None -> the one without annealing; and
            whether it is that of a covering round.
        lr: the largest step size of the first round.
        first_steps: steps of the first round.
        annealed: whether the first round is annealed; later ones never are.
        whitened: whether the start is the best Gaussian, which may be the answer already.
        covers: whether there may be covering rounds.
        seconds: the time limit.
        seed: of the new layers' directions.
        generator: where the randomness comes from.
        progress: whether bars are shown.
        checkpoint: takes the state from time to time; the rounds go on where they were.
        ranks: over which the particles are split; the checks and the clock are those of rank 0.

    Returns:
        The flow, the record of all steps, and the checks; ``record.stopped`` says why it ended.
    """
    start = time.perf_counter()
    goal = (GOAL_PER_DIM_WHITENED if whitened else GOAL_PER_DIM) * flow.dim
    checks: list[Check] = []
    record = Record(elbo=torch.empty(0, dtype=torch.float64))
    best: tuple[Check, Flow] | None = None
    gaussian, worse = flow, 0
    saved = None if checkpoint is None else checkpoint.take(ROUNDS)
    this = Round(FIRST, first_steps, lr)
    if checkpoint is not None and saved is not None:
        with checkpoint.reading():
            start -= saved["seconds"]
            checks += [Check(**c) for c in saved["checks"]]
            record = Record.from_dict(saved["record"])
            if saved["best"] is not None:
                best = checks[saved["best"]["check"]], grow(flow, saved["best"]["num_flows"], seed)
                best[1].load_state_dict(saved["best"]["flow"])
            this, covers, lr, worse = Round(**saved["round"]), saved["covers"], saved["lr"], saved["worse"]
    elif whitened:
        checks.append(ranks.same(check(flow, density, generator, num_steps=0, seconds=0.0)))
        if checks[0].reaches(GAUSSIAN_GOAL_PER_DIM * flow.dim):
            record.stopped = "the Gaussian is the answer"
            return flow, record, checks
        if checks[0].reaches(CLOSE):
            this = replace(this, num_steps=CLOSE_STEPS)
    annealed = annealed and not (whitened and checks[0].reaches(CLOSE))
    flow = grow(flow, this.num_flows, seed)

    def state() -> dict[str, Any]:
        kept = None
        if best is not None:
            position = next(i for i, c in enumerate(checks) if c is best[0])
            kept = {"check": position, "num_flows": best[0].num_flows, "flow": best[1].state_dict()}
        return {
            "checks": as_plain(checks),
            "record": record.to_dict(),
            "best": kept,
            "round": asdict(this),
            "covers": covers,
            "lr": lr,
            "worse": worse,
            "seconds": time.perf_counter() - start,
        }

    if checkpoint is not None:
        checkpoint.keep(ROUNDS, state)
    try:
        while True:
            covering = this.covering > 0
            schedule = saved_schedule(checkpoint)
            if schedule is None:
                cost = seconds_per_step(flow, density, make_objective(None, covering), generator=generator, ranks=ranks)
                fitting = ranks.same(int((seconds - (time.perf_counter() - start)) / cost))
                if fitting < MIN_STEPS and (best is not None or worse):
                    gap = checks[0].gap if best is None else best[0].gap
                    record.stopped = f"the time limit of {seconds:g} s, at a gap of {gap:.2g} nats"
                    break
                schedule = Schedule(max(MIN_STEPS, min(this.num_steps, fitting)), this.lr)
            this = replace(this, num_steps=schedule.num_steps, lr=schedule.lr)
            seen = optimize(
                flow,
                density,
                make_objective(this.num_steps if annealed and best is None and not worse else None, covering),
                schedule,
                generator=generator,
                progress=progress,
                description=f"planar K={this.num_flows}" + (", tails" if covering else ""),
                checkpoint=checkpoint,
                ranks=ranks,
            )
            record.extend(seen)
            found = ranks.same(
                check(flow, density, generator, num_steps=this.num_steps, seconds=seen.seconds, covering=covering)
            )
            checks.append(found)
            before = best[0] if best is not None else checks[0] if whitened else None
            if not covering and before is not None and is_worse(found, before) and seen.stopped != "interrupted":
                worse, lr = worse + 1, lr / 4
                if worse > MAX_WORSE:
                    record.stopped = "the steps that were tried make it worse"
                    break
                this = replace(this, lr=min(this.lr / 4, lr))
                flow = grow(gaussian if best is None else best[1], this.num_flows, seed + worse)
                continue
            learning = False
            if best is None:
                best = found, flow
            else:
                gain, noise = found.elbo - best[0].elbo, math.hypot(found.elbo_se, best[0].elbo_se)
                if covering:
                    covers = kept = found.gap < best[0].gap + max(0.5 * best[0].gap, 2 * noise)  # never with a NaN
                else:
                    kept = (
                        math.isfinite(found.elbo) and not gain < 0
                    )  # a NaN is not better, and anything better than it
                    learning = gain > max(2 * noise, 0.2 * found.gap)
                best = (found, flow) if kept else best
            if seen.stopped == "interrupted":
                record.stopped = "interrupted"
                break
            last = best[0] if covering else found
            after = following(this, last, learning=learning, covers=covers, goal=goal, lr=lr)
            if isinstance(after, str):
                record.stopped = after
                break
            # a copy, so that a round that fails can be undone
            flow = grow(best[1], after.num_flows, seed + (after.num_flows if after.num_flows > this.num_flows else 0))
            this = after
    except KeyboardInterrupt:  # between the loops
        record.stopped = "interrupted"
    finally:
        if checkpoint is not None:
            checkpoint.keep(ROUNDS, None)
    if best is None:
        return gaussian if worse else flow, record, checks
    return best[1], record, checks


def is_worse(found: Check, before: Check) -> bool:
    """Whether a round lost what was there, beyond the noise; noise above a nat is the loss itself, by a few draws."""
    lost = before.elbo - found.elbo
    return math.isfinite(before.elbo) and not lost < WORSE + 4 * math.hypot(before.elbo_se, min(found.elbo_se, 1.0))


def as_plain(checks: list[Check]) -> list[dict[str, float]]:
    """The checks as plain data, for ``posterior.config``."""
    return [asdict(c) for c in checks]
