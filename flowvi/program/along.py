"""Sums, maxima, products and running ones along dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from flowvi.kernels.compiled.instructions import Op
from flowvi.program import views
from flowvi.program.instruction import NotLowered, Strided, contiguous
from flowvi.program.walk import Handler, View, Walk, dims_of

__all__ = ["HANDLERS"]

aten = torch.ops.aten


def _reduction(op: Op) -> Callable[..., View]:
    def handler(walk: Walk, x: View, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> View:
        if dtype not in (None, walk.dtype):
            raise NotLowered(f"a sum of another kind, {dtype}")
        along = dims_of(dims if dims is not None and dims != [] else range(len(x.sizes)), len(x.sizes))
        if x.batch in along:
            raise NotLowered("a reduction over particles")
        if x.kind != "float":
            if op != Op.SUM or dtype is not None:
                raise NotLowered(f"{op.name} of truth values or integers")
            return replace(handler(walk, replace(x, kind="float"), dims, keepdim), kind="int")
        rank = len(x.sizes)
        if 1 < math.prod(x.sizes[d] for d in along) <= _FEW and len(along) == 1:
            found = _of_few(walk, op, x, along[0])
            return views.unsqueeze(walk, found, along[0]) if keepdim else found
        inner = x.inner
        reduced = [d - (d > x.batch) for d in along]
        kept = [d for d in range(rank - 1) if d not in reduced]
        out = walk.new([inner.sizes[d] for d in kept])
        loops, strides = _two_and_two(inner, kept, reduced)
        source = Strided(inner.register, inner.offset, tuple(loops), tuple(strides))
        to = contiguous(out.register, [loops[0], loops[1]])
        walk.emit(op, loops, Strided(to.register, 0, tuple(loops), (*to.strides, 0, 0)), source)
        found = walk.batched(out, x.batch - sum(d < x.batch for d in along))
        for d in sorted(along) if keepdim else []:
            found = views.unsqueeze(walk, found, d)
        return found

    return handler


_FEW = 4
"""Numbers that are added up one by one, each by an operation over all sums."""


def _of_few(walk: Walk, op: Op, x: View, dim: int) -> View:
    first, *others = views.unbind(walk, x, dim)
    for other in others:
        first = walk.pointwise({Op.SUM: Op.ADD, Op.AMAX: Op.MAX, Op.AMIN: Op.MIN}[op], first, other)
    return first


def _two_and_two(x: Strided, kept: list[int], reduced: list[int]) -> tuple[list[int], list[int]]:
    """Loops over the dimensions that stay, as two, and over the others, as two."""
    loops, strides = list[int](), list[int]()
    for dims in (kept, reduced):
        sizes, steps = list[int](), list[int]()
        for d in dims:
            if x.sizes[d] == 1:
                continue
            if sizes and steps[-1] == x.strides[d] * x.sizes[d]:
                sizes[-1], steps[-1] = sizes[-1] * x.sizes[d], x.strides[d]
            else:
                sizes.append(x.sizes[d])
                steps.append(x.strides[d])
        if len(sizes) > 2:
            raise NotLowered("a reduction over more than two dimensions")
        pad = 2 - len(sizes)
        loops += [1] * pad + sizes
        strides += [0] * pad + steps
    return loops, strides


def _mean(walk: Walk, x: View, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> View:
    total = _SUM(walk, x, dims, keepdim, dtype)
    return walk.pointwise(Op.MUL, total, math.prod(total.inner.sizes) / math.prod(x.inner.sizes))


def _cumulative(op: Op) -> Callable[..., View]:
    def handler(walk: Walk, x: View, dim: int, dtype: Any = None) -> View:
        dim %= len(x.sizes)
        if dim == x.batch or dtype not in (None, walk.dtype):
            raise NotLowered("a cumulative sum of that kind")
        along, last = dim - (x.batch < dim), len(x.sizes) - 2
        out = walk.new(x.inner.sizes)
        walk.emit(op, out.moved(along, last).sizes, out.moved(along, last), x.inner.moved(along, last))
        return walk.batched(out, x.batch)

    return handler


def _prod(walk: Walk, x: View, dim: int, keepdim: bool = False, dtype: Any = None) -> View:
    found = views.select(walk, _cumulative(Op.CUMPROD)(walk, x, dim, dtype), dim, -1)
    return views.unsqueeze(walk, found, dim % len(x.sizes)) if keepdim else found


_SUM = _reduction(Op.SUM)

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.sum.dim_IntList: _SUM,
    aten.amax.default: _reduction(Op.AMAX),
    aten.amin.default: _reduction(Op.AMIN),
    aten.mean.dim: _mean,
    aten.prod.dim_int: _prod,
    aten.cumsum.default: _cumulative(Op.CUMSUM),
    aten.cumprod.default: _cumulative(Op.CUMPROD),
}

HANDLERS = {target: Handler(function, takes_kinds=function is _SUM) for target, function in _FUNCTIONS.items()}
"""The operations by their handlers."""
