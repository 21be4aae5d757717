r"""Sylvester flows: z' = z + Q R tanh(R~ Q^T z + b), M neurons in one layer.

Q (D, M) has orthonormal columns, R and R~ (M, M) are upper triangular (van den Berg et al. 2018, arXiv:1803.05649,
section 3). With t = tanh(R~ Q^T z + b)

    det = det(I + diag(1 - t^2) R~ R) = prod_j (t_j^2 + (1 - t_j^2)(1 + m_j)),   m_j = r_jj r~_jj,

so the layer is invertible where every m_j > -1. A planar layer is M = 1. Q is, by `kind`,

- "orthogonal": the Q of a QR decomposition of a free (D, M) matrix: orthonormal to rounding, where the paper iterates
  towards it;
- "householder": the first M columns of a product of H reflections I - 2 v v^T / |v|^2;
- "triangular": M = D and Q the identity, or the reversal of all coordinates in every second layer.

Constraint: flipping the sign of a neuron (tanh is odd) leaves the map as it is, so r~_jj > 0 loses nothing. Then
r~_jj = e^(g_j), r_jj = m_j e^(-g_j), and m_j is free above -1: with p = asinh(a_j / 2), 1 + m_j = e^p is the squareplus
(a_j + sqrt(a_j^2 + 4)) / 2 and m_j = expm1(p). No cancellation, no absolute value, and a_j = 0 is the identity.

Inverse: with v = Q^T z and c = Q^T z', c = v + R tanh(R~ v + b) is solved exactly from the last row up. Row j is
p + m_j tanh(p) = r~_jj (c_j - sum_{k>j} r_jk t_k) + sum_{k>j} r~_jk v_k + b_j, one equation of a planar layer.

Path score: J = I + Q R H R~ Q^T with H = diag(1 - t^2), and d log|det J|/dz = Q R~^T e with
e_j = -2 t_j (1 - t_j^2) m_j / det_j. By Woodbury's identity s' = J^-T (s - Q R~^T e) = s - Q R~^T v, where
(I + H C^T) v = e + H R^T Q^T s with C = R~ R: one lower triangular system of size M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from flowvi import kernels
from flowvi.checks import flags, functions, one_of, positive_integers
from flowvi.errors import OptionError
from flowvi.transforms.base import Conditioned, Transform
from flowvi.transforms.planar import hypernetwork

KINDS = ("orthogonal", "householder", "triangular")

MOST_NEURONS = 32
"""M by default is D, up to this."""

MOST_REFLECTIONS = 8
"""The number of reflections by default is D, up to this; the paper's choice."""


class Sylvester(Transform):
    r"""One Sylvester layer, z' = z + Q R tanh(R~ Q^T z + b), log|det| = sum log(t^2 + (1 - t^2)(1 + r_jj r~_jj)).

    It starts as the identity: R = 0, R~ = I, b standard normal, Q random. At D = 1 there is nothing to rotate, and
    every kind is the triangular one.

    Source: van den Berg, Hasenclever, Tomczak, Welling 2018, arXiv:1803.05649, section 3.

    Args:
        input_dim: D.
        kind: how Q is made, "orthogonal", "householder" or "triangular".
        num_neurons: M, at most D; by default D, but no more than 32. "triangular" has M = D.
        num_reflections: for "householder", the number of reflections; by default D, but no more than 8.
        flip: for "triangular", whether Q reverses the coordinates.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import Sylvester
        >>> layer = Sylvester(4, num_neurons=2)
        >>> x = torch.randn(5, 4)
        >>> bool(torch.allclose(layer.inv(layer(x) + 0), x, atol=1e-5))
        True
    """

    has_path_score = True

    def __init__(
        self,
        input_dim: int,
        *,
        kind: str = "orthogonal",
        num_neurons: int | None = None,
        num_reflections: int | None = None,
        flip: bool = False,
    ) -> None:
        super().__init__(input_dim)
        starts, self._options = _plan(input_dim, kind, num_neurons, num_reflections, flip)
        for name, start in starts.items():
            setattr(self, name, nn.Parameter(start))

    # One function for the plain and the conditional form; `params` and `options` are those of `_matrices`.

    @staticmethod
    def _forward(x: Tensor, *params: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return _value(x, _matrices(*params, **options))

    @staticmethod
    def _inverse_map(y: Tensor, *params: Tensor, **options: Any) -> Tensor:
        return _solve(y, _matrices(*params, **options))

    @staticmethod
    def _score(x: Tensor, score: Tensor, *params: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _value_with_score(x, score, _matrices(*params, **options))

    def _params(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters())

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._forward(x, *self._params(), **self._options)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self._inverse_map(y, *self._params(), **self._options)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph."""
        return self._score(x, score, *self._params(), **self._options)

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, M={self._options['num_neurons']}, {self._options['kind']}"


class SylvesterStack(Transform):
    """K Sylvester layers as one transform: the matrices of all layers are made at once, in a few batched operations.

    Of the triangular kind every second layer reverses the coordinates.

    Source: van den Berg et al. 2018, arXiv:1803.05649, section 3.

    Args:
        input_dim: D.
        num_flows: K.
        kind: as for `Sylvester`.
        num_neurons: M, as for `Sylvester`.
        num_reflections: as for `Sylvester`.

    Raises:
        OptionError: an argument can't be used.
    """

    has_path_score = True

    def __init__(
        self,
        input_dim: int,
        num_flows: int = 8,
        *,
        kind: str = "orthogonal",
        num_neurons: int | None = None,
        num_reflections: int | None = None,
    ) -> None:
        super().__init__(input_dim)
        positive_integers(num_flows=num_flows)
        self.num_flows = num_flows
        plans = [_plan(input_dim, kind, num_neurons, num_reflections, flip=False) for _ in range(num_flows)]
        self._options = plans[0][1] | {"flip": torch.arange(num_flows) % 2 == 1}
        for name in plans[0][0]:
            setattr(self, name, nn.Parameter(torch.stack([starts[name] for starts, _ in plans])))

    def _layers(self) -> list[_Layer]:
        return [_Layer(*parts) for parts in zip(*_matrices(*self.parameters(), **self._options), strict=True)]

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        log_det: Tensor | float = 0.0
        for layer in self._layers():
            x, part = _value(x, layer)
            log_det = log_det + part
        return x, log_det  # type: ignore[return-value]

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        for layer in reversed(self._layers()):
            y = _solve(y, layer)
        return y

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph."""
        log_det: Tensor | float = 0.0
        for layer in self._layers():
            x, part, score = _value_with_score(x, score, layer)
            log_det = log_det + part
        return x, log_det, score  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        options = self._options
        return f"D={self.input_dim}, K={self.num_flows}, M={options['num_neurons']}, {options['kind']}"


class _Layer(NamedTuple):
    """A layer's matrices; all have the same batch shape in front: none, K, or that of a context."""

    out: Tensor
    """(Q R)^T, (M, D)."""
    into: Tensor
    """R~ Q^T, (M, D)."""
    bias: Tensor
    """b, (M,)."""
    q: Tensor
    """Q^T, (M, D)."""
    r: Tensor
    """R, (M, M)."""
    r_tilde: Tensor
    """R~, (M, M)."""
    one_plus_m: Tensor
    """(M,)."""


def _value(x: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
    """The layer's value (..., D) and log|det| (...)."""
    t = torch.tanh(_times(layer.into, x) + layer.bias)
    tt = t * t
    return x + _times(layer.out.mT, t), torch.log(tt + (1 - tt) * layer.one_plus_m).sum(-1)


def _solve(y: Tensor, layer: _Layer) -> Tensor:
    """The x whose value is y, row by row (top of this file)."""
    r, r_tilde = layer.r, layer.r_tilde
    c = _times(layer.q, y)
    t, v = torch.zeros_like(c[..., :0]), torch.zeros_like(c[..., :0])  # those of the rows after j
    for j in range(c.shape[-1] - 1, -1, -1):
        rest = c[..., j] - (r[..., j, j + 1 :] * t).sum(-1)
        drive = r_tilde[..., j, j] * rest + (r_tilde[..., j, j + 1 :] * v).sum(-1) + layer.bias[..., j]
        now = torch.tanh(kernels.planar_root(drive, layer.one_plus_m[..., j])).unsqueeze(-1)
        t = torch.cat((now, t), -1)
        v = torch.cat((rest.unsqueeze(-1) - r[..., j, j].unsqueeze(-1) * now, v), -1)
    return y - _times(layer.out.mT, t)


def _value_with_score(x: Tensor, score: Tensor, layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    """`_value`, and the score after the layer (..., D), without a graph."""
    t = torch.tanh(_times(layer.into, x) + layer.bias)
    tt = t * t
    det = tt + (1 - tt) * layer.one_plus_m
    with torch.no_grad():
        h = 1 - tt
        pull = h * _times(layer.out, score) - 2 * t * h * (layer.one_plus_m - 1) / det
        coupling = (layer.r_tilde @ layer.r).mT
        system = torch.tril(h.unsqueeze(-1) * coupling, -1) + torch.diag_embed(det)
        v = torch.linalg.solve_triangular(system, pull.unsqueeze(-1), upper=False).squeeze(-1)
        score = score - _times(layer.into.mT, v)
    return x + _times(layer.out.mT, t), torch.log(det).sum(-1), score


def _plan(
    input_dim: int, kind: str, num_neurons: int | None, num_reflections: int | None, flip: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first value of each parameter, in the order of `_matrices`, and the options that it takes."""
    positive_integers(input_dim=input_dim)
    one_of(KINDS, kind=kind)
    flags(flip=flip)
    for name, value, most in (
        ("num_neurons", num_neurons, input_dim),
        ("num_reflections", num_reflections, None),
    ):
        bad = not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most)
        if value is not None and bad:
            allowed = "a positive integer" if most is None else f"an integer from 1 to D = {most}"
            raise OptionError(f"{name} must be {allowed}, or None, not {value!r}.")
    if kind == "triangular" and num_neurons not in (None, input_dim):
        raise OptionError(f"a triangular Sylvester layer has num_neurons = D = {input_dim}, not {num_neurons}.")
    m = input_dim if kind == "triangular" else num_neurons or min(input_dim, MOST_NEURONS)
    kind = "triangular" if input_dim == 1 else kind
    starts = {}
    if kind != "triangular":
        rows = m if kind == "orthogonal" else num_reflections or min(input_dim, MOST_REFLECTIONS)
        starts["q"] = torch.randn(rows, input_dim)
    starts |= {"triangles": torch.zeros(m, m), "gain": torch.zeros(m), "bias": torch.randn(m)}
    return starts, {"kind": kind, "num_neurons": m, "flip": flip and kind == "triangular"}


def _matrices(*params: Tensor, kind: str, num_neurons: int, flip: bool | Tensor) -> _Layer:
    """A layer's matrices from its free parameters, or those of a batch of layers from a batch of parameters.

    Args:
        *params: q, (M, D) or (H, D), unless triangular; triangles (M, M), which holds R's part above the diagonal, a on
            the diagonal, and R~'s part transposed below it; gain g (M,); bias b (M,).
        kind: one of `KINDS`.
        num_neurons: M.
        flip: whether the triangular kind's Q is the reversal; for K layers, (K,).
    """
    *directions, triangles, gain, bias = params
    if kind == "orthogonal":
        q = _orthonormal(directions[0])
    elif kind == "householder":
        q = _reflected(directions[0], num_neurons)
    else:
        unit = torch.eye(num_neurons, dtype=triangles.dtype, device=triangles.device)
        where = torch.as_tensor(flip, device=triangles.device)[..., None, None]
        q = torch.where(where, unit.flip(0), unit)
    p = torch.asinh(0.5 * triangles.diagonal(dim1=-2, dim2=-1))
    r = torch.triu(triangles, 1) + torch.diag_embed(torch.expm1(p) * torch.exp(-gain))
    r_tilde = torch.tril(triangles, -1).mT + torch.diag_embed(torch.exp(gain))
    return _Layer(r.mT @ q, r_tilde @ q, bias, q, r, r_tilde, torch.exp(p))


def _orthonormal(rows: Tensor) -> Tensor:
    """The rows (..., M, D) made orthonormal one after another (Gram-Schmidt), by a QR decomposition."""
    q, r = torch.linalg.qr(rows.mT)
    # LAPACK leaves the signs open, and they would jump; with a positive diagonal Q is unique and smooth.
    return torch.where(r.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0, -q, q).mT


def _reflected(v: Tensor, num_neurons: int) -> Tensor:
    """The first M rows of (H_1 ... H_n)^T, with H_i the reflection along row i of v (..., n, D).

    H_1 ... H_n = I - V^T S^-1 V, S = the upper triangle of V V^T with half its diagonal (Joffrain et al. 2006,
    "Accumulating Householder transformations, revisited").
    """
    gram = v @ v.mT
    # The floor only keeps v = 0 finite: there the reflection is the identity.
    half = 0.5 * gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30)
    s = torch.triu(gram, 1) + torch.diag_embed(half)
    columns = torch.linalg.solve_triangular(s, v[..., :num_neurons], upper=True)
    unit = torch.eye(num_neurons, v.shape[-1], dtype=v.dtype, device=v.device)
    return unit - columns.mT @ v


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrix (..., A, B) times each x (..., B), batch shapes broadcast."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


class ConditionalSylvester(ConditionalTransformModule):
    """A Sylvester layer whose parameters come from a context through a hypernetwork.

    Args:
        nn: maps a context (..., C) to the layer's parameters, each flattened, in the order of `_matrices`.
        input_dim: D.
        **options: keywords of `Sylvester`.

    Example:
        >>> import torch
        >>> from flowvi.transforms import conditional_sylvester
        >>> layer = conditional_sylvester(2, context_dim=3)
        >>> layer.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    domain = Sylvester.domain
    codomain = Sylvester.codomain
    bijective = True

    def __init__(self, nn: nn.Module, input_dim: int, **options: Any) -> None:
        super().__init__()
        functions(nn=nn)
        self.nn = nn
        starts, self._options = _plan(input_dim, **_with_defaults(options))
        self._shapes = [start.shape for start in starts.values()]

    def condition(self, context: Tensor) -> Conditioned:
        """The layer at a context of shape (..., C), acting on points (..., D)."""
        params = (p.unflatten(-1, shape) for p, shape in zip(self.nn(context), self._shapes, strict=True))
        return Conditioned(Sylvester, tuple(params), **self._options)


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "orthogonal", "num_neurons": None, "num_reflections": None, "flip": False} | options


def sylvester(input_dim: int, **options: Any) -> Sylvester:
    """A `Sylvester` layer; `options` are its keywords."""
    return Sylvester(input_dim, **options)


def sylvester_stack(input_dim: int, num_flows: int = 8, **options: Any) -> SylvesterStack:
    """A `SylvesterStack` of K = `num_flows` layers; `options` are its keywords."""
    return SylvesterStack(input_dim, num_flows, **options)


def conditional_sylvester(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> ConditionalSylvester:
    """A `ConditionalSylvester` layer with a dense hypernetwork, the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        hidden_dims: sizes of the hypernetwork's hidden layers.
        **options: keywords of `Sylvester`.
    """
    starts, _ = _plan(input_dim, **_with_defaults(options))
    return ConditionalSylvester(hypernetwork(context_dim, hidden_dims, list(starts.values())), input_dim, **options)
