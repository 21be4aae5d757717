"""The planar constraint (w, u) -> (û, 1 + m) and its transpose, for kernels; the mathematics is in `planar`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import helper
from flowvi.kernels.planar import _FADE as FADE
from flowvi.kernels.planar import _TINY as TINY


@helper()
def one_plus_m(s: Any, softplus: bool) -> tuple[Any, Any, Any]:
    """1 + m(s), m(s) - s and dm/ds of one layer, in double precision: there are only K of them."""
    s = np.float64(s)
    if softplus:
        tail = math.log1p(math.exp(-abs(s)))
        value, slope = tail + (s if s > 0.0 else 0.0), 1.0 / (1.0 + math.exp(-s))
        value = s if math.isnan(s) else max(value, TINY)
        return value, tail + (-s if s < 0.0 else 0.0) - 1.0, slope
    root = math.sqrt(s * s + 4.0)
    size = (abs(s) + root) / 2.0
    value = size if s >= 0.0 else 1.0 / size
    return value, (s * s / (root + 2.0) - s) / 2.0, value / root


@helper()
def weights(s: Any, square: Any, softplus: bool) -> tuple[Any, Any, Any]:
    """Share, along and q with û = share u + along w and q = 1 + m, of a layer with s = w . u and square = |w|^2."""
    size = FADE if square < FADE else np.float64(square)
    fade = np.float64(square) / size
    value, m_minus_s, _ = one_plus_m(s, softplus)
    return fade, m_minus_s / size, (1.0 - fade) + fade * value


@helper()
def weights_backward(s: Any, square: Any, g_u: Any, g_w: Any, g_q: Any, softplus: bool) -> tuple[Any, Any]:
    """What w . u and |w|^2 get where û gets a gradient with these products with u and w, and q gets g_q."""
    size = FADE if square < FADE else np.float64(square)
    fade = np.float64(square) / size
    value, m_minus_s, slope = one_plus_m(s, softplus)
    g_s = g_w * (slope - 1.0) / size + g_q * fade * slope
    small = (g_u + g_q * (value - 1.0)) / FADE
    return g_s, small if square < FADE else -np.float64(g_w) * m_minus_s / (size * size)


@helper()
def constrain(w: Any, u: Any, softplus: bool, u_hat: Any, q: Any) -> None:
    """Fill û (K, D) and q = 1 + m (K,) of the layers w, u (K, D)."""
    layers, dim = w.shape
    for k in range(layers):
        s, square = w.dtype.type(0), w.dtype.type(0)
        for d in range(dim):
            s += w[k, d] * u[k, d]
            square += w[k, d] * w[k, d]
        share, along, q[k] = weights(s, square, softplus)
        by_u, by_w = w.dtype.type(share), w.dtype.type(along)
        for d in range(dim):
            u_hat[k, d] = by_u * u[k, d] + by_w * w[k, d]


@helper()
def constrain_backward(g_u_hat: Any, g_q: Any, w: Any, u: Any, softplus: bool, g_w: Any, g_u: Any, start: bool) -> None:
    """Add to g_w (K, D) and fill g_u (K, D) from the gradients of û (K, D) and q (K,).

    With `start` g_w holds a gradient already; otherwise it is filled.
    """
    layers, dim = w.shape
    zero = w.dtype.type(0)
    for k in range(layers):
        s, square, g_pull, g_share = zero, zero, zero, zero
        for d in range(dim):
            s += w[k, d] * u[k, d]
            square += w[k, d] * w[k, d]
            g_pull += g_u_hat[k, d] * w[k, d]
            g_share += g_u_hat[k, d] * u[k, d]
        g_s, g_square = weights_backward(s, square, g_share, g_pull, g_q[k], softplus)
        fade, pulled, _ = weights(s, square, softplus)
        share, pull = w.dtype.type(fade), w.dtype.type(pulled)
        along_u, along_w = w.dtype.type(g_s), w.dtype.type(2.0 * g_square)
        for d in range(dim):
            old = g_w[k, d] if start else zero
            g_w[k, d] = old + pull * g_u_hat[k, d] + along_u * u[k, d] + along_w * w[k, d]
            g_u[k, d] = share * g_u_hat[k, d] + along_u * w[k, d]
