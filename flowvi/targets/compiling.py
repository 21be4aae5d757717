"""A flat graph through Inductor: kept where it is measured to be faster, and never an error where it can't be had."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowvi.progress import waiting

__all__ = ["CompileReport", "compile_flat", "seconds_per_call"]

SECONDS, SECONDS_PER_NODE = 5.0, 0.06
"""What compiling costs, about: so many seconds, and so many more for each operation of the graph."""

GAIN = 0.5
"""The share of the time per call that compiling saves, about."""

_ROUNDS, _CALLS = 7, 5


@dataclass(frozen=True)
class CompileReport:
    """What became of compiling a target.

    Attributes:
        used: whether the compiled graph is in use.
        reason: why, in words.
        flat: seconds per call of the flat graph, or of the program that there is.
        compiled: seconds per call of the compiled one, where there is one.
        seconds: what compiling cost.
    """

    used: bool
    reason: str
    flat: float = 0.0
    compiled: float | None = None
    seconds: float = 0.0


Function = Callable[..., tuple[Tensor, ...]]


def seconds_per_call(function: Function, *inputs: Tensor) -> float:
    """The least of a few rounds of calls, divided by their number."""
    best = float("inf")
    with torch.no_grad():
        function(*inputs)
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            for _ in range(_CALLS):
                function(*inputs)
            best = min(best, (time.perf_counter() - start) / _CALLS)
    return best


def repays(flat_seconds: float, num_nodes: int, num_calls: int) -> bool:
    """Whether so many calls would save at least twice what compiling costs."""
    return num_calls * flat_seconds * GAIN > 2 * (SECONDS + SECONDS_PER_NODE * num_nodes)


@contextmanager
def _validation_kept() -> Iterator[None]:
    """Distributions check their arguments as before, or not: `torch.compile` turns that off for the whole process."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def compile_flat(
    flat: Function, *inputs: Tensor, agree: Callable[[Any, Any], bool], current: Function | None = None
) -> tuple[Function | None, CompileReport]:
    """The compiled function, or None where there is no compiler, it disagrees, or it is not faster.

    Args:
        flat: a graph of tensor operations.
        *inputs: what it will be called with, in these shapes.
        agree: whether two of its outputs are equal but for rounding.
        current: what the compiled one must be faster than, if that isn't the graph itself.
    """
    start = time.perf_counter()
    before = seconds_per_call(current or flat, *inputs)
    try:
        with _validation_kept():
            compiled: Function = torch.compile(flat, dynamic=False, fullgraph=True)
        with torch.no_grad(), waiting("compile the target"):
            found, expected = compiled(*inputs), flat(*inputs)
    except Exception as error:  # a missing compiler, an operation that Inductor can't lower: eager is right as well
        words = str(error).strip().split("\n")[0][:200]
        seconds = time.perf_counter() - start
        return None, CompileReport(
            False, f"it can't be compiled here ({type(error).__name__}: {words})", before, None, seconds
        )
    if not all(agree(a, b) for a, b in zip(found, expected, strict=True)):
        seconds = time.perf_counter() - start
        return None, CompileReport(False, "the compiled graph gives other values", before, None, seconds)
    after = seconds_per_call(compiled, *inputs)
    seconds = time.perf_counter() - start
    if after >= before:
        return None, CompileReport(False, "what there is without it is faster", before, after, seconds)
    return compiled, CompileReport(True, "the compiled graph is faster", before, after, seconds)
