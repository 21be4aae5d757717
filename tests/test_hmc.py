"""HMC in a flow's coordinates: exact where the answer is known, tuned without help, and honest about failures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from flowvi import hmc_tuning
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.hmc import FlowCoordinates, Tuning, hmc_step
from flowvi.hmc_tuning import estimate_scale, jitter, tune, warm_up
from flowvi.targets import as_density

F64 = torch.float64


def coordinates(log_density, dim, *, num_flows=0, spread=0.0, dtype=F64, base="diag"):
    """A target through the identity, or through a planar flow with random parameters."""
    density = as_density(log_density, dim=dim, dtype=dtype)
    flow = Flow.from_spec(FlowSpec("planar", dim, num_flows, base), dtype=dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p += spread * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    return FlowCoordinates(flow, density)


def standard(dim):
    return Tuning(0.3, 1.5, torch.ones(dim, dtype=F64))


def walk(target, state, tuning, num_steps, generator):
    states, infos = [], []
    for _, multiple in zip(range(num_steps), jitter(), strict=False):
        state, info = hmc_step(state, target, tuning, tuning.trajectory * multiple, generator)
        states.append(state)
        infos.append(info)
    return states, infos


def run(target, *, num_chains=100, num_warm=120, num_steps=100, seed=0):
    """Draws (C, n, D) after a warm-up that starts at draws of the base."""
    generator = torch.Generator().manual_seed(seed)
    state = target(target.draw(num_chains, generator))
    state, tuning = warm_up(state, target, standard(target.dim), num_warm, generator)
    states, infos = walk(target, state, tuning, num_steps, generator)
    return torch.stack([s.z for s in states], 1), tuning, infos


def within(chains, expected, errors=5.0):
    """Whether the mean over chains (C, n) is `expected`, by the spread between chains."""
    each = chains.mean(1)
    return abs(float(each.mean()) - expected) < errors * float(each.std()) / len(each) ** 0.5


def banana(z):
    return -0.5 * z[:, 0] ** 2 - 0.5 * ((z[:, 1] - z[:, 0] ** 2) / 0.5) ** 2


# the target in the flow's coordinates


@pytest.mark.parametrize("num_flows", [0, 6])
def test_the_gradient_is_that_of_the_density(num_flows):
    target = coordinates(banana, 2, num_flows=num_flows, spread=0.7)
    e = torch.randn(5, 2, dtype=F64)
    state = target(e)
    for i in range(2):
        step = torch.zeros(2, dtype=F64)
        step[i] = 1e-6
        slope = (target(e + step).log_density - target(e - step).log_density) / 2e-6
        torch.testing.assert_close(state.gradient[:, i], slope, rtol=1e-6, atol=1e-6)


def test_the_log_weight_is_log_p_minus_log_q():
    target = coordinates(banana, 2, num_flows=6, spread=0.7)
    e = torch.randn(50, 2, dtype=F64)
    z, log_p, log_q = target.values(e)
    torch.testing.assert_close(log_p, banana(z))
    torch.testing.assert_close(log_q, target._flow.log_prob(z).detach(), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(target.log_weight(target(e)), log_p - log_q)


def test_a_flow_in_single_precision_is_walked_in_double():
    target = coordinates(banana, 2, num_flows=6, spread=0.3, dtype=torch.float32)
    state = target(torch.randn(5, 2, dtype=F64))
    assert {state.position.dtype, state.z.dtype, state.log_p.dtype, state.gradient.dtype} == {F64}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in target._flow.parameters())


# the kernel


def test_energy_is_kept_to_second_order_and_the_way_back_is_the_way():
    target = coordinates(banana, 2, num_flows=4, spread=0.5)
    state = target(0.5 * torch.randn(50, 2, dtype=F64))

    def error(h):
        tuning = Tuning(h, 0.5, torch.ones(2, dtype=F64))
        _, info = hmc_step(state, target, tuning, 0.5, torch.Generator().manual_seed(0))
        assert info.num_leapfrog == math.ceil(0.5 / h)
        return (1 - info.acceptance).mean().item()

    assert error(0.005) < 0.3 * error(0.01) < 0.09 * error(0.02)


@pytest.mark.parametrize("num_flows", [0, 5])
def test_draws_of_the_target_stay_draws_of_the_target(num_flows):
    # whatever the step size: the acceptance corrects it, and log|det| is part of the target
    def log_density(z):
        return -0.5 * (z**2).sum(-1)

    target = coordinates(log_density, 2, num_flows=num_flows, spread=0.6)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 2, dtype=F64, generator=generator)
    e = z
    with torch.no_grad():
        for t in reversed(target._flow.transforms):
            e = t.inv(e)
    state = target(e)
    for _ in range(4):
        state, info = hmc_step(state, target, Tuning(0.6, 1.2, torch.ones(2, dtype=F64)), 1.2, generator)
    assert 0.1 < info.acceptance.mean() < 0.99
    assert (state.z != z).any()
    assert state.z.mean(0).abs().max() < 0.03
    assert (torch.cov(state.z.T) - torch.eye(2)).abs().max() < 0.05


@pytest.mark.parametrize("nothing", [-math.inf, math.nan])
def test_where_the_density_is_not_finite_no_chain_goes_and_it_is_counted(nothing):
    def half_normal(z):
        return torch.where(z[:, 0] > 0, -0.5 * z[:, 0] ** 2, nothing)

    target = coordinates(half_normal, 1)
    generator = torch.Generator().manual_seed(0)
    state = target(torch.randn(500, 1, dtype=F64, generator=generator).abs())
    states, infos = walk(target, state, standard(1), 40, generator)
    z = torch.stack([s.z for s in states], 1)[..., 0]
    assert bool((z > 0).all())
    assert within(z[:, 20:], math.sqrt(2 / math.pi))
    divergent = torch.stack([i.divergent for i in infos])
    assert 0.05 < divergent.double().mean() < 0.9
    assert not torch.stack([i.accepted for i in infos])[divergent].any()


def test_state_and_info_are_frozen():
    target = coordinates(banana, 2)
    state, info = hmc_step(
        target(torch.zeros(3, 2, dtype=F64)), target, standard(2), 1.0, torch.Generator().manual_seed(0)
    )
    for thing, name in ((state, "position"), (info, "acceptance"), (standard(2), "step_size")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)


# known answers, tuned without help


def test_a_correlated_gaussian_through_the_identity():
    dim = 8
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=F64, generator=torch.Generator().manual_seed(1)))[0]
    precision = basis @ torch.diag(torch.logspace(-1, 3, dim, dtype=F64)) @ basis.T
    covariance = precision.inverse()
    mean = torch.arange(dim, dtype=F64)
    target = coordinates(lambda z: -0.5 * ((z - mean) @ precision * (z - mean)).sum(-1), dim)
    z, tuning, infos = run(target)
    assert 0.7 < torch.stack([i.acceptance.mean() for i in infos]).mean() < 0.97
    assert tuning.scale.shape == (dim, dim)
    assert tuning.step_size > 0.4  # the scale has undone a condition number of 10,000
    for i in range(dim):
        assert within(z[:, :, i], float(mean[i]))
        for j in range(i + 1):
            assert within((z[:, :, i] - mean[i]) * (z[:, :, j] - mean[j]), float(covariance[i, j]))


def test_a_funnel_and_a_banana():
    def funnel(z):  # z1 ~ N(0, e^z0): its variance is e^(1/2)
        return -0.5 * z[:, 0] ** 2 - 0.5 * z[:, 1] ** 2 * torch.exp(-z[:, 0]) - 0.5 * z[:, 0]

    z, _, infos = run(coordinates(funnel, 2))
    assert within(z[:, :, 0], 0.0)
    assert within(z[:, :, 0] ** 2, 1.0)
    assert within(z[:, :, 1] ** 2, math.exp(0.5))
    assert torch.stack([i.divergent for i in infos]).double().mean() < 1e-2
    z, _, _ = run(coordinates(banana, 2), num_chains=64, num_warm=80, num_steps=60)
    assert within(z[:, :, 1], 1.0)
    assert within((z[:, :, 1] - 1) ** 2, 2.25)


def test_above_the_limit_the_scale_is_diagonal(monkeypatch):
    monkeypatch.setattr(hmc_tuning, "FULL_SCALE_LIMIT", 2)
    sd = torch.tensor([0.01, 1.0, 50.0], dtype=F64)
    target = coordinates(lambda z: -0.5 * ((z / sd) ** 2).sum(-1), 3)
    z, tuning, _ = run(target)
    assert tuning.scale.shape == (3,)
    for i in range(3):
        assert within(z[:, :, i] ** 2, float(sd[i] ** 2))


# tuning


def test_the_scale_is_the_root_of_the_covariance():
    root = torch.tensor([[2.0, 0.0], [-9.0, 0.5]], dtype=F64)
    e = torch.randn(200, 300, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) @ root.T + 7
    torch.testing.assert_close(estimate_scale(e), root, rtol=0.03, atol=0.03)
    few = estimate_scale(torch.randn(1, 4, 50, dtype=F64))  # fewer draws than dimensions: drawn to the diagonal
    assert torch.linalg.cond(few) < 20


def test_chains_in_a_place_of_no_weight_are_fetched_early_on():
    target = coordinates(lambda z: -0.5 * (z**2).sum(-1), 2)
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(20, 2, dtype=F64, generator=generator)
    e[3] = 100.0
    state = hmc_tuning._gather(target(e), generator)
    assert state.position.norm(dim=1).max() < 5
    assert torch.equal(state.position[4:], e[4:])
    again = target(state.position)
    assert torch.equal(state.z, again.z)
    assert torch.equal(state.gradient, again.gradient)


def test_lengths_are_spread_evenly():
    values = [x for x, _ in zip(jitter(), range(1023), strict=False)]
    assert sum(values) / len(values) == pytest.approx(1.0, abs=1e-9)
    assert sorted(values)[::128] == pytest.approx([2 * (k * 128 + 1) / 1024 for k in range(8)])


def test_tuning_ends_when_it_is_told_to():
    target = coordinates(banana, 2)
    generator = torch.Generator().manual_seed(0)
    state = target(target.draw(10, generator))
    seen = []
    _, tuning, positions = tune(
        state, target, standard(2), 50, generator, on_step=lambda s, i: seen.append(i) or len(seen) == 7
    )
    assert len(seen) == len(positions) == 7
    assert tuning.step_size > 0
    seen.clear()
    warm_up(state, target, standard(2), 50, generator, on_step=lambda s, i: seen.append(i) or len(seen) == 9)
    assert len(seen) == 9


def test_the_same_seed_gives_the_same_walk_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = (run(coordinates(banana, 2), num_chains=8, num_warm=20, num_steps=5, seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_chains_are_gathered_where_densities_are_too_large_for_30_nats_to_count():
    flow = Flow.from_spec(FlowSpec("planar", 2, 0, "full", {}), dtype=torch.float64)
    target = FlowCoordinates(flow, as_density(lambda z: z.abs().sum(-1), dim=2, dtype=torch.float64))
    state = target(torch.full((8, 2), 1e20, dtype=torch.float64))
    gathered = hmc_tuning._gather(state, torch.Generator().manual_seed(0))
    assert torch.equal(gathered.position, state.position)


def test_a_length_survives_a_slope_whose_square_is_no_float():
    chees = hmc_tuning._Chees(1.0)
    chees._ascend(8e280)
    chees._ascend(-8e280)
    assert math.isfinite(chees.log_length)
