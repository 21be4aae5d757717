"""An affine autoregressive layer bound to memory, the fast way, network and all; the contract is in `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.kernels import dispatch
from flowvi.kernels.tiles import ACTIVATIONS, NetworkStep, parameter_vectors, tape_shape

__all__ = ["AutoregressiveStep", "autoregressive_step"]


class AutoregressiveStep(NetworkStep):
    """One layer: forward with score, and backward, without a tape of torch's.

    Args:
        module: the compiled kernels.
        layers: weights (out, in) and biases (out,) of the network, views of one flat vector.
        vectors: that vector, and that of their gradients.
        masks: of the weights.
        ends: of each hidden layer, how many units see so many coordinates or fewer, (D,).
        order: the coordinates in the layer's ordering, (D,).
        activation: between the network's layers.
        clip: of the log-scales.
        num_particles: S.
        with_score: whether `forward` carries the score.
    """

    def __init__(
        self,
        module: Any,
        layers: Sequence[tuple[Tensor, Tensor]],
        vectors: tuple[Tensor, Tensor],
        masks: Sequence[Tensor],
        ends: Sequence[Sequence[int]],
        order: np.ndarray,
        *,
        activation: str,
        clip: float,
        num_particles: int,
        with_score: bool,
    ) -> None:
        like, dim = layers[0][0], len(order)
        dense, rows, width, place = [], 0, 2 * dim, 0
        for weight, _ in layers:
            num_out, num_in = weight.shape
            dense.append((num_in, num_out, place, place + weight.numel(), rows))
            place += weight.numel() + num_out
            rows += num_in
            width = max(width, num_in, num_out)
        rows += 4 * dim  # e^l, dl/da and theta
        made: dict[str, Any] = {"dtype": like.dtype}
        super().__init__(module, dim, tape_shape(num_particles, rows, width, like), like, num_particles, with_score)
        own, grad, mask = torch.zeros(place, **made), torch.zeros(place, **made), torch.ones(place, **made)
        for (num_in, num_out, start, *_), given in zip(dense, masks, strict=True):
            mask[start : start + num_in * num_out] = given.reshape(-1).to(like.dtype)
        tables = np.array(dense, np.int64), np.ascontiguousarray(order, np.int64)
        seen = np.array(ends, np.int64).reshape(-1, dim)
        places = np.array([[int(p.storage_offset()) for p in pair] for pair in layers], np.int64)
        kind, (values, grads) = ACTIVATIONS[activation], (v.detach().numpy() for v in vectors)
        shared = (places, mask.numpy(), own.numpy(), *tables)
        self._forward = (values, *shared, seen, kind, float(clip), width)
        self._backward = (grads, *shared, kind, width, self._tape.numpy(), self._g_x.numpy(), grad.numpy())


def autoregressive_step(
    layers: Sequence[tuple[Tensor, Tensor]], *args: Any, **options: Any
) -> AutoregressiveStep | None:
    """The step, where it can be: parameters in one vector on the CPU, gradients in another, and kernels at hand.

    Args:
        layers: weights (out, in) and biases (out,) of the network, with their ``.grad``.
        *args: see `AutoregressiveStep`.
        **options: likewise.
    """
    if options["activation"] not in ACTIVATIONS:
        return None
    vectors = parameter_vectors([p for pair in layers for p in pair])
    module = None if vectors is None else dispatch.compiled("autoregressive", *vectors)
    return None if module is None else AutoregressiveStep(module, layers, vectors, *args, **options)  # type: ignore[arg-type]
