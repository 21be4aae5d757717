"""The inverses' gradient to y, on numpy arrays: J^-T (g - weight d log|det|/dx), layer by layer from x outwards.

The recurrence of the path score (`planar.stack_score`, `radial.stack_score`), with a weight for each particle and with
what the inverse kept. Shapes as in `inverse`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.constraint import constrain
from flowvi.kernels.compiled.inverse import run, with_front
from flowvi.kernels.compiled.jit import kernel, stamp
from flowvi.kernels.compiled.planar_gram import TILE
from flowvi.kernels.compiled.planar_small import at
from flowvi.kernels.compiled.radial_tiles import log_det_slope, positive


@cache
def _make_planar(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def pull(
        g: Any, weight: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any, out: Any,
        n_start: int, n_stop: int, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = u.shape
        u_hat, q = np.empty_like(u[0]), np.empty_like(b[0])
        s: Any = np.zeros(dim * TILE, F)
        c: Any = np.zeros(TILE, F)
        for n in range(n_start, n_stop):
            row = n if w.shape[0] > 1 else 0
            constrain(w[row], u[n], softplus, u_hat, q)
            for first in range(start, stop, TILE):
                size = min(TILE, stop - first)
                for d in range(dim):
                    for j in range(size):
                        s[at(d * TILE + j)] = g[n, first + j, d]
                for k in range(layers):
                    m = q[k] - F(1)
                    for j in range(size):
                        c[at(j)] = F(0)
                    for d in range(dim):
                        along = u_hat[k, d]
                        for j in range(size):
                            c[at(j)] += along * s[at(d * TILE + j)]
                    for j in range(size):
                        v = t[n, k, first + j]
                        h = F(1) - v * v
                        per_det = F(1) / (v * v + h * q[k])
                        c[at(j)] = h * (F(2) * v * m * weight[n, first + j] * per_det - c[at(j)]) * per_det
                    for d in range(dim):
                        into = w[row, k, d]
                        for j in range(size):
                            s[at(d * TILE + j)] += into * c[at(j)]
                for d in range(dim):
                    for j in range(size):
                        out[n, first + j, d] = s[at(d * TILE + j)]
        return TAG

    return pull


def planar(g: Any, weight: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any, out: Any) -> None:
    """Fill out (S, D) from g (S, D), weight (S,) and the inverse's t (K, S)."""
    pull = _make_planar(w.dtype.type)
    g, weight, w, u, b, t, out = with_front((g, weight, w, u, b, t, out), w.ndim == 3)
    _, layers, dim = w.shape
    run(lambda *part: pull(g, weight, w, u, b, softplus, t, out, *part), g.shape, layers * (2 * dim + 10), TILE)


@cache
def _make_radial(dtype: type) -> Any:
    F, TAG = dtype, stamp()

    @kernel
    def pull(
        g: Any, weight: Any, x: Any, z0: Any, raw_alpha: Any, raw_s: Any, rs: Any, out: Any,
        n_start: int, n_stop: int, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = z0.shape
        more = F(dim - 1)
        alphas, esses = np.empty(layers, F), np.empty(layers, F)
        z, s = np.empty(dim, F), np.empty(dim, F)
        for n in range(n_start, n_stop):
            for k in range(layers):
                alphas[k], esses[k] = positive(raw_alpha[n, k])[0], positive(raw_s[n, k])[0]
            for i in range(start, stop):
                for d in range(dim):
                    z[d], s[d] = x[n, i, d], g[n, i, d]
                for k in range(layers):
                    alpha, ess, r = alphas[k], esses[k], rs[n, k, i]
                    reach = alpha + r
                    gain = (r + ess) / reach
                    stretch = (alpha * ess + F(2) * alpha * r + r * r) / (reach * reach)
                    along = F(0)
                    for d in range(dim):
                        along += s[d] * (z[d] - z0[n, k, d])
                    per_r = F(1) / r if r > F(0) else F(0)  # at the centre every direction is as good
                    along *= per_r
                    slope = weight[n, i] * log_det_slope(r, alpha, ess, more, F)
                    bend = ((along - slope) / stretch - along / gain) * per_r
                    for d in range(dim):
                        o = z[d] - z0[n, k, d]
                        s[d] = s[d] / gain + bend * o
                        z[d] = z0[n, k, d] + gain * o
                for d in range(dim):
                    out[n, i, d] = s[d]
        return TAG

    return pull


def radial(g: Any, weight: Any, x: Any, z0: Any, raw_alpha: Any, raw_s: Any, rs: Any, out: Any) -> None:
    """Fill out (S, D) from g (S, D), weight (S,), and the inverse's x (S, D) and rs (K, S)."""
    pull = _make_radial(z0.dtype.type)
    arrays = with_front((g, weight, x, z0, raw_alpha, raw_s, rs, out), z0.ndim == 3)
    _, layers, dim = arrays[3].shape
    run(lambda *part: pull(*arrays, *part), arrays[0].shape, layers * (2 * dim + 10), 1)
