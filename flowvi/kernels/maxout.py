"""The largest of each window of units, as an operator: torch's own `amax` spends its backward pass on ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from flowvi.kernels import dispatch

__all__ = ["largest", "largest_backward", "largest_of_window"]

MOST = 255
"""Places that a byte can tell."""


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Y (..., H) and the places (..., H), bytes, of x (..., M, H); the first of equal ones, NaN before all."""
    module = dispatch.compiled("maxout", x)
    if module is None:
        y, which = x.max(-2)
        return y, which.to(torch.uint8)
    shape = (*x.shape[:-2], x.shape[-1])
    y, which = x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)
    module.forward(*(_rows(a, own) for a, own in ((x, 2), (y, 1), (which, 1))))
    return y, which


def _rows(a: Tensor, own: int) -> Any:
    """A tensor's memory with one dimension before its own."""
    return a.detach().contiguous().view(-1, *a.shape[a.dim() - own :]).numpy()


def largest_backward(g: Tensor, which: Tensor, window: int) -> Tensor:
    """(..., M, H): g (..., H) at the places, and 0 elsewhere."""
    shape = (*g.shape[:-1], window, g.shape[-1])
    module = dispatch.compiled("maxout", g)
    if module is None:
        return g.new_zeros(shape).scatter_(-2, which.long().unsqueeze(-2), g.unsqueeze(-2))
    out = g.new_empty(shape)
    module.backward(*(_rows(a, own) for a, own in ((g, 1), (which, 1), (out, 2))))
    return out


class _Largest(Function):
    """The values, with a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.flowvi.largest(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.window = inputs[0].shape[-2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Tensor:
        return _Placed.apply(g, ctx.saved_tensors[0], ctx.window)


class _Placed(Function):
    """A gradient at its places, with a gradient of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, which: Tensor, window: int) -> Tensor:
        return torch.ops.flowvi.largest_backward(g, which, window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None, None]:
        (which,) = ctx.saved_tensors
        return h.gather(-2, which.long().unsqueeze(-2)).squeeze(-2), None, None


def largest_of_window(x: Tensor) -> Tensor:
    """The largest along the last dimension but one, (..., M, H) to (..., H)."""
    if x.shape[-2] > MOST or dispatch.compiled("maxout", x) is None:
        return x.amax(-2)
    return _Largest.apply(x)[0]
