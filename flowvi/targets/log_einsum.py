"""einsum in logarithms, log sum exp(a + b + ...), exact at every magnitude: a backend for Pyro's `LogRing`.

Pyro's own shifts each operand by its own maximum. Where two operands peak at different states, as two observations
that disagree do, their product underflows, and its gradient is cut off long before. Here the shift is the maximum of
the sum, at the price of holding that sum.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

__all__ = ["einsum", "log_sum_exp", "tensordot", "transpose"]


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Log of the sum of products whose logarithms the operands are.

    Args:
        equation: as in torch.einsum, with an output.
        *operands: the logarithms.

    Returns:
        The logarithm of torch.einsum of their exponentials.
    """
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    summed = "".join(sorted(set(inputs) - {","} - set(output)))
    total: Tensor | None = None
    for dims, operand in zip(terms, operands, strict=True):
        order = [d for d in output + summed if d in dims]
        term = operand.permute(*(dims.index(d) for d in order))
        term = term.reshape([operand.shape[dims.index(d)] if d in dims else 1 for d in output + summed])
        total = term if total is None else total + term
    assert total is not None
    return log_sum_exp(total, list(range(len(output), total.dim()))) if summed else total


def log_sum_exp(x: Tensor, dims: list[int]) -> Tensor:
    """Log sum exp over some dimensions; where every term is 0, the gradient is 0 and not NaN as torch's is."""
    top = x.detach().amax(dims, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    total = (x - top).exp().sum(dims)
    some = total > 0
    return torch.where(some, torch.where(some, total, 1.0).log() + top.reshape(total.shape), -math.inf)


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The tensor with its dimensions in another order."""
    return a.permute(axes)


tensordot = Tensordot(einsum)
