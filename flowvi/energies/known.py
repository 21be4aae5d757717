"""Targets with a known log Z in any dimension: what a method must be able to do, one difficulty each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import as_tensor, is_count, is_number, shown
from ..errors import DimensionError, OptionError
from .base import SQRT_2PI, Box, Energy, check


@dataclass(frozen=True)
class Funnel(Energy):
    """U(v, x) = v^2 / (2 s^2) + (D - 1) v / 2 + exp(-v) |x|^2 / 2, so v ~ N(0, s^2), x_i | v ~ N(0, e^v).

    Neal's funnel: v = z[0] sets the scale of all others. Below v = -80 the exponential is held, so that no
    float overflows; with the default scale the mass there is below 1e-150.

    Source: Neal 2003, "Slice sampling", section 8.

    Args:
        dim: D >= 1.
        scale: s, the standard deviation of v; Neal's is 3.
    """

    dim: int = 10
    scale: float = 3.0

    def __post_init__(self) -> None:
        check(self, scale=self.scale)

    def _energy(self, z: Tensor) -> Tensor:
        v, x = z[..., 0], z[..., 1:]
        scaled = x * torch.exp(-0.5 * v.clamp_min(-80))[..., None]
        return 0.5 * ((v / self.scale).square() + (self.dim - 1) * v + scaled.square().sum(-1))

    def log_density_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """-U(z) (S,) and its gradient (S, D), by hand: a training step asks for nothing else, thousands of times.

        Args:
            z: (S, D).
        """
        v, x = z[:, 0], z[:, 1:]
        held = v.clamp_min(-80)
        precision = torch.exp(-held)
        half = 0.5 * precision * torch.linalg.vector_norm(x, dim=-1).square()
        value = -0.5 * ((v / self.scale).square() + (self.dim - 1) * v) - half
        grad = z * -precision.unsqueeze(-1)
        grad[:, 0] = -v / self.scale**2 - 0.5 * (self.dim - 1) + torch.where(v > -80, half, 0.0)
        return value, grad

    @property
    def log_normalizer(self) -> float:
        """Log Z, exact."""
        return math.log(self.scale) + self.dim * math.log(SQRT_2PI)

    def mean(self) -> Tensor:
        """Zero, by symmetry, (D,)."""
        return torch.zeros(self.dim, dtype=torch.float64)

    def std(self) -> Tensor:
        """The scale s for v, exp(s^2 / 4) for the others, (D,)."""
        std = torch.full((self.dim,), math.exp(self.scale**2 / 4), dtype=torch.float64)
        std[0] = self.scale
        return std

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        z = torch.randn(num, self.dim, **options)
        v = self.scale * z[:, :1]
        return torch.cat([v, z[:, 1:] * torch.exp(0.5 * v)], dim=-1)


@dataclass(frozen=True)
class Banana(Energy):
    """U(z) = ((z1/s)^2 + (z2 + c (z1^2 - s^2))^2 + |z3..zD|^2) / 2: a normal, bent along a parabola.

    The bend (z1, y2) -> (z1, y2 - c (z1^2 - s^2)) keeps volumes, so log Z is that of the normal.

    Source: Haario, Saksman & Tamminen 1999, "Adaptive proposal distribution for random walk Metropolis
    algorithm" (s = 10; c = .03 is their moderate, c = .1 their strong bend).

    Args:
        dim: D >= 2.
        scale: s, the standard deviation of z1.
        curvature: c.
    """

    dim: int = 2
    scale: float = 10.0
    curvature: float = 0.03

    def __post_init__(self) -> None:
        check(self, at_least=2, scale=self.scale)
        if not is_number(self.curvature):
            raise OptionError(f"Banana needs a finite curvature, got {shown(self.curvature)}")

    def _bend(self, z1: Tensor) -> Tensor:
        return self.curvature * (z1.square() - self.scale**2)

    def _energy(self, z: Tensor) -> Tensor:
        z1, z2, rest = z[..., 0], z[..., 1], z[..., 2:]
        return 0.5 * ((z1 / self.scale).square() + (z2 + self._bend(z1)).square() + rest.square().sum(-1))

    @property
    def log_normalizer(self) -> float:
        """Log Z, exact."""
        return math.log(self.scale) + self.dim * math.log(SQRT_2PI)

    @property
    def box(self) -> Box:
        """Seven sd in z1, and all of the bend that z1 then reaches."""
        far = 7 * self.scale
        ends = (-self.curvature * (far**2 - self.scale**2), self.curvature * self.scale**2)
        return ((-far, far), (min(ends) - 7, max(ends) + 7))

    def mean(self) -> Tensor:
        """Zero, (D,)."""
        return torch.zeros(self.dim, dtype=torch.float64)

    def std(self) -> Tensor:
        """The scale s, then sqrt(1 + 2 c^2 s^4), then ones, (D,)."""
        std = torch.ones(self.dim, dtype=torch.float64)
        std[0], std[1] = self.scale, math.sqrt(1 + 2 * self.curvature**2 * self.scale**4)
        return std

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        z = torch.randn(num, self.dim, **options)
        z[:, 0] *= self.scale
        z[:, 1] -= self._bend(z[:, 0])
        return z


@dataclass(frozen=True)
class RingOfGaussians(Energy):
    """U(z) = -ln sum_k exp(-|z - c_k|^2 / (2 s^2)), c_k at the angles 2 pi k / K on a circle of radius r.

    Equal modes, well apart; the circle lies in the first two coordinates, the others are N(0, s^2).

    Source: the ring of 8 Gaussians of Metz et al. 2017, "Unrolled generative adversarial networks".

    Args:
        num_modes: K >= 1.
        radius: r.
        scale: s, the standard deviation of each mode.
        dim: D >= 2.
    """

    num_modes: int = 8
    radius: float = 4.0
    scale: float = 0.5
    dim: int = 2

    def __post_init__(self) -> None:
        check(self, at_least=2, radius=self.radius, scale=self.scale)
        if not is_count(self.num_modes):
            raise OptionError(f"RingOfGaussians needs num_modes >= 1, got {shown(self.num_modes)}")

    def centres(self, like: Tensor | None = None) -> Tensor:
        """The centres in the first two coordinates, (K, 2), with like's dtype and device (float64, CPU)."""
        like = torch.empty((), dtype=torch.float64) if like is None else like
        angles = torch.arange(self.num_modes, dtype=like.dtype, device=like.device)
        angles = angles * (2 * math.pi / self.num_modes)
        return self.radius * torch.stack([angles.cos(), angles.sin()], dim=-1)

    def _energy(self, z: Tensor) -> Tensor:
        apart = ((z[..., None, :2] - self.centres(z)) / self.scale).square().sum(-1)
        rest = (z[..., 2:] / self.scale).square().sum(-1)
        return 0.5 * rest - torch.logsumexp(-0.5 * apart, dim=-1)

    @property
    def log_normalizer(self) -> float:
        """Log Z, exact."""
        return math.log(self.num_modes) + self.dim * math.log(self.scale * SQRT_2PI)

    def mean(self) -> Tensor:
        """The mean of the centres, zero for K >= 2, (D,)."""
        mean = torch.zeros(self.dim, dtype=torch.float64)
        mean[:2] = self.centres().mean(0)
        return mean

    def std(self) -> Tensor:
        """The spread of the centres and of a mode, sqrt(s^2 + r^2 / 2) for K >= 3; then s, (D,)."""
        variance = torch.full((self.dim,), self.scale**2, dtype=torch.float64)
        variance[:2] += self.centres().var(0, correction=0)
        return variance.sqrt()

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        z = self.scale * torch.randn(num, self.dim, **options)
        # The remainder guards against a product that rounds up to K.
        mode = (torch.rand(num, **options) * self.num_modes).long() % self.num_modes
        z[:, :2] += self.centres(z)[mode]
        return z


@dataclass(frozen=True, eq=False)
class CorrelatedGaussian(Energy):
    """U(z) = z' S^-1 z / 2, with S_ij = rho^|i - j| or a covariance S of your own.

    Source: the textbook; rho^|i - j| is the stationary covariance of an AR(1) process.

    Args:
        dim: D >= 1.
        rho: Correlation of neighbours, -1 < rho < 1; not used where a covariance is given.
        covariance: S, (D, D), symmetric positive definite.

    Raises:
        DimensionError: The covariance is not (D, D).
        OptionError: |rho| >= 1, or a covariance that is not symmetric positive definite.
    """

    dim: int = 2
    rho: float = 0.9
    covariance: Tensor | None = None
    _factor: Tensor = field(init=False, repr=False)
    _whiten: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check(self)
        if self.covariance is None:
            if not (is_number(self.rho) and -1 < self.rho < 1):
                raise OptionError(f"CorrelatedGaussian needs -1 < rho < 1, got {shown(self.rho)}")
            steps = torch.arange(self.dim, dtype=torch.float64)
            covariance = torch.as_tensor(self.rho, dtype=torch.float64) ** (steps[:, None] - steps).abs()
        else:
            covariance = as_tensor("covariance", self.covariance, torch.float64, "cpu").detach()
            if covariance.shape != (self.dim, self.dim):
                raise DimensionError(
                    f"CorrelatedGaussian with dim={self.dim} needs a covariance of shape "
                    f"({self.dim}, {self.dim}), got {tuple(covariance.shape)}"
                )
        factor, info = torch.linalg.cholesky_ex(covariance)
        if info.item() != 0 or not factor.isfinite().all() or not torch.allclose(covariance, covariance.T):
            raise OptionError("CorrelatedGaussian needs a symmetric positive definite covariance")
        whiten = torch.linalg.solve_triangular(factor, torch.eye(self.dim, dtype=torch.float64), upper=False)
        # A frozen dataclass is set once, here.
        object.__setattr__(self, "_factor", factor)
        object.__setattr__(self, "_whiten", whiten)

    def _energy(self, z: Tensor) -> Tensor:
        return 0.5 * (z @ self._whiten.to(z).T).square().sum(-1)

    @property
    def log_normalizer(self) -> float:
        """Log Z, exact."""
        return self._factor.diagonal().log().sum().item() + self.dim * math.log(SQRT_2PI)

    def mean(self) -> Tensor:
        """Zero, (D,)."""
        return torch.zeros(self.dim, dtype=torch.float64)

    def std(self) -> Tensor:
        """The square root of S's diagonal, (D,)."""
        return self._factor.square().sum(-1).sqrt()

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        z = torch.randn(num, self.dim, **options)
        return z @ self._factor.to(z).T


@dataclass(frozen=True)
class StudentT(Energy):
    """U(z) = (df + 1)/2 sum_i ln(1 + z_i^2 / df): independent Student-t coordinates, heavy tails in each.

    Draws by Bailey's polar method, exact for any df: z = cos(2 pi a) sqrt(df (b^(-2/df) - 1)).

    Source: Bailey 1994, "Polar generation of random variates with the t-distribution".

    Args:
        dim: D >= 1.
        df: Degrees of freedom > 0; 1 is the Cauchy distribution.
    """

    dim: int = 2
    df: float = 4.0

    def __post_init__(self) -> None:
        check(self, df=self.df)

    def _energy(self, z: Tensor) -> Tensor:
        return 0.5 * (self.df + 1) * torch.log1p(z.square() / self.df).sum(-1)

    @property
    def log_normalizer(self) -> float:
        """Log Z, exact."""
        one = math.lgamma(self.df / 2) - math.lgamma((self.df + 1) / 2) + 0.5 * math.log(self.df * math.pi)
        return self.dim * one

    def mean(self) -> Tensor:
        """Zero for df > 1, else NaN, (D,)."""
        return torch.full((self.dim,), 0.0 if self.df > 1 else math.nan, dtype=torch.float64)

    def std(self) -> Tensor:
        """The root of df / (df - 2) for df > 2, infinite for 1 < df <= 2, else NaN, (D,)."""
        if self.df > 2:
            return torch.full((self.dim,), math.sqrt(self.df / (self.df - 2)), dtype=torch.float64)
        return torch.full((self.dim,), math.inf if self.df > 1 else math.nan, dtype=torch.float64)

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        angle = torch.rand(num, self.dim, **options)
        # 1 - rand lies in (0, 1]: its power is finite.
        b = 1 - torch.rand(num, self.dim, **options)
        return torch.cos(2 * math.pi * angle) * (self.df * torch.expm1(b.log() * (-2 / self.df))).sqrt()
