r"""Heavy tails: an element-wise map that turns Gaussian tails into power laws, with a tail weight for each side.

A Lipschitz flow of a Gaussian has Gaussian tails, however deep it is (Jaini et al. 2020, arXiv:1907.04481), so heavy
tails need a map of their own, and it does best as the last one (Hickling & Prangle 2024, arXiv:2406.16971). For one
coordinate, with lambda = lambda_+ where x >= 0 and lambda_- where x < 0,

    y = x sqrt(expm1(lambda x^2) / (lambda x^2)),        lambda >= 0,
    y = x sqrt(log1p(|lambda| x^2) / (|lambda| x^2)),    lambda < 0.

- lambda = 0 is the identity, with a derivative by lambda, x^3 / 4, that is the same from both sides.
- The map at -lambda is the inverse of the map at lambda: both directions are in closed form.
- For lambda > 0, P(y > c) falls like c^(-1 / lambda) up to logarithms where x is Gaussian: the tail of a Student t with
  df = 1 / lambda. Indeed x = sqrt(df log(1 + t^2 / df)) is the leading term of Wallace's normal approximation to a
  Student t (Wallace 1959, "Bounds on normal approximations to Student's and the chi-square distributions"), and it is
  exact for the radius of a t in two dimensions (Bailey 1994).
- lambda < 0 makes tails lighter, like exp(-e^(c y^2)).

Hickling & Prangle's own map, (erfc(|x| / sqrt 2)^-lambda - 1) / lambda, has the same tails, but as lambda -> 0 it goes
to exponential ones and not to the identity, so it can't start there.

With u = lambda x^2, or log1p(|lambda| x^2) for lambda < 0, and phi(u) = log(expm1(u) / u) / 2, both cases are
y = x exp(+-phi(u)) with log dy/dx = +-(u - phi(u)), + for lambda >= 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from flowvi.checks import functions, is_number, positive_integers, shown
from flowvi.errors import OptionError
from flowvi.transforms.base import Conditioned, Transform
from flowvi.transforms.planar import hypernetwork

_SMALL = 0.5
_SERIES = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575, -3617 / 2605132530000)
"""log(sinh(v) / v) by powers of v^2: below v = 1/2 the rest is under 1e-12 of it."""


class Tails(Transform):
    r"""Tails of weight lambda on each side of each coordinate: like those of a Student t with df = 1 / lambda.

    lambda = c tanh(raw / c), so |lambda| < c. It starts as the identity, lambda = 0. Use it as the last layer, or
    before an affine one: what comes after a heavy tail bends it again.

    Source: this module's notes; Wallace 1959; Hickling & Prangle 2024, arXiv:2406.16971.

    Args:
        input_dim: D.
        most: c, the largest weight; a Cauchy distribution has weight 1.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import Tails
        >>> layer = Tails(2)
        >>> x = torch.randn(5, 2)
        >>> bool(torch.allclose(layer(x), x))  # the identity at the start
        True
    """

    has_path_score = True

    def __init__(self, input_dim: int, *, most: float = 2.0) -> None:
        super().__init__(input_dim)
        self.most = _check_most(most)
        self.left = nn.Parameter(torch.zeros(input_dim))
        self.right = nn.Parameter(torch.zeros(input_dim))

    # One function for the plain and the conditional form; `most` is the only option.

    @staticmethod
    def _forward(x: Tensor, left: Tensor, right: Tensor, *, most: float) -> tuple[Tensor, Tensor]:
        y, log_slope = _bend(x, _weight(x, left, right, most))
        return y, log_slope.sum(-1)

    @staticmethod
    def _inverse_map(y: Tensor, left: Tensor, right: Tensor, *, most: float) -> Tensor:
        return _bend(y, -_weight(y, left, right, most))[0]

    @staticmethod
    def _score(x: Tensor, score: Tensor, left: Tensor, right: Tensor, *, most: float) -> tuple[Tensor, Tensor, Tensor]:
        weight = _weight(x, left, right, most)
        y, log_slope = _bend(x, weight)
        with torch.no_grad():
            score = (score - _curvature(x, weight)) * torch.exp(-log_slope)
        return y, log_slope.sum(-1), score

    def weights(self) -> tuple[Tensor, Tensor]:
        """The tail weights lambda, left and right, (D,) each; a Student t with df degrees of freedom has 1 / df."""
        return tuple(self.most * torch.tanh(raw / self.most) for raw in (self.left, self.right))  # type: ignore[return-value]

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._forward(x, self.left, self.right, most=self.most)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self._inverse_map(y, self.left, self.right, most=self.most)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        x, log_slope = _bend(y, -_weight(y, self.left, self.right, self.most))
        return x, log_slope.sum(-1)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph."""
        return self._score(x, score, self.left, self.right, most=self.most)


def _check_most(most: float) -> float:
    if not (is_number(most) and 0 < most <= 10):
        raise OptionError(f"most must be a number in (0, 10], not {shown(most)}.")
    return float(most)


def _weight(x: Tensor, left: Tensor, right: Tensor, most: float) -> Tensor:
    """The lambda of x's side: the map keeps signs, so that y tells the side as well."""
    return most * torch.tanh(torch.where(x >= 0, right, left) / most)


def _bend(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Value and log-slope at tail weight lambda; at -lambda they are those of the inverse."""
    heavy = weight >= 0
    w = torch.where(heavy, weight, -weight) * (x * x)
    u = torch.where(heavy, w, torch.log1p(w))
    phi = _phi(u)
    sign = torch.where(heavy, 1.0, -1.0).to(x.dtype)
    return x * torch.exp(sign * phi), sign * (u - phi)


def _phi(u: Tensor) -> Tensor:
    """log(expm1(u) / u) / 2 = u / 4 + log(sinh(v) / v) / 2 at u >= 0, v = u / 2, with a derivative that is as good."""
    v = 0.5 * u
    near = v < _SMALL
    square = torch.where(near, v * v, 0.0)
    series = torch.zeros_like(v)
    for c in reversed(_SERIES):
        series = (series + c) * square
    far = torch.where(near, 1.0, v)
    return 0.25 * u + 0.5 * torch.where(near, series, far + torch.log(-torch.expm1(-2 * far)) - torch.log(2 * far))


def _curvature(x: Tensor, weight: Tensor) -> Tensor:
    """The log-slope's derivative by x, +-(1 - phi'(u)) du/dx, phi'(u) = (1 + coth v - 1/v) / 4, v = u / 2."""
    w = weight.abs() * (x * x)
    heavy = weight >= 0
    v = 0.5 * torch.where(heavy, w, torch.log1p(w))
    near = v < _SMALL
    square = torch.where(near, v * v, 0.0)
    series = torch.zeros_like(v)
    for k in range(len(_SERIES), 0, -1):
        series = series * square + 2 * k * _SERIES[k - 1]
    far = torch.where(near, 1.0, v)
    langevin = torch.where(near, v * series, 1 / torch.tanh(far) - 1 / far)
    by_u = 0.75 - 0.25 * langevin
    return 2 * weight * x * by_u / torch.where(heavy, 1.0, 1 + w)


class ConditionalTails(ConditionalTransformModule):
    """Tails whose weights come from a context through a hypernetwork.

    Args:
        nn: maps a context (..., C) to a tuple left, right, (..., D) each.
        most: as for `Tails`.
    """

    domain = Tails.domain
    codomain = Tails.codomain
    bijective = True

    def __init__(self, nn: nn.Module, *, most: float = 2.0) -> None:
        super().__init__()
        functions(nn=nn)
        self.nn = nn
        self.most = _check_most(most)

    def condition(self, context: Tensor) -> Conditioned:
        """The layer at a context of shape (..., C), acting on points (..., D)."""
        return Conditioned(Tails, tuple(self.nn(context)), most=self.most)


def tails(input_dim: int, **options: Any) -> Tails:
    """A `Tails` layer; `options` are its keywords."""
    return Tails(input_dim, **options)


def conditional_tails(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> ConditionalTails:
    """A `ConditionalTails` layer with a dense hypernetwork, the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        hidden_dims: sizes of the hypernetwork's hidden layers.
        **options: keywords of `Tails`.
    """
    positive_integers(input_dim=input_dim)
    starts = [torch.zeros(input_dim), torch.zeros(input_dim)]
    return ConditionalTails(hypernetwork(context_dim, hidden_dims, starts), **options)
