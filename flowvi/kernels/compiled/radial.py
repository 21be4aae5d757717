"""Radial stacks on numpy arrays: tiles of particles, or one particle after another where D is large.

Every array is C-contiguous and of one dtype, float32 or float64: x, y, scores and their cotangents (S, D),
log_det (S,), z0 (K, D), raw_alpha and raw_s (K,), r (K, S). With one dimension more in front of every array,
each datum has layers of its own.
"""

from __future__ import annotations

from typing import Any

from flowvi.kernels.compiled import radial_each, radial_tiles
from flowvi.kernels.compiled.inverse import radial as inverse
from flowvi.kernels.compiled.inverse_pullback import radial as inverse_pullback

__all__ = ["backward", "forward", "inverse", "inverse_pullback"]

MAX_DIM = 256
"""Largest D of the tiles: above it a tile outgrows the cache."""

MANY = 32
"""Particles for each datum from which its stack is worth the kernels of a shared one."""


def forward(
    x: Any, score: Any, sign: float, z0: Any, raw_alpha: Any, raw_s: Any,
    y: Any, log_det: Any, out_score: Any, rs: Any,
) -> None:  # fmt: skip
    """Fill y, log_det, rs and out_score (unless it is None) from x and sign * score, the score at x."""
    arrays: tuple[Any, ...] = (x, score, z0, raw_alpha, raw_s, y, log_det, out_score, rs)
    if z0.ndim == 2 and z0.shape[1] > MAX_DIM:
        arrays = tuple(a if a is None else a[None] for a in arrays)
    elif z0.ndim == 3 and x.shape[1] >= MANY and z0.shape[2] <= MAX_DIM:
        for n in range(len(z0)):
            x, score, *rest = (a if a is None else a[n] for a in arrays)
            forward(x, score, sign, *rest)
        return
    x, score, *rest = arrays
    (radial_tiles if rest[0].ndim == 2 else radial_each).forward(x, score, sign, *rest)


def backward(
    g_y: Any, g_log_det: Any, x: Any, z0: Any, raw_alpha: Any, raw_s: Any, rs: Any,
    g_x: Any, g_z0: Any, g_raw_alpha: Any, g_raw_s: Any,
) -> None:  # fmt: skip
    """Fill the gradients to x, z0, raw_alpha and raw_s; g_log_det None counts as zero."""
    arrays: tuple[Any, ...] = (g_y, g_log_det, x, z0, raw_alpha, raw_s, rs, g_x, g_z0, g_raw_alpha, g_raw_s)
    if z0.ndim == 2 and z0.shape[1] > MAX_DIM:
        arrays = tuple(a if a is None else a[None] for a in arrays)
    elif z0.ndim == 3 and x.shape[1] >= MANY and z0.shape[2] <= MAX_DIM:
        for n in range(len(z0)):
            backward(*(a if a is None else a[n] for a in arrays))
        return
    (radial_tiles if arrays[3].ndim == 2 else radial_each).backward(*arrays)
