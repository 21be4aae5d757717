"""The loop of an amortized fit: steps along the gradients of minibatches, checks of held-out rows, and what is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from flowvi.fit.adam import FlatParameters
from flowvi.fit.amortized_gradient import AmortizedGradient
from flowvi.fit.amortized_record import Record, Settings
from flowvi.fit.amortized_step import AmortizedStep
from flowvi.fit.batches import Batches, Call
from flowvi.fit.checkpoint import Checkpoint, whole_steps
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.fit.engine import STOP_EVERY, Schedule
from flowvi.fit.factored_descent import make_descent
from flowvi.fit.gradient import LOOK_EVERY
from flowvi.objectives import ELBO
from flowvi.progress import Bar
from flowvi.random_state import kept, reseed

__all__ = ["Ascent"]

CHECKS = 100  # of the held-out rows, in the course of a fit
LOOP = "amortized"
GLOBALS_BETA2 = 0.99
"""Of Adam where there are global latents: while they are far off, gradients are some 100 times those at the end, and
with .999 the sds of the global latents were still 1.5 times too large after 2,000 steps."""


class Ascent:
    """Goes up an objective, in place; the parameters with the best held-out score are kept.

    Args:
        step: the loss of a minibatch.
        parameters: what is learnt.
        train: what it learns from.
        held: what it is checked on, or None: then the last parameters are kept.
        schedule: number and size of steps.
        walk: the rest.
        seed: of the batches; the other random numbers come from torch's global generator, which the caller holds.
        checkpoint: takes the loop's state from time to time; the loop goes on where it was.
        ranks: over which each minibatch is split. Their noise is seeded by step and rank, so it is not that of one
            process; the gradient is the mean of theirs, and so that of the whole minibatch.

    Attributes:
        record: what was seen so far.
    """

    def __init__(
        self,
        step: AmortizedStep,
        parameters: Sequence[Tensor],
        train: Batches,
        held: Batches | None,
        schedule: Schedule,
        walk: Settings,
        *,
        seed: int,
        checkpoint: Checkpoint | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.step, self.train, self.held, self.schedule, self.walk = step, train, held, schedule, walk
        self.seed, self.checkpoint, self.ranks = seed, checkpoint, ranks
        self.flat = FlatParameters(parameters)
        self._share = ranks.share(walk.batch_size)
        two = self._minibatch(0), self._minibatch(1)
        self._gradient = AmortizedGradient(step, self.flat, two, walk.record)  # before ranks see parameters move aside
        options = {"beta2": GLOBALS_BETA2} if walk.optimizer == "adam" and step.guide.has_globals else {}
        self._descent = make_descent(self.flat, ranks, walk.optimizer, self._gradient, **options)
        self.record, self._best = Record(), self.flat.vector.clone()
        self._seen = torch.zeros(2, dtype=torch.float64, device=self._best.device)  # sum and number of finite values
        self._start = time.perf_counter()
        if checkpoint is not None:
            saved = checkpoint.take(LOOP)
            if saved is not None:
                with checkpoint.reading():
                    self._restore(saved)
            checkpoint.keep(LOOP, self._state)
        if self.record.changed_at:
            self._gradient.leave()
        self.record.recorded = self.record.recorded or self._gradient.recorded
        self._looked = self.record.steps

    def run(self, progress: bool | None) -> Record:
        """Take the steps that are left, and release the parameters.

        Args:
            progress: whether a bar is shown; None shows it in a terminal or notebook.
        """
        record, total, checkpoint = self.record, self.schedule.num_steps, self.checkpoint
        every = max(1, total // CHECKS)
        over = record.steps >= total or record.stopped == "no improvement"
        bar = Bar(total=total, initial=record.steps, desc="fit", disable=None if progress is None else not progress)
        try:
            with whole_steps(checkpoint is not None) as ctrl_c, pyro.validation_enabled(False):
                for t in range(record.steps, 0 if over else total):
                    lr, beta = self._lr(t), self._beta(t)
                    batch = self._minibatch(t)
                    self._take(t, batch, lr, beta)
                    if (t + 1) % every == 0 or t + 1 == total:
                        self._check(batch, lr, beta)
                        _show(bar, record)
                        if record.waited >= self.walk.patience and beta == 1:
                            record.stopped = "no improvement"
                            break
                    stop = bool(ctrl_c) or (t % STOP_EVERY == STOP_EVERY - 1 and self.ranks.stop_asked())
                    if checkpoint is not None and (stop or checkpoint.due()):
                        checkpoint.save()
                    if stop:
                        raise KeyboardInterrupt
                if checkpoint is not None and not over:
                    checkpoint.save()
        except KeyboardInterrupt:
            record.stopped = "interrupted"
            if not record.checks:
                self._best.copy_(self.flat.vector)
        finally:
            if checkpoint is not None:
                checkpoint.keep(LOOP, None)
            bar.close()
            self._release()
        record.skipped_steps = self._descent.skipped
        record.seconds = time.perf_counter() - self._start
        return record

    def _minibatch(self, t: int) -> Call:
        """This rank's share of the rows of a step."""
        return self.train.minibatch(t, self.walk.batch_size, self.seed, self._share)

    def _lr(self, t: int) -> float:
        lr = self.schedule.lr if self.walk.constant else self.schedule.lr_at(t)
        return lr * 0.5 ** len(self.record.collapses)

    def _beta(self, t: int) -> float:
        objective: Any = self.step.objective
        return objective.beta(t) if isinstance(objective, ELBO) else 1.0

    def _take(self, t: int, batch: Call, lr: float, beta: float) -> None:
        """Take a step."""
        if self.ranks.world > 1:
            each = t * self.ranks.world + self.ranks.rank
            reseed((self.seed + 1) * 1_000_003 + each, self.flat.vector.device)
        elbo = self._descent.step(lr, self._gradient(batch, beta))
        finite = elbo.isfinite()
        self._seen += torch.stack([torch.where(finite, elbo, 0.0), finite]).to(self._seen)
        self.record.steps = t + 1

    def _check(self, batch: Call, lr: float, beta: float) -> None:
        """Score the held-out rows; keep the parameters if they are the best, go back to those if all was lost."""
        record, steps = self.record, self.record.steps
        if steps - self._looked >= LOOK_EVERY or steps == self.schedule.num_steps:
            self._looked = steps
            if self.ranks.any(not self._gradient.holds(batch, beta)):
                record.changed_at = steps
                self._gradient.leave()
        value = math.nan if self.held is None else self._score(self.held)
        record.checks.append((steps, float(self._seen[0] / self._seen[1]), value, lr, beta))
        self._seen.zero_()
        record.waited += 1
        if record.has_collapsed:
            record.collapses.append(len(record.checks))
            self.flat.vector.copy_(self._best)
            self._descent.forget()
        elif self.held is None or value > record.best:
            record.waited, record.best, record.best_step = 0, value, steps
            self._best.copy_(self.flat.vector)

    @torch.no_grad()
    def _score(self, held: Batches) -> float:
        """The mean ELBO of held-out rows, from the same random numbers at every check; -inf where it is not finite.

        Each rank scores its share of the rows.
        """
        rows, total, size = self.ranks.share(self.walk.checked), 0.0, 5 * self.walk.batch_size
        with kept(self.seed + self.ranks.rank):
            for first in range(rows.start, rows.stop, size):
                part = slice(first, min(first + size, rows.stop))
                total += float(self.step(held.get(part)).elbo) * (part.stop - part.start)
        total = float(self.ranks.sum_(torch.tensor(total, dtype=torch.float64)))
        return total / self.walk.checked if math.isfinite(total) else -math.inf

    def _tensors(self) -> list[Tensor]:
        """All that a checkpoint holds, beside the record."""
        return [self.flat.vector, self._best, self._seen, *self._descent.state]

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds. Vectors are in the order of the parameters, however those lie in memory."""
        like = self.flat.vector.shape
        tensors = [self.flat.ordered(tensor) if tensor.shape == like else tensor for tensor in self._tensors()]
        so_far = vars(self.record) | {"seconds": time.perf_counter() - self._start}
        return {"tensors": tensors, "record": so_far, "random": torch.get_rng_state()}

    def _restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `_state` gave."""
        self.record = Record(**saved["record"])
        for tensor, value in zip(self._tensors(), saved["tensors"], strict=True):
            if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):  # copy_ would broadcast and cast
                raise ValueError(f"a state of shape {tuple(value.shape)} where {tuple(tensor.shape)} is due")
            if tensor.shape == self.flat.vector.shape:
                self.flat.fill(tensor, value)
            else:
                tensor.copy_(value)
        torch.set_rng_state(saved["random"])
        self._start -= self.record.seconds

    def _release(self) -> None:
        """Leave the best parameters in memory of their own."""
        with torch.no_grad():
            best = self._best
            self.flat.move(torch.empty_like(best), torch.empty_like(best))  # others may still read what ranks share
            self.flat.vector.copy_(best)
        self.flat.release()


def _show(bar: Any, record: Record) -> None:
    bar.update(record.steps - bar.n)
    if not bar.disable:
        _, train, validation, *_ = record.checks[-1]
        bar.set_postfix_str(f"ELBO {train:.2f}, held out {validation:.2f}", refresh=False)
