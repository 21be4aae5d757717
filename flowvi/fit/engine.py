"""The loop: Adam on one flat parameter vector, with annealing, clipping, and an account of what went wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowvi.flow import Flow
from flowvi.objectives import ELBO, Target

WARM_UP = 50
"""Steps over which the step size grows from 0: Adam's second moment is noise before that."""

CLIP = 10.0
"""A gradient longer than this many times its running length is cut to it: rare, and a sign of a bad particle."""


SMALL = 1_000_000
"""Work per step, S D K, below which a second thread costs more than it brings (measured on two cores)."""


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
    """

    elbo: Tensor
    beta: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    nonfinite_particles: int = 0
    seconds: float = 0.0
    stopped: str = "finished"


class FlatParameters:
    """The parameters of a module as one vector; the module's own become views of it while this is in use.

    One vector means one fused optimizer step and one norm, however many parameters there are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        with torch.no_grad():
            self.vector = torch.cat([p.reshape(-1) for p in self.parameters])
            self.grad = torch.zeros_like(self.vector)
            self._saved_grads = [p.grad for p in self.parameters]
            for p, value, grad in zip(self.parameters, *map(self._split, (self.vector, self.grad)), strict=True):
                p.data, p.grad = value, grad
        self.vector.grad = self.grad

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def release(self) -> None:
        """Give every parameter its own storage again, with its present value."""
        with torch.no_grad():
            for p, grad in zip(self.parameters, self._saved_grads, strict=True):
                p.data, p.grad = p.data.clone(), grad
                p.copy_(p)  # a new version, so that no transform's cache is taken for fresh


def optimize(
    flow: Flow,
    target: Target,
    objective: ELBO,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    progress: bool | None = None,
    description: str = "fit",
) -> Record:
    """Maximize the objective over the flow's parameters, in place.

    A step whose gradient is not finite is not taken, and counted. Ctrl-C ends the loop and keeps what it has.

    Args:
        flow: q; its parameters are changed.
        target: log p and its gradient.
        objective: the estimator.
        schedule: number and size of steps.
        generator: where the randomness comes from.
        progress: whether a bar is shown; None shows it in a terminal or notebook.
        description: the bar's label.
    """
    flat = FlatParameters(flow.module)
    adam = torch.optim.Adam([flat.vector], lr=schedule.lr, fused=True)
    group = adam.param_groups[0]
    record = Record(elbo=torch.full((schedule.num_steps,), math.nan, dtype=torch.float64))
    typical: float | None = None  # the running length of the gradient
    start = time.perf_counter()
    step = 0
    bar = tqdm(total=schedule.num_steps, desc=description, disable=None if progress is None else not progress)
    try:
        for step in range(schedule.num_steps):
            flat.grad.zero_()
            beta = objective.beta(step)
            seen = objective.backward(flow, target, beta=beta, generator=generator)
            num_valid = int(seen.valid.sum())
            record.nonfinite_particles += seen.valid.numel() - num_valid
            record.elbo[step] = _mean_elbo(seen.log_p, seen.log_q, seen.valid, num_valid)
            record.beta.append(beta)
            norm = float(torch.linalg.vector_norm(flat.grad))
            if num_valid == 0 or not math.isfinite(norm):
                record.skipped_steps += 1
            else:
                typical = norm if typical is None else typical
                if norm > CLIP * typical:
                    flat.grad.mul_(CLIP * typical / norm)
                    norm = CLIP * typical
                typical = 0.98 * typical + 0.02 * norm
                group["lr"] = schedule.lr_at(step)
                adam.step()
            if step % 20 == 19:
                bar.update(20)
                _show(bar, record, step)
    except KeyboardInterrupt:
        record.stopped = "interrupted"
    finally:
        bar.close()
        flat.release()
    record.elbo = record.elbo[: len(record.beta)]
    record.seconds = time.perf_counter() - start
    return record


@contextmanager
def one_thread_if_small(size: int) -> Iterator[None]:
    """One torch thread inside, where `size` = S D K numbers are too few to repay waking more of them."""
    before = torch.get_num_threads()
    if size < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_per_step(
    flow: Flow, target: Target, objective: ELBO, *, generator: torch.Generator, num_steps: int = 10
) -> float:
    """What a step costs here, measured on a few that are not taken."""
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        objective.backward(flow, target, generator=generator)
        times.append(time.perf_counter() - start)
    for p in flow.parameters():
        p.grad = None
    return sorted(times)[num_steps // 2]


def _mean_elbo(log_p: Tensor, log_q: Tensor, valid: Tensor, num_valid: int) -> float:
    if num_valid == 0:
        return math.nan
    return float(torch.where(valid, log_p - log_q, 0.0).sum()) / num_valid


def _show(bar: tqdm, record: Record, step: int) -> None:
    if not bar.disable:
        smooth = record.elbo[max(0, step - 99) : step + 1].nanmean()
        bar.set_postfix_str(f"ELBO {float(smooth):.2f}", refresh=False)
