"""Importance-weighted bounds: monotone, right against an exact marginal likelihood, gradients without bias."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import flowvi
from flowvi.errors import OptionError, TargetError

F64 = torch.float64
W = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -0.4]], dtype=F64)
NOISE = 0.5


def exact(x, weight=W):
    """Log N(x; 0, W W^T + s^2 I) of a linear-Gaussian model."""
    covariance = weight @ weight.T + NOISE**2 * torch.eye(3, dtype=F64)
    return torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), covariance).log_prob(x)


def model(x, size=None, weight=None):
    weight = W if weight is None else weight
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, NOISE).to_event(1), obs=x)


def guide(x, size=None, weight=None):
    """A mean-field guide that is not the posterior."""
    loc = pyro.param("loc", torch.tensor([[0.3, -0.2, 0.1], [0.1, 0.3, -0.2]], dtype=F64))
    scale = pyro.param("scale", torch.tensor([0.7, 0.6], dtype=F64))
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(x @ loc.T, scale).to_event(1))


def data(n=4, seed=0):
    return torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))


def losses(num_samples, x, repeats):
    loss = flowvi.IWELBO(num_samples, max_plate_nesting=1)
    return torch.tensor([loss.loss(model, guide, x) for _ in range(repeats)], dtype=F64)


def test_bounds_rise_with_the_number_of_samples_up_to_the_exact_evidence():
    x = data()
    found = {k: losses(k, x, 300) for k in (1, 10, 100)}
    means = {k: -float(v.mean()) for k, v in found.items()}
    errors = {k: float(v.std()) / math.sqrt(len(v)) for k, v in found.items()}
    assert means[1] + 3 * errors[1] < means[10] - 3 * errors[10]
    assert means[10] + 3 * errors[10] < means[100] - 3 * errors[100]
    assert means[100] - 3 * errors[100] < float(exact(x).sum())
    elbo = -torch.tensor([Trace_ELBO().loss(model, guide, x) for _ in range(300)])
    assert abs(float(elbo.mean()) - means[1]) < 4 * math.hypot(errors[1], float(elbo.std()) / math.sqrt(300))


def test_the_bound_of_each_datum_has_its_own_logsumexp():
    # Two data points: the sum of their bounds, and not the bound of the sum as in Pyro's RenyiELBO.
    x = data(2)
    loss = flowvi.IWELBO(5, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    value = -loss.loss(model, guide, x)
    pyro.set_rng_seed(3)
    log_w = loss.weighted(model, guide, (x,), {}).log_w
    assert log_w.shape == (5, 2)
    pyro.set_rng_seed(3)
    with pyro.plate("outer", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    with pyro.plate("outer", 5, dim=-2):
        other = poutine.trace(poutine.replay(model, trace)).get_trace(x)
    other.compute_log_prob()
    trace.compute_log_prob()
    by_hand = other.nodes["z"]["log_prob"] + other.nodes["x"]["log_prob"] - trace.nodes["z"]["log_prob"]
    torch.testing.assert_close(log_w, by_hand)
    assert value == pytest.approx(float((by_hand.detach().logsumexp(0) - math.log(5)).sum()))


def test_log_likelihood_agrees_with_the_exact_one():
    x = data(30)
    found = flowvi.log_likelihood(model, guide, x, num_importance_samples=4000, batch_size=8)
    assert found.values.shape == found.errors.shape == (30,)
    assert abs(found.mean - float(exact(x).mean())) < 3 * found.monte_carlo_error
    assert ((found.values - exact(x)).abs() < 4.5 * found.errors).all()
    assert found.monte_carlo_error < 0.01
    assert found.standard_error == pytest.approx(float(found.values.std()) / math.sqrt(30))


def test_log_likelihoods_errors_are_those_of_the_weights():
    x = data(5)
    pyro.set_rng_seed(4)
    guide(x)  # what the guess of the nesting draws
    log_w = flowvi.IWELBO(300, max_plate_nesting=1).weighted(model, guide, (x,), {}).log_w.detach()
    pyro.set_rng_seed(4)
    found = flowvi.log_likelihood(model, guide, x, num_importance_samples=300)
    w = log_w.exp()
    torch.testing.assert_close(found.values, w.mean(0).log())
    torch.testing.assert_close(found.errors, w.std(0) / w.mean(0) / math.sqrt(300))
    assert found.monte_carlo_error == pytest.approx(float(found.errors.square().sum().sqrt()) / 5)


def test_log_likelihood_keeps_to_its_chunks():
    seen = []

    def watching(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T, NOISE).to_event(1), obs=x)
        seen.append(tuple(z.shape))

    x = data(10)
    found = flowvi.log_likelihood(watching, guide, x, num_importance_samples=25, batch_size=4, chunk_size=10)
    assert found.num_importance_samples == 25
    assert {s for s in seen if len(s) == 3} == {(s, n, 2) for s in (10, 5) for n in (4, 2)}
    many = flowvi.log_likelihood(model, guide, x, num_importance_samples=2000, chunk_size=70)
    assert ((many.values - exact(x)).abs() < 4.5 * many.errors).all()


def gradients(loss, x, repeats, weight):
    each = []
    for _ in range(repeats):
        pyro.clear_param_store()
        weight.grad = None
        with poutine.trace(param_only=True) as store:
            loss.loss_and_grads(model, guide, x, weight=weight)
        params = [site["value"].unconstrained() for site in store.trace.nodes.values()]
        each.append(torch.cat([p.grad.reshape(-1) for p in [*params, weight]]))
    return torch.stack(each)


def test_doubly_reparameterized_gradient_agrees_with_the_plain_one_in_expectation():
    x, weight = data(3), W.clone().requires_grad_()
    plain = gradients(flowvi.IWELBO(6, dreg=False, max_plate_nesting=1), x, 500, weight)
    dreg = gradients(flowvi.IWELBO(6, dreg=True, max_plate_nesting=1), x, 500, weight)
    assert plain.shape == dreg.shape == (500, 6 + 2 + 6)
    error = ((plain.var(0) + dreg.var(0)) / 500).sqrt()
    assert ((plain.mean(0) - dreg.mean(0)).abs() < 4 * error).all()
    assert (plain.mean(0).abs() > 6 * error).sum() >= 5  # gradients that the comparison can tell from zero
    assert float(dreg[:, :8].var(0).sum()) < 0.7 * float(plain[:, :8].var(0).sum())  # what it is for


def test_doubly_reparameterized_gradient_vanishes_at_the_posterior():
    x = data(3)
    precision = W.T @ W / NOISE**2 + torch.eye(2, dtype=F64)
    covariance = torch.linalg.inv(precision)
    loc = (covariance @ W.T / NOISE**2).clone().requires_grad_()
    root = torch.linalg.cholesky(covariance).requires_grad_()

    def best(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ loc.T, scale_tril=root))

    flowvi.IWELBO(5).loss_and_grads(model, best, x)
    assert float(loc.grad.abs().max()) < 1e-10
    assert float(root.grad.tril().abs().max()) < 1e-10
    flowvi.IWELBO(5, dreg=False).loss_and_grads(model, best, x)
    assert float(loc.grad.abs().max()) > 1e-3


@pytest.mark.parametrize("dreg", [False, True])
def test_a_subsampled_plate_scales_the_bound_and_not_the_weights(dreg):
    x, weight = data(), W.clone().requires_grad_()
    found = []
    for size in (4, 40):
        pyro.set_rng_seed(7)
        loss = flowvi.IWELBO(7, dreg=dreg, max_plate_nesting=1)
        value = loss.loss_and_grads(model, guide, x, size=size, weight=weight)
        params = [pyro.get_param_store()._params[name] for name in ("loc", "scale")]
        found.append([torch.tensor(value), *(p.grad.clone() for p in [*params, weight])])
        for p in [*params, weight]:
            p.grad = None
    for whole, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, 10 * whole)


def test_sites_right_of_and_in_front_of_the_plate_are_summed():
    x = torch.randn(4, 3, 2, dtype=F64)  # 3 replicates of each of 4 data points

    def nested(x):
        with pyro.plate("data", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("replicates", 3, dim=-1):
                pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(3, 2), 1.0).to_event(1), obs=x)

    def nested_guide(x):
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("z", dist.Normal(x.mean((1, 2)).unsqueeze(-1), 0.5))

    found = flowvi.log_likelihood(nested, nested_guide, x, num_importance_samples=3000)
    covariance = torch.ones(6, 6, dtype=F64) + torch.eye(6, dtype=F64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=F64), covariance).log_prob(x.reshape(4, 6))
    assert ((found.values - truth).abs() < 4.5 * found.errors).all()


def test_a_model_learns_by_svi():
    x = (torch.randn(60, 2, dtype=F64) @ W.T) + NOISE * torch.randn(60, 3, dtype=F64)

    def learnt(x):
        model(x, weight=pyro.param("weight", 0.1 * torch.ones(3, 2, dtype=F64) + 0.1 * W))

    svi = SVI(learnt, guide, pyro.optim.Adam({"lr": 0.02}), loss=flowvi.IWELBO(10))
    first = svi.evaluate_loss(x)
    for _ in range(200):
        svi.step(x)
    learnt_weight = pyro.param("weight").detach()
    assert svi.evaluate_loss(x) < first - 10
    assert float(exact(x, learnt_weight).mean()) > float(exact(x).mean()) - 0.05


def test_what_can_not_be_weighted_per_datum_says_so():
    def with_global(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 3]).to_event(1), obs=x)

    def its_guide(x):
        pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))

    with pytest.raises(TargetError, match="'mu' is outside the data's plate"):
        flowvi.IWELBO(2).loss(with_global, its_guide, data())
    with pytest.raises(OptionError, match="no site in a plate named 'wrong'"):
        flowvi.IWELBO(2, plate="wrong").loss(model, guide, data())
    with pytest.raises(OptionError, match="positive integer"):
        flowvi.IWELBO(0)
    with pytest.raises(TargetError, match="must be as long as the data"):
        flowvi.log_likelihood(lambda x: model(data()), lambda x: guide(data()), data(10), batch_size=5)


def test_a_hierarchical_guide_has_no_doubly_reparameterized_gradient():
    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b.unsqueeze(-1), 1.0).expand([*b.shape, 3]).to_event(1), obs=x)

    def chained(x):
        loc = pyro.param("loc", torch.zeros((), dtype=F64))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(loc, 1.0).expand([len(x)]))
            pyro.sample("b", dist.Normal(a, 1.0))

    with pytest.raises(OptionError, match="'b' depends on the draw of 'a'"):
        flowvi.IWELBO(3).loss_and_grads(two, chained, data())
    assert math.isfinite(flowvi.IWELBO(3, dreg=False).loss_and_grads(two, chained, data()))


def test_a_model_without_plates_is_one_datum():
    def plain():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones((), dtype=F64))

    def posterior():
        pyro.sample("z", dist.Normal(torch.tensor(0.5, dtype=F64), math.sqrt(0.5)))

    truth = float(torch.distributions.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(1.0)))
    assert flowvi.IWELBO(4).loss(plain, posterior) == pytest.approx(-truth)


def test_pyros_log_does_not_tell_how_the_plates_were_counted():
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    log, keep = logging.getLogger("pyro.infer.elbo"), Keep(logging.INFO)
    level = log.level
    log.addHandler(keep)
    try:
        Trace_ELBO(2, vectorize_particles=True).loss(model, guide, data())
        assert len(lines) == 1  # what Pyro itself says
        flowvi.IWELBO(2).loss(model, guide, data())
        assert len(lines) == 1
        assert log.level == level
    finally:
        log.removeHandler(keep)
