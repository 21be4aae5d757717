r"""Modes: which of the whitening's starts found something of its own, and one flow for each of these.

The starts' Gaussians g_1, ..., g_R, equally mixed, are a proposal h that has been to every place where a start ended.
With draws z of h and w = p / h, what a Gaussian g is worth is the evidence that it accounts for, and what a set of
Gaussians leaves out is the evidence where p is well above them. A start at the place of another one, or one that did
not arrive anywhere, adds nothing and is dropped.

A flow is then fitted to each Gaussian that is left, as long as those before it leave something out: a flow often
grows over all of a curved posterior of which the starts found parts. The flows' weights maximize the evidence-weighted
log density, E_p[log sum_m pi_m q_m], by the fixed point pi_m = E_p[pi_m q_m / q].

Sources: Owen & Zhou (2000), "Safe and effective importance sampling" (the mixture of all as proposal); Cappe et al.
(2008), "Adaptive importance sampling in general mixture classes", arXiv:0710.4242 (the fixed point).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.fit.whiten import Start
from flowvi.flow import Flow
from flowvi.mixture import MixtureFlow
from flowvi.targets import LogDensity

__all__ = ["MixtureFit", "Mode", "distinct", "fit_mixture", "set_weights", "starts_evidence", "survey"]

NUM_DRAWS = 8192
MIN_SHARE = 1e-3
"""The share of the evidence below which a mode is left out."""

NEAR_SHARE = 0.1
"""The same for a place within reach of a better one: what a Gaussian leaves out there may be the tail of its mode."""

NEAR, NEAR_PER_ROOT_DIM = 3.0, 0.25
"""Means closer than NEAR + NEAR_PER_ROOT_DIM sqrt(D), in sds of both, are near."""

EXCESS = 2.0
"""Where log p is so many nats above a fit, the fit leaves p out."""

FIXED_POINT_STEPS = 500


@dataclass(frozen=True)
class Mode(Start):
    """A Gaussian that accounts for something of its own.

    Attributes:
        log_evidence: of its place, by importance sampling, or its ELBO where that is larger.
        share: of the evidence of all modes.
        starts: how many starts ended there.
    """

    log_evidence: float
    share: float
    starts: int


class _Gaussians:
    """R Gaussians at once, in float64."""

    def __init__(self, starts: Sequence[Start]) -> None:
        self.loc = torch.stack([s.loc for s in starts]).double()
        self.tril = torch.stack([s.scale_tril for s in starts]).double()
        self.full = self.tril.dim() == 3
        self.num, self.dim = self.loc.shape
        diagonal = self.tril.diagonal(dim1=-2, dim2=-1) if self.full else self.tril
        self.log_scale = diagonal.abs().log().sum(-1)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """As many draws of each, `num` or a few more in all, (S, D)."""
        each = -(-num // self.num)
        shape = (self.num, each, self.dim)
        e = torch.randn(shape, generator=generator, dtype=torch.float64, device=self.loc.device)
        z = e @ self.tril.mT if self.full else e.mul_(self.tril.unsqueeze(1))
        return z.add_(self.loc.unsqueeze(1)).reshape(-1, self.dim)

    def squares(self, z: Tensor) -> Tensor:
        """|L_r^-1 (z - mu_r)|^2, (S, R), for some rows and one Gaussian at a time: (S, R, D) may be gigabytes."""
        return torch.cat([self._squares(part) for part in z.split(1024)])

    def _squares(self, z: Tensor) -> Tensor:
        columns = []
        for loc, tril in zip(self.loc, self.tril, strict=True):
            e = z.double() - loc
            e = torch.linalg.solve_triangular(tril, e.mT, upper=False).mT if self.full else e / tril
            columns.append(e.square().sum(-1))
        return torch.stack(columns, 1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log g_r(z), (S, R)."""
        return -0.5 * self.squares(z) - self.log_scale - 0.5 * self.dim * math.log(2 * math.pi)

    def distance(self, i: int, j: int) -> float:
        """Between two means, in sds of the mean of both covariances."""
        offset = self.loc[i] - self.loc[j]
        if not self.full:
            return float((offset / (self.tril[[i, j]].square().mean(0)).sqrt()).norm())
        covariance = (self.tril[[i, j]] @ self.tril[[i, j]].mT).mean(0)
        tril = torch.linalg.cholesky(covariance)
        return float(torch.linalg.solve_triangular(tril, offset[:, None], upper=False).norm())


def near(modes: Sequence[Start], z: Tensor) -> Tensor:
    """Whether points (S, D) are near each mode, in its own sds: (S, R), bool."""
    gaussians = _Gaussians(modes)
    return gaussians.squares(z).sqrt() <= NEAR + NEAR_PER_ROOT_DIM * gaussians.dim**0.5


def _usable(starts: Sequence[Start]) -> list[Start]:
    """Those that ended somewhere, the best first."""
    fine = [
        s
        for s in starts
        if math.isfinite(s.elbo) and bool(s.loc.isfinite().all()) and bool(s.scale_tril.isfinite().all())
    ]
    return sorted(fine, key=lambda s: -s.elbo)


@torch.no_grad()
def _log_p(density: LogDensity, z: Tensor) -> Tensor:
    """Log p in float64, -inf where it is not finite."""
    log_p = torch.cat([density.full(part) for part in z.split(1024)]).double()
    return torch.where(log_p.isfinite(), log_p, -math.inf)


class _Draws(NamedTuple):
    """Draws of the equal mixture of all usable starts, and their densities."""

    usable: list[Start]
    gaussians: _Gaussians
    log_g: Tensor
    """log g of each Gaussian at each draw (S, R)."""
    log_p: Tensor
    log_w: Tensor
    """log p minus the log density of the mixture (S,)."""


@torch.no_grad()
def _draw(starts: Sequence[Start], density: LogDensity, generator: torch.Generator, num: int) -> _Draws | None:
    """None where no start ended anywhere."""
    usable = _usable(starts)
    if not usable:
        return None
    gaussians = _Gaussians(usable)
    z = gaussians.sample(num, generator)
    log_g, log_p = gaussians.log_prob(z), _log_p(density, z)
    return _Draws(usable, gaussians, log_g, log_p, log_p - torch.logsumexp(log_g, 1) + math.log(len(usable)))


def survey(
    starts: Sequence[Start], density: LogDensity, generator: torch.Generator, num: int = NUM_DRAWS
) -> tuple[tuple[float, float], tuple[Mode, ...]]:
    """`starts_evidence` and `distinct` from the same draws."""
    draws = _draw(starts, density, generator, num)
    return _evidence(draws), _distinct(draws, MIN_SHARE)


def starts_evidence(
    starts: Sequence[Start], density: LogDensity, generator: torch.Generator, num: int = NUM_DRAWS
) -> tuple[float, float]:
    """The log evidence, by importance sampling from the equal mixture of the starts' Gaussians.

    It has been where any start ended, and so it sees modes that a fit to one of them does not. Where the posterior is
    far from Gaussian its standard error is large, and too small.

    Args:
        starts: where the starts ended; those without a finite ELBO are left out.
        density: log p.
        generator: where the randomness comes from.
        num: draws in all.

    Returns:
        The log evidence and its standard error; (-inf, inf) where nothing was finite.
    """
    return _evidence(_draw(starts, density, generator, num))


def _evidence(draws: _Draws | None) -> tuple[float, float]:
    top = -math.inf if draws is None else float(draws.log_w.max())
    if draws is None or not math.isfinite(top):
        return -math.inf, math.inf
    # the draws are stratified: only the spread within each Gaussian's draws is noise
    size = len(draws.usable)
    w = (draws.log_w - top).exp().view(size, -1)
    variance = w.var(1).sum() / (w.shape[1] * size**2)
    return top + math.log(float(w.mean())), float(variance.sqrt() / w.mean())


def distinct(
    starts: Sequence[Start],
    density: LogDensity,
    generator: torch.Generator,
    *,
    num: int = NUM_DRAWS,
    min_share: float = MIN_SHARE,
) -> tuple[Mode, ...]:
    """The starts that found something of their own, the largest share of the evidence first.

    From the best ELBO downwards a start is kept where the ones kept before leave out at least `min_share` of the
    evidence at its place. Near a better one it takes more (10%), or the tails of one mode would count as modes.

    Args:
        starts: where the starts ended, such as ``Gaussian.starts``, with the polished Gaussian in front.
        density: log p.
        generator: where the randomness comes from.
        num: draws to weigh them by.
        min_share: of the evidence, below which a place is left out.

    Returns:
        At least one, if any start has a finite ELBO; else none.
    """
    return _distinct(_draw(starts, density, generator, num), min_share)


def _distinct(draws: _Draws | None, min_share: float) -> tuple[Mode, ...]:
    if draws is None:
        return ()
    usable, gaussians, log_g, log_p, log_w = draws
    elbo = torch.tensor([s.elbo for s in usable], dtype=torch.float64)
    weights = torch.softmax(log_w, 0) if bool(log_w.isfinite().any()) else torch.full_like(log_w, 1 / len(log_w))
    log_z = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    radius = NEAR + NEAR_PER_ROOT_DIM * gaussians.dim**0.5
    kept, count = [0], [1]
    for i in range(1, len(usable)):
        away = [gaussians.distance(i, k) for k in kept]
        nearest = min(range(len(kept)), key=away.__getitem__)
        best = log_g[:, kept].amax(1) - math.log(len(kept))
        # in hundreds of dimensions the weights are a few draws, and the ELBO tells more
        share = float(torch.softmax(elbo[[*kept, i]], 0)[-1]) if away[nearest] > radius else 0.0
        share = max(share, float(weights[_missed(log_p - log_z, log_g[:, i], best)].sum()))
        if share > (min_share if away[nearest] > radius else NEAR_SHARE):
            kept.append(i)
            count.append(1)
        else:
            count[nearest] += away[nearest] <= radius
    own = log_g[:, kept] - torch.logsumexp(log_g[:, kept], 1, keepdim=True)
    evidence = log_z + torch.logsumexp(weights.log().unsqueeze(1) + own, 0)
    evidence = torch.maximum(evidence, elbo[kept])
    shares = torch.softmax(evidence, 0)
    modes = [
        Mode(usable[k].loc, usable[k].scale_tril, usable[k].elbo, float(evidence[m]), float(shares[m]), count[m])
        for m, k in enumerate(kept)
    ]
    return tuple(sorted((m for m in modes if m.share > min_share), key=lambda m: -m.share))


@dataclass(frozen=True)
class MixtureFit:
    """What `fit_mixture` made.

    Attributes:
        flow: the mixture, or the one flow that is enough.
        modes: of each component, in the order of its weights.
        weights: of the components (M,), by evidence; (1,) where one flow is enough.
        skipped: modes that the flows of others had covered already, or whose weight came out below the limit.
    """

    flow: Flow
    modes: tuple[Mode, ...]
    weights: Tensor
    skipped: tuple[Mode, ...]


@torch.no_grad()
def fit_mixture(
    density: LogDensity,
    modes: Sequence[Mode],
    fit_one: Callable[[Mode], Flow],
    generator: torch.Generator,
    *,
    groups: Sequence[Sequence[int]] = (),
    num: int = 2 * NUM_DRAWS,
    min_weight: float = MIN_SHARE,
) -> MixtureFit:
    """One flow for each mode that those before it leave out, weighted by evidence.

    Args:
        density: log p.
        modes: as `distinct` found them; the largest first.
        fit_one: fits a flow that starts at a mode's Gaussian. What it raises is raised.
        generator: where the randomness comes from.
        groups: modes that hang together, as `flowvi.fit.paths.connected` finds them. One flow is meant to cover such a
            group: another one is only fitted where it leaves out a tenth of the evidence.
        num: draws behind the weights.
        min_weight: below which a component is dropped.

    Returns:
        The mixture.
    """
    flows: list[Flow] = []
    fitted: list[Mode] = []
    skipped: list[Mode] = []
    for i, mode in enumerate(modes):
        together = [modes[j] for group in groups if i in group for j in group if j < i]
        least = NEAR_SHARE if any(other is m for other in together for m in fitted) else _threshold(fitted, mode)
        if flows and _left_out(density, flows, mode, generator, num // 2) < least:
            skipped.append(mode)
            continue
        with torch.enable_grad():
            flows.append(fit_one(mode))
        fitted.append(mode)
    if len(flows) == 1:
        return MixtureFit(flows[0], tuple(fitted), torch.ones(1, dtype=torch.float64), tuple(skipped))
    mixture = MixtureFlow(flows, torch.zeros(len(flows)))
    weights = set_weights(mixture, density, generator, num=num)
    keep = [m for m in range(len(flows)) if weights[m] > min_weight]
    if len(keep) < len(flows):
        skipped += [fitted[m] for m in range(len(flows)) if m not in keep]
        mixture = MixtureFlow([flows[m] for m in keep], weights[keep].log())
        if len(keep) > 1:
            set_weights(mixture, density, generator, num=num)
    flow = mixture if len(keep) > 1 else mixture.flows[0]
    return MixtureFit(flow, tuple(fitted[m] for m in keep), mixture.weights.clone(), tuple(skipped))


@torch.no_grad()
def set_weights(mixture: MixtureFlow, density: LogDensity, generator: torch.Generator, *, num: int) -> Tensor:
    """Sets a mixture's weights by evidence: the fixed point pi_m = E_p[pi_m q_m / q].

    Two rounds of draws: the first from equal weights, so that no component is missed; the second from the weights
    that the first found, which is where precision is needed.

    Args:
        mixture: its weights are changed.
        density: log p.
        generator: where the randomness comes from.
        num: draws of each round.

    Returns:
        The weights (M,).
    """
    size = len(mixture.flows)
    even = torch.full((size,), -math.log(size), dtype=torch.float64)
    log_pi = even
    for proposal in (even, None):
        if proposal is None:  # no component is left without draws
            proposal = torch.logaddexp(log_pi + math.log(0.8), even + math.log(0.2))
        mixture.set_weights_(proposal)
        z, log_q = mixture.rsample_and_log_prob(num, generator=generator)
        log_w = _log_p(density, z) - log_q.double()
        if not bool(log_w.isfinite().any()):
            break
        each = torch.nan_to_num(mixture.component_log_probs(z).double(), nan=-math.inf)
        w = torch.softmax(torch.where(log_w.isfinite(), log_w, -math.inf), 0)
        log_pi = _fixed_point(each[w > 0], w[w > 0], log_pi)
    mixture.set_weights_(log_pi)
    return mixture.weights.clone()


def _fixed_point(each: Tensor, w: Tensor, log_pi: Tensor) -> Tensor:
    """Log weights that maximize sum_s w_s log sum_m pi_m q_m(z_s), concave in pi; `each` is log q_m(z_s)."""
    for _ in range(FIXED_POINT_STEPS):
        share = torch.softmax(each + log_pi, 1)
        new = (w @ share).clamp_min(1e-12).log()
        if float((new.exp() - log_pi.exp()).abs().max()) < 1e-6:
            return new
        log_pi = new
    return log_pi


def _missed(log_p: Tensor, log_g: Tensor, log_q: Tensor) -> Tensor:
    """Where a Gaussian g explains the normalized p and a fit q, which is well below p, does not (S,)."""
    return (log_p > log_q + EXCESS) & (log_p < log_g + EXCESS)


def _left_out(density: LogDensity, flows: Sequence[Flow], mode: Mode, generator: torch.Generator, num: int) -> float:
    """The share of the evidence at a mode's place where p is well above all of the flows."""
    gaussian = _Gaussians([mode])
    there = gaussian.sample(num, generator)
    drawn = [flow.rsample_and_log_prob(num, generator=generator)[0] for flow in flows]
    z = torch.cat([there.to(flows[0].dtype), *drawn])
    log_q = torch.stack([torch.nan_to_num(f.log_prob(z).double(), nan=-math.inf) for f in flows], 1)
    log_g = gaussian.log_prob(z)
    log_p = _log_p(density, z)
    # p is compared with the flows at the weights that suit it, the Gaussian being one of them
    parts = torch.cat([log_q, log_g], 1)
    log_w = log_p - torch.logsumexp(parts, 1) + math.log(parts.shape[1])
    if not bool(log_w.isfinite().any()):
        return 0.0
    w = torch.softmax(log_w, 0)
    log_pi = _fixed_point(parts, w, torch.full((parts.shape[1],), -math.log(parts.shape[1]), dtype=torch.float64))
    log_z = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    best = torch.logsumexp(log_q + log_pi[:-1] - torch.logsumexp(log_pi[:-1], 0), 1)
    return float(w[_missed(log_p - log_z, log_g[:, 0], best)].sum())


def _threshold(fitted: Sequence[Mode], mode: Mode) -> float:
    """The share that a mode must add: more where a fitted one is near."""
    if not fitted:
        return MIN_SHARE
    gaussians = _Gaussians([*fitted, mode])
    radius = NEAR + NEAR_PER_ROOT_DIM * gaussians.dim**0.5
    near = min(gaussians.distance(i, len(fitted)) for i in range(len(fitted))) <= radius
    return NEAR_SHARE if near else MIN_SHARE
