"""What a training step does beside the flow, each as one loop: base density, cotangents, affine map.

For a few hundred numbers a torch operation costs more to call than to compute; these replace about fifty of
them. Arrays are C-contiguous and of one dtype, particles (S, D), as in `flowvi.kernels.step`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import kernel, stamp

STANDARD, PATH, BALANCED = 0, 1, 2

_LOG_2PI = math.log(2 * math.pi)


@cache
def make_base(dtype: type) -> Any:
    """Fill log_q (S,) with log N(x; 0, I) of x (S, D)."""
    F, TAG = dtype, stamp()

    @kernel
    def base(x: Any, log_q: Any) -> int:
        dim = x.shape[1]
        for i in range(x.shape[0]):
            total = F(0)
            for d in range(dim):
                total += x[i, d] * x[i, d]
            log_q[i] = F(-0.5) * total - F(0.5 * _LOG_2PI) * F(dim)
        return TAG

    return base


@cache
def make_cotangents(dtype: type) -> Any:
    """The cotangents of z and log q for the three estimators; see `flowvi.objectives`."""
    F, TAG = dtype, stamp()

    @kernel
    def cotangents(
        log_q: Any, log_p: Any, grad: Any, score: Any, beta: float, kind: int, balance: float, fall: float,
        g_z: Any, g_log_q: Any, seen: Any,
    ) -> int:  # fmt: skip
        """Fill g_z (S, D), g_log_q (S,), and seen: the number of finite particles, and their mean log p - log q."""
        size, dim = grad.shape
        b = F(beta)
        num, elbo, mean = 0, 0.0, 0.0
        for i in range(size):
            ok = math.isfinite(log_p[i]) and math.isfinite(log_q[i])
            for d in range(dim):
                pull = -b * grad[i, d]
                if kind != STANDARD:
                    pull += score[i, d]
                ok = ok and math.isfinite(pull)
                g_z[i, d] = pull
            g_log_q[i] = F(1) if ok else F(0)
            if ok:
                num += 1
                elbo += np.float64(log_p[i]) - np.float64(log_q[i])
                mean += np.float64(log_q[i]) - np.float64(b) * np.float64(log_p[i])
        seen[0] = num
        seen[1] = elbo / num if num else np.nan
        per = 1.0 / max(num, 1)
        mean *= per
        share, more = 0.0, per * num / max(num - 1, 1)
        if kind == BALANCED:
            total = 0.0
            for i in range(size):
                if g_log_q[i] == F(1):
                    off = np.float64(log_q[i]) - np.float64(b) * np.float64(log_p[i]) - mean
                    total += off * off
            share = balance / (1.0 + fall * total * more)
        for i in range(size):
            if g_log_q[i] == F(0):
                for d in range(dim):
                    g_z[i, d] = F(0)
                continue
            if kind == STANDARD:
                g_log_q[i] = F(per)
                for d in range(dim):
                    g_z[i, d] *= F(per)
                continue
            off = F(0)
            if kind == BALANCED:
                off = F(share * more * (np.float64(log_q[i]) - np.float64(b) * np.float64(log_p[i]) - mean))
            g_log_q[i] = off
            weight = F((1.0 - share) * per)
            for d in range(dim):
                g_z[i, d] = weight * g_z[i, d] - (off * score[i, d] if kind == BALANCED else F(0))
        return TAG

    return cotangents


@cache
def make_affine(dtype: type) -> tuple[Any, Any]:
    """Forward with score and backward of z = loc + e^l (x + N x), N strictly lower; see `transforms.affine`."""
    F, TAG = dtype, stamp()

    @kernel
    def forward(
        x: Any, score: Any, loc: Any, log_scale: Any, lower: Any, full: bool, z: Any, out: Any, log_det: Any
    ) -> int:
        size, dim = x.shape
        scale, per = np.exp(log_scale), np.exp(-log_scale)
        volume = F(0)
        for d in range(dim):
            volume += log_scale[d]
        for i in range(size):
            log_det[i] = volume
            if not full:
                for d in range(dim):
                    z[i, d] = loc[d] + scale[d] * x[i, d]
                for d in range(dim):
                    out[i, d] = per[d] * score[i, d]
                continue
            for d in range(dim):
                total = x[i, d]
                for j in range(d):
                    total += lower[d, j] * x[i, j]
                z[i, d] = loc[d] + scale[d] * total
            for d in range(dim - 1, -1, -1):  # (I + N)^T out = score, from the last row up
                total = score[i, d]
                for j in range(d + 1, dim):
                    total -= lower[j, d] * out[i, j]
                out[i, d] = total
            for d in range(dim):
                out[i, d] *= per[d]
        return TAG + int(F(0))

    @kernel
    def backward(
        g_z: Any, x: Any, z: Any, loc: Any, log_scale: Any, lower: Any, full: bool, g_log_det: Any, with_log_det: bool,
        g_x: Any, g_loc: Any, g_log_scale: Any, g_lower: Any,
    ) -> int:  # fmt: skip
        size, dim = x.shape
        scale = np.exp(log_scale)
        total = F(0)
        if with_log_det:
            for i in range(size):
                total += g_log_det[i]
        for d in range(dim):
            g_loc[d] = F(0)
            g_log_scale[d] = total
            if full:
                for j in range(dim):
                    g_lower[d, j] = F(0)
        for i in range(size):
            for d in range(dim):
                g_loc[d] += g_z[i, d]
                g_log_scale[d] += g_z[i, d] * (z[i, d] - loc[d])
                g_x[i, d] = F(0)
            for d in range(dim):
                pull = g_z[i, d] * scale[d]
                g_x[i, d] += pull
                if full:
                    for j in range(d):
                        g_lower[d, j] += pull * x[i, j]
                        g_x[i, j] += pull * lower[d, j]
        return TAG

    return forward, backward
