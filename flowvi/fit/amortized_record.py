"""How an amortized fit walks, and what it saw: the settings of its loop, its record, and the trouble it had."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch

from flowvi.amortized_fit import AmortizedHistory
from flowvi.errors import InterruptedWarning, NumericalWarning

__all__ = ["Record", "Settings", "report_trouble"]

COLLAPSE = 5.0
"""A fit whose ELBO has fallen by so many times all it had gained, and its own size, goes back to its best and on from
there with half the step: what an exploded network learns again is not worth the wait."""


@dataclass(frozen=True)
class Settings:
    """How the loop walks, beside its `Schedule`.

    Attributes:
        batch_size: rows of a step.
        patience: checks without improvement that end it.
        optimizer: one of `OPTIMIZERS`.
        constant: whether the step size stays as it is.
        checked: held-out rows of a check.
        record: whether a step is recorded, where it can be.
    """

    batch_size: int
    patience: int
    optimizer: str
    constant: bool
    checked: int
    record: bool


@dataclass
class Record:
    """What the loop saw: grows while it runs."""

    checks: list[tuple[float, ...]] = field(default_factory=list)  # step, train, validation, lr, beta
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0
    steps: int = 0
    skipped_steps: int = 0
    collapses: list[int] = field(default_factory=list)
    """The number of checks made by each collapse."""
    seconds: float = 0.0
    stopped: str = "finished"
    recorded: bool = False
    """Whether the steps were those of a recording."""
    changed_at: int = 0
    """The step at which the recording was found to be one of something else, and left; 0 where it was not."""

    @property
    def has_collapsed(self) -> bool:
        """Whether the last check is far below the best one since the last collapse, of those not annealed."""
        since = self.checks[self.collapses[-1] if self.collapses else 0 :]
        values = [train if math.isnan(held) else held for _, train, held, _, beta in since if beta == 1]
        finite = [value for value in values if math.isfinite(value)]
        if self.checks[-1][-1] != 1 or not finite:  # annealed, or nothing to go back to
            return False
        best = max(finite)
        return not best - values[-1] <= COLLAPSE * max(best - finite[0], abs(best))

    def history(self) -> AmortizedHistory:
        """The same, for the user."""
        step, train, held, lr, beta = torch.tensor(self.checks, dtype=torch.float64).reshape(-1, 5).unbind(-1)
        return AmortizedHistory(step.long(), train, held, lr, beta, self.best_step, self.skipped_steps)


def report_trouble(record: Record) -> None:
    """Warn of what went wrong, at the call of `flowvi.fit`."""
    if record.stopped == "interrupted":
        warnings.warn(
            InterruptedWarning(f"stopped by Ctrl-C after {record.steps} steps; this is the best so far."), stacklevel=4
        )
    if times := len(record.collapses):
        warnings.warn(
            NumericalWarning(
                f"the ELBO collapsed {times} time{'s' if times > 1 else ''}; the fit went back to its best "
                f"and on with half the step size. A smaller lr saves the steps that this cost."
            ),
            stacklevel=4,
        )
    if record.changed_at:
        warnings.warn(
            NumericalWarning(
                f"model or encoder computed something else in step {record.changed_at} than where the fit had recorded "
                f"them, and earlier steps may have been wrong: where their Python code changes in time, pass "
                f"compile=False."
            ),
            stacklevel=4,
        )
    if record.skipped_steps:
        warnings.warn(
            NumericalWarning(
                f"{record.skipped_steps} of {record.steps} steps were skipped because the ELBO or its gradient was not "
                f"finite: look for outliers in the data, or lower lr."
            ),
            stacklevel=4,
        )
