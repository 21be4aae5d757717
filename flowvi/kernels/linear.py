"""Matrix products of float32 on the CPU, by whichever of torch's two libraries is the quicker one there.

torch multiplies by MKL, which on processors that are not Intel's keeps to vectors of 256 bits. oneDNN, which is in the
same build, takes 512 where the processor has them: with the same sums in another order, in half the time.
"""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BY_COLUMNS", "TALL", "crossprod", "linear", "linear_alike", "pays", "tall"]

TALL = 16
"""Outputs for an input from which on the products with a layer's weights take less time where these are transposed."""

BY_COLUMNS = "may_lie_by_columns"
"""The attribute of a parameter by which `tall` notes that."""

LEAST = 100_000
"""Multiplications below which calling oneDNN costs more than it saves, between other calls of it. Alone in a loop MKL
is as quick up to a million; but where its code has left the cache, a call of it takes 50 us and not 11."""


def pays(shape: torch.Size, size_out: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` is worth its call for x of shape (n, C) and so many outputs; a machine always says the same."""
    right = dtype == torch.float32 and device.type == "cpu" and len(shape) == 2
    return right and shape.numel() * size_out >= LEAST and _onednn() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X W' + b without a graph: (n, C), (C', C) and (C',) to (n, C'); only where `pays` says so."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # of rows or columns of a larger matrix oneDNN takes a thousand times as long
    return linear_alike(x, weight, bias)


def linear_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of weights that are known to lie row by row or column by column."""
    return _onednn()(x, weight, bias, "none", [], "")


def crossprod(left: Tensor, right: Tensor) -> Tensor:
    """L' R without a graph: (n, C') and (n, C) to (C', C)."""
    turned = left.t()
    if pays(turned.shape, right.shape[1], left.dtype, left.device):
        return linear(turned, right.t(), None)
    return torch.mm(turned, right)


def tall(layer: nn.Linear) -> nn.Linear:
    """The same layer; if it is tall, it is noted that its weights (C', C) may lie in memory column by column in a fit.

    Their gradient G' X is quicker to make as the rows of X' G, which so can stay as they are.
    """
    if layer.out_features >= TALL * layer.in_features:
        setattr(layer.weight, BY_COLUMNS, True)
    return layer


@lru_cache(maxsize=1)
def _onednn() -> Any:
    """What calls oneDNN's product, as Inductor does; None where MKL does as well, or it can't be had."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "Intel" in _vendor():
        return None
    with suppress(AttributeError, RuntimeError):
        found = torch.ops.mkldnn._linear_pointwise.default
        x, w = torch.ones(2, 3), torch.ones(4, 3)
        if torch.equal(found(x, w, None, "none", [], ""), x @ w.t()):
            return found._op
    return None


def _vendor() -> str:
    """The processor's maker, such as AuthenticAMD; Intel's where nobody knows."""
    with suppress(OSError):
        told = re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if told:
            return told[1]
    return platform.processor() if "Authentic" in platform.processor() else "GenuineIntel"
