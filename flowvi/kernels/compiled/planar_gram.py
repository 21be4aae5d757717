r"""Planar stacks of larger D: products of matrices over D by torch, and the recurrence over K by a kernel.

With A = W z_0 + b and the Gram matrix G = W Û^T, a_k = A_k + sum_{j<k} G_kj t_j (see `flowvi.kernels.planar`).
The recurrence costs K^2 / 2 for each particle, so a long stack is walked in chunks of `CHUNK` layers: the cost
stays proportional to K.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.constraint import constrain, constrain_backward
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.planar_small import at, take_logs
from flowvi.kernels.compiled.tanh import tanh

TILE = 64
CHUNK = 64


@helper()
def add_rows(out: Any, o: int, rows: Any, first: int, last: int, g: Any, n: int, transpose: bool, k: int) -> None:
    """Add to n numbers from out[o] on: the sum over rows i in [first, last) of g[k, i] (or g[i, k]) times row i."""
    i = first
    while i + 4 <= last:  # four at a time: one load and store of `out` for four products
        if transpose:
            a, b, c, d = g[i, k], g[i + 1, k], g[i + 2, k], g[i + 3, k]
        else:
            a, b, c, d = g[k, i], g[k, i + 1], g[k, i + 2], g[k, i + 3]
        r = i * TILE
        for j in range(n):
            out[at(o + j)] += (
                a * rows[at(r + j)]
                + b * rows[at(r + TILE + j)]
                + c * rows[at(r + 2 * TILE + j)]
                + d * rows[at(r + 3 * TILE + j)]
            )
        i += 4
    while i < last:
        a = g[i, k] if transpose else g[k, i]
        for j in range(n):
            out[at(o + j)] += a * rows[at(i * TILE + j)]
        i += 1


@cache
def _make_constrain(dtype: type) -> tuple[Any, Any]:
    F, TAG = dtype, stamp()

    @kernel
    def forward(w: Any, u: Any, softplus: bool, u_hat: Any, q: Any) -> int:
        constrain(w, u, softplus, u_hat, q)
        return TAG

    @kernel
    def backward(g_u_hat: Any, g_q: Any, w: Any, u: Any, softplus: bool, g_w: Any, g_u: Any) -> int:
        constrain_backward(g_u_hat, g_q, w, u, softplus, g_w, g_u, True)
        return TAG + F(0)

    return forward, backward


def finish(*args: Any) -> None:
    """Add the constraint's part to g_w and fill g_u: `constrain_backward` as a kernel of its own."""
    _make_constrain(args[0].dtype.type)[1](*args)


@cache
def _make_forward(dtype: type, with_score: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def forward(t: Any, c: Any, gram: Any, q: Any, b: Any, log_det: Any, start: int, stop: int) -> int:
        """t: W z_0 on the way in; c: Û score on the way in, the score's coefficients on the way out."""
        layers = len(b)
        ts: Any = np.zeros((layers + 1) * TILE, F)  # the last row: the product of determinants
        cs: Any = np.zeros(layers * TILE if with_score else 1, F)
        work: Any = np.zeros(2 * TILE, F)
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for j in range(n):
                ts[at(layers * TILE + j)] = F(1)
            low, high = 1.0, 1.0
            for k in range(layers):
                take, low, high = take_logs(q, k, low, high)
                if take:
                    for j in range(n):
                        log_det[first + j] += np.log(ts[at(layers * TILE + j)])
                        ts[at(layers * TILE + j)] = F(1)
                for j in range(n):
                    work[at(j)] = t[k, first + j] + b[k]
                add_rows(work, 0, ts, 0, k, gram, n, False, k)
                if with_score:
                    for j in range(n):
                        work[at(TILE + j)] = c[k, first + j]
                    add_rows(work, TILE, cs, 0, k, gram, n, True, k)
                m = q[k] - F(1)
                for j in range(n):
                    v = tanh(work[at(j)])
                    h = F(1) - v * v
                    det = v * v + h * q[k]
                    work[at(j)] = v
                    ts[at(layers * TILE + j)] *= det
                    if with_score:
                        per_det = F(1) / det
                        work[at(TILE + j)] = (F(2) * v * h * m * per_det - h * work[at(TILE + j)]) * per_det
                for j in range(n):
                    ts[at(k * TILE + j)] = work[at(j)]
                    t[k, first + j] = work[at(j)]
                if with_score:
                    for j in range(n):
                        cs[at(k * TILE + j)] = work[at(TILE + j)]
                        c[k, first + j] = work[at(TILE + j)]
            for j in range(n):
                log_det[first + j] += np.log(ts[at(layers * TILE + j)])
        return TAG

    return forward


@cache
def _make_backward(dtype: type, with_log_det: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def backward(g_a: Any, t: Any, gram: Any, q: Any, g_log_det: Any, g_b: Any, g_q: Any, start: int, stop: int) -> int:
        """g_a: Û g_y^T on the way in, the cotangents of a = w.z + b on the way out; adds to g_b and g_q."""
        layers = len(q)
        rows: Any = np.zeros(layers * TILE, F)
        work: Any = np.zeros(2 * TILE, F)
        for first in range(start, stop, TILE):
            n = min(TILE, stop - first)
            for k in range(layers - 1, -1, -1):
                for j in range(n):
                    work[at(j)] = g_a[k, first + j]
                    work[at(TILE + j)] = t[k, first + j]
                add_rows(work, 0, rows, k + 1, layers, gram, n, True, k)
                twice_one_minus_q = F(2) * (F(1) - q[k])
                sum_b, sum_q = F(0), F(0)
                for j in range(n):
                    v = work[at(TILE + j)]
                    h = F(1) - v * v
                    a = work[at(j)]
                    if with_log_det:
                        ratio = g_log_det[first + j] / (v * v + h * q[k])
                        a += v * ratio * twice_one_minus_q
                        sum_q += h * ratio
                    a *= h
                    sum_b += a
                    work[at(j)] = a
                for j in range(n):
                    rows[at(k * TILE + j)] = work[at(j)]
                    g_a[k, first + j] = work[at(j)]
                g_b[k] += sum_b
                g_q[k] += sum_q
        return TAG

    return backward


def _tensors(*arrays: Any) -> list[Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def prepare(w: Any, u: Any, b: Any, softplus: bool) -> tuple[Any, Any]:
    """û (K, D) and q = 1 + m (K,) of raw parameters."""
    u_hat, q = np.empty_like(w), np.empty_like(b)
    _make_constrain(w.dtype.type)[0](w, u, softplus, u_hat, q)
    return u_hat, q


def _chunks(layers: int) -> list[slice]:
    return [slice(k, min(k + CHUNK, layers)) for k in range(0, layers, CHUNK)]


def _parts(size: int, layers: int) -> list[tuple[int, int]]:
    return threads.ranges(size, size * layers * (2 + min(layers, CHUNK) // 4), TILE)


def forward(
    x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
    y: Any, log_det: Any, out_score: Any, t: Any,
) -> None:  # fmt: skip
    """As the forward kernel of `planar_small`; out_score None leaves the score out."""
    size, dtype, with_score = x.shape[0], w.dtype.type, out_score is not None
    u_hat, q = prepare(w, u, b, softplus)
    log_det[:] = 0
    kernel_ = _make_forward(dtype, with_score)
    x_, y_, w_, u_hat_, t_ = _tensors(x, y, w, u_hat, t)
    if with_score:
        score_, out_ = _tensors(score, out_score)
        torch.mul(score_, sign, out=out_)
    for n, chunk in enumerate(_chunks(len(b))):
        wc, uc, tc = w_[chunk], u_hat_[chunk], t_[chunk]
        torch.mm(wc, (y_ if n else x_).mT, out=tc)
        gram = torch.mm(wc, uc.mT).numpy()
        c_ = torch.mm(uc, out_.mT) if with_score else tc
        c = c_.numpy()

        def task(start: int, stop: int, c: Any = c, gram: Any = gram, chunk: slice = chunk) -> None:
            kernel_(t[chunk], c, gram, q[chunk], b[chunk], log_det, start, stop)

        threads.run(task, _parts(size, len(b)))
        if n:
            y_.addmm_(tc.mT, uc)
        else:
            torch.addmm(x_, tc.mT, uc, out=y_)
        if with_score:
            out_.addmm_(c_.mT, wc)


def backward(
    g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
    g_x: Any, g_w: Any, g_u: Any, g_b: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x, w, u and b; g_log_det None counts as zero."""
    size, dtype = x.shape[0], w.dtype.type
    u_hat, q = prepare(w, u, b, softplus)
    kernel_ = _make_backward(dtype, g_log_det is not None)
    g_q, g_u_hat = np.zeros_like(b), np.empty_like(w)
    g_b[:] = 0
    x_, w_, u_hat_, t_, cot, g_x_, g_w_, g_u_hat_ = _tensors(x, w, u_hat, t, g_y, g_x, g_w, g_u_hat)
    chunks = _chunks(len(b))
    inputs = [x_]  # what each chunk was given
    for chunk in chunks[:-1]:
        inputs.append(torch.addmm(inputs[-1], t_[chunk].mT, u_hat_[chunk]))
    weight = q if g_log_det is None else g_log_det  # q: a placeholder that isn't read
    for chunk, z in zip(reversed(chunks), reversed(inputs), strict=True):
        wc, uc, tc = w_[chunk], u_hat_[chunk], t_[chunk]
        gram = torch.mm(wc, uc.mT)
        g_a = torch.mm(uc, cot.mT)

        def task(start: int, stop: int, g_a: Any = g_a, gram: Any = gram, chunk: slice = chunk) -> Any:
            part_b, part_q = np.zeros_like(b[chunk]), np.zeros_like(q[chunk])
            kernel_(g_a.numpy(), t[chunk], gram.numpy(), q[chunk], weight, part_b, part_q, start, stop)
            return part_b, part_q

        for part_b, part_q in threads.run(task, _parts(size, len(b))):
            g_b[chunk] += part_b
            g_q[chunk] += part_q
        g_gram = torch.mm(g_a, tc.mT).tril_(-1)
        torch.mm(g_a, z, out=g_w_[chunk]).addmm_(g_gram, uc)
        torch.mm(tc, cot, out=g_u_hat_[chunk]).addmm_(g_gram.mT, wc)
        cot = torch.addmm(cot, g_a.mT, wc, out=g_x_)
    finish(g_u_hat, g_q, w, u, softplus, g_w, g_u)
