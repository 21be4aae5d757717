"""Data for density estimation: four two-dimensional sets with known densities, and one table of measurements.

The two-dimensional sets are drawn anew for every seed and have exact log densities, so that a flow's score can
be held against the truth: the gap of the mean log-likelihood to the truth's is KL(p || q).

- eight_gaussians: centres on a circle of radius 4, standard deviation 0.5.
- spirals: two arms of radius t and angle 2.2 t (and opposite), t uniform, angles from 1 to 3.5 pi, noise 0.15.
- checkerboard: uniform on the black squares, of side 2, of [-4, 4]^2; its density jumps.
- moons: two half circles of radius 2, facing each other, noise 0.2.
- breast_cancer: ten means of cell measurements from 569 images (Street, Wolberg & Mangasarian 1993), shipped by
  scikit-learn; all but the last are logarithms, since they are positive and skewed. Its density is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.errors import FlowVIError

INSTALL = "pip install 'flowvi[experiments]'"
ARC_POINTS = 1000
"""Points of the midpoint rule along a noisy curve: far finer than the noise."""


@dataclass(frozen=True)
class Dataset:
    """Training and test rows of one set, and what is known of it.

    Attributes:
        name: Its name.
        train: (N, D), float32.
        test: (M, D), float32.
        log_density: x (..., 2) -> log p(x) (...), where it is known.
        extent: half the side of the square to draw, for D = 2.
        modes: the centres (K, 2) and the standard deviation of its modes, where they are equal and apart.
    """

    name: str
    train: Tensor
    test: Tensor
    log_density: Callable[[Tensor], Tensor] | None = None
    extent: float = 0.0
    modes: tuple[Tensor, float] | None = None


@dataclass(frozen=True)
class Planar2D:
    """A known density of the plane: how to draw from it, and its logarithm."""

    sample: Callable[[int, torch.Generator], Tensor]
    log_density: Callable[[Tensor], Tensor]
    extent: float
    modes: tuple[Tensor, float] | None = None


def _curve(points: Callable[[Tensor], Tensor], low: float, high: float, noise: float, extent: float) -> Planar2D:
    """Points of a curve, t uniform on [low, high], and its reflection -points(t), with Gaussian noise."""

    def sample(num: int, generator: torch.Generator) -> Tensor:
        t = low + (high - low) * torch.rand(num, generator=generator, dtype=torch.float64)
        sign = 1 - 2 * torch.randint(2, (num, 1), generator=generator)
        eps = torch.randn(num, 2, generator=generator, dtype=torch.float64)
        return sign * points(t) + noise * eps

    t = low + (high - low) * (torch.arange(ARC_POINTS, dtype=torch.float64) + 0.5) / ARC_POINTS
    arcs = torch.cat([points(t), -points(t)])
    constant = -math.log(len(arcs)) - math.log(2 * math.pi * noise**2)

    def log_density(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 2).double()
        parts = [
            torch.logsumexp(-torch.cdist(part, arcs).square() / (2 * noise**2), dim=-1) for part in flat.split(512)
        ]
        return (torch.cat(parts) + constant).reshape(x.shape[:-1])

    return Planar2D(sample, log_density, extent)


def _gaussians(centres: Tensor, noise: float, extent: float) -> Planar2D:
    """Equal parts of Gaussians at the centres (K, 2)."""

    def sample(num: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(centres), (num,), generator=generator)
        return centres[which] + noise * torch.randn(num, 2, generator=generator, dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        square = (x.double().unsqueeze(-2) - centres).square().sum(-1) / noise**2
        return torch.logsumexp(-square / 2, -1) - math.log(len(centres) * 2 * math.pi * noise**2)

    return Planar2D(sample, log_density, extent, (centres, noise))


def _circle(num: int, radius: float) -> Tensor:
    angle = 2 * math.pi * torch.arange(num, dtype=torch.float64) / num
    return radius * torch.stack([angle.cos(), angle.sin()], -1)


def _checkerboard() -> Planar2D:
    def sample(num: int, generator: torch.Generator) -> Tensor:
        row = torch.randint(4, (num,), generator=generator)
        column = 2 * torch.randint(2, (num,), generator=generator) + row % 2
        corner = 2 * torch.stack([row, column], -1) - 4
        # A hair smaller than the square, so that rounding to float32 moves no point over an edge.
        return corner + 1e-6 + (2 - 2e-6) * torch.rand(num, 2, generator=generator, dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        square = torch.floor(x / 2)
        black = (square.sum(-1) % 2 == 0) & (x.abs() < 4).all(-1)
        return torch.where(black, -math.log(32), -math.inf).double()

    return Planar2D(sample, log_density, 5.0)


def _spiral(t: Tensor) -> Tensor:
    return torch.stack([t * (2.2 * t).cos(), t * (2.2 * t).sin()], -1)


def _moon(t: Tensor) -> Tensor:
    # The upper half circle, shifted so that its reflection at the origin is the lower one.
    return torch.stack([2 * t.cos() - 1, 2 * t.sin() - 0.5], -1)


PLANE: dict[str, Planar2D] = {
    "eight_gaussians": _gaussians(_circle(8, 4.0), 0.5, 6.0),
    "spirals": _curve(_spiral, 1 / 2.2, 3.5 * math.pi / 2.2, 0.15, 6.0),
    "checkerboard": _checkerboard(),
    "moons": _curve(_moon, 0.0, math.pi, 0.2, 4.0),
}
GRID = "grid_25"
SHARP: dict[str, Planar2D] = {
    GRID: _gaussians(torch.cartesian_prod(*(torch.arange(-4.0, 5.0, 2.0, dtype=torch.float64),) * 2), 0.05, 5.0)
}
"""Sets of the plane that `DATASETS` leaves out: a grid of 25 Gaussians, 40 standard deviations apart."""
TABLES = ("breast_cancer",)
DATASETS = (*PLANE, *TABLES)


def worst_mode(x: Tensor, centres: Tensor, scale: float) -> float:
    """By how much of its mass the worst of K equal Gaussian modes is off, in draws x (N, 2).

    The mass of a mode is what lies within three of its standard deviations. 0 is all masses right, 1 a mode missing.

    Args:
        x: draws, (N, 2).
        centres: of the modes, (K, 2), further apart than six standard deviations or nearly so.
        scale: the modes' standard deviation.
    """
    away = torch.cdist(x.double(), centres)
    share = (away < 3 * scale).double().mean(0) * len(centres) / (1 - math.exp(-4.5))
    return (share - 1).abs().max().item()


def load(name: str, num_train: int, num_test: int, seed: int) -> Dataset:
    """A set by name: drawn from the seed, or, for a table, split by it.

    Args:
        name: one of `DATASETS` or `SHARP`.
        num_train: training rows of a two-dimensional set; a table gives four fifths of its rows.
        num_test: test rows; a table gives the other fifth.
        seed: of the draws or the split.

    Raises:
        FlowVIError: scikit-learn, which ships the table, is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in PLANE or name in SHARP:
        set_ = PLANE[name] if name in PLANE else SHARP[name]
        x = set_.sample(num_train + num_test, generator).float()
        return Dataset(name, x[:num_train], x[num_train:], set_.log_density, set_.extent, set_.modes)
    x = _breast_cancer()
    x = x[torch.randperm(len(x), generator=generator)]
    num_train = round(0.8 * len(x))
    return Dataset(name, x[:num_train], x[num_train:])


def _breast_cancer() -> Tensor:
    """The ten means, (569, 10)."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise FlowVIError(f"the table is shipped by scikit-learn, which is missing: {INSTALL}") from error
    x = torch.as_tensor(load_breast_cancer().data[:, :10])
    # Two of the ten are 0 in some images: their smallest positive value is added before the logarithm.
    floor = torch.where(x > 0, x, math.inf).amin(0) * (x == 0).any(0)
    return torch.cat([torch.log(x + floor)[:, :9], x[:, 9:]], -1).float()
