r"""Planar flows: f(z) = z + û tanh(w.z + b) (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 10).

Each layer pushes mass towards or away from the hyperplane w.z + b = 0. The mathematics, with the constraint
that makes a layer invertible, is in `flowvi.kernels.planar`. Inverse: with a = w.x + b and m = w.û,
a + m tanh(a) = w.y + b is a monotone scalar equation; then x = y - û tanh(a).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.nn import DenseNN
from torch import Tensor, nn

from flowvi import kernels
from flowvi.checks import functions, layer_sizes, one_of, positive_integers
from flowvi.errors import OptionError
from flowvi.kernels import planar as math_
from flowvi.transforms.base import Conditioned, Transform, check_context


def _check_constraint(constraint: str) -> str:
    one_of(math_.CONSTRAINTS, constraint=constraint)
    return constraint


def _random_directions(*shape: int) -> Tensor:
    w = torch.randn(*shape)
    return w / w.norm(dim=-1, keepdim=True).clamp_min(1e-6)


class Planar(Transform):
    r"""One planar layer, f(z) = z + û tanh(w.z + b), log|det| = log(t^2 + (1 - t^2)(1 + w.û)), t = tanh(w.z + b).

    û is `u` moved along w so that w.û > -1, which makes the layer invertible (the paper's appendix A.1). It
    starts as the identity: u = 0, w a random direction, b standard normal.

    Source: Rezende & Mohamed 2015, arXiv:1505.05770, eq. 10 to 12.

    Args:
        input_dim: D.
        constraint: "squareplus" (ours, the default) or "softplus" (the paper's, which is not the identity at
            u = 0); see `flowvi.kernels.planar`.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import Planar
        >>> layer = Planar(2)
        >>> x = torch.randn(5, 2)
        >>> y = layer(x)
        >>> bool(torch.allclose(layer.inv(y + 0), x, atol=1e-5))
        True
        >>> layer.log_abs_det_jacobian(x, y).shape
        torch.Size([5])
    """

    has_path_score = True

    def __init__(self, input_dim: int, *, constraint: str = "squareplus") -> None:
        super().__init__(input_dim)
        self.constraint = _check_constraint(constraint)
        self.w = nn.Parameter(_random_directions(input_dim))
        self.u = nn.Parameter(torch.zeros(input_dim))
        self.bias = nn.Parameter(torch.randn(()))

    # One function for the plain and the conditional form; `constraint` is the only option.

    @staticmethod
    def _forward(x: Tensor, w: Tensor, u: Tensor, b: Tensor, *, constraint: str) -> tuple[Tensor, Tensor]:
        return math_.layer(x, w, u, b, constraint)

    @staticmethod
    def _inverse_map(y: Tensor, w: Tensor, u: Tensor, b: Tensor, *, constraint: str) -> Tensor:
        u_hat, one_plus_m = math_.constrain(w, u, constraint)
        a = kernels.planar_root((y * w).sum(-1) + b, one_plus_m)
        return y - u_hat * torch.tanh(a).unsqueeze(-1)

    @staticmethod
    def _score(
        x: Tensor, score: Tensor, w: Tensor, u: Tensor, b: Tensor, *, constraint: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return math_.layer_score(x, score, w, u, b, constraint)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._forward(x, self.w, self.u, self.bias, constraint=self.constraint)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self._inverse_map(y, self.w, self.u, self.bias, constraint=self.constraint)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._score(x, score, self.w, self.u, self.bias, constraint=self.constraint)


class PlanarStack(Transform):
    r"""K planar layers as one transform: K log-determinants from one recurrence in K scalars.

    The same map as K `Planar` layers in a row, in two matrix products over D and a triangular recurrence, with
    a backward pass written by hand (`flowvi.kernels.planar`): several times faster than a loop over layers.

    Source: Rezende & Mohamed 2015, arXiv:1505.05770, eq. 10 to 13.

    Args:
        input_dim: D.
        num_flows: K, at least 1.
        constraint: as for `Planar`.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import PlanarStack
        >>> stack = PlanarStack(2, num_flows=16)
        >>> x = torch.randn(5, 2)
        >>> bool(torch.allclose(stack(x), x))  # the identity at the start
        True
    """

    has_path_score = True
    tapeless = True

    def __init__(self, input_dim: int, num_flows: int = 16, *, constraint: str = "squareplus") -> None:
        super().__init__(input_dim)
        positive_integers(num_flows=num_flows)
        self.num_flows = num_flows
        self.constraint = _check_constraint(constraint)
        self.w = nn.Parameter(_random_directions(num_flows, input_dim))
        self.u = nn.Parameter(torch.zeros(num_flows, input_dim))
        self.bias = nn.Parameter(torch.randn(num_flows))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        flat = x.reshape(-1, self.input_dim)
        y, log_det, _ = kernels.planar_stack(flat, self.w, self.u, self.bias, self.constraint)
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.inverse_and_log_det(y)[0]

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        flat = y.reshape(-1, self.input_dim)
        x, log_det = kernels.planar_stack_inverse(flat, self.w, self.u, self.bias, self.constraint)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph, y and log|det| with theirs."""
        flat, flat_score = x.reshape(-1, self.input_dim), score.reshape(-1, self.input_dim)
        y, log_det, _, out = kernels.planar_stack_score(flat, flat_score, self.w, self.u, self.bias, self.constraint)
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1]), out.reshape(x.shape)

    def bind(self, num_particles: int, with_score: bool) -> Any:
        """See `InvertibleMap`."""
        params = self.w, self.u, self.bias
        grads: Any = tuple(p.grad for p in params)
        if any(g is None for g in grads):
            return None
        return kernels.planar_step(
            *params, self.constraint, grads=grads, num_particles=num_particles, with_score=with_score
        )

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, K={self.num_flows}"


class ConditionalPlanar(ConditionalTransformModule):
    """A planar layer whose parameters come from a context through a hypernetwork.

    Args:
        nn: maps a context (..., C) to a tuple bias (..., 1), u (..., D), w (..., D), in Pyro's order.
        constraint: as for `Planar`.

    Example:
        >>> import torch
        >>> from flowvi.transforms import conditional_planar
        >>> layer = conditional_planar(2, context_dim=3)
        >>> layer.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    domain = Planar.domain
    codomain = Planar.codomain
    bijective = True

    def __init__(self, nn: nn.Module, *, constraint: str = "squareplus") -> None:
        super().__init__()
        functions(nn=nn)
        self.nn = nn
        self.constraint = _check_constraint(constraint)

    def condition(self, context: Tensor) -> Conditioned:
        """The layer at a context of shape (..., C), acting on points (..., D)."""
        bias, u, w = self.nn(context)
        return Conditioned(Planar, (w, u, bias.squeeze(-1)), constraint=self.constraint)


class Hypernetwork(DenseNN):
    """A dense network from a context (..., C), which it checks, to parameters."""

    def forward(self, context: Tensor) -> Any:
        """Each parameter at the context, (..., n)."""
        check_context(context, self.input_dim, self.layers[0].weight)
        return super().forward(context)


def hypernetwork(context_dim: int, hidden_dims: Sequence[int] | None, starts: Sequence[Tensor]) -> Hypernetwork:
    """A dense network from a context to parameters, which starts at `starts` for every context.

    Args:
        context_dim: C, the context's size.
        hidden_dims: sizes of the hidden layers; two of max(16, 10 C) by default.
        starts: the first value of each parameter, (n,) each.

    Raises:
        OptionError: a size is not a positive integer, or there is no hidden layer.
    """
    hidden = hidden_sizes(context_dim, hidden_dims)
    if not hidden:
        raise OptionError("hidden_dims is empty: give this network a hidden layer, such as hidden_dims=(32,).")
    net = Hypernetwork(context_dim, hidden, param_dims=[s.numel() for s in starts])
    last = net.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.cat([s.reshape(-1) for s in starts]))
    return net


def hidden_sizes(context_dim: int, hidden_dims: Sequence[int] | None) -> list[int]:
    """The sizes of a hypernetwork's hidden layers; two of max(16, 10 C) by default.

    Raises:
        OptionError: one of them, or C, is not a positive integer.
    """
    positive_integers(context_dim=context_dim)
    if hidden_dims is None:
        return [max(16, 10 * context_dim)] * 2
    layer_sizes(hidden_dims)
    return list(hidden_dims)


def planar(input_dim: int, **options: Any) -> Planar:
    """A `Planar` layer; `options` are its keywords."""
    return Planar(input_dim, **options)


def planar_stack(input_dim: int, num_flows: int = 16, **options: Any) -> PlanarStack:
    """A `PlanarStack` of K = `num_flows` layers; `options` are its keywords."""
    return PlanarStack(input_dim, num_flows, **options)


def conditional_planar(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> ConditionalPlanar:
    """A `ConditionalPlanar` layer with a dense hypernetwork, the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        hidden_dims: sizes of the hypernetwork's hidden layers.
        **options: keywords of `ConditionalPlanar`.
    """
    positive_integers(input_dim=input_dim)
    starts = [torch.randn(1), torch.zeros(input_dim), _random_directions(input_dim)]
    return ConditionalPlanar(hypernetwork(context_dim, hidden_dims, starts), **options)
