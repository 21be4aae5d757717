"""What bound steps with networks in them have in common: tiles of particles, and parameters in one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowvi.kernels.step import Arrays

__all__ = ["ACTIVATIONS", "DAMPING", "NetworkStep", "parameter_vectors", "spline_rows", "tape_shape"]

COLUMNS, CACHE = 256, 32_768
"""Particles of a tile at most, and the bytes that a network's layer should have there: the nearest cache."""

LANES = 16
"""Particles of a tile are a multiple of these, with which a vector is full."""

DAMPING = 0.5
"""A spline's parameters count by this much: with numbers of order one, a few layers lose four digits, not eight."""

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
    columns = -(-num_particles // (-(-num_particles // most) * LANES)) * LANES
    return -(-num_particles // columns), rows, columns


def spline_rows(num_bins: int) -> int:
    """How many numbers are kept of a coordinate that a spline of so many bins moves.

    They are the shares (K in x, K in y), the inner slopes' derivatives (K - 1), the number of the bin, the derivatives
    of y and of log dy/dx by x, w, h, d_k, d_{k+1} (5, 5), and 1 in the box or 0 outside it.
    """
    return 3 * num_bins + 11


class NetworkStep:
    """What steps with networks in them share: memory for the results, and the hand-over to compiled kernels.

    Args:
        module: the compiled kernels.
        dim: D.
        tape: the shape of what is kept from the way forward.
        like: for the dtype.
        num_particles: S.
        with_score: whether `forward` carries the score.

    Attributes:
        _forward, _backward: what the kernels take after points, scores and cotangents.
    """

    _forward: tuple[Any, ...]
    _backward: tuple[Any, ...]

    def __init__(
        self, module: Any, dim: int, tape: tuple[int, int, int], like: Tensor, num_particles: int, with_score: bool
    ) -> None:
        self._module, self.with_score = module, with_score
        made: dict[str, Any] = {"dtype": like.dtype}
        self._z, self._score, self._g_x = (torch.empty(num_particles, dim, **made) for _ in range(3))
        self._log_det, self._tape = torch.empty(num_particles, **made), torch.empty(tape, **made)
        score = self._score.numpy() if with_score else None
        self._out = self._z.numpy(), self._log_det.numpy(), score, self._tape.numpy()
        self._arrays = Arrays()

    def forward(self, x: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z (S, D), log|det dz/dx| (S,) and the score at z, from x and the score at x (None: -x)."""
        given = self._arrays("x", x)
        start, sign = (given, -1.0) if score is None else (self._arrays("score", score), 1.0)
        self._module.forward(given, start, sign, *self._forward, *self._out)
        return self._z, self._log_det, self._score if self.with_score else None

    def backward(self, g_z: Tensor, g_log_det: Tensor | None = None) -> Tensor:
        """The cotangent of x (S, D) from those of z (S, D) and log|det| (S,); fills the parameters' gradients."""
        pull = self._arrays("g_z", g_z), self._arrays("g_log_det", g_log_det)
        self._module.backward(*pull, *self._backward)
        return self._g_x


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
