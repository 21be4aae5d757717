"""The paper's energies U1 to U4, log density and gradient in one loop; the mathematics is in `flowvi.energies.paper`.

A step on one of them takes some twenty torch operations otherwise, which cost more than a whole planar stack.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled.jit import helper, kernel, stamp

_HALF_PI = math.pi / 2


@helper()
def _sigmoid(x: Any, F: Any) -> Any:
    e = np.exp(-abs(x))
    return (F(1) if x >= F(0) else e) / (F(1) + e)


@cache
def make(name: str, dtype: type) -> Any:
    """The kernel of one energy: fills value (S,) and grad (S, 2) from z (S, 2); no wall is one at infinity."""
    F, TAG, NUMBER = dtype, stamp(), int(name[1])

    @kernel
    def log_density_and_grad(z: Any, wall: float, softness: float, value: Any, grad: Any) -> int:
        for i in range(z.shape[0]):
            z1, z2 = z[i, 0], z[i, 1]
            over = max(abs(z1) - F(wall), F(0)) * F(1 / softness)
            force = over * F(1 / softness)
            if z1 > F(0):
                force = -force
            if NUMBER == 1:
                r = np.sqrt(z1 * z1 + z2 * z2)
                off = (r - F(2)) * F(1 / 0.4)
                v = z1 * F(2 / 0.36)
                e = np.exp(F(-2) * abs(v))
                tanh = (F(1) - e) / (F(1) + e)
                log = abs(v) + np.log1p(e) - F(0.5) * off * off - (z1 * z1 + F(4)) * F(0.5 / 0.36)
                pull = off * F(-1 / 0.4) / max(r, F(1e-30))
                g1 = z1 * pull + (tanh if v > F(0) else -tanh) * F(2 / 0.36) - z1 * F(1 / 0.36)
                g2 = z2 * pull
            else:
                a = z1 * F(_HALF_PI)
                slope = np.cos(a) * F(_HALF_PI)
                per = F(1 / 0.35) if NUMBER == 3 else F(1 / 0.4)
                off = (z2 - np.sin(a)) * per
                log = F(-0.5) * off * off
                g1, g2 = off * per * slope, -off * per
                if NUMBER > 2:
                    if NUMBER == 3:
                        x = (z1 - F(1)) * F(1 / 0.6)
                        shift = F(3) * np.exp(F(-0.5) * x * x)
                        second = slope + shift * x * F(1 / 0.6)
                    else:
                        s = _sigmoid((z1 - F(1)) * F(1 / 0.3), F)
                        shift = F(3) * s
                        second = slope - s * (F(1) - s) * F(3 / 0.3)
                    other = (z2 - np.sin(a) + shift) * F(1 / 0.35)
                    log_other = F(-0.5) * other * other
                    share = _sigmoid(log - log_other, F)
                    log = max(log, log_other) + np.log1p(np.exp(-abs(log - log_other)))
                    pull = (F(1) - share) * other * F(1 / 0.35)
                    g1, g2 = share * g1 + pull * second, share * g2 - pull
            value[i] = log - F(0.5) * over * over
            grad[i, 0] = g1 + force
            grad[i, 1] = g2
        return TAG

    return log_density_and_grad
