"""What the operators do: hand the work to compiled kernels where these serve, to plain torch elsewhere.

Shapes as in `planar` and `radial`; the same dimensions may stand in front of every argument, and w's may all be 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowvi.kernels import dispatch, planar, radial
from flowvi.kernels.maxout import largest as largest
from flowvi.kernels.maxout import largest_backward as largest_backward
from flowvi.kernels.root import planar_root as planar_root


def _array(a: Tensor | None, batch: int) -> Any:
    """A tensor's memory as a numpy array, its first `batch` dimensions made one."""
    if a is None:
        return None
    a = a.detach()
    if a.is_neg() or not a.is_contiguous():
        a = a.resolve_neg().contiguous()
    array = a.numpy()
    return array.reshape(-1, *array.shape[batch:]) if batch > 1 else array


def _arrays(tensors: Sequence[Tensor | None], batch: int) -> list[Any]:
    return [_array(a, batch) for a in tensors]


def _plain(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.contiguous() for v in values)


def _or_zeros(g_y: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if g_y is None else g_y


# Planar.


def _directions(w: Tensor, u: Tensor) -> Tensor:
    """W with u's dimensions in front, unless all data share it."""
    return w if w.shape[:-2].numel() == 1 else w.expand_as(u)


def _planar_forward(
    x: Tensor, score: Tensor | None, w: Tensor, u: Tensor, b: Tensor, constraint: str
) -> tuple[Tensor, ...]:
    impl = dispatch.compiled("planar", x, score, w, u, b)
    if impl is None:
        y, log_det, t = planar.stack_forward(x, w, u, b, constraint)
        if score is None:
            return _plain(y, log_det, t)
        return _plain(y, log_det, t, planar.stack_score(score, w, u, t, constraint))
    batch = x.dim() - 2
    y, log_det = x.new_empty(x.shape), x.new_empty(x.shape[:-1])
    t = x.new_empty(*b.shape, x.shape[-2])
    out = None if score is None else x.new_empty(x.shape)
    ins = _arrays((x, score, _directions(w, u), u, b), batch)
    impl.forward(*ins[:2], 1.0, *ins[2:], constraint == "softplus", *_arrays((y, log_det, out, t), batch))
    return (y, log_det, t) if out is None else (y, log_det, t, out)


def planar_stack(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, ...]:
    """See `planar.stack_forward`."""
    return _planar_forward(x, None, w, u, b, constraint)


def planar_stack_score(
    x: Tensor, score: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str
) -> tuple[Tensor, ...]:
    """`planar_stack`, and after its values `planar.stack_score`."""
    return _planar_forward(x, score, w, u, b, constraint)


def planar_stack_backward(
    g_y: Tensor | None, g_log_det: Tensor | None, x: Tensor, w: Tensor, u: Tensor, b: Tensor, t: Tensor, constraint: str
) -> tuple[Tensor, ...]:
    """See `planar.stack_backward`."""
    impl = dispatch.compiled("planar", g_y, g_log_det, x, w, u, b, t)
    if impl is None:
        return _plain(*planar.stack_backward(g_y, g_log_det, x, w, u, b, t, constraint))
    batch, each = x.dim() - 2, _directions(w, u)
    g_x, g_w, g_u, g_b = grads = tuple(a.new_empty(a.shape) for a in (x, each, u, b))
    *ins, t_ = _arrays((_or_zeros(g_y, x), g_log_det, x, each, u, b, t), batch)
    impl.backward(*ins, constraint == "softplus", t_, *_arrays(grads, batch))
    return g_x, g_w.sum_to_size(w.shape), g_u, g_b


def planar_stack_inverse(y: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, ...]:
    """See `planar.stack_inverse`."""
    impl = dispatch.compiled("planar", y, w, u, b)
    if impl is None:
        return _plain(*planar.stack_inverse(y, w, u, b, constraint))
    batch = y.dim() - 2
    x, log_det, t = y.new_empty(y.shape), y.new_empty(y.shape[:-1]), y.new_empty(*b.shape, y.shape[-2])
    ins, outs = _arrays((y, _directions(w, u), u, b), batch), _arrays((x, log_det, t), batch)
    impl.inverse(*ins, constraint == "softplus", *outs)
    return x, log_det, t


def planar_stack_inverse_backward(
    g_x: Tensor | None, g_log_det: Tensor | None, x: Tensor, w: Tensor, u: Tensor, b: Tensor, t: Tensor, constraint: str
) -> tuple[Tensor, ...]:
    """The transpose of the inverse and its log-determinant.

    With dx = J^-1 (dy - df/dtheta dtheta) and log|det dx/dy| = -log|det J|(x), g_y = J^-T (g_x - g_log_det
    d log|det J|/dx); what theta gets is minus f's own at the cotangents g_y and g_log_det.
    """
    g_x = torch.zeros_like(x) if g_x is None else g_x
    weight = x.new_zeros(x.shape[:-1]) if g_log_det is None else g_log_det
    impl = dispatch.compiled("planar", g_x, weight, w, u, b, t)
    if impl is None:
        g_y = planar.stack_score(g_x, w, u, t, constraint, weight=weight)
    else:
        batch, g_y = x.dim() - 2, g_x.new_empty(g_x.shape)
        *ins, t_, out = _arrays((g_x, weight, _directions(w, u), u, b, t, g_y), batch)
        impl.inverse_pullback(*ins, constraint == "softplus", t_, out)
    to_log_det = None if g_log_det is None else -g_log_det
    _, *grads = planar_stack_backward(-g_y, to_log_det, x, w, u, b, t, constraint)
    return *_plain(g_y), *grads


# Radial.


def _radial_forward(
    x: Tensor, score: Tensor | None, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor
) -> tuple[Tensor, ...]:
    impl = dispatch.compiled("radial", x, score, z0, raw_alpha, raw_s)
    if impl is None:
        y, log_det, r = radial.stack_forward(x, z0, raw_alpha, raw_s)
        if score is None:
            return _plain(y, log_det, r)
        return _plain(y, log_det, r, radial.stack_score(x, score, z0, raw_alpha, raw_s, r))
    batch = x.dim() - 2
    y, log_det = x.new_empty(x.shape), x.new_empty(x.shape[:-1])
    r = x.new_empty(*raw_s.shape, x.shape[-2])
    out = None if score is None else x.new_empty(x.shape)
    ins = _arrays((x, score, z0, raw_alpha, raw_s), batch)
    impl.forward(*ins[:2], 1.0, *ins[2:], *_arrays((y, log_det, out, r), batch))
    return (y, log_det, r) if out is None else (y, log_det, r, out)


def radial_stack(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, ...]:
    """See `radial.stack_forward`."""
    return _radial_forward(x, None, z0, raw_alpha, raw_s)


def radial_stack_score(x: Tensor, score: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, ...]:
    """`radial_stack`, and after its values `radial.stack_score`."""
    return _radial_forward(x, score, z0, raw_alpha, raw_s)


def radial_stack_backward(
    g_y: Tensor | None, g_log_det: Tensor | None, x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor, r: Tensor
) -> tuple[Tensor, ...]:
    """See `radial.stack_backward`."""
    impl = dispatch.compiled("radial", g_y, g_log_det, x, z0, raw_alpha, raw_s, r)
    if impl is None:
        return _plain(*radial.stack_backward(g_y, g_log_det, x, z0, raw_alpha, raw_s, r))
    batch = x.dim() - 2
    grads = tuple(a.new_empty(a.shape) for a in (x, z0, raw_alpha, raw_s))
    ins = (_or_zeros(g_y, x), g_log_det, x, z0, raw_alpha, raw_s, r)
    impl.backward(*_arrays(ins, batch), *_arrays(grads, batch))
    return grads


def radial_stack_inverse(y: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, ...]:
    """See `radial.stack_inverse`."""
    impl = dispatch.compiled("radial", y, z0, raw_alpha, raw_s)
    if impl is None:
        return _plain(*radial.stack_inverse(y, z0, raw_alpha, raw_s))
    x, log_det, r = y.new_empty(y.shape), y.new_empty(y.shape[:-1]), y.new_empty(*raw_s.shape, y.shape[-2])
    impl.inverse(*_arrays((y, z0, raw_alpha, raw_s, x, log_det, r), y.dim() - 2))
    return x, log_det, r


def radial_stack_inverse_backward(
    g_x: Tensor | None,
    g_log_det: Tensor | None,
    x: Tensor,
    z0: Tensor,
    raw_alpha: Tensor,
    raw_s: Tensor,
    r: Tensor,
) -> tuple[Tensor, ...]:
    """The transpose of the inverse and its log-determinant, as `planar_stack_inverse_backward`."""
    g_x = torch.zeros_like(x) if g_x is None else g_x
    weight = x.new_zeros(x.shape[:-1]) if g_log_det is None else g_log_det
    impl = dispatch.compiled("radial", g_x, weight, x, z0, raw_alpha, raw_s, r)
    if impl is None:
        g_y = radial.stack_score(x, g_x, z0, raw_alpha, raw_s, r, weight=weight)
    else:
        g_y = g_x.new_empty(g_x.shape)
        impl.inverse_pullback(*_arrays((g_x, weight, x, z0, raw_alpha, raw_s, r, g_y), x.dim() - 2))
    to_log_det = None if g_log_det is None else -g_log_det
    _, *grads = radial_stack_backward(-g_y, to_log_det, x, z0, raw_alpha, raw_s, r)
    return *_plain(g_y), *grads
