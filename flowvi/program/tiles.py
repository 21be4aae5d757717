r"""The order of a program's instructions: those along the data together, so that they can be done tile by tile.

A model of a thousand data makes tensors of a thousand numbers for each of the block's particles, and what one
instruction leaves is out of the first-level cache before the next one comes. Instructions along the same data that
don't wait for a sum over them are put one after the other, and all are done for some of the data, then all for the
next. A register that only they use has room for one tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch

from flowvi.kernels.compiled.instructions import TILES, WIDTH, Op
from flowvi.program.instruction import Instruction, Register, Strided, Tile, contiguous

__all__ = ["Group", "schedule"]

LEAST = 192
"""Data from which on it pays to cut them."""

NUMBERS = 128
"""Numbers of each particle in a tile's largest register, about: 8 KiB of float64 for a block."""


@dataclass
class Group:
    """Instructions that are done together, for a tile of the data at a time; or one, where there are no tiles."""

    instructions: list[Instruction]
    size: int | None = None
    local: Set[Register] = field(default_factory=frozenset)

    @property
    def registers(self) -> list[Register]:
        """What they read and write, each once."""
        return list(dict.fromkeys(r for i in self.instructions for r in i.registers))

    @property
    def _length(self) -> int:
        """Of a tile: a divisor of the data's size, if there is one of about the right length."""
        assert self.size is not None
        most = max(i.work for i in self.instructions) // self.size
        length = min(self.size, max(8, NUMBERS // most))
        near = [n for n in range(length // 2 + 1, 2 * length) if self.size % n == 0]
        return min(near, key=lambda n: abs(n - length)) if near else length

    def room(self, register: Register) -> int:
        """The numbers that a register needs for each particle."""
        if register not in self.local:
            return register.size
        assert self.size is not None
        return register.size // self.size * self._length

    def encoded(self, places: Mapping[Register, int]) -> list[list[int]]:
        """Rows of code."""
        if self.size is None:
            return [i.encoded(places) for i in self.instructions]
        length, rows = self._length, list[list[int]]()
        tiles, rest = divmod(self.size, length)
        for first, n, times in ((0, length, tiles), (tiles * length, rest, 1)):
            if n:
                tile = Tile(self.size, n, first, self.local)
                rows.append([TILES, len(self.instructions), times, *[0] * (WIDTH - 3)])
                rows += [i.encoded(places, tile) for i in self.instructions]
        return rows


def schedule(instructions: Sequence[Instruction], results: Iterable[Register]) -> list[Group]:
    """The instructions in an order that is as good as theirs, and in groups.

    Args:
        instructions: in order.
        results: registers that are read in the end.
    """
    before = _dependencies(instructions)
    sizes = [_size(i) for i in instructions]
    left, done, groups = list(range(len(instructions))), set[int](), list[Group]()
    while left:
        later = list[int]()
        for i in left:  # all that is along no data
            if sizes[i] is None and before[i] <= done:
                groups.append(Group([instructions[i]]))
                done.add(i)
            else:
                later.append(i)
        left = later
        ready = [i for i in left if before[i] <= done]
        if not ready:
            continue
        together = _together(ready[0], left, sizes, before, done, instructions)
        groups += _cut([instructions[i] for i in together], sizes[ready[0]])
        done.update(together)
        left = [i for i in left if i not in done]
    _find_local(groups, set(results))
    return groups


def _size(instruction: Instruction) -> int | None:
    """The data that it runs along: the longest of its loops that can be cut."""
    fits = [n for n in instruction.loops if n >= LEAST and instruction.along(n) is not None]
    return max(fits, default=None)


def _dependencies(instructions: Sequence[Instruction]) -> list[set[int]]:
    """What must be done before each: whoever wrote what it reads, and whoever used what it writes."""
    writers, readers = dict[Register, list[int]](), dict[Register, list[int]]()
    before = list[set[int]]()
    for i, instruction in enumerate(instructions):
        out, *read = instruction.registers
        needs = {j for r in read for j in writers.get(r, ())}
        before.append(needs | {*writers.get(out, ()), *readers.get(out, ())})
        writers.setdefault(out, []).append(i)
        for r in read:
            readers.setdefault(r, []).append(i)
    return before


def _together(
    first: int,
    left: Sequence[int],
    sizes: Sequence[int | None],
    before: Sequence[Set[int]],
    done: Set[int],
    instructions: Sequence[Instruction],
) -> list[int]:
    """The first, and all that can be done with it tile by tile."""
    size = sizes[first]
    assert size is not None
    chosen, written, read = list[int](), dict[Register, int | None](), dict[Register, set[int | None]]()
    for i in left:
        if sizes[i] != size or not before[i] <= done | set(chosen):
            continue
        (out, to), *others = _steps(instructions[i], size)
        if any(r in written and (step is None or step != written[r]) for r, step in [(out, to), *others]):
            continue
        if out in read and (to is None or read[out] != {to}):
            continue
        written[out] = to
        for register, step in others:
            read.setdefault(register, set()).add(step)
        chosen.append(i)
    return chosen


def _steps(instruction: Instruction, size: int) -> list[tuple[Register, int | None]]:
    """Each operand's register, out first, and its stride along the data; None where a datum has no part of its own."""
    loop = instruction.along(size)
    assert loop is not None
    collects, anywhere = instruction.collects(loop), instruction.op == Op.GATHER and loop == 3
    return [
        (x.register, None if (collects and i == 0) or (anywhere and i == 1) else _step(x, loop, size))
        for i, x in enumerate(instruction.operands)
        if x is not None
    ]


def _step(x: Strided, loop: int, size: int) -> int | None:
    """The stride along the data, if what is reached at a datum is its part of the register and no other's."""
    step = x.strides[loop]
    if step <= 0 or x.offset // step % size:
        return None
    within = x.offset % step
    for d, (n, s) in enumerate(zip(x.sizes, x.strides, strict=True)):
        if d != loop and n > 1 and s % (size * step):
            if s < 0:
                return None
            within += s * (n - 1)
    return step if within < step else None


def _cut(instructions: list[Instruction], size: int | None) -> list[Group]:
    """One group; before it, what its sums begin with."""
    assert size is not None
    if len(instructions) == 1:
        return [Group(instructions)]
    starts, cut = list[Group](), list[Instruction]()
    for instruction in instructions:
        loop = instruction.along(size)
        assert loop is not None
        if instruction.collects(loop) and instruction.op != Op.SCATTER_ADD:
            out = instruction.operands[0]
            assert out is not None
            begin = {Op.AMAX: -torch.inf, Op.AMIN: torch.inf}.get(instruction.op, 0.0)
            constant = contiguous(Register(1, torch.tensor(begin, dtype=torch.float64)), ())
            whole = contiguous(out.register, (out.register.size,))
            starts.append(Group([Instruction(Op.COPY, whole.sizes, (whole, constant.expanded(whole.sizes)))]))
            instruction = replace(instruction, onto=True)
        cut.append(instruction)
    return [*starts, Group(cut, size)]


def _find_local(groups: Sequence[Group], results: Set[Register]) -> None:
    """Note the registers that one group alone uses, and of which a tile is a part in one piece."""
    users = dict[Register, set[int]]()
    for i, group in enumerate(groups):
        for register in group.registers:
            users.setdefault(register, set()).add(i)
    for group in groups:
        if group.size is None:
            continue
        local = set[Register]()
        for register in group.registers:
            if len(users[register]) > 1 or register in results or register.constant is not None:
                continue
            found = (pair for i in group.instructions for pair in _steps(i, group.size))
            steps = {step for r, step in found if r is register}
            step = steps.pop() if len(steps) == 1 else None
            if step is not None and step * group.size == register.size:
                local.add(register)
        group.local = frozenset(local)
