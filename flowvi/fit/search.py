r"""A search for modes that no start of the whitening found: scouts from far away climb log p.

Whitening begins near the origin of z, where a model's own scales say little about a second mode. A Gaussian that it
found gives scales: in x = L^-1 (z - mu) the known mode is a ball of radius one, or sqrt(D). Scouts set out

- from x = r u with u uniform on the sphere and r from twice to hundreds of times sqrt(D). From there gradients lead to
  different modes in different directions: of modes of one shape each has its cone, however high D is;
- from where symmetries would put a copy: a coordinate of z, or all of z, with the other sign, and known modes
  mirrored in the best one or carried on, a + (a - b);
- from chains at a temperature, which walk into narrow modes (`flowvi.fit.tempering`);
- from where log p stands out in a scan of very many places (`flowvi.fit.scan`).

Each climbs by gradient steps whose length adapts. What ended at a known mode, or on a slope that leads to one, is
dropped; a few that are left become Gaussians by natural gradients, and those with evidence are found. So is a narrow
mode inside a wide one, where the highest place of all is far above the wide one's centre.
A narrow mode outside, in many dimensions, stays unseen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowvi.fit.modes import MIN_SHARE, near
from flowvi.fit.paths import paths, straight
from flowvi.fit.scan import stand_out
from flowvi.fit.tempering import MAX_DIM, MAX_SCOUTS, wander
from flowvi.fit.whiten import Start, ascend
from flowvi.objectives import Target
from flowvi.progress import Bar, counting
from flowvi.targets import LogDensity

__all__ = ["NUM_SCOUTS", "elsewhere", "search"]

NUM_SCOUTS = 64
RADII = (2.0, 8.0, 32.0, 128.0)
"""How far out scouts begin, times sqrt(D) sds."""

NUM_GUESSES = 24
"""The scouts of a round that may begin at guesses by symmetry."""

CLIMB_STEPS, HALVINGS = 48, 6
ROUNDS, MAX_NEW = 3, 8
LAG, LAG_PER_DIM = 20.0, 1.5
"""A scout so many nats below the best known mode did not arrive; a wide mode is low, by log 4 for each dimension."""

PATH_DIP = 1.0
"""The dip in log p on the best path to a known mode, in nats, that a mode of its own has at least."""

NUM_STEPS, NUM_PARTICLES = 80, 32

ABOVE, NARROW = 2.0, 0.2
"""A top near a known mode's centre, and so many nats above it, is tried by a Gaussian so much narrower."""


@torch.no_grad()
def search(known: Sequence[Start], target: Target, generator: torch.Generator) -> tuple[Start, ...]:
    """Modes beside the known ones.

    Args:
        known: Gaussians of the modes that are known, the best first; at least one.
        target: log p and its gradient.
        generator: where the randomness comes from.

    Returns:
        Gaussians elsewhere whose ELBO is at least about 1e-3 of the best in evidence; often none.
    """
    with counting("look for further modes") as bar:
        for reach in range(len(RADII), 0, -1):
            try:
                return _search(known, target, generator, RADII[:reach], bar)
            except ValueError:  # the target refuses what overflows far out, as torch's distributions do: stay nearer
                continue
    return ()


@torch.no_grad()
def elsewhere(z: Tensor, elbo: float, target: Target, generator: torch.Generator) -> tuple[Start, ...]:
    """Modes beside draws of q, by one Gaussian of them, for a fit that was not whitened.

    The Gaussian with the draws' mean and covariance (their sds above D = 200) stands for what is known: where q has
    several modes, they may be among those that are found.

    Args:
        z: draws of q, (S, D).
        elbo: of q.
        target: log p and its gradient.
        generator: where the randomness comes from.

    Returns:
        As `search`; none where the draws have no spread.
    """
    usable = z[z.isfinite().all(-1)]
    dim, centre = z.shape[1], usable.mean(0)
    if dim <= 200:
        covariance = torch.cov(usable.T.double()).reshape(dim, dim)
        root, info = torch.linalg.cholesky_ex(covariance)
        root = (root if int(info) == 0 else covariance.diagonal().clamp_min(0).sqrt()).to(z)
    else:
        root = usable.std(0)
    if not bool((root.diagonal() if root.dim() == 2 else root).gt(0).all()):
        return ()
    return search([Start(centre, root, elbo)], target, generator)


def _search(
    known: Sequence[Start], target: Target, generator: torch.Generator, radii: Sequence[float], bar: Bar
) -> tuple[Start, ...]:
    found: list[Start] = []
    warm = _warm(known, target, generator, len(radii))
    for number in range(ROUNDS):
        modes = [*known, *found]
        new, place, height = _round(modes, target, generator, radii, warm, bar)
        warm = warm[:0]
        found += new
        told = number == 0 and not getattr(target, "subsampled", False)  # a minibatch's log p says little of heights
        if told and not (new and bool(near(new, place[None]).any())):
            found += _inside(known[0], place, height, target, generator, bar)
        if not new:
            break
    return tuple(found)


def _inside(
    known: Start, place: Tensor, height: float, target: Target, generator: torch.Generator, bar: Bar
) -> list[Start]:
    """A narrow mode in a wide one's bulk: no valley is between them, but a Gaussian that begins narrow stays there.

    In many dimensions the narrow one's top may be tens of nats higher, and no draw of the wide one comes near it.
    """
    centre = float(torch.nan_to_num(target.value_and_grad(known.loc[None])[0], nan=-math.inf))
    if not (height > centre + ABOVE and bool(near([known], place[None]).all())):
        return []
    loc, tril, elbo = ascend(
        target, place[None], NARROW * known.scale_tril[None], NUM_STEPS, NUM_PARTICLES, generator, bar
    )
    start = Start(loc[0], tril[0], float(elbo))
    return [start] if start.elbo > known.elbo + math.log(MIN_SHARE) else []


def _warm(known: Sequence[Start], target: Target, generator: torch.Generator, num_temperatures: int) -> Tensor:
    """Scouts by heat and from a scan, each none or a fixed number: each number of particles has a graph of its own."""
    none = known[0].loc.new_empty(0, len(known[0].loc))
    if none.shape[1] > MAX_DIM or getattr(target, "path", "") == "eager" or getattr(target, "subsampled", False):
        return none
    num_data = getattr(target, "num_data", 0)
    try:
        found = wander(known, target, generator, num_data=num_data, num_temperatures=num_temperatures)
        if len(found):
            found = found[torch.arange(MAX_SCOUTS, device=found.device) % len(found)]
        if isinstance(target, LogDensity):
            found = torch.cat([found, stand_out(known[0], target, generator, num_data).to(found)])
    except ValueError:  # the other scouts may stay where it doesn't refuse
        return none
    return found


def _round(
    modes: Sequence[Start],
    target: Target,
    generator: torch.Generator,
    radii: Sequence[float],
    warm: Tensor,
    bar: Bar,
) -> tuple[list[Start], Tensor, float]:
    """New modes, the highest place that was reached (D,), and its log p."""
    best = modes[0]
    root = best.scale_tril
    guesses = _guesses(modes)[:NUM_GUESSES]
    far = _far(NUM_SCOUTS - len(guesses), len(best.loc), generator, radii).to(root)
    z = torch.cat([best.place(far), *(g.unsqueeze(0) for g in guesses), warm])
    z, log_p = _climb(z, best.loc, root, target, bar)
    top = z[log_p.argmax()], float(log_p.max())
    at_modes, _ = target.value_and_grad(torch.stack([m.loc for m in modes]))
    low = torch.nan_to_num(at_modes, nan=-math.inf).max() - LAG - LAG_PER_DIM * len(best.loc)
    places = z[log_p > low]
    places = places[~near(modes, places).any(1)]
    if len(places):
        places = places[~straight(places, [m.loc for m in modes], target)]
    chosen: list[Start] = []
    for place in places:
        scout = Start(place, best.scale_tril, 0.0)
        if len(chosen) < MAX_NEW and not (chosen and bool(near(chosen, place[None]).any())):
            chosen.append(scout)
    if not chosen:
        return [], *top
    loc, tril = torch.stack([c.loc for c in chosen]), torch.stack([c.scale_tril for c in chosen])
    loc, tril, elbo = ascend(target, loc, 0.5 * tril, NUM_STEPS, NUM_PARTICLES, generator, bar)
    least = max(m.elbo for m in modes) + math.log(MIN_SHARE)
    ended = [Start(m, t, e) for m, t, e in zip(loc, tril, elbo.tolist(), strict=True) if e > least]
    new: list[Start] = []
    for start in sorted(ended, key=lambda s: -s.elbo):
        others = [*modes, *new]
        apart = not bool(near(others, start.loc[None]).any())
        if apart and not any(paths([(start, other) for other in others], target, PATH_DIP)):
            new.append(start)
    return new, *top


def _far(num: int, dim: int, generator: torch.Generator, radii: Sequence[float]) -> Tensor:
    """Points (num, D) far out, in opposite pairs along random frames."""
    rows: list[Tensor] = []
    while 2 * len(rows) < num:
        size = (dim, min(dim, num))
        frame = torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)
        rows += torch.linalg.qr(frame)[0].mT
    directions = torch.stack(rows[: -(-num // 2)])
    directions = torch.stack([directions, -directions], 1).reshape(-1, dim)[:num]
    lengths = torch.tensor(radii, dtype=torch.float64, device=generator.device)
    which = torch.arange(num, device=generator.device) // 2 % len(radii)
    return dim**0.5 * lengths[which].unsqueeze(1) * directions


def _guesses(modes: Sequence[Start]) -> list[Tensor]:
    """Where symmetries would put further modes, the likeliest first."""
    best = modes[0]
    sd = best.scale_tril.norm(dim=1) if best.scale_tril.dim() == 2 else best.scale_tril.abs()
    guesses: list[Tensor] = []
    for a in modes[1:]:
        guesses += [2 * best.loc - a.loc, 2 * a.loc - best.loc]
    off = best.loc.abs() / sd
    if bool((off > 2).any()):
        guesses.append(-best.loc)
    for i in off.argsort(descending=True).tolist():
        if off[i] > 2:
            flipped = best.loc.clone()
            flipped[i] = -flipped[i]
            guesses.append(flipped)
    return guesses


def _climb(z: Tensor, loc: Tensor, root: Tensor, target: Target, bar: Bar) -> tuple[Tensor, Tensor]:
    """Gradient steps uphill in the whitened coordinates, each scout with a step length of its own."""

    def at(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad = target.value_and_grad(z)
        pull = (grad @ root) @ root.mT if root.dim() == 2 else grad * root.square()  # the gradient in x, as a move of z
        return torch.where(grad.isfinite().all(-1), torch.nan_to_num(log_p, nan=-math.inf), -math.inf), pull

    log_p, pull = at(z)
    for _ in range(HALVINGS):  # nearer to the known mode, until it is finite
        bad = ~log_p.isfinite()
        if not bool(bad.any()):
            break
        z = torch.where(bad[:, None], 0.5 * (z + loc), z)
        log_p, pull = at(z)
    step = torch.full_like(log_p, 0.1)
    for _ in range(CLIMB_STEPS):
        new = z + step[:, None] * pull
        new_log_p, new_pull = at(new)
        better = new_log_p > log_p
        z, pull = torch.where(better[:, None], new, z), torch.where(better[:, None], new_pull, pull)
        log_p = torch.where(better, new_log_p, log_p)
        step = torch.where(better, 1.5 * step, 0.3 * step)
        bar.update()
    return z, log_p
