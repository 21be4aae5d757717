"""The operators with their gradients, written by hand: what transforms call.

The gradients of the stacks are once differentiable; a second derivative raises instead of being wrong. The
path score comes without a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from flowvi.kernels import operators  # noqa: F401 - registers them

_OPS = torch.ops.flowvi


def _no_grads(*gs: Tensor | None) -> bool:
    return all(g is None for g in gs)


class _PlanarStack(Function):
    """Value and log-determinant of K planar layers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
        return _OPS.planar_stack(x, w, u, b, constraint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.constraint = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_log_det: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if _no_grads(g_y, g_log_det):
            return (None,) * 5
        return *_OPS.planar_stack_backward(g_y, g_log_det, *ctx.saved_tensors, ctx.constraint), None


class _PlanarStackScore(Function):
    """`_PlanarStack`, and the path score, which has no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, score: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, ...]:
        return _OPS.planar_stack_score(x, score, w, u, b, constraint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, *params, ctx.constraint = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2], output[3])
        ctx.save_for_backward(x, *params, output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_log_det: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if _no_grads(g_y, g_log_det):
            return (None,) * 6
        g_x, *grads = _OPS.planar_stack_backward(g_y, g_log_det, *ctx.saved_tensors, ctx.constraint)
        return g_x, None, *grads, None


class _PlanarStackInverse(Function):
    """The inverse of K planar layers with its log-determinant; gradients by the implicit function theorem."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
        return _OPS.planar_stack_inverse(y, w, u, b, constraint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *params, ctx.constraint = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[0], *params, output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_x: Tensor | None, g_log_det: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if _no_grads(g_x, g_log_det):
            return (None,) * 5
        return *_OPS.planar_stack_inverse_backward(g_x, g_log_det, *ctx.saved_tensors, ctx.constraint), None


class _RadialStack(Function):
    """Value and log-determinant of K radial layers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _OPS.radial_stack(x, z0, raw_alpha, raw_s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_log_det: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if _no_grads(g_y, g_log_det):
            return (None,) * 4
        return tuple(_OPS.radial_stack_backward(g_y, g_log_det, *ctx.saved_tensors))


class _RadialStackScore(Function):
    """`_RadialStack`, and the path score, which has no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, score: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, ...]:
        return _OPS.radial_stack_score(x, score, z0, raw_alpha, raw_s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, _, *params = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2], output[3])
        ctx.save_for_backward(x, *params, output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_log_det: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if _no_grads(g_y, g_log_det):
            return (None,) * 5
        g_x, *grads = _OPS.radial_stack_backward(g_y, g_log_det, *ctx.saved_tensors)
        return g_x, None, *grads


class _RadialStackInverse(Function):
    """The inverse of K radial layers with its log-determinant, in closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _OPS.radial_stack_inverse(y, z0, raw_alpha, raw_s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[0], *inputs[1:], output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_x: Tensor | None, g_log_det: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if _no_grads(g_x, g_log_det):
            return (None,) * 4
        return tuple(_OPS.radial_stack_inverse_backward(g_x, g_log_det, *ctx.saved_tensors))


class _PlanarRoot(Function):
    """p with p + m tanh(p) = c; gradients by the implicit function theorem, through no iteration."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor, one_plus_m: Tensor) -> Tensor:
        return _OPS.planar_root(c, one_plus_m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        p, one_plus_m = ctx.saved_tensors
        t = torch.tanh(p)
        g_c = g / (t * t + (1 - t * t) * one_plus_m)
        return g_c, -g_c * t


def _same_front(points: tuple[Tensor, ...], matrices: tuple[Tensor, ...], scalars: tuple[Tensor, ...]) -> list[Tensor]:
    """Broadcast the dimensions in front of points (S, D), matrices (K, D) and scalars (K,)."""
    if all(a.dim() == 2 for a in points + matrices):
        return [*points, *matrices, *scalars]
    fronts: list[torch.Size] = []  # sizes of a traced function can't be hashed
    for front in (*(a.shape[:-2] for a in points + matrices), *(a.shape[:-1] for a in scalars)):
        if front and front not in fronts:
            fronts.append(front)
    front = fronts[0] if len(fronts) == 1 else torch.broadcast_shapes(*fronts)
    each = [a.expand(*front, *a.shape[-2:]) for a in points + matrices]
    return each + [a.expand(*front, a.shape[-1]) for a in scalars]


def _planar_front(points: tuple[Tensor, ...], w: Tensor, u: Tensor, b: Tensor) -> list[Tensor]:
    """`_same_front`, but directions that all data share stay one: w (1, ..., 1, K, D)."""
    each = _same_front(points, (w, u), (b,))
    front = each[0].dim() - 2
    if front and w.shape[:-2].numel() == 1:
        each[len(points)] = w.reshape(*(1,) * front, *w.shape[-2:])
    return each


def planar_stack(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
    """K planar layers: y (S, D), log|det| (S,) and t (K, S); see `planar.stack_forward`.

    Dimensions in front of any argument broadcast: w, u (N, K, D) and b (N, K) are layers of each datum's own, and with
    w (K, D) all data share their directions.
    """
    return _PlanarStack.apply(*_planar_front((x,), w, u, b), constraint)


def planar_stack_score(
    x: Tensor, score: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`planar_stack` in one pass with the path score: y, log|det|, t, and d log q(y)/dy (S, D) without a graph.

    `score` is d log q(x)/dx, (S, D); see `planar.stack_score`.
    """
    return _PlanarStackScore.apply(*_planar_front((x, score), w, u, b), constraint)


def planar_stack_inverse(y: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
    """X (S, D) with `planar_stack` (x) = y, and log|det dx/dy| (S,); dimensions in front as there."""
    return _PlanarStackInverse.apply(*_planar_front((y,), w, u, b), constraint)[:2]


def radial_stack(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K radial layers: y (S, D), log|det| (S,) and r (K, S); see `radial.stack_forward`.

    Dimensions in front of any argument broadcast, as for `planar_stack`.
    """
    return _RadialStack.apply(*_same_front((x,), (z0,), (raw_alpha, raw_s)))


def radial_stack_score(
    x: Tensor, score: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`radial_stack` in one pass with the path score, as `planar_stack_score`."""
    return _RadialStackScore.apply(*_same_front((x, score), (z0,), (raw_alpha, raw_s)))


def radial_stack_inverse(y: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor]:
    """X (S, D) with `radial_stack` (x) = y, and log|det dx/dy| (S,); dimensions in front as there."""
    return _RadialStackInverse.apply(*_same_front((y,), (z0,), (raw_alpha, raw_s)))[:2]


def planar_root(c: Tensor, one_plus_m: Tensor) -> Tensor:
    """P with p + m tanh(p) = c, elementwise over tensors of one shape; see `root.planar_root`."""
    return _PlanarRoot.apply(*torch.broadcast_tensors(c, one_plus_m))
