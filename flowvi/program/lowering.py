r"""From a flat graph of value and gradient to a program of the register machine.

The graph is of S particles at once. Here their dimension is taken out of every tensor that has it: what is left is what
one particle needs. What doesn't depend on z is computed now and is a constant. Views (select, expand, transpose, ...)
cost nothing: they are registers with an offset and strides.

What can't be written so raises `NotLowered`, and torch walks the graph as before.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions

from flowvi.errors import TraceError
from flowvi.kernels.compiled.instructions import ELEMENTWISE, Op
from flowvi.program.instruction import Instruction, NotLowered, Register, Strided, contiguous
from flowvi.program.program import Program, assemble
from flowvi.targets.trace import trace

__all__ = ["NUM_PARTICLES", "lower"]

aten = torch.ops.aten

NUM_PARTICLES = 13
"""S of the graph that is lowered: any number would do, and this one is no tensor's size by chance."""


@dataclass(frozen=True)
class _View:
    """A tensor of all particles: sizes and strides of its dimensions; that of the particles has stride None."""

    register: Register
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int | None, ...]

    @property
    def batch(self) -> int:
        """Which dimension the particles are."""
        return self.strides.index(None)

    @property
    def inner(self) -> Strided:
        """One particle's."""
        kept = [(n, s) for n, s in zip(self.sizes, self.strides, strict=True) if s is not None]
        return Strided(self.register, self.offset, tuple(n for n, _ in kept), tuple(s for _, s in kept))


@dataclass(frozen=True)
class _Folded:
    """A tensor whose particles are no dimension of their own: it was reshaped for a product with a constant matrix."""

    view: _View
    sizes: tuple[int, ...]


def lower(function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor) -> tuple[Program, Program]:
    """The programs of a graph: that of value and gradient, and that of the value alone.

    Args:
        function: z (S, D) -> log p (S,) and its gradient (S, D), in tensor operations.
        z: (13, D), where the graph is walked.

    Raises:
        NotLowered: there is something that the machine hasn't.
    """

    def both(z: Tensor) -> dict[str, Tensor]:
        value, grad = function(z)
        return {"value": value, "grad": grad}

    try:
        graph = trace(both, {"z": z}, _decompositions()).module("value", "grad")
    except TraceError as error:
        raise NotLowered(str(error)) from error
    return _Lowering(graph, z).programs()


@cache
def _decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    table.update(get_decompositions([aten._log_softmax, aten._softmax, aten.addmm, aten.softplus, aten.logsumexp]))
    for op in (aten.select_scatter.default, aten.diagonal_scatter.default):
        table.pop(op, None)
    return table


class _Lowering:
    """A walk through a graph of S particles."""

    def __init__(self, module: fx.GraphModule, z: Tensor) -> None:
        self.module, self.dtype = module, z.dtype
        self.particles, self.dim = z.shape
        self.instructions: list[Instruction] = []
        self.indices: list[int] = []
        self.fixed: list[Tensor] = []
        self._constants: dict[Any, tuple[Any, Strided]] = {}
        self.z = Register(self.dim)

    def programs(self) -> tuple[Program, Program]:
        """Walk, and put together what was found."""
        env: dict[fx.Node, Any] = {}
        result: Any = None
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                env[node] = _View(self.z, 0, (self.particles, self.dim), (None, 1))
            elif node.op == "get_attr":
                env[node] = getattr(self.module, node.target)
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                args, kwargs = (fx.node.map_arg(a, env.__getitem__) for a in (node.args, node.kwargs))
                env[node] = self._apply(node.target, args, kwargs)
        value, grad = self._result(result[0], ()), self._result(result[1], (self.dim,))
        fixed = torch.cat(self.fixed) if self.fixed else torch.zeros(0, dtype=self.dtype)
        shared = fixed, self.indices
        both = assemble(self.instructions, self.z, value, grad, *shared)
        return both, assemble(self.instructions, self.z, value, None, *shared)

    def _apply(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation gives: of constants at once, of views by instructions."""
        if not _has_view((args, kwargs)):
            return target(*args, **kwargs)
        handler = _HANDLERS.get(target)
        if handler is None:
            raise NotLowered(f"the operation {target}")
        if any(isinstance(a, _Folded) for a in args) and handler not in (_reshape, _mm, _bmm):
            raise NotLowered("a reshape that mixes particles")
        try:
            return handler(self, *args, **kwargs)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise NotLowered(f"the operation {target}: {error}") from error

    def _result(self, x: Any, sizes: tuple[int, ...]) -> Strided:
        """An output of the graph in a register of its own."""
        inner = x.inner if isinstance(x, _View) else self.constant(self.row(x, 0))
        if inner.sizes != sizes or (isinstance(x, _View) and x.batch != 0):
            raise NotLowered("outputs of another shape")
        if inner.whole and inner.register.constant is None and inner.register is not self.z:
            return inner
        out = self.new(sizes)
        self.copy(inner, out)
        return out

    # Operands.

    def row(self, x: Tensor, dim: int) -> Tensor:
        """A constant without its dimension of particles, along which it must not change."""
        first = x.narrow(dim, 0, 1)
        if x.shape[dim] != 1:
            same = first.expand_as(x)
            if x.shape[dim] != self.particles or not torch.equal(same.nan_to_num(), x.nan_to_num()):
                raise NotLowered("a constant that is different for each particle")
        return first.squeeze(dim)

    def constant(self, x: Tensor | float) -> Strided:
        """A register with these numbers in every lane."""
        if isinstance(x, Tensor) and x.dim():
            key: Any = (x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype)
        else:
            key = str(float(x))
        if key not in self._constants:
            values = torch.as_tensor(x, dtype=self.dtype)
            shape = values.shape
            for d, n in enumerate(shape):  # what is the same along a dimension is kept once
                if n > 1 and torch.equal((first := values.narrow(d, 0, 1)).expand_as(values), values):
                    values = first
            # the tensor is kept beside it: its address is the key
            register = Register(values.numel(), values.contiguous())
            self._constants[key] = x, contiguous(register, values.shape).expanded(shape)
        return self._constants[key][1]

    def new(self, sizes: Sequence[int]) -> Strided:
        """A fresh register."""
        return contiguous(Register(math.prod(sizes)), sizes)

    def batched(self, x: Strided, batch: int) -> _View:
        """With the dimension of particles put in."""
        sizes, strides = list(x.sizes), list[int | None](x.strides)
        sizes.insert(batch, self.particles)
        strides.insert(batch, None)
        return _View(x.register, x.offset, tuple(sizes), tuple(strides))

    def emit(self, op: Op, loops: Sequence[int], *operands: Strided | None, **more: Any) -> None:
        """One more instruction."""
        if not math.prod(loops):
            raise NotLowered("an empty tensor")
        loops = tuple(loops)
        if op not in ELEMENTWISE:  # their loops have roles, and so there are always four
            missing = 4 - len(loops)
            if missing < 0:
                raise NotLowered(f"{op.name} with more than four loops")
            loops = (1,) * missing + loops
            operands = tuple(None if x is None else x.padded(missing) for x in operands)
        self.instructions.append(Instruction(op, loops, operands, **more))

    def copy(self, x: Strided, out: Strided) -> None:
        """Out becomes x."""
        if math.prod(out.sizes):
            self.emit(Op.COPY, out.sizes, out, x.expanded(out.sizes))

    def plain(self, x: _View) -> _View:
        """The same in order, copied if it is not."""
        if x.inner.whole:
            return x
        out = self.new(x.inner.sizes)
        self.copy(x.inner, out)
        return self.batched(out, x.batch)

    def like(self, x: Any, other: Any) -> _View:
        """A constant as a view with its particles where the other's are; a view as it is."""
        if isinstance(x, _View):
            return x
        x = x[(None,) * (len(other.sizes) - x.dim())]
        return self.batched(self.constant(self.row(x, other.batch)), other.batch)

    def pointwise(self, op: Op, *operands: Any) -> Any:
        """An elementwise operation; all dimensions to the left of the particles are kept."""
        if not _has_view(operands):  # a power that was worked out before
            raise NotLowered(f"{op.name} of constants")
        places = {len(x.sizes) - x.batch for x in operands if isinstance(x, _View)}
        if len(places) != 1:
            raise NotLowered("particles in different dimensions")
        right = places.pop()  # counted from the right, where broadcasting begins
        inner = list[Strided]()
        rank = max(len(x.sizes) if isinstance(x, _View) else torch.as_tensor(x).dim() for x in operands)
        for x in operands:
            if isinstance(x, _View):
                inner.append(x.inner)
            elif isinstance(x, Tensor) and x.dim() >= right:
                inner.append(self.constant(self.row(x, x.dim() - right)))
            else:
                inner.append(self.constant(x))
        sizes = torch.broadcast_shapes(*(x.sizes for x in inner))
        inner = [x.expanded(sizes) for x in inner]
        if op == Op.MUL and any(_is_one(x) for x in inner):
            other = inner[1] if _is_one(inner[0]) else inner[0]
            return self.batched(other, rank - right)
        # what is the same along a dimension is computed once
        less = [n if any(x.strides[d] for x in inner) else 1 for d, n in enumerate(sizes)]
        out = self.new(less)
        self.emit(op, less, out, *inner)
        return self.batched(out.expanded(sizes), rank - right)


def _is_one(x: Strided) -> bool:
    constant = x.register.constant
    return constant is not None and constant.numel() == 1 and constant.item() == 1


def _has_view(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(map(_has_view, tree.values()))
    return isinstance(tree, _View | _Folded) or (isinstance(tree, tuple | list) and any(map(_has_view, tree)))


def _dims(dims: Any, rank: int) -> list[int]:
    """Dimensions counted from the front."""
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _part(x: _View, sizes: Sequence[int], strides: Sequence[int | None], offset: int = 0) -> _View:
    if sum(s is None for s in strides) != 1:
        raise NotLowered("particles are taken apart")
    return _View(x.register, x.offset + offset, tuple(sizes), tuple(strides))


# Elementwise operations.


def _unary(op: Op) -> Callable[..., _View]:
    return lambda walk, x: walk.pointwise(op, x)


def _binary(op: Op) -> Callable[..., _View]:
    return lambda walk, x, y: walk.pointwise(op, x, y)


def _sum_of_two(op: Op) -> Callable[..., _View]:
    """An addition or subtraction; alpha times the second."""

    def handler(walk: _Lowering, x: Any, y: Any, alpha: float = 1) -> _View:
        if alpha != 1:
            y = walk.pointwise(Op.MUL, y, alpha) if isinstance(y, _View) else y * alpha
        return walk.pointwise(op, x, y)

    return handler


def _div(walk: _Lowering, x: Any, y: Any, rounding_mode: str | None = None) -> _View:
    if rounding_mode is not None:
        raise NotLowered("a rounded division")
    if isinstance(y, Tensor) or (not isinstance(y, _View) and y):
        return walk.pointwise(Op.MUL, x, 1 / y)
    if isinstance(x, _View) and isinstance(y, _View) and 2 * _count(y) <= _count(x):
        return walk.pointwise(Op.MUL, x, walk.pointwise(Op.DIV, 1.0, y))
    return walk.pointwise(Op.DIV, x, y)


def _count(x: _View) -> int:
    """Different numbers of each particle."""
    return math.prod(n for n, s in zip(x.inner.sizes, x.inner.strides, strict=True) if s)


def _pow(walk: _Lowering, x: Any, y: Any) -> _View:
    if isinstance(y, int | float) and isinstance(x, _View):
        if y == 0.5:
            return walk.pointwise(Op.SQRT, x)
        if y in (1, 2, 3):
            out = x
            for _ in range(int(y) - 1):
                out = walk.pointwise(Op.MUL, out, x)
            return out
        if y == -1:
            return walk.pointwise(Op.DIV, 1.0, x)
    return walk.pointwise(Op.POW, x, y)


def _clamp(walk: _Lowering, x: _View, low: Any = None, high: Any = None, **kwargs: Any) -> _View:
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if low is not None:
        x = walk.pointwise(Op.MAX, x, low)
    return x if high is None else walk.pointwise(Op.MIN, x, high)


def _rsqrt(walk: _Lowering, x: _View) -> _View:
    return walk.pointwise(Op.DIV, 1.0, walk.pointwise(Op.SQRT, x))


def _isinf(walk: _Lowering, x: _View) -> _View:
    return walk.pointwise(Op.EQ, walk.pointwise(Op.ABS, x), math.inf)


def _full_like(walk: _Lowering, x: _View, value: float, **_: Any) -> Tensor:
    return torch.full(x.sizes, value, dtype=walk.dtype)


def _to_copy(walk: _Lowering, x: _View, dtype: torch.dtype | None = None, **_: Any) -> _View:
    if dtype not in (None, walk.dtype, torch.bool):
        raise NotLowered(f"numbers of another kind, {dtype}")
    return walk.pointwise(Op.NE, x, 0.0) if dtype == torch.bool else x


# Views.


def _same(walk: _Lowering, x: _View, *_: Any, **__: Any) -> _View:
    return x


def _reshape(walk: _Lowering, x: Any, sizes: Sequence[int]) -> Any:
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(x.sizes) // max(1, -math.prod(sizes))
    if isinstance(x, _Folded):
        x = x.view
    before = math.prod(x.sizes[: x.batch])
    places = [d for d, n in enumerate(sizes) if n == x.sizes[x.batch] and math.prod(sizes[:d]) == before]
    if not places:
        return _Folded(x, tuple(sizes))
    x = walk.plain(x)
    inner = contiguous(x.register, [n for d, n in enumerate(sizes) if d != places[0]])
    return walk.batched(inner, places[0])


def _unsqueeze(walk: _Lowering, x: _View, dim: int) -> _View:
    dim %= len(x.sizes) + 1
    return _part(x, [*x.sizes[:dim], 1, *x.sizes[dim:]], [*x.strides[:dim], 0, *x.strides[dim:]])


def _squeeze(walk: _Lowering, x: _View, dims: Any) -> _View:
    out = [d for d in _dims(dims, len(x.sizes)) if x.sizes[d] == 1]
    kept = [d for d in range(len(x.sizes)) if d not in out]
    return _part(x, [x.sizes[d] for d in kept], [x.strides[d] for d in kept])


def _permute(walk: _Lowering, x: _View, dims: Sequence[int]) -> _View:
    order = _dims(dims, len(x.sizes))
    return _part(x, [x.sizes[d] for d in order], [x.strides[d] for d in order])


def _transpose(walk: _Lowering, x: _View, first: int, second: int) -> _View:
    order = list(range(len(x.sizes)))
    order[first], order[second] = order[second], order[first]
    return _permute(walk, x, order)


def _expand(walk: _Lowering, x: _View, sizes: Sequence[int], implicit: bool = False) -> _View:
    new = len(sizes) - len(x.sizes)
    strides: list[int | None] = [0] * new
    for n, m, s in zip(x.sizes, sizes[new:], x.strides, strict=True):
        if s is None and m not in (-1, n):
            raise NotLowered("particles are repeated")
        strides.append(0 if n == 1 and s is not None else s)
    full = [n if m == -1 else m for n, m in zip((1,) * new + x.sizes, sizes, strict=True)]
    return _part(x, full, strides)


def _slice(walk: _Lowering, x: _View, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> _View:
    dim %= len(x.sizes)
    first, stop, _ = slice(start, end).indices(x.sizes[dim])
    sizes, strides = list(x.sizes), list(x.strides)
    stride, sizes[dim] = strides[dim], len(range(first, stop, step))
    if stride is None:
        if sizes[dim] != x.sizes[dim]:
            raise NotLowered("some of the particles are taken")
        return x
    strides[dim] = stride * step
    return _part(x, sizes, strides, first * stride)


def _select(walk: _Lowering, x: _View, dim: int, index: int) -> _View:
    dim %= len(x.sizes)
    stride = x.strides[dim]
    if stride is None:
        raise NotLowered("one of the particles is taken")
    offset = index % x.sizes[dim] * stride
    return _part(x, [*x.sizes[:dim], *x.sizes[dim + 1 :]], [*x.strides[:dim], *x.strides[dim + 1 :]], offset)


def _flip(walk: _Lowering, x: _View, dims: Sequence[int]) -> _View:
    strides, offset = list(x.strides), 0
    for d in _dims(dims, len(x.sizes)):
        stride = strides[d]
        if stride is None:
            raise NotLowered("the particles' order is turned")
        offset += (x.sizes[d] - 1) * stride
        strides[d] = -stride
    return _part(x, x.sizes, strides, offset)


def _diagonal(walk: _Lowering, x: _View, offset: int = 0, dim1: int = 0, dim2: int = 1) -> _View:
    first, second = dim1 % len(x.sizes), dim2 % len(x.sizes)
    a, b = x.strides[first], x.strides[second]
    if a is None or b is None:
        raise NotLowered("a diagonal over particles")
    start = offset * b if offset >= 0 else -offset * a
    size = min(x.sizes[first] - max(-offset, 0), x.sizes[second] - max(offset, 0))
    kept = [d for d in range(len(x.sizes)) if d not in (first, second)]
    return _part(x, [*(x.sizes[d] for d in kept), size], [*(x.strides[d] for d in kept), a + b], start)


def _split(walk: _Lowering, x: _View, sizes: Any, dim: int = 0) -> list[_View]:
    total = x.sizes[dim]
    parts = [min(sizes, total - i) for i in range(0, total, sizes)] if isinstance(sizes, int) else sizes
    starts = [sum(parts[:i]) for i in range(len(parts))]
    return [_slice(walk, x, dim, s, s + n) for s, n in zip(starts, parts, strict=True)]


def _unbind(walk: _Lowering, x: _View, dim: int = 0) -> list[_View]:
    return [_select(walk, x, dim, i) for i in range(x.sizes[dim])]


# What is put together.


def _scatter(view: Callable[..., _View]) -> Callable[..., _View]:
    """A copy of x in which what `view` shows of it is replaced."""

    def handler(walk: _Lowering, x: Any, source: Any, *args: Any, **kwargs: Any) -> _View:
        if not isinstance(x, _View):  # a constant; the particles are in front
            x = walk.batched(walk.constant(walk.row(x, 0)), 0)
        if isinstance(source, _View) and (x.batch != 0 or source.batch != 0):
            raise NotLowered("particles that are not in front")
        out = walk.new(x.inner.sizes)
        walk.copy(x.inner, out)
        whole = walk.batched(out, x.batch)
        part = view(walk, whole, *args, **kwargs)
        walk.copy(walk.like(source, part).inner, part.inner)
        return whole

    return handler


def _cat(walk: _Lowering, parts: Sequence[Any], dim: int = 0) -> _View:
    first = next(p for p in parts if isinstance(p, _View))
    dim %= len(first.sizes)
    if dim == first.batch:
        raise NotLowered("particles are put together")
    views = [walk.like(p, first) for p in parts if not isinstance(p, Tensor) or p.numel()]
    if any(v.batch != first.batch for v in views):
        raise NotLowered("particles in different dimensions")
    sizes = list(first.sizes)
    sizes[dim] = sum(v.sizes[dim] for v in views)
    out = walk.batched(walk.new([n for d, n in enumerate(sizes) if d != first.batch]), first.batch)
    start = 0
    for v in views:
        walk.copy(v.inner, _slice(walk, out, dim, start, start + v.sizes[dim]).inner)
        start += v.sizes[dim]
    return out


def _stack(walk: _Lowering, parts: Sequence[Any], dim: int = 0) -> _View:
    rank = next(len(p.sizes) for p in parts if isinstance(p, _View)) + 1
    each = [_unsqueeze(walk, p, dim % rank) if isinstance(p, _View) else p.unsqueeze(dim) for p in parts]
    return _cat(walk, each, dim % rank)


def _pad(walk: _Lowering, x: _View, pad: Sequence[int], value: float = 0.0) -> _View:
    ends = {len(x.sizes) - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    for d, (before, after) in ends.items():  # fewer than none are cut off
        x = _slice(walk, x, d, max(0, -before), x.sizes[d] - max(0, -after))
    sizes = [n + sum(max(0, e) for e in ends.get(d, ())) for d, n in enumerate(x.sizes)]
    if sizes == list(x.sizes):
        return x
    if sizes[x.batch] != x.sizes[x.batch]:
        raise NotLowered("particles are added")
    out = walk.batched(walk.new([n for d, n in enumerate(sizes) if d != x.batch]), x.batch)
    walk.copy(walk.constant(value), out.inner)
    part = out
    for d, (before, _) in ends.items():
        if d != x.batch:
            part = _slice(walk, part, d, max(0, before), max(0, before) + x.sizes[d])
    walk.copy(x.inner, part.inner)
    return out


def _where(walk: _Lowering, condition: Any, x: Any, y: Any) -> _View:
    return walk.pointwise(Op.WHERE, condition, x, y)


def _indexed(walk: _Lowering, sizes: Sequence[int], indices: Sequence[Any]) -> tuple[int, int, Tensor]:
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


def _integers(walk: _Lowering, index: Tensor) -> int:
    walk.indices += index.reshape(-1).tolist()
    return len(walk.indices) - index.numel()


def _index(walk: _Lowering, x: _View, indices: Sequence[Any]) -> _View:
    start, stop, index = _indexed(walk, x.sizes, indices)
    if start <= x.batch < stop:
        raise NotLowered("particles are chosen")
    sizes = [*x.sizes[:start], math.prod(x.sizes[start:stop]), *x.sizes[stop:]]
    x = _reshape(walk, x, sizes)
    batch, along = x.batch, start - (x.batch < start)
    source = x.inner.moved(along, len(sizes) - 2)
    out = walk.new([*source.sizes[:-1], index.numel()])
    walk.emit(Op.GATHER, out.sizes, out, source, None, index=_integers(walk, index))
    found = walk.batched(out.moved(len(sizes) - 2, along), batch)
    return _reshape(walk, found, [*sizes[:start], *index.shape, *sizes[start + 1 :]])


def _index_put(walk: _Lowering, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> _View:
    first = x if isinstance(x, _View) else values
    if not isinstance(first, _View):
        raise NotLowered("an index that depends on z")
    if not isinstance(x, _View):
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
    target = _reshape(walk, walk.batched(whole, x.batch), merged)
    shape = [*merged[:start], *index.shape, *merged[start + 1 :]]
    if isinstance(values, _View):
        values = _expand(walk, values, shape)
    else:
        rows = walk.row(values.expand(shape), x.batch if x.batch < start else x.batch - stop + start + index.dim())
        values = walk.batched(walk.constant(rows), x.batch)
    values = _reshape(walk, values, [*merged[:start], index.numel(), *merged[start + 1 :]])
    if values.batch != target.batch:
        raise NotLowered("particles are chosen")
    along = start - (x.batch < start)
    to, source = (v.inner.moved(along, len(merged) - 2) for v in (target, values))
    walk.emit(Op.SCATTER_ADD, source.sizes, to, None, source, index=_integers(walk, index))
    return walk.batched(whole, x.batch)


def _index_select(walk: _Lowering, x: _View, dim: int, index: Tensor) -> _View:
    dim %= len(x.sizes)
    return _index(walk, x, [*[None] * dim, index])


def _places(walk: _Lowering, sizes: Sequence[int], dim: int, index: Tensor) -> Tensor:
    """Where in the whole of a tensor of one particle each number is that `gather` asks for."""
    grid = list(torch.meshgrid(*[torch.arange(n) for n in index.shape], indexing="ij"))
    grid[dim] = index % sizes[dim]
    return sum((g * s for g, s in zip(grid, contiguous(walk.z, sizes).strides, strict=True)), torch.zeros_like(index))


def _gather(walk: _Lowering, x: _View, dim: int, index: Any, **_: Any) -> _View:
    dim %= len(x.sizes)
    if not isinstance(index, Tensor) or dim == x.batch:
        raise NotLowered("an index that depends on z")
    row = walk.row(index, x.batch)
    places = _places(walk, x.inner.sizes, dim - (x.batch < dim), row)
    flat = walk.batched(Strided(walk.plain(x).register, 0, (math.prod(x.inner.sizes),), (1,)), 0)
    return walk.batched(_index(walk, flat, [None, places]).inner, x.batch)


def _scatter_at(accumulate: bool) -> Callable[..., _View]:
    def handler(walk: _Lowering, x: Any, dim: int, index: Any, source: Any, **_: Any) -> _View:
        dim %= index.dim() if isinstance(index, Tensor) else 1
        batch = next((v.batch for v in (x, source) if isinstance(v, _View)), 0)
        if not isinstance(index, Tensor) or dim == batch:
            raise NotLowered("an index that depends on z")
        if isinstance(source, _View):
            source = _part(source, index.shape, source.strides)
        elif isinstance(source, Tensor):
            source = source[tuple(slice(n) for n in index.shape)]
        else:
            source = torch.full(index.shape, source, dtype=walk.dtype)
        like = x if isinstance(x, _View) else source
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


# Along dimensions.


def _reduction(op: Op) -> Callable[..., _View]:
    def handler(walk: _Lowering, x: _View, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> _View:
        if dtype not in (None, walk.dtype):
            raise NotLowered(f"a sum of another kind, {dtype}")
        along = _dims(dims if dims is not None and dims != [] else range(len(x.sizes)), len(x.sizes))
        if x.batch in along:
            raise NotLowered("a reduction over particles")
        rank = len(x.sizes)
        if 1 < math.prod(x.sizes[d] for d in along) <= _FEW and len(along) == 1:
            found = _of_few(walk, op, x, along[0])
            return _unsqueeze(walk, found, along[0]) if keepdim else found
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
            found = _unsqueeze(walk, found, d)
        return found

    return handler


_FEW = 4
"""Numbers that are added up one by one, each by an operation over all sums."""


def _of_few(walk: _Lowering, op: Op, x: _View, dim: int) -> _View:
    first, *others = _unbind(walk, x, dim)
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


def _mean(walk: _Lowering, x: _View, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> _View:
    total = _reduction(Op.SUM)(walk, x, dims, keepdim, dtype)
    return walk.pointwise(Op.MUL, total, math.prod(total.inner.sizes) / math.prod(x.inner.sizes))


def _cumulative(op: Op) -> Callable[..., _View]:
    def handler(walk: _Lowering, x: _View, dim: int, dtype: Any = None) -> _View:
        dim %= len(x.sizes)
        if dim == x.batch or dtype not in (None, walk.dtype):
            raise NotLowered("a cumulative sum of that kind")
        along, last = dim - (x.batch < dim), len(x.sizes) - 2
        out = walk.new(x.inner.sizes)
        walk.emit(op, out.moved(along, last).sizes, out.moved(along, last), x.inner.moved(along, last))
        return walk.batched(out, x.batch)

    return handler


def _prod(walk: _Lowering, x: _View, dim: int, keepdim: bool = False, dtype: Any = None) -> _View:
    found = _select(walk, _cumulative(Op.CUMPROD)(walk, x, dim, dtype), dim, -1)
    return _unsqueeze(walk, found, dim % len(x.sizes)) if keepdim else found


# Matrices.


def _mm(walk: _Lowering, a: Any, b: Any) -> Any:
    """A matrix product of which one factor may be constant; a has rows n, b columns m, k is summed over."""
    if isinstance(a, _Folded) and isinstance(b, Tensor):
        if a.view.sizes[-1] != len(b) or a.view.batch == len(a.view.sizes) - 1:
            raise NotLowered("a reshape that mixes particles")
        found = _rows_times(walk, a.view, b)
        return _Folded(found, (a.sizes[0], b.shape[1]))
    if isinstance(a, Tensor) and isinstance(b, _View):
        return _permute(walk, _mm(walk, _permute(walk, b, [1, 0]), a.mT), [1, 0])
    if not isinstance(a, _View) or not isinstance(b, Tensor):
        raise NotLowered("a product over particles")
    if a.batch != 0:  # x (k', S) is a product over particles; (S, k) is a row for each
        raise NotLowered("a product over particles")
    inner, columns = a.inner, b.shape[1]
    out = walk.new([columns])
    source = Strided(inner.register, inner.offset, (1, 1, columns, inner.sizes[0]), (0, 0, 0, inner.strides[0]))
    to = Strided(out.register, 0, source.sizes, (0, 0, 1, 0))
    _times_constant(walk, to, source, b.mT.reshape(1, columns, -1))
    return walk.batched(out, 0)


def _rows_times(walk: _Lowering, x: _View, b: Tensor) -> _View:
    """Each row of x, which may have any number of dimensions, times the same matrix."""
    x = walk.plain(x)
    *outer, k = x.inner.sizes
    rows, m = math.prod(outer), b.shape[1]
    out = walk.new([rows, m])
    source = Strided(x.register, 0, (1, rows, m, k), (0, k, 0, 1))
    _times_constant(walk, Strided(out.register, 0, source.sizes, (0, m, 1, 0)), source, b.mT[None])
    return walk.batched(contiguous(out.register, [*outer, m]), x.batch)


def _times_constant(walk: _Lowering, out: Strided, a: Strided, b: Tensor) -> None:
    """B (n0 or 1, n2, n3) for loops n0, n1, n2, n3."""
    values = b.to(walk.dtype).contiguous()
    index = sum(t.numel() for t in walk.fixed)
    walk.fixed.append(values.reshape(-1))
    strides = (0 if values.shape[0] == 1 else values.stride(0), 0, values.stride(1), 1)
    walk.emit(Op.MATMUL_CONST, a.sizes, out, a, None, index=index, strides=strides)


def _bmm(walk: _Lowering, a: Any, b: Any) -> Any:
    """Matrix products of each particle, or of each of a number of matrices with the same number for each particle."""
    if isinstance(a, _Folded) or isinstance(b, _Folded):
        return _bmm_folded(walk, a, b)
    first = a if isinstance(a, _View) else b
    if first.batch == 0:
        a, b = (x if isinstance(x, _View) else walk.row(x, 0) for x in (a, b))
        found = _matrices(walk, *(x.unsqueeze(0) if isinstance(x, Tensor) else _unsqueeze(walk, x, 1) for x in (a, b)))
        return _squeeze(walk, found, 1)
    if isinstance(a, _View) and isinstance(b, Tensor) and a.batch == 1:  # (g, S, k) (g, k, m)
        x = a.inner
        (g, k), m = x.sizes, b.shape[2]
        out, loops = walk.new([g, m]), (g, 1, m, k)
        source = Strided(x.register, x.offset, loops, (x.strides[0], 0, 0, x.strides[1]))
        _times_constant(walk, Strided(out.register, 0, loops, (m, 0, 1, 0)), source, b.mT)
        return walk.batched(out, 1)
    if isinstance(a, Tensor) and isinstance(b, _View) and b.batch == 2:
        return _permute(walk, _bmm(walk, _permute(walk, b, [0, 2, 1]), a.mT), [0, 2, 1])
    raise NotLowered("a product over particles")


def _bmm_folded(walk: _Lowering, a: Any, b: Any) -> _Folded:
    """Several matrices of each particle, the dimension of particles folded into that of the matrices."""
    each = list[Any]()
    for x in (a, b):
        n, *matrix = x.sizes if isinstance(x, _Folded) else x.shape
        sizes = [walk.particles, n // walk.particles, *matrix]
        if isinstance(x, Tensor):
            each.append(walk.row(x.reshape(sizes), 0))
        elif x.view.batch == 0:
            each.append(_reshape(walk, x.view, sizes))
        else:
            raise NotLowered("a reshape that mixes particles")
    found = _matrices(walk, *each)
    return _Folded(found, (math.prod(found.sizes[:2]), *found.sizes[2:]))


def _matrices(walk: _Lowering, a: Any, b: Any) -> _View:
    """(S, g, n, k) times (S, g, k, m), one of which may be a constant without S."""
    if isinstance(a, Tensor):
        return _transpose(walk, _matrices(walk, _transpose(walk, b, 2, 3), a.mT), 2, 3)
    if isinstance(b, _View) and b.batch != a.batch:
        raise NotLowered("particles in different dimensions")
    x = a.inner
    (g, n, k), m = x.sizes, (b.sizes if isinstance(b, _View) else b.shape)[-1]
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


def _cholesky_ex(walk: _Lowering, x: _View, *, upper: bool = False, check_errors: bool = False) -> tuple[_View, _View]:
    if x.batch != 0 or len(x.sizes) > 4 or check_errors:
        raise NotLowered("a factorization of that kind")
    out = walk.new(x.inner.sizes)
    walk.copy(x.inner, out)
    if upper:  # the factor of the transpose, transposed, reads the upper triangle
        raise NotLowered("an upper factor")
    walk.emit(Op.CHOLESKY, out.sizes, out)
    found = walk.batched(out, 0)
    failed = _select(walk, _select(walk, found, -1, -1), -1, -1)
    return found, walk.pointwise(Op.ISNAN, failed)


def _solve_triangular(
    walk: _Lowering, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> _View:
    a, b = walk.like(a, b), walk.like(b, a)
    if unitriangular or a.batch != 0 or b.batch != 0 or not 3 <= len(a.sizes) <= 4 or len(a.sizes) != len(b.sizes):
        raise NotLowered("a triangular system of that kind")
    rank = len(a.sizes)
    if not left:  # X A = B is A^T X^T = B^T
        flipped = [_transpose(walk, x, rank - 2, rank - 1) for x in (a, b)]
        found = _solve_triangular(walk, *flipped, upper=not upper)
        return _transpose(walk, found, rank - 2, rank - 1)
    if upper:  # read from the end it is lower
        found = _solve_triangular(walk, _flip(walk, a, [-2, -1]), _flip(walk, b, [-2]), upper=False)
        return _flip(walk, found, [-2])
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


def _triangle(upper: bool) -> Callable[..., _View]:
    def handler(walk: _Lowering, x: _View, diagonal: int = 0) -> _View:
        ones = torch.ones(x.sizes[-2:], dtype=walk.dtype)
        mask = ones.triu(diagonal) if upper else ones.tril(diagonal)
        if x.batch >= len(x.sizes) - 2:
            raise NotLowered("a triangle over particles")
        return walk.pointwise(Op.WHERE, mask, x, 0.0)

    return handler


def _item(walk: _Lowering, x: Any, index: int) -> Any:
    return x[index]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **{
        getattr(aten, name).default: _unary(Op[name.upper()])
        for name in (
            *("neg", "abs", "sign", "exp", "log", "log1p", "expm1", "sqrt", "sigmoid", "tanh", "sin"),
            *("cos", "lgamma", "digamma", "erf", "erfc", "isnan"),
        )
    },
    **{
        getattr(getattr(aten, name), kind): _binary(Op[name.upper()])
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Scalar", "Tensor")
    },
    **{getattr(aten.mul, kind): _binary(Op.MUL) for kind in ("Scalar", "Tensor")},
    **{getattr(aten.add, kind): _sum_of_two(Op.ADD) for kind in ("Scalar", "Tensor")},
    **{getattr(aten.sub, kind): _sum_of_two(Op.SUB) for kind in ("Scalar", "Tensor")},
    **{getattr(aten.div, kind): _div for kind in ("Scalar", "Tensor", "Tensor_mode")},
    **{getattr(aten.pow, kind): _pow for kind in ("Scalar", "Tensor_Scalar", "Tensor_Tensor")},
    aten.maximum.default: _binary(Op.MAX),
    aten.minimum.default: _binary(Op.MIN),
    aten.logical_and.default: _binary(Op.AND),
    aten.bitwise_and.Tensor: _binary(Op.AND),
    aten.logical_or.default: _binary(Op.OR),
    aten.bitwise_or.Tensor: _binary(Op.OR),
    aten.logical_not.default: _unary(Op.NOT),
    aten.bitwise_not.default: _unary(Op.NOT),
    aten.relu.default: lambda walk, x: walk.pointwise(Op.MAX, x, 0.0),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.reciprocal.default: lambda walk, x: walk.pointwise(Op.DIV, 1.0, x),
    aten.rsqrt.default: _rsqrt,
    aten.isinf.default: _isinf,
    aten.where.self: _where,
    aten.full_like.default: _full_like,
    aten._to_copy.default: _to_copy,
    **{getattr(aten, name).default: _same for name in ("alias", "clone", "detach", "lift_fresh_copy")},
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.diagonal.default: _diagonal,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.slice_scatter.default: _scatter(_slice),
    aten.select_scatter.default: _scatter(_select),
    aten.diagonal_scatter.default: _scatter(_diagonal),
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
    aten.sum.dim_IntList: _reduction(Op.SUM),
    aten.amax.default: _reduction(Op.AMAX),
    aten.amin.default: _reduction(Op.AMIN),
    aten.mean.dim: _mean,
    aten.prod.dim_int: _prod,
    aten.cumsum.default: _cumulative(Op.CUMSUM),
    aten.cumprod.default: _cumulative(Op.CUMPROD),
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.linalg_cholesky_ex.default: _cholesky_ex,
    aten.linalg_solve_triangular.default: _solve_triangular,
    aten.tril.default: _triangle(False),
    aten.triu.default: _triangle(True),
    operator.getitem: _item,
}
