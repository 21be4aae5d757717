"""What lies beyond the draws of q: a look along ridges that it doesn't follow to their end.

Where a posterior is a thin curved ridge, q may cover its middle and end too early. Neither its draws nor an HMC in its
coordinates know of the rest: there the ridge's ends are infinitely far. All that tells are a few large importance
weights, of the draws nearest the ends, and those alone don't say whether much is missing. So chains set out from there,
in plain coordinates and with long trajectories. Around what they visit Gaussians are laid, each with the covariance of
the points nearby, and draws of these and of q together, weighted by

    w(z) = p(z) / (q(z) / 2 + m(z) / 2),    m the mixture of those Gaussians,

say what means and sds are (importance sampling with a deterministic mixture: Owen & Zhou 2000, "Safe and effective
importance sampling", JASA 95). However the chains walked, that is right wherever q or m are; what neither reaches stays
unseen.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flowvi.columns import columns
from flowvi.errors import NonFiniteError, OptionError
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.hmc import FlowCoordinates, HMCInfo, HMCState, Tuning, hmc_step
from flowvi.hmc_tuning import jitter, warm_up
from flowvi.progress import counting
from flowvi.short_run import finite_start
from flowvi.targets import LogDensity

__all__ = ["MAX_DIM", "beyond"]

MAX_DIM = 50
"""D above which a mixture of so many Gaussians is no proposal."""

NUM_CHAINS, NUM_STEPS, NUM_LEAPFROG = 64, 80, 64
WARM_UP_LEAPFROG = 32
NUM_GAUSSIANS = 512
NUM_DRAWS = 10_000  # of q at most, and as many of the Gaussians
CHUNK = 2**22  # numbers at a time
WIDER = 2.0  # times the variance of the points nearby
SURE = 1.0  # standard errors: the weights of q's own draws have called it in doubt already


@torch.no_grad()
def beyond(
    flow: Flow, density: LogDensity, z: Tensor, log_p: Tensor, log_q: Tensor, generator: torch.Generator
) -> tuple[float, str]:
    """How much a mean, in sds, or an sd, relative to itself, changes with what chains find beyond the draws of q.

    Args:
        flow: q.
        density: The target, of all data.
        z: Draws of q (S, D).
        log_p: Log p of these (S,).
        log_q: Log q of these (S,).
        generator: Where the randomness comes from.

    Returns:
        The largest change beyond a standard error, at least 0, and the column's name; 0 where nothing could be looked
        for, because q has no density of a given point.
    """
    fine = log_p.isfinite() & log_q.isfinite()
    z, log_p, log_q = z[fine].double(), log_p[fine].double(), log_q[fine].double()
    mean, sd = z.mean(0), z.std(0)
    starts = (z[(log_p - log_q).topk(min(NUM_CHAINS, len(z))).indices] - mean) / sd
    z, log_p, log_q = z[:NUM_DRAWS], log_p[:NUM_DRAWS], log_q[:NUM_DRAWS]
    try:
        points = _walk(density, mean, sd, starts, generator)
        around = _Gaussians(points, generator)
        e = around.draw(len(z), generator)
        new = mean + e * sd
        new_q = flow.log_prob(new.to(flow.dtype)).double()
    except (KeyError, NotImplementedError, NonFiniteError, OptionError):  # a foreign flow without an inverse; no start
        return 0.0, ""
    here = torch.cat([(z - mean) / sd, e])
    both = torch.logaddexp(torch.cat([log_q, new_q]), around.log_prob(here) - sd.log().sum())
    log_w = torch.cat([log_p, density(new.to(density.dtype)).double()]) - both
    weights = torch.softmax(log_w.nan_to_num(nan=-math.inf, posinf=-math.inf), 0)
    seen, name = columns(density, torch.cat([z, new]).to(density.dtype))
    change = _changes(seen.double(), len(z), weights)
    return float(change.max()), name(int(change.argmax()))


def _walk(density: LogDensity, mean: Tensor, sd: Tensor, starts: Tensor, generator: torch.Generator) -> Tensor:
    """Where chains come from these starts (C, D), all of it in sds from the mean: points (n, D)."""
    dim = len(mean)
    plain = Flow.from_spec(FlowSpec("planar", dim, 0, "diag"), loc=mean, scale=sd, dtype=mean.dtype, device=mean.device)
    target = FlowCoordinates(plain, density)
    state = finite_start(target, lambda: starts, len(starts))
    found = [state.position]
    with counting("look beyond the draws", 2 * NUM_STEPS) as bar:

        def keep(now: HMCState, _: HMCInfo) -> bool:
            found.append(now.position)
            bar.update()
            return False

        tuning = Tuning(0.1, 0.5, torch.ones_like(mean), WARM_UP_LEAPFROG)
        state, tuning = warm_up(state, target, tuning, NUM_STEPS, generator, on_step=keep)
        tuning = replace(tuning, max_leapfrog=NUM_LEAPFROG)
        for _, multiple in zip(range(NUM_STEPS), jitter(), strict=False):
            state, info = hmc_step(state, target, tuning, NUM_LEAPFROG * tuning.step_size * multiple, generator)
            keep(state, info)
    return torch.cat(found)


class _Gaussians:
    """An even mixture of Gaussians around some of the points (n, D), each as wide as those nearest it lie apart."""

    def __init__(self, points: Tensor, generator: torch.Generator) -> None:
        dim = points.shape[1]
        order = torch.randperm(len(points), generator=generator, device=points.device)
        distance = torch.cdist(points[order[:NUM_GAUSSIANS]], points)
        near = points[distance.topk(min(len(points), max(32, 4 * dim)), largest=False).indices]
        self.loc = near.mean(1)
        off = near - self.loc[:, None]
        covariance = WIDER * off.mT @ off / near.shape[1]
        least = 1e-12 + 1e-6 * covariance.diagonal(dim1=1, dim2=2).mean(1)  # of points that are few or all the same
        unit = torch.eye(dim).to(points)
        self.tril = torch.linalg.cholesky(covariance + least[:, None, None] * unit)
        self._inverse = torch.linalg.solve_triangular(self.tril, unit.expand_as(self.tril), upper=False)

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws (num, D)."""
        which = torch.randint(len(self.loc), (num,), generator=generator, device=self.loc.device)
        noise = torch.empty(num, self.loc.shape[1]).to(self.loc).normal_(generator=generator)
        return self.loc[which] + (self.tril[which] @ noise[..., None])[..., 0]

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density (S,) at x (S, D)."""
        num, dim = self.loc.shape
        rows = self._inverse.reshape(
            num * dim, dim
        )  # one product for all Gaussians: a solve of each is 20 times slower
        at = (self._inverse @ self.loc[..., None]).reshape(num, dim)
        height = -self.tril.diagonal(dim1=1, dim2=2).log().sum(1) - dim / 2 * math.log(2 * math.pi) - math.log(num)
        parts = x.split(max(1, CHUNK // (num * dim)))
        off = ((part @ rows.mT).view(len(part), num, dim) - at for part in parts)
        return torch.cat([torch.logsumexp(height - u.square().sum(-1) / 2, 1) for u in off])


def _changes(x: Tensor, num: int, weights: Tensor) -> Tensor:
    """How much means and sds of columns (n, C) differ from those of the first `num` rows, beyond the weights' noise."""
    mean, sd = x[:num].mean(0), x[:num].std(0)
    x = torch.where(sd > 1e-6 * mean.abs(), (x - mean) / sd, 0.0).nan_to_num(0.0, 0.0, 0.0)  # a constant does not move
    w = weights[:, None]
    shift, shift_noise = (w * x).sum(0), (w * x).square().sum(0).sqrt()
    variance = (w * (x - shift).square()).sum(0)
    noise = (w * ((x - shift).square() - variance)).square().sum(0).sqrt() / 2
    stretch = torch.where(variance > 0, (variance.sqrt() - 1).abs(), 0.0)
    return torch.maximum(shift.abs() - SURE * shift_noise, stretch - SURE * noise).clamp_min(0.0)
