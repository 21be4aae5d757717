"""The two triangular recurrences of a funnel layer, a particle at a time, on numpy arrays.

n (D, D) is strictly lower triangular and contiguous; its transpose is given too where columns are read.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import kernel, stamp


@cache
def _make_score(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def pull(x: Any, slope: Any, score: Any, n: Any, out: Any) -> int:
        size, dim = x.shape
        for s in range(size):
            row = out[s]
            for i in range(dim):
                row[i] = score[s, i]
            for k in range(dim - 1, 0, -1):
                q = slope[s, k] * (F(1) + x[s, k] * row[k])
                below = n[k]
                for i in range(k):
                    row[i] -= below[i] * q
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
