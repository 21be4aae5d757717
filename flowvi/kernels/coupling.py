"""Coupling layers bound to memory: one kernel for all of them, networks and all; the contract is in `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flowvi.kernels import dispatch
from flowvi.kernels.tiles import ACTIVATIONS, NetworkStep, parameter_vectors, spline_rows, tape_shape

__all__ = ["CouplingStep", "coupling_step"]

TAUS = {"additive": 0, "affine": 1, "spline": 2}
"""As `flowvi.kernels.compiled.coupling` numbers them, without importing numba."""


class CouplingStep(NetworkStep):
    """K coupling layers: forward with score, and backward, without a tape of torch's.

    Args:
        module: the compiled kernels.
        networks: of each layer, weights (out, in) and biases (out,), all of them views of one flat vector.
        vectors: that vector, and that of their gradients.
        order: (K, D), the coordinates of each layer: those that stay, then those that move.
        num_stay: of each layer, how many stay.
        activation: between a network's layers.
        tau: what moves a coordinate: "additive", "affine" or "spline".
        fixed: an affine one's clip; a spline's K, B, min_share and min_slope.
        num_particles: S.
        with_score: whether `forward` carries the score.
    """

    def __init__(
        self,
        module: Any,
        networks: Sequence[Sequence[tuple[Tensor, Tensor]]],
        vectors: tuple[Tensor, Tensor],
        order: np.ndarray,
        num_stay: Sequence[int],
        *,
        activation: str,
        tau: str,
        fixed: Sequence[float],
        num_particles: int,
        with_score: bool,
    ) -> None:
        like = vectors[0]
        dim = order.shape[1]
        kept_each = {"additive": 0, "affine": 3}[tau] if tau != "spline" else spline_rows(int(fixed[0]))
        plan: list[tuple[int, ...]] = []
        dense: list[tuple[int, ...]] = []
        rows, width = 0, dim
        for layers, stays in zip(networks, num_stay, strict=True):
            moves, begin = dim - stays, len(dense)
            for weight, bias in layers:
                num_out, num_in = map(int, weight.shape)
                places = int(weight.storage_offset()), int(bias.storage_offset())
                dense.append((num_in, num_out, *places, rows))
                rows += num_in
                width = max(width, num_in, num_out)
            kept = rows
            rows += kept_each * moves
            plan.append((stays, moves, begin, len(layers), kept, rows))
            rows += layers[-1][0].shape[0]
        super().__init__(module, dim, tape_shape(num_particles, rows, width, like), like, num_particles, with_score)
        p, grad = (v.detach().numpy() for v in vectors)
        tables = np.array(plan, np.int64), np.array(dense, np.int64), np.ascontiguousarray(order, np.int64)
        kind = ACTIVATIONS[activation]
        numbers = np.ones(4)
        numbers[: len(fixed)] = fixed
        options = (kind, TAUS[tau], numbers, width)
        self._forward = (p, *tables, *options)
        self._backward = (p, *tables, *options, self._tape.numpy(), self._g_x.numpy(), grad)


def coupling_step(
    networks: Sequence[Sequence[tuple[Tensor, Tensor]]], order: np.ndarray, num_stay: Sequence[int], **options: Any
) -> CouplingStep | None:
    """The step, where it can be: parameters in one vector on the CPU, gradients in another, and kernels at hand.

    Args:
        networks: of each layer, weights (out, in) and biases (out,) with their ``.grad``.
        order: see `CouplingStep`.
        num_stay: likewise.
        **options: likewise.
    """
    if options["activation"] not in ACTIVATIONS:
        return None
    vectors = parameter_vectors([p for layers in networks for pair in layers for p in pair])
    module = None if vectors is None else dispatch.compiled("coupling", *vectors)
    if vectors is None or module is None:
        return None
    return CouplingStep(module, networks, vectors, order, num_stay, **options)
