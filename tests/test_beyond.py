"""What lies beyond the draws: a ridge that q leaves too early is found, and nothing is found where nothing is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import flowvi
from flowvi.beyond import _Gaussians, beyond
from flowvi.diagnostics import judge
from flowvi.flow import Flow
from flowvi.targets import as_density
from flowvi.transforms import Affine, Transform

WIDTH = 0.05


class Bend(Transform):
    """f(z) = (z_1, z_2 + z_1^2)."""

    def forward_and_log_det(self, x):
        return torch.stack([x[..., 0], x[..., 1] + x[..., 0] ** 2], -1), x.new_zeros(x.shape[:-1])

    def inverse(self, y):
        return torch.stack([y[..., 0], y[..., 1] - y[..., 0] ** 2], -1)


def ridge(z):
    """z_1 ~ N(0, 1), z_2 ~ N(z_1^2, .05)."""
    return -0.5 * z[:, 0] ** 2 - 0.5 * ((z[:, 1] - z[:, 0] ** 2) / WIDTH) ** 2


def found(flow, target, dim, num=5000, seed=0):
    density = as_density(target, dim=dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z, log_q = flow.rsample_and_log_prob(num, generator=generator)
        return beyond(flow, density, z, density(z), log_q, generator)


def bent(sd):
    return Flow(2, [Affine(2, "diag", scale=torch.tensor([sd, WIDTH], dtype=torch.float64)).double(), Bend(2)])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_ridge_that_goes_on_is_found(seed):
    change, name = found(bent(0.6), ridge, 2, seed=seed)
    assert change > 0.3
    assert name == "z[1]"  # whose sd is a third of what it should be; that of z[0] is .6 of it


@pytest.mark.parametrize("seed", [0, 1])
def test_where_q_is_the_target_nothing_is_found(seed):
    assert found(bent(1.0), ridge, 2, seed=seed)[0] < 0.05


@pytest.mark.parametrize("dim", [1, 4])
def test_heavy_tails_alone_are_no_change_of_means_and_sds(dim):
    nu = 30.0  # sd 1.035; a Gaussian's weights have no finite variance here
    flow = Flow(dim, [Affine(dim, "diag").double()])
    assert found(flow, lambda z: -0.5 * (nu + 1) * (z**2 / nu).log1p().sum(-1), dim)[0] < 0.1


class OneWay(Bend):
    """As somebody else's transform that has no inverse."""

    def inverse(self, y):
        raise NotImplementedError


def test_a_flow_without_an_inverse_is_not_looked_at():
    flow = Flow(2, [Affine(2, "diag", scale=torch.tensor([0.6, WIDTH], dtype=torch.float64)).double(), OneWay(2)])
    assert found(flow, ridge, 2) == (0.0, "")


def test_the_mixture_of_gaussians_is_a_density_and_its_draws_are_its_own():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    around = _Gaussians(points, generator)
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = around.log_prob(x[:, None]).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-6)
    draws = around.draw(20_000, generator)[:, 0]
    mean = torch.trapezoid(density * x, x)
    sd = torch.trapezoid(density * (x - mean) ** 2, x).sqrt()
    assert (draws.mean() - mean).abs() < 5 * sd / math.sqrt(len(draws))
    assert draws.std().item() == pytest.approx(sd.item(), rel=0.03)


def test_the_verdict_says_so():
    log_q = np.random.default_rng(0).normal(size=1000)
    assert judge(log_q, log_q, dim=2, beyond=(0.05, "tau")).trusted
    spoiled = judge(log_q, log_q, dim=2, beyond=(0.3, "tau"))
    assert not spoiled.trusted
    assert "ends too early" in spoiled.verdict
    assert "tau" in spoiled.verdict
    assert not judge(log_q, log_q, dim=2, beyond=(math.nan, "tau")).trusted


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sharp_banana_is_right_or_not_trusted(seed):
    def target(z):
        return -0.5 * z[:, 0] ** 2 - 0.5 * ((z[:, 1] - z[:, 0] ** 2) / 0.03) ** 2

    posterior = flowvi.fit(target, dim=2, seed=seed, time_limit=12, verify=False, progress=False)
    right = (posterior.std()["z"] / torch.tensor([1.0, math.sqrt(2)]) - 1).abs().max() < 0.15
    assert right or not posterior.diagnose().trusted
