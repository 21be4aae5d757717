r"""Affine maps z -> loc + A z, the last layer of every guide: diagonal, low rank, or full A.

- diagonal: A = diag(e^l);
- low rank: A = diag(e^l) (I + V V^T), V (D, R): log|det| = sum l + log det(I + V^T V), O(D R) in all;
- full: A = diag(e^l) (I + N), N strictly lower triangular: log|det| = sum l, no constraint to keep.

A is never singular, and its inverse and the score A^-T s are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowvi.checks import as_tensor, one_of, positive_integers_or_none
from flowvi.errors import DimensionError, OptionError
from flowvi.kernels.affine import AffineStep
from flowvi.transforms.base import Transform

AFFINE_KINDS = ("diag", "low_rank", "full")

START_LENGTH = 0.14
"""The length at which the columns of V start, at most: each widens one direction by its square, whatever D is."""


def default_rank(dim: int) -> int:
    """R of a low-rank map where it is not said: about sqrt(D)."""
    return max(1, round(dim**0.5))


class Affine(Transform):
    r"""f(z) = loc + A z with A = diag(e^l) (I + N), by `kind` N = 0, N = V V^T (rank R) or N strictly lower.

    It starts at A = scale I, exactly for "diag" and "full"; for "low_rank" V starts at 0.01 times a standard
    normal, above D = 200 at less, since its gradient vanishes at 0.

    Args:
        input_dim: D.
        kind: "diag", "low_rank" or "full".
        rank: R for "low_rank"; about sqrt(D) by default.
        loc: where it starts, (D,) or a number; 0 by default.
        scale: the diagonal it starts at, positive, (D,) or a number; 1 by default.

    Raises:
        OptionError: an argument can't be used.
        DimensionError: loc or scale has another shape.

    Example:
        >>> import torch
        >>> from flowvi.transforms import Affine
        >>> Affine(3, kind="full", loc=1.0, scale=0.1)(torch.zeros(3))
        tensor([1., 1., 1.], grad_fn=<AddBackward0>)
    """

    has_path_score = True
    tapeless = True

    def __init__(
        self,
        input_dim: int,
        kind: str = "diag",
        *,
        rank: int | None = None,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(input_dim)
        one_of(AFFINE_KINDS, kind=kind)
        positive_integers_or_none(rank=rank)
        self.kind = kind
        loc_, scale_ = (_number_or_vector(name, v, input_dim) for name, v in (("loc", loc), ("scale", scale)))
        if not bool((scale_ > 0).all()):
            raise OptionError(f"scale must be positive, not {scale!r}.")
        dtype = loc_.dtype if loc_.is_floating_point() else torch.get_default_dtype()
        self.loc = nn.Parameter(loc_.detach().to(dtype).expand(input_dim).clone())
        self.log_scale = nn.Parameter(scale_.detach().to(self.loc).expand(input_dim).log())
        if kind == "low_rank":
            self.rank = min(rank or default_rank(input_dim), input_dim)
            size = min(0.01, START_LENGTH / input_dim**0.5)  # of an entry
            self.factor = nn.Parameter(size * torch.randn(input_dim, self.rank).to(self.loc))
        elif kind == "full":
            self.lower = nn.Parameter(torch.zeros(input_dim, input_dim).to(self.loc))

    @torch.no_grad()
    def set_(self, loc: Tensor, scale: Tensor, factor: Tensor | None = None) -> None:
        """Become z -> loc + L z.

        Args:
            loc: (D,).
            scale: L, lower triangular (D, D) with a positive diagonal, for "full"; or its diagonal (D,).
            factor: for "low_rank", the first columns of V (D, at most R), so that L = diag(scale) (I + V V^T); the
                others stay where they are.

        Raises:
            OptionError: a matrix for a map that is not full, or a factor that doesn't fit.
        """
        if scale.dim() == 2 and self.kind != "full":
            raise OptionError(f"a {self.kind} affine map takes a scale of shape (D,), not a matrix.")
        if factor is not None:
            if self.kind != "low_rank" or factor.shape[1] > self.rank:
                raise OptionError(f"a factor of {factor.shape[1]} columns doesn't fit {self}.")
            self.factor[:, : factor.shape[1]] = factor
        diagonal = scale.diagonal() if scale.dim() == 2 else scale
        self.loc.copy_(loc)
        self.log_scale.copy_(diagonal.log())
        if self.kind == "full":
            rest = torch.tril(scale, -1) if scale.dim() == 2 else torch.zeros_like(self.lower)
            self.lower.copy_(rest / diagonal.unsqueeze(-1))

    def _multiply(self, x: Tensor) -> Tensor:
        """(I + N) x for x (..., D)."""
        if self.kind == "full":
            return x + x @ torch.tril(self.lower, -1).mT
        if self.kind == "low_rank":
            return x + (x @ self.factor) @ self.factor.mT
        return x

    def _solve(self, x: Tensor, *, transpose: bool) -> Tensor:
        """(I + N)^-1 x, or (I + N)^-T x, for x (..., D)."""
        if self.kind == "diag":
            return x
        rows = x.reshape(-1, self.input_dim)
        if self.kind == "full":
            lower = torch.tril(self.lower, -1)
            matrix = lower if transpose else lower.mT  # rows @ B^-1 solves B^T x = rows^T
            rows = torch.linalg.solve_triangular(matrix, rows, upper=not transpose, left=False, unitriangular=True)
        else:  # by Woodbury's identity
            inner = torch.linalg.solve(self._capacitance(), rows @ self.factor, left=False)
            rows = rows - inner @ self.factor.mT
        return rows.reshape(x.shape)

    def _capacitance(self) -> Tensor:
        return torch.eye(self.rank, dtype=self.loc.dtype, device=self.loc.device) + self.factor.mT @ self.factor

    def _log_det(self) -> Tensor:
        log_det = self.log_scale.sum()
        if self.kind == "low_rank":
            log_det = log_det + torch.linalg.slogdet(self._capacitance())[1]
        return log_det

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        y = self.loc + self.log_scale.exp() * self._multiply(x)
        return y, self._log_det().expand(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self._solve((y - self.loc) * torch.exp(-self.log_scale), transpose=False)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`; the score comes without a graph."""
        y, log_det = self.forward_and_log_det(x)
        with torch.no_grad():
            score = self._solve(score, transpose=True) * torch.exp(-self.log_scale)
        return y, log_det, score

    def bind(self, num_particles: int, with_score: bool) -> AffineStep | None:
        """See `InvertibleMap`."""
        params = (self.loc, self.log_scale, *((self.factor,) if self.kind == "low_rank" else ()))
        params += (self.lower,) if self.kind == "full" else ()
        grads: Any = tuple(p.grad for p in params)
        if any(g is None for g in grads):
            return None
        return AffineStep(self.kind, params, grads, num_particles=num_particles, with_score=with_score)

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, {self.kind}" + (f", rank={self.rank}" if self.kind == "low_rank" else "")


def _number_or_vector(name: str, value: Any, dim: int) -> Tensor:
    found = as_tensor(name, value)
    if found.shape not in ((), (1,), (dim,)):
        raise DimensionError(f"{name} must be a number or have shape (D,) = ({dim},), not {tuple(found.shape)}.")
    return found


def affine(input_dim: int, kind: str = "diag", **options: object) -> Affine:
    """An `Affine` map; `options` are its keywords."""
    return Affine(input_dim, kind, **options)  # type: ignore[arg-type]
