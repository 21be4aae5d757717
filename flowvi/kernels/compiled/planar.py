"""Planar stacks on numpy arrays: the kernels of small D, or the Gram recurrence; over threads where it repays.

Every array is C-contiguous and of one dtype, float32 or float64: x, y, scores and their cotangents (S, D),
log_det (S,), w and u (K, D), b (K,), t (K, S). With one dimension more in front of every array, each datum has
layers of its own; a w of (1, K, D) then is shared by all data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flowvi.kernels.compiled import planar_each, planar_gram, planar_small, threads
from flowvi.kernels.compiled.inverse import planar as inverse
from flowvi.kernels.compiled.inverse_pullback import planar as inverse_pullback
from flowvi.kernels.compiled.planar_each import may_overwrite

__all__ = ["backward", "forward", "inverse", "inverse_pullback", "may_overwrite"]

MANY = 32
"""Particles for each datum from which its stack is worth the kernels of a shared one."""


def _parts(w: Any, size: int) -> list[tuple[int, int]]:
    layers, dim = w.shape
    return threads.ranges(size, size * layers * (dim + 2), planar_small.TILE)


def forward(
    x: Any, score: Any, sign: float, w: Any, u: Any, b: Any, softplus: bool,
    y: Any, log_det: Any, out_score: Any, t: Any,
) -> None:  # fmt: skip
    """Fill y, log_det, t and out_score (unless it is None) from x and sign * score, the score at x."""
    if w.ndim == 3:
        if x.shape[1] < MANY:
            planar_each.forward(x, score, sign, w, u, b, softplus, y, log_det, out_score, t)
            return
        for n in range(len(u)):
            score_n, out_n = (None, None) if out_score is None else (score[n], out_score[n])
            forward(x[n], score_n, sign, w[n % len(w)], u[n], b[n], softplus, y[n], log_det[n], out_n, t[n])
        return
    if w.shape[1] > planar_small.MAX_DIM:
        planar_gram.forward(x, score, sign, w, u, b, softplus, y, log_det, out_score, t)
        return
    kernel = planar_small.make_forward(w.shape[1], w.dtype.type, out_score is not None)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    parts = _parts(w, x.shape[0])
    if len(parts) == 1:
        kernel(x, score, sign, w, u, b, softplus, y, log_det, out_score, t, 0, x.shape[0])
        return
    threads.run(lambda i, j: kernel(x, score, sign, w, u, b, softplus, y, log_det, out_score, t, i, j), parts)


def backward(
    g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
    g_x: Any, g_w: Any, g_u: Any, g_b: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x, w, u and b; g_log_det None counts as zero."""
    if w.ndim == 3:
        if x.shape[1] < MANY:
            planar_each.backward(g_y, g_log_det, x, w, u, b, softplus, t, g_x, g_w, g_u, g_b)
            return
        g_each = g_w if len(w) == len(u) else np.empty_like(u)
        for n in range(len(u)):
            weight = None if g_log_det is None else g_log_det[n]
            grads = (g_x[n], g_each[n], g_u[n], g_b[n])
            backward(g_y[n], weight, x[n], w[n % len(w)], u[n], b[n], softplus, t[n], *grads)
        if g_each is not g_w:
            g_w[0] = g_each.sum(0)
        return
    if w.shape[1] > planar_small.MAX_DIM:
        planar_gram.backward(g_y, g_log_det, x, w, u, b, softplus, t, g_x, g_w, g_u, g_b)
        return
    kernel = planar_small.make_backward(w.shape[1], w.dtype.type, g_log_det is not None)
    weight = b if g_log_det is None else g_log_det  # b: a placeholder that isn't read
    g_q = np.empty_like(b)
    parts = _parts(w, x.shape[0])
    if len(parts) == 1:
        kernel(g_y, weight, x, w, u, b, softplus, t, g_x, g_w, g_u, g_b, g_q, 0, x.shape[0], True)
        return

    def task(start: int, stop: int) -> Any:
        part = [np.empty_like(a) for a in (g_w, g_u, g_b, g_q)]
        kernel(g_y, weight, x, w, u, b, softplus, t, g_x, *part, start, stop, False)
        return part

    each = threads.run(task, parts)
    g_w[:], g_u_hat, g_b[:], g_q[:] = (sum(part[1:], start=part[0]) for part in zip(*each, strict=True))
    planar_gram.finish(g_u_hat, g_q, w, u, softplus, g_w, g_u)
