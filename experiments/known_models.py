"""Posteriors of small hierarchical models whose moments are known, and the list of all families by number.

Given one scale everything else is Gaussian, so that the moments are one-dimensional integrals: done on a fine grid
of the log scale, by the laws of total expectation and variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from experiments.known_targets import DIMS, LOG_2PI, SHAPES, KnownTarget, Random, needle, normal_log_prob

__all__ = ["FAMILIES", "NEEDLES", "make"]

GRID = torch.linspace(-40.0, 12.0, 40_001, dtype=torch.float64)
"""Log scales. Priors flat at zero leave exp(u) towards the left: 1e-17 at the end."""


NEEDLES = 100_000
"""The number of the first target with a mode that next to no direction leads to."""


def make(index: int, seed: int = 0) -> KnownTarget:
    """The target of a number: families in turn, so that each has odd and even numbers; the rest is random.

    Args:
        index: 0, 1, ...; from `NEEDLES` on needles.
        seed: of a whole list of targets.
    """
    random = Random(1_000_003 * seed + index)
    if index >= NEEDLES:
        return needle(random)
    names = list(FAMILIES)
    return FAMILIES[names[index % len(names)]](random, random.choice(DIMS))


def hierarchical(random: Random, dim: int) -> KnownTarget:
    """Normal means with an unknown spread: y_j ~ N(theta_j, sigma_j), theta_j ~ N(mu, tau), z = (mu, log tau, ...).

    The last coordinates are theta_j (centered: a funnel) or (theta_j - mu) / tau (non-centered). Judged: mu, log tau
    and theta_j.
    """
    num = max(2, dim - 2)
    centered, heavy_tau = random.choice((True, False)), random.choice((True, False))
    prior_mu, prior_tau = 5.0, random.choice((1.0, 2.5, 5.0))
    sigma = torch.exp(random.uniforms(num, -0.7, 1.5))
    tau = random.log_uniform(0.1, 5.0)
    y = random.uniform(-3.0, 3.0) + tau * random.normal(num) + sigma * random.normal(num)

    def log_prior_tau(u: Tensor) -> Tensor:
        """Of u = log tau: half-Cauchy or half-normal."""
        ratio = torch.exp(2 * (u - math.log(prior_tau)))
        tail = -torch.log1p(ratio) - math.log(math.pi / 2) if heavy_tau else -0.5 * ratio + 0.5 * math.log(2 / math.pi)
        return tail + u - math.log(prior_tau)

    # y given u and mu is N(mu, s_j), s_j^2 = tau^2 + sigma_j^2: mu given u, its evidence, and theta given both
    precision = 1 / (torch.exp(2 * GRID)[:, None] + sigma.square())
    mu_precision = precision.sum(1) + prior_mu**-2
    mu_mean = (precision @ y) / mu_precision
    quadratic = precision @ y.square() - mu_precision * mu_mean.square()
    log_evidence = 0.5 * (precision.log().sum(1) - num * LOG_2PI - quadratic - (mu_precision * prior_mu**2).log())
    share = sigma.square() * precision  # of mu in theta's mean; the rest is y's
    theta_mean = share * mu_mean[:, None] + (1 - share) * y
    theta_variance = sigma.square() * (1 - share) + share.square() / mu_precision[:, None]
    weight, log_total = _weights(log_evidence + log_prior_tau(GRID))
    mean, std = _total(
        weight,
        torch.cat([mu_mean[:, None], GRID[:, None], theta_mean], 1),
        torch.cat([1 / mu_precision[:, None], torch.zeros_like(GRID)[:, None], theta_variance], 1),
    )

    def effects(z: Tensor) -> Tensor:
        return z[:, 2:] if centered else z[:, :1] + z[:, 1:2].exp() * z[:, 2:]

    def log_prob(z: Tensor) -> Tensor:
        mu, u = z[:, :1], z[:, 1:2]
        prior = normal_log_prob(z[:, 2:], mu, u.exp()) if centered else normal_log_prob(z[:, 2:])
        top = normal_log_prob(mu[:, 0], 0.0, prior_mu) + log_prior_tau(u[:, 0])
        likelihood = normal_log_prob(effects(z), y.to(z), sigma.to(z))
        return top + (prior + likelihood).sum(-1) - log_total

    words = f"{num} normal means, {'' if centered else 'non-'}centered, tau ~ "
    words += f"{'HalfCauchy' if heavy_tau else 'HalfNormal'}({prior_tau:g})"
    judged = lambda z: torch.cat([z[:, :2], effects(z)], 1)  # noqa: E731
    return KnownTarget("hierarchical", words, num + 2, log_prob, mean, std, "quadrature", judged)


def horseshoe(random: Random, dim: int) -> KnownTarget:
    """Sparse normal means: y_j ~ N(theta_j, 1), theta_j ~ N(0, t lambda_j), lambda_j ~ HalfCauchy(1).

    z holds theta_j (or theta_j / (t lambda_j)), then log lambda_j. Judged: theta_j and log lambda_j.
    """
    num = max(1, dim // 2)
    centered, t = random.choice((True, False)), random.log_uniform(0.1, 1.0)
    signal = torch.where(random.uniforms(num, 0.0, 1.0) < 0.3, random.uniforms(num, 2.0, 6.0), 0.0)
    y = signal + random.normal(num)

    prior_variance = t**2 * torch.exp(2 * GRID)[:, None]
    shrink = prior_variance / (1 + prior_variance)
    log_evidence = normal_log_prob(y, 0.0, (1 + prior_variance).sqrt())
    weight, log_total = _weights(log_evidence + _log_half_cauchy(GRID)[:, None])
    theta_mean, theta_std = _total(weight, shrink * y, shrink.expand(-1, num))
    u_mean, u_std = _total(weight, GRID[:, None].expand(-1, num), torch.zeros(len(GRID), num).double())
    constant = log_total.sum().item()

    def effects(z: Tensor) -> Tensor:
        return z[:, :num] if centered else t * z[:, num:].exp() * z[:, :num]

    def log_prob(z: Tensor) -> Tensor:
        u = z[:, num:]
        prior = normal_log_prob(z[:, :num], 0.0, t * u.exp()) if centered else normal_log_prob(z[:, :num])
        return (prior + normal_log_prob(effects(z), y.to(z)) + _log_half_cauchy(u)).sum(-1) - constant

    words = f"{num} horseshoe means, {'' if centered else 'non-'}centered, t = {t:.2g}"
    mean, std = torch.cat([theta_mean, u_mean]), torch.cat([theta_std, u_std])
    judged = lambda z: torch.cat([effects(z), z[:, num:]], 1)  # noqa: E731
    return KnownTarget("horseshoe", words, 2 * num, log_prob, mean, std, "quadrature", judged)


def regression(random: Random, dim: int) -> KnownTarget:
    """A linear regression with few data, b flat and p(sigma) ~ 1 / sigma: z = (b, log sigma), by formula.

    With n - p = 2 a and the residual sum of squares 2 r: b is a multivariate t, 1 / sigma^2 ~ Gamma(a, r).
    """
    p = max(1, dim - 1)
    freedom = random.choice((5, 8, 20, 100))
    n = p + freedom
    x = random.normal(n, p) @ (torch.eye(p).double() + random.uniform(0.0, 1.0) * random.normal(p, p))
    x = x * torch.exp(random.uniforms(p, -1.0, 1.0))
    y = x @ random.normal(p) + random.log_uniform(0.2, 3.0) * random.normal(n)
    gram = x.mT @ x
    b_mean = torch.linalg.solve(gram, x.mT @ y)
    root = torch.linalg.cholesky(gram)
    rest = (y - x @ b_mean).square().sum().item()
    a, r = torch.tensor(freedom / 2, dtype=torch.float64), rest / 2
    b_variance = torch.linalg.inv(gram).diagonal() * rest / (freedom - 2)
    mean = torch.cat([b_mean, -0.5 * (a.digamma() - math.log(r)).reshape(1)])
    std = torch.cat([b_variance.sqrt(), 0.5 * torch.polygamma(1, a).sqrt().reshape(1)])
    constant = (math.log(2) + a * math.log(r) - a.lgamma() + root.diagonal().log().sum() - 0.5 * p * LOG_2PI).item()

    def log_prob(z: Tensor) -> Tensor:
        b, u = z[:, :p], z[:, p]
        squares = ((b - b_mean.to(z)) @ root.to(z)).square().sum(-1) + rest
        return -n * u - 0.5 * squares * torch.exp(-2 * u) + constant

    words = f"regression, {p} coefficients, {n} data"
    return KnownTarget("regression", words, p + 1, log_prob, mean, std)


FAMILIES: Mapping[str, Callable[[Random, int], KnownTarget]] = {
    **SHAPES,
    "hierarchical": hierarchical,
    "horseshoe": horseshoe,
    "regression": regression,
}


def _log_half_cauchy(u: Tensor) -> Tensor:
    """The density of the log of a HalfCauchy(1)."""
    return math.log(2 / math.pi) + u - torch.nn.functional.softplus(2 * u)


def _weights(log_density: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized weights of the grid's points along axis 0, and the log of the integral."""
    log_total = torch.logsumexp(log_density, 0)
    return torch.exp(log_density - log_total), log_total + math.log(GRID[1] - GRID[0])


def _total(weight: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of a mixture over the grid: weight (G,) or (G, M), conditional means and variances (G, M)."""
    weight = weight[:, None] if weight.dim() == 1 else weight
    mean = (weight * means).sum(0)
    return mean, (weight * (variances + (means - mean).square())).sum(0).sqrt()
