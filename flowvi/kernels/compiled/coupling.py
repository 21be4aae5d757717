r"""Coupling layers, networks and all, on tiles of particles; see `flowvi.transforms.coupling`.

A tile holds its particles by coordinate, (D, T), and goes through all K layers at once. What the way back needs is kept
in `tape` (tiles, rows, T): the inputs of each dense layer, for an affine layer what it moved (x), by how much (e^l) and
dl/da, and for a spline what `spline` says. `plan` (K, 6) and `dense` (all dense layers, 5) say where everything lies;
the columns have names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.dense import BIAS, NUM_IN, NUM_OUT, ROW, WEIGHT, network, network_back
from flowvi.kernels.compiled.elementary import exp
from flowvi.kernels.compiled.jit import kernel, stamp
from flowvi.kernels.compiled.spline import spline_forward, spline_pull
from flowvi.kernels.compiled.tanh import tanh

ADDITIVE, AFFINE, SPLINE = 0, 1, 2
"""What moves a coordinate; `fixed` holds the clip of an affine one, and a spline's K, B, min_share and min_slope."""

STAYS, MOVES, FIRST, DEPTH, KEPT, OUT = 0, 1, 2, 3, 4, 5
"""Of `plan`: how many coordinates stay and move (those of the layer's row of `order`, in that order), its first dense
layer and their number, and the tape's rows of what is kept of its map, and of the network's output."""


@cache
def _make_forward(dtype: type, tau: int, with_score: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def forward(
        x: Any, score: Any, sign: float, p: Any, plan: Any, dense: Any, order: Any, kind: int, fixed: Any, width: int,
        y: Any, log_det: Any, out_score: Any, tape: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        size, dim = x.shape
        columns = tape.shape[2]
        z, pull = np.empty((dim, columns), F), np.empty((dim, columns), F)
        g, h = np.empty((width, columns), F), np.empty((width, columns), F)
        volume = np.empty(columns, F)
        c_, per_clip, ones = F(fixed[0]), F(1.0 / fixed[0]), np.ones(columns, F)
        for tile in range(start, stop):
            rows = tape[tile]
            first = tile * columns
            valid = min(columns, size - first)
            for c in range(valid):
                for d in range(dim):
                    z[d, c] = x[first + c, d]
                    if with_score:
                        pull[d, c] = F(sign) * score[first + c, d]
            for c in range(valid):
                volume[c] = F(0)
            for k in range(plan.shape[0]):
                stays, moves, begin, depth = plan[k, STAYS], plan[k, MOVES], plan[k, FIRST], plan[k, DEPTH]
                kept, out = plan[k, KEPT], plan[k, OUT]
                for j in range(stays):
                    for c in range(valid):
                        rows[dense[begin, ROW] + j, c] = z[order[k, j], c]
                network(p, dense, begin, begin + depth, kind, rows, out, valid)
                if tau == SPLINE:
                    bins, bound, share = int(fixed[0]), fixed[1], fixed[2]
                    spline_forward(
                        rows, out, kept, moves, bins, bound, share, fixed[3], z, order[k], stays, volume, valid
                    )
                    if with_score:
                        spline_pull(rows, kept, moves, bins, bound, share, pull, order[k], stays, ones, True, g, valid)
                if tau == AFFINE:
                    for j in range(moves):
                        d = order[k, stays + j]
                        for c in range(valid):
                            t = tanh(rows[out + 2 * j + 1, c] * per_clip)
                            scale = F(exp(np.float64(c_ * t)))
                            at = z[d, c]
                            volume[c] += c_ * t
                            rows[kept + j, c] = at
                            rows[kept + moves + j, c] = scale
                            rows[kept + 2 * moves + j, c] = F(1) - t * t
                            z[d, c] = rows[out + 2 * j, c] + at * scale
                        if with_score:  # a loop over more arrays would not be one over vectors
                            for c in range(valid):
                                old = pull[d, c]
                                g[2 * j, c] = old / rows[kept + moves + j, c]
                                g[2 * j + 1, c] = rows[kept + 2 * moves + j, c] * (F(1) + old * rows[kept + j, c])
                            for c in range(valid):
                                pull[d, c] = g[2 * j, c]
                if tau == ADDITIVE:
                    for j in range(moves):
                        d = order[k, stays + j]
                        for c in range(valid):
                            z[d, c] += rows[out + j, c]
                            if with_score:
                                g[j, c] = pull[d, c]
                if with_score:
                    g, h = network_back(p, dense, begin, begin + depth, kind, rows, g, h, p, False, valid)
                    for j in range(stays):
                        d = order[k, j]
                        for c in range(valid):
                            pull[d, c] -= g[j, c]
            for c in range(valid):
                log_det[first + c] = volume[c]
                for d in range(dim):
                    y[first + c, d] = z[d, c]
                    if with_score:
                        out_score[first + c, d] = pull[d, c]
        return TAG

    return forward


@cache
def _make_backward(dtype: type, tau: int, with_log_det: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, p: Any, plan: Any, dense: Any, order: Any, kind: int, fixed: Any, width: int,
        tape: Any, g_x: Any, grad: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        size, dim = g_y.shape
        columns = tape.shape[2]
        pull = np.empty((dim, columns), F)
        g, h = np.empty((width, columns), F), np.empty((width, columns), F)
        volume = np.empty(columns, F)
        for n in range(dense.shape[0]):
            for q in range(dense[n, NUM_IN] * dense[n, NUM_OUT]):
                grad[dense[n, WEIGHT] + q] = F(0)
            for q in range(dense[n, NUM_OUT]):
                grad[dense[n, BIAS] + q] = F(0)
        for tile in range(start, stop):
            rows = tape[tile]
            first = tile * columns
            valid = min(columns, size - first)
            for c in range(valid):
                volume[c] = g_log_det[first + c] if with_log_det else F(0)
                for d in range(dim):
                    pull[d, c] = g_y[first + c, d]
            for k in range(plan.shape[0] - 1, -1, -1):
                stays, moves, begin, depth = plan[k, STAYS], plan[k, MOVES], plan[k, FIRST], plan[k, DEPTH]
                kept = plan[k, KEPT]
                if tau == SPLINE:
                    bins, bound, share = int(fixed[0]), fixed[1], fixed[2]
                    spline_pull(rows, kept, moves, bins, bound, share, pull, order[k], stays, volume, False, g, valid)
                if tau == AFFINE:
                    for j in range(moves):
                        d = order[k, stays + j]
                        for c in range(valid):
                            to_y = pull[d, c]
                            to_x = to_y * rows[kept + moves + j, c]
                            to_l = to_x * rows[kept + j, c]
                            if with_log_det:
                                to_l += volume[c]
                            g[2 * j, c] = to_y
                            g[2 * j + 1, c] = to_l * rows[kept + 2 * moves + j, c]
                            pull[d, c] = to_x
                if tau == ADDITIVE:
                    for j in range(moves):
                        d = order[k, stays + j]
                        for c in range(valid):
                            g[j, c] = pull[d, c]
                g, h = network_back(p, dense, begin, begin + depth, kind, rows, g, h, grad, True, valid)
                for j in range(stays):
                    d = order[k, j]
                    for c in range(valid):
                        pull[d, c] += g[j, c]
            for c in range(valid):
                for d in range(dim):
                    g_x[first + c, d] = pull[d, c]
        return TAG

    return backward


def _parts(plan: Any, dense: Any, tape: Any) -> list[tuple[int, int]]:
    tiles, _, columns = tape.shape
    work = int((dense[:, NUM_IN] * dense[:, NUM_OUT]).sum()) + int(plan[:, :MOVES].sum())
    return threads.ranges(tiles, tiles * columns * work // 4, 1)


def forward(
    x: Any, score: Any, sign: float, p: Any, plan: Any, dense: Any, order: Any, kind: int, tau: int, fixed: Any,
    width: int, y: Any, log_det: Any, out_score: Any, tape: Any,
) -> None:  # fmt: skip
    """Fill y (S, D), log_det (S,), out_score (unless it is None) and tape from x and sign * score, the score at x.

    Args:
        x: points, (S, D).
        score: (S, D).
        sign: 1 or -1.
        p: all parameters.
        plan: (K, 6).
        dense: (all dense layers, 5).
        order: (K, D), the coordinates of each layer: those that stay, then those that move.
        kind: the activation.
        tau: what moves a coordinate.
        fixed: the numbers that belong to it, (4,) in float64.
        width: the most rows that a network's layer has.
        y: to fill.
        log_det: to fill.
        out_score: to fill.
        tape: to fill, (tiles, rows, T).
    """
    kernel_ = _make_forward(p.dtype.type, tau, out_score is not None)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    args = (x, score, sign, p, plan, dense, order, kind, fixed, width, y, log_det, out_score, tape)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(plan, dense, tape))


def backward(
    g_y: Any, g_log_det: Any, p: Any, plan: Any, dense: Any, order: Any, kind: int, tau: int, fixed: Any, width: int,
    tape: Any, g_x: Any, grad: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x and, in `grad`, which lies as p does, to the networks; g_log_det None is zero."""
    kernel_ = _make_backward(p.dtype.type, tau, g_log_det is not None)
    weight = p if g_log_det is None else g_log_det  # p: a placeholder that isn't read
    args = (g_y, weight, p, plan, dense, order, kind, fixed, width, tape, g_x)
    threads.add_up(lambda start, stop, own: kernel_(*args, own, start, stop), _parts(plan, dense, tape), grad)
