r"""Rational-quadratic splines on a tile of particles, as helpers of kernels; see `flowvi.transforms.spline`.

A tile is as in `dense`. The raw parameters of the splines of a layer are rows of it, 3 K - 1 for each coordinate that
moves; what derivatives are made of is kept in `spline_rows` rows of each.

Numbers that go through one loop lie in arrays of their own: of rows of one array the compiler doesn't know that they
are apart, and from a handful on it doesn't ask.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flowvi.kernels.compiled.elementary import exp, log
from flowvi.kernels.compiled.jit import helper
from flowvi.kernels.tiles import DAMPING, spline_rows

kept_rows = helper()(spline_rows)


@helper()
def spline_forward(
    rows: Any, out: int, kept: int, moves: int, num_bins: int, bound: float, min_share: float, min_slope: float,
    z: Any, at: Any, first: int, volume: Any, size: int,
) -> None:  # fmt: skip
    """Move rows at[first], ... of z, add to volume, and keep what there is to keep.

    Args:
        rows: the tile.
        out: where the raw parameters begin.
        kept: where to keep things.
        moves: how many coordinates move.
        num_bins: K.
        bound: B.
        min_share: of a bin.
        min_slope: of a knot.
        z: points (D, T).
        at: numbers of coordinates.
        first: the first in `at` that moves.
        volume: log|det| so far, (T,).
        size: particles.
    """
    F = rows.dtype.type
    columns, per, per_kept = rows.shape[1], 3 * num_bins - 1, kept_rows(num_bins)
    limit, damping, least_slope = F(bound), F(DAMPING), F(min_slope)
    half = F(0.5 - 0.5 * min_slope)
    wide, least = F(2 * bound * (1 - min_share)), F(2 * bound * min_share / num_bins)
    one: Any = np.empty(columns, rows.dtype)
    v, x, x0, y0 = one, np.empty_like(one), np.empty_like(one), np.empty_like(one)
    w, h, d0, d1 = np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
    place, top, total, left = np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
    image, slope_, inside = np.empty_like(one), np.empty_like(one), np.empty_like(one)
    a0, a1, a2, a3, a4 = (
        np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
    )  # fmt: skip
    b0, b1, b2, b3, b4 = (
        np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one), np.empty_like(one)
    )  # fmt: skip
    edges, knots = np.empty((2 * num_bins, columns), rows.dtype), np.empty((num_bins + 1, columns), rows.dtype)
    for j in range(moves):
        raw, base, d = out + j * per, kept + j * per_kept, at[first + j]
        for c in range(size):
            v[c] = z[d, c]
            low = -limit if v[c] < -limit else v[c]
            x[c] = limit if low > limit else low
        for group in range(2):
            begin, to, edge = raw + group * num_bins, base + group * num_bins, group * num_bins
            for c in range(size):
                top[c], total[c], left[c] = rows[begin, c], F(0), -limit
            for b in range(1, num_bins):
                for c in range(size):
                    a = rows[begin + b, c]
                    top[c] = a if a > top[c] else top[c]
            for b in range(num_bins):
                for c in range(size):
                    share = F(exp(np.float64((rows[begin + b, c] - top[c]) * damping)))
                    rows[to + b, c] = share
                    total[c] += share
            for c in range(size):
                total[c] = F(1) / total[c]
            for b in range(num_bins):
                for c in range(size):
                    share = rows[to + b, c] * total[c]
                    rows[to + b, c] = share
                    edges[edge + b, c] = left[c]
                    left[c] += share * wide + least
        for c in range(size):
            knots[0, c], knots[num_bins, c], place[c] = F(1), F(1), F(0)
        for k in range(num_bins - 1):
            for c in range(size):
                a = rows[raw + 2 * num_bins + k, c] * damping
                root = np.sqrt(a * a + F(4))
                rising = (a + root) * half
                knots[k + 1, c] = rising + least_slope
                rows[base + 2 * num_bins + k, c] = rising * damping / root
        for b in range(1, num_bins):
            for c in range(size):
                place[c] += F(1) if x[c] >= edges[b, c] else F(0)
        for b in range(num_bins):
            number = F(b)
            for c in range(size):
                hit = place[c] == number
                x0[c] = edges[b, c] if hit else x0[c]
                y0[c] = edges[num_bins + b, c] if hit else y0[c]
            for c in range(size):
                hit = place[c] == number
                w[c] = rows[base + b, c] * wide + least if hit else w[c]
                h[c] = rows[base + num_bins + b, c] * wide + least if hit else h[c]
            for c in range(size):
                hit = place[c] == number
                d0[c] = knots[b, c] if hit else d0[c]
                d1[c] = knots[b + 1, c] if hit else d1[c]
        for c in range(size):
            s, xi = h[c] / w[c], (x[c] - x0[c]) / w[c]
            co = F(1) - xi
            p, q = d0[c] * co + s * xi, d1[c] * xi + s * co
            xp = xi * p
            e, m = xp + co * q, xi * q + co * p
            r, ratio = xp / e, s / e
            slope = ratio * ratio * m
            here = F(1) if x[c] == v[c] else F(0)
            inside[c] = here
            image[c] = y0[c] + h[c] * r if x[c] == v[c] else v[c]
            slope_[c] = slope if x[c] == v[c] else F(1)
            xx, cc = xi * xi, co * co
            even, te = xx + cc, xi * co / e
            by_xi = F(2) * ((q - p) / m + (d0[c] + d1[c] - F(2) * s) / e * (xi - co))
            by_s = F(2) * (F(1) / s + xi * co / m - even / e)
            a = s / e * (xx - r * even)
            hte = h[c] * te
            a0[c], a1[c], a2[c] = here * slope, -here * (s * a + slope * xi), here * (r + a)
            a3[c], a4[c] = here * (hte - hte * r), -here * hte * r
            b0[c], b1[c], b2[c] = here * by_xi / w[c], -here * (s * by_s + xi * by_xi) / w[c], here * by_s / w[c]
            b3[c], b4[c] = here * (cc / m - F(2) * te), here * (xx / m - F(2) * te)
        for c in range(size):
            volume[c] += F(log(np.float64(slope_[c])))
        where = base + 3 * num_bins - 1
        for c in range(size):
            z[d, c] = image[c]
        kept_values = (place, a0, a1, a2, a3, a4, b0, b1, b2, b3, b4, inside)
        for i in range(len(kept_values)):
            value = kept_values[i]
            for c in range(size):
                rows[where + i, c] = value[c]


@helper()
def spline_pull(
    rows: Any, kept: int, moves: int, num_bins: int, bound: float, min_share: float, pull: Any, at: Any, first: int,
    to_log: Any, as_score: bool, g: Any, size: int,
) -> None:  # fmt: skip
    """Pull cotangents back through the splines.

    Args:
        rows: the tile, as `spline_forward` left it.
        kept: where that kept things.
        moves: how many coordinates move.
        num_bins: K.
        bound: B.
        min_share: of a bin.
        pull: cotangents of y (D, T), which become those of x; with `as_score` the score at x, which becomes that at y.
        at: numbers of coordinates.
        first: the first in `at` that moves.
        to_log: the cotangent of log|det|, (T,).
        as_score: whether that of y is the new score.
        g: to fill with the cotangents of the raw parameters.
        size: particles.
    """
    F = rows.dtype.type
    columns, per, per_kept = rows.shape[1], 3 * num_bins - 1, kept_rows(num_bins)
    scale = F(2 * bound * DAMPING * (1 - min_share))
    one: Any = np.empty(columns, rows.dtype)
    to_y, place, total, lefts = one, np.empty_like(one), np.empty_like(one), np.empty_like(one)
    five = np.empty((5, columns), rows.dtype)
    for j in range(moves):
        base, d = kept + j * per_kept, at[first + j]
        where = base + 3 * num_bins - 1
        for c in range(size):
            place[c] = rows[where, c]
        if as_score:
            for c in range(size):
                to_y[c] = (pull[d, c] - rows[where + 6, c]) / (rows[where + 1, c] + F(1) - rows[where + 11, c])
            for c in range(size):
                pull[d, c] = to_y[c]
        else:
            for c in range(size):
                to_y[c] = pull[d, c]
        for i in range(5):
            for c in range(size):
                five[i, c] = rows[where + 1 + i, c] * to_y[c] + rows[where + 6 + i, c] * to_log[c]
        if not as_score:
            for c in range(size):
                pull[d, c] = five[0, c] + (F(1) - rows[where + 11, c]) * to_y[c]
        for group in range(2):
            share, into = base + group * num_bins, j * per + group * num_bins
            for c in range(size):
                lefts[c], total[c] = -five[0, c] if group == 0 else to_y[c] * rows[where + 11, c], F(0)
            for b in range(num_bins):
                number = F(b)
                for c in range(size):
                    a = lefts[c] if place[c] > number else F(0)
                    a = five[1 + group, c] if place[c] == number else a
                    weighted = a * rows[share + b, c]
                    g[into + b, c] = weighted
                    total[c] += weighted
            for b in range(num_bins):
                for c in range(size):
                    g[into + b, c] = (g[into + b, c] - rows[share + b, c] * total[c]) * scale
        for k in range(num_bins - 1):
            low, high = F(k), F(k + 1)
            for c in range(size):
                a = five[3, c] if place[c] == high else F(0)
                a = five[4, c] if place[c] == low else a
                g[j * per + 2 * num_bins + k, c] = a * rows[base + 2 * num_bins + k, c]
