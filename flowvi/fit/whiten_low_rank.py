r"""Whitening in hundreds or thousands of dimensions: a Gaussian of low rank plus diagonal, linear in D.

N(mu, A A^T) with A = diag(s) B and B = I + U diag(b - 1) U^T, U (D, R) orthonormal, b > 1: wide directions on top of a
diagonal. It starts at the diagonal Gaussian of `flowvi.fit.whiten` and is improved in turns.

For a fixed B, mu and s move by natural gradients. With z = mu + s B e and w = s d log p/dz,

    mu <- mu + s rho B^2 mean(w),    log s_i <- log s_i + rho cov((w + B^-1 e)_i, (B e)_i) / (1 + (B^2)_ii (B^-2)_ii),

where the denominator is the Fisher information of log s_i. Along directions that are steeper than the family can say,
mu takes smaller steps.

For a fixed s, the best B is known: in the coordinates x = (z - mu) / s, with P the mean of -d^2 log p/dx^2 over q, the
ELBO is log|B| - tr(B P B) / 2, so U are the eigenvectors of P with the smallest eigenvalues lambda < 1, and
b = lambda^(-1/2). They are found by Rayleigh and Ritz among the present U and the leading directions of w + x, which
is (I - P) x where p is Gaussian. P U comes from differences of gradients: no matrix of D^2 numbers is ever made.

Sources: Ong, Nott, Smith (2018), "Gaussian variational approximation with a factor covariance structure",
arXiv:1701.03208 (the family); Halko, Martinsson, Tropp (2011), "Finding structure with randomness",
arXiv:0909.4061 (Rayleigh and Ritz in a sampled subspace).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.objectives import Target
from flowvi.progress import Bar

RHO, RHO_END = 0.3, 0.03
CLIP_LOC, CLIP_SCALE = 0.5, 0.3
TURNS = 6
"""How often B is found anew, evenly spread over the first three quarters of the steps."""

PROBES = 4
"""Draws at which the differences of gradients are taken, for each direction."""

WORTH = 0.97
"""The eigenvalue of P above which a direction is left to the diagonal."""

STEEP = 2.0
"""The eigenvalue of P above which a step of mu has to be smaller along a direction."""

MOST = 3.0
"""The factor by which a direction may widen in one turn."""


class LowRank(NamedTuple):
    """N(loc, A A^T), A = diag(scale) (I + factor factor^T).

    Attributes:
        loc: (D,).
        scale: s, (D,).
        factor: V = U diag(sqrt(b - 1)), (D, R); R is what was found worth it.
        elbo: its ELBO, over the last steps; NaN where it was never finite.
    """

    loc: Tensor
    scale: Tensor
    factor: Tensor
    elbo: float

    def distance(self, z: Tensor) -> Tensor:
        """|A^-1 (z - loc)| for rows z (S, D), (S,)."""
        x = (z - self.loc) / self.scale
        inner = torch.eye(self.factor.shape[1]).to(x) + self.factor.mT @ self.factor
        x = x - torch.linalg.solve(inner, x @ self.factor, left=False) @ self.factor.mT
        return torch.linalg.vector_norm(x, dim=-1)


class _Root:
    """B = I + U diag(b - 1) U^T, by U (D, R) and b (R,).

    Args:
        u: U.
        b: its scales.
        steep: other directions, (D, N), orthonormal as well, along which P is steep: mu takes smaller steps there.
        steepness: P along them, (N,).
    """

    def __init__(self, u: Tensor, b: Tensor, steep: Tensor, steepness: Tensor) -> None:
        self.u, self.b, self.steep, self.steepness = u, b, steep, steepness

    def multiply(self, x: Tensor) -> Tensor:
        """B x for rows x (S, D)."""
        return x + (x @ self.u * (self.b - 1)) @ self.u.mT

    def solve(self, x: Tensor) -> Tensor:
        """B^-1 x for rows x (S, D)."""
        return x + (x @ self.u * (1 / self.b - 1)) @ self.u.mT

    def newton(self, slope: Tensor) -> Tensor:
        """About P^-1 g for a g (D,)."""
        wide = self.u @ ((self.b**2 - 1) * (self.u.mT @ slope))
        return slope + wide + self.steep @ ((1 / self.steepness - 1) * (self.steep.mT @ slope))

    def information(self) -> Tensor:
        """The Fisher information of each log s_i, 1 + (B^2)_ii (B^-2)_ii, (D,)."""
        square = self.u.square()
        return 1 + (1 + square @ (self.b**2 - 1)) * (1 + square @ (self.b**-2 - 1))


@torch.no_grad()
def polish(
    target: Target,
    loc: Tensor,
    scale: Tensor,
    *,
    rank: int,
    num_steps: int,
    num_particles: int,
    generator: torch.Generator,
    bar: Bar | None = None,
) -> LowRank:
    """From a diagonal Gaussian to one of low rank plus diagonal.

    Args:
        target: log p and its gradient.
        loc: where to start, (D,).
        scale: sds to start with, (D,).
        rank: R, at most.
        num_steps: natural-gradient steps of mu and s; their average over the last quarter is returned.
        num_particles: S of a step, half of them mirrored.
        generator: where the randomness comes from.
        bar: counts the steps.

    Returns:
        The Gaussian.
    """
    nothing = loc.new_empty(len(loc), 0), loc.new_empty(0)
    root = _Root(*nothing, *nothing)
    tail = max(1, num_steps // 4)
    turns = {round(i * (num_steps - tail) / TURNS) for i in range(1, TURNS + 1)}
    log_scale = scale.log()
    mean_loc, mean_log_scale, elbos = torch.zeros_like(loc), torch.zeros_like(loc), []
    for step in range(num_steps):
        if step in turns:
            root = _find_root(target, loc, log_scale.exp(), root, rank, generator)
        late = max(0.0, (step - num_steps + tail) / tail)
        rho = RHO * (RHO_END / RHO) ** late
        loc, log_scale, elbo = _step(target, loc, log_scale, root, rho, num_particles, generator)
        if step >= num_steps - tail:
            mean_loc += loc / tail
            mean_log_scale += log_scale / tail
            elbos.append(elbo)
        if bar is not None:
            bar.update(1)
    fine = [elbo for elbo in elbos if math.isfinite(elbo)]
    elbo = sum(fine) / len(fine) if fine else math.nan
    return LowRank(mean_loc, mean_log_scale.exp(), root.u * (root.b - 1).sqrt(), elbo)


def _mirrored(num: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of N(0, I) and their mirror images, (num, D), num even or one more."""
    e = torch.randn((num + 1) // 2, len(like), generator=generator, dtype=like.dtype, device=like.device)
    return torch.cat([e, -e])


def _step(
    target: Target,
    loc: Tensor,
    log_scale: Tensor,
    root: _Root,
    rho: float,
    num_particles: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float]:
    """One natural-gradient step of mu and log s, and the ELBO before it; NaN where a particle was not finite."""
    dim, scale = len(loc), log_scale.exp()
    e = _mirrored(num_particles, loc, generator)
    x = root.multiply(e)
    log_p, grad = target.value_and_grad(loc + scale * x)
    if not bool(log_p.isfinite().all() & grad.isfinite().all()):
        return loc, log_scale + math.log(0.7), math.nan
    w = scale * grad
    move = rho * root.newton(w.mean(0))
    length = torch.linalg.vector_norm(root.solve(move.unsqueeze(0)))
    move = move * (CLIP_LOC * dim**0.5 / length.clamp_min(1e-12)).clamp_max(1.0)
    slope = w + root.solve(e)
    slope = ((slope - slope.mean(0)) * x).mean(0)
    bend = (rho * slope / root.information()).clamp(-CLIP_SCALE, CLIP_SCALE)
    # log p - log q of each draw: its noise ends where q is p
    elbo = float((log_p + 0.5 * e.square().sum(-1)).mean() + log_scale.sum() + root.b.log().sum())
    elbo += 0.5 * dim * math.log(2 * math.pi)
    return loc + scale * move, log_scale + bend, elbo


def _find_root(target: Target, loc: Tensor, scale: Tensor, root: _Root, rank: int, generator: torch.Generator) -> _Root:
    """B anew: the widest directions among those that it has and those that the gradients point to."""
    x = root.multiply(_mirrored(max(64, 4 * rank), loc, generator))
    log_p, grad = target.value_and_grad(loc + scale * x)
    fine = log_p.isfinite() & grad.isfinite().all(-1)
    rest = (scale * grad + x)[fine]
    if len(rest) < 2:
        return root
    rest = rest - rest.mean(0)
    known = torch.cat([root.u, root.steep], 1)
    rest = rest - (rest @ known) @ known.mT
    # The right singular vectors by the smaller Gram matrix; those of no size are noise of rounding.
    size, left = torch.linalg.eigh(rest @ rest.mT)
    keep = (size > 1e-10 * size[-1].clamp_min(1e-30)).nonzero().flatten()[-rank:]
    basis, _ = torch.linalg.qr(torch.cat([known, rest.mT @ left[:, keep]], 1))
    reach = torch.linalg.vector_norm(root.multiply(basis.mT), dim=-1)  # each direction's sd under q
    product = _curvature(target, loc, scale, root.multiply(_mirrored(PROBES, loc, generator)), basis, reach)
    if product is None:
        return root
    small = basis.mT @ product
    value, vector = torch.linalg.eigh(0.5 * (small + small.mT))
    wide, steep = (value[:rank] < WORTH).nonzero().flatten(), (value > STEEP).nonzero().flatten()[-rank:]
    u = basis @ vector[:, wide]
    most = MOST * torch.linalg.vector_norm(root.multiply(u.mT), dim=-1)
    b = torch.minimum(value[wide].clamp_min(1e-12).rsqrt(), most)
    return _Root(u, b, basis @ vector[:, steep], value[steep])


def _curvature(target: Target, loc: Tensor, scale: Tensor, at: Tensor, basis: Tensor, reach: Tensor) -> Tensor | None:
    """P C for the columns C of `basis` (D, M), by differences over one sd to each side; None where not finite."""
    offset = reach.unsqueeze(-1) * basis.mT  # (M, D)
    x = torch.stack([at.unsqueeze(1) + offset, at.unsqueeze(1) - offset])  # (2, n, M, D)
    grads = [target.value_and_grad(loc + scale * part)[1] for part in x.reshape(-1, len(loc)).split(256)]
    w = (scale * torch.cat(grads)).view(x.shape)
    product = (w[1] - w[0]) / (2 * reach.unsqueeze(-1))
    fine = product.isfinite().all(-1).all(-1)  # of each draw, all directions
    return product[fine].mean(0).mT if bool(fine.any()) else None
