"""Progress in a terminal or notebook: `Bar`, which all of flowvi's are, and lines for waits with nothing to count.

Such waits lie deep inside (kernels that compile at their first call), so whether they are shown is not handed down
from call to call: `wanted` sets it for all that runs inside of it, in this thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

__all__ = ["Bar", "counting", "waiting", "wanted"]

PATIENCE = 1.0
"""Seconds before a bar that counts is shown."""

_wanted: ContextVar[bool | None] = ContextVar("flowvi_progress", default=None)


class Bar(tqdm):
    """A tqdm bar whose lock is this process's own.

    All processes that were forked from one share the lock of tqdm, which is taken for a bar that is not shown too:
    one that is killed while it holds it leaves the others waiting for ever.
    """


def _own_lock() -> None:
    Bar.set_lock(threading.RLock())


_own_lock()
if hasattr(os, "register_at_fork"):  # another thread may hold it at the fork
    os.register_at_fork(after_in_child=_own_lock)


@contextmanager
def wanted(progress: bool | None) -> Iterator[None]:
    """Whether what is inside shows its waits; None shows them in a terminal or notebook, as without this."""
    token = _wanted.set(progress)
    try:
        yield
    finally:
        _wanted.reset(token)


def waiting(words: str) -> Bar:
    """A line for a ``with`` in which nothing can be counted, and which takes seconds."""
    return Bar(desc=words, bar_format="{desc}", leave=False, disable=_disable())


def counting(words: str, total: int | None = None) -> Bar:
    """A bar for a ``with``, shown after a second.

    Args:
        words: what is being done.
        total: the number of updates to come, where it is known.
    """
    return Bar(desc=words, total=total, leave=False, disable=_disable(), delay=PATIENCE)


def _disable() -> bool | None:
    """What tqdm calls `disable`, of which None is "unless this is a terminal or a notebook"."""
    progress = _wanted.get()
    return None if progress is None else not progress
