"""Products of matrices, factors and triangular systems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowvi.kernels.compiled.instructions import Op
from flowvi.program import views
from flowvi.program.instruction import NotLowered, Strided, contiguous
from flowvi.program.walk import Folded, Handler, View, Walk

__all__ = ["HANDLERS"]

aten = torch.ops.aten


def _mm(walk: Walk, a: Any, b: Any) -> Any:
    """A matrix product of which one factor may be constant; a has rows n, b columns m, k is summed over."""
    if isinstance(a, Folded) and isinstance(b, Tensor):
        if a.view.sizes[-1] != len(b) or a.view.batch == len(a.view.sizes) - 1:
            raise NotLowered("a reshape that mixes particles")
        found = _rows_times(walk, a.view, b)
        return Folded(found, (a.sizes[0], b.shape[1]))
    if isinstance(a, Tensor) and isinstance(b, View):
        return views.permute(walk, _mm(walk, views.permute(walk, b, [1, 0]), a.mT), [1, 0])
    if not isinstance(a, View) or not isinstance(b, Tensor):
        raise NotLowered("a product over particles")
    if a.batch != 0:  # x (k', S) is a product over particles; (S, k) is a row for each
        raise NotLowered("a product over particles")
    inner, columns = a.inner, b.shape[1]
    out = walk.new([columns])
    source = Strided(inner.register, inner.offset, (1, 1, columns, inner.sizes[0]), (0, 0, 0, inner.strides[0]))
    to = Strided(out.register, 0, source.sizes, (0, 0, 1, 0))
    _times_constant(walk, to, source, b.mT.reshape(1, columns, -1))
    return walk.batched(out, 0)


def _rows_times(walk: Walk, x: View, b: Tensor) -> View:
    """Each row of x, which may have any number of dimensions, times the same matrix."""
    x = walk.plain(x)
    *outer, k = x.inner.sizes
    rows, m = math.prod(outer), b.shape[1]
    out = walk.new([rows, m])
    source = Strided(x.register, 0, (1, rows, m, k), (0, k, 0, 1))
    _times_constant(walk, Strided(out.register, 0, source.sizes, (0, m, 1, 0)), source, b.mT[None])
    return walk.batched(contiguous(out.register, [*outer, m]), x.batch)


def _times_constant(walk: Walk, out: Strided, a: Strided, b: Tensor) -> None:
    """B (n0 or 1, n2, n3) for loops n0, n1, n2, n3."""
    values = b.to(walk.dtype).contiguous()
    index = sum(t.numel() for t in walk.fixed)
    walk.fixed.append(values.reshape(-1))
    strides = (0 if values.shape[0] == 1 else values.stride(0), 0, values.stride(1), 1)
    walk.emit(Op.MATMUL_CONST, a.sizes, out, a, None, index=index, strides=strides)


def _bmm(walk: Walk, a: Any, b: Any) -> Any:
    """Matrix products of each particle, or of each of a number of matrices with the same number for each particle."""
    if isinstance(a, Folded) or isinstance(b, Folded):
        return _bmm_folded(walk, a, b)
    first = a if isinstance(a, View) else b
    if first.batch == 0:
        one = [views.unsqueeze(walk, x, 1) if isinstance(x, View) else walk.row(x, 0)[None] for x in (a, b)]
        return views.squeeze(walk, _matrices(walk, *one), 1)
    if isinstance(a, View) and isinstance(b, Tensor) and a.batch == 1:  # (g, S, k) (g, k, m)
        x = a.inner
        (g, k), m = x.sizes, b.shape[2]
        out, loops = walk.new([g, m]), (g, 1, m, k)
        source = Strided(x.register, x.offset, loops, (x.strides[0], 0, 0, x.strides[1]))
        _times_constant(walk, Strided(out.register, 0, loops, (m, 0, 1, 0)), source, b.mT)
        return walk.batched(out, 1)
    if isinstance(a, Tensor) and isinstance(b, View) and b.batch == 2:
        return views.permute(walk, _bmm(walk, views.permute(walk, b, [0, 2, 1]), a.mT), [0, 2, 1])
    raise NotLowered("a product over particles")


def _bmm_folded(walk: Walk, a: Any, b: Any) -> Folded:
    """Several matrices of each particle, the dimension of particles folded into that of the matrices."""
    each = list[Any]()
    for x in (a, b):
        n, *matrix = x.sizes if isinstance(x, Folded) else x.shape
        sizes = [walk.particles, n // walk.particles, *matrix]
        if isinstance(x, Tensor):
            each.append(walk.row(x.reshape(sizes), 0))
        elif x.view.batch == 0:
            each.append(views.reshape(walk, x.view, sizes))
        else:
            raise NotLowered("a reshape that mixes particles")
    found = _matrices(walk, *each)
    return Folded(found, (math.prod(found.sizes[:2]), *found.sizes[2:]))


def _matrices(walk: Walk, a: Any, b: Any) -> View:
    """(S, g, n, k) times (S, g, k, m), one of which may be a constant without S."""
    if isinstance(a, Tensor):
        return views.transpose(walk, _matrices(walk, views.transpose(walk, b, 2, 3), a.mT), 2, 3)
    if isinstance(b, View) and b.batch != a.batch:
        raise NotLowered("particles in different dimensions")
    x = a.inner
    (g, n, k), m = x.sizes, (b.sizes if isinstance(b, View) else b.shape)[-1]
    out, loops = walk.new([g, n, m]), (g, n, m, k)
    to = Strided(out.register, 0, loops, (n * m, m, 1, 0))
    source = Strided(x.register, x.offset, loops, (x.strides[0], x.strides[1], 0, x.strides[2]))
    if isinstance(b, Tensor):
        _times_constant(walk, to, source, b.mT)
    else:
        y = b.inner
        factor = Strided(y.register, y.offset, loops, (y.strides[0], 0, y.strides[2], y.strides[1]))
        walk.emit(Op.MATMUL, loops, to, source, factor)
    return walk.batched(out, 0)


def _cholesky_ex(walk: Walk, x: View, *, upper: bool = False, check_errors: bool = False) -> tuple[View, View]:
    if x.batch != 0 or len(x.sizes) > 4 or check_errors:
        raise NotLowered("a factorization of that kind")
    out = walk.new(x.inner.sizes)
    walk.copy(x.inner, out)
    if upper:  # the factor of the transpose, transposed, reads the upper triangle
        raise NotLowered("an upper factor")
    walk.emit(Op.CHOLESKY, out.sizes, out)
    found = walk.batched(out, 0)
    failed = views.select(walk, views.select(walk, found, -1, -1), -1, -1)
    return found, walk.pointwise(Op.ISNAN, failed)


def _solve_triangular(
    walk: Walk, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> View:
    a, b = walk.like(a, b), walk.like(b, a)
    if unitriangular or a.batch != 0 or b.batch != 0 or not 3 <= len(a.sizes) <= 4 or len(a.sizes) != len(b.sizes):
        raise NotLowered("a triangular system of that kind")
    rank = len(a.sizes)
    if not left:  # X A = B is A^T X^T = B^T
        flipped = [views.transpose(walk, x, rank - 2, rank - 1) for x in (a, b)]
        found = _solve_triangular(walk, *flipped, upper=not upper)
        return views.transpose(walk, found, rank - 2, rank - 1)
    if upper:  # read from the end it is lower
        found = _solve_triangular(walk, views.flip(walk, a, [-2, -1]), views.flip(walk, b, [-2]), upper=False)
        return views.flip(walk, found, [-2])
    x = b.inner
    out = walk.new(x.sizes)
    walk.copy(x, out)
    triangle = a.inner.expanded([*x.sizes[:-2], *a.inner.sizes[-2:]])
    groups = rank - 3
    loops = ([1] if not groups else [x.sizes[0]]) + [x.sizes[-1], 1, x.sizes[-2]]
    outer = (0,) if not groups else (out.strides[0],)
    outer_a = (0,) if not groups else (triangle.strides[0],)
    walk.emit(
        Op.SOLVE_LOWER,
        loops,
        Strided(out.register, 0, tuple(loops), (*outer, out.strides[-1], 0, out.strides[-2])),
        Strided(triangle.register, triangle.offset, tuple(loops), (*outer_a, 0, *triangle.strides[-2:])),
    )
    return walk.batched(out, 0)


def _triangle(upper: bool) -> Callable[..., View]:
    def handler(walk: Walk, x: View, diagonal: int = 0) -> View:
        ones = torch.ones(x.sizes[-2:], dtype=walk.dtype)
        mask = ones.triu(diagonal) if upper else ones.tril(diagonal)
        if x.batch >= len(x.sizes) - 2:
            raise NotLowered("a triangle over particles")
        return walk.pointwise(Op.WHERE, mask, x, 0.0)

    return handler


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.linalg_cholesky_ex.default: _cholesky_ex,
    aten.linalg_solve_triangular.default: _solve_triangular,
    aten.tril.default: _triangle(False),
    aten.triu.default: _triangle(True),
}

HANDLERS = {target: Handler(function, takes_folded=function in (_mm, _bmm)) for target, function in _FUNCTIONS.items()}
"""The operations by their handlers."""
