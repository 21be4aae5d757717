"""Operations that only look at a tensor in another way: they cost nothing, but for a reshape that must copy."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowvi.program.instruction import NotLowered, contiguous
from flowvi.program.walk import Folded, Handler, View, Walk, dims_of, part

__all__ = [
    "HANDLERS",
    "diagonal",
    "expand",
    "flip",
    "narrow",
    "permute",
    "reshape",
    "select",
    "split",
    "squeeze",
    "transpose",
    "unbind",
    "unsqueeze",
]

aten = torch.ops.aten


def same(walk: Walk, x: View, *_: Any, **__: Any) -> View:
    return x


def reshape(walk: Walk, x: Any, sizes: Sequence[int]) -> Any:
    """Other sizes for the same numbers; where particles would be mixed, a `Folded`."""
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(x.sizes) // max(1, -math.prod(sizes))
    if isinstance(x, Folded):
        x = x.view
    before = math.prod(x.sizes[: x.batch])
    places = [d for d, n in enumerate(sizes) if n == x.sizes[x.batch] and math.prod(sizes[:d]) == before]
    if not places:
        return Folded(x, tuple(sizes))
    x = walk.plain(x)
    inner = contiguous(x.register, [n for d, n in enumerate(sizes) if d != places[0]])
    return walk.batched(inner, places[0], x.kind)


def unsqueeze(walk: Walk, x: View, dim: int) -> View:
    """One more dimension, of size 1."""
    dim %= len(x.sizes) + 1
    return part(x, [*x.sizes[:dim], 1, *x.sizes[dim:]], [*x.strides[:dim], 0, *x.strides[dim:]])


def squeeze(walk: Walk, x: View, dims: Any) -> View:
    """Without these dimensions, where they have size 1."""
    out = [d for d in dims_of(dims, len(x.sizes)) if x.sizes[d] == 1]
    kept = [d for d in range(len(x.sizes)) if d not in out]
    return part(x, [x.sizes[d] for d in kept], [x.strides[d] for d in kept])


def permute(walk: Walk, x: View, dims: Sequence[int]) -> View:
    """The dimensions in another order."""
    order = dims_of(dims, len(x.sizes))
    return part(x, [x.sizes[d] for d in order], [x.strides[d] for d in order])


def transpose(walk: Walk, x: View, first: int, second: int) -> View:
    """Two dimensions change places."""
    order = list(range(len(x.sizes)))
    order[first], order[second] = order[second], order[first]
    return permute(walk, x, order)


def expand(walk: Walk, x: View, sizes: Sequence[int], implicit: bool = False) -> View:
    """Repeated along dimensions of size 1, and along new ones in front."""
    new = len(sizes) - len(x.sizes)
    strides: list[int | None] = [0] * new
    for n, m, s in zip(x.sizes, sizes[new:], x.strides, strict=True):
        if s is None and m not in (-1, n):
            raise NotLowered("particles are repeated")
        strides.append(0 if n == 1 and s is not None else s)
    full = [n if m == -1 else m for n, m in zip((1,) * new + x.sizes, sizes, strict=True)]
    return part(x, full, strides)


def narrow(walk: Walk, x: View, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> View:
    """A part of one dimension, as `slice` says it."""
    dim %= len(x.sizes)
    first, stop, _ = slice(start, end).indices(x.sizes[dim])
    sizes, strides = list(x.sizes), list(x.strides)
    stride, sizes[dim] = strides[dim], len(range(first, stop, step))
    if stride is None:
        if sizes[dim] != x.sizes[dim]:
            raise NotLowered("some of the particles are taken")
        return x
    strides[dim] = stride * step
    return part(x, sizes, strides, first * stride)


def select(walk: Walk, x: View, dim: int, index: int) -> View:
    """One place of a dimension, which goes."""
    dim %= len(x.sizes)
    stride = x.strides[dim]
    if stride is None:
        raise NotLowered("one of the particles is taken")
    offset = index % x.sizes[dim] * stride
    return part(x, [*x.sizes[:dim], *x.sizes[dim + 1 :]], [*x.strides[:dim], *x.strides[dim + 1 :]], offset)


def flip(walk: Walk, x: View, dims: Sequence[int]) -> View:
    """Dimensions read from the end."""
    strides, offset = list(x.strides), 0
    for d in dims_of(dims, len(x.sizes)):
        stride = strides[d]
        if stride is None:
            raise NotLowered("the particles' order is turned")
        offset += (x.sizes[d] - 1) * stride
        strides[d] = -stride
    return part(x, x.sizes, strides, offset)


def diagonal(walk: Walk, x: View, offset: int = 0, dim1: int = 0, dim2: int = 1) -> View:
    """The diagonal of two dimensions, as the last one."""
    first, second = dim1 % len(x.sizes), dim2 % len(x.sizes)
    a, b = x.strides[first], x.strides[second]
    if a is None or b is None:
        raise NotLowered("a diagonal over particles")
    start = offset * b if offset >= 0 else -offset * a
    size = max(0, min(x.sizes[first] - max(-offset, 0), x.sizes[second] - max(offset, 0)))
    kept = [d for d in range(len(x.sizes)) if d not in (first, second)]
    return part(x, [*(x.sizes[d] for d in kept), size], [*(x.strides[d] for d in kept), a + b], start)


def split(walk: Walk, x: View, sizes: Any, dim: int = 0) -> list[View]:
    """Parts of one dimension, one after the other."""
    total = x.sizes[dim]
    parts = [min(sizes, total - i) for i in range(0, total, sizes)] if isinstance(sizes, int) else sizes
    starts = [sum(parts[:i]) for i in range(len(parts))]
    return [narrow(walk, x, dim, s, s + n) for s, n in zip(starts, parts, strict=True)]


def unbind(walk: Walk, x: View, dim: int = 0) -> list[View]:
    """All places of a dimension."""
    return [select(walk, x, dim, i) for i in range(x.sizes[dim])]


def item(walk: Walk, x: Any, index: int) -> Any:
    return x[index]


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(aten, name).default: same for name in ("alias", "clone", "detach", "lift_fresh_copy")},
    aten.reshape.default: reshape,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.expand.default: expand,
    aten.slice.Tensor: narrow,
    aten.select.int: select,
    aten.flip.default: flip,
    aten.diagonal.default: diagonal,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.unbind.int: unbind,
    operator.getitem: item,
}

HANDLERS = {
    target: Handler(function, takes_folded=function is reshape, takes_kinds=True)
    for target, function in _FUNCTIONS.items()
}
"""The operations by their handlers."""
