"""The backward pass of planar stacks of each datum's own, where a datum has several particles.

Arrays as in `planar_each`. The particles of a datum share its layers, so their gradients to û and q are summed, and the
constraint is gone back through once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.constraint import constrain, constrain_backward
from flowvi.kernels.compiled.jit import kernel, stamp


@cache
def make_backward(dtype: type, with_log_det: bool) -> Any:
    """The kernel for one dtype, with log-determinants or without; for any number of particles."""
    F, TAG = dtype, stamp()

    @kernel
    def backward(
        g_y: Any, g_log_det: Any, x: Any, w: Any, u: Any, b: Any, softplus: bool, t: Any,
        g_x: Any, g_w: Any, g_u: Any, g_b: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        _, layers, dim = u.shape
        u_hat, q = np.empty_like(u[0]), np.empty_like(b[0])
        g_u_hat, g_q, g_a = np.empty_like(u[0]), np.empty_like(b[0]), np.empty_like(b[0])
        z, g = np.empty(dim, F), np.empty(dim, F)
        if w.shape[0] == 1:
            g_w[0] = F(0)
        for n in range(start, stop):
            row = n if w.shape[0] > 1 else 0
            constrain(w[row], u[n], softplus, u_hat, q)
            if w.shape[0] > 1:
                g_w[row] = F(0)
            g_b[n] = F(0)
            g_u_hat[:] = F(0)
            g_q[:] = F(0)
            for i in range(x.shape[1]):
                for d in range(dim):
                    g[d] = g_y[n, i, d]
                    z[d] = x[n, i, d]
                for k in range(layers - 1, -1, -1):
                    v = t[n, k, i]
                    h = F(1) - v * v
                    a = F(0)
                    for d in range(dim):
                        a += u_hat[k, d] * g[d]
                    if with_log_det:
                        ratio = g_log_det[n, i] / (v * v + h * q[k])
                        a += F(2) * v * ratio * (F(1) - q[k])
                        g_q[k] += h * ratio
                    a *= h
                    g_a[k] = a
                    g_b[n, k] += a
                    for d in range(dim):
                        g_u_hat[k, d] += g[d] * v
                        g[d] += w[row, k, d] * a
                for k in range(layers):
                    v, a = t[n, k, i], g_a[k]
                    for d in range(dim):
                        g_w[row, k, d] += a * z[d]
                        z[d] += u_hat[k, d] * v
                for d in range(dim):
                    g_x[n, i, d] = g[d]
            constrain_backward(g_u_hat, g_q, w[row], u[n], softplus, g_w[row], g_u[n], True)
        return TAG

    return backward
