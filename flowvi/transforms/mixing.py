r"""Mixing of coordinates: what lets a layer that treats coordinates unequally reach all of them.

Fixed mixing M inside a coupling layer, f = M^-1 . coupling . M: a random permutation or a random orthogonal matrix,
the paper's NICE-perm and NICE-orth (Rezende & Mohamed 2015, arXiv:1505.05770, section 5). In this form a layer is
the identity wherever its coupling is.

Learnable mixing, a layer of its own: a product of Householder reflections, H(v) = I - 2 v v^T / |v|^2, which is
orthogonal whatever v is (Tomczak & Welling 2016, arXiv:1611.09630).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from flowvi.checks import one_of, positive_integers
from flowvi.errors import OptionError
from flowvi.transforms.base import Conditioned, Transform
from flowvi.transforms.planar import hypernetwork


class Mixing(nn.Module):
    """A fixed orthogonal map M of R^D: itself, x -> M x, and `undo`. This one is M = I."""

    def forward(self, x: Tensor) -> Tensor:
        """M x for x (..., D)."""
        return x

    def undo(self, u: Tensor) -> Tensor:
        """M^-1 u for u (..., D)."""
        return u


class Permutation(Mixing):
    """M x = x[order], for a random order unless one is given.

    Args:
        input_dim: D.
        order: the permutation of 0, ..., D - 1, as integers (D,).
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, input_dim: int, order: Tensor | None = None) -> None:
        super().__init__()
        order = torch.randperm(input_dim) if order is None else order
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        """See `Mixing`."""
        return x.index_select(-1, self.order)

    def undo(self, u: Tensor) -> Tensor:
        """See `Mixing`."""
        return u.index_select(-1, self.inverse_order)


class Rotation(Mixing):
    """M x for a fixed orthogonal matrix, uniformly random unless one is given.

    Args:
        input_dim: D.
        matrix: M, (D, D).
    """

    matrix: Tensor

    def __init__(self, input_dim: int, matrix: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("matrix", random_orthogonal(input_dim) if matrix is None else matrix)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        # A matrix that is orthogonal in float32 is so only to 1e-7 in float64. Two Newton-Schulz steps towards the
        # nearest orthogonal matrix square that error twice.
        super()._apply(fn, recurse)
        m = self.matrix
        if not m.is_meta:
            for _ in range(2):
                m = 1.5 * m - 0.5 * (m @ m.mT) @ m
            self.matrix = m
        return self

    def forward(self, x: Tensor) -> Tensor:
        """See `Mixing`."""
        return x @ self.matrix.mT

    def undo(self, u: Tensor) -> Tensor:
        """See `Mixing`."""
        return u @ self.matrix


MIXINGS: dict[str, Callable[[int], Mixing]] = {
    "perm": Permutation,
    "orth": Rotation,
    "none": lambda input_dim: Mixing(),
}


def make_mixing(kind: str, input_dim: int) -> Mixing:
    """A mixing of R^D by its name: "perm", "orth", or "none".

    Raises:
        OptionError: there is none of this name.
    """
    one_of(MIXINGS, mixing=kind)
    return MIXINGS[kind](input_dim)


def random_orthogonal(input_dim: int) -> Tensor:
    """A matrix (D, D) drawn uniformly from the orthogonal group (Mezzadri 2007, arXiv:math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(input_dim, input_dim))
    return q * r.diagonal().sign()


class Householder(Transform):
    r"""f(x) = H(v_1) H(w_1) ... H(v_K) H(w_K) x, with H(v) = I - 2 v v^T / |v|^2; log|det| = 0.

    Reflections come in pairs, since a pair with v = w is the identity, where it starts. K pairs reach every rotation
    of 2 K coordinates or fewer.

    Source: Tomczak & Welling 2016, arXiv:1611.09630, eq. 9 to 11.

    Args:
        input_dim: D, at least 2.
        num_pairs: K.

    Raises:
        OptionError: an argument can't be used; D = 1, where an orthogonal map has nothing to learn.

    Example:
        >>> import torch
        >>> from flowvi.transforms.mixing import Householder
        >>> layer = Householder(3)
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(layer(x).norm(dim=-1), x.norm(dim=-1)))
        True
    """

    has_path_score = True

    def __init__(self, input_dim: int, num_pairs: int = 1) -> None:
        super().__init__(input_dim)
        positive_integers(num_pairs=num_pairs)
        _check_dimension(input_dim)
        start = _unit_vectors(num_pairs, input_dim)
        self.v = nn.Parameter(start)
        self.w = nn.Parameter(start.clone())

    # One function for the plain and the conditional form: v and w are (..., K, D).

    @staticmethod
    def _reflect(x: Tensor, v: Tensor, w: Tensor, *, inverse: bool) -> Tensor:
        # Normal vectors in the order in which they act; a reflection is its own inverse and transpose.
        normals = torch.stack((v, w), -2).flatten(-3, -2)
        # The floor only keeps v = 0 finite: there H is the identity.
        scaled = normals * (2 / normals.square().sum(-1, keepdim=True).clamp_min(1e-30))
        order = range(normals.shape[-2])
        for j in order if inverse else reversed(order):
            x = x - (x * normals[..., j, :]).sum(-1, keepdim=True) * scaled[..., j, :]
        return x

    @staticmethod
    def _forward(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = Householder._reflect(x, v, w, inverse=False)
        return y, torch.zeros_like(y[..., 0])

    @staticmethod
    def _inverse_map(y: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return Householder._reflect(y, v, w, inverse=True)

    @staticmethod
    def _score(x: Tensor, score: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            new = Householder._reflect(score, v, w, inverse=False)  # J^-T = J
        return *Householder._forward(x, v, w), new

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._forward(x, self.v, self.w)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self._inverse_map(y, self.v, self.w)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph."""
        return self._score(x, score, self.v, self.w)

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, pairs={self.v.shape[0]}"


class ConditionalHouseholder(ConditionalTransformModule):
    """`Householder` with normal vectors that a hypernetwork gives; the identity at the start for every context.

    Args:
        input_dim: D, at least 2.
        context_dim: C.
        num_pairs: K.
        hidden_dims: sizes of the hypernetwork's hidden layers.

    Raises:
        OptionError: an argument can't be used.
    """

    domain = Householder.domain
    codomain = Householder.codomain
    bijective = True

    def __init__(
        self, input_dim: int, context_dim: int, num_pairs: int = 1, hidden_dims: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        positive_integers(input_dim=input_dim, num_pairs=num_pairs)
        _check_dimension(input_dim)
        self.shape = (num_pairs, input_dim)
        start = _unit_vectors(num_pairs, input_dim).reshape(-1)
        self.nn = hypernetwork(context_dim, hidden_dims, [start, start])

    def condition(self, context: Tensor) -> Conditioned:
        """The layer at a context of shape (..., C), acting on points (..., D)."""
        v, w = (p.unflatten(-1, self.shape) for p in self.nn(context))
        return Conditioned(Householder, (v, w))


def _check_dimension(input_dim: int) -> None:
    if input_dim == 1:
        raise OptionError(
            "at D = 1 a product of pairs of reflections is the identity, with nothing to learn: leave this layer out, "
            "or use flow='planar'."
        )


def _unit_vectors(*shape: int) -> Tensor:
    v = torch.randn(*shape)
    return v / v.norm(dim=-1, keepdim=True)


def householder(input_dim: int, num_flows: int = 1) -> Householder:
    """K pairs of Householder reflections, a `Householder`."""
    return Householder(input_dim, num_flows)


def conditional_householder(
    input_dim: int, context_dim: int, num_flows: int = 1, hidden_dims: Sequence[int] | None = None
) -> ConditionalHouseholder:
    """K pairs of Householder reflections at a context, a `ConditionalHouseholder`."""
    return ConditionalHouseholder(input_dim, context_dim, num_flows, hidden_dims)
