"""Planar stacks with layers of their own for every datum: a few particles at a time, layer by layer.

Arrays as in `planar` with N in front: x (N, S, D), w and u (N, K, D), b (N, K), log_det (N, S), t (N, K, S). A w of
(1, K, D) is shared by all data.

A particle's layers follow on each other, and each is a few products over D and thirty operations on single numbers that
wait for them. So `ROWS` particles go through a layer together: their products don't wait for each other, and the single
numbers are vectors over particles. û isn't written down: û = share u + along w enters by its two terms.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import planar_each_sum, threads
from flowvi.kernels.compiled.constraint import weights, weights_backward
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.tanh import tanh

ROWS = 16
"""Particles that go through a layer together."""

SMALL = 8_192
"""Numbers of a datum's u up to which `ROWS` of them stay in the second cache, in the backward pass."""

LOWEST, HIGHEST = 1e-30, 1e30
"""A product of determinants within these is one in float32 too; the logarithm is taken before it can leave them."""


@helper()
def _square(v: Any) -> Any:
    """|v|^2."""
    total = v.dtype.type(0)
    for d in range(v.size):
        total += v[d] * v[d]
    return total


@cache
def _make_forward(dtype: type, with_score: bool, shared: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def forward(
        x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
        y: Any, log_det: Any, out_score: Any, t: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = u.shape
        size = x.shape[1]
        z, pull = np.empty((ROWS, dim), F), np.empty((ROWS, dim), F)
        one: Any = np.empty(ROWS, F)  # memory of its own for each vector, or loops over several wouldn't vectorize
        s, square, a, q, v = one, np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
        by_u, by_w, by_c = np.empty_like(one), np.empty_like(one), np.empty_like(one)
        total, product, low, high = np.empty_like(one), np.empty_like(one), np.empty(ROWS), np.empty(ROWS)
        data, places = np.empty(ROWS, np.uintp), np.empty(ROWS, np.uintp)
        for first in range(start * size, stop * size, ROWS):
            rows = min(ROWS, stop * size - first)
            for j in range(rows):
                n, i = divmod(first + j, size)
                data[j], places[j] = n, i
                total[j], product[j], low[j], high[j] = F(0), F(1), 1.0, 1.0
                for d in range(dim):
                    z[j, d] = x[n, i, d]
                    if with_score:
                        pull[j, d] = F(sign) * score[n, i, d]
            for k in range(layers):
                once = _square(w[0, k])
                for j in range(rows):
                    n = data[j]
                    w_, u_, z_, pull_ = w[np.uintp(0) if shared else n, k], u[n, k], z[j], pull[j]
                    wu, ww, wz, u_pull, w_pull = F(0), once if shared else _square(w_), F(0), F(0), F(0)
                    for d in range(dim):
                        wu += w_[d] * u_[d]
                        wz += w_[d] * z_[d]
                        if with_score:
                            u_pull += u_[d] * pull_[d]
                            w_pull += w_[d] * pull_[d]
                    s[j], square[j], a[j], by_u[j], by_w[j] = wu, ww, wz + b[n, k], u_pull, w_pull
                if softplus:
                    for j in range(rows):
                        s[j], square[j], q[j] = weights(s[j], square[j], True)
                else:
                    for j in range(rows):
                        s[j], square[j], q[j] = weights(s[j], square[j], False)
                leaving = 0
                for j in range(rows):
                    low[j] *= min(1.0, np.float64(q[j]))
                    high[j] *= max(1.0, np.float64(q[j]))
                    leaving += 0 if low[j] > LOWEST and high[j] < HIGHEST else 1
                if leaving:
                    for j in range(rows):
                        total[j] += np.log(product[j])
                        product[j], low[j], high[j] = F(1), min(1.0, np.float64(q[j])), max(1.0, np.float64(q[j]))
                for j in range(rows):
                    v_ = tanh(a[j])
                    h = F(1) - v_ * v_
                    det = v_ * v_ + h * q[j]
                    product[j] *= det
                    if with_score:
                        per_det, along = F(1) / det, s[j] * by_u[j] + square[j] * by_w[j]
                        by_c[j] = (F(2) * v_ * h * (q[j] - F(1)) * per_det - h * along) * per_det
                    v[j], by_u[j], by_w[j] = v_, s[j] * v_, square[j] * v_
                for j in range(rows):
                    n, i = data[j], places[j]
                    t[n, k, i] = v[j]
                    w_, u_, z_, pull_ = w[np.uintp(0) if shared else n, k], u[n, k], z[j], pull[j]
                    share, along, c = by_u[j], by_w[j], by_c[j]
                    for d in range(dim):
                        z_[d] += share * u_[d] + along * w_[d]
                        if with_score:
                            pull_[d] += c * w_[d]
            for j in range(rows):
                n, i = data[j], places[j]
                log_det[n, i] = total[j] + np.log(product[j])
                for d in range(dim):
                    y[n, i, d] = z[j, d]
                    if with_score:
                        out_score[n, i, d] = pull[j, d]
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
        """Of one particle for each datum."""
        _, layers, dim = u.shape
        shared = w.shape[0] == 1
        g, z = np.empty((ROWS, dim), F), np.empty((ROWS, dim), F)
        one: Any = np.empty(ROWS, F)
        s, square, ug, wg, v = one, np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
        share, along, q, g_q = np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
        g_det, by_s, by_square = np.empty_like(one), np.empty_like(one), np.empty_like(one)
        each: Any = np.empty((layers, ROWS), F)
        in_place = g_u.ctypes.data == u.ctypes.data
        mine = np.empty((ROWS, layers, dim), F)
        by_a, by_u, by_w = each, np.empty_like(each), np.empty_like(each)
        if shared:
            g_w[0] = F(0)
        for first in range(start, stop, ROWS):
            rows = min(ROWS, stop - first)
            for j in range(rows):
                n = np.uintp(first + j)
                g_det[j] = g_log_det[n, 0] if with_log_det else F(0)
                for d in range(dim):
                    g[j, d], z[j, d] = g_y[n, 0, d], x[n, 0, d]
                # In one stream each, which the machine fetches ahead: layer by layer there would be one for each row.
                for k in range(layers):
                    for d in range(dim):
                        mine[j, k, d] = u[n, k, d]
                if not in_place:
                    for k in range(layers):
                        for d in range(dim):
                            g_u[n, k, d] = F(0)
            for k in range(layers - 1, -1, -1):
                once, on_squares = _square(w[0, k]), F(0)
                for j in range(rows):
                    n = np.uintp(first + j)
                    row = np.uintp(0) if shared else n
                    wu, ww, along_u, along_w = F(0), once if shared else _square(w[row, k]), F(0), F(0)
                    for d in range(dim):
                        wu += w[row, k, d] * mine[j, k, d]
                        along_u += mine[j, k, d] * g[j, d]
                        along_w += w[row, k, d] * g[j, d]
                    s[j], square[j], ug[j], wg[j], v[j] = wu, ww, along_u, along_w, t[n, k, 0]
                if softplus:
                    for j in range(rows):
                        share[j], along[j], q[j] = weights(s[j], square[j], True)
                else:
                    for j in range(rows):
                        share[j], along[j], q[j] = weights(s[j], square[j], False)
                for j in range(rows):
                    h = F(1) - v[j] * v[j]
                    ratio = g_det[j] / (v[j] * v[j] + h * q[j]) if with_log_det else F(0)
                    by_a[k, j] = h * (share[j] * ug[j] + along[j] * wg[j] + F(2) * v[j] * ratio * (F(1) - q[j]))
                    by_u[k, j], by_w[k, j] = share[j] * v[j], along[j] * v[j]
                    ug[j], wg[j], g_q[j] = v[j] * ug[j], v[j] * wg[j], h * ratio
                if softplus:
                    for j in range(rows):
                        by_s[j], by_square[j] = weights_backward(s[j], square[j], ug[j], wg[j], g_q[j], True)
                else:
                    for j in range(rows):
                        by_s[j], by_square[j] = weights_backward(s[j], square[j], ug[j], wg[j], g_q[j], False)
                for j in range(rows):
                    n = np.uintp(first + j)
                    row = np.uintp(0) if shared else n
                    on_u, on_w, a, c_s, c_square = by_u[k, j], by_w[k, j], by_a[k, j], by_s[j], F(2) * by_square[j]
                    g_b[n, k] = a
                    if shared:
                        on_squares += c_square
                        for d in range(dim):
                            g_w[row, k, d] += on_w * g[j, d] + c_s * mine[j, k, d]
                    else:
                        for d in range(dim):
                            g_w[row, k, d] = on_w * g[j, d] + c_s * mine[j, k, d] + c_square * w[row, k, d]
                    for d in range(dim):
                        g_u[n, k, d] = on_u * g[j, d] + c_s * w[row, k, d]
                    for d in range(dim):
                        g[j, d] += a * w[row, k, d]
                if shared:
                    for d in range(dim):
                        g_w[0, k, d] += on_squares * w[0, k, d]
            for k in range(layers):
                for j in range(rows):
                    n = np.uintp(first + j)
                    row = np.uintp(0) if shared else n
                    on_u, on_w, a = by_u[k, j], by_w[k, j], by_a[k, j]
                    for d in range(dim):
                        g_w[row, k, d] += a * z[j, d]
                    for d in range(dim):
                        z[j, d] += on_u * mine[j, k, d] + on_w * w[row, k, d]
            for j in range(rows):
                n = np.uintp(first + j)
                for d in range(dim):
                    g_x[n, 0, d] = g[j, d]
        return TAG

    return backward


def may_overwrite(size: int, layers: int, dim: int) -> bool:
    """Whether `backward` of so many particles for each datum may leave the gradient of u where u is."""
    return size == 1 and layers * dim <= SMALL


def _parts(u: Any, size: int) -> list[tuple[int, int]]:
    count, layers, dim = u.shape
    return threads.ranges(count, count * size * layers * (dim + 20), 1)


def forward(
    x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
    y: Any, log_det: Any, out_score: Any, t: Any,
) -> None:  # fmt: skip
    """Fill y, log_det, t and out_score (unless it is None) from x and sign * score, the score at x."""
    kernel_ = _make_forward(w.dtype.type, out_score is not None, len(w) == 1)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    args = (x, score, sign, w, u, b, softplus, y, log_det, out_score, t)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(u, x.shape[1]))


def backward(
    g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
    g_x: Any, g_w: Any, g_u: Any, g_b: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x, w, u and b; g_log_det None counts as zero. `may_overwrite` says when g_u may be u."""
    make = _make_backward if may_overwrite(x.shape[1], *u.shape[1:]) else planar_each_sum.make_backward
    kernel_ = make(w.dtype.type, g_log_det is not None)
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
