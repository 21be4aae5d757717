"""How many threads torch takes: one where the work is too little to repay waking more of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1_000_000
"""Work per step, S D K, below which a second thread costs more than it brings (measured on two cores)."""


@contextmanager
def one_thread_if_small(size: int) -> Iterator[None]:
    """One torch thread inside, where `size` = S D K numbers are too few to repay waking more of them."""
    before = torch.get_num_threads()
    if size < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
