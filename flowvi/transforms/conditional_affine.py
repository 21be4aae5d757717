r"""The conditional affine map y = loc(c) + e^l(c) x: location and scale of x by a context c.

The first thing that a conditional density q(x | c) needs: it holds the regression of x on c, so that the other
layers only have to bend what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from flowvi.checks import positive_integers
from flowvi.transforms.base import Conditioned
from flowvi.transforms.planar import hypernetwork

_LIMIT = 7.0
"""Largest |l|: scales stay within e^-7 and e^7, whatever the context."""


class _ShiftScale:
    """y = loc + e^l x with l = 7 tanh(raw / 7): the mathematics, for `Conditioned`."""

    has_path_score: ClassVar[bool] = True

    @staticmethod
    def _forward(x: Tensor, loc: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = _LIMIT * torch.tanh(raw / _LIMIT)
        y = loc + log_scale.exp() * x
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    @staticmethod
    def _inverse_map(y: Tensor, loc: Tensor, raw: Tensor) -> Tensor:
        return (y - loc) * torch.exp(-_LIMIT * torch.tanh(raw / _LIMIT))

    @staticmethod
    def _score(x: Tensor, score: Tensor, loc: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = _ShiftScale._forward(x, loc, raw)
        with torch.no_grad():
            score = score * torch.exp(-_LIMIT * torch.tanh(raw / _LIMIT))
        return y, log_det, score


class ConditionalAffine(ConditionalTransformModule):
    """y = loc(c) + e^l(c) x, elementwise; loc is linear in the context c plus a network, l a network.

    The identity at the start, for every context.

    Args:
        input_dim: D.
        context_dim: C.
        hidden_dims: sizes of the network's hidden layers; two of max(16, 10 C) by default.

    Example:
        >>> import torch
        >>> from flowvi.transforms import conditional_affine
        >>> layer = conditional_affine(2, context_dim=3)
        >>> layer.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None) -> None:
        super().__init__()
        positive_integers(input_dim=input_dim)
        self.nn = hypernetwork(context_dim, hidden_dims, [torch.zeros(input_dim), torch.zeros(input_dim)])
        self.linear = nn.Linear(context_dim, input_dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def condition(self, context: Tensor) -> Conditioned:
        """The map at a context of shape (..., C), acting on points (..., D)."""
        loc, raw = self.nn(context)
        return Conditioned(_ShiftScale, (loc + self.linear(context), raw))


def conditional_affine(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> ConditionalAffine:
    """A `ConditionalAffine` map; `options` are its keywords."""
    return ConditionalAffine(input_dim, context_dim, hidden_dims, **options)
