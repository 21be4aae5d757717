"""Estimators: they agree in expectation, the path gradient vanishes at the optimum, trouble is left out and counted."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import flowvi
from flowvi.errors import OptionError

F64 = torch.float64


class Target:
    """N(1, 0.5^2) in two dimensions, correlated by .6, unnormalized."""

    covariance = torch.tensor([[0.25, 0.15], [0.15, 0.25]], dtype=F64)

    def value_and_grad(self, z):
        residual = torch.linalg.solve(self.covariance, (z - 1).mT).mT
        return -0.5 * ((z - 1) * residual).sum(-1), -residual


def random_flow(seed=0):
    torch.manual_seed(seed)
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 3), dtype=F64)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def gradient(objective, flow, target, seed, beta=1.0):
    for p in flow.parameters():
        p.grad = None
    objective.backward(flow, target, beta=beta, generator=torch.Generator().manual_seed(seed))
    return torch.cat([p.grad.reshape(-1) for p in flow.parameters()])


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("kind", [flowvi.PathELBO, flowvi.BalancedELBO])
def test_path_and_standard_gradients_agree_in_expectation(beta, kind):
    flow, target = random_flow(), Target()
    path = torch.stack([gradient(kind(500), flow, target, s, beta) for s in range(100)])
    standard = torch.stack([gradient(flowvi.ELBO(500), flow, target, s, beta) for s in range(100)])
    error = (path.var(0) + standard.var(0)).sqrt() / 10
    live = error > 0
    assert ((path - standard).mean(0)[live].abs() < 4.5 * error[live]).all()
    assert live.sum() > 15


def test_standard_gradient_is_that_of_the_elbo():
    # Common random numbers: the objective as one differentiable expression.
    flow, target = random_flow(), Target()
    found = gradient(flowvi.ELBO(50), flow, target, 3, beta=0.7)
    z, log_q = flow.rsample_and_log_prob(50, generator=torch.Generator().manual_seed(3))
    residual = torch.linalg.solve(Target.covariance, (z - 1).mT).mT
    log_p = -0.5 * ((z - 1) * residual).sum(-1)
    loss = (log_q - 0.7 * log_p).mean()  # beta multiplies the whole log joint (eq. 20)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(flow.parameters()))])
    assert torch.allclose(found, expected, atol=1e-10)


def test_path_gradient_is_zero_sample_by_sample_where_q_is_p():
    flow = random_flow()
    frozen = random_flow()

    class Same:
        def value_and_grad(self, z):
            return frozen.log_prob(z).detach(), frozen.score(z)

    for seed in range(5):
        assert gradient(flowvi.PathELBO(1), flow, Same(), seed).abs().max() < 1e-9
        assert gradient(flowvi.BalancedELBO(8), flow, Same(), seed).abs().max() < 1e-9
        assert gradient(flowvi.CoveringELBO(8), flow, Same(), seed).abs().max() < 1e-9
        assert gradient(flowvi.ELBO(1), flow, Same(), seed).abs().max() > 1e-3


def test_bad_particles_are_left_out_of_the_mean():
    class Holes(Target):
        def value_and_grad(self, z):
            value, grad = super().value_and_grad(z)
            bad = z[:, 0] > 0.5
            return torch.where(bad, math.nan, value), grad

    flow = random_flow()
    seen = flowvi.PathELBO(200).backward(flow, Holes(), generator=torch.Generator().manual_seed(0))
    assert 0 < seen.valid.sum() < 200
    assert torch.equal(seen.valid, torch.isfinite(seen.log_p))
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())

    class Nothing(Target):
        def value_and_grad(self, z):
            return torch.full((len(z),), -math.inf).to(z), torch.full_like(z, math.nan)

    for objective in (flowvi.PathELBO(8), flowvi.BalancedELBO(8), flowvi.CoveringELBO(8), flowvi.ELBO(8)):
        assert (gradient(objective, flow, Nothing(), 0) == 0).all()


def test_the_covering_gradient_is_that_of_both_divergences():
    # q = N(m, s^2) by an affine flow, p = N(1, .5^2) with correlation .6: both divergences are known.
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 0, "diag"), loc=0.7, scale=0.6, dtype=F64)
    loc, log_scale = torch.full((2,), 0.7, dtype=F64), torch.full((2,), 0.6, dtype=F64).log()
    loc.requires_grad_()
    log_scale.requires_grad_()
    forward = (log_scale + (Target.covariance.diagonal() + (1 - loc).square()) / (2 * (2 * log_scale).exp())).sum()
    precision = torch.linalg.inv(Target.covariance)
    inside = precision.diagonal() @ (2 * log_scale).exp() + (1 - loc) @ precision @ (1 - loc)
    kl = 0.75 * forward + 0.25 * (inside / 2 - log_scale.sum())
    expected = torch.cat(torch.autograd.grad(kl, [loc, log_scale]))
    assert [name for name, _ in flow.module.named_parameters()] == ["0.loc", "0.log_scale"]
    draws = torch.stack([gradient(flowvi.CoveringELBO(4000), flow, Target(), s) for s in range(100)])
    error = draws.std(0) / 10
    assert ((draws.mean(0) - expected).abs() < 4 * error + 0.002).all()
    assert (expected.abs() > 20 * error).any()


def test_the_log_variance_part_sees_the_masses_of_far_modes(monkeypatch):
    # q and p are mixtures of the same two far modes, .7/.3 and .5/.5: no sample is between them.
    monkeypatch.setattr("flowvi.objectives.BALANCE_FALL", 0.0)
    x = torch.randn(4000, 1, dtype=F64)
    right = (torch.arange(4000) < 2800).double()
    log_q = -0.5 * x[:, 0] ** 2 + torch.where(right == 1, math.log(0.7), math.log(0.3))
    log_p = -0.5 * x[:, 0] ** 2 + math.log(0.5)
    _, g_log_q, _ = flowvi.BalancedELBO(4000).cotangents(log_q, log_p, -x, -x, 1.0)
    assert flowvi.PathELBO(4000).cotangents(log_q, log_p, -x, -x, 1.0)[0].abs().max() == 0
    # d KL / d logit of .7: d log q = .3 on the right, -.7 on the left.
    found = (g_log_q * torch.where(right == 1, 0.3, -0.7)).sum()
    assert found.item() == pytest.approx(0.9 * 0.7 * 0.3 * math.log(0.7 / 0.3), rel=1e-3)


def test_linear_anneal_is_equation_20():
    beta = flowvi.LinearAnneal()
    assert [beta(t) for t in (0, 100, 9900, 20_000)] == pytest.approx([0.01, 0.02, 1.0, 1.0])
    with pytest.raises(OptionError, match="num_steps >= 1"):
        flowvi.LinearAnneal(0)
    with pytest.raises(OptionError, match="0 < start <= 1"):
        flowvi.LinearAnneal(10, start=0.0)


def test_path_gradient_of_an_affine_flow_is_zero_on_its_own_gaussian():
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 0, "full"), dtype=F64)
    flow.transforms[-1].set_(torch.ones(2, dtype=F64), torch.linalg.cholesky(Target.covariance))
    for seed in range(5):
        assert gradient(flowvi.PathELBO(1), flow, Target(), seed).abs().max() < 1e-10
        assert gradient(flowvi.ELBO(1), flow, Target(), seed).abs().max() > 1e-3


class FlowGuide(pyro.nn.PyroModule):
    """A hand-written guide with one site, drawn from a flow."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow
        self.layers = flow.module

    def forward(self):
        _ = self.layers  # by reading it, Pyro learns of its parameters
        return pyro.sample("z", self.flow)


def gaussian():
    pyro.sample("z", dist.MultivariateNormal(torch.ones(2, dtype=F64), Target.covariance))


def pyro_gradient(loss, model, flow, seed):
    for p in flow.parameters():
        p.grad = None
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss.loss_and_grads(model, FlowGuide(flow))
    return torch.cat([p.grad.reshape(-1) for p in flow.parameters()])


@pytest.mark.parametrize("objective", [flowvi.ELBO, flowvi.PathELBO])
def test_engine_agrees_with_pyros_trace_elbo(objective):
    flow = random_flow()
    options = {"vectorize_particles": True, "max_plate_nesting": 0}
    found = torch.stack([gradient(objective(500), flow, Target(), s) for s in range(60)])
    expected = torch.stack([pyro_gradient(Trace_ELBO(500, **options), gaussian, flow, s) for s in range(60)])
    error = ((found.var(0) + expected.var(0)) / 60).sqrt()
    live = error > 0
    assert ((found - expected).mean(0)[live].abs() < 4.5 * error[live]).all()
    assert (expected.mean(0)[live].abs() > 4.5 * error[live]).any()


@pytest.mark.parametrize("objective", [flowvi.ELBO, flowvi.PathELBO])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_engine_and_pyro_forms_are_the_same_at_the_same_particles(objective, beta):
    flow = random_flow()
    loss = objective(7, vectorize_particles=True, max_plate_nesting=0, anneal=lambda step: beta)
    found = pyro_gradient(loss, gaussian, flow, 5)
    for p in flow.parameters():
        p.grad = None
    pyro.set_rng_seed(5)
    objective(7).backward(flow, Target(), beta=beta)
    expected = torch.cat([p.grad.reshape(-1) for p in flow.parameters()])
    assert torch.allclose(found, expected, atol=1e-10)


def test_pyro_path_gradient_is_zero_where_q_is_p():
    flow, frozen = random_flow(), random_flow()

    def same():
        pyro.sample("z", frozen)

    for seed in range(3):
        assert pyro_gradient(flowvi.PathELBO(), same, flow, seed).abs().max() < 1e-9
        assert pyro_gradient(flowvi.ELBO(), same, flow, seed).abs().max() > 1e-3


class LogNormalGuide(pyro.nn.PyroModule):
    """A guide that is not a flow, equal to its model."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self):
        return pyro.sample("s", dist.LogNormal(self.loc, self.scale))


def test_pyro_path_gradient_of_any_guide_is_zero_where_q_is_p():
    guide, frozen = LogNormalGuide(), LogNormalGuide().requires_grad_(False)
    flowvi.PathELBO(5).loss_and_grads(frozen, guide)
    assert max(guide.loc.grad.abs(), guide.scale.grad.abs()) < 1e-10


# As Pyro losses.

Y = torch.tensor([0.5, 1.5, 1.0])


def model():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mu, sigma), obs=Y)


def pyro_gradients(loss, guide, repeats):
    """The mean gradient of a Pyro loss over calls, and its standard error."""
    guide()
    params = [p for _, p in guide.named_parameters()]
    rows = []
    for _ in range(repeats):
        for p in params:
            p.grad = None
        loss.loss_and_grads(model, guide)
        rows.append(
            torch.cat([torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in params])
        )
    rows = torch.stack(rows)
    return rows.mean(0), rows.std(0) / repeats**0.5


@pytest.mark.parametrize("make_guide", [lambda: flowvi.AutoPlanar(model, 2, init_scale=0.5), lambda: AutoNormal(model)])
def test_pyro_losses_agree_with_trace_elbo(make_guide):
    guide = make_guide()
    options = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 1}
    expected, expected_error = pyro_gradients(Trace_ELBO(**options), guide, 40)
    for loss in (flowvi.ELBO(**options), flowvi.PathELBO(**options)):
        found, error = pyro_gradients(loss, guide, 40)
        bound = 4.5 * (error**2 + expected_error**2).sqrt() + 1e-5
        assert ((found - expected).abs() < bound).all()


def test_annealed_pyro_loss_scales_the_log_joint():
    guide = flowvi.AutoPlanar(model, 2, init_scale=0.5)
    guide()
    loss = flowvi.AnnealedELBO(anneal=lambda step: 0.25)
    pyro.set_rng_seed(3)
    found = loss.loss_and_grads(model, guide)
    pyro.set_rng_seed(3)
    guide_trace = pyro.poutine.trace(guide).get_trace()
    model_trace = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace()
    expected = guide_trace.log_prob_sum() - 0.25 * model_trace.log_prob_sum()
    assert found == pytest.approx(expected.item(), abs=1e-4)
    pyro.set_rng_seed(3)
    assert loss.loss(model, guide) == pytest.approx(  # a loss alone is never annealed
        (guide_trace.log_prob_sum() - model_trace.log_prob_sum()).item(), abs=1e-4
    )


def test_schedule_counts_the_steps():
    loss = flowvi.AnnealedELBO(anneal=flowvi.LinearAnneal(10))
    guide = flowvi.AutoPlanar(model, 2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    for _ in range(4):
        svi.step()
    assert loss._step == 4
    assert loss._beta_now == 1.0


def test_a_guide_without_rsample_is_named():
    def guide():
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0).has_rsample_(False))
        pyro.sample("sigma", dist.LogNormal(0.0, 0.5))

    with pytest.raises(OptionError, match=r"site 'mu' is drawn from Normal.*flowvi.ELBO"):
        flowvi.PathELBO().loss_and_grads(model, guide)


def test_a_flow_without_path_score_is_named():
    flow = flowvi.Flow(2, [dist.transforms.affine_autoregressive(2)])
    assert not flow.has_path_score
    with pytest.raises(OptionError, match=r"AffineAutoregressive has no path score: use the standard ELBO"):
        flow.rsample_with_score(3)


@pytest.mark.parametrize("loss", [flowvi.ELBO(3), flowvi.PathELBO(3), flowvi.AnnealedELBO(3)])
def test_objectives_are_copied(loss):
    loss._step = 5
    twin = copy.deepcopy(loss)
    assert repr(twin) == repr(loss)
    assert twin.beta(twin._step) == loss.beta(loss._step)
    flow = random_flow()
    assert torch.equal(gradient(twin, flow, Target(), 1), gradient(loss, flow, Target(), 1))


def test_objectives_print_themselves():
    assert repr(flowvi.ELBO()) == "ELBO(num_particles=1)"
    assert repr(flowvi.PathELBO(8)) == "PathELBO(num_particles=8)"
    assert "LinearAnneal(num_steps=10000, start=0.01)" in repr(flowvi.AnnealedELBO())


def test_the_score_of_the_last_draw_needs_no_inverse_and_is_never_stale(monkeypatch):
    flow = random_flow()
    z = flow.rsample((5,))
    expected = flow.score(z.detach())  # another tensor: by the inverses
    with monkeypatch.context() as patch:
        patch.setattr(flowvi.transforms.PlanarStack, "inverse", pytest.fail)
        assert torch.allclose(flow.score(z), expected, atol=1e-9)
    with torch.no_grad():
        next(flow.parameters()).add_(0.1)
    assert torch.allclose(flow.score(z), flow.score(z.detach()), atol=1e-12)
    assert not torch.allclose(flow.score(z), expected, atol=1e-3)
    alive = weakref.ref(z)
    copy.deepcopy(flow)
    del z
    gc.collect()
    assert alive() is None
