"""Tensors put together from others, and chosen from by constant indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowvi.kernels.compiled.instructions import Op
from flowvi.program import views
from flowvi.program.instruction import NotLowered, Strided, contiguous
from flowvi.program.walk import Handler, View, Walk, part

__all__ = ["HANDLERS"]

aten = torch.ops.aten


def _scatter(view: Callable[..., View]) -> Callable[..., View]:
    """A copy of x in which what `view` shows of it is replaced."""

    def handler(walk: Walk, x: Any, source: Any, *args: Any, **kwargs: Any) -> View:
        if not isinstance(x, View):  # a constant; the particles are in front
            x = walk.batched(walk.constant(walk.row(x, 0)), 0)
        if isinstance(source, View) and (x.batch != 0 or source.batch != 0):
            raise NotLowered("particles that are not in front")
        out = walk.new(x.inner.sizes)
        walk.copy(x.inner, out)
        whole = walk.batched(out, x.batch)
        shown = view(walk, whole, *args, **kwargs)
        walk.copy(walk.like(source, shown).inner, shown.inner)
        return whole

    return handler


def _cat(walk: Walk, parts: Sequence[Any], dim: int = 0) -> View:
    first = next(p for p in parts if isinstance(p, View))
    dim %= len(first.sizes)
    if dim == first.batch:
        raise NotLowered("particles are put together")
    each = [walk.like(p, first) for p in parts if not isinstance(p, Tensor) or p.numel()]
    if any(v.batch != first.batch for v in each):
        raise NotLowered("particles in different dimensions")
    sizes = list(first.sizes)
    sizes[dim] = sum(v.sizes[dim] for v in each)
    out = walk.batched(walk.new([n for d, n in enumerate(sizes) if d != first.batch]), first.batch)
    start = 0
    for v in each:
        walk.copy(v.inner, views.narrow(walk, out, dim, start, start + v.sizes[dim]).inner)
        start += v.sizes[dim]
    return out


def _stack(walk: Walk, parts: Sequence[Any], dim: int = 0) -> View:
    rank = next(len(p.sizes) for p in parts if isinstance(p, View)) + 1
    each = [views.unsqueeze(walk, p, dim % rank) if isinstance(p, View) else p.unsqueeze(dim) for p in parts]
    return _cat(walk, each, dim % rank)


def _pad(walk: Walk, x: View, pad: Sequence[int], value: float = 0.0) -> View:
    ends = {len(x.sizes) - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    for d, (before, after) in ends.items():  # fewer than none are cut off
        x = views.narrow(walk, x, d, max(0, -before), x.sizes[d] - max(0, -after))
    sizes = [n + sum(max(0, e) for e in ends.get(d, ())) for d, n in enumerate(x.sizes)]
    if sizes == list(x.sizes):
        return x
    if sizes[x.batch] != x.sizes[x.batch]:
        raise NotLowered("particles are added")
    out = walk.batched(walk.new([n for d, n in enumerate(sizes) if d != x.batch]), x.batch)
    walk.copy(walk.constant(value), out.inner)
    middle = out
    for d, (before, _) in ends.items():
        if d != x.batch:
            middle = views.narrow(walk, middle, d, max(0, before), max(0, before) + x.sizes[d])
    walk.copy(x.inner, middle.inner)
    return out


def _indexed(walk: Walk, sizes: Sequence[int], indices: Sequence[Any]) -> tuple[int, int, Tensor]:
    """Which dimensions an index takes the place of, from where to where, and the index into all of them as one."""
    dims = [d for d, i in enumerate(indices) if i is not None]
    if not dims or dims != list(range(dims[0], dims[-1] + 1)) or not all(isinstance(indices[d], Tensor) for d in dims):
        raise NotLowered("an index that depends on z, or one in several places")
    total: Any = 0
    for d in dims:
        index = indices[d]
        if index.dtype == torch.bool or bool((index < -sizes[d]).any() | (index >= sizes[d]).any()):
            raise NotLowered("an index of that kind")
        total = total * sizes[d] + index % sizes[d]
    return dims[0], dims[-1] + 1, total


def _integers(walk: Walk, index: Tensor) -> int:
    walk.indices += index.reshape(-1).tolist()
    return len(walk.indices) - index.numel()


def _index(walk: Walk, x: Any, indices: Sequence[Any]) -> View:
    if not isinstance(x, View):
        raise NotLowered("an index that depends on z")
    start, stop, index = _indexed(walk, x.sizes, indices)
    if start <= x.batch < stop:
        raise NotLowered("particles are chosen")
    sizes = [*x.sizes[:start], math.prod(x.sizes[start:stop]), *x.sizes[stop:]]
    x = views.reshape(walk, x, sizes)
    batch, along = x.batch, start - (x.batch < start)
    source = x.inner.moved(along, len(sizes) - 2)
    out = walk.new([*source.sizes[:-1], index.numel()])
    walk.emit(Op.GATHER, out.sizes, out, source, None, index=_integers(walk, index))
    found = walk.batched(out.moved(len(sizes) - 2, along), batch)
    return views.reshape(walk, found, [*sizes[:start], *index.shape, *sizes[start + 1 :]])


def _index_put(walk: Walk, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> View:
    first = x if isinstance(x, View) else values
    if not isinstance(first, View):
        raise NotLowered("an index that depends on z")
    if not isinstance(x, View):
        x = walk.like(x, values) if x.dim() == len(values.sizes) else walk.batched(walk.constant(walk.row(x, 0)), 0)
    start, stop, index = _indexed(walk, x.sizes, indices)
    if start <= x.batch < stop or (not accumulate and len(index.unique()) < index.numel()):
        raise NotLowered("particles are chosen")
    merged = [*x.sizes[:start], math.prod(x.sizes[start:stop]), *x.sizes[stop:]]
    if not accumulate:  # what is there goes first
        kept = torch.ones(merged[start], dtype=walk.dtype)
        kept[index.reshape(-1)] = 0
        shape = [*[1] * start, *x.sizes[start:stop], *[1] * (len(x.sizes) - stop)]
        x = walk.pointwise(Op.WHERE, kept.reshape(shape), x, 0.0)
    whole = walk.new(x.inner.sizes)
    walk.copy(x.inner, whole)
    target = views.reshape(walk, walk.batched(whole, x.batch), merged)
    shape = [*merged[:start], *index.shape, *merged[start + 1 :]]
    if isinstance(values, View):
        values = views.expand(walk, values, shape)
    elif x.batch < start:
        values = walk.batched(walk.constant(walk.row(values.expand(shape), x.batch)), x.batch)
    else:
        raise NotLowered("particles that are not in front")
    values = views.reshape(walk, values, [*merged[:start], index.numel(), *merged[start + 1 :]])
    if values.batch != target.batch:
        raise NotLowered("particles are chosen")
    along = start - (x.batch < start)
    to, source = (v.inner.moved(along, len(merged) - 2) for v in (target, values))
    walk.emit(Op.SCATTER_ADD, source.sizes, to, None, source, index=_integers(walk, index))
    return walk.batched(whole, x.batch)


def _index_select(walk: Walk, x: Any, dim: int, index: Any) -> View:
    if not isinstance(x, View):
        raise NotLowered("an index that depends on z")
    dim %= len(x.sizes)
    return _index(walk, x, [*[None] * dim, index])


def _places(walk: Walk, sizes: Sequence[int], dim: int, index: Tensor) -> Tensor:
    """Where in the whole of a tensor of one particle each number is that `gather` asks for."""
    grid = list(torch.meshgrid(*[torch.arange(n) for n in index.shape], indexing="ij"))
    grid[dim] = index % sizes[dim]
    return sum((g * s for g, s in zip(grid, contiguous(walk.z, sizes).strides, strict=True)), torch.zeros_like(index))


def _gather(walk: Walk, x: Any, dim: int, index: Any, **_: Any) -> View:
    if not isinstance(x, View) or not isinstance(index, Tensor) or dim % len(x.sizes) == x.batch:
        raise NotLowered("an index that depends on z")
    dim %= len(x.sizes)
    row = walk.row(index, x.batch)
    places = _places(walk, x.inner.sizes, dim - (x.batch < dim), row)
    flat = walk.batched(Strided(walk.plain(x).register, 0, (math.prod(x.inner.sizes),), (1,)), 0)
    return walk.batched(_index(walk, flat, [None, places]).inner, x.batch)


def _scatter_at(accumulate: bool) -> Callable[..., View]:
    def handler(walk: Walk, x: Any, dim: int, index: Any, source: Any, **_: Any) -> View:
        dim %= index.dim() if isinstance(index, Tensor) else 1
        batch = next((v.batch for v in (x, source) if isinstance(v, View)), 0)
        if not isinstance(index, Tensor) or dim == batch:
            raise NotLowered("an index that depends on z")
        if isinstance(source, View):
            source = part(source, index.shape, source.strides)
        elif isinstance(source, Tensor):
            source = source[tuple(slice(n) for n in index.shape)]
        else:
            source = torch.full(index.shape, source, dtype=walk.dtype)
        like = x if isinstance(x, View) else source
        x, source = walk.like(x, like), walk.like(source, walk.like(x, like))
        if x.batch != batch or source.batch != batch:
            raise NotLowered("particles in different dimensions")
        sizes = x.inner.sizes
        places = _places(walk, sizes, dim - (batch < dim), walk.row(index, batch)).reshape(-1)
        flat, values = (
            walk.batched(Strided(walk.plain(v).register, 0, (math.prod(v.inner.sizes),), (1,)), 0) for v in (x, source)
        )
        found = _index_put(walk, flat, [None, places], values, accumulate)
        return walk.batched(contiguous(found.register, sizes), batch)

    return handler


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.slice_scatter.default: _scatter(views.narrow),
    aten.select_scatter.default: _scatter(views.select),
    aten.diagonal_scatter.default: _scatter(views.diagonal),
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter_at(False),
    aten.scatter.value: _scatter_at(False),
    aten.scatter_add.default: _scatter_at(True),
}

HANDLERS = {target: Handler(function) for target, function in _FUNCTIONS.items()}
"""The operations by their handlers."""
