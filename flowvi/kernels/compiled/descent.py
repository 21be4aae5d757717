"""What becomes of a gradient, each as one loop: Adam, RMSprop, the mean over ranks, a bound on the length of a product.

Vectors are flat, contiguous and of one dtype; `flowvi.fit.adam` says what the state is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import helper, kernel, stamp


@helper()
def _square(g: Any, c: Any) -> float:
    """The squared length of c g."""
    total = 0.0
    for i in range(len(g)):
        total += np.float64(c * g[i]) * np.float64(c * g[i])
    return total


@helper()
def _cut(g: Any, state: Any, clip: float, keep: float, usable: bool, norm: float) -> float:
    """What the gradient is multiplied by, below 0 where no step is to be taken; counts in the state.

    state: steps taken, running length of the gradient (0 before the first), steps skipped.
    norm: the length of the gradient that g is a part of; below 0, g is all of it.
    """
    if norm < 0.0:
        norm = math.sqrt(_square(g, g.dtype.type(1)))
    if not usable or not math.isfinite(norm):
        state[2] += 1.0
        return -1.0
    typical = state[1] if state[0] > 0.0 else norm
    factor = 1.0
    if norm > clip * typical:
        factor = clip * typical / norm
        norm = clip * typical
    state[0] += 1.0
    state[1] = keep * typical + (1.0 - keep) * norm
    return factor


@helper()
def _adam(
    p: Any, g: Any, m: Any, v: Any, c: Any, step: Any, root: Any, a: Any, a1: Any, b: Any, b1: Any, eps: Any
) -> None:
    """Move parameters p (P,) and their moments m and v along the gradient c g; a1 is 1 - a, and b1 1 - b."""
    for i in range(len(p)):
        gi = c * g[i]
        m[i] = a * m[i] + a1 * gi
        v[i] = b * v[i] + b1 * gi * gi
        p[i] -= step * m[i] / (np.sqrt(v[i]) / root + eps)


@helper()
def _rmsprop(p: Any, g: Any, m: Any, v: Any, c: Any, lr: Any, a: Any, b: Any, b1: Any, eps: Any) -> None:
    """Likewise."""
    for i in range(len(p)):
        gi = c * g[i]
        v[i] = b * v[i] + b1 * gi * gi
        m[i] = a * m[i] + gi / (np.sqrt(v[i]) + eps)
        p[i] -= lr * m[i]


@cache
def make_adam(dtype: type) -> Any:
    """One step of Adam on a flat vector, with clipping by the running length; see `flowvi.fit.adam`."""
    F, TAG = dtype, stamp()

    @kernel
    def adam(
        p: Any, g: Any, m: Any, v: Any, state: Any, lr: float, clip: float, keep: float,
        beta1: float, beta2: float, eps: float, usable: bool, norm: float,
    ) -> int:  # fmt: skip
        factor = _cut(g, state, clip, keep, usable, norm)
        if factor < 0.0:
            return TAG
        step = lr / (1.0 - beta1 ** state[0])
        root = math.sqrt(1.0 - beta2 ** state[0])
        _adam(p, g, m, v, F(factor), F(step), F(root), F(beta1), F(1.0 - beta1), F(beta2), F(1.0 - beta2), F(eps))
        return TAG

    return adam


@cache
def make_adam_rows(dtype: type) -> Any:
    """The same without clipping, of a matrix of parameters along c g; the squared length of that is returned."""
    F, TAG = dtype, stamp()

    @kernel
    def adam_rows(
        p: Any, g: Any, m: Any, v: Any, c: float, step: float, root: float, beta1: float, beta2: float, eps: float
    ) -> float:
        total = 0.0 * TAG
        for i in range(p.shape[0]):
            _adam(
                p[i], g[i], m[i], v[i], F(c), F(step), F(root),
                F(beta1), F(1.0 - beta1), F(beta2), F(1.0 - beta2), F(eps),
            )  # fmt: skip
            total += _square(g[i], F(c))
        return total

    return adam_rows


@cache
def make_rmsprop(dtype: type) -> Any:
    """One step of RMSprop with momentum, likewise; see `flowvi.fit.rmsprop`."""
    F, TAG = dtype, stamp()

    @kernel
    def rmsprop(
        p: Any, g: Any, m: Any, v: Any, state: Any, lr: float, clip: float, keep: float,
        momentum: float, decay: float, eps: float, usable: bool, norm: float,
    ) -> int:  # fmt: skip
        factor = _cut(g, state, clip, keep, usable, norm)
        if factor < 0.0:
            return TAG
        _rmsprop(p, g, m, v, F(factor), F(lr), F(momentum), F(decay), F(1.0 - decay), F(eps))
        return TAG

    return rmsprop


@cache
def make_rmsprop_rows(dtype: type) -> Any:
    """As of `make_adam_rows`."""
    F, TAG = dtype, stamp()

    @kernel
    def rmsprop_rows(
        p: Any, g: Any, m: Any, v: Any, c: float, lr: float, momentum: float, decay: float, eps: float
    ) -> float:
        total = 0.0 * TAG
        for i in range(p.shape[0]):
            _rmsprop(p[i], g[i], m[i], v[i], F(c), F(lr), F(momentum), F(decay), F(1.0 - decay), F(eps))
            total += _square(g[i], F(c))
        return total

    return rmsprop_rows


@cache
def make_mean(dtype: type) -> Any:
    """Make one part of a vector the mean of several, all of one size and `stride` apart; its squared length."""
    F, TAG = dtype, stamp()
    TILE = 4096  # stays in the nearest cache

    @kernel
    def mean(vector: Any, first: int, size: int, stride: int, parts: int, own: int) -> float:
        per = F(1.0 / parts)
        total = 0.0 * TAG
        for start in range(first, first + size, TILE):
            length = min(TILE, first + size - start)
            tile = vector[start + own * stride : start + own * stride + length]
            for part in range(parts):
                if part == own:
                    continue
                begin = start + part * stride
                other = vector[begin : begin + length]
                for i in range(length):
                    tile[i] += other[i]
            for i in range(length):
                tile[i] *= per
                total += np.float64(tile[i]) * np.float64(tile[i])
        return total

    return mean


@cache
def make_square(dtype: type) -> Any:
    """The squared length of a vector."""
    F, TAG = dtype, stamp()

    @kernel
    def square(vector: Any) -> float:
        return _square(vector, F(1)) + 0.0 * TAG

    return square


@cache
def make_bound(dtype: type) -> Any:
    """No less than the length of L' R, of L (n, C') and R (n, C), without making it.

    That is the length of a sum over rows of outer products: at most the sum of the lengths of parts of it. Of
    `size` rows at a time it is the sum's own: its square is the sum over pairs of rows of (l_a . l_b) (r_a . r_b), to
    which comes what may be lost by rounding.
    """
    F, TAG = dtype, stamp()
    LOST = 4.0 * float(np.finfo(dtype).eps)

    @kernel
    def bound(left: Any, right: Any, size: int) -> float:
        n, total = left.shape[0], 0.0 * TAG
        for first in range(0, n, size):
            square, lost = 0.0, 0.0
            for a in range(first, min(first + size, n)):
                for b in range(first, a + 1):
                    one, two = F(0), F(0)
                    for i in range(left.shape[1]):
                        one += left[a, i] * left[b, i]
                    for i in range(right.shape[1]):
                        two += right[a, i] * right[b, i]
                    square += (1.0 if a == b else 2.0) * np.float64(one) * np.float64(two)
                    if a == b:
                        lost += LOST * size * np.float64(one) * np.float64(two)
            # a sum of terms of both signs may round to something below 0; NaN must stay
            total += math.sqrt(lost if square < 0.0 else square + lost)
        return total

    return bound
