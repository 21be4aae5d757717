"""The inverses of whole stacks with log-determinants, on numpy arrays; the mathematics is in `planar` and `radial`.

Shapes as there, or with N in front of every array: layers of each datum's own. Planar: the K scalar equations
a_k + m tanh(a_k) = w_k.z_k + b_k are solved from the last layer to the first, a tile of particles at a time. Radial: in
closed form. What a layer keeps of each particle, t or r, gives its determinant.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.constraint import constrain
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.planar_gram import TILE
from flowvi.kernels.compiled.planar_small import at, take_logs
from flowvi.kernels.compiled.radial_tiles import positive
from flowvi.kernels.compiled.tanh import tanh

MAX_STEPS = 100


@helper()
def solve(work: Any, n: int, q: Any, tolerance: Any, F: Any) -> None:
    """Replace n numbers c at the front of `work` by the roots p of p + m tanh p = c; see `root.planar_root`.

    Uses 2 TILE more numbers of `work`.
    """
    m = q - F(1)
    rising = m >= F(0)
    for j in range(n):
        target = abs(work[at(j)])
        by_one, by_slope = target - m, target / q
        larger, smaller = (by_one, by_slope) if by_one > by_slope else (by_slope, by_one)
        work[at(TILE + j)] = larger if rising else smaller
        work[at(2 * TILE + j)] = target
    for _ in range(MAX_STEPS):
        moving = F(0)
        for j in range(n):
            p = work[at(TILE + j)]
            t = tanh(p)
            tt = t * t
            move = (p + m * t - work[at(2 * TILE + j)]) / (tt + (F(1) - tt) * q)
            forward = move < F(0) if rising else move > F(0)
            moves = forward and abs(move) > tolerance * p
            work[at(TILE + j)] = p - move if moves else p
            moving += F(1) if moves else F(0)
        if not moving > F(0):
            break
    for j in range(n):
        p = work[at(TILE + j)]
        work[at(j)] = p if work[at(j)] >= F(0) else -p


@cache
def _make_planar(dtype: type) -> Any:
    F, TAG = dtype, stamp()
    TOLERANCE = dtype(2 * np.finfo(dtype).eps)

    @kernel
    def backwards(
        y: Any, w: Any, u: Any, b: Any, softplus: bool, x: Any, log_det: Any, t: Any,
        n_start: int, n_stop: int, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = u.shape
        u_hat, q = np.empty_like(u[0]), np.empty_like(b[0])
        z: Any = np.zeros(dim * TILE, F)
        product: Any = np.zeros(TILE, F)
        work: Any = np.zeros(3 * TILE, F)
        for n in range(n_start, n_stop):
            row = n if w.shape[0] > 1 else 0
            constrain(w[row], u[n], softplus, u_hat, q)
            for first in range(start, stop, TILE):
                size = min(TILE, stop - first)
                for j in range(size):
                    product[at(j)] = F(1)
                    log_det[n, first + j] = F(0)
                    for d in range(dim):
                        z[at(d * TILE + j)] = y[n, first + j, d]
                low, high = 1.0, 1.0
                for k in range(layers - 1, -1, -1):
                    for j in range(size):
                        work[at(j)] = b[n, k]
                    for d in range(dim):
                        into = w[row, k, d]
                        for j in range(size):
                            work[at(j)] += into * z[at(d * TILE + j)]
                    solve(work, size, q[k], TOLERANCE, F)
                    take, low, high = take_logs(q, k, low, high)
                    if take:
                        for j in range(size):
                            log_det[n, first + j] -= np.log(product[at(j)])
                            product[at(j)] = F(1)
                    for j in range(size):
                        v = tanh(work[at(j)])
                        work[at(j)] = v
                        t[n, k, first + j] = v
                        product[at(j)] *= v * v + (F(1) - v * v) * q[k]
                    for d in range(dim):
                        out = u_hat[k, d]
                        for j in range(size):
                            z[at(d * TILE + j)] -= out * work[at(j)]
                for j in range(size):
                    log_det[n, first + j] -= np.log(product[at(j)])
                    for d in range(dim):
                        x[n, first + j, d] = z[at(d * TILE + j)]
        return TAG

    return backwards


def run(task: Any, shape: tuple[int, ...], work: int, tile: int) -> None:
    """task(n_start, n_stop, start, stop) over threads: they share the data, or one datum's particles."""
    many, size, _ = shape
    if many == 1:
        threads.run(lambda i, j: task(0, 1, i, j), threads.ranges(size, size * work, tile))
    else:
        threads.run(lambda i, j: task(i, j, 0, size), threads.ranges(many, many * size * work, 1))


def with_front(arrays: tuple[Any, ...], front: bool) -> tuple[Any, ...]:
    """The arrays with N in front, where they have none."""
    return arrays if front else tuple(a[None] for a in arrays)


def planar(y: Any, w: Any, u: Any, b: Any, softplus: bool, x: Any, log_det: Any, t: Any) -> None:
    """Fill x (S, D), log|det dx/dy| (S,) and t (K, S) from y (S, D)."""
    backwards = _make_planar(w.dtype.type)
    y, w, u, b, x, log_det, t = with_front((y, w, u, b, x, log_det, t), w.ndim == 3)
    _, layers, dim = w.shape
    run(lambda *part: backwards(y, w, u, b, softplus, x, log_det, t, *part), y.shape, layers * (2 * dim + 50), TILE)


@cache
def _make_radial(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def backwards(
        y: Any, z0: Any, raw_alpha: Any, raw_s: Any, x: Any, log_det: Any, rs: Any,
        n_start: int, n_stop: int, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = z0.shape
        alphas, esses = np.empty(layers, F), np.empty(layers, F)
        for n in range(n_start, n_stop):
            for k in range(layers):
                alphas[k], esses[k] = positive(raw_alpha[n, k])[0], positive(raw_s[n, k])[0]
            for i in range(start, stop):
                for d in range(dim):
                    x[n, i, d] = y[n, i, d]
                total, across, along = 0.0, 1.0, 1.0  # the products of both factors of the determinants
                for k in range(layers - 1, -1, -1):
                    square, alpha, s = F(0), alphas[k], esses[k]
                    for d in range(dim):
                        o = x[n, i, d] - z0[n, k, d]
                        square += o * o
                    big = np.sqrt(square)
                    b = big - s
                    root = np.sqrt(b * b + F(4) * alpha * big) + abs(b)
                    r = F(2) * alpha * big / root if b < F(0) else root / F(2)
                    rs[n, k, i] = r
                    reach = alpha + r
                    shrink = reach / (r + s)
                    across *= shrink
                    along *= reach * reach / (alpha * s + F(2) * alpha * r + r * r)
                    if not (1e-200 < across < 1e200 and 1e-200 < along < 1e200):
                        total += (dim - 1) * np.log(across) + np.log(along)
                        across, along = 1.0, 1.0
                    for d in range(dim):
                        x[n, i, d] = z0[n, k, d] + shrink * (x[n, i, d] - z0[n, k, d])
                log_det[n, i] = total + (dim - 1) * np.log(across) + np.log(along)
        return TAG

    return backwards


def radial(y: Any, z0: Any, raw_alpha: Any, raw_s: Any, x: Any, log_det: Any, rs: Any) -> None:
    """Fill x (S, D), log|det dx/dy| (S,) and rs (K, S) from y (S, D)."""
    backwards = _make_radial(z0.dtype.type)
    arrays = with_front((y, z0, raw_alpha, raw_s, x, log_det, rs), z0.ndim == 3)
    _, layers, dim = arrays[1].shape
    run(lambda *part: backwards(*arrays, *part), arrays[0].shape, layers * (dim + 10), 1)
