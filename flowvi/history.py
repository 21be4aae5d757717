"""What a fit did, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["History"]


@dataclass(frozen=True)
class History:
    """The trace of a fit, one entry for every recorded step.

    Attributes:
        step: Step numbers (T,).
        elbo: The ELBO estimate from each step's particles, at beta = 1 (T,), in nats; NaN where none was finite.
        beta: The annealing temperature at these steps (T,); 1 is the target itself.
        skipped_steps: Steps that were not taken because the loss or a gradient was not finite.
        nonfinite_particles: Particles that were left out because their log density was not finite.
    """

    step: Tensor
    elbo: Tensor
    beta: Tensor
    skipped_steps: int = 0
    nonfinite_particles: int = 0
