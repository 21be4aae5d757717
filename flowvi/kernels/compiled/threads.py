"""Particles over cores: ranges of particles handed to a pool of plain threads; kernels run without the GIL.

Not numba's own parallel loops: their default threading layer must not be entered by two Python threads at
once, and some of them don't survive a fork. A pool belongs to the process that made it; a forked child makes
its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

REPAYS = 250_000
"""Work per thread, in particles x layers x (D + 2), below which handing it over costs more than it brings."""

_pools: dict[int, ThreadPoolExecutor] = {}


def ranges(size: int, work: int, tile: int) -> list[tuple[int, int]]:
    """Split `size` particles into one range for each thread that `work` repays, on borders of tiles.

    torch.get_num_threads() is the limit.
    """
    threads = max(1, min(torch.get_num_threads(), size // tile, work // REPAYS))
    if threads == 1:
        return [(0, size)]
    tiles = -(-size // tile)
    borders = [min(size, (i * tiles // threads) * tile) for i in range(threads)] + [size]
    return list(pairwise(borders))


def add_up(task: Callable[[int, int, Any], Any], parts: list[tuple[int, int]], total: Any) -> None:
    """task(start, stop, array), which fills parts of an array like `total`, for every range; the sum in `total`."""

    def own(start: int, stop: int) -> Any:
        array = np.zeros_like(total) if start else total
        task(start, stop, array)
        return array

    for more in run(own, parts)[1:]:
        total += more


def run(task: Callable[[int, int], Any], parts: list[tuple[int, int]]) -> list[Any]:
    """task(start, stop) for every range, each on its own thread; results in order."""
    if len(parts) == 1:
        return [task(*parts[0])]
    pid = os.getpid()
    pool = _pools.get(pid)
    if pool is None:
        _pools.clear()  # a parent's pool has no threads here
        pool = _pools.setdefault(pid, ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="flowvi-kernel"))
    futures = [pool.submit(task, *part) for part in parts[1:]]
    first = task(*parts[0])
    return [first, *(future.result() for future in futures)]
