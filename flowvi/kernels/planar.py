r"""Planar layers: the constraint, and a stack of K layers as one recurrence in K scalars, in plain torch.

One layer (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 10 to 12 and appendix A.1) is

    f(z) = z + û tanh(w.z + b),    û = u + (m(s) - s) w / |w|^2,    s = w.u,    w.û = m(s) > -1.

What makes the numbers hold: 1 + m is computed directly and never as 1 + w.û, so the log-determinant
log(t^2 + (1 - t^2)(1 + m)), t = tanh(a), is a sum of positive terms: no cancellation, no absolute value.

m is chosen by name:

- ``"squareplus"`` (ours): 1 + m = (s + sqrt(s^2 + 4)) / 2. m(0) = 0, so that u = 0 is the identity; the
  tail is 1/|s|, so that 1 + m neither underflows nor stops learning where softplus does both; and
  m(s) - s = m(-s), so that û needs no difference of large numbers.
- ``"softplus"`` (the paper's): 1 + m = log(1 + e^s), with m(0) = -0.307: u = 0 is not the identity.

As w -> 0 the direction w / |w|^2 has no limit. Below |w|^2 = 1e-8 the layer is faded out: û and m are both
scaled by r = |w|^2 / 1e-8, which keeps w.û = r m > -1 exactly and every gradient bounded.

Stack: z_k = z_0 + sum_{j<=k} û_j t_j, so with A = W z_0 + b and the Gram matrix G = W Û^T,
a_k = A_k + sum_{j<k} G_kj t_j. Two matrix products over D and a triangular recurrence over K on rows of
length S give the value, all K log-determinants and, transposed, every gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowvi.kernels.root import planar_root

CONSTRAINTS = ("squareplus", "softplus")

_FADE = 1e-8  # |w|^2 below which a layer fades to the identity
_TINY = 1e-30  # the softplus of the paper underflows to 0 below s = -104 in float32


def _m(s: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
    """1 + m(s), m(s) - s and dm/ds, each without cancellation; all of the shape of `s`."""
    if constraint == "squareplus":
        q = torch.sqrt(s * s + 4)
        size = (s.abs() + q) / 2  # (|s| + q) / 2 and its reciprocal are 1 + m(|s|) and 1 + m(-|s|)
        one_plus_m = torch.where(s >= 0, size, 1 / size)
        return one_plus_m, (s * s / (q + 2) - s) / 2, one_plus_m / q
    one_plus_m = torch.nn.functional.softplus(s).clamp_min(_TINY)
    return one_plus_m, torch.nn.functional.softplus(-s) - 1, torch.sigmoid(s)


def constrain(w: Tensor, u: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
    """û (..., D) and 1 + w.û (...) of layers with raw parameters w, u (..., D); differentiable."""
    s = (w * u).sum(-1)
    square = (w * w).sum(-1)
    size = square.clamp_min(_FADE)
    fade = square / size
    one_plus_m, m_minus_s, _ = _m(s, constraint)
    u_hat = fade.unsqueeze(-1) * u + (m_minus_s / size).unsqueeze(-1) * w
    return u_hat, (1 - fade) + fade * one_plus_m


def constrain_backward(
    g_u_hat: Tensor, g_one_plus_m: Tensor, w: Tensor, u: Tensor, constraint: str
) -> tuple[Tensor, Tensor]:
    """The transpose of `constrain`: gradients to w and u (..., D), by hand, to keep it off the tape."""
    s = (w * u).sum(-1)
    square = (w * w).sum(-1)
    size = square.clamp_min(_FADE)
    fade = square / size
    one_plus_m, m_minus_s, slope = _m(s, constraint)
    pull = m_minus_s / size
    g_pull = (g_u_hat * w).sum(-1)
    g_s = g_pull * (slope - 1) / size + g_one_plus_m * fade * slope
    g_fade = (g_u_hat * u).sum(-1) + g_one_plus_m * (one_plus_m - 1)
    g_square = torch.where(square < _FADE, g_fade / _FADE, -g_pull * pull / size)
    g_w = pull.unsqueeze(-1) * g_u_hat + g_s.unsqueeze(-1) * u + 2 * g_square.unsqueeze(-1) * w
    g_u = fade.unsqueeze(-1) * g_u_hat + g_s.unsqueeze(-1) * w
    return g_w, g_u


def layer(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
    """One layer: y (..., D) and log|det| (...) from x, w, u (..., D) and b (...), broadcast together."""
    u_hat, one_plus_m = constrain(w, u, constraint)
    t = torch.tanh((x * w).sum(-1) + b)
    tt = t * t
    return x + u_hat * t.unsqueeze(-1), torch.log(tt + (1 - tt) * one_plus_m)


def layer_score(
    x: Tensor, score: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer`, and the score carried forward: d log q(y)/dy (..., D) from d log q(x)/dx (..., D).

    J^-T (score - d log|det|/dx) with J = I + û h w^T and h = 1 - t^2, by Sherman-Morrison.
    """
    u_hat, one_plus_m = constrain(w, u, constraint)
    t = torch.tanh((x * w).sum(-1) + b)
    h = 1 - t * t
    det = t * t + h * one_plus_m
    pull = (2 * t * h * (one_plus_m - 1) / det - h * (score * u_hat).sum(-1)) / det
    return x + u_hat * t.unsqueeze(-1), torch.log(det), score + pull.unsqueeze(-1) * w


def _gram(w: Tensor, u_hat: Tensor) -> Tensor:
    return w @ u_hat.mT


def _add_product(row: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
    """Add sum_j coefficients[..., j] rows[..., j, :] to row (..., S), in place."""
    if row.dim() == 1:
        return row.addmv_(rows.mT, coefficients)
    return row.add_((coefficients.unsqueeze(-2) @ rows).squeeze(-2))


def stack_forward(x: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
    """K layers at once: y (S, D), log|det| (S,), and t (K, S), which the backward pass needs.

    The same dimensions may stand in front of all of them: a stack of its own for every datum, say. Those of w may be
    1, where all data share their directions.

    Args:
        x: points, (S, D).
        w: directions, (K, D).
        u: raw displacements, (K, D).
        b: offsets, (K,).
        constraint: one of `CONSTRAINTS`.
    """
    u_hat, one_plus_m = constrain(w, u, constraint)
    gram = _gram(w, u_hat)
    t = w @ x.mT + b.unsqueeze(-1)
    rows = t.unbind(-2)
    if len(rows):
        rows[0].tanh_()
    for k in range(1, len(rows)):
        _add_product(rows[k], t[..., :k, :], gram[..., k, :k]).tanh_()
    tt = t * t
    det = tt + (1 - tt) * one_plus_m.unsqueeze(-1)
    return x + t.mT @ u_hat, det.log_().sum(-2), t


def stack_backward(
    g_y: Tensor | None,
    g_log_det: Tensor | None,
    x: Tensor,
    w: Tensor,
    u: Tensor,
    b: Tensor,
    t: Tensor,
    constraint: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The transpose of `stack_forward`: gradients to x (S, D), w (K, D), u (K, D), b (K,).

    A missing cotangent (None) counts as zero and costs nothing: the path gradient has none for log|det|.
    Dimensions in front as in `stack_forward`.
    """
    u_hat, one_plus_m = constrain(w, u, constraint)
    gram = _gram(w, u_hat)
    h = 1 - t * t
    g_a = u_hat @ g_y.mT if g_y is not None else torch.zeros_like(t)
    g_one_plus_m = torch.zeros_like(b)
    if g_log_det is not None:
        ratio = g_log_det.unsqueeze(-2) / (t * t + h * one_plus_m.unsqueeze(-1))
        g_a.addcmul_(t * ratio, (1 - one_plus_m).unsqueeze(-1), value=2)
        g_one_plus_m = (h * ratio).sum(-1)
    rows, slopes = g_a.unbind(-2), h.unbind(-2)
    for k in range(len(rows) - 1, -1, -1):
        if k + 1 < len(rows):
            _add_product(rows[k], g_a[..., k + 1 :, :], gram[..., k + 1 :, k])
        rows[k].mul_(slopes[k])
    g_gram = torch.tril(g_a @ t.mT, -1)
    g_w = g_a @ x + g_gram @ u_hat
    g_u_hat = g_gram.mT @ w
    g_x = g_a.mT @ w
    if g_y is not None:
        g_u_hat = g_u_hat + t @ g_y
        g_x = g_x + g_y
    g_w_constraint, g_u = constrain_backward(g_u_hat, g_one_plus_m, w, u, constraint)
    return g_x, (g_w + g_w_constraint).sum_to_size(w.shape), g_u, g_a.sum(-1)


def stack_score(
    score: Tensor, w: Tensor, u: Tensor, t: Tensor, constraint: str, *, weight: Tensor | None = None
) -> Tensor:
    """The score of q at the stack's output, (S, D), from the score at its input and `stack_forward`'s t.

    The same recurrence: s_k = s_0 + sum_{j<=k} c_j w_j, so û_k.s_{k-1} needs only the Gram matrix. With a weight (S,)
    for each particle's log|det| it is J^-T (s - weight d log|det|/dx), which the inverse's gradient needs.
    """
    u_hat, one_plus_m = constrain(w, u, constraint)
    gram = _gram(w, u_hat)
    h = 1 - t * t
    det = t * t + h * one_plus_m.unsqueeze(-1)
    drive = 2 * t * h * (one_plus_m - 1).unsqueeze(-1) / det
    if weight is not None:
        drive = drive * weight.unsqueeze(-2)
    c = u_hat @ score.mT  # becomes the coefficients, row by row
    rows, drives, slopes, dets = c.unbind(-2), drive.unbind(-2), h.unbind(-2), det.unbind(-2)
    for k in range(len(rows)):
        if k:
            _add_product(rows[k], c[..., :k, :], gram[..., :k, k])
        rows[k].mul_(slopes[k]).neg_().add_(drives[k]).div_(dets[k])
    return score + c.mT @ w


def stack_inverse(y: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
    """X (S, D) with `stack_forward` (x) = y, log|det dx/dy| (S,), and t (K, S): one scalar equation for each t.

    Dimensions in front as in `stack_forward`.
    """
    u_hat, one_plus_m = constrain(w, u, constraint)
    rows = []
    for k in range(w.shape[-2] - 1, -1, -1):
        c = (y * w[..., k, None, :]).sum(-1) + b[..., k, None]
        rows.append(torch.tanh(planar_root(c, one_plus_m[..., k, None])))
        y = y - rows[-1].unsqueeze(-1) * u_hat[..., k, None, :]
    t = torch.stack(rows[::-1], -2) if rows else y.new_empty(*b.shape, y.shape[-2])
    tt = t * t
    return y, -torch.log(tt + (1 - tt) * one_plus_m.unsqueeze(-1)).sum(-2), t
