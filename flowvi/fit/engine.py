"""The loop: Adam on one flat parameter vector, with annealing, clipping, and an account of what went wrong."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.checkpoint import Checkpoint, whole_steps
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.fit.replay import make_update
from flowvi.fit.steps import make_step
from flowvi.flow import Flow
from flowvi.objectives import ELBO, Target
from flowvi.progress import Bar

WARM_UP = 50
"""Steps over which the step size grows from 0: Adam's second moment is noise before that."""

STOP_EVERY = 20
"""Steps after which ranks agree whether Ctrl-C reached one of them."""

LOOP = "loop"
"""The part of a checkpoint that is the loop's."""


@dataclass(frozen=True)
class Schedule:
    """How the loop walks.

    Attributes:
        num_steps: steps of Adam.
        lr: the largest step size; it warms up over 50 steps and falls to 0 as a cosine.
    """

    num_steps: int
    lr: float

    def lr_at(self, step: int) -> float:
        """The step size of a step, counted from 0."""
        warm = min(1.0, (step + 1) / WARM_UP)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))


@dataclass
class Record:
    """What the loop saw: grows while it runs.

    Attributes:
        elbo: the ELBO estimate of each step at beta = 1, (T,).
        beta: the annealing of each step.
        skipped_steps: steps not taken because the gradient was not finite.
        nonfinite_particles: particles left out because log p, log q or a gradient was not finite.
        seconds: wall-clock time in the loop.
        stopped: why it ended: "finished" or "interrupted".
        fused: whether the steps had no tape.
        recorded: whether they were replayed from a recording (CUDA graphs).
    """

    elbo: Tensor
    beta: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    nonfinite_particles: int = 0
    seconds: float = 0.0
    stopped: str = "finished"
    fused: bool = False
    recorded: bool = False

    def extend(self, later: Record) -> None:
        """Add what another loop saw after this one."""
        self.elbo = torch.cat([self.elbo, later.elbo])
        self.beta += later.beta
        self.skipped_steps += later.skipped_steps
        self.nonfinite_particles += later.nonfinite_particles
        self.seconds += later.seconds
        self.fused, self.recorded = later.fused, later.recorded

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        return vars(self) | {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """The record that `to_dict` gave."""
        return cls(**data | {"beta": data["beta"].tolist()})


def optimize(
    flow: Flow,
    target: Target,
    objective: ELBO,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    progress: bool | None = None,
    description: str = "fit",
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> Record:
    """Maximize the objective over the flow's parameters, in place.

    A step whose gradient is not finite is not taken, and counted. Ctrl-C ends the loop and keeps what it has; with
    a checkpoint, after the present step.

    Args:
        flow: q; its parameters are changed.
        target: log p and its gradient.
        objective: the estimator.
        schedule: number and size of steps; that of the checkpoint, `saved_schedule`, where it is in this loop.
        generator: where the randomness comes from.
        progress: whether a bar is shown; None shows it in a terminal or notebook.
        description: the bar's label.
        checkpoint: takes the loop's state from time to time; the loop goes on where it was.
        ranks: over which the particles are split; every rank's flow ends with the same bits.
    """
    saved = None if checkpoint is None else checkpoint.take(LOOP)
    if checkpoint is not None and saved is not None:
        with checkpoint.reading():
            flow.load_state_dict(saved["flow"])
    flat = FlatParameters(flow.module)
    ranks.broadcast_(flat.vector)
    adam = FlatAdam(flat.vector, flat.grad)
    one_step = make_step(flow, target, objective, flat, ranks)
    update = make_update(one_step, adam, generator)
    elbo = torch.full((schedule.num_steps,), math.nan, dtype=torch.float64, device=flat.vector.device)
    num_valid = torch.full_like(elbo, objective.num_particles)
    record = Record(elbo=elbo, fused=one_step.fused, recorded=update.recorded)
    start = time.perf_counter()
    first = 0

    def state() -> dict[str, Any]:
        taken = len(record.beta)
        return {
            "flow": flow.state_dict(),
            "adam": [adam.mean, adam.square, adam.state],
            "elbo": elbo[:taken],
            "num_valid": num_valid[:taken],
            "beta": torch.tensor(record.beta, dtype=torch.float64),
            "num_steps": schedule.num_steps,
            "lr": schedule.lr,
            "seconds": time.perf_counter() - start,
        }

    if checkpoint is not None:
        if saved is not None:
            with checkpoint.reading():
                record.beta = saved["beta"].tolist()
                first = len(record.beta)
                mine = [adam.mean, adam.square, adam.state, elbo[:first], num_valid[:first]]
                for tensor, value in zip(mine, [*saved["adam"], saved["elbo"], saved["num_valid"]], strict=True):
                    if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):  # copy_ would broadcast and cast
                        raise ValueError(f"a state of shape {tuple(value.shape)} where {tuple(tensor.shape)} is due")
                    tensor.copy_(value)
                start -= saved["seconds"]
        checkpoint.keep(LOOP, state)
    show = None if progress is None else not progress
    bar = Bar(total=schedule.num_steps, initial=first, desc=description, disable=show)
    try:
        if checkpoint is not None and saved is None:
            checkpoint.save()
        with whole_steps(checkpoint is not None) as ctrl_c:
            for step in range(first, schedule.num_steps):
                beta = objective.beta(step)
                num_valid[step], elbo[step] = update(beta, schedule.lr_at(step))
                record.beta.append(beta)
                if step % 20 == 19 and not bar.disable:
                    bar.update(20)
                    mean = float(elbo[max(0, step - 99) : step + 1].nanmean())
                    bar.set_postfix_str(f"ELBO {mean:.2f}", refresh=False)
                stop = bool(ctrl_c) or (step % STOP_EVERY == STOP_EVERY - 1 and ranks.stop_asked())
                if checkpoint is not None and (stop or checkpoint.due()):
                    checkpoint.save()
                if stop:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        record.stopped = "interrupted"
    finally:
        if checkpoint is not None:
            checkpoint.keep(LOOP, None)
        bar.close()
        flat.release()
    ranks.broadcast_(*flow.parameters())  # processors of two kinds round differently
    taken = len(record.beta)
    record.elbo = elbo[:taken].cpu()
    record.nonfinite_particles = int((objective.num_particles - num_valid[:taken]).sum())
    record.skipped_steps = adam.skipped
    record.seconds = time.perf_counter() - start
    return record


def saved_schedule(checkpoint: Checkpoint | None) -> Schedule | None:
    """The schedule of the loop that a checkpoint goes on with, where it is in one."""
    if checkpoint is None:
        return None
    with checkpoint.reading():
        saved = checkpoint.look(LOOP)
        return None if saved is None else Schedule(int(saved["num_steps"]), float(saved["lr"]))


def seconds_per_step(
    flow: Flow,
    target: Target,
    objective: ELBO,
    *,
    generator: torch.Generator,
    num_steps: int = 10,
    ranks: Ranks = ALONE,
) -> float:
    """What a step costs here (on rank 0, of several), measured on a few that are not taken."""
    flat = FlatParameters(flow.module)
    times = []
    try:
        one_step = make_step(flow, target, objective, flat, ranks)
        for _ in range(num_steps):
            start = time.perf_counter()
            one_step(1.0, generator)
            if flat.vector.device.type == "cuda":
                torch.cuda.synchronize(flat.vector.device)  # else it would be what a launch costs
            times.append(time.perf_counter() - start)
    finally:
        flat.release()
    return ranks.same(sorted(times)[num_steps // 2])
