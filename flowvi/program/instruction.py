"""Registers, and instructions of the register machine (`flowvi.kernels.compiled.machine`) in terms of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from flowvi.kernels.compiled.instructions import ELEMENTWISE, LANES, Op

SHORT = 8
"""A loop that isn't worth being the innermost."""

__all__ = ["Instruction", "NotLowered", "Register", "Strided", "Tile", "contiguous"]


class NotLowered(Exception):
    """The graph has something that the machine hasn't."""


@dataclass(eq=False)
class Register:
    """Memory of `size` numbers for each lane; what it holds, if it is a constant."""

    size: int
    constant: Tensor | None = None


@dataclass(frozen=True)
class Strided:
    """One particle's tensor: a register, or a part of one."""

    register: Register
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def expanded(self, sizes: Sequence[int]) -> Strided:
        """Broadcast to these sizes."""
        new = len(sizes) - len(self.sizes)
        if new < 0 or any(n not in (1, m) for n, m in zip(self.sizes, sizes[new:], strict=True)):
            raise NotLowered(f"{self.sizes} can't be broadcast to {tuple(sizes)}")
        pairs = zip(self.sizes, self.strides, strict=True)
        return Strided(
            self.register, self.offset, tuple(sizes), (0,) * new + tuple(0 if n == 1 else s for n, s in pairs)
        )

    def padded(self, num: int) -> Strided:
        """With so many dimensions of size one in front."""
        return Strided(self.register, self.offset, (1,) * num + self.sizes, (0,) * num + self.strides)

    def moved(self, source: int, to: int) -> Strided:
        """A dimension at another place."""
        order = [d for d in range(len(self.sizes)) if d != source]
        order.insert(to, source)
        sizes, strides = tuple(self.sizes[d] for d in order), tuple(self.strides[d] for d in order)
        return Strided(self.register, self.offset, sizes, strides)

    @property
    def whole(self) -> bool:
        """Whether it is a register, all of it and in order."""
        plain = contiguous(self.register, self.sizes)
        same = all(s == t for n, s, t in zip(self.sizes, self.strides, plain.strides, strict=True) if n != 1)
        return same and self.offset == 0 and self.register.size == math.prod(self.sizes)


def contiguous(register: Register, sizes: Sequence[int]) -> Strided:
    """The register as a tensor of these sizes."""
    strides, size = list[int](), 1
    for n in reversed(sizes):
        strides.append(size)
        size *= n
    return Strided(register, 0, tuple(sizes), tuple(reversed(strides)))


@dataclass(frozen=True)
class Tile:
    """A part of the data that a group of instructions works on at a time.

    Attributes:
        size: of the data.
        length: of the tile.
        first: where the first tile begins.
        local: registers with room for one tile only.
    """

    size: int
    length: int
    first: int
    local: Set[Register]


@dataclass(frozen=True, eq=False)
class Instruction:
    """An operation along loops: for each operand, out first, a part of a register with a stride for each loop.

    Attributes:
        op: the operation.
        loops: lengths; at most four, for an elementwise operation after those are joined that are one for all operands.
        operands: out, a, b and c, as many as it has; None is left out. Their sizes don't matter.
        index: where its integers begin, or the constants without lanes of MATMUL_CONST.
        strides: of those constants.
        onto: whether a sum or product is added to what is there.
    """

    op: Op
    loops: tuple[int, ...]
    operands: tuple[Strided | None, ...]
    index: int = 0
    strides: tuple[int, ...] = ()
    onto: bool = False

    @property
    def registers(self) -> list[Register]:
        """What it reads and writes, out first."""
        return [x.register for x in self.operands if x is not None]

    @property
    def work(self) -> int:
        """Numbers computed for each particle."""
        return math.prod(self.loops)

    def along(self, size: int) -> int | None:
        """Which of its loops can be cut into tiles of data, if it is so long."""
        allowed = _CUT.get(self.op, range(len(self.loops)) if self.op in ELEMENTWISE else ())
        return next((d for d in allowed if self.loops[d] == size), None)

    def collects(self, loop: int) -> bool:
        """Whether cutting this loop makes its result a sum over tiles."""
        return self.op in _COLLECT and loop in _COLLECT[self.op]

    def encoded(self, places: Mapping[Register, int], tile: Tile | None = None) -> list[int]:
        """One row of code; of one tile, if it is cut."""
        operands = [*self.operands, *[None] * (4 - len(self.operands))]
        starts = [0 if x is None else (places[x.register] + x.offset) * LANES for x in operands]
        loops = list(self.loops)
        strides = [[0] * len(loops) if x is None else [s * LANES for s in x.strides] for x in operands]
        moves = [0] * 4
        if self.op == Op.MATMUL_CONST:
            starts[2], strides[2] = self.index, list(self.strides)
        if tile is not None:
            d = self.along(tile.size)
            assert d is not None
            loops[d] = tile.length
            for i, x in enumerate(operands):
                local = x is not None and x.register in tile.local
                moves[i] = 0 if local else strides[i][d]
            if self.op in _INDEXED and d == 3:  # the integers move instead of what they point into
                moves[3], moves[1 if self.op == Op.GATHER else 0] = 1, 0
            starts = [s + tile.first * m for s, m in zip(starts, moves, strict=True)]
            moves = [tile.length * m for m in moves]
        if self.op in _INDEXED:
            starts[3] = self.index + (tile.first * (moves[3] > 0) if tile is not None else 0)
        elif self.onto:
            starts[3], moves[3] = 1, 0
        elif self.op in ELEMENTWISE:
            loops, strides = _joined(loops, strides)
        pad = 4 - len(loops)
        if pad < 0:
            raise NotLowered(f"{self.op.name} with more than four loops")
        ways = [n for s in strides for n in [*[0] * pad, *s]]
        return [self.op, *starts, *[1] * pad, *loops, *ways, *moves]


_CUT: Mapping[Op, Sequence[int]] = {
    **dict.fromkeys((Op.SUM, Op.AMAX, Op.AMIN, Op.GATHER, Op.SCATTER_ADD), range(4)),
    **dict.fromkeys((Op.MATMUL, Op.MATMUL_CONST), (1, 2, 3)),
    **dict.fromkeys((Op.CUMSUM, Op.CUMPROD), range(3)),
    Op.CHOLESKY: (),
    Op.SOLVE_LOWER: (),
}
"""The loops of an operation that can be cut into tiles; of an elementwise one all."""

_COLLECT: Mapping[Op, Sequence[int]] = {
    **dict.fromkeys((Op.SUM, Op.AMAX, Op.AMIN), (2, 3)),
    **dict.fromkeys((Op.MATMUL, Op.MATMUL_CONST), (3,)),
    Op.SCATTER_ADD: (3,),
}
_INDEXED = (Op.GATHER, Op.SCATTER_ADD)


def _joined(loops: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Loops that all operands take as one become one."""
    keep = [d for d, n in enumerate(loops) if n != 1]
    loops, strides = [loops[d] for d in keep], [[s[d] for d in keep] for s in strides]
    for d in range(len(loops) - 2, -1, -1):
        if all(s[d] == s[d + 1] * loops[d + 1] for s in strides):
            loops[d] *= loops.pop(d + 1)
            for s in strides:
                s[d] = s.pop(d + 1)
    longest = max(range(len(loops)), key=loops.__getitem__, default=0)
    if loops and loops[-1] < SHORT < loops[longest]:  # the innermost loop is the quickest
        for a in (loops, *strides):
            a[longest], a[-1] = a[-1], a[longest]
    return loops, strides
