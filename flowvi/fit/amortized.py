"""`fit(model, args, encoder=...)`: a model and its amortized guide, learnt together by minibatches."""

from __future__ import annotations

import math
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowvi.amortized import AmortizedGuide
from flowvi.amortized_fit import AmortizedFit
from flowvi.checks import positive_integers_or_none, positive_numbers_or_none
from flowvi.errors import OptionError
from flowvi.files import digest, plain
from flowvi.fit.adam import FlatParameters
from flowvi.fit.amortized_gradient import AmortizedGradient
from flowvi.fit.amortized_record import Record, Settings, report_trouble
from flowvi.fit.amortized_step import AmortizedStep, learnt_parameters
from flowvi.fit.batches import Batches, split_rows
from flowvi.fit.checkpoint import Checkpoint, _name, _word, whole_steps
from flowvi.fit.descent import OPTIMIZERS
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.fit.engine import STOP_EVERY, Schedule
from flowvi.fit.factored_descent import make_descent
from flowvi.fit.gradient import LOOK_EVERY
from flowvi.objectives import ELBO, LinearAnneal, PathELBO
from flowvi.progress import Bar, wanted
from flowvi.random_state import kept, reseed
from flowvi.transforms.registry import lookup

__all__ = ["fit_amortized"]

NUM_STEPS = 20_000
BATCH_SIZE = 100
LR = 1e-3
VALIDATION = 0.05
PATIENCE = 20
CHECKS = 100  # of the held-out rows, in the course of a fit
CHECKED_ROWS = 2000  # held-out rows at most for one check
LOOP = "amortized"
LEAST_STEPS = 1000  # that repay the second that it costs to record one
GLOBALS_BETA2 = 0.99
"""Of Adam where there are global latents: while they are far off, gradients are some 100 times those at the end, and
with .999 the sds of the global latents were still 1.5 times too large after 2,000 steps."""


def fit_amortized(
    model: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any] | None,
    encoder: Callable[..., Tensor],
    *,
    flow: str,
    num_flows: int | None,
    num_steps: int | None,
    num_particles: int | None,
    lr: float | None,
    anneal: bool | Callable[[int], float] | None,
    objective: PyroELBO | None,
    batch_size: int | None,
    validation: Any,
    patience: int | None,
    seed: int | None,
    device: torch.device | str | None,
    compile: bool | str | None,
    progress: bool | None,
    checkpoint: str | Path | None,
    checkpoint_every: float,
    ranks: Ranks = ALONE,
    optimizer: str = "adam",
    lr_schedule: str = "cosine",
    **options: Any,
) -> AmortizedFit:
    """What `fit` does where it is given an encoder; the arguments are explained there.

    Raises:
        OptionError, UnknownFlowError: an argument can't be used, or `checkpoint` belongs to another call.
        DimensionError, TargetError and its children: the model or its data can't be used; the message says why.
    """
    positive_integers_or_none(
        num_steps=num_steps, num_particles=num_particles, batch_size=batch_size, patience=patience
    )
    positive_numbers_or_none(lr=lr)
    if optimizer not in OPTIMIZERS:
        raise OptionError(f"optimizer must be one of {sorted(OPTIMIZERS)}, not {optimizer!r}.")
    if lr_schedule not in ("cosine", "constant"):
        raise OptionError(f"lr_schedule must be 'cosine' or 'constant', not {lr_schedule!r}.")
    if not callable(model):
        raise OptionError(f"with encoder= the target must be a Pyro model, not {model!r}.")
    name = "planar" if flow == "auto" else flow
    if num_flows is None:
        num_flows = lookup(name).num_flows
    seed_asked, seed = seed, ranks.same(secrets.randbits(31) if seed is None else seed)
    where = None if device is None else torch.device(device)
    if where is not None:
        for module in _modules(model, encoder):
            module.to(where)
    args = (args,) if isinstance(args, (Tensor, Dataset)) else tuple(args)
    data = Batches.of(args, kwargs or {}, where)
    num_steps = num_steps or NUM_STEPS
    if objective is None:
        if anneal is True:
            anneal = LinearAnneal(max(1, num_steps // 10))
        objective = PathELBO(num_particles or 1, anneal=anneal or None)

    saver = None
    settings = {
        "flow": name, "num_flows": num_flows, "options": dict(options), "num_steps": num_steps,
        "objective": objective if isinstance(objective, ELBO) else repr(objective),
        "batch_size": batch_size or BATCH_SIZE, "lr": lr or LR, "lr_schedule": lr_schedule, "optimizer": optimizer,
        "patience": patience or PATIENCE,
    }  # fmt: skip
    if checkpoint is not None:
        call = {
            "target": _name(model),
            "encoder": _name(encoder),
            "arguments": digest(plain({"args": args, "kwargs": kwargs or {}, "held": validation}, otherwise=_name)),
            "seed": seed_asked,
            **{key: _word(value, num_steps) for key, value in settings.items()},
        }
        saver = Checkpoint(checkpoint, checkpoint_every, call, seed=seed, ranks=ranks)
        seed = saver.seed

    start = time.perf_counter()
    store = pyro.get_param_store()
    cuda = [where.index or 0] if where is not None and where.type == "cuda" else []
    progress = progress if ranks.is_first else False
    forked = torch.random.fork_rng(devices=cuda)
    with store.scope(store.get_state()) as learnt, forked, ranks.working(), wanted(progress):
        torch.manual_seed(seed)
        guide = AmortizedGuide(model, encoder, name, num_flows, **options)
        first = data.minibatch(0, min(batch_size or BATCH_SIZE, len(data)), seed)
        guide(*first[0], **first[1])
        if validation is None:  # the posterior of global latents is that of the rows learnt from: all of them
            validation = 0 if guide.has_globals else VALIDATION
        train, held = split_rows(data, validation, seed)
        walk = Settings(
            min(batch_size or BATCH_SIZE, len(train)),
            patience or PATIENCE,
            optimizer,
            lr_schedule == "constant",
            min(CHECKED_ROWS, 0 if held is None else len(held)),
            compile if isinstance(compile, bool) else num_steps >= LEAST_STEPS,
        )
        if walk.batch_size % ranks.world:
            raise OptionError(f"a batch of {walk.batch_size} rows can't be split evenly over {ranks.world} ranks.")
        first = train.minibatch(0, walk.batch_size, seed)
        step = AmortizedStep(model, guide, objective, first, train)
        parameters = learnt_parameters(model, guide, first)
        timing = {"set_up": time.perf_counter() - start}
        record = _maximize(
            step,
            parameters,
            train,
            held,
            Schedule(num_steps, lr or LR),
            walk,
            seed=seed,
            progress=progress,
            checkpoint=saver,
            ranks=ranks,
        )
    timing["steps"] = record.seconds
    config = {
        "flow": name,
        "num_flows": num_flows,
        "options": plain(options, otherwise=str),
        "num_parameters": sum(p.numel() for p in parameters),
        "dim": guide.local.input_dim,
        "global_sites": guide.global_sites,
        "num_rows": len(train),
        "num_held_out": 0 if held is None else len(held),
        "num_steps": num_steps,
        "batch_size": walk.batch_size,
        "optimizer": optimizer,
        "lr": lr or LR,
        "lr_schedule": lr_schedule,
        "objective": repr(objective),
        "patience": walk.patience,
        "seed": seed,
        "device": str(parameters[0].device),
        "direct": step.direct,
        "recorded": record.recorded and not record.changed_at,
        "collapses": len(record.collapses),
        "peak_memory_mb": _peak(parameters[0].device),
        "stopped": record.stopped,
    }
    config, timing = ranks.same((config | {"ranks": ranks.world}, timing))
    if ranks.is_first:
        report_trouble(record)
    example = train.get(slice(2))
    return AmortizedFit(
        model, guide, parameters, learnt, example, config=config, timing=timing, history=record.history(), seed=seed
    )


def _maximize(
    step: AmortizedStep,
    parameters: Sequence[Tensor],
    train: Batches,
    held: Batches | None,
    schedule: Schedule,
    walk: Settings,
    *,
    seed: int,
    progress: bool | None,
    checkpoint: Checkpoint | None,
    ranks: Ranks = ALONE,
) -> Record:
    """Go up the objective, in place; the parameters with the best held-out score are kept.

    Args:
        step: the loss of a minibatch.
        parameters: what is learnt.
        train: what it learns from.
        held: what it is checked on, or None: then the last parameters are kept.
        schedule: number and size of steps.
        walk: the rest.
        seed: of the batches; the other random numbers come from torch's global generator, which the caller holds.
        progress: whether a bar is shown.
        checkpoint: takes the loop's state from time to time; the loop goes on where it was.
        ranks: over which each minibatch is split. Their noise is seeded by step and rank, so it is not that of one
            process; the gradient is the mean of theirs, and so that of the whole minibatch.
    """
    flat = FlatParameters(parameters)
    options = {"beta2": GLOBALS_BETA2} if walk.optimizer == "adam" and step.guide.has_globals else {}
    share = ranks.share(walk.batch_size)
    two = train.minibatch(0, walk.batch_size, seed, share), train.minibatch(1, walk.batch_size, seed, share)
    gradient = AmortizedGradient(step, flat, two, walk.record)  # before other ranks see the parameters moved aside
    descent = make_descent(flat, ranks, walk.optimizer, gradient, **options)
    record, best = Record(), flat.vector.clone()
    every = max(1, schedule.num_steps // CHECKS)
    objective: Any = step.objective
    seen = torch.zeros(2, dtype=torch.float64, device=flat.vector.device)  # the sum of the finite values, their number
    start = time.perf_counter()

    def state() -> dict[str, Any]:
        so_far = vars(record) | {"seconds": time.perf_counter() - start}
        *moments, counts = descent.state
        tensors = [flat.ordered(flat.vector), flat.ordered(best), seen, *map(flat.ordered, moments), counts]
        return {"tensors": tensors, "record": so_far, "random": torch.get_rng_state()}

    if checkpoint is not None:
        saved = checkpoint.take(LOOP)
        if saved is not None:
            with checkpoint.reading():
                record = Record(**saved["record"])
                mine = [flat.vector, best, seen, *descent.state]
                for tensor, value in zip(mine, saved["tensors"], strict=True):
                    if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):  # copy_ would broadcast and cast
                        raise ValueError(f"a state of shape {tuple(value.shape)} where {tuple(tensor.shape)} is due")
                    if tensor.shape == flat.vector.shape:  # saved in the order of the parameters
                        flat.fill(tensor, value)
                    else:
                        tensor.copy_(value)
                torch.set_rng_state(saved["random"])
                start -= record.seconds
        checkpoint.keep(LOOP, state)
    if record.changed_at:
        gradient.leave()
    record.recorded, looked = record.recorded or gradient.recorded, record.steps
    over = record.steps >= schedule.num_steps or record.stopped == "no improvement"
    show = None if progress is None else not progress
    bar = Bar(total=schedule.num_steps, initial=record.steps, desc="fit", disable=show)
    try:
        with whole_steps(checkpoint is not None) as ctrl_c, pyro.validation_enabled(False):
            for t in range(record.steps, schedule.num_steps if not over else 0):
                beta = objective.beta(t) if isinstance(objective, ELBO) else 1.0
                lr = (schedule.lr if walk.constant else schedule.lr_at(t)) * 0.5 ** len(record.collapses)
                if ranks.world > 1:
                    reseed((seed + 1) * 1_000_003 + t * ranks.world + ranks.rank, flat.vector.device)
                batch = train.minibatch(t, walk.batch_size, seed, share)
                elbo = descent.step(lr, gradient(batch, beta))
                finite = elbo.isfinite()
                seen += torch.stack([torch.where(finite, elbo, 0.0), finite]).to(seen)
                record.steps = t + 1
                if (t + 1) % every == 0 or t + 1 == schedule.num_steps:
                    if t + 1 - looked >= LOOK_EVERY or t + 1 == schedule.num_steps:
                        looked = t + 1
                        if ranks.any(not gradient.holds(batch, beta)):
                            record.changed_at = t + 1
                            gradient.leave()
                    value = math.nan if held is None else _score(step, held, walk, seed, ranks)
                    record.checks.append((t + 1, float(seen[0] / seen[1]), value, lr, beta))
                    seen.zero_()
                    record.waited += 1
                    if record.has_collapsed:
                        record.collapses.append(len(record.checks))
                        flat.vector.copy_(best)
                        descent.forget()
                    elif held is None or value > record.best:
                        record.waited, record.best, record.best_step = 0, value, t + 1
                        best.copy_(flat.vector)
                    _show(bar, record)
                    if record.waited >= walk.patience and beta == 1:
                        record.stopped = "no improvement"
                        break
                stop = bool(ctrl_c) or (t % STOP_EVERY == STOP_EVERY - 1 and ranks.stop_asked())
                if checkpoint is not None and (stop or checkpoint.due()):
                    checkpoint.save()
                if stop:
                    raise KeyboardInterrupt
            if checkpoint is not None and not over:
                checkpoint.save()
    except KeyboardInterrupt:
        record.stopped = "interrupted"
        if not record.checks:
            best.copy_(flat.vector)
    finally:
        if checkpoint is not None:
            checkpoint.keep(LOOP, None)
        bar.close()
        with torch.no_grad():
            flat.move(torch.empty_like(best), torch.empty_like(best))  # others may still read what ranks have in common
            flat.vector.copy_(best)
        flat.release()
    record.skipped_steps = descent.skipped
    record.seconds = time.perf_counter() - start
    return record


@torch.no_grad()
def _score(step: AmortizedStep, held: Batches, walk: Settings, seed: int, ranks: Ranks) -> float:
    """The mean ELBO of held-out rows, from the same random numbers at every check; -inf where it is not finite.

    Each rank scores its share of the rows.
    """
    rows, total, size = ranks.share(walk.checked), 0.0, 5 * walk.batch_size
    with kept(seed + ranks.rank):
        for first in range(rows.start, rows.stop, size):
            part = slice(first, min(first + size, rows.stop))
            total += float(step(held.get(part)).elbo) * (part.stop - part.start)
    total = float(ranks.sum_(torch.tensor(total, dtype=torch.float64)))
    return total / walk.checked if math.isfinite(total) else -math.inf


def _show(bar: Any, record: Record) -> None:
    bar.update(record.steps - bar.n)
    if not bar.disable:
        _, train, validation, *_ = record.checks[-1]
        bar.set_postfix_str(f"ELBO {train:.2f}, held out {validation:.2f}", refresh=False)


def _modules(*things: Any) -> list[nn.Module]:
    """The modules among them, or that they are methods of."""
    owners = (t if isinstance(t, nn.Module) else getattr(t, "__self__", None) for t in things)
    return [m for m in owners if isinstance(m, nn.Module)]


def _peak(device: torch.device) -> float | None:
    """The most memory that was in use, in MB: the device's, or this process's so far; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:  # ru_maxrss begins at what the parent process held when it started this one; Linux tells this one's own
        told = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"))
        if told:
            return int(told[1]) * 1024 / 1e6
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)
