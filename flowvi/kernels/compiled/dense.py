"""Dense layers on a tile of particles, as helpers of kernels: the products of a small network with its points.

A tile is an array of rows, one for each unit, with a particle in every column: the loops run over particles, side by
side, over the first `size` of them. Weights (out, in), row by row, and biases lie in one flat array, the layer's at `w`
and `b`; `first` is where a layer's rows begin in the tile's array.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import helper
from flowvi.kernels.compiled.tanh import tanh

RELU, TANH, ELU = 1, 2, 3

NUM_IN, NUM_OUT, WEIGHT, BIAS, ROW = 0, 1, 2, 3, 4
"""Columns of a table of dense layers: sizes, places in the parameters, and the row of a tape where its input begins."""


@helper()
def product(
    p: Any, w: int, b: int, num_in: int, num_out: int, rows: Any, first: int, out: Any, start: int, size: int
) -> None:
    """Rows `start` and on of out: W h + b, of h, the rows `first` and on."""
    for o in range(num_out):
        bias = p[b + o]
        for c in range(size):
            out[start + o, c] = bias
    # Two outputs and four inputs at a time: six numbers are read for eight products.
    for o in range(0, num_out - num_out % 2, 2):
        one, two = w + o * num_in, w + (o + 1) * num_in
        x, y = start + o, start + o + 1
        for i in range(0, num_in - num_in % 4, 4):
            a0, a1, a2, a3 = p[one + i], p[one + i + 1], p[one + i + 2], p[one + i + 3]
            b0, b1, b2, b3 = p[two + i], p[two + i + 1], p[two + i + 2], p[two + i + 3]
            j = first + i
            for c in range(size):
                h0, h1, h2, h3 = rows[j, c], rows[j + 1, c], rows[j + 2, c], rows[j + 3, c]
                out[x, c] += a0 * h0 + a1 * h1 + a2 * h2 + a3 * h3
                out[y, c] += b0 * h0 + b1 * h1 + b2 * h2 + b3 * h3
        for i in range(num_in - num_in % 4, num_in):
            a, a_ = p[one + i], p[two + i]
            for c in range(size):
                h = rows[first + i, c]
                out[x, c] += a * h
                out[y, c] += a_ * h
    for o in range(num_out - num_out % 2, num_out):
        for i in range(num_in):
            a = p[w + o * num_in + i]
            for c in range(size):
                out[start + o, c] += a * rows[first + i, c]


@helper()
def pullback(
    p: Any, w: int, num_in: int, some: tuple[int, int], by: tuple[int, int], pull: Any, out: Any, size: int
) -> None:
    """Rows of out: W' g, of the rows of pull.

    Args:
        p: the parameters.
        w: where W begins.
        num_in: its columns.
        some: first and last (exclusive) of the inputs, and so of the rows of out.
        by: likewise of the outputs, and so of the rows of pull.
        pull: g.
        out: to fill.
        size: particles.
    """
    low, high = by
    fours = high - (high - low) % 4
    for i in range(some[0], some[1]):
        for c in range(size):
            out[i, c] = 0.0
    for i in range(some[0], some[1] - (some[1] - some[0]) % 2, 2):
        for o in range(low, fours, 4):
            q = w + o * num_in + i
            a0, a1, a2, a3 = p[q], p[q + num_in], p[q + 2 * num_in], p[q + 3 * num_in]
            b0, b1, b2, b3 = p[q + 1], p[q + num_in + 1], p[q + 2 * num_in + 1], p[q + 3 * num_in + 1]
            for c in range(size):
                g0, g1, g2, g3 = pull[o, c], pull[o + 1, c], pull[o + 2, c], pull[o + 3, c]
                out[i, c] += a0 * g0 + a1 * g1 + a2 * g2 + a3 * g3
                out[i + 1, c] += b0 * g0 + b1 * g1 + b2 * g2 + b3 * g3
        for o in range(fours, high):
            a, a_ = p[w + o * num_in + i], p[w + o * num_in + i + 1]
            for c in range(size):
                g = pull[o, c]
                out[i, c] += a * g
                out[i + 1, c] += a_ * g
    for i in range(some[1] - (some[1] - some[0]) % 2, some[1]):
        for o in range(low, fours, 4):
            q = w + o * num_in + i
            a0, a1, a2, a3 = p[q], p[q + num_in], p[q + 2 * num_in], p[q + 3 * num_in]
            for c in range(size):
                out[i, c] += a0 * pull[o, c] + a1 * pull[o + 1, c] + a2 * pull[o + 2, c] + a3 * pull[o + 3, c]
        for o in range(fours, high):
            a = p[w + o * num_in + i]
            for c in range(size):
                out[i, c] += a * pull[o, c]


@helper()
def to_weights(
    pull: Any, rows: Any, first: int, num_in: int, num_out: int, grad: Any, w: int, b: int, size: int
) -> None:
    """Add g h' to the weights' gradient, and the sum of g to the biases', of g, the first rows of pull."""
    zero = grad.dtype.type(0)  # a number of Python's own would make double precision of all
    for o in range(num_out):
        total = zero
        for c in range(size):
            total += pull[o, c]
        grad[b + o] += total
    for o in range(0, num_out - num_out % 2, 2):
        one, two = w + o * num_in, w + (o + 1) * num_in
        for i in range(0, num_in - num_in % 4, 4):
            s0, s1, s2, s3, t0, t1, t2, t3 = zero, zero, zero, zero, zero, zero, zero, zero
            j = first + i
            for c in range(size):
                g, g_ = pull[o, c], pull[o + 1, c]
                h0, h1, h2, h3 = rows[j, c], rows[j + 1, c], rows[j + 2, c], rows[j + 3, c]
                s0 += g * h0
                s1 += g * h1
                s2 += g * h2
                s3 += g * h3
                t0 += g_ * h0
                t1 += g_ * h1
                t2 += g_ * h2
                t3 += g_ * h3
            grad[one + i] += s0
            grad[one + i + 1] += s1
            grad[one + i + 2] += s2
            grad[one + i + 3] += s3
            grad[two + i] += t0
            grad[two + i + 1] += t1
            grad[two + i + 2] += t2
            grad[two + i + 3] += t3
        for i in range(num_in - num_in % 4, num_in):
            s0, t0 = zero, zero
            for c in range(size):
                s0 += pull[o, c] * rows[first + i, c]
                t0 += pull[o + 1, c] * rows[first + i, c]
            grad[one + i] += s0
            grad[two + i] += t0
    for o in range(num_out - num_out % 2, num_out):
        for i in range(num_in):
            t0 = zero
            for c in range(size):
                t0 += pull[o, c] * rows[first + i, c]
            grad[w + o * num_in + i] += t0


@helper()
def activate(kind: int, rows: Any, first: int, num: int, size: int) -> None:
    """The activation, in place."""
    zero = rows.dtype.type(0)
    for j in range(first, first + num):
        if kind == RELU:
            for c in range(size):
                a = rows[j, c]
                rows[j, c] = zero if a < zero else a
        elif kind == TANH:
            for c in range(size):
                rows[j, c] = tanh(rows[j, c])
        elif kind == ELU:
            for c in range(size):
                a = rows[j, c]
                rows[j, c] = a if a > zero else np.expm1(a)


@helper()
def deactivate(kind: int, pull: Any, rows: Any, first: int, some: tuple[int, int], size: int) -> None:
    """Multiply some rows of pull by the activation's slope, told from its values, which begin at row `first`."""
    zero, one = rows.dtype.type(0), rows.dtype.type(1)
    for j in range(some[0], some[1]):
        if kind == RELU:
            for c in range(size):
                pull[j, c] = zero if rows[first + j, c] <= zero else pull[j, c]
        elif kind == TANH:
            for c in range(size):
                h = rows[first + j, c]
                pull[j, c] -= pull[j, c] * h * h
        elif kind == ELU:
            for c in range(size):
                h = rows[first + j, c]
                pull[j, c] *= one if h > zero else one + h


@helper()
def network(p: Any, dense: Any, begin: int, end: int, kind: int, rows: Any, out: int, size: int) -> None:
    """The network of some dense layers, from where its input lies in the tile to its output's rows, `out` and on."""
    for n in range(begin, end):
        last = n == end - 1
        to = out if last else dense[n + 1, ROW]
        num_in, num_out = dense[n, NUM_IN], dense[n, NUM_OUT]
        product(p, dense[n, WEIGHT], dense[n, BIAS], num_in, num_out, rows, dense[n, ROW], rows, to, size)
        if not last:
            activate(kind, rows, to, num_out, size)


@helper()
def network_back(
    p: Any, dense: Any, begin: int, end: int, kind: int, rows: Any, g: Any, h: Any, grad: Any, learn: bool, size: int
) -> tuple[Any, Any]:
    """Pull a cotangent back through `network`.

    Args:
        p: the parameters.
        dense: the table of dense layers.
        begin: the first of them.
        end: the last (exclusive).
        kind: the activation.
        rows: the tile, as `network` left it.
        g: the cotangent of the output.
        h: memory like it.
        grad: to which the parameters' gradient is added.
        learn: whether it is; if not, `grad` isn't read.
        size: particles.

    Returns:
        The cotangent of the input, and the other of the two.
    """
    for n in range(end - 1, begin - 1, -1):
        num_in, num_out = dense[n, NUM_IN], dense[n, NUM_OUT]
        if learn:
            to_weights(g, rows, dense[n, ROW], num_in, num_out, grad, dense[n, WEIGHT], dense[n, BIAS], size)
        pullback(p, dense[n, WEIGHT], num_in, (0, num_in), (0, num_out), g, h, size)
        g, h = h, g
        if n > begin:
            deactivate(kind, g, rows, dense[n, ROW], (0, num_in), size)
    return g, h
