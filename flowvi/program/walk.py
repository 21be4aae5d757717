r"""A walk through a graph of S particles that writes what one of them needs as instructions.

The dimension of the particles is taken out of every tensor that has it. What doesn't depend on z is computed now and is
a constant. The operations themselves are handlers: `elementwise`, `views`, `pieces`, `along` and `matrices`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flowvi.kernels.compiled.instructions import ELEMENTWISE, Op
from flowvi.program.instruction import Instruction, NotLowered, Register, Strided, contiguous
from flowvi.program.program import Program, assemble

__all__ = ["Folded", "Handler", "View", "Walk", "dims_of", "has_view", "part"]


@dataclass(frozen=True)
class Handler:
    """What an operation becomes.

    Attributes:
        function: called with the walk and the operation's arguments, tensors as `View` or as constants.
        takes_folded: whether it knows what to do with a `Folded`.
        takes_kinds: whether it knows what torch does with truth values and integers.
    """

    function: Callable[..., Any]
    takes_folded: bool = False
    takes_kinds: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function says."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class View:
    """A tensor of all particles: sizes and strides of its dimensions; that of the particles has stride None.

    Its kind is "float", "bool" or "int": for the last two torch has rules of their own.
    """

    register: Register
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int | None, ...]
    kind: str = "float"

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
class Folded:
    """A tensor whose particles are no dimension of their own: it was reshaped for a product with a constant matrix."""

    view: View
    sizes: tuple[int, ...]


class Walk:
    """A walk through a graph of S particles."""

    def __init__(self, module: fx.GraphModule, z: Tensor, handlers: Mapping[Any, Handler]) -> None:
        self.module, self.dtype, self._handlers = module, z.dtype, handlers
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
                env[node] = View(self.z, 0, (self.particles, self.dim), (None, 1))
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
        if not has_view((args, kwargs)):
            return target(*args, **kwargs)
        handler = self._handlers.get(target)
        if handler is None:
            raise NotLowered(f"the operation {target}")
        views = list(_views((args, kwargs)))
        if not handler.takes_folded and any(isinstance(x, Folded) for x in views):
            raise NotLowered("a reshape that mixes particles")
        if not handler.takes_kinds and any(isinstance(x, View) and x.kind != "float" for x in views):
            raise NotLowered(f"truth values or integers in the operation {target}")
        try:
            return handler(self, *args, **kwargs)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise NotLowered(f"the operation {target}: {error}") from error

    def _result(self, x: Any, sizes: tuple[int, ...]) -> Strided:
        """An output of the graph in a register of its own."""
        if isinstance(x, Folded):
            raise NotLowered("a reshape that mixes particles")
        inner = x.inner if isinstance(x, View) else self.constant(self.row(x, 0))
        if inner.sizes != sizes or (isinstance(x, View) and x.batch != 0):
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
        if x.shape[dim] != 1 and (x.shape[dim] != self.particles or not _same(first.expand_as(x), x)):
            raise NotLowered("a constant that is different for each particle")
        return first.squeeze(dim)

    def constant(self, x: Tensor | float) -> Strided:
        """A register with these numbers in every lane."""
        if isinstance(x, Tensor) and x.dim():
            key: Any = (x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype)
        else:
            key = str(float(x))
        if key not in self._constants:
            if isinstance(x, Tensor) and x.dim() and torch.promote_types(x.dtype, self.dtype) != self.dtype:
                raise NotLowered(f"numbers of another kind, {x.dtype}")
            values = torch.as_tensor(x, dtype=self.dtype)
            shape = values.shape
            for d, n in enumerate(shape):  # what is the same along a dimension is kept once
                if n > 1 and _same((first := values.narrow(d, 0, 1)).expand_as(values), values):
                    values = first
            # the tensor is kept beside it: its address is the key
            register = Register(values.numel(), values.contiguous())
            self._constants[key] = x, contiguous(register, values.shape).expanded(shape)
        return self._constants[key][1]

    def new(self, sizes: Sequence[int]) -> Strided:
        """A fresh register."""
        return contiguous(Register(math.prod(sizes)), sizes)

    def batched(self, x: Strided, batch: int, kind: str = "float") -> View:
        """With the dimension of particles put in."""
        sizes, strides = list(x.sizes), list[int | None](x.strides)
        sizes.insert(batch, self.particles)
        strides.insert(batch, None)
        return View(x.register, x.offset, tuple(sizes), tuple(strides), kind)

    def emit(self, op: Op, loops: Sequence[int], *operands: Strided | None, **more: Any) -> None:
        """One more instruction."""
        if math.prod(loops) < 1:
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

    def plain(self, x: View) -> View:
        """The same in order, copied if it is not."""
        if x.inner.whole:
            return x
        out = self.new(x.inner.sizes)
        self.copy(x.inner, out)
        return self.batched(out, x.batch, x.kind)

    def like(self, x: Any, other: Any) -> View:
        """A constant as a view with its particles where the other's are; a view as it is."""
        if isinstance(x, View):
            return x
        x = x[(None,) * (len(other.sizes) - x.dim())]
        return self.batched(self.constant(self.row(x, other.batch)), other.batch)

    def pointwise(self, op: Op, *operands: Any) -> Any:
        """An elementwise operation; all dimensions to the left of the particles are kept."""
        if not has_view(operands):  # a power that was worked out before
            raise NotLowered(f"{op.name} of constants")
        kind = self._kind_of_result(op, operands)
        places = {len(x.sizes) - x.batch for x in operands if isinstance(x, View)}
        if len(places) != 1:
            raise NotLowered("particles in different dimensions")
        right = places.pop()  # counted from the right, where broadcasting begins
        inner = list[Strided]()
        rank = max(len(x.sizes) if isinstance(x, View) else torch.as_tensor(x).dim() for x in operands)
        for x in operands:
            if isinstance(x, View):
                inner.append(x.inner)
            elif isinstance(x, Tensor) and x.dim() >= right:
                inner.append(self.constant(self.row(x, x.dim() - right)))
            else:
                inner.append(self.constant(x))
        sizes = torch.broadcast_shapes(*(x.sizes for x in inner))
        inner = [x.expanded(sizes) for x in inner]
        if op == Op.MUL and any(_is_one(x) for x in inner):
            other = inner[1] if _is_one(inner[0]) else inner[0]
            return self.batched(other, rank - right, kind)
        # what is the same along a dimension is computed once
        less = [n if any(x.strides[d] for x in inner) else 1 for d, n in enumerate(sizes)]
        out = self.new(less)
        self.emit(op, less, out, *inner)
        return self.batched(out.expanded(sizes), rank - right, kind)

    def _kind_of_result(self, op: Op, operands: Sequence[Any]) -> str:
        """The kind of the result; refuses what torch would compute in another dtype, or bit by bit."""
        numbers = operands[1:] if op == Op.WHERE else operands  # the others are a condition
        truth = all(_kind(x) == "bool" for x in numbers)
        if op in _LOGICAL and not truth:
            raise NotLowered(f"{op.name} of numbers")
        if op in (*_LOGICAL, *_TESTS):
            return "bool"
        if op == Op.WHERE:  # a choice rounds nothing
            kinds = {_kind(x) for x in numbers}
            return "float" if "float" in kinds else "int" if "int" in kinds else "bool"
        if not any(self._sets_dtype(x) for x in numbers):
            raise NotLowered(f"{op.name} of truth values or integers")
        return "float"

    def _sets_dtype(self, x: Any) -> bool:
        """Whether torch computes in the walk's dtype because of this operand."""
        return x.dtype == self.dtype if isinstance(x, Tensor) else isinstance(x, View) and x.kind == "float"


_LOGICAL = (Op.AND, Op.OR, Op.NOT)
_TESTS = (Op.EQ, Op.NE, Op.LT, Op.LE, Op.GT, Op.GE, Op.ISNAN)


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return "bool" if x.dtype == torch.bool else "float" if x.is_floating_point() else "int"
    return x.kind if isinstance(x, View) else type(x).__name__


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN, and 0 not to -0."""
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())


def _is_one(x: Strided) -> bool:
    constant = x.register.constant
    return constant is not None and constant.numel() == 1 and constant.item() == 1


def _views(tree: Any) -> Iterator[View | Folded]:
    """All that depends on z in it."""
    if isinstance(tree, View | Folded):
        yield tree
    elif isinstance(tree, dict):
        yield from _views(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for x in tree:
            yield from _views(x)


def has_view(tree: Any) -> bool:
    """Whether anything in it depends on z."""
    return any(True for _ in _views(tree))


def dims_of(dims: Any, rank: int) -> list[int]:
    """Dimensions counted from the front."""
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def part(x: View, sizes: Sequence[int], strides: Sequence[int | None], offset: int = 0) -> View:
    """Another view of the same register; strides say which dimension the particles are."""
    if sum(s is None for s in strides) != 1:
        raise NotLowered("particles are taken apart")
    return View(x.register, x.offset + offset, tuple(sizes), tuple(strides), x.kind)
