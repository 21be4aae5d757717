"""Operations on each number: arithmetic, functions, tests and choices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowvi.kernels.compiled.instructions import Op
from flowvi.program.instruction import NotLowered
from flowvi.program.walk import Handler, View, Walk

__all__ = ["HANDLERS"]

aten = torch.ops.aten


def _unary(op: Op) -> Callable[..., View]:
    return lambda walk, x: walk.pointwise(op, x)


def _binary(op: Op) -> Callable[..., View]:
    return lambda walk, x, y: walk.pointwise(op, x, y)


def _sum_of_two(op: Op) -> Callable[..., View]:
    """An addition or subtraction; alpha times the second."""

    def handler(walk: Walk, x: Any, y: Any, alpha: float = 1) -> View:
        if alpha != 1:
            y = walk.pointwise(Op.MUL, y, alpha) if isinstance(y, View) else y * alpha
        return walk.pointwise(op, x, y)

    return handler


def _div(walk: Walk, x: Any, y: Any, rounding_mode: str | None = None) -> View:
    if rounding_mode is not None:
        raise NotLowered("a rounded division")
    if not isinstance(y, View):
        inverse = 1 / torch.as_tensor(y, dtype=walk.dtype)
        if inverse.isfinite().all() and (not isinstance(y, Tensor) or y.dtype == walk.dtype):
            return walk.pointwise(Op.MUL, x, inverse if isinstance(y, Tensor) else inverse.item())
    if isinstance(x, View) and isinstance(y, View) and 2 * _count(y) <= _count(x):
        return walk.pointwise(Op.MUL, x, walk.pointwise(Op.DIV, 1.0, y))
    return walk.pointwise(Op.DIV, x, y)


def _count(x: View) -> int:
    """Different numbers of each particle."""
    return math.prod(n for n, s in zip(x.inner.sizes, x.inner.strides, strict=True) if s)


def _pow(walk: Walk, x: Any, y: Any) -> View:
    if isinstance(y, int | float) and isinstance(x, View):
        if y == 0.5:
            return walk.pointwise(Op.SQRT, x)
        if y in (1, 2, 3):
            out = x
            for _ in range(int(y) - 1):
                out = walk.pointwise(Op.MUL, out, x)
            return out
        if y == -1:
            return walk.pointwise(Op.DIV, 1.0, x)
        if y == -0.5:
            return _rsqrt(walk, x)
    return walk.pointwise(Op.POW, x, y)


def _clamp(walk: Walk, x: View, low: Any = None, high: Any = None, **kwargs: Any) -> View:
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if low is not None:
        x = walk.pointwise(Op.MAX, x, low)
    return x if high is None else walk.pointwise(Op.MIN, x, high)


def _rsqrt(walk: Walk, x: View) -> View:
    return walk.pointwise(Op.DIV, 1.0, walk.pointwise(Op.SQRT, x))


def _isinf(walk: Walk, x: View) -> View:
    return walk.pointwise(Op.EQ, walk.pointwise(Op.ABS, x), math.inf)


def _to_copy(walk: Walk, x: View, dtype: torch.dtype | None = None, **_: Any) -> View:
    if dtype not in (None, walk.dtype, torch.bool):
        raise NotLowered(f"numbers of another kind, {dtype}")
    if dtype == torch.bool:
        return x if x.kind == "bool" else walk.pointwise(Op.NE, x, 0.0)
    return x if dtype is None else replace(x, kind="float")


def _where(walk: Walk, condition: Any, x: Any, y: Any) -> View:
    return walk.pointwise(Op.WHERE, condition, x, y)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{
        getattr(aten, name).default: _unary(Op[name.upper()])
        for name in (
            *("neg", "abs", "sign", "exp", "log", "log1p", "expm1", "sqrt", "sigmoid", "tanh", "sin"),
            *("cos", "lgamma", "digamma", "erf", "erfc", "isnan"),
        )
    },
    **{
        getattr(getattr(aten, name), kind): _binary(Op[name.upper()])
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Scalar", "Tensor")
    },
    **{getattr(aten.mul, kind): _binary(Op.MUL) for kind in ("Scalar", "Tensor")},
    **{getattr(aten.add, kind): _sum_of_two(Op.ADD) for kind in ("Scalar", "Tensor")},
    **{getattr(aten.sub, kind): _sum_of_two(Op.SUB) for kind in ("Scalar", "Tensor")},
    **{getattr(aten.div, kind): _div for kind in ("Scalar", "Tensor", "Tensor_mode")},
    **{getattr(aten.pow, kind): _pow for kind in ("Scalar", "Tensor_Scalar", "Tensor_Tensor")},
    aten.maximum.default: _binary(Op.MAX),
    aten.minimum.default: _binary(Op.MIN),
    aten.logical_and.default: _binary(Op.AND),
    aten.bitwise_and.Tensor: _binary(Op.AND),
    aten.logical_or.default: _binary(Op.OR),
    aten.bitwise_or.Tensor: _binary(Op.OR),
    aten.logical_not.default: _unary(Op.NOT),
    aten.bitwise_not.default: _unary(Op.NOT),
    aten.relu.default: lambda walk, x: walk.pointwise(Op.MAX, x, 0.0),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.reciprocal.default: lambda walk, x: walk.pointwise(Op.DIV, 1.0, x),
    aten.rsqrt.default: _rsqrt,
    aten.isinf.default: _isinf,
    aten.where.self: _where,
    aten._to_copy.default: _to_copy,
}

HANDLERS = {target: Handler(function, takes_kinds=True) for target, function in _FUNCTIONS.items()}
"""The operations by their handlers."""
