"""A limit on the time that one generated case may take: a hang is a failure, and shows where it is."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class HangError(BaseException):
    """A call took too long; not an Exception, so that no handler of errors swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `HangError` after so many seconds, and prints where every thread is."""

    def ring(number, frame):
        faulthandler.dump_traceback()
        raise HangError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
