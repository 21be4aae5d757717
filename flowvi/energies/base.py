"""What every energy shares: shapes, draws, and quadrature on a grid in one and two dimensions."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import floating, functions, instances, is_count, is_number, positive_integers, shown
from ..errors import DimensionError, FlowVIError, NumericalWarning, OptionError, TargetError

Box = tuple[tuple[float, float], ...]
"""One (low, high) for each dimension."""

SQRT_2PI = math.sqrt(2 * math.pi)


class Grid(NamedTuple):
    """Points and weights of a quadrature: the integral of f over the box is (weights * f(z)).sum()."""

    z: torch.Tensor
    """The points, (n, ..., n, D); axis i of the grid is dimension i."""
    weights: torch.Tensor
    """The weight of each point, (n, ..., n)."""

    @classmethod
    def midpoints(cls, box: Box, num: int) -> Grid:
        """Centres of num equal cells along each dimension: for pictures, and spectral for smooth bumps."""
        if not is_count(num):
            raise OptionError(f"a grid needs num >= 1 cells along each dimension, got {shown(num)}")
        box = _pairs(box)
        unit = (np.arange(num) + 0.5) / num
        return cls._product([(lo + (hi - lo) * unit, np.full(num, (hi - lo) / num)) for lo, hi in box])

    @classmethod
    def gauss(cls, box: Box, panels: int = 30, order: int = 16) -> Grid:
        """Composite Gauss-Legendre: panels along each dimension, each with order points."""
        positive_integers(panels=panels, order=order)
        box = _pairs(box)
        x, w = np.polynomial.legendre.leggauss(order)
        axes = []
        for lo, hi in box:
            half = (hi - lo) / panels / 2
            centres = lo + half * (2 * np.arange(panels) + 1)
            axes.append(((centres[:, None] + half * x).ravel(), np.tile(half * w, panels)))
        return cls._product(axes)

    @classmethod
    def _product(cls, axes: list[tuple[np.ndarray, np.ndarray]]) -> Grid:
        z = np.stack(np.meshgrid(*[x for x, _ in axes], indexing="ij"), axis=-1)
        weights = np.ones(())
        for _, w in axes:
            weights = np.multiply.outer(weights, w)
        return cls(torch.from_numpy(z), torch.from_numpy(np.ascontiguousarray(weights)))


def _pairs(box: Any) -> Box:
    """A box, checked."""
    try:
        pairs = tuple((float(low), float(high)) for low, high in box)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise OptionError(f"box must hold one pair (low, high) for each dimension, got {shown(box)}") from error
    if not pairs or not all(low < high and math.isfinite(high - low) for low, high in pairs):
        raise OptionError(f"box must hold finite pairs (low, high) with low < high, got {shown(box)}")
    return pairs


class GridKL(NamedTuple):
    """KL(q || p) on a grid, and how much of q the grid saw."""

    kl: float
    """The integral over the box of q (log q - log p), nats."""
    mass: float
    """The integral of q over the box; `kl` means what it says where this is close to 1."""


class Energy(ABC):
    """A target p(z) = exp(-U(z)) / Z on R^D.

    A subclass sets `dim` and writes `_energy`; it adds `_sample`, `log_normalizer`, `mean` and `std` where
    they are known. Shapes are checked here, once.
    """

    dim: int

    @abstractmethod
    def _energy(self, z: Tensor) -> Tensor:
        """U(z) for z of shape (..., D), already checked."""

    def energy(self, z: Tensor) -> Tensor:
        """U(z), the negative log density up to a constant.

        Args:
            z: Points, (..., D), of any floating dtype, on any device.

        Returns:
            U(z), (...), with z's dtype and device.

        Raises:
            DimensionError: The last dimension is not D.
        """
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise OptionError(
                f"{type(self).__name__} takes z as a floating-point tensor of shape (..., {self.dim}), got {shown(z)}"
            )
        if z.ndim == 0 or z.shape[-1] != self.dim:
            raise DimensionError(
                f"{type(self).__name__} takes z of shape (..., {self.dim}), got {tuple(z.shape)}: "
                f"the last dimension must hold the {self.dim} coordinates of one point"
            )
        return self._energy(z)

    def __call__(self, z: Tensor) -> Tensor:
        """The same as `energy`."""
        return self.energy(z)

    def log_density(self, z: Tensor) -> Tensor:
        """-U(z), the unnormalized log density; shapes as in `energy`."""
        return -self.energy(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """-U(z) - log Z, the normalized log density; shapes as in `energy`."""
        return -self.energy(z) - self.log_normalizer

    @property
    def log_normalizer(self) -> float:
        """Log Z, the log of the integral of exp(-U) over R^D.

        Raises:
            TargetError: It is not known, or not finite.
        """
        raise TargetError(f"the log normalizer of {self!r} is not known; see log_mass for a finite box")

    def mean(self) -> Tensor:
        """E[z], (D,), float64; NaN where it does not exist."""
        raise TargetError(f"the mean of {self!r} is not known")

    def std(self) -> Tensor:
        """The standard deviation of each coordinate, (D,), float64; infinite where the variance is."""
        raise TargetError(f"the standard deviation of {self!r} is not known")

    @property
    def has_exact_samples(self) -> bool:
        """Whether `sample` gives exact, independent draws."""
        return type(self)._sample is not Energy._sample

    def sample(
        self, num_samples: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Exact, independent draws.

        Args:
            num_samples: How many, S.
            generator: Source of randomness, and device of the draws; None means the global one, on the CPU.
            dtype: None means torch's default dtype.

        Returns:
            Draws, (S, D).

        Raises:
            TargetError: There are none for this energy; ask `has_exact_samples`.
        """
        if not is_count(num_samples, 0):
            raise OptionError(f"num_samples must be >= 0, got {shown(num_samples)}")
        instances(torch.Generator, type(None), generator=generator)
        floating(dtype)
        if not self.has_exact_samples:
            raise TargetError(f"{self!r} has no exact samples; has_exact_samples says so beforehand")
        device = torch.device("cpu") if generator is None else generator.device
        options = {"generator": generator, "device": device, "dtype": dtype or torch.get_default_dtype()}
        return self._sample(num_samples, options)

    def _sample(self, num: int, options: dict[str, Any]) -> Tensor:
        """Draws, (num, D); options are the keywords of torch.randn and torch.rand."""
        raise NotImplementedError

    # On a grid: D <= 2 ------------------------------------------------------------------------------------

    @property
    def box(self) -> Box:
        """The box that grids cover by default: one (low, high) for each dimension, 8 sd to each side."""
        centre, spread = self.mean().tolist(), self.std().tolist()
        return tuple((m - 8 * s, m + 8 * s) for m, s in zip(centre, spread, strict=True))

    def _checked(self, box: Box | None) -> Box:
        if self.dim > 2:
            raise DimensionError(f"a grid needs D <= 2, and {self!r} has D = {self.dim}; use samples instead")
        pairs = _pairs(self.box if box is None else box)
        if len(pairs) != self.dim:
            raise OptionError(f"box must hold {self.dim} finite pairs (low, high) with low < high, got {shown(box)}")
        return pairs

    def log_mass(self, box: Box | None = None, *, panels: int = 30) -> float:
        """Log of the integral of exp(-U) over a box, by composite Gauss-Legendre quadrature in float64."""
        grid = Grid.gauss(self._checked(box), panels)
        return (self.log_density(grid.z) + grid.weights.log()).flatten().logsumexp(0).item()

    def grid_log_prob(self, num: int = 400, box: Box | None = None) -> tuple[Grid, Tensor]:
        """The normalized log density at the centres of num cells along each dimension, float64.

        Returns:
            The grid, and log p(z) of shape (num,) for D = 1, (num, num) for D = 2.
        """
        grid = Grid.midpoints(self._checked(box), num)
        return grid, self.log_prob(grid.z)

    @torch.no_grad()
    def kl_divergence(
        self,
        log_q: Callable[[Tensor], Tensor],
        *,
        num: int = 600,
        box: Box | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> GridKL:
        """KL(q || p), the integral of q (log q - log p), by the midpoint rule on a grid.

        The box should hold nearly all of q: a mass off by more than .01 warns.

        Args:
            log_q: Takes points (N, D), returns the normalized log q (N,).
            num: Cells along each dimension.
            box: One (low, high) for each dimension; None means `self.box`.
            dtype: The dtype of the points that log_q gets.

        Returns:
            The divergence in nats, and the mass of q on the grid.
        """
        functions(log_q=log_q)
        instances(torch.dtype, dtype=dtype)
        floating(dtype)
        grid = Grid.midpoints(self._checked(box), num)
        z = grid.z.reshape(-1, self.dim)
        try:
            parts = [log_q(part.to(dtype)) for part in z.split(65536)]
        except FlowVIError:
            raise
        except Exception as error:  # log_q is the user's, and so is what it may raise
            raise TargetError(f"log_q failed on points (N, {self.dim}) with {type(error).__name__}: {error}") from error
        if not all(isinstance(part, Tensor) and not part.is_complex() for part in parts):
            raise OptionError(f"log_q must map points (N, {self.dim}) to a tensor (N,), and gave {shown(parts[0])}")
        log_density = torch.cat([torch.atleast_1d(part).double() for part in parts])
        if log_density.shape != z.shape[:1]:
            raise DimensionError(
                f"log_q must map points (N, {self.dim}) to (N,); it made {tuple(log_density.shape)} of {tuple(z.shape)}"
            )
        q = log_density.exp() * grid.weights.reshape(-1)
        terms = torch.where(q > 0, q * (log_density - self.log_prob(z)), 0.0)
        mass = q.sum().item()
        if not abs(mass - 1) <= 0.01:
            warnings.warn(
                f"the grid sees a mass of {mass:.4f} of q, not 1, so the KL divergence on it is off: "
                "widen box, or raise num where q is narrower than a cell",
                NumericalWarning,
                stacklevel=2,
            )
        return GridKL(terms.sum().item(), mass)


def check(owner: Energy, *, at_least: int = 1, **positive: float) -> None:
    """Raise OptionError unless owner.dim is an integer >= at_least and each named value is finite and positive."""
    name = type(owner).__name__
    if not is_count(owner.dim, at_least):
        raise OptionError(f"{name} needs dim >= {at_least}, got {shown(owner.dim)}; dim is an integer")
    for key, value in positive.items():
        if not (is_number(value) and value > 0):
            raise OptionError(f"{name} needs a finite {key} > 0, got {shown(value)}")
