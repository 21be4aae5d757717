"""The four energies of Rezende & Mohamed 2015 (arXiv:1505.05770), table 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ..kernels import dispatch
from .base import SQRT_2PI, Box, Energy, Grid, check


@dataclass(frozen=True)
class _Plane(Energy):
    """What U1 to U4 share: two dimensions, the soft wall, and moments by quadrature."""

    wall: bool | float = True
    dim = 2
    softness = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.wall, bool):
            check(self, wall=self.wall)

    @property
    def wall_at(self) -> float | None:
        """The |z1| where the soft wall begins; None without one."""
        if isinstance(self.wall, bool):
            return 4.0 if self.wall else None
        return float(self.wall)

    def _wall_energy(self, z1: Tensor) -> Tensor | float:
        at = self.wall_at
        return 0.0 if at is None else 0.5 * ((z1.abs() - at).clamp_min(0) / self.softness).square()

    def _wall_force(self, z1: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The wall's energy, and minus its derivative."""
        at = self.wall_at
        if at is None:
            return 0.0, 0.0
        over = (z1 - z1.clamp(-at, at)) / self.softness
        return 0.5 * over * over, over / -self.softness

    def log_density_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """-U(z) (S,) and its gradient (S, D), by hand: a training step asks for nothing else, thousands of times.

        Args:
            z: (S, 2).
        """
        raise NotImplementedError

    def _compiled(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same by one compiled loop, where there is one for this device and dtype: a tenth of the time."""
        module = dispatch.compiled("energies", z) if type(self) in (U1, U2, U3, U4) else None
        if module is None:
            return None
        z = z.detach().contiguous()
        value, grad = z.new_empty(len(z)), torch.empty_like(z)
        at = math.inf if self.wall_at is None else self.wall_at
        loop = module.make(type(self).__name__, value.numpy().dtype.type)
        loop(z.numpy(), at, self.softness, value.numpy(), grad.numpy())
        return value, grad

    @property
    def box(self) -> Box:
        """Two units beyond the wall in z1, and all of the mass in z2."""
        side = 6.0 if self.wall_at is None else self.wall_at + 2
        return ((-side, side), (-6.0, 6.0))

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        grid = Grid.gauss(self.box)
        p = ((-self.energy(grid.z) - self.log_normalizer).exp() * grid.weights)[..., None]
        mean = (p * grid.z).sum((0, 1))
        return mean, (p * (grid.z - mean).square()).sum((0, 1)).sqrt()

    def mean(self) -> Tensor:
        """E[z], (2,), float64, by quadrature."""
        return self._moments[0].clone()

    def std(self) -> Tensor:
        """The standard deviation of each coordinate, (2,), float64, by quadrature."""
        return self._moments[1].clone()


@dataclass(frozen=True)
class U1(_Plane):
    """U1(z) = ((|z| - 2)/.4)^2 / 2 - ln(exp(-((z1 - 2)/.6)^2 / 2) + exp(-((z1 + 2)/.6)^2 / 2)).

    Two modes on a ring of radius 2, each with half of the mass. It has a finite normalizer on the whole
    plane, so there is no wall unless asked for. log Z by quadrature (1.8775); draws by exact rejection.

    Source: Rezende & Mohamed 2015, table 1.

    Args:
        wall: True adds the soft wall of `U2` at |z1| = 4, a number puts it there.

    Example:
        >>> round(U1().log_normalizer, 4)
        1.8775
    """

    wall: bool | float = False

    def _ring_energy(self, z: Tensor) -> Tensor:
        # vector_norm, unlike sqrt or hypot, has the gradient 0 at z = 0, where |z| has its cusp.
        return 0.5 * ((torch.linalg.vector_norm(z, dim=-1) - 2) / 0.4).square()

    def _energy(self, z: Tensor) -> Tensor:
        z1 = z[..., 0]
        modes = torch.logaddexp(-0.5 * ((z1 - 2) / 0.6).square(), -0.5 * ((z1 + 2) / 0.6).square())
        return self._ring_energy(z) - modes + self._wall_energy(z1)

    def log_density_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Plane`. With v = 2 z1 / .36, the log of the two modes' sum is -(z1^2 + 4) / .72 + log(2 cosh v)."""
        if (found := self._compiled(z)) is not None:
            return found
        z1 = z[:, 0]
        r = torch.linalg.vector_norm(z, dim=-1)
        off = (r - 2) / 0.4
        v = z1 * (2 / 0.36)
        size = v.abs()
        wall, force = self._wall_force(z1)
        log_cosh = size + torch.log1p(torch.exp(-2 * size))  # log(2 cosh v)
        value = log_cosh - 0.5 * off * off - (z1 * z1 + 4) * (0.5 / 0.36) - wall
        # towards 0 the unit vector has no limit; the gradient there is 0, as autograd's is
        grad = z * (off / (-0.4 * r.clamp_min(1e-30))).unsqueeze(-1)
        grad[:, 0] += torch.tanh(v) * (2 / 0.36) - z1 / 0.36 + force
        return value, grad

    @cached_property
    def _log_normalizer(self) -> float:
        return self.log_mass()

    @property
    def log_normalizer(self) -> float:
        """Log Z on the plane, by quadrature, cached."""
        return self._log_normalizer

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        # Propose z1 from the two modes and z2 ~ N(0, 2^2). With r = |z| >= |z2| the log ratio of target and
        # proposal, z2^2 / 8 - (r - 2)^2 / .32, is at most max over r of r^2 / 8 - (r - 2)^2 / .32 = 2 / 3.84.
        kept: list[Tensor] = [torch.empty(0, 2, dtype=options["dtype"], device=options["device"])]
        missing = num
        while missing > 0:
            size = 5 * missing + 100
            side = 4.0 * (torch.rand(size, **options) < 0.5) - 2
            z = torch.randn(size, 2, **options) * torch.tensor([0.6, 2.0]).to(side)
            z[:, 0] += side
            log_ratio = z[:, 1].square() / 8 - self._ring_energy(z) - self._wall_energy(z[:, 0]) - 2 / 3.84
            kept.append(z[torch.rand(size, **options).log() < log_ratio][:missing])
            missing -= len(kept[-1])
        return torch.cat(kept)


class _Band(_Plane):
    """U2 to U4: given z1, z2 is a mixture of normals; z1 itself is flat up to the wall.

    So the integral over z2 is the same for each z1, log Z is exact, and so are the draws.
    """

    def _components(self, z1: Tensor) -> list[tuple[Tensor, float]]:
        """The centre (...) and the scale of each normal of z2 given z1 (...); weights as the scales."""
        raise NotImplementedError

    def _energy(self, z: Tensor) -> Tensor:
        z1, z2 = z[..., 0], z[..., 1]
        (centre, scale), *others = self._components(z1)
        log_p = -0.5 * ((z2 - centre) / scale).square()
        for centre, scale in others:
            log_p = torch.logaddexp(log_p, -0.5 * ((z2 - centre) / scale).square())
        return self._wall_energy(z1) - log_p

    def _slopes(self, z1: Tensor) -> list[Tensor | float]:
        """The derivative of each centre with respect to z1."""
        raise NotImplementedError

    def log_density_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Plane`."""
        if (found := self._compiled(z)) is not None:
            return found
        z1, z2 = z[:, 0], z[:, 1]
        parts = self._components(z1)
        off = [(z2 - centre) / scale for centre, scale in parts]
        pulls = [o / scale for o, (_, scale) in zip(off, parts, strict=True)]
        slopes = self._slopes(z1)
        wall, force = self._wall_force(z1)
        if len(parts) == 1:
            value = -0.5 * off[0] * off[0]
            down, along = pulls[0], pulls[0] * slopes[0]
        else:
            a, b = (-0.5 * o * o for o in off)
            share = torch.sigmoid(a - b)
            value = torch.logaddexp(a, b)
            first, second = share * pulls[0], (1 - share) * pulls[1]
            down, along = first + second, first * slopes[0] + second * slopes[1]
        return value - wall, torch.stack([along + force, -down], -1)

    def _width(self) -> float:
        """The integral of the z1 marginal: flat inside, one half of a normal outside each wall."""
        if self.wall_at is None:
            raise TargetError(
                f"{self!r} has no finite normalizer on the plane, because it does not decay along z1: "
                "use wall=True, or log_mass(box) for the integral over a box"
            )
        return 2 * self.wall_at + self.softness * SQRT_2PI

    @property
    def log_normalizer(self) -> float:
        """Log Z on the plane, exact.

        Raises:
            TargetError: wall=False, so that Z is infinite.
        """
        scales = [scale for _, scale in self._components(torch.zeros(()))]
        return math.log(self._width() * sum(scales) * SQRT_2PI)

    @property
    def has_exact_samples(self) -> bool:
        """True with a wall; without one there is no distribution to draw from."""
        return self.wall_at is not None

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        at = self.wall_at or 0.0
        flat = (2 * torch.rand(num, **options) - 1) * at
        beyond = self.softness * torch.randn(num, **options)
        inside = torch.rand(num, **options) * self._width() < 2 * at
        z1 = torch.where(inside, flat, beyond + at * beyond.sign())
        z2, reached = torch.empty_like(z1), torch.zeros_like(z1)
        components = self._components(z1)
        pick = torch.rand(num, **options) * sum(scale for _, scale in components)
        noise = torch.randn(num, **options)
        for centre, scale in components:
            z2 = torch.where(pick >= reached, centre + scale * noise, z2)
            reached = reached + scale
        return torch.stack([z1, z2], dim=-1)


def _w1(z1: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * z1 / 4)


def _w1_slope(z1: Tensor) -> Tensor:
    return torch.cos(z1 * (math.pi / 2)) * (math.pi / 2)


@dataclass(frozen=True)
class U2(_Band):
    """U2(z) = ((z2 - w1)/.4)^2 / 2 + wall, with w1 = sin(2 pi z1 / 4).

    A sine-shaped band. The printed energy does not decay along z1, so it has no finite normalizer on the
    plane, and a fit of it would drift outwards for ever. Hence the soft wall ((|z1| - 4)+ / .1)^2 / 2, which
    leaves the paper's picture, |z1| <= 4, as it is. A KL divergence to this energy means: to the walled one.

    Source: Rezende & Mohamed 2015, table 1; the wall is ours.

    Args:
        wall: True puts the wall at |z1| = 4, a number puts it there, False leaves it out; without it the
            energy can still be evaluated, but log_normalizer, sample, mean and std raise.

    Example:
        >>> round(U2().log_normalizer, 4)
        2.1129
    """

    def _components(self, z1: Tensor) -> list[tuple[Tensor, float]]:
        return [(_w1(z1), 0.4)]

    def _slopes(self, z1: Tensor) -> list[Tensor | float]:
        return [_w1_slope(z1)]


@dataclass(frozen=True)
class U3(_Band):
    """U3(z) = -ln(exp(-((z2 - w1)/.35)^2 / 2) + exp(-((z2 - w1 + w2)/.35)^2 / 2)) + wall.

    Here w1 = sin(2 pi z1 / 4) and w2 = 3 exp(-((z1 - 1)/.6)^2 / 2): a band that splits in two around z1 = 1.

    Source: Rezende & Mohamed 2015, table 1; the wall is ours.

    Args:
        wall: As in `U2`.
    """

    def _components(self, z1: Tensor) -> list[tuple[Tensor, float]]:
        w1, w2 = _w1(z1), 3 * torch.exp(-0.5 * ((z1 - 1) / 0.6).square())
        return [(w1, 0.35), (w1 - w2, 0.35)]

    def _slopes(self, z1: Tensor) -> list[Tensor | float]:
        x = (z1 - 1) / 0.6
        slope = _w1_slope(z1)
        return [slope, slope + torch.exp(-0.5 * x * x) * x * (3 / 0.6)]


@dataclass(frozen=True)
class U4(_Band):
    """U4(z) = -ln(exp(-((z2 - w1)/.4)^2 / 2) + exp(-((z2 - w1 + w3)/.35)^2 / 2)) + wall.

    Here w1 = sin(2 pi z1 / 4) and w3 = 3 sigmoid((z1 - 1)/.3): a band that forks at z1 = 1 and stays so.

    Source: Rezende & Mohamed 2015, table 1; the wall is ours.

    Args:
        wall: As in `U2`.
    """

    def _components(self, z1: Tensor) -> list[tuple[Tensor, float]]:
        w1, w3 = _w1(z1), 3 * torch.sigmoid((z1 - 1) / 0.3)
        return [(w1, 0.4), (w1 - w3, 0.35)]

    def _slopes(self, z1: Tensor) -> list[Tensor | float]:
        s = torch.sigmoid((z1 - 1) / 0.3)
        slope = _w1_slope(z1)
        return [slope, slope - s * (1 - s) * (3 / 0.3)]
