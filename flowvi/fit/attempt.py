"""One fit from one seed: the best Gaussian, the modes that its starts found, and a flow trained on each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from flowvi.fit.checkpoint import Checkpoint
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.fit.engine import Record, Schedule, optimize, saved_schedule, seconds_per_step
from flowvi.fit.labels import label_switching
from flowvi.fit.modes import Mode, fit_mixture, survey
from flowvi.fit.paths import connected
from flowvi.fit.rounds import ROUND_STEPS, SECONDS, Check, as_plain, check, is_worse, run_rounds
from flowvi.fit.search import search
from flowvi.fit.whiten import Gaussian, Start, whiten
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.mixture import MixtureFlow
from flowvi.objectives import ELBO, BalancedELBO, CoveringELBO, LinearAnneal
from flowvi.random_state import kept
from flowvi.targets import LogDensity
from flowvi.targets.compiling import CompileReport
from flowvi.transforms.affine import default_rank

ANNEAL_FRACTION = 0.3
FIRST_ANNEALED_STEPS = 4000  # of rounds that begin annealed
MIN_STEPS = 200
GUARD_DRAWS = 1024  # that tell whether the steps made it worse


@dataclass(frozen=True)
class Plan:
    """What `fit` was told and decided before it starts; `anneal` is None where the whitening decides."""

    num_steps: int
    num_particles: int
    lr: float
    anneal: bool | Callable[[int], float] | None
    whiten: bool
    objective: ELBO | None
    time_limit: float | None
    compile: bool | str | None
    progress: bool | None
    rounds: bool


class Attempt(NamedTuple):
    """The outcome of one fit from one seed, with its ELBO on fresh draws."""

    elbo: float
    flow: Flow
    record: Record
    decided: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        mixture = self.flow.spec.to_dict() if isinstance(self.flow, MixtureFlow) and self.flow.spec else None
        return self._asdict() | {
            "flow": self.flow.state_dict(),
            "mixture": mixture,
            "record": self.record.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], family: Family, density: LogDensity, seed: int) -> Attempt:
        """The outcome that `to_dict` gave."""
        if saved["mixture"] is not None:
            spec = FlowSpec.from_dict(saved["mixture"])
            flow: Flow = MixtureFlow.from_spec(spec, dtype=density.dtype, device=density.device, factory=family.factory)
        else:
            flow = family.start(density, None, seed, num_flows=saved["decided"]["num_flows"])
        flow.load_state_dict(saved["flow"])
        return cls(saved["elbo"], flow, Record.from_dict(saved["record"]), saved["decided"])


@dataclass(frozen=True)
class Family:
    """The flow that was asked for: its structure, and the factory of its layers where it has no registered name."""

    spec: FlowSpec
    factory: Callable[..., Any] | None

    def start(self, density: LogDensity, gaussian: Start | None, seed: int, num_flows: int | None = None) -> Flow:
        """The flow at the identity on top of the Gaussian, its random directions drawn from the seed.

        Args:
            density: the target, for dtype and device.
            gaussian: where the affine layer starts; None is N(0, I).
            seed: of the directions.
            num_flows: K, where it is not the asked one.
        """
        spec = self.spec if num_flows is None else replace(self.spec, num_flows=num_flows)
        with kept(seed):
            flow = Flow.from_spec(spec, dtype=density.dtype, device=density.device, factory=self.factory)
        if gaussian is not None:
            flow.transforms[-1].set_(gaussian.loc, gaussian.scale_tril, getattr(gaussian, "factor", None))
        return flow


class Trial:
    """One fit from one seed, on its way.

    Args:
        density: the target.
        family: the flow.
        plan: how.
        seed: of everything random.
        timing: seconds by phase, added to.
        saver: takes the state from time to time.
        ranks: over which the particles are split. Each of them works out everything; what rank 0 found counts.
    """

    def __init__(
        self,
        density: LogDensity,
        family: Family,
        plan: Plan,
        seed: int,
        timing: dict[str, float],
        saver: Checkpoint | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.density, self.family, self.plan, self.seed = density, family, plan, seed
        self.timing, self.saver, self.ranks = timing, saver, ranks
        self.generator = torch.Generator(density.device).manual_seed(seed)
        self.gaussian: Gaussian | None = None
        self.compiled: CompileReport | None = None
        self.modes: Sequence[Mode] = ()
        self.elsewhere: Mode | None = None
        self.groups: Sequence[Sequence[int]] = ()
        self.checks: list[Check] = []
        self.decided: dict[str, Any] = {"whiten": plan.whiten}

    def run(self) -> Attempt:
        """Whiten, find the modes, compile, train."""
        self._resume()
        if self.plan.whiten:
            self._whiten()
            self._find_modes()
        self.anneal = self.plan.anneal
        if self.anneal is None:
            self.anneal = self.gaussian is not None and not self.gaussian.agree and len(self.modes) <= 1
        flow = self._start(self.elsewhere or self.gaussian)
        self.kind = BalancedELBO if flow.has_path_score else ELBO
        self.objective = self._objective(self.plan.num_steps)
        compiled = self._compile()
        start = time.perf_counter()
        if len(self.modes) > 1:
            flow, record = self._train_each()
        else:
            flow, record = self._train(flow, self.plan.time_limit, self.saver)
        self._took("steps", start)
        objective = self.objective
        self.decided |= {
            "num_flows": _num_flows(flow, self.family.spec),
            "num_steps": len(record.beta),
            "num_particles": objective.num_particles,
            "lr": self.plan.lr,
            "anneal": repr(objective.anneal) if min(record.beta, default=1.0) < 1 else None,
            "gradient": objective.gradient,
            "step": ("without a tape" if record.fused else "by autograd") + (", replayed" if record.recorded else ""),
            "compile": _words(compiled),
            "rounds": as_plain(self.checks),
        }
        elbo = self.ranks.same(_fresh_elbo(flow, self.density, self.generator))
        return Attempt(elbo, flow, record, self.decided)

    def _resume(self) -> None:
        """Take what a checkpoint has of this trial, and give it what it is to keep."""
        saver = self.saver
        if saver is None:
            return
        saved = saver.take("attempt")
        saver.follow(fit=self.generator, density=self.density.generator)
        saver.keep(
            "attempt",
            lambda: {
                "gaussian": self.gaussian and asdict(self.gaussian),
                "compile": self.compiled and vars(self.compiled),
            },
        )
        if saved is None:
            saver.save()
            return
        saver.restore_generators()
        with saver.reading():
            self.gaussian = saved["gaussian"] and Gaussian.from_dict(saved["gaussian"])
            self.compiled = saved["compile"] and CompileReport(**saved["compile"])

    def _whiten(self) -> None:
        if self.gaussian is None:
            start = time.perf_counter()
            found = whiten(
                self.density,
                self.density.dim,
                full=self.family.spec.base == "full",
                rank=default_rank(self.density.dim) if self.family.spec.base == "low_rank" else 0,
                generator=self.generator,
                dtype=self.density.dtype,
                progress=self.plan.progress,
            )
            self.gaussian = self.ranks.same(found, self.generator)
            self._took("whiten", start)
            if self.saver is not None:
                self.saver.save()
        self.decided["starts_agree"] = self.gaussian.agree

    def _find_modes(self) -> None:
        """The places where the starts found mass of their own, and which of them are joined by a ridge."""
        assert self.gaussian is not None
        start = time.perf_counter()
        generator = torch.Generator(self.density.device).manual_seed(self.seed + 1)  # a resumed trial finds the same
        # A polish to low rank gains nats that the other starts, all diagonal, are not offered: like with like.
        polished = () if self.gaussian.factor is not None else (self.gaussian,)
        starts = (*polished, *self.gaussian.starts)
        evidence, self.modes = survey(starts, self.density, generator)
        further = self.ranks.same(search(self.modes, self.density, generator) if self.modes else ())
        if further:
            evidence, self.modes = survey((*starts, *further), self.density, generator)
        evidence, self.modes = self.ranks.same((evidence, self.modes))
        if len(self.modes) == 1 and any(torch.equal(self.modes[0].loc, start.loc) for start in further):
            self.elsewhere = self.modes[0]  # what the starts had found is next to nothing beside it
        self.decided["starts_log_evidence"] = evidence
        self.groups = connected(self.modes, self.density) if len(self.modes) > 1 else [[0]]
        self.groups = self.ranks.same(self.groups)
        self.decided["modes"] = len(self.groups)
        self._took("modes", start)

    def _compile(self) -> CompileReport:
        """Compile the target where it pays, and flatten it in any case, so that all calls round alike.

        What a checkpoint says was decided stays, else bits would change.
        """
        mine = self.ranks.share(self.objective.num_particles)
        num_particles = max(1, mine.stop - mine.start)
        if self.compiled is not None:
            self.density.compile(num_particles, num_calls=None if self.compiled.used else 0)
            if self.saver is not None:
                self.saver.restore_generators()
            return self.compiled
        start = time.perf_counter()
        to_come = ROUND_STEPS if self.plan.rounds else self.plan.num_steps
        num_calls = None if self.plan.compile is True else 0 if self.plan.compile is False else to_come
        found = self.density.compile(num_particles, num_calls=num_calls) if self.ranks.is_first else None
        self.compiled = self.ranks.same(found, patient=True)
        assert self.compiled is not None
        if self.plan.compile is False:
            self.compiled = CompileReport(False, "compile=False")
        if not self.ranks.is_first:
            self.density.compile(num_particles, num_calls=None if self.compiled.used else 0)
        self.ranks.same(None, self.generator, self.density.generator)  # measuring draws minibatches
        if self.compiled.seconds:
            self._took("compile", start)
        return self.compiled

    def _start(self, gaussian: Start | None, offset: int = 0) -> Flow:
        return self.family.start(self.density, gaussian, self.seed + offset, 0 if self.plan.rounds else None)

    def _objective(self, num_steps: int | None, covering: bool = False) -> ELBO:
        """The estimator of a run of so many steps; None is one that is not annealed; or that of a covering round."""
        if self.plan.objective is not None:
            return self.plan.objective
        if covering:
            return CoveringELBO(self.plan.num_particles)
        schedule = None
        if self.anneal and num_steps is not None:
            fraction = max(1, round(ANNEAL_FRACTION * num_steps))
            schedule = LinearAnneal(fraction) if self.anneal is True else self.anneal
        return self.kind(self.plan.num_particles, anneal=schedule)

    def _train(self, flow: Flow, seconds: float | None, saver: Checkpoint | None) -> tuple[Flow, Record]:
        """Rounds, or one run of the asked number of steps, or of what fits in the time."""
        plan = self.plan
        if plan.rounds:
            flow, record, checks = run_rounds(
                flow,
                self.density,
                self._objective,
                lr=plan.lr,
                first_steps=FIRST_ANNEALED_STEPS if self.anneal else ROUND_STEPS,
                annealed=bool(self.anneal),
                whitened=plan.whiten,
                # a minibatch's weights are not those of all data
                covers=plan.whiten and plan.objective is None and flow.has_path_score and not self.density.subsampled,
                seconds=seconds or SECONDS,
                seed=self.seed,
                generator=self.generator,
                progress=plan.progress,
                checkpoint=saver,
                ranks=self.ranks,
            )
            self.checks += checks
            return flow, record
        schedule = saved_schedule(saver)
        if schedule is None:
            num_steps = plan.num_steps
            if seconds is not None:
                cost = seconds_per_step(
                    flow, self.density, self._objective(1), generator=self.generator, ranks=self.ranks
                )
                num_steps = min(num_steps, max(MIN_STEPS, int(seconds / cost)))
            schedule = Schedule(num_steps, plan.lr)
        self.objective = self._objective(schedule.num_steps)
        guarded = plan.whiten and type(self.objective).backward is ELBO.backward  # else a lower ELBO may be meant
        before = self._look(flow) if guarded else None
        start = {name: value.clone() for name, value in flow.state_dict().items()} if guarded else {}
        record = optimize(
            flow,
            self.density,
            self.objective,
            schedule,
            generator=self.generator,
            progress=plan.progress,
            description=f"{self.family.spec.name} K={self.family.spec.num_flows}",
            checkpoint=saver,
            ranks=self.ranks,
        )
        annealed = min(record.beta[-1:], default=1.0) < 1  # as it is still
        if before is not None and not annealed and self.ranks.same(is_worse(self._look(flow), before)):
            flow.load_state_dict(start)
            if record.stopped == "finished":
                record.stopped = "the steps made it worse: the flow is as it was before them, the Gaussian"
        return flow, record

    def _look(self, flow: Flow) -> Check:
        """A quick check, of the same base draws at every call."""
        generator = torch.Generator(self.density.device).manual_seed(self.seed + 2)
        return check(flow, self.density, generator, num_steps=0, seconds=0.0, num_draws=GUARD_DRAWS)

    def _train_each(self) -> tuple[Flow, Record]:
        """A flow for each mode, weighted by evidence. A checkpoint has none of them: they are trained anew."""
        seconds = self.plan.time_limit or (SECONDS if self.plan.rounds else None)
        share = None if seconds is None else seconds / len(self.groups)
        records: list[Record] = []

        def fit_one(mode: Mode) -> Flow:
            flow = self._start(mode, offset=len(records))
            if records and records[-1].stopped == "interrupted":
                return flow  # Ctrl-C was meant for all of them
            flow, record = self._train(flow, share, None)
            records.append(record)
            return flow

        found = fit_mixture(self.density, self.modes, fit_one, self.generator, groups=self.groups)
        self.decided["weights"] = [round(float(w), 4) for w in found.weights]
        if len(self.groups) > 1:
            self.decided["label_switching"] = label_switching(found.modes, self.density)
        record, *others = records
        for other in others:
            record.extend(other)
            record.stopped = other.stopped if other.stopped == "interrupted" else record.stopped
        return found.flow, record

    def _took(self, phase: str, start: float) -> None:
        self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - start


def _num_flows(flow: Flow, spec: FlowSpec) -> int:
    """K; of the longest component where there are several."""
    if isinstance(flow, MixtureFlow):
        return max(_num_flows(component, spec) for component in flow.flows)
    return flow.spec.num_flows if flow.spec is not None else spec.num_flows


@torch.no_grad()
def _fresh_elbo(flow: Flow, density: LogDensity, generator: torch.Generator, num_samples: int = 4096) -> float:
    """The ELBO on draws that no step saw; -inf where it is not finite, so that such an attempt never wins."""
    z, log_q = flow.rsample_and_log_prob(num_samples, generator=generator)
    elbo = float((density.full(z) - log_q).mean())
    return elbo if math.isfinite(elbo) else -math.inf


def _words(report: CompileReport) -> str:
    """What became of compiling, for ``posterior.config``."""
    speed = ""
    if report.compiled is not None:
        speed = f" ({1e3 * report.compiled:.3g} ms a call compiled, {1e3 * report.flat:.3g} ms flat)"
    return f"{'yes' if report.used else 'no'}: {report.reason}{speed}"
