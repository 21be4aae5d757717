r"""One affine autoregressive layer the fast way, network and all, on tiles of particles.

The mathematics is that of `flowvi.transforms.autoregressive`. A tile holds its particles by coordinate, in the layer's
ordering, (D, T). `tape` (tiles, rows, T) keeps the inputs of each dense layer, and x, e^l and dl/da.

`place` (L, 2) says where the weights and biases of each dense layer lie among all parameters; they are copied, masked,
to where `dense` (L, 5) says, and their gradients back.

The path score is a triangular solve, last coordinate first. Hidden units are sorted by how many coordinates they see,
`ends` (hidden layers, D): how many units see so many or fewer. So each unit's cotangent is found once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import threads
from flowvi.kernels.compiled.dense import NUM_IN, NUM_OUT, ROW, WEIGHT, deactivate, network, network_back, pullback
from flowvi.kernels.compiled.elementary import exp
from flowvi.kernels.compiled.jit import kernel, stamp
from flowvi.kernels.compiled.tanh import tanh


@cache
def _make_masks(dtype: type) -> Any:
    TAG = stamp()

    @kernel
    def masks(values: Any, place: Any, dense: Any, mask: Any, own: Any, back: bool) -> int:
        """Own = mask * values; with `back` values = mask * own."""
        for n in range(dense.shape[0]):
            for part, size in ((0, dense[n, NUM_IN] * dense[n, NUM_OUT]), (1, dense[n, NUM_OUT])):
                there, here = place[n, part], dense[n, WEIGHT + part]
                if back:
                    for q in range(size):
                        values[there + q] = mask[here + q] * own[here + q]
                else:
                    for q in range(size):
                        own[here + q] = mask[here + q] * values[there + q]
        return TAG

    return masks


@cache
def _make_forward(dtype: type, with_score: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def forward(
        x: Any, score: Any, sign: float, p: Any, dense: Any, order: Any, ends: Any, kind: int, clip: float, width: int,
        y: Any, log_det: Any, out_score: Any, tape: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        size, dim = x.shape
        columns, depth = tape.shape[2], dense.shape[0]
        pull, before = np.empty((dim, columns), F), np.empty((dim, columns), F)
        c_pull = np.empty((2 * dim, columns), F)  # of theta
        g = np.empty((depth, width, columns), F)  # of the hidden units
        volume = np.empty(columns, F)
        c_, per_clip = F(clip), F(1.0 / clip)
        kept = dense[depth - 1, ROW] + dense[depth - 1, NUM_IN]
        out = kept + 2 * dim  # x is the network's input, and not kept twice
        for tile in range(start, stop):
            rows = tape[tile]
            first = tile * columns
            valid = min(columns, size - first)
            for c in range(valid):
                volume[c] = F(0)
                for d in range(dim):
                    rows[d, c] = x[first + c, order[d]]
                    if with_score:
                        pull[d, c] = F(sign) * score[first + c, order[d]]
            network(p, dense, 0, depth, kind, rows, out, valid)
            for d in range(dim):
                for c in range(valid):
                    t = tanh(rows[out + 2 * d + 1, c] * per_clip)
                    scale = F(exp(np.float64(c_ * t)))
                    volume[c] += c_ * t
                    rows[kept + d, c] = scale
                    rows[kept + dim + d, c] = F(1) - t * t
                    rows[out + 2 * d, c] += rows[d, c] * scale
            if with_score:
                for i in range(dim - 1, -1, -1):
                    for c in range(valid):
                        before[i, c] = F(0)
                    if i < dim - 1:
                        low, high = (i + 1) * 2, dim * 2
                        above = c_pull
                        for n in range(depth - 1, 0, -1):
                            units = ends[n - 1, i], ends[n - 1, i + 1]
                            if units[1] > units[0]:
                                num_in = dense[n, NUM_IN]
                                pullback(p, dense[n, WEIGHT], num_in, units, (low, high), above, g[n], valid)
                                deactivate(kind, g[n], rows, dense[n, ROW], units, valid)
                            low, high = units[0], dense[n, NUM_IN]
                            above = g[n]
                        pullback(p, dense[0, WEIGHT], dim, (i, i + 1), (low, high), above, before, valid)
                    for c in range(valid):
                        old = pull[i, c] - before[i, c]
                        c_pull[2 * i, c] = old / rows[kept + i, c]
                        c_pull[2 * i + 1, c] = rows[kept + dim + i, c] * (F(1) + old * rows[i, c])
            for c in range(valid):
                log_det[first + c] = volume[c]
                for d in range(dim):
                    y[first + c, order[d]] = rows[out + 2 * d, c]
                    if with_score:
                        out_score[first + c, order[d]] = c_pull[2 * d, c]
        return TAG

    return forward


@cache
def _make_backward(dtype: type, with_log_det: bool) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, p: Any, dense: Any, order: Any, kind: int, width: int, tape: Any, g_x: Any, grad: Any,
        start: int, stop: int,
    ) -> int:  # fmt: skip
        size, dim = g_y.shape
        columns, depth = tape.shape[2], dense.shape[0]
        pull = np.empty((dim, columns), F)
        g, h = np.empty((width, columns), F), np.empty((width, columns), F)
        volume = np.empty(columns, F)
        kept = dense[depth - 1, ROW] + dense[depth - 1, NUM_IN]
        for q in range(len(grad)):
            grad[q] = F(0)
        for tile in range(start, stop):
            rows = tape[tile]
            first = tile * columns
            valid = min(columns, size - first)
            for c in range(valid):
                volume[c] = g_log_det[first + c] if with_log_det else F(0)
                for d in range(dim):
                    pull[d, c] = g_y[first + c, order[d]]
            for d in range(dim):
                for c in range(valid):
                    to_y = pull[d, c]
                    to_x = to_y * rows[kept + d, c]
                    to_l = to_x * rows[d, c]
                    if with_log_det:
                        to_l += volume[c]
                    g[2 * d, c] = to_y
                    g[2 * d + 1, c] = to_l * rows[kept + dim + d, c]
                    pull[d, c] = to_x
            g, h = network_back(p, dense, 0, depth, kind, rows, g, h, grad, True, valid)
            for c in range(valid):
                for d in range(dim):
                    g_x[first + c, order[d]] = pull[d, c] + g[d, c]
        return TAG

    return backward


def _parts(dense: Any, tape: Any) -> list[tuple[int, int]]:
    tiles, _, columns = tape.shape
    return threads.ranges(tiles, tiles * columns * int((dense[:, NUM_IN] * dense[:, NUM_OUT]).sum()) // 4, 1)


def forward(
    x: Any, score: Any, sign: float, values: Any, place: Any, mask: Any, p: Any, dense: Any, order: Any, ends: Any,
    kind: int, clip: float, width: int, y: Any, log_det: Any, out_score: Any, tape: Any,
) -> None:  # fmt: skip
    """Fill y (S, D), log_det (S,), out_score (unless it is None) and tape from x and sign * score, the score at x.

    Args:
        x: points, (S, D).
        score: (S, D).
        sign: 1 or -1.
        values: all parameters.
        place: (L, 2).
        mask: of the weights; 1 for biases.
        p: to fill with weights, masked, and biases.
        dense: the dense layers, (L, 5).
        order: (D,), the coordinates in the layer's ordering.
        ends: (hidden layers, D).
        kind: the activation.
        clip: of the log-scales.
        width: the most rows that a network's layer has.
        y: to fill.
        log_det: to fill.
        out_score: to fill.
        tape: to fill, (tiles, rows, T).
    """
    _make_masks(p.dtype.type)(values, place, dense, mask, p, False)
    kernel_ = _make_forward(p.dtype.type, out_score is not None)
    if out_score is None:
        score, out_score = x, y  # placeholders that aren't read
    args = (x, score, sign, p, dense, order, ends, kind, clip, width, y, log_det, out_score, tape)
    threads.run(lambda start, stop: kernel_(*args, start, stop), _parts(dense, tape))


def backward(
    g_y: Any, g_log_det: Any, values: Any, place: Any, mask: Any, p: Any, dense: Any, order: Any, kind: int, width: int,
    tape: Any, g_x: Any, grad: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x and, in `values`, to the network's parameters; g_log_det None is zero.

    `grad`, like p, is to fill with the gradient to what p holds.
    """
    kernel_ = _make_backward(p.dtype.type, g_log_det is not None)
    weight = p if g_log_det is None else g_log_det  # p: a placeholder that isn't read
    args = (g_y, weight, p, dense, order, kind, width, tape, g_x)
    threads.add_up(lambda start, stop, own: kernel_(*args, own, start, stop), _parts(dense, tape), grad)
    _make_masks(p.dtype.type)(values, place, dense, mask, grad, True)
