r"""Each coordinate scaled by the exponential of a linear function of those before it: funnels and hierarchies.

f(x)_i = x_i exp(l_i), l_i = c tanh(a_i / c), a = N x with N strictly lower triangular; log|det df/dx| = sum_i l_i.

A latent whose scale is another latent, x_i ~ N(0, e^v), has this form exactly: with v = s x_1 it is N_i1 = s / 2. So
Neal's funnel, a centred hierarchy or a horseshoe, which defeat flows that are nearly linear, are one layer of
D (D - 1) / 2 parameters away from a Gaussian. The order is that of the coordinates: a model samples a scale before what
it scales. Papaspiliopoulos et al. 2007, "A general framework for the parametrization of hierarchical models", and
Gorinova et al. 2020, arXiv:1906.03028, take such scales out of the model, by hand or learnt; here the flow learns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.checks import flags, positive_integers, positive_numbers
from flowvi.errors import OptionError
from flowvi.kernels import funnel as kernels
from flowvi.transforms.base import Conditioned, Transform
from flowvi.transforms.planar import hypernetwork

CLIP = 20.0


class Funnel(Transform):
    r"""f(x)_i = x_i exp(c tanh(a_i / c)) with a = M x / sqrt(D), M strictly lower triangular; the identity at M = 0.

    The root keeps a step of size lr in all of M's entries one of about lr in a.

    Args:
        input_dim: D, at least 2.
        reverse: whether a coordinate depends on those after it, not on those before it.
        clip: c, the bound of the log-scale; it only keeps floats finite.

    Raises:
        OptionError: an argument can't be used; D = 1, where there is nothing to learn.

    Example:
        >>> import torch
        >>> from flowvi.transforms import Funnel
        >>> layer = Funnel(2)
        >>> _ = torch.nn.init.constant_(layer.matrix, 2**0.5 * 1.5)  # Neal's funnel, with v = 3 x_1
        >>> layer(torch.tensor([2.0, 1.0])).detach()  # 1 * exp(1.5 * 2), softly clipped
        tensor([ 2.0000, 19.6426])
    """

    has_path_score = True
    tapeless = True

    def __init__(self, input_dim: int, *, reverse: bool = False, clip: float = CLIP) -> None:
        super().__init__(input_dim)
        _check_dimension(input_dim)
        flags(reverse=reverse)
        positive_numbers(clip=clip)
        self.reverse, self.clip = reverse, float(clip)
        self.matrix = nn.Parameter(torch.zeros(input_dim, input_dim))

    # One function for the plain and the conditional form: matrix is (..., D, D).

    @staticmethod
    def _forward(x: Tensor, matrix: Tensor, clip: float, reverse: bool) -> tuple[Tensor, Tensor]:
        log_scale = clip * torch.tanh(_product(_triangle(matrix, reverse), x) / clip)
        return x * log_scale.exp(), log_scale.sum(-1)

    @staticmethod
    def _inverse_map(y: Tensor, matrix: Tensor, clip: float, reverse: bool) -> Tensor:
        n = _triangle(matrix, reverse)
        if reverse:
            return kernels.inverse(y.flip(-1), n.flip((-2, -1)), clip).flip(-1)
        return kernels.inverse(y, n, clip)

    @staticmethod
    def _score(x: Tensor, score: Tensor, matrix: Tensor, clip: float, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        n = _triangle(matrix, reverse)
        log_scale = clip * torch.tanh(_product(n, x) / clip)
        with torch.no_grad():
            slope = 1 - (log_scale / clip).square()
            if reverse:
                new = kernels.scaled_score(x.flip(-1), slope.flip(-1), score.flip(-1), n.flip((-2, -1))).flip(-1)
            else:
                new = kernels.scaled_score(x, slope, score, n)
            new = new * torch.exp(-log_scale)
        return x * log_scale.exp(), log_scale.sum(-1), new

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._forward(x, self.matrix, self.clip, self.reverse)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`; one coordinate after the other."""
        return self._inverse_map(y, self.matrix, self.clip, self.reverse)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph, by one back-substitution for each particle."""
        return self._score(x, score, self.matrix, self.clip, self.reverse)

    def bind(self, num_particles: int, with_score: bool) -> kernels.FunnelStep | None:
        """See `InvertibleMap`."""
        if self.matrix.grad is None:
            return None
        unit = self.input_dim**-0.5
        return kernels.FunnelStep(
            self.matrix,
            self.matrix.grad,
            num_particles=num_particles,
            unit=unit,
            clip=self.clip,
            reverse=self.reverse,
            with_score=with_score,
        )

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}" + (", reversed" if self.reverse else "")


def _check_dimension(input_dim: int) -> None:
    if input_dim == 1:
        raise OptionError(
            "at D = 1 there is no other coordinate that could scale one: leave this layer out, or use flow='planar'."
        )


def _triangle(matrix: Tensor, reverse: bool) -> Tensor:
    n = matrix.triu(1) if reverse else matrix.tril(-1)
    return n * matrix.shape[-1] ** -0.5


def _product(n: Tensor, x: Tensor) -> Tensor:
    return x @ n.mT if n.dim() == 2 else (n @ x.unsqueeze(-1)).squeeze(-1)


class ConditionalFunnel(ConditionalTransformModule):
    """`Funnel` with a matrix that a hypernetwork gives; the identity at the start for every context.

    Args:
        input_dim: D, at least 2.
        context_dim: C.
        hidden_dims: sizes of the hypernetwork's hidden layers.
        reverse: as for `Funnel`.
        clip: as for `Funnel`.

    Raises:
        OptionError: an argument can't be used.
    """

    domain = Funnel.domain
    codomain = Funnel.codomain
    bijective = True

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        reverse: bool = False,
        clip: float = CLIP,
    ) -> None:
        super().__init__()
        positive_integers(input_dim=input_dim)
        _check_dimension(input_dim)
        flags(reverse=reverse)
        positive_numbers(clip=clip)
        self.options: dict[str, Any] = {"clip": float(clip), "reverse": reverse}
        self.shape = (input_dim, input_dim)
        self.nn = hypernetwork(context_dim, hidden_dims, [torch.zeros(input_dim**2)])

    def condition(self, context: Tensor) -> Conditioned:
        """The layer at a context of shape (..., C), acting on points (..., D)."""
        matrix = self.nn(context)
        return Conditioned(Funnel, (matrix.unflatten(-1, self.shape),), **self.options)


def funnel(input_dim: int, **options: Any) -> Funnel:
    """A `Funnel` layer; `options` are its keywords."""
    return Funnel(input_dim, **options)


def funnel_stack(input_dim: int, num_flows: int, **options: Any) -> list[TorchTransform]:
    """K `Funnel` layers, in the coordinates' order and reversed by turns; the last one, next to z, is not reversed."""
    turned = bool(options.pop("reverse", False))
    return [Funnel(input_dim, reverse=((num_flows - k) % 2 == 0) != turned, **options) for k in range(num_flows)]


def conditional_funnel(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> ConditionalFunnel:
    """A `ConditionalFunnel` layer; `options` are its keywords."""
    return ConditionalFunnel(input_dim, context_dim, hidden_dims, **options)
