"""The stacks and the planar root as torch operators: schemas, fake implementations and vmap rules.

As operators they are opaque to every tracer: `torch.compile`, `make_fx`, `torch.jit.trace` (Pyro's
`JitTrace_ELBO`), `torch.func` and double-precision `gradcheck` see one node. `functions` gives them gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowvi.kernels import implementations

_LIB = torch.library.Library("flowvi", "DEF")
_OPS = torch.ops.flowvi
_EVERYWHERE = "CompositeExplicitAutograd"

Batched = tuple[tuple[Tensor, ...], tuple[int, ...]]


def _every_argument(op: Any) -> Callable[..., Batched]:
    """The vmap rule of an operator that takes dimensions in front: the batch becomes the first of them."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Batched:
        size = info.batch_size
        each = []
        for a, dim in zip(args, in_dims, strict=True):
            if isinstance(a, Tensor):
                a = a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
            each.append(a)
        out = op(*each)
        return out, (0,) * len(out)

    return rule


def _points_alone(op: Any, points: int, point_dims: tuple[int, ...]) -> Callable[..., Batched]:
    """`_every_argument`, but a batch over points alone is folded into S.

    Args:
        op: the operator; its first `points` arguments hold points (S, D), the others parameters.
        points: how many.
        point_dims: the dimension of S in each of its outputs.
    """
    general = _every_argument(op)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Batched:
        if any(d is not None for d in in_dims[points:]) or args[points].dim() != 2:
            return general(info, in_dims, *args)
        size = info.batch_size
        moved = [
            a.expand(size, *a.shape) if d is None else a.movedim(d, 0)
            for a, d in zip(args[:points], in_dims[:points], strict=True)
        ]
        shape = moved[0].shape[:2]
        folded = op(*(a.flatten(0, 1) for a in moved), *args[points:])
        return tuple(o.unflatten(d, shape) for o, d in zip(folded, point_dims, strict=True)), point_dims

    return rule


def _define(
    name: str, arguments: str, outputs: int, fake: Callable[..., Any], folds: tuple[int, tuple[int, ...]] | None
) -> None:
    _LIB.define(f"{name}({arguments}) -> ({', '.join(['Tensor'] * outputs)})")
    _LIB.impl(name, getattr(implementations, name), _EVERYWHERE)
    torch.library.register_fake(f"flowvi::{name}", fake)
    op = getattr(_OPS, name)
    torch.library.register_vmap(f"flowvi::{name}", _points_alone(op, *folds) if folds else _every_argument(op))


def _values(x: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y, log|det| and what is kept of each layer."""
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1]), x.new_empty(*scalars.shape, x.shape[-2])


def _empty(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(a.new_empty(a.shape) for a in like)


_P = "Tensor w, Tensor u, Tensor b, str constraint"
_define("planar_stack", f"Tensor x, {_P}", 3, lambda x, w, u, b, c: _values(x, b), (1, (0, 0, 1)))
_define(
    "planar_stack_score",
    f"Tensor x, Tensor score, {_P}",
    4,
    lambda x, score, w, u, b, c: (*_values(x, b), *_empty(x)),
    (2, (0, 0, 1, 0)),
)
_define(
    "planar_stack_backward",
    "Tensor? g_y, Tensor? g_log_det, Tensor x, Tensor w, Tensor u, Tensor b, Tensor t, str constraint",
    4,
    lambda g_y, g_log_det, x, w, u, b, t, c: _empty(x, w, u, b),
    None,
)
_define("planar_stack_inverse", f"Tensor y, {_P}", 3, lambda y, w, u, b, c: _values(y, b), (1, (0, 0, 1)))
_define(
    "planar_stack_inverse_backward",
    "Tensor? g_x, Tensor? g_log_det, Tensor x, Tensor w, Tensor u, Tensor b, Tensor t, str constraint",
    4,
    lambda g_x, g_log_det, x, w, u, b, t, c: _empty(x, w, u, b),
    None,
)

_R = "Tensor z0, Tensor raw_alpha, Tensor raw_s"
_define("radial_stack", f"Tensor x, {_R}", 3, lambda x, z0, a, s: _values(x, s), (1, (0, 0, 1)))
_define(
    "radial_stack_score",
    f"Tensor x, Tensor score, {_R}",
    4,
    lambda x, score, z0, a, s: (*_values(x, s), *_empty(x)),
    (2, (0, 0, 1, 0)),
)
_define(
    "radial_stack_backward",
    f"Tensor? g_y, Tensor? g_log_det, Tensor x, {_R}, Tensor r",
    4,
    lambda g_y, g_log_det, x, z0, a, s, r: _empty(x, z0, a, s),
    None,
)
_define("radial_stack_inverse", f"Tensor y, {_R}", 3, lambda y, z0, a, s: _values(y, s), (1, (0, 0, 1)))
_define(
    "radial_stack_inverse_backward",
    f"Tensor? g_x, Tensor? g_log_det, Tensor x, {_R}, Tensor r",
    4,
    lambda g_x, g_log_det, x, z0, a, s, r: _empty(x, z0, a, s),
    None,
)

_define(
    "largest",
    "Tensor x",
    2,
    lambda x: tuple(x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=kind) for kind in (x.dtype, torch.uint8)),
    None,
)
_LIB.define("largest_backward(Tensor g, Tensor which, int window) -> Tensor")
_LIB.impl("largest_backward", implementations.largest_backward, _EVERYWHERE)


@torch.library.register_fake("flowvi::largest_backward")
def _(g: Tensor, which: Tensor, window: int) -> Tensor:
    return g.new_empty(*g.shape[:-1], window, g.shape[-1])


@torch.library.register_vmap("flowvi::largest_backward")
def _(info: Any, in_dims: Sequence[int | None], g: Tensor, which: Tensor, window: int) -> tuple[Tensor, int]:
    size = info.batch_size
    g, which = (
        a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
        for a, dim in zip((g, which), in_dims, strict=False)
    )
    return _OPS.largest_backward(g, which, window), 0


_LIB.define("planar_root(Tensor c, Tensor one_plus_m) -> Tensor")
_LIB.impl("planar_root", implementations.planar_root, _EVERYWHERE)


@torch.library.register_fake("flowvi::planar_root")
def _(c: Tensor, one_plus_m: Tensor) -> Tensor:
    return torch.empty_like(c)


@torch.library.register_vmap("flowvi::planar_root")
def _(info: Any, in_dims: Sequence[int | None], c: Tensor, one_plus_m: Tensor) -> tuple[Tensor, int]:
    # Elementwise: the batch goes in front, and the rest broadcasts from the right as it would without it.
    parts = [a if d is None else a.movedim(d, 0) for a, d in zip((c, one_plus_m), in_dims, strict=True)]
    rank = max(p.dim() - (d is not None) for p, d in zip(parts, in_dims, strict=True))
    c, one_plus_m = (
        p if d is None else p.reshape(p.shape[0], *(1,) * (rank - p.dim() + 1), *p.shape[1:])
        for p, d in zip(parts, in_dims, strict=True)
    )
    return _OPS.planar_root(c, one_plus_m), 0
