"""Which implementation runs: compiled kernels on the CPU where they serve, plain torch everywhere else."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import nullcontext
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from flowvi.errors import OptionError
from flowvi.progress import waiting

BACKENDS = ("auto", "torch", "numba")

_chosen = "auto"


class use:
    """Choose what computes stacks, layers with networks and models' programs: for good, or inside a ``with`` block.

    The choice holds for the whole process.

    Args:
        backend: "auto" (compiled kernels for float32 and float64 on the CPU if numba is installed, torch
            otherwise), "torch", or "numba" (as "auto", but an error without numba).

    Raises:
        OptionError: the name is unknown, or numba isn't installed.

    Example:
        >>> import flowvi.kernels
        >>> with flowvi.kernels.use("torch"):
        ...     flowvi.kernels.in_use()
        'torch'
    """

    def __init__(self, backend: str) -> None:
        global _chosen
        if backend not in BACKENDS:
            raise OptionError(f"the kernels' backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
        if backend == "numba" and not has_numba():
            raise OptionError('the "numba" kernels need the package numba: pip install numba, or use("auto").')
        self._before, _chosen = _chosen, backend

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._before


def in_use() -> str:
    """The present choice of `use`."""
    return _chosen


@cache
def has_numba() -> bool:
    """Whether numba is installed; looks without importing it."""
    return importlib.util.find_spec("numba") is not None


@cache
def _module(name: str) -> Any:
    """A module of compiled kernels, or None where numba can't be imported."""
    try:
        with nullcontext() if "numba" in sys.modules else waiting("load the compiled kernels"):
            return importlib.import_module(f"flowvi.kernels.compiled.{name}")
    except ImportError:
        return None


_DTYPES = (torch.float32, torch.float64)


def compiled(name: str, *tensors: Tensor | None) -> Any:
    """The module `flowvi.kernels.compiled.<name>` where it serves these tensors and the choice allows; else None."""
    if _chosen == "torch" or not has_numba():
        return None
    dtype: torch.dtype | None = None
    for a in tensors:
        if a is None:
            continue
        if not a.is_cpu or a.dtype not in _DTYPES or a.numel() == 0:
            return None
        if dtype is not None and a.dtype != dtype:
            return None
        dtype = a.dtype
    return _module(name)
