"""The stacks and the planar root as torch operators, with fake, autograd and vmap rules.

As operators they are opaque to every tracer: `torch.compile`, `make_fx`, `torch.jit.trace` (Pyro's
`JitTrace_ELBO`), `torch.func` and double-precision `gradcheck` see one node with a gradient written by hand.
The gradients are once differentiable; a second derivative raises instead of being wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from flowvi.kernels import planar, radial, root

_LIB = torch.library.Library("flowvi", "DEF")
_LIB.define("planar_stack(Tensor x, Tensor w, Tensor u, Tensor b, str constraint) -> (Tensor, Tensor, Tensor)")
_LIB.define(
    "planar_stack_backward(Tensor? g_y, Tensor? g_log_det, Tensor x, Tensor w, Tensor u, Tensor b, Tensor t, "
    "str constraint) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define("radial_stack(Tensor x, Tensor z0, Tensor raw_alpha, Tensor raw_s) -> (Tensor, Tensor, Tensor, Tensor)")
_LIB.define(
    "radial_stack_backward(Tensor? g_y, Tensor? g_log_det, Tensor inputs, Tensor z0, Tensor raw_alpha, "
    "Tensor raw_s, Tensor r) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define("planar_root(Tensor c, Tensor one_plus_m) -> Tensor")

_OPS = torch.ops.flowvi

_EVERYWHERE = "CompositeExplicitAutograd"
_LIB.impl("planar_stack", planar.stack_forward, _EVERYWHERE)
_LIB.impl("planar_stack_backward", planar.stack_backward, _EVERYWHERE)
_LIB.impl("radial_stack", radial.stack_forward, _EVERYWHERE)
_LIB.impl("radial_stack_backward", radial.stack_backward, _EVERYWHERE)
_LIB.impl("planar_root", root.planar_root, _EVERYWHERE)


@torch.library.register_fake("flowvi::planar_stack")
def _(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty(w.shape[0], x.shape[0])


@torch.library.register_fake("flowvi::planar_stack_backward")
def _(
    g_y: Tensor | None, g_log_det: Tensor | None, x: Tensor, w: Tensor, u: Tensor, b: Tensor, t: Tensor, constraint: str
) -> tuple[Tensor, ...]:
    return tuple(p.new_empty(p.shape) for p in (x, w, u, b))


@torch.library.register_fake("flowvi::radial_stack")
def _(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, size = z0.shape[0], x.shape[0]
    return torch.empty_like(x), x.new_empty(size), x.new_empty(layers, *x.shape), x.new_empty(layers, size)


@torch.library.register_fake("flowvi::radial_stack_backward")
def _(
    g_y: Tensor | None,
    g_log_det: Tensor | None,
    inputs: Tensor,
    z0: Tensor,
    raw_alpha: Tensor,
    raw_s: Tensor,
    r: Tensor,
) -> tuple[Tensor, ...]:
    g_x = inputs.new_empty(inputs.shape[1:])
    return g_x, *(p.new_empty(p.shape) for p in (z0, raw_alpha, raw_s))


@torch.library.register_fake("flowvi::planar_root")
def _(c: Tensor, one_plus_m: Tensor) -> Tensor:
    return torch.empty_like(c)


Batched = tuple[tuple[Tensor, ...], tuple[int, ...]]


def _one_by_one(op: Any, batch_size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Batched:
    """Batches over parameters: right for every operator, one call for each element of the batch."""
    each = [
        op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return stacked, (0,) * len(stacked)


def _stack_vmap(op: Any, point_dims: tuple[int, ...]) -> Any:
    """The rule of a stack: a batch over points alone is folded into S and costs one call.

    Args:
        op: the operator; its first argument holds the points (S, D).
        point_dims: the dimension of S in each of its outputs.
    """

    def rule(info: Any, in_dims: Sequence[int | None], x: Tensor, *params: Any) -> Batched:
        if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
            return _one_by_one(op, info.batch_size, in_dims, (x, *params))
        x = x.movedim(in_dims[0], 0)
        folded = op(x.flatten(0, 1), *params)
        shape = x.shape[:2]
        return tuple(o.unflatten(d, shape) for o, d in zip(folded, point_dims, strict=True)), point_dims

    return rule


def _backward_vmap(op: Any) -> Any:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Batched:
        return _one_by_one(op, info.batch_size, in_dims, args)

    return rule


def _root_vmap(info: Any, in_dims: Sequence[int | None], c: Tensor, one_plus_m: Tensor) -> tuple[Tensor, int]:
    # Elementwise: the batch goes in front, and the rest broadcasts from the right as it would without it.
    parts = [a if d is None else a.movedim(d, 0) for a, d in zip((c, one_plus_m), in_dims, strict=True)]
    rank = max(p.dim() - (d is not None) for p, d in zip(parts, in_dims, strict=True))
    c, one_plus_m = (
        p if d is None else p.reshape(p.shape[0], *(1,) * (rank - p.dim() + 1), *p.shape[1:])
        for p, d in zip(parts, in_dims, strict=True)
    )
    return _OPS.planar_root(c, one_plus_m), 0


torch.library.register_vmap("flowvi::planar_stack", _stack_vmap(_OPS.planar_stack, (0, 0, 1)))
torch.library.register_vmap("flowvi::radial_stack", _stack_vmap(_OPS.radial_stack, (0, 0, 1, 1)))
torch.library.register_vmap("flowvi::planar_stack_backward", _backward_vmap(_OPS.planar_stack_backward))
torch.library.register_vmap("flowvi::radial_stack_backward", _backward_vmap(_OPS.radial_stack_backward))
torch.library.register_vmap("flowvi::planar_root", _root_vmap)


class _PlanarStack(Function):
    """Value and log-determinant of K planar layers, with the backward pass by hand."""

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
        if g_y is None and g_log_det is None:
            return (None,) * 5
        return *_OPS.planar_stack_backward(g_y, g_log_det, *ctx.saved_tensors, ctx.constraint), None


class _RadialStack(Function):
    """Value and log-determinant of K radial layers, with the backward pass by hand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _OPS.radial_stack(x, z0, raw_alpha, raw_s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2], output[3])
        ctx.save_for_backward(output[2], *inputs[1:], output[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_log_det: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g_y is None and g_log_det is None:
            return (None,) * 4
        return tuple(_OPS.radial_stack_backward(g_y, g_log_det, *ctx.saved_tensors))


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


def planar_stack(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
    """K planar layers: y (S, D), log|det| (S,) and t (K, S); see `planar.stack_forward`."""
    return _PlanarStack.apply(x, w, u, b, constraint)


def radial_stack(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K radial layers: y (S, D), log|det| (S,), inputs (K, S, D), r (K, S); see `radial.stack_forward`."""
    return _RadialStack.apply(x, z0, raw_alpha, raw_s)


def planar_root(c: Tensor, one_plus_m: Tensor) -> Tensor:
    """P with p + m tanh(p) = c, elementwise over tensors of one shape; see `root.planar_root`."""
    return _PlanarRoot.apply(*torch.broadcast_tensors(c, one_plus_m))
