"""What bound steps with networks in them have in common: tiles of particles, and parameters in one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "parameter_vectors", "tape_shape"]

COLUMNS, CACHE = 256, 32_768
"""Particles of a tile at most, and the bytes that a network's layer should have there: the nearest cache."""

LANES = 16
"""Particles of a tile are a multiple of these, with which a vector is full."""

ACTIVATIONS = {"relu": 1, "tanh": 2, "elu": 3}
"""As `flowvi.kernels.compiled.dense` numbers them, without importing numba."""


def tape_shape(num_particles: int, rows: int, width: int, like: Tensor) -> tuple[int, int, int]:
    """(tiles, rows, T): of what a step keeps from the way forward.

    Args:
        num_particles: S.
        rows: numbers kept of each particle.
        width: the most rows that a network's layer has.
        like: for the dtype.
    """
    most = min(COLUMNS, max(4 * LANES, CACHE // (width * like.element_size())))
    tiles = -(-num_particles // most)
    return tiles, rows, -(-num_particles // (tiles * LANES)) * LANES


def parameter_vectors(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The vectors that parameters and their gradients are views of, alike in both; None where there are none."""
    grads = [p.grad for p in parameters]
    vectors = _whole(parameters), _whole(grads)
    if vectors[0] is None or vectors[1] is None:
        return None
    alike = all(g.storage_offset() == p.storage_offset() for p, g in zip(parameters, grads, strict=True))  # type: ignore[union-attr]
    return vectors if alike else None  # type: ignore[return-value]


def _whole(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The vector that contiguous tensors are parts of; None where they aren't."""
    first = parts[0]
    if first is None:
        return None
    storage = first.untyped_storage()
    for part in parts:
        if part is None or part.untyped_storage().data_ptr() != storage.data_ptr() or not part.is_contiguous():
            return None
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    whole.set_(storage, 0, (storage.nbytes() // first.element_size(),))  # type: ignore[call-overload]
    return whole
