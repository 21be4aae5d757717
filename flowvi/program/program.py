r"""A program of the register machine (`flowvi.kernels.compiled.machine`): its memory and its run.

`flowvi.program.lowering` writes instructions in terms of registers; here registers get places. One whose last use is
past is used again, so that memory stays as small as the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.kernels.compiled.instructions import LANES, WIDTH
from flowvi.program.instruction import Instruction, NotLowered, Register, Strided
from flowvi.program.tiles import schedule

__all__ = ["Program", "assemble"]

MAX_NUMBERS = 1 << 22
"""Most numbers in registers and constants, LANES included: 32 MiB of float64. Beyond it torch is as quick."""


class _Memory:
    """Places for registers, used again when they are given back."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # size, start

    def take(self, size: int) -> int:
        """The start of a place, in the smallest gap that is large enough, or at the end."""
        fits = [gap for gap in self._free if gap[0] >= size]
        if not fits:
            self.size += size
            return self.size - size
        gap = min(fits)
        self._free.remove(gap)
        if gap[0] > size:
            self._free.append((gap[0] - size, gap[1] + size))
        return gap[1]

    def give(self, start: int, size: int) -> None:
        """Back, joined to the gaps beside it."""
        for gap in [g for g in self._free if g[1] + g[0] == start or start + size == g[1]]:
            self._free.remove(gap)
            start, size = min(start, gap[1]), size + gap[0]
        self._free.append((size, start))


class Program:
    """Value and gradient of any number of particles.

    Made by `assemble`.

    Attributes:
        code: (number of instructions, WIDTH), int64.
        num_numbers: in memory, LANES included.
        dtype: of z, and of what it computes.
    """

    def __init__(
        self,
        code: np.ndarray[Any, Any],
        memory: np.ndarray[Any, Any],
        constants: np.ndarray[Any, Any],
        indices: np.ndarray[Any, Any],
        places: tuple[int, int, int],
        work: int,
    ) -> None:
        self.code, self.num_numbers, self.dtype = code, len(memory), torch.from_numpy(memory).dtype
        self._memory, self._fixed, self._places, self._work = memory, (constants, indices), places, work
        self._spare: list[np.ndarray[Any, Any]] = []  # memory whose constants are in place, one for each thread at work

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log p (S,) and its gradient (S, D) at z (S, D); the gradient is (0, D) where it is of the value alone."""
        from flowvi.kernels.compiled import threads  # numba is loaded where it is needed
        from flowvi.kernels.compiled.machine import make_machine

        x: Any = z.detach().contiguous().numpy()
        value, grad = np.empty(len(x), x.dtype), np.empty((len(x) if self._places[2] >= 0 else 0, x.shape[1]), x.dtype)
        machine = make_machine(x.dtype.type)

        def run(start: int, stop: int) -> None:
            try:
                mem = self._spare.pop()
            except IndexError:
                mem = self._memory.copy()
            machine(self.code, x, mem, *self._fixed, *self._places, value, grad, start, stop)
            self._spare.append(mem)

        threads.run(run, threads.ranges(len(x), len(x) * self._work // 4, LANES))
        return torch.from_numpy(value), torch.from_numpy(grad)


def assemble(
    instructions: Sequence[Instruction],
    z: Register,
    value: Strided,
    grad: Strided | None,
    constants: Tensor,
    indices: Sequence[int],
) -> Program:
    """Give registers their places, and write the code.

    Args:
        instructions: in order.
        z: D numbers, which every block begins with.
        value: where log p is in the end.
        grad: where its D derivatives are, if they are asked for.
        constants: what `matmul_const` reads, of the machine's dtype.
        indices: what `gather` and `scatter_add` read.

    Raises:
        NotLowered: too much memory, or too many loops.
    """
    results = [x.register for x in (value, grad) if x is not None]
    groups = schedule(_needed(instructions, results), results)
    last = {register: i for i, group in enumerate(groups) for register in group.registers}
    fixed = [r for group in groups for r in group.registers if r.constant is not None]
    forever, places, memory = dict.fromkeys([z, *fixed, *results]), dict[Register, int](), _Memory()
    for register in forever:
        places[register] = memory.take(register.size)
    rows = list[list[int]]()
    for i, group in enumerate(groups):
        sizes = {r: group.room(r) for r in group.registers}
        for register, size in sizes.items():
            if register not in places:
                places[register] = memory.take(size)
        rows += group.encoded(places)
        for register, size in sizes.items():
            if register not in forever and last[register] == i:
                memory.give(places[register], size)
    if memory.size * LANES > MAX_NUMBERS:
        raise NotLowered(f"{memory.size} numbers for each particle")
    code = np.array(rows, np.int64).reshape(-1, WIDTH)
    numbers = np.zeros(memory.size * LANES, constants.numpy().dtype)
    for register in forever:
        if register.constant is not None:
            filled = np.repeat(register.constant.to(constants.dtype).reshape(-1).numpy(), LANES)
            numbers[places[register] * LANES :][: len(filled)] = filled
    where = places[z] * LANES, places[value.register] * LANES, -1 if grad is None else places[grad.register] * LANES
    shared = constants.numpy() if len(constants) else np.zeros(1, numbers.dtype)
    work = sum(i.work for group in groups for i in group.instructions)
    return Program(code, numbers, shared, np.array([*indices, 0], np.int64), where, work)


def _needed(instructions: Sequence[Instruction], results: Sequence[Register]) -> list[Instruction]:
    """Those whose results are used in the end."""
    used, kept = set(results), list[Instruction]()
    for instruction in reversed(instructions):
        if instruction.registers[0] in used:
            kept.append(instruction)
            used.update(instruction.registers)
    return kept[::-1]
