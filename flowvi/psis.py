"""Pareto-smoothed importance sampling and resampling.

The smoothing is ArviZ's, whichever is at hand, made safe for weights that are equal or zero.

Source: Vehtari, Simpson, Gelman, Yao, Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowvi.checks import as_array, one_of, whole_numbers
from flowvi.errors import DimensionError, OptionError

__all__ = ["MIN_DRAWS", "khat_limit", "psis", "systematic"]

MIN_DRAWS = 100  # fewer leave PSIS without a tail to fit
_UNDERFLOW = -700.0  # log weights this far below the largest are zero
_FLAT = 1e-3  # log weights closer than this are equal: float32 rounding of log q at D = 1000 stays below

_Array = NDArray[np.float64]


def khat_limit(num_samples: int) -> float:
    """The largest k-hat to rely on: min(1 - 1 / log10(S), 0.7).

    Source: Vehtari et al. (2024), section 3.2.4.

    Args:
        num_samples: S, the number of draws.

    Returns:
        The limit, 0.7 from S = 2155 on.

    Raises:
        OptionError: S is not an integer of at least 2.
    """
    whole_numbers(2, num_samples=num_samples)
    return min(1 - 1 / float(np.log10(num_samples)), 0.7)


def psis(log_weights: _Array, *, backend: str | None = None) -> tuple[_Array, float]:
    """Pareto-smoothed, normalized log weights and k-hat, by ArviZ.

    Equal weights have no tail to fit (ArviZ calls that infinite, or an error): here k-hat is 0. Weights of
    zero are allowed.

    Args:
        log_weights: Log weights (S,), finite or -inf.
        backend: "arviz_stats" (the parts of ArviZ 1.x) or "arviz" (0.x). None takes what is installed, the
            former first, because it is quicker to import.

    Returns:
        The smoothed log weights (S,), whose exponentials sum to 1, and k-hat.

    Raises:
        DimensionError: Not one-dimensional, or fewer than 100 weights.
        OptionError: The backend is neither of the two, or can't be imported; or no weight is above zero, or one
            is NaN.
    """
    log_w = np.array(as_array("log_weights", log_weights))
    if log_w.ndim != 1 or log_w.size < MIN_DRAWS:
        raise DimensionError(
            f"log_weights must have shape (S,) with S >= {MIN_DRAWS}, got {log_w.shape}: draw more samples."
        )
    function = _find_psis(backend)
    top = log_w.max()
    if not np.isfinite(top):
        raise OptionError("log_weights must be finite or -inf, and not all of them -inf.")
    # ArviZ takes exponentials: what is zero in them can't be a part of the tail, and -inf would become NaN
    positive = log_w > top + _UNDERFLOW
    tail = int(np.ceil(min(0.2 * log_w.size, 3 * log_w.size**0.5))) + 1
    if positive.sum() <= tail:
        return _normalize(log_w), np.inf
    if top - np.partition(log_w, -tail)[-tail] < _FLAT:
        return _normalize(log_w), 0.0
    smoothed, khat = function(np.where(positive, log_w, top + _UNDERFLOW))
    if not np.isfinite(smoothed).all():  # a fitted tail of almost equal weights can degenerate: leave them as they are
        return _normalize(log_w), float(khat)
    return np.where(positive, smoothed, -np.inf), float(khat)


def _find_psis(backend: str | None) -> Any:
    """A function log weights (S,) -> (smoothed and normalized (S,), k-hat), from the ArviZ at hand."""
    choices = ("arviz_stats", "arviz")
    if backend is not None:
        one_of(choices, backend=backend)
    problem: Exception | None = None
    for name in choices if backend is None else (backend,):
        try:
            module = importlib.import_module("arviz_stats.base" if name == "arviz_stats" else "arviz")
        except Exception as error:  # ArviZ 0.23 dies of an AttributeError beside an older arviz-plots
            problem = error
            continue
        if name == "arviz_stats":
            # it takes log likelihoods, and smooths the weights 1 / likelihood
            return lambda log_w, function=module.array_stats.psislw: function(-log_w)
        if hasattr(module, "psislw"):
            return module.psislw
    raise OptionError(f"PSIS needs ArviZ: pip install arviz, or arviz-stats. ({problem!r})") from problem


def _normalize(log_w: _Array) -> _Array:
    """Log weights minus their log sum."""
    top = log_w.max()
    return log_w - top - np.log(np.exp(log_w - top).sum())


def systematic(weights: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Indices of `num` draws in random order, each as often as its weight says, to within one.

    Args:
        weights: (S,), not all zero, on the CPU.
        num: n.
        generator: where the randomness comes from.

    Returns:
        Indices (n,) on the CPU.
    """
    # one uniform offset, n equally spaced points on the cumulated weights
    offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    points = (torch.arange(num, dtype=torch.float64) + offset.cpu()) / num
    cumulated = weights.cumsum(0)
    index = torch.searchsorted(cumulated / cumulated[-1], points).clamp_(max=len(weights) - 1)
    return index[torch.randperm(num, generator=generator, device=generator.device).cpu()]
