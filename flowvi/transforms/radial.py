r"""Radial flows: f(z) = z + beta h(r) (z - z0), h = 1/(alpha + r), r = |z - z0| (Rezende & Mohamed 2015, eq. 14).

Each layer contracts or expands around the point z0. The mathematics is in `flowvi.kernels.radial`; the inverse
is in closed form, a quadratic in r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from flowvi import kernels
from flowvi.checks import functions, positive_integers
from flowvi.kernels import radial as math_
from flowvi.transforms.base import Conditioned, Transform
from flowvi.transforms.planar import hypernetwork


class Radial(Transform):
    r"""One radial layer, f(z) = z + beta (z - z0) / (alpha + r), r = |z - z0|, alpha > 0, beta > -alpha.

    log|det| = (D - 1) log((r + s)/(alpha + r)) + log((alpha s + 2 alpha r + r^2)/(alpha + r)^2), s = alpha + beta.
    It starts as the identity: alpha = s = 1, z0 standard normal.

    Source: Rezende & Mohamed 2015, arXiv:1505.05770, eq. 14 and appendix A.2.

    Args:
        input_dim: D.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import Radial
        >>> layer = Radial(2)
        >>> x = torch.randn(5, 2)
        >>> y = layer(x)
        >>> bool(torch.allclose(layer.inv(y + 0), x, atol=1e-5))
        True
    """

    has_path_score = True

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.z0 = nn.Parameter(torch.randn(input_dim))
        self.raw_alpha = nn.Parameter(torch.zeros(()))
        self.raw_s = nn.Parameter(torch.zeros(()))

    _forward = staticmethod(math_.layer)
    _inverse_map = staticmethod(math_.layer_inverse)
    _score = staticmethod(math_.layer_score)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return math_.layer(x, self.z0, self.raw_alpha, self.raw_s)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return math_.layer_inverse(y, self.z0, self.raw_alpha, self.raw_s)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`."""
        return math_.layer_score(x, score, self.z0, self.raw_alpha, self.raw_s)


class RadialStack(Transform):
    """K radial layers as one transform, with a backward pass written by hand (`flowvi.kernels.radial`).

    Source: Rezende & Mohamed 2015, arXiv:1505.05770, eq. 13 and 14.

    Args:
        input_dim: D.
        num_flows: K, at least 1.

    Raises:
        OptionError: an argument can't be used.
    """

    has_path_score = True
    tapeless = True

    def __init__(self, input_dim: int, num_flows: int = 16) -> None:
        super().__init__(input_dim)
        positive_integers(num_flows=num_flows)
        self.num_flows = num_flows
        self.z0 = nn.Parameter(torch.randn(num_flows, input_dim))
        self.raw_alpha = nn.Parameter(torch.zeros(num_flows))
        self.raw_s = nn.Parameter(torch.zeros(num_flows))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        flat = x.reshape(-1, self.input_dim)
        y, log_det, _ = kernels.radial_stack(flat, self.z0, self.raw_alpha, self.raw_s)
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.inverse_and_log_det(y)[0]

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        flat = y.reshape(-1, self.input_dim)
        x, log_det = kernels.radial_stack_inverse(flat, self.z0, self.raw_alpha, self.raw_s)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph, y and log|det| with theirs."""
        flat, flat_score = x.reshape(-1, self.input_dim), score.reshape(-1, self.input_dim)
        y, log_det, _, out = kernels.radial_stack_score(flat, flat_score, self.z0, self.raw_alpha, self.raw_s)
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1]), out.reshape(x.shape)

    def bind(self, num_particles: int, with_score: bool) -> Any:
        """See `InvertibleMap`."""
        params = self.z0, self.raw_alpha, self.raw_s
        grads: Any = tuple(p.grad for p in params)
        if any(g is None for g in grads):
            return None
        return kernels.radial_step(*params, grads=grads, num_particles=num_particles, with_score=with_score)

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, K={self.num_flows}"


class ConditionalRadial(ConditionalTransformModule):
    """A radial layer whose parameters come from a context through a hypernetwork.

    Args:
        nn: maps a context (..., C) to a tuple z0 (..., D), raw_alpha (..., 1), raw_s (..., 1).
    """

    domain = Radial.domain
    codomain = Radial.codomain
    bijective = True

    def __init__(self, nn: nn.Module) -> None:
        super().__init__()
        functions(nn=nn)
        self.nn = nn

    def condition(self, context: Tensor) -> Conditioned:
        """The layer at a context of shape (..., C), acting on points (..., D)."""
        z0, raw_alpha, raw_s = self.nn(context)
        return Conditioned(Radial, (z0, raw_alpha.squeeze(-1), raw_s.squeeze(-1)))


def radial(input_dim: int) -> Radial:
    """A `Radial` layer."""
    return Radial(input_dim)


def radial_stack(input_dim: int, num_flows: int = 16) -> RadialStack:
    """A `RadialStack` of K = `num_flows` layers."""
    return RadialStack(input_dim, num_flows)


def conditional_radial(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> ConditionalRadial:
    """A `ConditionalRadial` layer with a dense hypernetwork, the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        hidden_dims: sizes of the hypernetwork's hidden layers.
        **options: keywords of `ConditionalRadial`.
    """
    positive_integers(input_dim=input_dim)
    starts = [torch.randn(input_dim), torch.zeros(1), torch.zeros(1)]
    return ConditionalRadial(hypernetwork(context_dim, hidden_dims, starts), **options)
