"""An affine map bound to memory, z = loc + e^l (x + N x) or loc + e^l (x + V V^T x); the contract is in `step`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.kernels import dispatch
from flowvi.kernels.step import Arrays

MAX_COMPILED_DIM = 12
"""Largest D at which plain loops beat the matrix products of torch, for a full matrix."""


class AffineStep:
    """`Affine` bound to its parameters and their gradients: forward with score, and backward, without a tape.

    Args:
        kind: "diag", "low_rank" or "full".
        params: loc (D,), log_scale (D,), and for "low_rank" V (D, R), for "full" N (D, D), used below its diagonal.
        grads: memory of their gradients.
        num_particles: S.
        with_score: whether `forward` carries the score.
    """

    def __init__(
        self,
        kind: str,
        params: tuple[Tensor, ...],
        grads: tuple[Tensor, ...],
        *,
        num_particles: int,
        with_score: bool = True,
    ) -> None:
        self.kind, self.with_score = kind, with_score
        self.params = tuple(p.detach() for p in params)
        self.grads = tuple(g.detach() for g in grads)
        loc = self.params[0]
        self._z, self._score, self._g_x = (
            torch.empty(num_particles, len(loc), dtype=loc.dtype, device=loc.device) for _ in range(3)
        )
        self._log_det = torch.empty(num_particles, dtype=loc.dtype, device=loc.device)
        self._kernels: Any = None
        if kind == "diag" or (kind == "full" and len(loc) <= MAX_COMPILED_DIM):
            module = dispatch.compiled("training", *self.params, *self.grads)
            if module is not None:
                arrays = [p.numpy() for p in self.params]
                memory = [g.numpy() for g in self.grads]
                full = kind == "full"
                self._kernels = module.make_affine(arrays[0].dtype.type)
                unread = arrays[0].reshape(-1, 1)
                self._shared = (arrays[0], arrays[1], arrays[2] if full else unread, full)
                self._memory = (memory[0], memory[1], memory[2] if full else unread)
                self._own = tuple(a.numpy() for a in (self._z, self._score, self._g_x, self._log_det))
                self._arrays = Arrays()

    def forward(self, x: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z (S, D), log|det dz/dx| (S,) and the score at z, from x and the score at x (None: -x)."""
        self._x = x
        start = score if score is not None else -x
        if self._kernels is not None:
            z, out, _, volume = self._own
            self._kernels[0](self._arrays("x", x), self._arrays("score", start), *self._shared, z, out, volume)
            return self._z, self._log_det, self._score if self.with_score else None
        loc, log_scale = self.params[:2]
        inner: Tensor = x
        log_det: Tensor = log_scale.sum()
        if self.kind == "full":
            inner = x + x @ torch.tril(self.params[2], -1).mT
        elif self.kind == "low_rank":
            factor = self.params[2]
            self._inner = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device) + factor.mT @ factor
            inner = x + (x @ factor) @ factor.mT
            log_det = log_det + torch.linalg.slogdet(self._inner)[1]
        self._scaled = log_scale.exp() * inner
        z_ = loc + self._scaled
        return z_, log_det.expand(len(x)), self._push(start) if self.with_score else None

    def _push(self, score: Tensor) -> Tensor:
        """A^-T score."""
        out = score
        if self.kind == "full":
            lower = torch.tril(self.params[2], -1)
            out = torch.linalg.solve_triangular(lower, score, upper=False, left=False, unitriangular=True)
        elif self.kind == "low_rank":
            factor = self.params[2]
            out = score - torch.linalg.solve(self._inner, score @ factor, left=False) @ factor.mT
        return out * torch.exp(-self.params[1])

    def backward(self, g_z: Tensor, g_log_det: Tensor | None = None) -> Tensor:
        """The cotangent of x (S, D) from those of z (S, D) and log|det| (S,); fills the parameters' gradients."""
        x = self._x
        if self._kernels is not None:
            z, _, g_x, unread = self._own
            weight = unread if g_log_det is None else self._arrays("g_log_det", g_log_det)
            given = self._arrays("g_z", g_z), self._arrays("x", x)
            self._kernels[1](*given, z, *self._shared, weight, g_log_det is not None, g_x, *self._memory)
            return self._g_x
        g_loc, g_log_scale, *rest = self.grads
        torch.sum(g_z, 0, out=g_loc)
        torch.sum(g_z * self._scaled, 0, out=g_log_scale)
        total = None if g_log_det is None else g_log_det.sum()
        if total is not None:
            g_log_scale += total
        pull = g_z * self.params[1].exp()
        if self.kind == "full":
            rest[0].copy_(torch.tril(pull.mT @ x, -1))
            return pull + pull @ torch.tril(self.params[2], -1)
        if self.kind == "low_rank":
            factor = self.params[2]
            rest[0].copy_(pull.mT @ (x @ factor) + x.mT @ (pull @ factor))
            if total is not None:
                rest[0].add_(2 * total * torch.linalg.solve(self._inner, factor, left=False))
            return pull + (pull @ factor) @ factor.mT
        return pull
