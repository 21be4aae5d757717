"""Radial stacks particle by particle, the inner loops over D: for large D, and for layers of each datum's own.

Arrays as in `radial` with N in front: x (N, S, D), z0 (N, K, D), raw_alpha and raw_s (N, K), log_det (N, S),
r (N, K, S). A stack shared by all particles is N = 1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.jit import kernel, stamp
from flowvi.kernels.compiled.planar_small import take_logs
from flowvi.kernels.compiled.radial_tiles import log_det_slope, positive


@cache
def _make_forward(dtype: type, with_score: bool) -> Any:
    F, TAG = dtype, stamp()
    TINY = dtype(np.finfo(dtype).tiny)

    @kernel
    def forward(
        x: Any, score: Any, sign: float, z0: Any, raw_alpha: Any, raw_s: Any,
        y: Any, log_det: Any, out_score: Any, rs: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = z0.shape
        more = F(dim - 1)
        z, pull = np.empty(dim, F), np.empty(dim, F)
        alphas, esses, bounds = np.empty(layers, F), np.empty(layers, F), np.empty(layers)
        for n in range(start, stop):
            for k in range(layers):
                a, b = positive(raw_alpha[n, k])[0], positive(raw_s[n, k])[0]
                alphas[k], esses[k], bounds[k] = a, b, b / a
            for i in range(x.shape[1]):
                for d in range(dim):
                    z[d] = x[n, i, d]
                    if with_score:
                        pull[d] = F(sign) * score[n, i, d]
                total, product, product_h = F(0), F(1), F(1)
                low, high = 1.0, 1.0
                for k in range(layers):
                    take, low, high = take_logs(bounds, k, low, high)
                    if take:
                        total += more * np.log(product) + np.log(product_h)
                        product, product_h = F(1), F(1)
                    alpha, s = alphas[k], esses[k]
                    square, along = F(0), F(0)
                    for d in range(dim):
                        o = z[d] - z0[n, k, d]
                        square += o * o
                        if with_score:
                            along += o * pull[d]
                    r = np.sqrt(square)
                    rs[n, k, i] = r
                    reach = alpha + r
                    g = (r + s) / reach
                    h = (alpha * s + F(2) * alpha * r + r * r) / (reach * reach)
                    product *= g
                    product_h *= h
                    bend, per_g = F(0), F(1) / g
                    if with_score:
                        per_r = F(1) / (TINY if r < TINY else r)
                        along *= per_r
                        bend = ((along - log_det_slope(r, alpha, s, more, F)) / h - along * per_g) * per_r
                    for d in range(dim):
                        o = z[d] - z0[n, k, d]
                        z[d] = z0[n, k, d] + g * o
                        if with_score:
                            pull[d] = pull[d] * per_g + bend * o
                log_det[n, i] = total + more * np.log(product) + np.log(product_h)
                for d in range(dim):
                    y[n, i, d] = z[d]
                    if with_score:
                        out_score[n, i, d] = pull[d]
        return TAG

    return forward


@cache
def _make_backward(dtype: type, with_log_det: bool) -> Any:
    F, TAG = dtype, stamp()
    TINY = dtype(np.finfo(dtype).tiny)

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, x: Any, z0: Any, raw_alpha: Any, raw_s: Any, rs: Any,
        g_x: Any, g_z0: Any, g_raw_alpha: Any, g_raw_s: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = z0.shape
        more = F(dim - 1)
        cot, z = np.empty(dim, F), np.empty(dim, F)
        offsets = np.empty((layers, dim), F)
        for n in range(start, stop):
            g_z0[n] = F(0)
            g_raw_alpha[n] = F(0)
            g_raw_s[n] = F(0)
            for i in range(x.shape[1]):
                for d in range(dim):
                    cot[d] = g_y[n, i, d]
                    z[d] = x[n, i, d]
                for k in range(layers):
                    alpha, s, r = F(positive(raw_alpha[n, k])[0]), F(positive(raw_s[n, k])[0]), rs[n, k, i]
                    g = (r + s) / (alpha + r)
                    for d in range(dim):
                        o = z[d] - z0[n, k, d]
                        offsets[k, d] = o
                        z[d] = z0[n, k, d] + g * o
                for k in range(layers - 1, -1, -1):
                    a, a_slope = positive(raw_alpha[n, k])
                    b, b_slope = positive(raw_s[n, k])
                    alpha, s, r = F(a), F(b), rs[n, k, i]
                    g_g = F(0)
                    for d in range(dim):
                        g_g += cot[d] * offsets[k, d]
                    per_reach = F(1) / (alpha + r)
                    g = (r + s) * per_reach
                    along = g_g * (alpha - s) * per_reach * per_reach
                    pull_alpha, pull_s = -g_g * g * per_reach, g_g * per_reach
                    if with_log_det:
                        weight = g_log_det[n, i]
                        quad = alpha * s + F(2) * alpha * r + r * r
                        along += weight * log_det_slope(r, alpha, s, more, F)
                        pull_alpha += weight * ((s + F(2) * r) / quad - (more + F(2)) * per_reach)
                        pull_s += weight * (more / (r + s) + alpha / quad)
                    g_raw_alpha[n, k] += pull_alpha * F(a_slope)
                    g_raw_s[n, k] += pull_s * F(b_slope)
                    along /= TINY if r < TINY else r
                    for d in range(dim):
                        new = cot[d] * g + along * offsets[k, d]
                        g_z0[n, k, d] += cot[d] - new
                        cot[d] = new
                for d in range(dim):
                    g_x[n, i, d] = cot[d]
        return TAG

    return backward


def _parts(z0: Any, size: int) -> list[tuple[int, int]]:
    count, layers, dim = z0.shape
    return threads.ranges(count, count * size * layers * (dim + 20), 1)


def forward(
    x: Any, score: Any, sign: float, z0: Any, raw_alpha: Any, raw_s: Any,
    y: Any, log_det: Any, out_score: Any, rs: Any,
) -> None:  # fmt: skip
    """As `radial.forward`."""
    kernel_ = _make_forward(z0.dtype.type, out_score is not None)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    args = (x, score, sign, z0, raw_alpha, raw_s, y, log_det, out_score, rs)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(z0, x.shape[1]))


def backward(
    g_y: Any, g_log_det: Any, x: Any, z0: Any, raw_alpha: Any, raw_s: Any, rs: Any,
    g_x: Any, g_z0: Any, g_raw_alpha: Any, g_raw_s: Any,
) -> None:  # fmt: skip
    """As `radial.backward`."""
    kernel_ = _make_backward(z0.dtype.type, g_log_det is not None)
    weight = raw_s if g_log_det is None else g_log_det  # raw_s: a placeholder that isn't read
    args = (g_y, weight, x, z0, raw_alpha, raw_s, rs, g_x, g_z0, g_raw_alpha, g_raw_s)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(z0, x.shape[1]))
