"""`fit(model, args, encoder=...)`: a model and its amortized guide, learnt together by minibatches."""

from __future__ import annotations

import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
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
from flowvi.fit.amortized_record import Settings, report_trouble
from flowvi.fit.amortized_step import AmortizedStep, learnt_parameters
from flowvi.fit.ascent import Ascent
from flowvi.fit.batches import Batches, split_rows
from flowvi.fit.checkpoint import Checkpoint, _name, _word
from flowvi.fit.descent import OPTIMIZERS
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.fit.engine import Schedule
from flowvi.objectives import ELBO, LinearAnneal, PathELBO
from flowvi.progress import wanted
from flowvi.transforms.registry import lookup

__all__ = ["fit_amortized"]

NUM_STEPS = 20_000
BATCH_SIZE = 100
LR = 1e-3
VALIDATION = 0.05
PATIENCE = 20
CHECKED_ROWS = 2000  # held-out rows at most for one check
LEAST_STEPS = 1000  # that repay the second that it costs to record one


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
        schedule = Schedule(num_steps, lr or LR)
        ascent = Ascent(step, parameters, train, held, schedule, walk, seed=seed, checkpoint=saver, ranks=ranks)
        record = ascent.run(progress)
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
