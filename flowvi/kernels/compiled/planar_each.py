"""Planar stacks with layers of their own for every datum: particle by particle, the inner loops over D.

Arrays as in `planar` with N in front: x (N, S, D), w and u (N, K, D), b (N, K), log_det (N, S), t (N, K, S). A w of
(1, K, D) is shared by all data.
No two particles share much, so nothing is gained by tiles; D is contiguous and vectorizes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.constraint import constrain, constrain_backward
from flowvi.kernels.compiled.jit import kernel, stamp
from flowvi.kernels.compiled.planar_small import take_logs
from flowvi.kernels.compiled.tanh import tanh


@cache
def _make_forward(dtype: type, with_score: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def forward(
        x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
        y: Any, log_det: Any, out_score: Any, t: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = u.shape
        u_hat, q = np.empty_like(u[0]), np.empty_like(b[0])
        z, pull = np.empty(dim, F), np.empty(dim, F)
        for n in range(start, stop):
            row = n if w.shape[0] > 1 else 0
            constrain(w[row], u[n], softplus, u_hat, q)
            for i in range(x.shape[1]):
                for d in range(dim):
                    z[d] = x[n, i, d]
                    if with_score:
                        pull[d] = F(sign) * score[n, i, d]
                total, product = F(0), F(1)
                low, high = 1.0, 1.0
                for k in range(layers):
                    take, low, high = take_logs(q, k, low, high)
                    if take:
                        total += np.log(product)
                        product = F(1)
                    a, along = F(0), F(0)
                    for d in range(dim):
                        a += w[row, k, d] * z[d]
                        if with_score:
                            along += u_hat[k, d] * pull[d]
                    v = tanh(a + b[n, k])
                    h = F(1) - v * v
                    det = v * v + h * q[k]
                    product *= det
                    t[n, k, i] = v
                    c = F(0)
                    if with_score:
                        per_det = F(1) / det
                        c = (F(2) * v * h * (q[k] - F(1)) * per_det - h * along) * per_det
                    for d in range(dim):
                        z[d] += u_hat[k, d] * v
                        if with_score:
                            pull[d] += w[row, k, d] * c
                log_det[n, i] = total + np.log(product)
                for d in range(dim):
                    y[n, i, d] = z[d]
                    if with_score:
                        out_score[n, i, d] = pull[d]
        return TAG

    return forward


@cache
def _make_backward(dtype: type, with_log_det: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
        g_x: Any, g_w: Any, g_u: Any, g_b: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = u.shape
        u_hat, q = np.empty_like(u[0]), np.empty_like(b[0])
        g_u_hat, g_q, g_a = np.empty_like(u[0]), np.empty_like(b[0]), np.empty_like(b[0])
        z, g = np.empty(dim, F), np.empty(dim, F)
        if w.shape[0] == 1:
            g_w[0] = F(0)
        for n in range(start, stop):
            row = n if w.shape[0] > 1 else 0
            constrain(w[row], u[n], softplus, u_hat, q)
            if w.shape[0] > 1:
                g_w[row] = F(0)
            g_b[n] = F(0)
            g_u_hat[:] = F(0)
            g_q[:] = F(0)
            for i in range(x.shape[1]):
                for d in range(dim):
                    g[d] = g_y[n, i, d]
                    z[d] = x[n, i, d]
                for k in range(layers - 1, -1, -1):
                    v = t[n, k, i]
                    h = F(1) - v * v
                    a = F(0)
                    for d in range(dim):
                        a += u_hat[k, d] * g[d]
                    if with_log_det:
                        ratio = g_log_det[n, i] / (v * v + h * q[k])
                        a += F(2) * v * ratio * (F(1) - q[k])
                        g_q[k] += h * ratio
                    a *= h
                    g_a[k] = a
                    g_b[n, k] += a
                    for d in range(dim):
                        g_u_hat[k, d] += g[d] * v
                        g[d] += w[row, k, d] * a
                for k in range(layers):
                    v, a = t[n, k, i], g_a[k]
                    for d in range(dim):
                        g_w[row, k, d] += a * z[d]
                        z[d] += u_hat[k, d] * v
                for d in range(dim):
                    g_x[n, i, d] = g[d]
            constrain_backward(g_u_hat, g_q, w[row], u[n], softplus, g_w[row], g_u[n], True)
        return TAG

    return backward


def _parts(u: Any, size: int) -> list[tuple[int, int]]:
    count, layers, dim = u.shape
    return threads.ranges(count, count * size * layers * (dim + 20), 1)


def forward(
    x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
    y: Any, log_det: Any, out_score: Any, t: Any,
) -> None:  # fmt: skip
    """Fill y, log_det, t and out_score (unless it is None) from x and sign * score, the score at x."""
    kernel_ = _make_forward(w.dtype.type, out_score is not None)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    args = (x, score, sign, w, u, b, softplus, y, log_det, out_score, t)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(u, x.shape[1]))


def backward(
    g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
    g_x: Any, g_w: Any, g_u: Any, g_b: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x, w, u and b; g_log_det None counts as zero."""
    kernel_ = _make_backward(w.dtype.type, g_log_det is not None)
    weight = b if g_log_det is None else g_log_det  # b: a placeholder that isn't read
    args, parts = (g_y, weight, x, w, u, b, softplus, t, g_x), _parts(u, x.shape[1])
    if len(w) > 1 or len(parts) == 1:
        threads.run(lambda start, stop: kernel_(*args, g_w, g_u, g_b, start, stop), parts)
        return

    def task(start: int, stop: int) -> Any:
        mine = np.empty_like(g_w)
        kernel_(*args, mine, g_u, g_b, start, stop)
        return mine

    g_w[:] = sum(threads.run(task, parts))
