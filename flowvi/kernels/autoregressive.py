"""An affine autoregressive layer bound to memory, the fast way, network and all; the contract is in `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.kernels import dispatch
from flowvi.kernels.step import Arrays
from flowvi.kernels.tiles import ACTIVATIONS, tape_shape

__all__ = ["AutoregressiveStep", "autoregressive_step"]


class AutoregressiveStep:
    """One layer: forward with score, and backward, without a tape of torch's.

    Args:
        module: the compiled kernels.
        layers: weights (out, in) and biases (out,) of the network.
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
        masks: Sequence[Tensor],
        ends: Sequence[Sequence[int]],
        order: np.ndarray,
        *,
        activation: str,
        clip: float,
        num_particles: int,
        with_score: bool,
    ) -> None:
        self._module, self.with_score = module, with_score
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
        self._z, self._score, self._g_x = (torch.empty(num_particles, dim, **made) for _ in range(3))
        self._log_det = torch.empty(num_particles, **made)
        tape = torch.empty(tape_shape(num_particles, rows, width, like), **made)
        # The masked weights and their gradients, in memory of their own; views of both for each weight and bias.
        own, grad = torch.zeros(place, **made), torch.zeros(place, **made)
        self._each = [p.detach() for pair in layers for p in pair]
        self._grads: list[Any] = [p.grad for pair in layers for p in pair]
        self._masks = [m for mask in masks for m in (mask.to(like.dtype), None)]
        sizes, shapes = [p.numel() for p in self._each], [p.shape for p in self._each]
        self._own, self._own_grads = (
            [part.view(s) for part, s in zip(v.split(sizes), shapes, strict=True)] for v in (own, grad)
        )
        tables = np.array(dense, np.int64), np.ascontiguousarray(order, np.int64)
        seen = np.array(ends, np.int64).reshape(-1, dim)
        kind = ACTIVATIONS[activation]
        self._forward = (own.numpy(), *tables, seen, kind, float(clip), width)
        self._backward = (own.numpy(), *tables, kind, width, tape.numpy(), self._g_x.numpy(), grad.numpy())
        out = self._score.numpy() if with_score else None
        self._out = self._z.numpy(), self._log_det.numpy(), out, tape.numpy()
        self._arrays = Arrays()

    def forward(self, x: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z (S, D), log|det dz/dx| (S,) and the score at z, from x and the score at x (None: -x)."""
        with torch.no_grad():
            for own, p, mask in zip(self._own, self._each, self._masks, strict=True):
                if mask is None:
                    own.copy_(p)
                else:
                    torch.mul(p, mask, out=own)
        given = self._arrays("x", x)
        start, sign = (given, -1.0) if score is None else (self._arrays("score", score), 1.0)
        self._module.forward(given, start, sign, *self._forward, *self._out)
        return self._z, self._log_det, self._score if self.with_score else None

    def backward(self, g_z: Tensor, g_log_det: Tensor | None = None) -> Tensor:
        """The cotangent of x (S, D) from those of z (S, D) and log|det| (S,); fills the parameters' gradients."""
        pull = self._arrays("g_z", g_z), self._arrays("g_log_det", g_log_det)
        self._module.backward(*pull, *self._backward)
        for own, grad, mask in zip(self._own_grads, self._grads, self._masks, strict=True):
            if mask is None:
                grad.copy_(own)
            else:
                torch.mul(own, mask, out=grad)
        return self._g_x


def autoregressive_step(
    layers: Sequence[tuple[Tensor, Tensor]], *args: Any, **options: Any
) -> AutoregressiveStep | None:
    """The step, where there are kernels for it and the parameters have a ``.grad``.

    Args:
        layers: weights (out, in) and biases (out,) of the network.
        *args: see `AutoregressiveStep`.
        **options: likewise.
    """
    each = [p for pair in layers for p in pair]
    if any(p.grad is None for p in each):
        return None
    module = dispatch.compiled("autoregressive", *each)
    return None if module is None else AutoregressiveStep(module, layers, *args, **options)
