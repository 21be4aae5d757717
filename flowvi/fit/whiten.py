r"""Whitening: the best Gaussian first, so that the flow starts at the identity on a problem of unit scale.

Natural-gradient variational inference for a Gaussian N(mu, L L^T), from several dispersed starts in one batch.
With z = mu + L e, e ~ N(0, I), g = d log p/dz and G = L^T g + e (the gradient in e of log p(z) - log q(z) is
G, since d log q/de = -e), a step is

    mu <- mu + L clip(rho mean(G)),    L <- L (I + clip(rho tril'(cov(G, e)))),

where tril' halves the diagonal: the natural gradient of the ELBO in the coordinates that L defines (Amari 1998;
Lin, Khan & Schmidt 2019, arXiv:1906.02914; Stein's lemma gives the curvature from gradients alone).

Where D is too large for a full L the starts are diagonal, and the best one is polished to low rank plus diagonal
(`flowvi.fit.whiten_low_rank`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowvi.errors import NonFiniteError
from flowvi.fit.whiten_low_rank import polish
from flowvi.objectives import Target
from flowvi.progress import Bar

CANDIDATES = 64
MAX_SCOUTED = 0.75
"""The share of the starts that scouts may choose; the others set out from the best of 64 draws each."""

NUM_SCOUTS, SCOUT_SDS = 64, (1.0, 3.0, 5.0, 8.0)
MIN_STARTS, RACE = 4, 2 / 3
SCOUT_STEPS, SCOUT_PARTICLES, SCOUT_LAG, SCOUT_APART = 60, 4, 10.0, 4.0
RHO, RHO_END = 0.3, 0.03
CLIP_LOC, CLIP_SCALE = 0.5, 0.3


@dataclass(frozen=True)
class Start:
    """Where one start ended.

    Attributes:
        loc: mu, (D,).
        scale_tril: L, (D, D) lower triangular, or (D,) where it is diagonal.
        elbo: its ELBO, over the last iterations; NaN where it was never finite.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float

    def place(self, x: Tensor) -> Tensor:
        """Z = mu + L x, (S, D), of x in sds."""
        root = self.scale_tril
        return self.loc + (x @ root.mT if root.dim() == 2 else x * root)


@dataclass(frozen=True)
class Gaussian(Start):
    """The outcome of `whiten`: the best start, polished.

    Attributes:
        agree: whether the starts within 3 nats of the best ended in one place.
        starts: all of them as they were before the polish of the best; `flowvi.fit.modes` tells what they found.
            Beside a factor, the best of them, and those that ended elsewhere.
        factor: V, (D, R), where the covariance is of low rank plus diagonal: L = diag(scale_tril) (I + V V^T).
    """

    agree: bool
    starts: tuple[Start, ...] = ()
    factor: Tensor | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Gaussian:
        """The outcome that `dataclasses.asdict` gave."""
        return cls(**{**data, "starts": tuple(Start(**start) for start in data["starts"])})


@torch.no_grad()
def whiten(
    target: Target,
    dim: int,
    *,
    full: bool,
    rank: int = 0,
    generator: torch.Generator,
    dtype: torch.dtype,
    num_starts: int = 8,
    num_steps: int = 150,
    num_particles: int = 32,
    progress: bool | None = None,
) -> Gaussian:
    """Fit a Gaussian from several starts; polish the best one.

    Scouts, 64 short runs of diagonal Gaussians from N(0, s^2) with s up to 8, tell where there is something. Those
    that ended at different places are starts, up to three quarters of R; the others are the best of 64 draws from
    U(-2, 2) each. Where all scouts agree, four starts are enough.

    Args:
        target: log p and its gradient.
        dim: D.
        full: a full L (D^2 numbers for each start), or a diagonal one.
        rank: of what the best start gets on top of its diagonal L; 0 leaves it diagonal.
        generator: where the randomness comes from, on the target's device.
        dtype: of the computation.
        num_starts: R, at most; 64 short runs scout for places to start from (one start has no scouts).
        num_steps: iterations of the polish; the starts take two thirds as many.
        num_particles: S of each start, half of them mirrored; the polish has twice as many.
        progress: whether a bar is shown; None shows it in a terminal or notebook.

    Raises:
        NonFiniteError: log p is not finite anywhere near the origin.
    """
    num_race = max(1, round(RACE * num_steps))
    bar = Bar(
        total=SCOUT_STEPS + num_race + num_steps, desc="whiten", disable=None if progress is None else not progress
    )
    with bar:
        loc, scale = _starts(target, dim, num_starts, generator, dtype, bar)
        tril = torch.diag_embed(scale) if full else scale
        loc, tril, elbos = ascend(target, loc, tril, num_race, num_particles, generator, bar)
        starts = tuple(Start(m, root, elbo) for m, root, elbo in zip(loc, tril, elbos.tolist(), strict=True))
        best = int(torch.nan_to_num(elbos, nan=-torch.inf).argmax())
        agree = _agree(loc, tril, elbos, best)
        if rank and not full:
            found = polish(
                target,
                loc[best],
                tril[best],
                rank=rank,
                num_steps=num_steps,
                num_particles=2 * num_particles,
                generator=generator,
                bar=bar,
            )
            # Diagonal starts end anywhere along a wide direction: by the polished one's scale they are one place.
            here = found.distance(loc) < 1 + 0.5 * dim**0.5
            agree = bool((here | ~(elbos > elbos[best] - 3)).all())
            starts = (starts[best], *(start for r, start in enumerate(starts) if r != best and not here[r]))
            return Gaussian(found.loc, found.scale, found.elbo, agree, starts, found.factor)
        loc, tril, elbos = ascend(
            target, loc[best : best + 1], tril[best : best + 1], num_steps, 2 * num_particles, generator, bar
        )
    return Gaussian(loc[0], tril[0], float(elbos[0]), agree, starts)


def _starts(
    target: Target, dim: int, num: int, generator: torch.Generator, dtype: torch.dtype, bar: Bar
) -> tuple[Tensor, Tensor]:
    """Where the race begins, loc and scale (R, D): where scouts found something, and at good draws from U(-2, 2)."""
    where = generator.device
    near = 4 * torch.rand(num * CANDIDATES, dim, generator=generator, dtype=dtype, device=where) - 2
    log_p = _finite_log_p(target, near)
    if not bool(log_p.isfinite().any()):
        raise NonFiniteError(
            f"log p or its gradient is not finite at any of {len(near)} points drawn from U(-2, 2)^{dim} in "
            f"unconstrained space: check the data and the model's scales."
        )
    log_p = log_p.view(num, CANDIDATES)
    near = near.view(num, CANDIDATES, dim)[torch.arange(num), log_p.argmax(-1)]
    small = torch.full_like(near, 0.1)
    if num == 1:
        return near, small
    # Scouts are many, cheap, and set out from far apart.
    sds = torch.tensor(SCOUT_SDS, dtype=dtype, device=where).repeat_interleave(NUM_SCOUTS // len(SCOUT_SDS))
    wide = sds.unsqueeze(-1) * torch.randn(len(sds), dim, generator=generator, dtype=dtype, device=where)
    scouts = wide[_finite_log_p(target, wide).isfinite()]
    if len(scouts) == 0:
        return near, small
    tril = torch.full_like(scouts, 0.1)
    loc, scale, elbo = ascend(target, scouts, tril, SCOUT_STEPS, SCOUT_PARTICLES, generator, bar)
    chosen = _spread(loc, scale, elbo, int(MAX_SCOUTED * num))
    # Where they all came to one place, a few starts will do: the scouts were starts too.
    num = min(num, max(MIN_STARTS, len(chosen) + 2))
    return torch.cat([loc[chosen], near])[:num], torch.cat([scale[chosen], small])[:num]


def _finite_log_p(target: Target, z: Tensor) -> Tensor:
    """Log p, and -inf where it or its gradient is not finite."""
    log_p, grad = target.value_and_grad(z)
    return torch.where(torch.isfinite(log_p) & torch.isfinite(grad).all(-1), log_p, -torch.inf)


def _spread(loc: Tensor, scale: Tensor, elbo: Tensor, num: int) -> list[int]:
    """Up to `num` scouts at different places: the best one, then always the farthest from those taken."""
    elbo = torch.where(elbo.isfinite(), elbo, -torch.inf)
    fine = elbo >= elbo.max() - SCOUT_LAG * (1 + loc.shape[1] ** 0.5)
    at = loc / scale[fine].median(0).values
    chosen = [int(elbo.argmax())]
    away = torch.where(fine, torch.linalg.vector_norm(at - at[chosen[0]], dim=-1), -1.0)
    while len(chosen) < num and float(away.max()) > SCOUT_APART + loc.shape[1] ** 0.5:
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, torch.linalg.vector_norm(at - at[chosen[-1]], dim=-1))
    return chosen


def ascend(
    target: Target,
    loc: Tensor,
    tril: Tensor,
    num_steps: int,
    num_particles: int,
    generator: torch.Generator,
    bar: Bar | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`num_steps` natural-gradient steps of R Gaussians at once; averages over the last quarter."""
    num_starts, dim = loc.shape
    full = tril.dim() == 3
    half = (num_particles + 1) // 2
    clip_scale = CLIP_SCALE * max(1.0, dim**0.5 / 4) if full else CLIP_SCALE  # a norm over D directions
    mean_loc, mean_tril = torch.zeros_like(loc), torch.zeros_like(tril)
    elbo, count = torch.zeros_like(loc[:, 0]), torch.zeros_like(loc[:, 0])
    tail = max(1, num_steps // 4)
    for step in range(num_steps):
        late = max(0.0, 2 * step / num_steps - 1)
        rho = RHO * (RHO_END / RHO) ** late
        e = torch.randn(num_starts, half, dim, generator=generator, dtype=loc.dtype, device=loc.device)
        e = torch.cat([e, -e], 1)
        z = loc.unsqueeze(1) + (e @ tril.mT if full else e * tril.unsqueeze(1))
        log_p, grad = target.value_and_grad(z.reshape(-1, dim))
        log_p, grad = log_p.view(e.shape[:2]), grad.view(e.shape)
        fine = (torch.isfinite(log_p) & torch.isfinite(grad).all(-1)).all(-1)
        # Only where every particle is finite is there a step; elsewhere the Gaussian shrinks towards its centre.
        grad = torch.where(fine.view(-1, 1, 1), grad, 0.0)
        pull = (grad @ tril if full else grad * tril.unsqueeze(1)) + e
        move = rho * pull.mean(1)
        length = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
        move = move * (CLIP_LOC * dim**0.5 / length.clamp_min(1e-12)).clamp_max(1.0)
        centred = pull - pull.mean(1, keepdim=True)
        if full:
            bend = torch.tril(centred.mT @ e) / e.shape[1]
            bend = bend - 0.5 * torch.diag_embed(bend.diagonal(dim1=-2, dim2=-1))
            length = torch.linalg.matrix_norm(rho * bend).view(-1, 1, 1)
        else:
            bend = 0.5 * (centred * e).mean(1)
            length = (rho * bend).abs().amax(-1, keepdim=True)
        bend = rho * bend * (clip_scale / length.clamp_min(1e-12)).clamp_max(1.0)
        step_loc = (tril @ move.unsqueeze(-1)).squeeze(-1) if full else tril * move
        step_tril = tril @ bend if full else tril * bend
        loc = torch.where(fine.unsqueeze(-1), loc + step_loc, loc)
        shape = (-1, 1, 1) if full else (-1, 1)
        tril = torch.where(fine.view(shape), tril + step_tril, 0.7 * tril)
        if step >= num_steps - tail:
            mean_loc += loc / tail
            mean_tril += tril / tail
            diagonal = tril.diagonal(dim1=-2, dim2=-1) if full else tril
            entropy = diagonal.abs().log().sum(-1) + 0.5 * dim * (1 + math.log(2 * math.pi))
            elbo += torch.where(fine, log_p.mean(1) + entropy, 0.0)
            count += fine
        if bar is not None:
            bar.update(1)
    return mean_loc, mean_tril, elbo / count  # NaN for a start that was never finite


def _agree(loc: Tensor, tril: Tensor, elbos: Tensor, best: int) -> bool:
    """Whether every start within 3 nats of the best is at its place, by the best one's own scale."""
    near = elbos > elbos[best] - 3
    offset = loc[near] - loc[best]
    if tril.dim() == 3:
        offset = torch.linalg.solve_triangular(tril[best], offset.mT, upper=False).mT
    else:
        offset = offset / tril[best]
    return bool((torch.linalg.vector_norm(offset, dim=-1) < 1 + 0.5 * loc.shape[-1] ** 0.5).all())
