r"""Radial stacks on numpy arrays: loops over tiles of particles, every layer O(D).

As in `planar_small` a tile lies in one buffer, a row for each coordinate. Both factors of the determinant lie
between 1 and s / alpha in every layer, so that their products are carried along and the logarithms taken
rarely. For the backward pass r (K, S) is kept; the layers' inputs are rebuilt from x, tile by tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.planar_small import at, take_logs

TILE = 256


@helper()
def positive(raw: Any) -> tuple[Any, Any]:
    """(a + sqrt(a^2 + 4)) / 2 and its slope, in double precision: there are only 2 K of them."""
    a = np.float64(raw)
    root = np.sqrt(a * a + 4.0)
    size = (abs(a) + root) / 2.0
    value = size if a >= 0.0 else 1.0 / size
    return value, value / root


@helper()
def log_det_slope(r: Any, alpha: Any, s: Any, more: Any, F: Any) -> Any:
    """D log|det| / dr, with more = D - 1."""
    reach = alpha + r
    per_reach = F(1) / reach
    quad = alpha * s + F(2) * alpha * r + r * r
    return more * (alpha - s) / (r + s) * per_reach + F(2) * reach / quad - F(2) * per_reach


@cache
def _make_forward(dtype: type, with_score: bool) -> Any:
    F, TAG = dtype, stamp()
    TINY = dtype(np.finfo(dtype).tiny)

    @kernel
    def forward(
        x: Any, score: Any, sign: float, z0: Any, raw_alpha: Any, raw_s: Any,
        y: Any, log_det: Any, out_score: Any, rs: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        layers = len(raw_s)
        dim = x.shape[1]
        more = F(dim - 1)
        rows = 2 * dim if with_score else dim
        R, G, H, BEND = rows * TILE, (rows + 1) * TILE, (rows + 2) * TILE, (rows + 3) * TILE
        SUM, RATIO, ALONG = (rows + 4) * TILE, (rows + 5) * TILE, (rows + 6) * TILE
        buf = np.zeros((rows + 7) * TILE, F)
        bounds: Any = np.empty(layers)
        alphas: Any = np.empty(layers, F)
        esses: Any = np.empty(layers, F)
        for k in range(layers):
            alpha, _ = positive(raw_alpha[k])
            s, _ = positive(raw_s[k])
            alphas[k], esses[k], bounds[k] = alpha, s, s / alpha
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for d in range(dim):
                for j in range(n):
                    buf[at(d * TILE + j)] = x[first + j, d]
                    if with_score:
                        buf[at((dim + d) * TILE + j)] = F(sign) * score[first + j, d]
            for j in range(n):
                buf[at(G + j)] = F(1)
                buf[at(H + j)] = F(1)
                buf[at(SUM + j)] = F(0)
            low, high = 1.0, 1.0
            for k in range(layers):
                alpha, s = alphas[k], esses[k]
                take, low, high = take_logs(bounds, k, low, high)
                if take:
                    for j in range(n):
                        buf[at(SUM + j)] += more * np.log(buf[at(G + j)]) + np.log(buf[at(H + j)])
                        buf[at(G + j)] = F(1)
                        buf[at(H + j)] = F(1)
                for j in range(n):
                    buf[at(R + j)] = F(0)
                    buf[at(ALONG + j)] = F(0)
                for d in range(dim):
                    centre = z0[k, d]
                    for j in range(n):
                        z = buf[at(d * TILE + j)]
                        z -= centre
                        buf[at(R + j)] += z * z
                        if with_score:
                            buf[at(ALONG + j)] += z * buf[at((dim + d) * TILE + j)]
                for j in range(n):
                    r = np.sqrt(buf[at(R + j)])
                    buf[at(R + j)] = r
                    reach = alpha + r
                    g = (r + s) / reach
                    h = (alpha * s + F(2) * alpha * r + r * r) / (reach * reach)
                    buf[at(G + j)] *= g
                    buf[at(H + j)] *= h
                    buf[at(RATIO + j)] = g
                    if with_score:
                        per_r = F(1) / (TINY if r < TINY else r)
                        per_g = F(1) / g
                        along = buf[at(ALONG + j)] * per_r
                        slope = log_det_slope(r, alpha, s, more, F)
                        buf[at(BEND + j)] = ((along - slope) / h - along * per_g) * per_r
                        buf[at(ALONG + j)] = per_g
                for j in range(n):
                    rs[k, first + j] = buf[at(R + j)]
                for d in range(dim):
                    centre = z0[k, d]
                    for j in range(n):
                        z = buf[at(d * TILE + j)] - centre
                        buf[at(d * TILE + j)] = centre + buf[at(RATIO + j)] * z
                        if with_score:
                            old = buf[at((dim + d) * TILE + j)]
                            buf[at((dim + d) * TILE + j)] = old * buf[at(ALONG + j)] + buf[at(BEND + j)] * z
            for j in range(n):
                log_det[first + j] = buf[at(SUM + j)] + more * np.log(buf[at(G + j)]) + np.log(buf[at(H + j)])
            for d in range(dim):
                for j in range(n):
                    y[first + j, d] = buf[at(d * TILE + j)]
                    if with_score:
                        out_score[first + j, d] = buf[at((dim + d) * TILE + j)]
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
        layers = len(raw_s)
        dim = g_y.shape[1]
        more = F(dim - 1)
        G, R, ALONG, LOG = dim * TILE, (dim + 1) * TILE, (dim + 2) * TILE, (dim + 3) * TILE
        buf = np.zeros((dim + 4) * TILE, F)
        offsets = np.zeros(layers * dim * TILE, F)  # every layer's z - z0
        g_z0[:] = F(0)
        g_raw_alpha[:] = F(0)
        g_raw_s[:] = F(0)
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for d in range(dim):
                for j in range(n):
                    buf[at(d * TILE + j)] = x[first + j, d]
            for k in range(layers):
                alpha, s = F(positive(raw_alpha[k])[0]), F(positive(raw_s[k])[0])
                for j in range(n):
                    r = rs[k, first + j]
                    buf[at(G + j)] = (r + s) / (alpha + r)
                for d in range(dim):
                    centre, o = z0[k, d], (k * dim + d) * TILE
                    for j in range(n):
                        z = buf[at(d * TILE + j)] - centre
                        offsets[at(o + j)] = z
                        buf[at(d * TILE + j)] = centre + buf[at(G + j)] * z
            for d in range(dim):
                for j in range(n):
                    buf[at(d * TILE + j)] = g_y[first + j, d]
            if with_log_det:
                for j in range(n):
                    buf[at(LOG + j)] = g_log_det[first + j]
            for k in range(layers - 1, -1, -1):
                a, a_slope = positive(raw_alpha[k])
                b, b_slope = positive(raw_s[k])
                alpha, s = F(a), F(b)
                for j in range(n):
                    buf[at(G + j)] = F(0)
                    buf[at(R + j)] = rs[k, first + j]
                for d in range(dim):
                    o = (k * dim + d) * TILE
                    for j in range(n):
                        buf[at(G + j)] += buf[at(d * TILE + j)] * offsets[at(o + j)]
                sum_alpha, sum_s = F(0), F(0)
                for j in range(n):
                    r, g_g = buf[at(R + j)], buf[at(G + j)]
                    per_reach = F(1) / (alpha + r)
                    g = (r + s) * per_reach
                    along = g_g * (alpha - s) * per_reach * per_reach
                    pull_alpha, pull_s = -g_g * g * per_reach, g_g * per_reach
                    if with_log_det:
                        weight = buf[at(LOG + j)]
                        quad = alpha * s + F(2) * alpha * r + r * r
                        along += weight * log_det_slope(r, alpha, s, more, F)
                        pull_alpha += weight * ((s + F(2) * r) / quad - (more + F(2)) * per_reach)
                        pull_s += weight * (more / (r + s) + alpha / quad)
                    sum_alpha += pull_alpha
                    sum_s += pull_s
                    buf[at(G + j)] = g
                    buf[at(ALONG + j)] = along / (TINY if r < TINY else r)
                for d in range(dim):
                    o, total = (k * dim + d) * TILE, F(0)
                    for j in range(n):
                        old = buf[at(d * TILE + j)]
                        new = old * buf[at(G + j)] + buf[at(ALONG + j)] * offsets[at(o + j)]
                        total += old - new
                        buf[at(d * TILE + j)] = new
                    g_z0[k, d] += total
                g_raw_alpha[k] += sum_alpha * F(a_slope)
                g_raw_s[k] += sum_s * F(b_slope)
            for d in range(dim):
                for j in range(n):
                    g_x[first + j, d] = buf[at(d * TILE + j)]
        return TAG

    return backward


def _parts(z0: Any, size: int) -> list[tuple[int, int]]:
    layers, dim = z0.shape
    return threads.ranges(size, size * layers * (dim + 2), TILE)


def forward(
    x: Any, score: Any, sign: float, z0: Any, raw_alpha: Any, raw_s: Any,
    y: Any, log_det: Any, out_score: Any, rs: Any,
) -> None:  # fmt: skip
    """As `radial.forward`."""
    kernel_ = _make_forward(z0.dtype.type, out_score is not None)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    args = (x, score, sign, z0, raw_alpha, raw_s, y, log_det, out_score, rs)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(z0, x.shape[0]))


def backward(
    g_y: Any, g_log_det: Any, x: Any, z0: Any, raw_alpha: Any, raw_s: Any, rs: Any,
    g_x: Any, g_z0: Any, g_raw_alpha: Any, g_raw_s: Any,
) -> None:  # fmt: skip
    """As `radial.backward`."""
    kernel_ = _make_backward(z0.dtype.type, g_log_det is not None)
    weight = raw_s if g_log_det is None else g_log_det  # raw_s: a placeholder that isn't read
    args = (g_y, weight, x, z0, raw_alpha, raw_s, rs, g_x)
    grads = (g_z0, g_raw_alpha, g_raw_s)
    parts = _parts(z0, g_y.shape[0])
    if len(parts) == 1:
        kernel_(*args, *grads, *parts[0])
        return

    def task(start: int, stop: int) -> Any:
        part = [np.empty_like(a) for a in grads]
        kernel_(*args, *part, start, stop)
        return part

    for out, values in zip(grads, zip(*threads.run(task, parts), strict=True), strict=True):
        out[:] = sum(values[1:], start=values[0])
