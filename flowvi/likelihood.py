"""Log-likelihoods of a model with local latents, one for each data point, by importance sampling from its guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowvi.checks import functions, instances, positive_integers, positive_integers_or_none
from flowvi.errors import OptionError, TargetError
from flowvi.importance import IWELBO

__all__ = ["LogLikelihood", "log_likelihood"]


@dataclass(frozen=True)
class LogLikelihood:
    """Importance-sampled log p(x_n), with two errors: that of the samples, and that of having only N data points.

    Attributes:
        values: log (1/S) sum_s w_ns, (N,), float64; too low by about half of `errors` squared.
        errors: the standard error of each by its samples (delta method), (N,).
        num_importance_samples: S.
        elbos: the mean log weight of the same samples, (N,): an estimate of the ELBO of each data point without bias.
    """

    values: Tensor
    errors: Tensor
    num_importance_samples: int
    elbos: Tensor

    @property
    def mean(self) -> float:
        """The mean over the data points."""
        return float(self.values.mean())

    @property
    def monte_carlo_error(self) -> float:
        """The standard error of the mean for these very data points: that of the importance samples."""
        return float(self.errors.square().sum().sqrt()) / len(self.values)

    @property
    def standard_error(self) -> float:
        """The standard error of the mean as that of all data that these are a sample of; 0 for one point."""
        n = len(self.values)
        return float(self.values.std()) / math.sqrt(n) if n > 1 else 0.0

    def __str__(self) -> str:
        return (
            f"log p(x) = {self.mean:.3f} ± {self.standard_error:.3f} (data) ± {self.monte_carlo_error:.3f} (samples): "
            f"mean of {len(self.values)} data points, {self.num_importance_samples} importance samples each"
        )


@torch.no_grad()
def log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_importance_samples: int = 200,
    batch_size: int = 100,
    chunk_size: int | None = None,
    plate: str | None = None,
    **kwargs: Any,
) -> LogLikelihood:
    """Log p(x_n) of each data point by importance sampling from the guide, in constant memory.

    The data goes through in batches, the samples of each in chunks; only running sums are kept.

    Source: Burda et al. 2016, arXiv:1509.00519; Rezende & Mohamed 2015, section 6.2, report it with S = 200.

    Args:
        model: takes a minibatch as its arguments; all its latents are in one plate, that of the data.
        guide: its guide.
        *args: the data and what else both take. Every tensor as long as the first, here or in `kwargs`, is cut into
            batches along its first dimension.
        num_importance_samples: S.
        batch_size: data points at a time.
        chunk_size: samples of each at a time; about 10,000 / batch_size by default.
        plate: the data's plate; by default the outermost one.
        **kwargs: keyword arguments of both.

    Returns:
        The estimate for each of the N data points, with standard errors.

    Raises:
        OptionError: a number is not positive, or there is no tensor among the arguments.
        TargetError: a latent is outside the plate, or the plate holds other data than the batch.

    Example:
        >>> import pyro.distributions as dist, pyro, torch, flowvi
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> found = flowvi.log_likelihood(model, guide, torch.zeros(3), num_importance_samples=10)
        >>> round(found.mean, 3)  # N(0; 0, 2)
        -1.266
    """
    functions(model=model, guide=guide)
    instances(str, type(None), plate=plate)
    positive_integers(num_importance_samples=num_importance_samples, batch_size=batch_size)
    positive_integers_or_none(chunk_size=chunk_size)
    data = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
    if data is None:
        raise OptionError("there is no tensor among the arguments: give log_likelihood the data as the model takes it.")
    num = len(data)
    most = chunk_size or max(1, 10_000 // min(batch_size, num))
    losses: dict[int, IWELBO] = {}
    nesting = math.inf
    values, errors, elbos = [], [], []
    for start in range(0, num, batch_size):
        rows = slice(start, min(start + batch_size, num))
        part = [_cut(a, num, rows) for a in args]
        named = {k: _cut(a, num, rows) for k, a in kwargs.items()}
        sums, done = None, 0
        total: Tensor | float = 0.0
        while done < num_importance_samples:
            now = min(most, num_importance_samples - done)
            loss = losses.setdefault(now, IWELBO(now, plate=plate, max_plate_nesting=nesting))
            found = loss.weighted(model, guide, part, named)
            nesting = loss.max_plate_nesting
            if found.frame is None or found.log_w.shape[1] != rows.stop - rows.start:
                raise TargetError(
                    f"the model's plate holds {found.log_w.shape[1]} data points where the batch has "
                    f"{rows.stop - rows.start}: its plate must be as long as the data that it is given."
                )
            log_w = found.log_w.double()
            both = torch.stack([torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)])
            sums = both if sums is None else torch.logaddexp(sums, both)
            total = total + log_w.sum(0)
            done += now
        assert sums is not None
        elbos.append(torch.as_tensor(total) / num_importance_samples)
        values.append(sums[0] - math.log(num_importance_samples))
        relative = torch.exp(sums[1] - 2 * sums[0]) * num_importance_samples - 1
        errors.append((relative.clamp_min(0) / max(num_importance_samples - 1, 1)).sqrt())
    return LogLikelihood(torch.cat(values), torch.cat(errors), num_importance_samples, torch.cat(elbos))


def _cut(value: Any, num: int, rows: slice) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == num else value
