"""Random log densities of z (S, D) and energies for the fuzz test: good ones, hard ones, and wrong ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["Density", "densities"]


def _two(z: Tensor, a: float, b: float, width: float = 1.0, drop: float = 0.0) -> Tensor:
    first, second = -0.5 * (z - a).square().sum(-1), -0.5 * ((z - b) / width).square().sum(-1) - drop
    return torch.logaddexp(first, second)


SHAPES = {
    # name: log p (S,) of z (S, D)
    "gaussian": lambda z: -0.5 * z.square().sum(-1),
    "shifted": lambda z: -0.5 * ((z - 3) / 0.2).square().sum(-1),
    "wide": lambda z: -0.5 * (z / 50).square().sum(-1),
    "narrow": lambda z: -0.5 * (z / 1e-3).square().sum(-1),
    "laplace": lambda z: -z.abs().sum(-1),
    "student": lambda z: -2.5 * (1 + z.square()).log().sum(-1),
    "cauchy": lambda z: -(1 + z.square()).log().sum(-1),
    "quartic": lambda z: -z.pow(4).sum(-1) + z.square().sum(-1),
    "two_modes": lambda z: _two(z, 3.0, -3.0),
    "far_modes": lambda z: _two(z, 8.0, -8.0),
    "uneven_modes": lambda z: _two(z, 2.0, -4.0, 0.3, 1.0),
    "funnel": lambda z: -z[:, 0].square() / 18 - (0.5 * z[:, 1:].square() * (-z[:, :1]).exp() + z[:, :1] / 2).sum(-1),
    "banana": lambda z: -0.5 * z[:, 0].square() - 2 * (z[:, 1:] - z[:, :1].square()).square().sum(-1),
    "ring": lambda z: -8 * (z.square().sum(-1).add(1e-9).sqrt() - 2).square(),
    "skewed": lambda z: (2 * z - z.exp()).sum(-1),
    "kinked": lambda z: -z.clamp(min=0).sum(-1) * 3 - 0.5 * z.square().sum(-1),
    "sharp_edge": lambda z: torch.where(z[:, 0] > 0, -z.square().sum(-1), -math.inf),
    "box": lambda z: torch.where((z.abs() < 1.5).all(-1), 0 * z.sum(-1), -math.inf),
    "steps": lambda z: -z.abs().floor().sum(-1) - 0.05 * z.square().sum(-1),
    "wavy": lambda z: -0.5 * z.square().sum(-1) + (5 * z).sin().sum(-1),
    "large_constant": lambda z: -0.5 * z.square().sum(-1) - 1e6,
    "small_scale": lambda z: -1e-8 * z.square().sum(-1),
    "huge_scale": lambda z: -1e8 * z.square().sum(-1),
    # these have no finite integral
    "flat": lambda z: 0 * z.sum(-1),
    "growing": lambda z: z.abs().sum(-1),
    "half_flat": lambda z: -torch.nn.functional.softplus(z).sum(-1),
    "spike": lambda z: -0.5 * z.square().sum(-1) - 3 * z.square().sum(-1).log(),
}
SEVERAL_MODES = ("two_modes", "far_modes", "uneven_modes")
UNNORMALIZABLE = ("flat", "growing", "half_flat", "spike")


def _fail(error: Exception) -> None:
    raise error


def _overwrite(z: Tensor) -> Tensor:
    with torch.no_grad():
        z.mul_(0.5)
    return z.sum(-1)


FLAWS = {
    # name: what becomes of log p, given z and log p
    "nan_region": lambda z, p: torch.where(z[:, 0] > 0.7, math.nan, p),
    "nan_far": lambda z, p: torch.where(z.square().sum(-1) > 30, math.nan, p),
    "inf_region": lambda z, p: torch.where(z[:, 0] > 1.0, math.inf, p),
    "wall": lambda z, p: torch.where(z[:, 0] > 0.7, -math.inf, p),
    "nan_gradient": lambda z, p: p - torch.where(z[:, 0] > 0, z[:, 0].sqrt(), 3.0),
    "nan": lambda z, p: p * math.nan,
    "column": lambda z, p: p[:, None],
    "scalar": lambda z, p: p.sum(),
    "matrix": lambda z, p: z,
    "short": lambda z, p: p[:1],
    "one_less": lambda z, p: p[1:],
    "number": lambda z, p: 1.0,
    "none": lambda z, p: None,
    "tuple": lambda z, p: (p, z),
    "list": lambda z, p: p.tolist(),
    "numpy": lambda z, p: p.detach().numpy(),
    "detached": lambda z, p: p.detach(),
    "float64": lambda z, p: p.double(),
    "float16": lambda z, p: p.half(),
    "integer": lambda z, p: p.long(),
    "complex": lambda z, p: p + 0j,
    "boolean": lambda z, p: p > 0,
    "noise": lambda z, p: p + torch.randn(len(z)),
    "overwrites": lambda z, p: p + _overwrite(z),
    "index_error": lambda z, p: p + z[:, 17],
    "key_error": lambda z, p: _fail(KeyError("no")),
    "assertion": lambda z, p: _fail(AssertionError()),
    "zero_division": lambda z, p: p * (1 // 0),
    "attribute_error": lambda z, p: p + z.nothing,
    "stop": lambda z, p: _fail(StopIteration()),
    "late_error": lambda z, p: _fail(KeyError("late")) if bool((z.abs() > 2.1).any()) else p,
    "late_shape": lambda z, p: p[1:] if bool((z.abs() > 2.1).any()) else p,
    "late_constant": lambda z, p: p.detach() if bool((z.abs() > 2.1).any()) else p,
    "own_gradient": lambda z, p: p + torch.autograd.grad(z.square().sum(), z)[0].sum(-1),
    # one row's log p depends on the others
    "over_mean": lambda z, p: p / z.mean(0).abs().sum(),
    "minus_mean": lambda z, p: p - p.mean(),
    "all_alike": lambda z, p: p.mean(0, keepdim=True).expand(len(z)),
    "turned_round": lambda z, p: p.flip(0),
    "running_sum": lambda z, p: p.cumsum(0),
    "standardized": lambda z, p: -0.5 * ((z - z.mean(0)) / z.std(0)).square().sum(-1),
}
ALWAYS_SEEN = set(FLAWS) - {
    "nan_region", "nan_far", "inf_region", "wall", "nan_gradient", "float64", "float16",
    "late_error", "late_shape", "late_constant", "own_gradient",
}  # fmt: skip
"""The flaws that are an error before the fit begins, where log p is no extreme one."""
EXTREME = ("flat", "steps", "spike", "narrow", "large_constant", "small_scale", "huge_scale")

ENERGY_FLAWS = {
    "zero_dim": {"dim": 0},
    "float_dim": {"dim": 2.0},
    "no_dim": {"dim": None},
    "text_dim": {"dim": "2"},
    "text_normalizer": {"log_normalizer": "large"},
    "nan_normalizer": {"log_normalizer": math.nan},
    "vector_normalizer": {"log_normalizer": torch.zeros(2)},
    "short_gradient": {"log_density_and_grad": lambda z: (z.sum(-1), z[:1])},
    "other_gradient": {"log_density_and_grad": lambda z: (z.sum(-1), z + 70.0)},
    "one_value": {"log_density_and_grad": lambda z: z.sum(-1)},
    "failing_gradient": {"log_density_and_grad": lambda z: _fail(RuntimeError("no"))},
    "no_function": {"log_density": 3},
}


class _Energy:
    """An energy with what `ENERGY_FLAWS` say instead of its own."""

    name = "fuzzed"

    def __init__(self, function, dim: int, instead: dict) -> None:
        self.dim, self.log_density = dim, function
        vars(self).update(instead)


@dataclass(frozen=True)
class Density:
    """A log density; calling it evaluates it."""

    shape: str
    dim: int
    flaw: str = ""
    energy: str | None = None  # "" or a key of ENERGY_FLAWS; None is a plain callable
    dtype: str | None = None

    @property
    def honest(self) -> bool:
        """Whether it must be fitted: a density, if a hard one."""
        return self.flaw in ("", "float64") and not self.energy and self.shape not in UNNORMALIZABLE

    @property
    def far_apart(self) -> bool:
        """Whether it has modes that only the whitening's starts can find, as the verdict says."""
        return self.shape in SEVERAL_MODES

    @property
    def refused(self) -> bool:
        """Whether it must be refused."""
        return bool(self.energy) or (self.flaw in ALWAYS_SEEN and self.shape not in EXTREME)

    @property
    def target(self) -> dict:
        """The arguments of `fit` and `as_density`."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        if self.energy is None:
            return {"target": self, "dim": self.dim, "dtype": dtype}
        return {"target": _Energy(self, self.dim, ENERGY_FLAWS.get(self.energy, {})), "dtype": dtype}

    def __call__(self, z: Tensor):
        p = SHAPES[self.shape](z)
        return FLAWS[self.flaw](z, p) if self.flaw else p


@st.composite
def densities(draw) -> Density:
    """Half of them without a flaw, half of them in one or two dimensions."""
    flaw = draw(st.sampled_from(list(FLAWS))) if draw(st.booleans()) else ""
    energy = draw(st.sampled_from([None] * 12 + [""] * 6 + list(ENERGY_FLAWS)))
    dtype = draw(st.sampled_from([None, None, "float32", "float64"]))
    dim = draw(st.sampled_from([1, 2, 1, 2, 3, 6]))
    return Density(draw(st.sampled_from(list(SHAPES))), dim, flaw, energy, dtype)
