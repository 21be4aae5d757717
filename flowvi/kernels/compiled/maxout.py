"""The largest of each window and its place, x (N, M, H) to (N, H), and its transpose; rows at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

from flowvi.kernels.compiled.jit import kernel, stamp


@cache
def _make(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def forward(x: Any, y: Any, which: Any) -> int:
        num, window, hidden = x.shape
        for n in range(num):
            for j in range(hidden):
                y[n, j], which[n, j] = x[n, 0, j], 0
            for m in range(1, window):
                for j in range(hidden):
                    a = x[n, m, j]
                    larger = a > y[n, j] or a != a
                    y[n, j] = a if larger else y[n, j]
                    which[n, j] = m if larger else which[n, j]
        return TAG

    @kernel
    def backward(g: Any, which: Any, out: Any) -> int:
        num, window, hidden = out.shape
        for n in range(num):
            for m in range(window):
                for j in range(hidden):
                    out[n, m, j] = g[n, j] if which[n, j] == m else F(0)
        return TAG

    return forward, backward


def forward(x: Any, y: Any, which: Any) -> None:
    """Fill y (N, H) and which (N, H), bytes, of x (N, M, H); the first of equal ones, NaN before all."""
    _make(x.dtype.type)[0](x, y, which)


def backward(g: Any, which: Any, out: Any) -> None:
    """Fill out (N, M, H) with g (N, H) at the places, and 0 elsewhere."""
    _make(g.dtype.type)[1](g, which, out)
