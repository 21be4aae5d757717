r"""Radial layers and stacks of them, in plain torch.

One layer (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 14 and appendix A.2) is

    f(z) = z0 + g (z - z0),    g = (r + s) / (alpha + r),    r = |z - z0|,    alpha > 0,    s > 0,

the paper's z + beta h (z - z0) with h = 1 / (alpha + r) and beta = s - alpha > -alpha. Both factors of the
determinant are ratios of positive sums, without cancellation:

    log|det| = (D - 1) log g + log h2,    h2 = (alpha s + 2 alpha r + r^2) / (alpha + r)^2 = d(g r)/dr.

alpha and s are (a + sqrt(a^2 + 4)) / 2 of raw parameters a: positive, 1 at 0, and with tails like a and 1/|a|
that neither underflow nor stop learning. Equal raw parameters give s = alpha, the identity.

The Jacobian g I + (h2 - g) r̂ r̂^T is symmetric with eigenvalues g (D - 1 times) and h2 (along r̂), so its
inverse is 1/g and 1/h2 along the same directions. The inverse map is in closed form too: with R = |y - z0| =
g r, r is the positive root of r^2 + (s - R) r - alpha R = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positive(raw: Tensor) -> Tensor:
    """(a + sqrt(a^2 + 4)) / 2 > 0, elementwise, without cancellation for either sign."""
    size = (raw.abs() + torch.sqrt(raw * raw + 4)) / 2
    return torch.where(raw >= 0, size, 1 / size)


def _positive_slope(raw: Tensor) -> Tensor:
    return positive(raw) / torch.sqrt(raw * raw + 4)


def _factors(r: Tensor, alpha: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """G and h2 of the docstring on top, of the shape of r."""
    reach = alpha + r
    return (r + s) / reach, (alpha * s + 2 * alpha * r + r * r) / (reach * reach)


def _unit(offset: Tensor, r: Tensor) -> Tensor:
    """r̂ (..., D), zero at the centre, where every direction is as good."""
    return offset / r.clamp_min(torch.finfo(r.dtype).tiny).unsqueeze(-1)


def layer(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor]:
    """One layer: y (..., D) and log|det| (...) from x, z0 (..., D), raw_alpha and raw_s (...)."""
    alpha, s = positive(raw_alpha), positive(raw_s)
    offset = x - z0
    r = torch.linalg.vector_norm(offset, dim=-1)
    g, h2 = _factors(r, alpha, s)
    return z0 + g.unsqueeze(-1) * offset, (x.shape[-1] - 1) * torch.log(g) + torch.log(h2)


def layer_inverse(y: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> Tensor:
    """X (..., D) with layer(x) = y: the positive root in the form that does not cancel, for each sign."""
    alpha, s = positive(raw_alpha), positive(raw_s)
    offset = y - z0
    big = torch.linalg.vector_norm(offset, dim=-1)
    b = big - s
    root = torch.sqrt(b * b + 4 * alpha * big)
    behind = b < 0
    r = torch.where(behind, 2 * alpha * big / (root + b.abs()), (root + b.abs()) / 2)
    # 1/g, and not r/R, which is 0/0 at the centre.
    return z0 + ((alpha + r) / (r + s)).unsqueeze(-1) * offset


def layer_score(
    x: Tensor, score: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer`, and d log q(y)/dy (..., D) from d log q(x)/dx (..., D): J^-1 (score - d log|det|/dx)."""
    alpha, s = positive(raw_alpha), positive(raw_s)
    dim = x.shape[-1]
    offset = x - z0
    r = torch.linalg.vector_norm(offset, dim=-1)
    g, h2 = _factors(r, alpha, s)
    unit = _unit(offset, r)
    along = (score * unit).sum(-1)
    slope = _log_det_slope(r, alpha, s, dim)
    y = z0 + g.unsqueeze(-1) * offset
    out = score / g.unsqueeze(-1) + ((along - slope) / h2 - along / g).unsqueeze(-1) * unit
    return y, (dim - 1) * torch.log(g) + torch.log(h2), out


def _log_det_slope(r: Tensor, alpha: Tensor, s: Tensor, dim: int) -> Tensor:
    """D log|det| / dr."""
    reach = alpha + r
    return (dim - 1) * (alpha - s) / ((r + s) * reach) + 2 * reach / (alpha * s + 2 * alpha * r + r * r) - 2 / reach


def _gains(r: Tensor, alpha: Tensor, s: Tensor) -> Tensor:
    return (r + s) / (alpha + r)


def _inputs(x: Tensor, z0: Tensor, g: Tensor) -> list[Tensor]:
    """Every layer's input (S, D), rebuilt from x by the forward pass's own sums, with g (K, S) known.

    Not from y: dividing by g undoes a contraction and would amplify rounding.
    """
    inputs = []
    for centre, gain in zip(z0.unsqueeze(-2).unbind(-3), g.unsqueeze(-1).unbind(-3), strict=True):
        inputs.append(x)
        x = torch.addcmul(centre, x - centre, gain)
    return inputs


def stack_forward(x: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K layers: y (S, D), log|det| (S,), and r (K, S), which the backward pass needs.

    The same dimensions may stand in front of all of them: a stack of its own for every datum, say.

    Args:
        x: points, (S, D).
        z0: centres, (K, D).
        raw_alpha: raw alpha, (K,).
        raw_s: raw s, (K,).
    """
    alpha, s = positive(raw_alpha).unsqueeze(-1), positive(raw_s).unsqueeze(-1)
    r = x.new_empty(*raw_s.shape, x.shape[-2])
    y = x
    for k in range(raw_s.shape[-1]):
        centre = z0[..., k, None, :]
        offset = y - centre
        r[..., k, :] = torch.linalg.vector_norm(offset, dim=-1)
        gain = _gains(r[..., k, :], alpha[..., k, :], s[..., k, :])
        y = torch.addcmul(centre, offset, gain.unsqueeze(-1))
    g, h2 = _factors(r, alpha, s)
    log_det = torch.log(g).sum(-2).mul_(x.shape[-1] - 1).add_(torch.log(h2).sum(-2))
    return y.clone() if y is x else y, log_det, r


def stack_backward(
    g_y: Tensor | None,
    g_log_det: Tensor | None,
    x: Tensor,
    z0: Tensor,
    raw_alpha: Tensor,
    raw_s: Tensor,
    r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The transpose of `stack_forward`: gradients to x (S, D), z0 (K, D), raw_alpha (K,), raw_s (K,).

    A missing cotangent (None) counts as zero. Dimensions in front as in `stack_forward`.
    """
    dim = z0.shape[-1]
    alpha, s = positive(raw_alpha).unsqueeze(-1), positive(raw_s).unsqueeze(-1)
    g = _gains(r, alpha, s)
    reach, inner = alpha + r, r + s
    # What log|det| = (D - 1) log g + log h2 pulls on r, alpha and s.
    if g_log_det is None:
        pull_r = pull_alpha = pull_s = torch.zeros_like(r)
    else:
        weight = g_log_det.unsqueeze(-2)
        quad = alpha * s + 2 * alpha * r + r * r
        pull_r = weight * _log_det_slope(r, alpha, s, dim)
        pull_alpha = weight * ((1 - dim) / reach + (s + 2 * r) / quad - 2 / reach)
        pull_s = weight * ((dim - 1) / inner + alpha / quad)
    cot = g_y if g_y is not None else torch.zeros_like(x)
    inputs = _inputs(x, z0, g)
    g_z0, g_g = torch.empty_like(z0), torch.empty_like(r)
    dg_dr = (alpha - s) / (reach * reach)
    for k in range(len(inputs) - 1, -1, -1):
        offset = inputs[k] - z0[..., k, None, :]
        row = r[..., k, :]
        g_g[..., k, :] = (cot * offset).sum(-1)
        along = torch.addcmul(pull_r[..., k, :], g_g[..., k, :], dg_dr[..., k, :])
        g_x = torch.addcmul(cot * g[..., k, :, None], _unit(offset, row), along.unsqueeze(-1))
        g_z0[..., k, :] = (cot - g_x).sum(-2)
        cot = g_x
    g_alpha = (pull_alpha - g_g * g / reach).sum(-1)
    g_s = (pull_s + g_g / reach).sum(-1)
    cot = cot.clone() if cot is g_y else cot
    return cot, g_z0, g_alpha * _positive_slope(raw_alpha), g_s * _positive_slope(raw_s)


def stack_score(
    x: Tensor,
    score: Tensor,
    z0: Tensor,
    raw_alpha: Tensor,
    raw_s: Tensor,
    r: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """The score of q at the stack's output, (S, D), from the score at its input x and `stack_forward`'s r.

    With a weight (S,) for each particle's log|det| it is J^-T (score - weight d log|det|/dx), which the inverse's
    gradient needs.
    """
    alpha, s = positive(raw_alpha).unsqueeze(-1), positive(raw_s).unsqueeze(-1)
    g, h2 = _factors(r, alpha, s)
    slope = _log_det_slope(r, alpha, s, z0.shape[-1])
    if weight is not None:
        slope = slope * weight.unsqueeze(-2)
    for k, z in enumerate(_inputs(x, z0, g)):
        unit = _unit(z - z0[..., k, None, :], r[..., k, :])
        along = (score * unit).sum(-1)
        bend = (along - slope[..., k, :]) / h2[..., k, :] - along / g[..., k, :]
        score = torch.addcmul(score / g[..., k, :, None], unit, bend.unsqueeze(-1))
    return score


def stack_inverse(y: Tensor, z0: Tensor, raw_alpha: Tensor, raw_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X (S, D) with `stack_forward` (x) = y, log|det dx/dy| (S,), and r (K, S); dimensions in front as there."""
    r = y.new_empty(*raw_s.shape, y.shape[-2])
    for k in range(raw_s.shape[-1] - 1, -1, -1):
        centre = z0[..., k, None, :]
        y = layer_inverse(y, centre, raw_alpha[..., k, None], raw_s[..., k, None])
        r[..., k, :] = torch.linalg.vector_norm(y - centre, dim=-1)
    g, h2 = _factors(r, positive(raw_alpha).unsqueeze(-1), positive(raw_s).unsqueeze(-1))
    log_det = (1 - y.shape[-1]) * torch.log(g).sum(-2) - torch.log(h2).sum(-2)
    return (y if raw_s.shape[-1] else y.clone()), log_det, r
