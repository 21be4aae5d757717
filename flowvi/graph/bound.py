"""Operators at shapes that are known: what is the same at every call of a graph is found out once, when it is emitted.

Between two large products a call's own work is a good part of what it costs, as its code and its objects have left the
nearest caches: so a call asks for no more than its arguments' memory. What it gives lies in memory of its own, to which
the next call writes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.kernels import dispatch
from flowvi.kernels.linear import linear, linear_alike

__all__ = ["Like", "bound"]

_OPS = torch.ops.flowvi


class Like(NamedTuple):
    """What a value is, but for its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Like:
        """What this tensor is; how far apart the rows of a dimension of one are makes no difference."""
        strides = tuple(step if size > 1 else 1 for size, step in zip(value.shape, value.stride(), strict=True))
        return cls(value.shape, value.dtype, strides, value.device)

    def is_contiguous(self) -> bool:
        """Whether it lies in memory row by row, without gaps."""
        return self.example().is_contiguous()

    def transposed(self) -> Like:
        """What its transpose is."""
        return self._replace(shape=self.shape[::-1], stride=self.stride[::-1])

    def example(self) -> Tensor:
        """A tensor like that, whose numbers are anything."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def bound(target: Any, arguments: Sequence[Any], spent: Sequence[bool]) -> Callable[..., Any] | None:
    """What does the same as an operator for arguments like these, in less time; None where there is nothing better.

    Args:
        target: the operator.
        arguments: a `Like` for each tensor, and all else as it is; the call will have the same.
        spent: whether nobody reads an argument's memory after the call, so that it may be written to. Nobody may read
            what the call gives after the graph's run.
    """
    if target is linear:
        weight: Like = arguments[1]
        return linear_alike if weight.is_contiguous() or weight.transposed().is_contiguous() else None
    if target is _OPS.planar_stack_score.default:
        return _planar_forward(*arguments)
    if target is _OPS.planar_stack_backward.default:
        return _planar_backward(*arguments, in_place=spent[4])
    return None


def _array(a: Tensor) -> Any:
    """A tensor's memory as a numpy array."""
    if a.requires_grad or a.is_neg() or not a.is_contiguous():
        a = a.detach().resolve_neg().contiguous()
    return a.numpy()


def _compiled(x: Like, w: Like, u: Like, *others: Like | None) -> Any:
    """The compiled stacks, where these tensors can be theirs as they are; else None."""
    if len(x.shape) > 3 or (w.shape != u.shape and w.shape[:-2].numel() != 1):
        return None
    return dispatch.compiled("planar", *(a and a.example() for a in (x, w, u, *others)))


class _Kept:
    """Memory for what a call gives: the next one writes there again."""

    def __init__(self, dtype: torch.dtype, *shapes: Sequence[int]) -> None:
        self.tensors = tuple(torch.empty(shape, dtype=dtype) for shape in shapes)
        self.arrays = tuple(a.numpy() for a in self.tensors)


def _planar_forward(x: Like, score: Like, w: Like, u: Like, b: Like, constraint: str) -> Any:
    """`planar_stack_score`."""
    impl = _compiled(x, w, u, score, b)
    if impl is None:
        return None
    softplus, forward = constraint == "softplus", impl.forward
    kept = _Kept(x.dtype, x.shape, x.shape[:-1], (*b.shape, x.shape[-2]), x.shape)
    y, log_det, t, out = kept.arrays

    def run(x: Tensor, score: Tensor, w: Tensor, u: Tensor, b: Tensor, _: str) -> tuple[Tensor, ...]:
        ins = _array(w), _array(u), _array(b)
        forward(_array(x), _array(score), 1.0, *ins, softplus, y, log_det, out, t)
        return kept.tensors

    return run


def _planar_backward(
    g_y: Like | None, g_log_det: Like | None, x: Like, w: Like, u: Like, b: Like, t: Like, constraint: str,
    *, in_place: bool,
) -> Any:  # fmt: skip
    """`planar_stack_backward`; with `in_place` the gradient of u is left where u was."""
    impl = None if g_y is None else _compiled(x, w, u, b, g_y, g_log_det, t)
    if impl is None:
        return None
    softplus, backward, shape_u = constraint == "softplus", impl.backward, u.shape
    in_place = in_place and len(u.shape) == 3 and u.is_contiguous() and impl.may_overwrite(x.shape[1], *u.shape[1:])
    kept = _Kept(x.dtype, x.shape, w.shape, b.shape)
    (g_x, g_w, g_b), (to_x, to_w, to_b) = kept.tensors, kept.arrays

    def run(
        g_y: Tensor, g_log_det: Tensor | None, x: Tensor, w: Tensor, u: Tensor, b: Tensor, t: Tensor, _: str
    ) -> tuple[Tensor, ...]:
        weight = None if g_log_det is None else _array(g_log_det)
        ins = _array(x), _array(w), _array(u), _array(b)
        g_u = u if in_place else torch.empty(shape_u, dtype=u.dtype)
        backward(_array(g_y), weight, *ins, softplus, _array(t), to_x, to_w, g_u.numpy(), to_b)
        return g_x, g_w, g_u, g_b

    return run
