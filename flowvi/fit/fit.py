"""`fit`: from a target to a posterior, with nothing set; what is not said is decided here, and told."""

from __future__ import annotations

import math
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from pyro.infer import ELBO as PyroELBO
from torch.utils.data import Dataset

from flowvi.checks import (
    as_device,
    as_path,
    as_seed,
    flags_or_none,
    functions,
    instances,
    keywords,
    one_of,
    positive_integers_or_none,
    positive_numbers_or_none,
    shown,
    whole_numbers,
)
from flowvi.errors import InterruptedWarning, NumericalWarning, OptionError, UntrustedWarning
from flowvi.files import plain
from flowvi.fit.attempt import Attempt, Family, Plan, Trial
from flowvi.fit.checkpoint import Checkpoint, describe
from flowvi.fit.distributed import ALONE, Ranks, local_device
from flowvi.fit.engine import Record
from flowvi.fit.memory import check_memory, forecast
from flowvi.fit.rounds import MAX_FLOWS
from flowvi.fit.steps import check_split
from flowvi.flow_spec import FlowSpec
from flowvi.guides import default_base
from flowvi.history import History
from flowvi.objectives import ELBO, BalancedELBO
from flowvi.posterior import Posterior
from flowvi.progress import wanted
from flowvi.targets import as_density
from flowvi.threads import one_thread_if_small
from flowvi.transforms.affine import AFFINE_KINDS
from flowvi.transforms.registry import FlowEntry, lookup

if TYPE_CHECKING:
    from flowvi.amortized_fit import AmortizedFit

__all__ = ["fit"]

NUM_PARTICLES = 256
NUM_STEPS, NUM_STEPS_WHITENED = 4000, 3000
AUTO_FLOW = "planar"
RANKS_SHARE = ("particles", "restarts")
LONG = 32  # layers, above which the step size falls as 1 / sqrt(K): the moves of K layers add up
MAX_FUNNEL_DIM = 256  # a funnel layer has D^2 / 2 parameters
WIDE = 200  # D, above which it falls as 1 / sqrt(D): the entries of one direction's vector move all at once


@overload
def fit(
    target: Any,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    encoder: None = None,
    **options: Any,
) -> Posterior: ...


@overload
def fit(
    target: Any,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    encoder: Callable[..., torch.Tensor],
    **options: Any,
) -> AmortizedFit: ...


def fit(
    target: Any,
    args: Any = (),
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
    distributed: bool | str = False,
    encoder: Callable[..., torch.Tensor] | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    **options: Any,
) -> Posterior | AmortizedFit:
    r"""Fit q(z) = loc + A f_K(...f_1(eps)) to a posterior by maximizing the ELBO; None lets the engine decide.

    What it does: the target is traced once into a batched log density. A model or callable is whitened first
    (the best Gaussian from up to 8 starts, `flowvi.fit.whiten`); where the starts found several modes, each gets a
    flow, and they are mixed by evidence (`flowvi.fit.modes`). An energy, which may have several modes, starts at
    N(0, I) and is annealed (Rezende & Mohamed 2015, eq. 20). Then Adam with path and log-variance gradients, a
    warm-up, a cosine schedule, and gradient clipping; steps with a non-finite gradient are skipped and counted.
    Ctrl-C returns the posterior so far. ``posterior.config`` says what was decided and why it stopped.

    Args:
        target: a Pyro model; an energy (`flowvi.energies`); or, with `dim`, a callable z (S, D) -> log p (S,).
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        dim: D of a callable.
        flow: a registered name, or factory(input_dim, **options) such as Pyro's. "auto" is planar; with
            `num_flows` and `num_steps` unset it trains in rounds, adds layers while they pay, widens what is too narrow
            once q is close (`flowvi.CoveringELBO`), and stops by itself (`flowvi.fit.rounds`).
        num_flows: K; 32 for planar and radial, 4 to 8 for others: `flowvi.transforms.registry` knows.
        num_steps: steps of Adam; 3000 after whitening, else 4000.
        num_particles: S, draws per step; 256.
        lr: the largest step size; 4e-2 for planar and radial, 1e-2 for flows with networks; above K = 32 less,
            as 1 / sqrt(K), and above D = 200, as 1 / sqrt(D).
        anneal: True for beta from .01 to 1 over the first 30% of the steps, False for none, or a schedule
            step -> beta. None: for energies of the plane, and where the whitening's starts disagree.
        whiten: whether the best Gaussian is fitted first. None: for all but energies of the plane.
        objective: an estimator in place of `num_particles` and `anneal`, such as ``flowvi.ELBO(64)``. None:
            `flowvi.BalancedELBO` where the flow has a path score, else the standard one.
        base: the affine layer after the flow, "diag", "low_rank" or "full"; by default full up to D = 200.
        restarts: fits from different seeds, of which the one with the best ELBO is kept; 1.
        time_limit: seconds for the steps: their number is cut, by a measured rate, to what fits in, but not below
            250. What comes before them, tracing, whitening and the search for modes, is not counted: seconds, or a
            minute and more where the model can't be traced. "auto" stops after 60 s if it did not stop before.
        seed: makes the fit reproducible (same machine, same threads); drawn if None. The global random state
            is left alone either way.
        device: where to compute; the model's arguments are moved there.
        dtype: of the computation; torch's default, or float64 if an argument is.
        compile: whether the target's value and gradient go through Inductor: "auto" (or None) for a model that is
            no program of flowvi's own machine (`flowvi.program`: minibatches, rare operations, other devices) and
            whose steps to come would repay it, True in any case, False never. What is measured to be faster is kept;
            without a C++ compiler nothing changes. ``posterior.config["compile"]`` says what was used, and why. With
            `encoder` it is a whole step, model, guide and gradient, that is recorded once as a flat list of tensor
            operations ("auto": for 1,000 steps and more), and used where it gives what the step gives; False takes
            every step as it is written, for a model or encoder whose Python code changes from call to call.
        progress: whether bars are shown; None shows them in a terminal or notebook.
        verify: whether the result is diagnosed and a plain warning given if it can't be trusted; True.
        checkpoint: a folder of this fit's own, where its whole state is kept in a file. The same call again goes on
            where a crash or Ctrl-C ended the last one, and returns the posterior at once where that was finished;
            another call is refused. With `num_steps` the result is that of a run without a break, to the bit, on
            the same machine with as many threads. With "auto", `time_limit` or `compile` measured times decide: the
            round begun is as long as it was to be, and later ones are measured anew. A folder that can't be
            written gives a `CheckpointWarning`, and the fit goes on.
        checkpoint_every: seconds between two files, and so what a crash can lose at most; 30.
        distributed: True in a program that `torchrun` (or `torch.distributed`) started as several processes: each
            step's particles are split over these ranks, the steps are those of one process with all particles, and
            every rank returns the same posterior. "restarts" gives each rank whole fits instead (`restarts`, by
            default one a rank), which exchanges nothing until the end. Rank 0 reports, decides by its clock, and keeps
            the checkpoint (with "restarts" each rank has a folder in it). The ranks must make the same calls.
        encoder: a network from data (n, ...) to features (n, C). With it every data point gets a flow of its own
            (`flowvi.AmortizedGuide`), and model and encoder are learnt together by minibatches: modules in place,
            `pyro.param` kept in the result. `args` is the data, tensors or a torch Dataset, and what else the model
            takes; the model's plate is as long as the minibatch it is given, pyro.plate("data", len(x)), or has the
            size of all data and a subsample of that length. Latents outside that plate are given all rows that are
            learnt from (and none is held out by default). `num_steps` is 20,000 then, `num_particles` 1 per data
            point, `lr` 1e-3, and the objective `flowvi.PathELBO`, annealed where `anneal` says (True: over a tenth of
            the steps). An `IWELBO` is taken too.
        batch_size: with `encoder`, rows of a step; 100.
        validation: with `encoder`, the fraction of rows held out, drawn by the seed, .05; or held-out data, as `args`.
            What scores best on them is kept.
        patience: with `encoder`, checks of the held-out ELBO (there are 100 in a full fit) without improvement that
            end the fit; 20.
        **options: what the flow's factory takes; with `encoder`, what `flowvi.AmortizedGuide` takes, and
            optimizer="adam" or "rmsprop" (with momentum .9), lr_schedule="cosine" or "constant".

    Returns:
        The posterior; with `encoder` an `AmortizedFit`: `elbo`, `log_likelihood`, `posterior`, `sample`, `history`.

    Raises:
        OptionError, UnknownFlowError: an argument can't be used, `checkpoint` belongs to another call, or the process
            was not started as one of several where `distributed` says so.
        RankLostError: another rank ended or fell silent; the same call goes on from the checkpoint.
        FileFormatError: the file in `checkpoint` is damaged, of a newer version or of something else.
        DimensionError, TargetError and its children: the target can't be used; the message says why.
        TooLargeError: by the forecast (`flowvi.fit.memory`) the fit needs more than twice the memory that there is.

    Example:
        >>> import flowvi
        >>> posterior = flowvi.fit(flowvi.energies.U2(), num_flows=4, num_steps=50, seed=0, verify=False)
        >>> posterior.sample(10)["z"].shape
        torch.Size([10, 2])
    """
    seed = as_seed(seed)
    flags_or_none(progress=progress, whiten=whiten, verify=verify)
    device = as_device(device)
    instances(ELBO if encoder is None else PyroELBO, type(None), objective=objective)
    if not (anneal is None or isinstance(anneal, bool) or callable(anneal)):
        raise OptionError(f"anneal must be True, False, a schedule step -> beta, or None, not {shown(anneal)}.")
    if checkpoint is not None:
        checkpoint = as_path("checkpoint", checkpoint)
    if not (compile is None or isinstance(compile, bool) or (isinstance(compile, str) and compile == "auto")):
        raise OptionError(f"compile must be 'auto', True, False or None, not {shown(compile)}.")
    if not isinstance(flow, str) and not callable(flow):
        raise OptionError(f"flow must be a name or a factory(input_dim, **options), not {shown(flow)}.")
    if num_flows is not None:
        whole_numbers(num_flows=num_flows)
    if encoder is not None:
        functions(encoder=encoder)
        instances(torch.Tensor, Dataset, Sequence, args=args)
        keywords(kwargs=kwargs)
        given = {
            "dim": dim, "whiten": whiten, "base": base, "restarts": restarts, "time_limit": time_limit,
            "dtype": dtype, "verify": verify or None,
        }  # fmt: skip
        if wrong := [name for name, value in given.items() if value is not None]:
            raise OptionError(f"{', '.join(wrong)} can't go with encoder=: leave it out.")
        if not isinstance(flow, str):
            raise OptionError(f"with encoder= the flow is a registered name, not {flow!r}.")
        if not isinstance(distributed, bool):
            raise OptionError(
                f"with encoder= distributed is True or False, not {distributed!r}: minibatches are split."
            )
        from flowvi.fit.amortized import fit_amortized

        return fit_amortized(
            target,
            args,
            kwargs,
            encoder,
            flow=flow,
            num_flows=num_flows,
            num_steps=num_steps,
            num_particles=num_particles,
            lr=lr,
            anneal=anneal,
            objective=objective,
            batch_size=batch_size,
            validation=validation,
            patience=patience,
            seed=seed,
            device=device,
            compile=compile,
            progress=progress,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            ranks=Ranks.join() if distributed else ALONE,
            **options,
        )
    for name_, value in (("batch_size", batch_size), ("validation", validation), ("patience", patience)):
        if value is not None:
            raise OptionError(f"{name_} goes with encoder=, by which minibatches are fitted.")
    positive_integers_or_none(num_steps=num_steps, num_particles=num_particles, restarts=restarts)
    positive_numbers_or_none(lr=lr, time_limit=time_limit, checkpoint_every=checkpoint_every)
    if base is not None:
        one_of(AFFINE_KINDS, base=base)
    if objective is not None and (num_particles is not None or anneal is not None):
        raise OptionError("give either objective=, or num_particles= and anneal=: the objective has its own.")
    auto = isinstance(flow, str) and flow == "auto"
    name = AUTO_FLOW if auto else flow
    rounds = auto and num_flows is None and num_steps is None and not options
    entry = lookup(name) if isinstance(name, str) else FlowEntry(name)
    if num_flows is None:
        num_flows = entry.num_flows
    job, ranks, restarts = _ranks(distributed, restarts)  # the particles are split over `ranks`
    by_restarts = job is not ranks
    mine = range(job.rank, restarts, job.world) if by_restarts else range(restarts)
    most = -(-restarts // job.world) if by_restarts else restarts  # of one rank
    if ranks.world > 1:
        check_split(objective or BalancedELBO(num_particles or NUM_PARTICLES), ranks)
    seed_asked, seed = seed, job.same(secrets.randbits(31) if seed is None else seed)

    timing: dict[str, float] = {}
    start = time.perf_counter()
    with job.quiet():
        density = as_density(target, args=args, kwargs=kwargs, dim=dim, dtype=dtype, device=local_device(device, job))
        density.prepare()
    timing["trace"] = time.perf_counter() - start

    label = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    is_picture = density.model is None and dim is None and density.dim <= 2
    funnels = 0
    if rounds and not is_picture and 1 < density.dim <= MAX_FUNNEL_DIM:
        # A model samples a scale before what it scales; of a callable's coordinates the order is not known.
        funnels = 1 if density.model is not None else 2
    spec = FlowSpec(label, density.dim, num_flows, base or default_base(density.dim), options, funnels)
    family = Family(spec, None if isinstance(name, str) else name)
    whiten = not is_picture if whiten is None else whiten
    plan = Plan(
        num_steps=num_steps or (NUM_STEPS_WHITENED if whiten else NUM_STEPS),
        num_particles=num_particles or NUM_PARTICLES,
        lr=lr or entry.lr * min(1.0, math.sqrt(LONG / max(1, num_flows))) * min(1.0, math.sqrt(WIDE / density.dim)),
        anneal=anneal if anneal is not None or not is_picture else True,
        whiten=whiten,
        objective=objective,
        time_limit=None if time_limit is None else time_limit / most,
        compile=compile,
        progress=progress if job.is_first else False,
        rounds=rounds,
    )
    sizes = forecast(
        replace(spec, num_flows=MAX_FLOWS) if rounds else spec,
        num_particles=-(-(objective or plan).num_particles // ranks.world),
        itemsize=density.dtype.itemsize,
        whiten=whiten,
        verify=verify is not False,
        rounds=rounds,
        num_data=density.num_data if density.path == "graph" else 0,
        program=density.has_program,
        registered=family.factory is None,
    )
    with job.quiet():
        memory = check_memory(sizes, density.device)
    saver = None
    tries: list[Attempt] = []
    if checkpoint is not None:
        settings = replace(plan, compile=None, progress=None)
        call = describe(density, seed_asked, spec, settings, factory=family.factory, restarts=restarts)
        if by_restarts:
            call["rank"] = f"{job.rank} of {job.world}"
            checkpoint = Path(checkpoint, f"rank{job.rank}")
        saver = Checkpoint(checkpoint, checkpoint_every, call, seed=seed, ranks=ranks)
        if by_restarts:  # a rank that was cut off before its first file takes the seed of those that were not
            seeds = job.gather((saver.resumed, saver.seed))
            saver.seed = next((theirs for resumed, theirs in seeds if resumed), seeds[0][1])
        seed = saver.seed
        saved = saver.take("fit")
        if saved is not None:
            with saver.reading():
                pairs = zip(mine, saved["tries"], strict=False)
                tries = [Attempt.from_dict(t, family, density, seed + i) for i, t in pairs]
                timing |= saved["timing"]
        saver.keep("fit", lambda: {"tries": [t.to_dict() for t in tries], "timing": timing})
    interrupted = False
    size = plan.num_particles * density.dim * max(1, num_flows) // ranks.world
    with one_thread_if_small(size), job.working(together=not by_restarts), wanted(plan.progress):
        for attempt in mine[len(tries) :]:
            try:
                tries.append(Trial(density, family, plan, seed + attempt, timing, saver, ranks).run())
            except KeyboardInterrupt:  # before its first step
                if not tries and not by_restarts:
                    raise
                interrupted = True
            if interrupted or tries[-1].record.stopped == "interrupted":
                interrupted = True
                break
        else:
            if saver is not None:
                saver.keep("attempt", None)
                saver.save()
        if by_restarts:
            found = job.gather((interrupted, [plain(t.to_dict()) for t in tries]))
            interrupted = any(stopped for stopped, _ in found)
            tries = [Attempt.from_dict(t, family, density, seed) for _, theirs in found for t in theirs]
            if not tries:
                raise KeyboardInterrupt
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
        "restarts": restarts,
        "ranks": job.world,
        "seed": seed,
        "dtype": str(density.dtype).removeprefix("torch."),
        "device": str(density.device),
        "log_density": density.path,
        "memory": memory,
        "stopped": record.stopped,
    }
    config, timing = job.same((config, timing))
    posterior = Posterior(q, density, config=config, timing=timing, history=_history(record), seed=seed)
    if job.is_first:
        _report_trouble(record, config["num_particles"])
    if verify is None or verify:
        start = time.perf_counter()
        try:
            with wanted(plan.progress):
                diagnosis = posterior.diagnose()
        except KeyboardInterrupt:  # what is fitted is not lost
            warnings.warn(
                InterruptedWarning("stopped by Ctrl-C before the fit was verified: see posterior.diagnose()."),
                stacklevel=2,
            )
            return posterior
        timing["diagnose"] = time.perf_counter() - start
        posterior.timing["diagnose"] = timing["diagnose"]
        if not diagnosis.trusted and job.is_first:
            warnings.warn(UntrustedWarning(diagnosis.verdict), stacklevel=2)
    return posterior


def _ranks(distributed: bool | str, restarts: int | None) -> tuple[Ranks, Ranks, int]:
    """The job's ranks, those over which the particles are split, and how many restarts there are."""
    if not (isinstance(distributed, bool) or (isinstance(distributed, str) and distributed in RANKS_SHARE)):
        raise OptionError(f"distributed must be True, False, 'particles' or 'restarts', not {shown(distributed)}.")
    job = Ranks.join() if distributed else ALONE
    if distributed != "restarts" or job.world == 1:
        return job, job, restarts or 1
    if restarts is not None and restarts < job.world:
        raise OptionError(f"{restarts} restarts can't be split over {job.world} ranks: ask for more restarts.")
    return job, ALONE, restarts or job.world


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
