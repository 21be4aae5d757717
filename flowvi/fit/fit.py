"""`fit`: from a target to a posterior, with nothing set; what is not said is decided here, and told."""

from __future__ import annotations

import math
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowvi.errors import InterruptedWarning, NumericalWarning, OptionError, UntrustedWarning
from flowvi.fit.checkpoint import Checkpoint, describe
from flowvi.fit.engine import Record, Schedule, optimize, saved_schedule, seconds_per_step
from flowvi.fit.labels import label_switching
from flowvi.fit.modes import Mode, distinct, fit_mixture, starts_evidence
from flowvi.fit.paths import connected
from flowvi.fit.rounds import ROUND_STEPS, SECONDS, Check, as_plain, run_rounds
from flowvi.fit.whiten import Gaussian, Start
from flowvi.fit.whiten import whiten as whiten_
from flowvi.flow import Flow, FlowSpec
from flowvi.guides import default_base
from flowvi.mixture import MixtureFlow
from flowvi.objectives import ELBO, BalancedELBO, LinearAnneal
from flowvi.posterior import History, Posterior
from flowvi.targets import LogDensity, as_density
from flowvi.targets.compiling import CompileReport
from flowvi.threads import one_thread_if_small
from flowvi.transforms.registry import FlowEntry, lookup

__all__ = ["fit"]

NUM_PARTICLES = 256
NUM_STEPS, NUM_STEPS_WHITENED = 4000, 3000
ANNEAL_FRACTION = 0.3
AUTO_FLOW = "planar"
MIN_STEPS = 200
LONG = 32  # layers, above which the step size falls as 1 / sqrt(K): the moves of K layers add up


def fit(
    target: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dim: int | None = None,
    flow: str | Callable[..., Any] = "auto",
    num_flows: int | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    lr: float | None = None,
    anneal: bool | Callable[[int], float] | None = None,
    whiten: bool | None = None,
    objective: ELBO | None = None,
    base: str | None = None,
    restarts: int | None = None,
    time_limit: float | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | str | None = "auto",
    progress: bool | None = None,
    verify: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    **options: Any,
) -> Posterior:
    r"""Fit q(z) = loc + A f_K(...f_1(eps)) to a posterior by maximizing the ELBO; None lets the engine decide.

    What it does: the target is traced once into a batched log density. A model or callable is whitened first
    (the best Gaussian from 8 starts, `flowvi.fit.whiten`); an energy, which may have several modes, starts
    at N(0, I) and is annealed (Rezende & Mohamed 2015, eq. 20). Then Adam with path gradients, a warm-up, a
    cosine schedule, and gradient clipping; steps with a non-finite gradient are skipped and counted. Ctrl-C
    returns the posterior so far. ``posterior.config`` says what was decided and why it stopped.

    Args:
        target: a Pyro model; an energy (`flowvi.energies`); or, with `dim`, a callable z (S, D) -> log p (S,).
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        dim: D of a callable.
        flow: a registered name, or factory(input_dim, **options) such as Pyro's. "auto" is planar; with
            `num_flows` and `num_steps` unset it trains in rounds, adds layers while they pay, and stops by itself
            (`flowvi.fit.rounds`).
        num_flows: K; 32 for planar and radial, 4 to 8 for others: `flowvi.transforms.registry` knows.
        num_steps: steps of Adam; 3000 after whitening, else 4000.
        num_particles: S, draws per step; 256.
        lr: the largest step size; 4e-2 for planar and radial, 1e-2 for flows with networks; above K = 32 less,
            as 1 / sqrt(K).
        anneal: True for beta from .01 to 1 over the first 30% of the steps, False for none, or a schedule
            step -> beta. None: for energies, and where the whitening's starts disagree.
        whiten: whether the best Gaussian is fitted first. None: for models and callables.
        objective: an estimator in place of `num_particles` and `anneal`, such as ``flowvi.ELBO(64)``. None:
            `flowvi.BalancedELBO` where the flow has a path score, else the standard one.
        base: the affine layer after the flow, "diag", "low_rank" or "full"; by default full up to D = 200.
        restarts: fits from different seeds, of which the one with the best ELBO is kept; 1.
        time_limit: seconds for the steps: their number is cut, by a measured rate, to what fits in. "auto" stops
            after 60 s if it did not stop before.
        seed: makes the fit reproducible (same machine, same threads); drawn if None. The global random state
            is left alone either way.
        device: where to compute; the model's arguments are moved there.
        dtype: of the computation; torch's default, or float64 if an argument is.
        compile: whether the target's value and gradient go through Inductor: "auto" (or None) for a model whose
            steps to come would repay it, True in any case, False never. What is measured to be faster is kept;
            without a C++ compiler nothing changes. ``posterior.config["compile"]`` says what was used, and why.
        progress: whether bars are shown; None shows them in a terminal or notebook.
        verify: whether the result is diagnosed and a plain warning given if it can't be trusted; True.
        checkpoint: a folder of this fit's own, where its whole state is kept in a file. The same call again goes on
            where a crash or Ctrl-C ended the last one, and returns the posterior at once where that was finished;
            another call is refused. With `num_steps` the result is that of a run without a break, to the bit, on
            the same machine with as many threads. With "auto", `time_limit` or `compile` measured times decide: the
            round begun is as long as it was to be, and later ones are measured anew. A folder that can't be
            written gives a `CheckpointWarning`, and the fit goes on.
        checkpoint_every: seconds between two files, and so what a crash can lose at most; 30.
        **options: what the flow's factory takes.

    Returns:
        The posterior.

    Raises:
        OptionError, UnknownFlowError: an argument can't be used, or `checkpoint` belongs to another call.
        FileFormatError: the file in `checkpoint` is damaged, of a newer version or of something else.
        DimensionError, TargetError and its children: the target can't be used; the message says why.

    Example:
        >>> import flowvi
        >>> posterior = flowvi.fit(flowvi.energies.U2(), num_flows=4, num_steps=50, seed=0, verify=False)
        >>> posterior.sample(10)["z"].shape
        torch.Size([10, 2])
    """
    _check_counts(num_steps=num_steps, num_particles=num_particles, restarts=restarts)
    _check_positive(lr=lr, time_limit=time_limit, checkpoint_every=checkpoint_every)
    if compile not in (None, True, False, "auto"):
        raise OptionError(f"compile must be 'auto', True, False or None, not {compile!r}.")
    if objective is not None and (num_particles is not None or anneal is not None):
        raise OptionError("give either objective=, or num_particles= and anneal=: the objective has its own.")
    name = AUTO_FLOW if isinstance(flow, str) and flow == "auto" else flow
    num_flows_asked = num_flows
    entry = lookup(name) if isinstance(name, str) else FlowEntry(name)
    if num_flows is None:
        num_flows = entry.num_flows
    seed_asked, seed = seed, secrets.randbits(31) if seed is None else seed

    timing: dict[str, float] = {}
    start = time.perf_counter()
    density = as_density(target, args=args, kwargs=kwargs, dim=dim, dtype=dtype, device=device)
    timing["trace"] = time.perf_counter() - start

    label = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    spec = FlowSpec(label, density.dim, num_flows, base or default_base(density.dim), options)
    factory = None if isinstance(name, str) else name
    is_energy = density.model is None and dim is None
    whiten = not is_energy if whiten is None else whiten
    plan = Plan(
        num_steps=num_steps or (NUM_STEPS_WHITENED if whiten else NUM_STEPS),
        num_particles=num_particles or NUM_PARTICLES,
        lr=lr or entry.lr * min(1.0, math.sqrt(LONG / max(1, num_flows))),
        anneal=anneal if anneal is not None or not is_energy else True,
        whiten=whiten,
        objective=objective,
        time_limit=None if time_limit is None else time_limit / (restarts or 1),
        compile=compile,
        progress=progress,
        rounds=flow == "auto" and num_flows_asked is None and num_steps is None and not options,
    )
    saver = None
    tries: list[Attempt] = []
    if checkpoint is not None:
        settings = replace(plan, compile=None, progress=None)
        call = describe(density, seed_asked, spec, settings, factory=factory, restarts=restarts or 1)
        saver = Checkpoint(checkpoint, checkpoint_every, call, seed=seed)
        seed = saver.seed
        saved = saver.take("fit")
        if saved is not None:
            with saver.reading():
                tries = [_unpack(t, density, spec, factory, seed + i) for i, t in enumerate(saved["tries"])]
                timing |= saved["timing"]
        saver.keep("fit", lambda: {"tries": [_pack(t) for t in tries], "timing": timing})
    interrupted = False
    with one_thread_if_small(plan.num_particles * density.dim * max(1, num_flows)):
        for attempt in range(len(tries), restarts or 1):
            try:
                tries.append(_attempt(density, spec, factory, plan, seed + attempt, timing, saver))
            except KeyboardInterrupt:  # before its first step
                if not tries:
                    raise
                interrupted = True
            if interrupted or tries[-1].record.stopped == "interrupted":
                interrupted = True
                break
        else:
            if saver is not None:
                saver.keep("attempt", None)
                saver.save()
    best = max(tries, key=lambda t: t.elbo)
    if interrupted:
        best.record.stopped = "interrupted"
    q, record, decided = best.flow, best.record, best.decided
    config = {
        "target": density.name,
        "flow": label,
        "num_flows": num_flows,
        "base": spec.base,
        "options": dict(options),
        "num_parameters": sum(p.numel() for p in q.parameters()),
        **decided,
        "restarts": restarts or 1,
        "seed": seed,
        "dtype": str(density.dtype).removeprefix("torch."),
        "device": str(density.device),
        "log_density": density.path,
        "stopped": record.stopped,
    }
    posterior = Posterior(q, density, config=config, timing=timing, history=_history(record), seed=seed)
    _report_trouble(record, config["num_particles"])
    if verify is None or verify:
        start = time.perf_counter()
        try:
            found = posterior.diagnose()
        except KeyboardInterrupt:  # what is fitted is not lost
            warnings.warn(
                InterruptedWarning("stopped by Ctrl-C before the fit was verified: see posterior.diagnose()."),
                stacklevel=2,
            )
            return posterior
        timing["diagnose"] = time.perf_counter() - start
        posterior.timing["diagnose"] = timing["diagnose"]
        if not found.trusted:
            warnings.warn(UntrustedWarning(found.verdict), stacklevel=2)
    return posterior


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
    """One fit from one seed, with its ELBO on fresh draws."""

    elbo: float
    flow: Flow
    record: Record
    decided: dict[str, Any]


def _attempt(
    density: LogDensity,
    spec: FlowSpec,
    factory: Callable[..., Any] | None,
    plan: Plan,
    seed: int,
    timing: dict[str, float],
    saver: Checkpoint | None,
) -> Attempt:
    generator = torch.Generator(density.device).manual_seed(seed)
    decided: dict[str, Any] = {"whiten": plan.whiten}
    gaussian: Gaussian | None = None
    compiled: CompileReport | None = None
    saved = None
    if saver is not None:
        saved = saver.take("attempt")
        saver.follow(fit=generator, density=density.generator)
        saver.keep(
            "attempt",
            lambda: {"gaussian": gaussian and asdict(gaussian), "compile": compiled and vars(compiled)},
        )
        if saved is None:
            saver.save()
        else:
            saver.restore_generators()
            with saver.reading():
                gaussian = saved["gaussian"] and Gaussian.from_dict(saved["gaussian"])
                compiled = saved["compile"] and CompileReport(**saved["compile"])
    if plan.whiten and gaussian is None:
        start = time.perf_counter()
        gaussian = whiten_(
            density,
            density.dim,
            full=spec.base == "full",
            generator=generator,
            dtype=density.dtype,
            progress=plan.progress,
        )
        _add(timing, "whiten", start)
        if saver is not None:
            saver.save()
    if gaussian is not None:
        decided["starts_agree"] = gaussian.agree
    bare = replace(spec, num_flows=0) if plan.rounds else spec
    flow = _start(bare, factory, density, gaussian, seed)
    start = time.perf_counter()
    modes, groups = _modes(gaussian, density, seed, decided)
    if gaussian is not None:
        _add(timing, "modes", start)
    anneal = plan.anneal
    if anneal is None:
        anneal = gaussian is not None and not gaussian.agree and len(groups) <= 1
    num_steps = plan.num_steps

    def make_objective(num_steps: int | None) -> ELBO:
        if plan.objective is not None:
            return plan.objective
        schedule = None
        if anneal and num_steps is not None:
            schedule = LinearAnneal(max(1, round(ANNEAL_FRACTION * num_steps))) if anneal is True else anneal
        kind = BalancedELBO if flow.has_path_score else ELBO
        return kind(plan.num_particles, anneal=schedule)

    if compiled is not None and saver is not None:  # what was decided before stays, else bits would change
        if compiled.used:
            density.compile(make_objective(1).num_particles)
        saver.restore_generators()
    elif plan.compile is not False:
        start = time.perf_counter()
        num_calls = None if plan.compile is True else (ROUND_STEPS if plan.rounds else num_steps)
        compiled = density.compile(make_objective(1).num_particles, num_calls=num_calls)
        if compiled.seconds:
            _add(timing, "compile", start)
    start = time.perf_counter()
    checks: list[Check] = []
    objective = make_objective(num_steps)
    if len(modes) > 1:
        share = replace(plan, time_limit=(plan.time_limit or (SECONDS if plan.rounds else 0)) / len(groups) or None)
        records: list[Record] = []

        def fit_one(mode: Mode) -> Flow:
            component = _start(bare, factory, density, mode, seed + len(records))
            if plan.rounds:
                component, seen, found = run_rounds(
                    component,
                    density,
                    make_objective,
                    lr=plan.lr,
                    first_steps=ROUND_STEPS,
                    annealed=False,
                    whitened=True,
                    seconds=share.time_limit or SECONDS,
                    seed=seed,
                    generator=generator,
                    progress=plan.progress,
                )
                checks.extend(found)
            else:
                _, _, seen = _steps(component, density, make_objective, share, spec, generator, None)
            records.append(seen)
            return component

        mixture = fit_mixture(density, modes, fit_one, generator, groups=groups)
        flow, record, num_steps = mixture.flow, _joined(records), sum(len(r.beta) for r in records)
        decided["weights"] = [round(float(w), 4) for w in mixture.weights]
        if len(groups) > 1:
            decided["label_switching"] = label_switching(mixture.modes, density)
    elif plan.rounds:
        flow, record, checks = run_rounds(
            flow,
            density,
            make_objective,
            lr=plan.lr,
            first_steps=NUM_STEPS if anneal else ROUND_STEPS,
            annealed=bool(anneal),
            whitened=plan.whiten,
            seconds=plan.time_limit or SECONDS,
            seed=seed,
            generator=generator,
            progress=plan.progress,
            checkpoint=saver,
        )
        num_steps = len(record.beta)
    else:
        num_steps, objective, record = _steps(flow, density, make_objective, plan, spec, generator, saver)
    _add(timing, "steps", start)
    decided |= {
        "num_flows": _num_flows(flow, spec),
        "num_steps": num_steps,
        "num_particles": objective.num_particles,
        "lr": plan.lr,
        "anneal": repr(objective.anneal) if min(record.beta, default=1.0) < 1 else None,
        "gradient": objective.gradient,
        "step": "without a tape" if record.fused else "by autograd",
        "compile": _words(compiled),
        "rounds": as_plain(checks),
    }
    return Attempt(_fresh_elbo(flow, density, generator), flow, record, decided)


def _modes(
    gaussian: Gaussian | None, density: LogDensity, seed: int, decided: dict[str, Any]
) -> tuple[Sequence[Mode], Sequence[Sequence[int]]]:
    """The places where the whitening's starts found mass of their own, and which of them are joined by a ridge."""
    if gaussian is None:
        return (), ()
    generator = torch.Generator(density.device).manual_seed(seed + 1)  # its own, so that a resumed fit finds the same
    starts = (gaussian, *gaussian.starts)
    decided["starts_log_evidence"] = starts_evidence(starts, density, generator)
    modes = distinct(starts, density, generator)
    groups = connected(modes, density) if len(modes) > 1 else [[0]]
    decided["modes"] = len(groups)
    return modes, groups


def _joined(records: Sequence[Record]) -> Record:
    """The records of several components, one after the other."""
    first, *others = records
    for other in others:
        first.extend(other)
        first.stopped = other.stopped if other.stopped == "interrupted" else first.stopped
    return first


def _num_flows(flow: Flow, spec: FlowSpec) -> int:
    """K; of the longest component where there are several."""
    if isinstance(flow, MixtureFlow):
        return max(_num_flows(component, spec) for component in flow.flows)
    return flow.spec.num_flows if flow.spec is not None else spec.num_flows


def _steps(
    flow: Flow,
    density: LogDensity,
    make_objective: Callable[[int | None], ELBO],
    plan: Plan,
    spec: FlowSpec,
    generator: torch.Generator,
    saver: Checkpoint | None,
) -> tuple[int, ELBO, Record]:
    """One run of the asked number of steps, or of what fits in the time limit."""
    schedule = saved_schedule(saver)
    if schedule is None:
        num_steps = plan.num_steps
        if plan.time_limit is not None:
            cost = seconds_per_step(flow, density, make_objective(1), generator=generator)
            num_steps = min(num_steps, max(MIN_STEPS, int(plan.time_limit / cost)))
        schedule = Schedule(num_steps, plan.lr)
    objective = make_objective(schedule.num_steps)
    record = optimize(
        flow,
        density,
        objective,
        schedule,
        generator=generator,
        progress=plan.progress,
        description=f"{spec.name} K={spec.num_flows}",
        checkpoint=saver,
    )
    return schedule.num_steps, objective, record


def _pack(attempt: Attempt) -> dict[str, Any]:
    """A finished attempt as plain data, for a checkpoint."""
    mixture = attempt.flow.spec.to_dict() if isinstance(attempt.flow, MixtureFlow) and attempt.flow.spec else None
    return attempt._asdict() | {
        "flow": attempt.flow.state_dict(),
        "mixture": mixture,
        "record": attempt.record.to_dict(),
    }


def _unpack(
    saved: Mapping[str, Any], density: LogDensity, spec: FlowSpec, factory: Callable[..., Any] | None, seed: int
) -> Attempt:
    """The attempt that `_pack` gave."""
    if saved["mixture"] is not None:
        mixture = FlowSpec.from_dict(saved["mixture"])
        flow: Flow = MixtureFlow.from_spec(mixture, dtype=density.dtype, device=density.device, factory=factory)
    else:
        flow = _start(replace(spec, num_flows=saved["decided"]["num_flows"]), factory, density, None, seed)
    flow.load_state_dict(saved["flow"])
    return Attempt(saved["elbo"], flow, Record.from_dict(saved["record"]), saved["decided"])


def _start(
    spec: FlowSpec,
    factory: Callable[..., Any] | None,
    density: LogDensity,
    gaussian: Start | None,
    seed: int,
) -> Flow:
    """The flow at the identity on top of the Gaussian, its random directions drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = Flow.from_spec(spec, dtype=density.dtype, device=density.device, factory=factory)
    if gaussian is not None:
        flow.transforms[-1].set_(gaussian.loc, gaussian.scale_tril)
    return flow


@torch.no_grad()
def _fresh_elbo(flow: Flow, density: LogDensity, generator: torch.Generator, num_samples: int = 4096) -> float:
    """The ELBO on draws that no step saw; -inf where it is not finite, so that such an attempt never wins."""
    z, log_q = flow.rsample_and_log_prob(num_samples, generator=generator)
    elbo = float((density.full(z) - log_q).mean())
    return elbo if math.isfinite(elbo) else -math.inf


def _history(record: Record) -> History:
    return History(
        step=torch.arange(len(record.beta)),
        elbo=record.elbo,
        beta=torch.tensor(record.beta, dtype=torch.float64),
        skipped_steps=record.skipped_steps,
        nonfinite_particles=record.nonfinite_particles,
    )


def _report_trouble(record: Record, num_particles: int) -> None:
    steps = len(record.beta)
    if record.stopped == "interrupted":
        warnings.warn(
            InterruptedWarning(f"stopped by Ctrl-C after {steps} steps; this is the posterior so far."), stacklevel=3
        )
    lost = record.nonfinite_particles / max(1, steps * num_particles)
    if record.skipped_steps or lost > 1e-3:
        warnings.warn(
            NumericalWarning(
                f"{record.skipped_steps} of {steps} steps were skipped for a non-finite gradient, and {lost:.1%} of "
                f"the particles left out for a non-finite log density: the target is not finite where q puts mass. "
                f"Check its support and scales, or start closer with whiten=True."
            ),
            stacklevel=3,
        )


def _words(report: CompileReport | None) -> str:
    """What became of compiling, for ``posterior.config``."""
    if report is None:
        return "no: compile=False"
    speed = ""
    if report.compiled is not None:
        speed = f" ({1e3 * report.compiled:.3g} ms a call compiled, {1e3 * report.flat:.3g} ms flat)"
    return f"{'yes' if report.used else 'no'}: {report.reason}{speed}"


def _add(timing: dict[str, float], phase: str, start: float) -> None:
    timing[phase] = timing.get(phase, 0.0) + time.perf_counter() - start


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise OptionError(f"{name} must be a positive integer or None, not {value!r}.")


def _check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise OptionError(f"{name} must be a positive number or None, not {value!r}.")
