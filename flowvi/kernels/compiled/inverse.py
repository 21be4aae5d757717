"""The inverses of whole stacks, on numpy arrays; mathematics and shapes as in `planar` and `radial`.

Planar: x = y - sum_k û_k t_k, with the K scalar equations a_k + m tanh(a_k) = w_k.z_k + b_k solved from the last
layer to the first; w_k.z_k = w_k.y - sum_{j>k} G_kj t_j needs only the Gram matrix. Radial: in closed form.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.planar_gram import CHUNK, TILE, add_rows, prepare
from flowvi.kernels.compiled.planar_small import at
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
    def backwards(t: Any, gram: Any, q: Any, b: Any, start: int, stop: int) -> int:
        """t: W y on the way in, tanh(a) on the way out."""
        layers = len(b)
        rows: Any = np.zeros(layers * TILE, F)
        work: Any = np.zeros(3 * TILE, F)
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for k in range(layers - 1, -1, -1):
                for j in range(n):
                    work[at(j)] = -t[k, first + j] - b[k]
                add_rows(work, 0, rows, k + 1, layers, gram, n, False, k)
                for j in range(n):
                    work[at(j)] = -work[at(j)]
                solve(work, n, q[k], TOLERANCE, F)
                for j in range(n):
                    v = tanh(work[at(j)])
                    rows[at(k * TILE + j)] = v
                    t[k, first + j] = v
        return TAG

    return backwards


def planar(y: Any, w: Any, u: Any, b: Any, softplus: bool, x: Any, t: Any) -> None:
    """Fill x (S, D) and t (K, S) from y (S, D)."""
    backwards = _make_planar(w.dtype.type)
    u_hat, q = prepare(w, u, b, softplus)
    w_, u_hat_, x_, t_ = (torch.from_numpy(a) for a in (w, u_hat, x, t))
    x[:] = y
    for begin in reversed(range(0, len(b), CHUNK)):
        chunk = slice(begin, min(begin + CHUNK, len(b)))
        wc, uc, tc = w_[chunk], u_hat_[chunk], t_[chunk]
        torch.mm(wc, x_.mT, out=tc)
        gram = torch.mm(wc, uc.mT).numpy()

        def task(start: int, stop: int, gram: Any = gram, chunk: slice = chunk) -> None:
            backwards(t[chunk], gram, q[chunk], b[chunk], start, stop)

        threads.run(task, threads.ranges(len(x), len(x) * len(b) * 50, TILE))
        x_.addmm_(tc.mT, uc, alpha=-1)


@cache
def _make_radial(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def backwards(y: Any, z0: Any, raw_alpha: Any, raw_s: Any, x: Any, rs: Any, start: int, stop: int) -> int:
        layers, dim = z0.shape
        alphas, esses = np.empty(layers, F), np.empty(layers, F)
        for k in range(layers):
            alphas[k], esses[k] = positive(raw_alpha[k])[0], positive(raw_s[k])[0]
        for i in range(start, stop):
            for d in range(dim):
                x[i, d] = y[i, d]
            for k in range(layers - 1, -1, -1):
                square, alpha, s = F(0), alphas[k], esses[k]
                for d in range(dim):
                    o = x[i, d] - z0[k, d]
                    square += o * o
                big = np.sqrt(square)
                b = big - s
                root = np.sqrt(b * b + F(4) * alpha * big) + abs(b)
                r = F(2) * alpha * big / root if b < F(0) else root / F(2)
                rs[k, i] = r
                shrink = (alpha + r) / (r + s)
                for d in range(dim):
                    x[i, d] = z0[k, d] + shrink * (x[i, d] - z0[k, d])
        return TAG

    return backwards


def radial(y: Any, z0: Any, raw_alpha: Any, raw_s: Any, x: Any, rs: Any) -> None:
    """Fill x (S, D) and rs (K, S) from y (S, D)."""
    backwards = _make_radial(z0.dtype.type)
    layers, dim = z0.shape
    parts = threads.ranges(len(y), len(y) * layers * (dim + 10), 1)
    threads.run(lambda start, stop: backwards(y, z0, raw_alpha, raw_s, x, rs, start, stop), parts)
