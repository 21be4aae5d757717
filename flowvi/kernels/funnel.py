r"""A funnel layer, y_i = x_i exp(c tanh((N x)_i / c)), N strictly lower triangular: score, inverse, and a bound step.

With t = e^l s' the score at y is a back-substitution, t_i = s_i - sum_{k > i} N_ki slope_k (1 + x_k t_k), where
slope = dl/da: the terms without x_k t_k are d log|det|/dx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.kernels import dispatch

MAX_COMPILED_DIM = 32
"""Largest D at which plain loops beat the matrix products of torch."""


@torch.no_grad()
def scaled_score(x: Tensor, slope: Tensor, score: Tensor, n: Tensor) -> Tensor:
    """e^l times the score at y, (..., D), from x, slope and the score at x, each (..., D), and N (D, D)."""
    module = dispatch.compiled("funnel", x, slope, score, n)
    if module is not None:
        rows = [a.detach().expand(x.shape).reshape(-1, x.shape[-1]).contiguous() for a in (x, slope, score)]
        out = torch.empty_like(rows[0])
        module.score(*(a.numpy() for a in rows), n.detach().contiguous().numpy(), out.numpy())
        return out.view(x.shape)
    rest, found = score.expand(x.shape).clone(), [score[..., :0]]
    for k in reversed(range(x.shape[-1])):
        t = rest[..., k : k + 1]
        found.append(t.clone())
        rest = rest - slope[..., k : k + 1] * (1 + x[..., k : k + 1] * t) * n[..., k, :]
    return torch.cat(found[::-1], -1)


def inverse(y: Tensor, n: Tensor, clip: float) -> Tensor:
    """X (..., D) of y (..., D) and N (..., D, D), one coordinate after the other; differentiable."""
    wanted = torch.is_grad_enabled() and (y.requires_grad or n.requires_grad)
    module = None if wanted or n.dim() > 2 else dispatch.compiled("funnel", y, n)
    if module is not None:
        rows = y.detach().reshape(-1, y.shape[-1]).contiguous()
        x, log_scale = torch.empty_like(rows), torch.empty_like(rows)
        module.inverse(rows.numpy(), n.detach().mT.contiguous().numpy(), clip, x.numpy(), log_scale.numpy())
        return x.view(y.shape)
    known: list[Tensor] = []
    for i in range(y.shape[-1]):
        a = sum((n[..., i, j] * known[j] for j in range(i)), torch.zeros_like(y[..., i]))
        known.append(y[..., i] * torch.exp(-clip * torch.tanh(a / clip)))
    return torch.stack(known, -1)


class FunnelStep:
    """A `Funnel` bound to its matrix and its gradient: forward with score, and backward; the contract is in `step`.

    Args:
        matrix: (D, D), of which N is the strict lower triangle (upper, where reversed) times `unit`.
        grad: memory of its gradient.
        num_particles: S.
        unit: N / matrix.
        clip: c.
        reverse: whether the coordinates are taken in reversed order.
        with_score: whether `forward` carries the score.
    """

    def __init__(
        self,
        matrix: Tensor,
        grad: Tensor,
        *,
        num_particles: int,
        unit: float,
        clip: float,
        reverse: bool,
        with_score: bool = True,
    ) -> None:
        self.matrix, self.grad = matrix.detach(), grad.detach()
        self.unit, self.clip, self.reverse, self.with_score = unit, clip, reverse, with_score
        self._kernels: Any = None
        if len(matrix) <= MAX_COMPILED_DIM:
            module = dispatch.compiled("funnel", self.matrix, self.grad)
            if module is not None:
                memory = [matrix.new_empty(num_particles, len(matrix)).detach() for _ in range(5)]
                self._y, self._scale, self._slope, self._score, self._g_x = memory
                self._log_det, self._g_n = matrix.new_empty(num_particles), torch.empty_like(self.matrix)
                dtype = self._g_n.numpy().dtype.type
                self._kernels = module.make_forward(dtype), module.make_backward(dtype)

    def forward(self, x: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Y (S, D), log|det dy/dx| (S,) and the score at y, from x and the score at x (None: -x)."""
        score = -x if score is None else score
        n = torch.tril(self._turned(self.matrix, (0, 1)), -1) * self.unit
        x, score = self._turned(x), self._turned(score)
        if self._kernels is not None:
            self._kept = x.numpy(), self._y.numpy(), self._scale.numpy(), self._slope.numpy(), n.numpy()
            known, log_det, out = self._kept, self._log_det, self._score
            self._kernels[0](known[0], score.numpy(), known[4], self.clip, *known[1:4], log_det.numpy(), out.numpy())
            return self._turned(self._y), log_det, self._turned(out) if self.with_score else None
        t = torch.tanh((x @ n.mT).div_(self.clip))
        log_scale, slope = self.clip * t, torch.addcmul(torch.ones_like(t), t, t, value=-1)
        scale = log_scale.exp()
        y = x * scale
        self._tensors = x, y, scale, slope, n
        pushed = self._turned(scaled_score(x, slope, score, n) / scale) if self.with_score else None
        return self._turned(y), log_scale.sum(-1), pushed

    def backward(self, g_y: Tensor, g_log_det: Tensor | None = None) -> Tensor:
        """The cotangent of x (S, D) from those of y (S, D) and log|det| (S,); fills the matrix's gradient."""
        g_y = self._turned(g_y)
        if self._kernels is not None:
            more = (self._log_det if g_log_det is None else g_log_det).numpy()
            self._kernels[1](
                g_y.numpy(), more, g_log_det is not None, *self._kept, self._g_x.numpy(), self._g_n.numpy()
            )
            torch.mul(self._turned(self._g_n, (0, 1)), self.unit, out=self.grad)
            return self._turned(self._g_x)
        x, y, scale, slope, n = self._tensors
        to_log_scale = g_y * y
        if g_log_det is not None:
            to_log_scale += g_log_det.unsqueeze(-1)
        to_a = to_log_scale * slope
        self.grad.copy_(self._turned((to_a.mT @ x).tril_(-1).mul_(self.unit), (0, 1)))
        return self._turned(torch.addcmul(to_a @ n, g_y, scale))

    def _turned(self, a: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
        return a.flip(dims) if self.reverse else a
