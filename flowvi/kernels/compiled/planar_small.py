r"""Planar stacks of small D: one pass over a tile of particles for each layer, with D a constant.

A tile of particles lies in one buffer, a row for each coordinate of z, then of the score; the rows have a
constant length, so that the compiler knows them to be apart, unrolls the loops over D and makes one vector
loop of a layer: w.z + b, tanh, the determinant, the step of z and of the score. All of it stays in the
first-level cache.

log|det|: the product of determinants is carried along and its logarithm is taken only before it could
overflow. det lies between 1 and 1 + m, so the K numbers 1 + m say where that is.

The backward pass goes down through the layers for the cotangents g_a of a = w.z + b, and up again for the
gradient of w, with z built by the same additions as in the forward pass: nothing but t (K, S) is kept, and
nothing is subtracted that could cancel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.constraint import constrain, constrain_backward
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.tanh import tanh

TILE = 256
"""Particles in a tile."""

MAX_DIM = 8
"""Largest D with kernels of its own; a kernel for each D is compiled when it is first needed."""


@helper()
def take_logs(q: Any, k: int, low: float, high: float) -> tuple[bool, float, float]:
    """Whether the log must be taken before layer k multiplies the product; and the product's new bounds."""
    small, large = min(1.0, np.float64(q[k])), max(1.0, np.float64(q[k]))
    if low * small > 1e-30 and high * large < 1e30:
        return False, low * small, high * large
    return True, small, large


def _at(i: int) -> Any:
    """An index that is not negative: numba need not look whether it counts from the end."""
    return np.uintp(i)


at = helper()(_at)


@cache
def make_forward(dim: int, dtype: type, with_score: bool) -> Any:
    """The kernel for one D and dtype: fills y, log_det, t and, where asked, the score from sign * score."""
    D, F, TAG = dim, dtype, stamp()
    DET = 2 * dim * TILE if with_score else dim * TILE
    SUM, T = DET + TILE, DET + 2 * TILE

    @kernel
    def forward(
        x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
        y: Any, log_det: Any, out_score: Any, t: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        layers = w.shape[0]
        u_hat, q = np.empty_like(w), np.empty_like(b)
        constrain(w, u, softplus, u_hat, q)
        buf: Any = np.zeros(T + TILE, F)
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for j in range(n):
                for d in range(D):
                    buf[at(d * TILE + j)] = x[first + j, d]
                    if with_score:
                        buf[at((D + d) * TILE + j)] = F(sign) * score[first + j, d]
            for j in range(n):
                buf[at(DET + j)] = F(1)
                buf[at(SUM + j)] = F(0)
            low, high = 1.0, 1.0
            for k in range(layers):
                take, low, high = take_logs(q, k, low, high)
                if take:
                    for j in range(n):
                        buf[at(SUM + j)] += np.log(buf[at(DET + j)])
                        buf[at(DET + j)] = F(1)
                m = q[k] - F(1)
                for j in range(n):
                    a, along = b[k], F(0)
                    for d in range(D):
                        a += w[k, d] * buf[at(d * TILE + j)]
                        if with_score:
                            along += u_hat[k, d] * buf[at((D + d) * TILE + j)]
                    v = tanh(a)
                    h = F(1) - v * v
                    det = v * v + h * q[k]
                    buf[at(DET + j)] *= det
                    buf[at(T + j)] = v
                    for d in range(D):
                        buf[at(d * TILE + j)] += u_hat[k, d] * v
                    if with_score:
                        per_det = F(1) / det
                        pull = (F(2) * v * h * m * per_det - h * along) * per_det
                        for d in range(D):
                            buf[at((D + d) * TILE + j)] += w[k, d] * pull
                for j in range(n):
                    t[k, first + j] = buf[at(T + j)]
            for j in range(n):
                log_det[first + j] = buf[at(SUM + j)] + np.log(buf[at(DET + j)])
                for d in range(D):
                    y[first + j, d] = buf[at(d * TILE + j)]
                    if with_score:
                        out_score[first + j, d] = buf[at((D + d) * TILE + j)]
        return TAG

    return forward


@cache
def make_backward(dim: int, dtype: type, with_log_det: bool) -> Any:
    """The kernel for one D and dtype: gradients to x, w, u, b, or a thread's part of them.

    With `finish` g_w and g_u are the gradients; without, they are of w (from w.z + b alone) and of û, for
    sums over threads. g_q is filled in both cases.
    """
    D, F, TAG = dim, dtype, stamp()
    T, A, LOG = dim * TILE, (dim + 1) * TILE, (dim + 2) * TILE

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
        g_x: Any, g_w: Any, g_u: Any, g_b: Any, g_q: Any, start: int, stop: int, finish: bool,
    ) -> int:  # fmt: skip
        layers = w.shape[0]
        u_hat, q = np.empty_like(w), np.empty_like(b)
        constrain(w, u, softplus, u_hat, q)
        g_u_hat = np.zeros_like(w) if finish else g_u
        g_w[:] = F(0)
        g_u_hat[:] = F(0)
        g_b[:] = F(0)
        g_q[:] = F(0)
        buf: Any = np.zeros(LOG + TILE, F)
        g_a = np.zeros((layers, TILE), F)
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for j in range(n):
                for d in range(D):
                    buf[at(d * TILE + j)] = g_y[first + j, d]
                if with_log_det:
                    buf[at(LOG + j)] = g_log_det[first + j]
            for k in range(layers - 1, -1, -1):
                for j in range(n):
                    buf[at(T + j)] = t[k, first + j]
                sum_b, sum_q = F(0), F(0)
                twice_one_minus_q = F(2) * (F(1) - q[k])
                for d in range(D):
                    total = F(0)
                    for j in range(n):
                        total += buf[at(d * TILE + j)] * buf[at(T + j)]
                    g_u_hat[k, d] += total
                for j in range(n):
                    v = buf[at(T + j)]
                    h = F(1) - v * v
                    a = F(0)
                    for d in range(D):
                        a += u_hat[k, d] * buf[at(d * TILE + j)]
                    if with_log_det:
                        ratio = buf[at(LOG + j)] / (v * v + h * q[k])
                        a += v * ratio * twice_one_minus_q
                        sum_q += h * ratio
                    a *= h
                    sum_b += a
                    for d in range(D):
                        buf[at(d * TILE + j)] += w[k, d] * a
                    buf[at(A + j)] = a
                for j in range(n):
                    g_a[k, j] = buf[at(A + j)]
                g_b[k] += sum_b
                g_q[k] += sum_q
            for j in range(n):
                for d in range(D):
                    g_x[first + j, d] = buf[at(d * TILE + j)]
                    buf[at(d * TILE + j)] = x[first + j, d]
            for k in range(layers):
                for j in range(n):
                    buf[at(T + j)] = t[k, first + j]
                    buf[at(A + j)] = g_a[k, j]
                for d in range(D):
                    total = F(0)
                    for j in range(n):
                        z = buf[at(d * TILE + j)]
                        total += buf[at(A + j)] * z
                        buf[at(d * TILE + j)] = z + u_hat[k, d] * buf[at(T + j)]
                    g_w[k, d] += total
        if finish:
            constrain_backward(g_u_hat, g_q, w, u, softplus, g_w, g_u, True)
        return TAG

    return backward
