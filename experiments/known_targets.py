"""Targets with known moments, drawn by number: what a verdict is judged against.

A target is a normalized log density on R^D with the exact mean and sd of M judged quantities. Most families are
made from a canonical x with known mean and covariance C, moved by z = m + A x: then z has mean m + A E[x] and
covariance A C A^T, whatever the rotation, and the judged quantities are z's coordinates. Where a user would look at
something else (a positive site, the effects behind a non-centered parametrization) they are that.

Every moment is exact: a formula, or quadrature over one variable given which everything else is Gaussian.
The hierarchical families are in `experiments.known_models`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from scipy.special import betainc
from torch import Tensor

__all__ = ["DIMS", "LOG_2PI", "Canonical", "KnownTarget", "Random", "moved", "needle"]

DIMS = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
LOG_2PI = math.log(2 * math.pi)

PLACES, FEW = 2**20, 10
"""A mode is a needle where fewer of so many random directions from another mode's centre lead to it."""

T = TypeVar("T")


def coordinates(z: Tensor) -> Tensor:
    """What is judged where nothing else is said: z itself."""
    return z


@dataclass(frozen=True)
class KnownTarget:
    """A log density with known moments.

    Attributes:
        family: what kind of shape it has.
        name: what it is, with its numbers.
        dim: D.
        log_prob: z (S, D) -> log p (S,), normalized, in z's dtype.
        mean: of the judged quantities (M,), float64.
        std: of the judged quantities (M,), float64.
        source: "formula" or "quadrature".
        judged: z (n, D) -> the judged quantities (n, M).
        model: a Pyro model of this density whose only site, x, is the judged quantities; None where z itself is judged,
            or something that a user would work out of it.
    """

    family: str
    name: str
    dim: int
    log_prob: Callable[[Tensor], Tensor]
    mean: Tensor
    std: Tensor
    source: str = "formula"
    judged: Callable[[Tensor], Tensor] = coordinates
    model: Callable[[], None] | None = None

    @property
    def fitted(self) -> dict[str, Any]:
        """The arguments of `flowvi.fit`: the model, else the log density."""
        return {"target": self.log_prob, "dim": self.dim} if self.model is None else {"target": self.model}

    def seen(self, draws: Mapping[str, Tensor]) -> Tensor:
        """The judged quantities (n, M) in a posterior's draws, float64."""
        return self.judged(draws["z"].double()) if self.model is None else draws["x"].double()

    def errors(self, x: Tensor) -> tuple[float, float]:
        """The worst error of a mean, in true sds, and the worst relative error of an sd.

        Args:
            x: Draws of the judged quantities (n, M).
        """
        worst_mean = ((x.mean(0) - self.mean).abs() / self.std).max().item()
        worst_std = (x.std(0) / self.std - 1).abs().max().item()
        return worst_mean, worst_std


class Random:
    """The few draws that the families need, all in float64 and from a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        """A number between low and high."""
        return self.uniforms(1, low, high).item()

    def log_uniform(self, low: float, high: float) -> float:
        """A positive number whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(torch.randint(len(options), (), generator=self._generator))]

    def uniforms(self, num: int, low: float, high: float) -> Tensor:
        """Numbers between low and high (num,)."""
        return low + (high - low) * torch.rand(num, generator=self._generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of this shape."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def rotation(self, dim: int) -> Tensor:
        """A random orthogonal matrix (dim, dim)."""
        return torch.linalg.qr(self.normal(dim, dim))[0]


@dataclass(frozen=True)
class Canonical:
    """x before it is moved.

    Attributes:
        name: what it is, with its numbers.
        log_prob: x (S, D) -> normalized log density (S,).
        mean: of x (D,), float64.
        covariance: of x (D, D), float64.
    """

    name: str
    log_prob: Callable[[Tensor], Tensor]
    mean: Tensor
    covariance: Tensor


def moved(family: str, x: Canonical, loc: Tensor, matrix: Tensor) -> KnownTarget:
    """The target of z = loc + matrix x.

    Args:
        family: its family.
        x: what is moved.
        loc: (D,), float64.
        matrix: (D, D), float64, invertible.
    """
    inverse, log_det = torch.linalg.inv(matrix), torch.linalg.slogdet(matrix).logabsdet.item()

    def log_prob(z: Tensor) -> Tensor:
        return x.log_prob((z - loc.to(z)) @ inverse.mT.to(z)) - log_det

    std = (matrix @ x.covariance @ matrix.mT).diagonal().sqrt()
    return KnownTarget(family, x.name, len(loc), log_prob, loc + matrix @ x.mean, std)


def anywhere(family: str, x: Canonical, random: Random) -> KnownTarget:
    """Somewhere in space: x shifted, and either scaled coordinate by coordinate or scaled and rotated."""
    dim = len(x.mean)
    scales = torch.exp(random.uniforms(dim, -1.5, 1.5)) * random.log_uniform(0.3, 3.0)
    loc = random.uniforms(dim, -3.0, 3.0)
    rotate = random.choice((False, True))
    return moved(family, x, loc, scales.diag() @ random.rotation(dim) if rotate else scales.diag())


def normal_log_prob(x: Tensor, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    """Elementwise log N(x; loc, scale)."""
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return -0.5 * ((x - loc) / scale).square() - log_scale - 0.5 * LOG_2PI


# The families. Each takes its randomness and D, and says in its name what it became.


def gaussian(random: Random, dim: int) -> KnownTarget:
    """A Gaussian whose largest sd is up to 3,000 times the smallest, rotated."""
    log_condition = random.uniform(0.0, math.log(3000.0))
    scales = torch.exp(torch.linspace(-0.5, 0.5, dim, dtype=torch.float64) * log_condition)
    x = Canonical(
        f"Gaussian, condition {math.exp(log_condition):.0f}",
        lambda x: normal_log_prob(x).sum(-1),
        torch.zeros(dim, dtype=torch.float64),
        torch.eye(dim, dtype=torch.float64),
    )
    matrix = random.rotation(dim) @ scales.diag() * random.log_uniform(0.3, 3.0)
    return moved("gaussian", x, random.uniforms(dim, -3.0, 3.0), matrix)


def funnel(random: Random, dim: int) -> KnownTarget:
    """A scale v ~ N(0, s), x_i ~ N(0, exp(v / 2)): Var(x_i) = exp(s^2 / 2).

    At s = 3 (Neal 2003) the x_i have no moments that draws could find (kurtosis 24,000): there asinh(x_i) is judged,
    by quadrature.
    """
    neal = random.uniform(0.0, 1.0) < 0.3
    s = 3.0 if neal else random.uniform(0.5, 1.6)

    def log_prob(x: Tensor) -> Tensor:
        v, rest = x[:, 0], x[:, 1:]
        conditional = -0.5 * (rest.square() * torch.exp(-v)[:, None] + v[:, None] + LOG_2PI)
        return normal_log_prob(v, 0.0, s) + conditional.sum(-1)

    variances = torch.full((dim,), math.exp(s**2 / 2), dtype=torch.float64)
    variances[0] = s**2
    zero = torch.zeros(dim, dtype=torch.float64)
    x = Canonical(f"funnel, s = {s:.2g}", log_prob, zero, variances.diag())
    if not neal:
        return anywhere("funnel", x, random)
    nodes = torch.linspace(-9.0, 9.0, 2001, dtype=torch.float64)
    weights = torch.exp(normal_log_prob(nodes))
    weights = weights / weights.sum()
    square = torch.asinh(torch.exp(s * nodes / 2)[:, None] * nodes).square()
    std = torch.full((dim,), (weights @ square @ weights).sqrt().item(), dtype=torch.float64)
    std[0] = s

    def judged(z: Tensor) -> Tensor:
        return torch.cat([z[:, :1], z[:, 1:].asinh()], 1)

    return KnownTarget("funnel", f"Neal's funnel, s = {s:g}", dim, log_prob, zero, std, "quadrature", judged)


def banana(random: Random, dim: int) -> KnownTarget:
    """Pairs x1 ~ N(0, 1), x2 = r y + b (x1^2 - 1), y ~ N(0, 1): Var(x2) = r^2 + 2 b^2, no covariance."""
    bend, noise = random.log_uniform(0.2, 3.0), random.log_uniform(0.2, 1.5)
    pairs = random.choice((1, max(1, dim // 2)))

    def log_prob(x: Tensor) -> Tensor:
        first, second, rest = x[:, :pairs], x[:, pairs : 2 * pairs], x[:, 2 * pairs :]
        conditional = normal_log_prob(second, bend * (first.square() - 1), noise)
        return (normal_log_prob(first) + conditional).sum(-1) + normal_log_prob(rest).sum(-1)

    variances = torch.ones(dim, dtype=torch.float64)
    variances[pairs : 2 * pairs] = noise**2 + 2 * bend**2
    words = f"{pairs} banana{'s' if pairs > 1 else ''}, bend {bend:.2g}, noise {noise:.2g}"
    return anywhere("banana", Canonical(words, log_prob, torch.zeros(dim).double(), variances.diag()), random)


def skewed(random: Random, dim: int) -> KnownTarget:
    """Independent skewed coordinates: log of a Gamma(a), skew normal, or normal plus exponential."""
    kind = random.choice(("log-gamma", "skew normal", "normal plus exponential"))
    if kind == "log-gamma":
        shape = torch.exp(random.uniforms(dim, math.log(0.3), math.log(4.0)))
        mean, variance = shape.digamma(), torch.polygamma(1, shape)

        def log_prob(x: Tensor) -> Tensor:
            a = shape.to(x)
            return (a * x - x.exp() - a.lgamma()).sum(-1)

    elif kind == "skew normal":
        slant = random.uniforms(dim, -6.0, 6.0)
        delta = slant / (1 + slant.square()).sqrt()
        mean, variance = delta * math.sqrt(2 / math.pi), 1 - 2 * delta.square() / math.pi

        def log_prob(x: Tensor) -> Tensor:
            return (normal_log_prob(x) + math.log(2) + torch.special.log_ndtr(slant.to(x) * x)).sum(-1)

    else:
        rate = torch.exp(random.uniforms(dim, math.log(0.3), math.log(3.0)))
        mean, variance = 1 / rate, 1 + 1 / rate.square()

        def log_prob(x: Tensor) -> Tensor:
            k = rate.to(x)
            return (k.log() + k.square() / 2 - k * x + torch.special.log_ndtr(x - k)).sum(-1)

    return anywhere("skewed", Canonical(kind, log_prob, mean, variance.diag()), random)


def heavy(random: Random, dim: int) -> KnownTarget:
    """Student's t with nu from 3 to 30: one multivariate, or independent coordinates. Var = nu / (nu - 2)."""
    nu = float(random.choice((3, 4, 5, 7, 10, 15, 30)))
    joint = random.choice((True, False))
    size = dim if joint else 1
    constant = math.lgamma((nu + size) / 2) - math.lgamma(nu / 2) - 0.5 * size * math.log(nu * math.pi)

    def log_prob(x: Tensor) -> Tensor:
        squares = x.square().sum(-1, keepdim=True) if joint else x.square()
        return (constant - 0.5 * (nu + size) * torch.log1p(squares / nu)).sum(-1)

    words = f"{'multivariate' if joint else 'independent'} t, nu = {nu:g}"
    covariance = torch.eye(dim, dtype=torch.float64) * nu / (nu - 2)
    return anywhere("heavy", Canonical(words, log_prob, torch.zeros(dim).double(), covariance), random)


def mixture(words: str, weights: Tensor, locs: Tensor, scales: Tensor) -> Canonical:
    """Spherical Gaussians: weights (K,), locs (K, D), scales (K,)."""
    dim = locs.shape[1]

    def log_prob(x: Tensor) -> Tensor:
        each = normal_log_prob(x[:, None], locs.to(x), scales[:, None].to(x)).sum(-1)
        return torch.logsumexp(each + weights.log().to(x), -1)

    mean = weights @ locs
    spread = locs - mean
    within = (weights @ scales.square()) * torch.eye(dim, dtype=torch.float64)
    return Canonical(words, log_prob, mean, within + (weights[:, None] * spread).mT @ spread)


def two_modes(random: Random, dim: int) -> KnownTarget:
    """Two Gaussians, near or far, of equal or unequal weight and width, neither of which is a needle to the other."""
    while True:
        first = random.choice((0.5, 0.5, 0.7, 0.8, 0.9, 0.97))
        apart, width = random.choice((2.0, 3.0, 4.0, 6.0, 10.0, 16.0)), random.choice((1.0, 1.0, 0.5, 2.0))
        if not is_needle(dim, first, apart, width):
            return _two_modes("two modes", random, dim, first, apart, width)


def needle(random: Random) -> KnownTarget:
    """Two Gaussians, the second narrower and where fewer than 10 of 2^20 random directions from the first one lead."""
    while True:
        dim, first = random.choice((20, 30, 50)), random.choice((0.5, 0.5, 0.7, 0.8, 0.9, 0.97))
        apart = random.choice((4.0, 6.0, 10.0, 16.0))
        if is_needle(dim, first, apart, 0.5):
            return _two_modes("needle", random, dim, first, apart, 0.5)


def _two_modes(family: str, random: Random, dim: int, first: float, apart: float, width: float) -> KnownTarget:
    """N(0, I) with the first weight, and a Gaussian of the other width so far away in a random direction; moved."""
    weights = torch.tensor([first, 1 - first], dtype=torch.float64)
    direction = random.normal(dim)
    locs = torch.stack([torch.zeros(dim).double(), apart * direction / direction.norm()])
    scales = torch.tensor([1.0, width], dtype=torch.float64)
    words = f"two modes {apart:g} apart, weights {first:g}, {1 - first:.2g}, widths 1, {width:g}"
    return anywhere(family, mixture(words, weights, locs, scales), random)


def is_needle(dim: int, first: float, apart: float, width: float) -> bool:
    """Whether fewer than 10 of 2^20 random directions from the wider of two modes lead to the other."""
    odds = (1 - first) / first if width < 1 else first / (1 - first)  # of the narrower against the wider
    return PLACES * directions_to(dim, apart / max(1.0, width), odds, 1 / width if width < 1 else width) < FEW


def directions_to(dim: int, apart: float, odds: float, ratio: float) -> float:
    r"""The share of the directions from a Gaussian's centre in which log p ever tells of a second, narrower one.

    With x in sds of the wider one, a = ratio^2 and c the narrower one's centre, its density is the larger of the two
    where H = D log ratio + log odds > a |x - c|^2 / 2 - |x|^2 / 2. At an angle t from c the right-hand side is least at
    |x| = a |c| cos t / (a - 1), and then the inequality says cos^2 t > (a - 1) / a (1 - 2 H / (a |c|^2)). The share is
    that of a spherical cap.

    Args:
        dim: D.
        apart: |c|.
        odds: of the narrower one's weight against the wider one's.
        ratio: the wider one's sd over the narrower one's, at least 1.
    """
    a, height = ratio**2, dim * math.log(ratio) + math.log(odds)
    least = (a - 1) / a * (1 - 2 * height / (a * apart**2))
    if least <= 0:
        return 0.5
    return 0.5 * float(betainc((dim - 1) / 2, 0.5, 1 - least)) if least < 1 else 0.0


def eight_modes(random: Random, dim: int) -> KnownTarget:
    """Eight Gaussians at random places, equal or of random weight."""
    spread, equal = random.choice((1.0, 2.0, 4.0)), random.choice((True, False))
    weights = torch.full((8,), 1 / 8, dtype=torch.float64) if equal else random.normal(8).softmax(0)
    words = f"eight modes, spread {spread:g}, {'equal' if equal else 'random'} weights"
    return anywhere(
        "eight modes", mixture(words, weights, spread * random.normal(8, dim), torch.ones(8).double()), random
    )


def positive(random: Random, dim: int) -> KnownTarget:
    """Positive and unit-interval quantities on the log and logit scale: a model, judged as its user sees them."""
    kind = random.choice(("correlated log-normal", "gamma", "beta"))
    judged: Callable[[Tensor], Tensor] = torch.exp
    prior: dist.TorchDistribution
    if kind == "correlated log-normal":
        s, rho = random.uniform(0.2, 1.0), random.uniform(0.0, 0.95)
        correlation = torch.full((dim, dim), rho, dtype=torch.float64) + (1 - rho) * torch.eye(dim).double()
        loc = random.uniforms(dim, -2.0, 2.0)
        unit = Canonical(kind, lambda x: normal_log_prob(x).sum(-1), torch.zeros(dim).double(), torch.eye(dim).double())
        factor = s * torch.linalg.cholesky(correlation)
        log_prob = moved("positive", unit, loc, factor).log_prob
        mean = torch.exp(loc + s**2 / 2)
        std = mean * math.sqrt(math.expm1(s**2))
        words = f"{kind}, s = {s:.2g}, correlation {rho:.2g}"
        normal = dist.MultivariateNormal(loc.float(), scale_tril=factor.float())
        prior = dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()])
    elif kind == "gamma":
        shape = torch.exp(random.uniforms(dim, math.log(0.3), math.log(10.0)))
        rate = torch.exp(random.uniforms(dim, -2.0, 2.0))
        mean, std, words = shape / rate, shape.sqrt() / rate, "gamma on the log scale"
        prior = dist.Gamma(shape.float(), rate.float()).to_event(1)

        def log_prob(z: Tensor) -> Tensor:
            a, b = shape.to(z), rate.to(z)
            return (a * (z + b.log()) - b * z.exp() - a.lgamma()).sum(-1)

    else:
        a, b = (torch.exp(random.uniforms(dim, math.log(0.5), math.log(20.0))) for _ in range(2))
        mean, words, judged = a / (a + b), "beta on the logit scale", torch.sigmoid
        std = (a * b / (a + b + 1)).sqrt() / (a + b)
        prior = dist.Beta(a.float(), b.float()).to_event(1)

        def log_prob(z: Tensor) -> Tensor:
            log_beta = (a.lgamma() + b.lgamma() - (a + b).lgamma()).to(z)
            softplus = torch.nn.functional.softplus
            return (-a.to(z) * softplus(-z) - b.to(z) * softplus(z) - log_beta).sum(-1)

    def model() -> None:
        pyro.sample("x", prior)

    return KnownTarget("positive", words, dim, log_prob, mean, std, judged=judged, model=model)


SHAPES: Mapping[str, Callable[[Random, int], KnownTarget]] = {
    "gaussian": gaussian,
    "funnel": funnel,
    "banana": banana,
    "skewed": skewed,
    "heavy": heavy,
    "two modes": two_modes,
    "eight modes": eight_modes,
    "positive": positive,
}
