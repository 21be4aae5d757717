"""A funnel layer a particle at a time, on numpy arrays: its triangular recurrences, and the whole of a small one.

n (D, D) is strictly lower triangular and contiguous; its transpose is given too where columns are read.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import helper, kernel, stamp


@helper()
def _substitute(x: Any, slope: Any, n: Any, row: Any) -> None:
    """The score at x in `row` becomes e^l times that at y, from the last coordinate on."""
    for k in range(len(row) - 1, 0, -1):
        q = slope[k] + slope[k] * x[k] * row[k]  # no literal, which would make it float64
        below = n[k]
        for i in range(k):
            row[i] -= below[i] * q


@cache
def _make_score(dtype: type) -> Any:
    TAG = stamp()

    @kernel
    def pull(x: Any, slope: Any, score: Any, n: Any, out: Any) -> int:
        size, dim = x.shape
        for s in range(size):
            for i in range(dim):
                out[s, i] = score[s, i]
            _substitute(x[s], slope[s], n, out[s])
        return TAG

    return pull


def score(x: Any, slope: Any, score: Any, n: Any, out: Any) -> None:
    """Fill out (S, D) with e^l s' from x, slope dl/da and the score (S, D)."""
    _make_score(x.dtype.type)(x, slope, score, n, out)


@cache
def _make_inverse(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def solve(y: Any, columns: Any, clip: float, x: Any, log_scale: Any) -> int:
        size, dim = y.shape
        c = F(clip)
        a = np.empty(dim, F)
        for s in range(size):
            a[:] = F(0)
            for i in range(dim):
                log_scale[s, i] = c * F(math.tanh(a[i] / c))
                x[s, i] = y[s, i] * F(math.exp(-log_scale[s, i]))
                right = columns[i]
                for k in range(i + 1, dim):
                    a[k] += right[k] * x[s, i]
        return TAG

    return solve


def inverse(y: Any, columns: Any, clip: float, x: Any, log_scale: Any) -> None:
    """Fill x and l (S, D) from y (S, D) and columns, the transpose of n."""
    _make_inverse(y.dtype.type)(y, columns, clip, x, log_scale)


@cache
def make_forward(dtype: type) -> Any:
    """Fill y, l, slope (S, D), log_det (S,) and out, the score at y (S, D), from x and the score at x (S, D)."""
    F, TAG = dtype, stamp()

    @kernel
    def forward(x: Any, score: Any, n: Any, clip: float, y: Any, scale: Any, slope: Any, log_det: Any, out: Any) -> int:
        size, dim = x.shape
        c = F(clip)
        for s in range(size):
            total = F(0)
            for i in range(dim):
                a = F(0)
                for j in range(i):
                    a += n[i, j] * x[s, j]
                t = F(math.tanh(a / c))
                total += c * t
                scale[s, i] = F(math.exp(c * t))
                slope[s, i] = F(1) - t * t
                y[s, i] = x[s, i] * scale[s, i]
                out[s, i] = score[s, i]
            log_det[s] = total
            _substitute(x[s], slope[s], n, out[s])
            for i in range(dim):
                out[s, i] /= scale[s, i]
        return TAG

    return forward


@cache
def make_backward(dtype: type) -> Any:
    """Fill g_x (S, D) and g_n (D, D) from g_y (S, D), g_log_det (S,) or zeros, and what `make_forward` filled."""
    F, TAG = dtype, stamp()

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, weighed: bool, x: Any, y: Any, scale: Any, slope: Any, n: Any, g_x: Any, g_n: Any
    ) -> int:
        size, dim = x.shape
        for i in range(dim):
            for j in range(dim):
                g_n[i, j] = F(0)
        for s in range(size):
            more = g_log_det[s] if weighed else F(0)
            for i in range(dim):
                g_x[s, i] = g_y[s, i] * scale[s, i]
            for i in range(dim):
                to_a = (g_y[s, i] * y[s, i] + more) * slope[s, i]
                for j in range(i):
                    g_x[s, j] += to_a * n[i, j]
                    g_n[i, j] += to_a * x[s, j]
        return TAG

    return backward
