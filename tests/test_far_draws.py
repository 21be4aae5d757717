"""Draws of q that are too far out: against integrals that are known, and in a verdict."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.diagnostics import judge
from flowvi.far_draws import overshoot
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.history import History
from flowvi.posterior import Posterior
from flowvi.targets import as_density

LOG_Z = 0.5 * math.log(2 * math.pi)


def normal(num, dim, seed):
    z = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z, (-0.5 * z.square() - LOG_Z).sum(-1)


def cut(z):
    """A normal density that ends at 3 sds."""
    return -0.5 * z.square().sum(-1) - 1000 * (z.abs() - 3).clamp_min(0).sum(-1)


def test_the_excess_is_the_second_moment_outside():
    density = as_density(cut, dim=1, dtype=torch.float64)
    z, _ = normal(1000, 1, 0)
    further = (normal(50_000, 1, seed) for seed in range(1, 21))
    excess, name = overshoot(z, LOG_Z, further, density)
    beyond = 2 * (3 * math.exp(-4.5) / math.sqrt(2 * math.pi) + 0.5 * math.erfc(3 / math.sqrt(2)))
    sd = z.std().item()
    assert excess == pytest.approx(math.sqrt(1 + beyond / sd**2) - 1, rel=0.05)
    assert name == "z[0]"


def test_what_the_target_has_too_is_no_excess():
    density = as_density(lambda z: -0.5 * z.square().sum(-1), dim=3, dtype=torch.float64)
    z, _ = normal(1000, 3, 0)
    excess, _ = overshoot(z, 3 * LOG_Z, [normal(50_000, 3, 1)], density)
    assert excess < 1e-9


def test_one_draw_in_many_is_found_and_its_column_named():
    density = as_density(lambda z: -0.5 * z.square().sum(-1), dim=3, dtype=torch.float64)
    z, _ = normal(1000, 3, 0)
    more, log_q = normal(10_000, 3, 1)
    more[77, 2], log_q[77] = 50.0, -10.0
    excess, name = overshoot(z, 3 * LOG_Z, [(more, log_q)], density)
    t = (50 - z[:, 2].mean()) / z[:, 2].std()
    assert excess == pytest.approx(math.sqrt(1 + float(t) ** 2 / 10_000) - 1, rel=1e-6)
    assert name == "z[2]"
    more[77, 2], log_q[77] = math.nan, math.nan  # and one that is not finite spoils nothing
    assert overshoot(z, 3 * LOG_Z, [(more, log_q)], density)[0] < 1e-9


def test_a_constant_column_has_no_sd_to_enlarge():
    z, _ = normal(1000, 2, 0)
    more, log_q = normal(10_000, 2, 1)
    z[:, 0] = more[:, 0] = 7.0
    assert overshoot(z, 2 * LOG_Z, [(more, log_q)], as_density(cut, dim=2, dtype=torch.float64))[0] < 0.1


def test_a_scale_whose_sd_hangs_on_few_draws_is_not_trusted():
    """Q is exact on the logarithm, but for one draw in 14,000; beyond it lies half of q's variance of the scale."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 2.0))
        pyro.factor("end", -20 * (scale.log() - 7.6).clamp_min(0))

    density = as_density(model, dtype=torch.float64)
    flow = Flow.from_spec(FlowSpec("planar", 1, 0, "diag"), scale=2.0, dtype=torch.float64)
    history = History(torch.arange(1), torch.zeros(1), torch.ones(1))
    posterior = Posterior(flow, density, config={}, timing={}, history=history, seed=0)
    found = posterior.diagnose()
    assert found.overshoot > 0.1
    assert found.overshoot_site == "scale"
    assert found.gap < 0.01
    assert not found.trusted
    assert "enlarge the sd of scale" in found.verdict


def test_the_verdict_knows_it():
    z, log_q = (x.numpy() for x in normal(10_000, 2, 0))
    assert judge(log_q, log_q, dim=2, overshoot=(0.05, "tau")).trusted
    spoiled = judge(log_q, log_q, dim=2, z=z, overshoot=(0.3, "tau"))
    assert not spoiled.trusted
    assert "enlarge the sd of tau by 30%" in spoiled.verdict
    assert not judge(log_q, log_q, dim=2, overshoot=(math.nan, "tau")).trusted
