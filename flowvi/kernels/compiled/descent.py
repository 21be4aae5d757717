"""What an optimizer does with a gradient, each as one loop: Adam, RMSprop, and the mean of several ranks' gradients.

Vectors are flat, contiguous and of one dtype; `flowvi.fit.adam` says what the state is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import helper, kernel, stamp


@helper()
def _cut(g: Any, state: Any, clip: float, keep: float, usable: bool, norm: float) -> float:
    """What the gradient is multiplied by, below 0 where no step is to be taken; counts in the state.

    state: steps taken, running length of the gradient (0 before the first), steps skipped.
    norm: the length of the gradient that g is a part of; below 0, g is all of it.
    """
    if norm < 0.0:
        total = 0.0
        for i in range(len(g)):
            total += np.float64(g[i]) * np.float64(g[i])
        norm = math.sqrt(total)
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
        c, a, b, a1, b1 = F(factor), F(beta1), F(beta2), F(1.0 - beta1), F(1.0 - beta2)
        for i in range(len(g)):
            gi = c * g[i]
            m[i] = a * m[i] + a1 * gi
            v[i] = b * v[i] + b1 * gi * gi
            p[i] -= F(step) * m[i] / (np.sqrt(v[i]) / F(root) + F(eps))
        return TAG

    return adam


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
        c, a, b, b1 = F(factor), F(momentum), F(decay), F(1.0 - decay)
        for i in range(len(g)):
            gi = c * g[i]
            v[i] = b * v[i] + b1 * gi * gi
            m[i] = a * m[i] + gi / (np.sqrt(v[i]) + F(eps))
            p[i] -= F(lr) * m[i]
        return TAG

    return rmsprop


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
