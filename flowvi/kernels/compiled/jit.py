"""How the kernels are compiled: ahead of nothing, cached on disk, without the GIL, and with NaN left alone.

`error_model="numpy"`: a division that could raise ZeroDivisionError is a branch, and a loop with a branch does
not vectorize. The fast-math flags let sums be reordered and products fused; the flags that assume that there
is no NaN and no infinity are left out, so that a particle which is NaN stays NaN and spoils no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba

from flowvi.progress import waiting

SUMS = frozenset({"reassoc", "contract", "nsz"})
"""Fast-math of the loops."""

EXACT = frozenset({"contract"})
"""Fast-math of an approximation whose order of operations is its accuracy."""


@cache
def stamp() -> int:
    """A number that changes when any file of this folder does.

    numba's cache looks at the file of the compiled function alone, not at what the function calls. Every kernel
    has this number among its constants, and constants are part of the cache's key.
    """
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "big")


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call, or load what an earlier process compiled."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(SUMS)}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written to: every process compiles for itself
        return _announced(numba.njit(**options)(function))
    save = compiled._cache.save_overload

    def save_if_there_is_room(*args: Any) -> None:
        with suppress(OSError):  # a full disk costs later processes their time, not this one its work
            save(*args)

    compiled._cache.save_overload = save_if_there_is_room
    return _announced(compiled)


def _announced(compiled: Any) -> Any:
    """A kernel that says so when it is compiled, which takes seconds, and not when it is loaded."""
    compiler, function = compiled._compiler.compile, compiled.py_func
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

    def compile_aloud(*args: Any) -> Any:
        with waiting(f"compile the kernel {name} (kept for later runs)"):
            return compiler(*args)

    compiled._compiler.compile = compile_aloud
    return compiled


def helper(fastmath: frozenset[str] = SUMS) -> Callable[[Callable[..., Any]], Any]:
    """A function that kernels call; it is compiled into each of them and has no cache of its own."""
    return numba.extending.register_jitable(error_model="numpy", fastmath=set(fastmath))
