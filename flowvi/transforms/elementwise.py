r"""Monotone maps of single numbers, y_i = tau(x_i; p_i), with P parameters each.

Coupling and autoregressive flows apply one to every coordinate, with parameters that a network gives. Each is the
identity at p = 0, so that a network whose last layer is zero starts as the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.checks import positive_numbers


class Elementwise:
    """The protocol: tau acts on each of x (..., n) with its own parameters params (..., n, P); tau(x; 0) = x.

    To add a map, write `forward` and `inverse`, with ordinary torch operations. The last three methods, which the
    path score of a whole layer is made of, work for every map; override them together where a closed form is cheaper.
    """

    num_params: int
    """P, parameters per coordinate."""

    @property
    def kernel(self) -> tuple[str, tuple[float, ...]] | None:
        """Its name among those that compiled layers know (`flowvi.kernels.coupling`), and its numbers; or None."""
        return None

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Y (..., n) and log tau'(x) (..., n) at x (..., n) and params (..., n, P)."""
        raise NotImplementedError

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """X (..., n) with tau(x) = y, and the log-slope of the inverse, -log tau'(x)."""
        raise NotImplementedError

    def forward_with_tape(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Y and log tau'(x), both without a graph, and what `score` and `backward` need to know."""
        with torch.enable_grad():
            x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
            y, log_slope = self.forward(x, params)
        return y.detach(), log_slope.detach(), (x, params, y, log_slope)

    def score(self, tape: Any, score: Tensor) -> tuple[Tensor, Tensor]:
        """The score after tau, and how the network's parameters bear on it.

        Args:
            tape: from `forward_with_tape`.
            score: s = d log q/dx, (..., n).

        Returns:
            s' = (s - d log tau'/dx) / tau' (..., n), and d(sum(y s') + sum(log tau'))/d params (..., n, P) with s'
            held fixed; both without a graph.
        """
        log_slope = tape[-1].detach()
        ones = torch.ones_like(log_slope)
        curvature = self.backward(tape, torch.zeros_like(ones), ones)[0]
        new = (score - curvature) * torch.exp(-log_slope)
        return new, self.backward(tape, new, ones)[1]

    def backward(self, tape: Any, to_y: Tensor, to_log_slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """d(sum(y to_y) + sum(log tau' to_log_slope))/dx (..., n) and the same by params (..., n, P).

        Args:
            tape: from `forward_with_tape`.
            to_y: (..., n).
            to_log_slope: broadcasts to (..., n); None for 0.
        """
        x, params, y, log_slope = tape
        to_log_slope = torch.zeros_like(y) if to_log_slope is None else to_log_slope.expand(y.shape)
        to_x, to_params = torch.autograd.grad(
            (y, log_slope), (x, params), (to_y, to_log_slope), retain_graph=True, materialize_grads=True
        )
        return to_x, to_params

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Additive(Elementwise):
    """tau(x) = x + t: keeps volumes (NICE, Dinh et al. 2015, arXiv:1410.8516, section 3.2). P = 1."""

    num_params = 1

    @property
    def kernel(self) -> tuple[str, tuple[float, ...]] | None:
        """See `Elementwise`; a class of its own may be another map."""
        return ("additive", ()) if type(self) is Additive else None

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        return x + params.squeeze(-1), torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        return y - params.squeeze(-1), torch.zeros_like(y)

    def forward_with_tape(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, None]:
        """See `Elementwise`."""
        return *self.forward(x.detach(), params.detach()), None

    def score(self, tape: None, score: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`; the score is kept."""
        return score, score.unsqueeze(-1)

    def backward(self, tape: None, to_y: Tensor, to_log_slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        return to_y, to_y.unsqueeze(-1)


class SoftClippedAffine(Elementwise):
    """tau(x) = x exp(l) + t with l = c tanh(a / c), so that |l| < c: parameters (t, a), P = 2.

    The clip keeps deep stacks finite in many dimensions, where one large log-scale is enough to spoil a fit.

    Source: Dinh et al. 2017, arXiv:1605.08803, eq. 4; Andrade 2024, arXiv:2402.16408, for soft clipping.

    Args:
        clip: c, the bound of the log-scale.

    Raises:
        OptionError: c is not a positive number.
    """

    num_params = 2

    def __init__(self, clip: float = 3.0) -> None:
        positive_numbers(clip=clip)
        self.clip = clip

    @property
    def kernel(self) -> tuple[str, tuple[float, ...]] | None:
        """See `Elementwise`; a class of its own may be another map."""
        return ("affine", (float(self.clip),)) if type(self) is SoftClippedAffine else None

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, a = params.unbind(-1)
        return shift, self.clip * torch.tanh(a / self.clip)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        shift, log_scale = self._shift_and_log_scale(params)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        shift, log_scale = self._shift_and_log_scale(params)
        return (y - shift) * torch.exp(-log_scale), -log_scale

    def forward_with_tape(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """See `Elementwise`; the tape is x, exp(l), and dl/da = 1 - tanh(a / c)^2."""
        shift, a = params.detach().unbind(-1)
        x = x.detach()
        t = torch.tanh(a / self.clip)
        log_scale = self.clip * t
        scale = log_scale.exp()
        return torch.addcmul(shift, x, scale), log_scale, (x, scale, torch.addcmul(torch.ones_like(t), t, t, value=-1))

    def score(self, tape: tuple[Tensor, Tensor, Tensor], score: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`; s' = s exp(-l), and the derivative by l is s' x exp(l) + 1 = s x + 1."""
        x, scale, through_clip = tape
        new = score / scale
        return new, torch.stack((new, torch.addcmul(through_clip, through_clip * score, x)), -1)

    def backward(
        self, tape: tuple[Tensor, Tensor, Tensor], to_y: Tensor, to_log_slope: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        x, scale, through_clip = tape
        to_x = to_y * scale
        to_log_scale = to_x * x if to_log_slope is None else torch.addcmul(to_log_slope, to_x, x)
        return to_x, torch.stack((to_y, to_log_scale * through_clip), -1)

    def __repr__(self) -> str:
        return f"SoftClippedAffine(clip={self.clip})"


class InverseAffine(SoftClippedAffine):
    """tau(x) = (x - t) exp(-l), the inverse of `SoftClippedAffine`: log q of data is then that of y exp(l) + t.

    For maximum likelihood, where a shift in units of the base is learnt more steadily than one in units that the
    layer's own scale stretches. The derivatives for path scores are autograd's.

    Args:
        clip: c, the bound of the log-scale.

    Raises:
        OptionError: c is not a positive number.
    """

    forward_with_tape = Elementwise.forward_with_tape
    score, backward = Elementwise.score, Elementwise.backward

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        return super().inverse(x, params)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        return super().forward(y, params)

    def __repr__(self) -> str:
        return f"InverseAffine(clip={self.clip})"
