"""Memory that the ranks of one machine share, where they meet, and sums that go through it.

A message between two processes costs a tenth of a millisecond by gloo, and the sum of two million numbers several, more
than many a step. In memory that both see, the sum costs the reading of it, and meeting costs a microsecond: each rank
writes how many times it has come, and looks until the others have come as often. That needs a processor on which what
one core writes is seen by others in the order written (x86), and Linux; elsewhere ranks go on by gloo alone.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["SWITCH", "HostMemory"]

SWITCH = "FLOWVI_RANKS_MEMORY"
"""Set to 0 in the environment, ranks of one machine talk by gloo as those of several do."""

FOLDER = "/dev/shm"
LINE = 8
"""Counters are this many int64 apart: each in a cache line of its own, or writers would slow each other down."""

SPINS = 300
"""Looks before a rank lets others have the core."""

NAP, NAP_AFTER = 1e-4, 5e-3
"""Seconds asleep between looks, once a rank has looked for so many."""

PROBE_EVERY = 0.2
"""Seconds of waiting after which a rank asks whether the other is still there."""

SMALL = 1 << 14
"""Bytes that sums have from the start."""


class HostMemory:
    """What one rank has of it. Every method but `close` must be called by all ranks, in one order.

    Args:
        rank: this process's number, from 0.
        world: how many there are.
        timeout: seconds to wait for another rank.
        gather: value -> the values of all ranks.
        locks: path of a file in which each rank holds a byte locked while it lives.
    """

    def __init__(self, rank: int, world: int, timeout: float, gather: Callable[[Any], list[Any]], locks: str) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._gather: Any = gather
        self._locks: int | None = os.open(locks, os.O_RDWR)
        self._hold(rank)
        self._counters: Any = None
        self._rows: list[Tensor] = []
        self._came = self._sums = 0

    @classmethod
    def between(cls, rank: int, world: int, timeout: float, gather: Callable[[Any], list[Any]]) -> HostMemory | None:
        """That of these ranks; None, for all of them, where they don't run on one machine or it can't be had."""
        able = os.environ.get(SWITCH, "1") != "0" and sys.platform == "linux"
        able = able and platform.machine() in ("x86_64", "AMD64") and os.path.isdir(FOLDER)
        if not all(gather(able)):
            return None
        with _file(0, rank, gather) as locks:
            memory = None
            if locks is not None:
                with suppress(OSError):
                    memory = cls(rank, world, timeout, gather, locks)
            everywhere = all(gather(memory is not None))
        if memory is None or not everywhere:
            if memory is not None:
                memory.close()
            return None
        counters, rows = memory.tensor((world * LINE,), torch.int64), memory.tensor((2, world, SMALL), torch.uint8)
        if counters is None or rows is None:
            memory.close()
            return None
        memory._counters, memory._rows = counters.numpy().data, list(rows)
        return memory

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Zeros that every rank sees; None, for all of them, where there is no room. Freed with the last of them."""
        size, found = prod(shape) * dtype.itemsize, None
        with _file(size, self.rank, self._gather) as path:
            if path is not None:
                with suppress(OSError), open(path, "r+b") as file:
                    found = mmap.mmap(file.fileno(), size)
            everywhere = all(self._gather(found is not None))
        return torch.frombuffer(found, dtype=dtype).view(shape) if found is not None and everywhere else None

    def meet(self) -> None:
        """Return when all ranks have come here, and can read what each wrote before.

        Raises:
            RuntimeError: one of them ended, or did not come in time.
        """
        self._came += 1
        came, counters = self._came, self._counters
        counters[self.rank * LINE] = came
        for other in range(self.world):
            place = other * LINE
            for _ in range(SPINS):
                if counters[place] >= came:
                    break
            else:
                self._wait(other, place, came)

    def _wait(self, other: int, place: int, came: int) -> None:
        start = time.perf_counter()
        probe = PROBE_EVERY
        while self._counters[place] < came:
            waited = time.perf_counter() - start
            if waited > NAP_AFTER:
                time.sleep(NAP)
            else:
                os.sched_yield()  # of no time at all too, a sleep takes the fifty microseconds of a timer's slack
            if waited > probe:
                probe = waited + PROBE_EVERY
                if not self._lives(other) and self._counters[place] < came:
                    raise RuntimeError(f"the process of rank {other} is gone")
                if waited > self.timeout:
                    raise RuntimeError(f"rank {other} was silent for {self.timeout:g} seconds")

    def sum_(self, tensor: Tensor) -> bool:
        """The sum over ranks of a tensor on the CPU, in place, the same bits on each; False, on all, without room.

        Each call writes where the last one did not, so that no rank waits until the others have read.
        """
        size = tensor.numel() * tensor.dtype.itemsize
        if size > self._rows[0].shape[1]:
            rows = self.tensor((2, self.world, 1 << (size - 1).bit_length()), torch.uint8)
            if rows is None:
                return False
            self._rows = list(rows)
        self._sums += 1
        rows = self._rows[self._sums % 2][:, :size].view(tensor.dtype)
        with torch.no_grad():
            rows[self.rank].view(tensor.shape).copy_(tensor)
            self.meet()
            tensor.copy_(rows[0].view(tensor.shape))
            for row in rows[1:]:
                tensor.add_(row.view(tensor.shape))
        return True

    def _hold(self, rank: int) -> None:
        import fcntl  # not on Windows

        assert self._locks is not None
        fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def _lives(self, other: int) -> bool:
        """Whether its process is there: the system gives its lock away when it ends, however it ends."""
        import fcntl

        assert self._locks is not None
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, other)
        except OSError:
            return True
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, other)
        return False

    def close(self) -> None:
        """Tell the others, should they wait, that this rank won't come any more."""
        if self._locks is not None:
            os.close(self._locks)
        self._locks = None
        self._counters, self._rows = None, []
        self._gather = None  # it holds a group of connections


@contextmanager
def _file(size: int, rank: int, gather: Callable[[Any], list[Any]]) -> Iterator[str | None]:
    """The path, on all ranks, of a new file in memory with room for `size` bytes, or None; later it has no name."""
    mine = _create(size) if rank == 0 else None
    try:
        yield gather(mine)[0]
    finally:
        if mine is not None:
            os.unlink(mine)


def _create(size: int) -> str | None:
    """A new file in memory with room for `size` bytes; None where there is no room."""
    path = None
    try:
        file, path = tempfile.mkstemp(prefix="flowvi-", dir=FOLDER)
        try:
            if size:
                os.posix_fallocate(file, 0, size)  # else a full memory would show as a killed process, at first use
        finally:
            os.close(file)
    except OSError:
        if path is not None:
            os.unlink(path)
        return None
    return path
