"""What a user holds after maximum likelihood: draws, log densities in nats, scores of new data, a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.checks import as_seed, as_tensor, whole_numbers
from flowvi.conditional_flow import ConditionalFlow, flow_at
from flowvi.errors import DimensionError, OptionError
from flowvi.flow import Flow

__all__ = ["DensityFit", "DensityHistory", "MeanLogProb"]

_CHUNK_ELEMENTS = 2**20  # of x at a time, however many rows are asked for


class MeanLogProb(NamedTuple):
    """The mean of log q(x) over rows, in nats, and its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f} nats"


@dataclass(frozen=True)
class DensityHistory:
    """The trace of a fit, one entry for every check on the held-out rows.

    Attributes:
        step: steps taken so far (T,).
        train: mean log-likelihood of the minibatches since the last check (T,), in nats.
        validation: mean log-likelihood of the held-out rows (T,), in nats; NaN where none were held out.
        lr: the step size (T,).
        best_step: the step whose parameters were kept.
        skipped_steps: steps that were not taken because the loss or its gradient was not finite.
    """

    step: Tensor
    train: Tensor
    validation: Tensor
    lr: Tensor
    best_step: int
    skipped_steps: int = 0


class DensityFit:
    """A density q(x), or q(x | context), fitted to data by maximum likelihood.

    Draws come from the fit's own generator; torch's global one is neither read nor changed.

    Args:
        flow: q, in the data's units: a `Flow`, or a `ConditionalFlow` where there is a context.
        config: what was decided, plain data.
        timing: seconds by phase.
        history: the trace of the fit.
        held_out: the rows of the data (V,) that were held out and not trained on; None where they were given.
        seed: the fit's seed.

    Attributes:
        flow: as above; its `log_prob` has a gradient, and it goes wherever Pyro takes a distribution.
        config: as above.
        timing: as above.
        history: as above.
        held_out: as above.
        seed: as above.
    """

    def __init__(
        self,
        flow: Flow | ConditionalFlow,
        *,
        config: Mapping[str, Any],
        timing: Mapping[str, float],
        history: DensityHistory,
        held_out: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.flow = flow
        self.config = dict(config)
        self.timing = dict(timing)
        self.history = history
        self.held_out = held_out
        self.seed = seed
        self._stream = torch.Generator(flow.device).manual_seed(seed + 1)

    @property
    def dim(self) -> int:
        """D."""
        return self.flow.dim

    @property
    def context_dim(self) -> int:
        """C; 0 where there is no context."""
        return self.flow.context_dim if isinstance(self.flow, ConditionalFlow) else 0

    @torch.no_grad()
    def sample(self, num_samples: int = 1000, context: Any = None, *, seed: int | None = None) -> Tensor:
        """Draws x ~ q.

        Args:
            num_samples: n.
            context: (..., C), for a conditional density: n draws at each.
            seed: makes the call reproducible by itself; None goes on with the fit's own sequence.

        Returns:
            (n, D); or (..., n, D) for contexts (..., C).

        Raises:
            OptionError: n is not a non-negative integer, or a context is missing or too many.
            DimensionError: the context's last dimension is not C.
        """
        whole_numbers(num_samples=num_samples)
        seed = as_seed(seed)
        generator = self._stream
        if seed is not None:
            generator = torch.Generator(self.flow.device).manual_seed(seed)
        context = self._as_context(context)
        batch = () if context is None else context.shape[:-1]
        flow = self._at(context)
        rows = max(1, _CHUNK_ELEMENTS // (self.dim * max(1, math.prod(batch))))
        counts = [min(rows, num_samples - start) for start in range(0, num_samples, rows)]
        draws = [flow.rsample_and_log_prob(n, generator=generator)[0] for n in counts]
        empty = torch.empty(0, *batch, self.dim, dtype=self.flow.dtype, device=self.flow.device)
        return torch.cat([empty, *draws]).movedim(0, -2)

    @torch.no_grad()
    def log_prob(self, x: Any, context: Any = None) -> Tensor:
        """Log q(x), or log q(x | context), exact and in nats; without a graph (`flow.log_prob` has one).

        Args:
            x: (..., D).
            context: (..., C), whose batch shape broadcasts with that of x.

        Returns:
            (...); NaN where x is NaN, -inf where it is infinite.

        Raises:
            DimensionError: a shape doesn't fit.
            OptionError: a context is missing or too many, or an argument is no tensor of numbers.
        """
        x = as_tensor("x", x, self.flow.dtype, self.flow.device)
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise DimensionError(
                f"x has shape {tuple(x.shape)}; its last dimension must be the data's, D = {self.dim}."
            )
        context = self._as_context(context)
        batch = x.shape[:-1]
        if context is not None:
            try:
                batch = torch.broadcast_shapes(batch, context.shape[:-1])
            except RuntimeError as error:
                raise DimensionError(
                    f"x of shape {tuple(x.shape)} and context of shape {tuple(context.shape)} don't broadcast: "
                    f"give one context for each x, or one for all."
                ) from error
            context = context.expand(*batch, self.context_dim).reshape(-1, self.context_dim)
        x = x.expand(*batch, self.dim).reshape(-1, self.dim)
        finite = x.isfinite().all(-1)
        safe = torch.where(finite[:, None], x, 0.0)
        parts = [self._at(None if context is None else context[s]).log_prob(safe[s]) for s in self._chunks(len(x))]
        log_q = torch.where(finite, torch.cat([x.new_empty(0), *parts]), -math.inf)
        return torch.where(x.isnan().any(-1), math.nan, log_q).reshape(batch)

    def log_likelihood(self, x: Any, context: Any = None) -> MeanLogProb:
        """The mean of log q over the rows of x (N, D), and its standard error: the score of held-out data, in nats.

        Args:
            x: (N, D), N at least 2.
            context: (N, C), for a conditional density.

        Returns:
            `mean` and `se`, numbers.

        Raises:
            DimensionError, OptionError: as for `log_prob`.
        """
        log_q = self.log_prob(x, context).double().reshape(-1)
        if len(log_q) < 2:
            raise DimensionError("a standard error needs at least 2 rows: use log_prob for one.")
        return MeanLogProb(float(log_q.mean()), float(log_q.std() / math.sqrt(len(log_q))))

    def save(self, path: str | Path) -> None:
        """Writes the fit to a file of plain data that `flowvi.load_density(path)` reads.

        Args:
            path: the file; an older one is replaced, and only when the new one is complete.

        Raises:
            OptionError: the flow can't be built again from its name.
        """
        from flowvi.density_storage import save_density

        save_density(self, path)

    def _at(self, context: Tensor | None) -> Flow:
        return flow_at(self.flow, context)

    def _as_context(self, context: Any) -> Any:
        if (context is not None) != isinstance(self.flow, ConditionalFlow):
            said = "was fitted without a context: leave it away" if context is not None else "needs a context (..., C)"
            raise OptionError(f"this density {said}.")
        if context is None:
            return None
        context = as_tensor("context", context, self.flow.dtype, self.flow.device)
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise DimensionError(
                f"context has shape {tuple(context.shape)}; its last dimension must be C = {self.context_dim}."
            )
        return context

    def _chunks(self, num: int) -> Iterator[slice]:
        rows = max(64, min(16_384, _CHUNK_ELEMENTS // self.dim))
        return (slice(start, start + rows) for start in range(0, num, rows))

    def __repr__(self) -> str:
        config = self.config
        given = f" given C = {self.context_dim}" if self.context_dim else ""
        words = [f"<DensityFit of D = {self.dim}{given}: {config['flow']} K = {config['num_flows']}"]
        words.append(f"{config['num_parameters']} parameters, {config['num_rows']} rows")
        words.append(f"step {self.history.best_step} of {config['num_steps']} kept")
        if config.get("validation_mean") is not None:
            score = MeanLogProb(config["validation_mean"], config["validation_se"])
            words.append(f"held out {score}")
        if self.timing:
            words.append(f"{sum(self.timing.values()):.1f} s")
        return ", ".join(words) + ">"
