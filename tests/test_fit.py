"""`fit` end to end: known answers, reproducibility, what it decides and says, and bad input."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import errors, kernels
from flowvi.fit.adam import FlatParameters
from flowvi.fit.engine import Schedule
from flowvi.fit.whiten import whiten
from flowvi.kernels.linear import tall

QUIET = {"progress": False, "verify": False, "seed": 0}


def test_gaussian_target_is_found_exactly():
    # The whitening alone is the answer: KL 0, evidence exact, and the path gradient adds no noise.
    target = flowvi.energies.CorrelatedGaussian(5, rho=0.9)
    posterior = flowvi.fit(target.log_density, dim=5, num_flows=2, num_steps=200, dtype=torch.float64, **QUIET)
    found = posterior.diagnose()
    assert found.log_evidence == pytest.approx(target.log_normalizer, abs=5e-3)
    assert found.elbo == pytest.approx(target.log_normalizer, abs=1e-2)
    assert found.trusted


def test_conjugate_model_has_its_known_posterior_and_evidence():
    torch.manual_seed(0)
    x, noise = torch.randn(30, 2, dtype=torch.float64), 0.5
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + noise * torch.randn(30, dtype=torch.float64)

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, noise), obs=y)

    posterior = flowvi.fit(model, (x, y), num_flows=4, num_steps=300, **QUIET)
    precision = x.T @ x / noise**2 + torch.eye(2) / 9
    mean = torch.linalg.solve(precision, x.T @ y / noise**2)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    draws = posterior.sample(20_000, seed=0)["beta"]
    assert torch.allclose(draws.mean(0), mean, atol=0.03 * sd.max().item())
    assert torch.allclose(draws.std(0), sd, rtol=0.03)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(30).double(), 9 * x @ x.T + noise**2 * torch.eye(30)
    ).log_prob(y)
    assert posterior.diagnose().log_evidence == pytest.approx(evidence.item(), abs=0.01)
    assert posterior.config["log_density"] == "graph"
    values = {"beta": draws[:5]}
    assert torch.allclose(
        posterior.log_prob(values),
        torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(draws[:5]),
        atol=0.05,
    )


@pytest.mark.parametrize("flow", ["planar", "radial", "affine"])
def test_every_flow_improves_on_its_start(flow):
    posterior = flowvi.fit(flowvi.energies.U2(), flow=flow, num_flows=4, num_steps=400, **QUIET)
    elbo = posterior.history.elbo
    assert elbo[-50:].mean() > elbo[:50].mean() + 1
    assert posterior.history.beta[0] == pytest.approx(0.01)
    assert posterior.history.beta[-1] == 1


def test_annealing_keeps_both_modes_of_u1():
    posterior = flowvi.fit(flowvi.energies.U1(), num_flows=16, num_steps=1500, **QUIET)
    left = (posterior.sample(10_000, seed=0)["z"][:, 0] < 0).double().mean().item()
    assert 0.4 < left < 0.6
    kl, mass = flowvi.energies.U1().kl_divergence(lambda z: posterior.flow.log_prob(z.float()), num=300)
    assert mass == pytest.approx(1, abs=1e-3)
    assert kl < 0.1  # a collapsed fit has ln 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("U1", 0.002), ("U2", 0.005), ("U3", 0.03), ("U4", 0.015)])
def test_defaults_reach_the_papers_energies(name, limit):
    energy = flowvi.energies.ENERGIES[name]()
    posterior = flowvi.fit(energy, **QUIET)
    q = flowvi.Flow.from_spec(posterior.flow.spec, dtype=torch.float64)
    q.load_state_dict(posterior.flow.state_dict())
    assert energy.kl_divergence(q.log_prob, num=600)[0] < limit


def test_seed_makes_it_reproducible_and_leaves_the_global_state_alone():
    def run(seed):
        return flowvi.fit(flowvi.energies.U2(), num_flows=4, num_steps=60, seed=seed, progress=False, verify=False)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002 (the legacy state is what must not change)
    first, second, other = run(3), run(3), run(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    for a, b in zip(first.flow.parameters(), second.flow.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.flow.parameters(), other.flow.parameters(), strict=True))
    assert run(None).config["seed"] is not None


def test_config_says_what_was_decided():
    posterior = flowvi.fit(flowvi.energies.U2(), num_flows=4, num_steps=60, **QUIET)
    expected = {"flow": "planar", "num_flows": 4, "base": "full", "num_steps": 60, "num_particles": 256, "seed": 0}
    assert expected.items() <= posterior.config.items()
    assert posterior.config["gradient"] == "path and log-variance"
    assert posterior.config["stopped"] == "finished"
    assert set(posterior.timing) == {"trace", "steps"}
    assert len(posterior.history.elbo) == 60
    whitened = flowvi.fit(flowvi.energies.U2().log_density, dim=2, num_flows=4, num_steps=60, **QUIET)
    assert "whiten" in whitened.timing
    assert whitened.config["whiten"] is True


def test_auto_is_planar_with_32_layers():
    posterior = flowvi.fit(flowvi.energies.U2(), num_steps=3, **QUIET)
    assert (posterior.config["flow"], posterior.config["num_flows"]) == ("planar", 32)


def test_an_objective_can_be_given():
    posterior = flowvi.fit(flowvi.energies.U2(), num_flows=2, num_steps=30, objective=flowvi.AnnealedELBO(16), **QUIET)
    assert posterior.config["gradient"] == "standard"
    assert posterior.config["num_particles"] == 16
    with pytest.raises(errors.OptionError, match="either objective=, or num_particles="):
        flowvi.fit(flowvi.energies.U2(), objective=flowvi.ELBO(8), num_particles=8)


def test_a_pyro_factory_as_flow_takes_the_standard_gradient():
    posterior = flowvi.fit(
        flowvi.energies.U2(), flow=dist.transforms.affine_autoregressive, num_flows=1, num_steps=30, **QUIET
    )
    assert posterior.config["gradient"] == "standard"
    assert torch.isfinite(posterior.sample(10)["z"]).all()


def test_restarts_keep_the_best():
    one = flowvi.fit(flowvi.energies.U2(), num_flows=2, num_steps=40, **QUIET)
    three = flowvi.fit(flowvi.energies.U2(), num_flows=2, num_steps=40, restarts=3, **QUIET)
    assert three.diagnose().elbo >= one.diagnose().elbo - 0.05
    assert three.config["restarts"] == 3


def test_time_limit_cuts_the_number_of_steps():
    posterior = flowvi.fit(flowvi.energies.U2(), num_flows=8, num_steps=10**7, time_limit=0.5, **QUIET)
    assert 200 <= posterior.config["num_steps"] < 10**6
    assert posterior.history.beta[-1] == 1  # the schedules fit into what was left


def test_nonfinite_regions_are_met_counted_and_said():
    def walled(z):  # log p is NaN right of the origin
        return torch.where(z[:, 0] < 0, -0.5 * z.square().sum(-1), torch.nan)

    with pytest.warns(errors.NumericalWarning, match="left out for a non-finite"):
        posterior = flowvi.fit(walled, dim=2, whiten=False, num_flows=2, num_steps=50, **QUIET)
    assert posterior.history.nonfinite_particles > 0
    assert all(torch.isfinite(p).all() for p in posterior.flow.parameters())


def test_a_step_with_a_nonfinite_gradient_is_skipped():
    calls = 0

    class Exploding(flowvi.PathELBO):
        def backward(self, flow, target, **kwargs):
            nonlocal calls
            calls += 1
            seen = super().backward(flow, target, **kwargs)
            if calls == 5:
                next(flow.parameters()).grad.fill_(math.inf)
            return seen

    with pytest.warns(errors.NumericalWarning, match="1 of 20 steps were skipped"):
        posterior = flowvi.fit(flowvi.energies.U2(), num_flows=2, num_steps=20, objective=Exploding(8), **QUIET)
    assert posterior.history.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in posterior.flow.parameters())


def test_ctrl_c_returns_what_there_is():
    class Interrupted(flowvi.PathELBO):
        def beta(self, step):
            if step == 30:
                raise KeyboardInterrupt
            return 1.0

    with pytest.warns(errors.InterruptedWarning, match="after 30 steps"):
        posterior = flowvi.fit(flowvi.energies.U2(), num_flows=2, num_steps=99, objective=Interrupted(8), **QUIET)
    assert posterior.config["stopped"] == "interrupted"
    assert len(posterior.history.elbo) == 30
    assert posterior.sample(3)["z"].shape == (3, 2)


def test_a_poor_fit_is_called_one():
    with pytest.warns(errors.UntrustedWarning, match="Do not trust"):
        flowvi.fit(flowvi.energies.U2(), num_flows=1, num_steps=20, seed=0, progress=False)


def test_a_good_fit_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = flowvi.energies.CorrelatedGaussian(3, rho=0.5)
        flowvi.fit(target.log_density, dim=3, num_flows=2, num_steps=100, seed=0, progress=False)


def test_guide_goes_on_with_svi():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)

    y = torch.tensor([1.0, 2.0, 1.5, 0.5, 2.5])
    posterior = flowvi.fit(model, (y,), num_flows=2, num_steps=100, **QUIET)
    pyro.clear_param_store()
    before = posterior.guide.median(y)["mu"]
    assert before.item() == pytest.approx(posterior.median()["mu"].item(), abs=0.03)
    svi = pyro.infer.SVI(model, posterior.guide, pyro.optim.Adam({"lr": 1e-3}), loss=flowvi.PathELBO(8))
    losses = [svi.step(y) for _ in range(20)]
    assert np.mean(losses) == pytest.approx(-posterior.diagnose().elbo, abs=0.3)
    draws = pyro.infer.Predictive(model, guide=posterior.guide, num_samples=7)(y)
    assert draws["mu"].shape[0] == 7


def test_whitening_finds_a_badly_scaled_gaussian():
    scale = torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64)
    loc = torch.tensor([50.0, -3.0, 0.2], dtype=torch.float64)

    class Target:
        def value_and_grad(self, z):
            return -0.5 * ((z - loc) / scale).square().sum(-1), -(z - loc) / scale**2

    for full in (True, False):
        found = whiten(
            Target(), 3, full=full, generator=torch.Generator().manual_seed(0), dtype=torch.float64, progress=False
        )
        diagonal = found.scale_tril.diagonal() if full else found.scale_tril
        assert torch.allclose((found.loc - loc) / scale, torch.zeros(3).double(), atol=0.1)
        assert torch.allclose(diagonal / scale, torch.ones(3).double(), atol=0.1)
        assert found.agree


def test_whitening_tells_two_modes():
    class Target:
        def value_and_grad(self, z):
            z = z.detach().requires_grad_()
            with torch.enable_grad():
                parts = torch.stack([-0.5 * (z - m).square().sum(-1) / 0.01 for m in (-1.5, 1.5)])
                value = torch.logsumexp(parts, 0)
                return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    found = whiten(
        Target(), 2, full=True, generator=torch.Generator().manual_seed(0), dtype=torch.float64, progress=False
    )
    assert not found.agree


def test_flat_parameters_are_views_while_in_use():
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 3))
    before = [p.clone() for p in flow.parameters()]
    flat = FlatParameters(flow.module)
    with torch.no_grad():
        flat.vector += 1
    flat.release()
    for p, old in zip(flow.parameters(), before, strict=True):
        assert torch.equal(p, old + 1)
        assert p.grad is None
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(num_steps=1000, lr=0.1)
    assert schedule.lr_at(0) == pytest.approx(0.1 / 50, rel=1e-3)
    assert schedule.lr_at(49) == pytest.approx(0.1, rel=1e-2)
    assert schedule.lr_at(999) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: flowvi.fit(flowvi.energies.U1(), num_steps=0), errors.OptionError, "num_steps must be a positive"),
        (lambda: flowvi.fit(flowvi.energies.U1(), num_particles=2.5), errors.OptionError, "num_particles must be"),
        (lambda: flowvi.fit(flowvi.energies.U1(), lr=-1.0), errors.OptionError, "lr must be a positive number"),
        (lambda: flowvi.fit(flowvi.energies.U1(), time_limit=math.inf), errors.OptionError, "time_limit must be"),
        (lambda: flowvi.fit(flowvi.energies.U1(), flow="plannar"), errors.UnknownFlowError, "Did you mean 'planar'"),
        (lambda: flowvi.fit(flowvi.energies.U1(), base="round"), errors.OptionError, "one of diag, low_rank, full"),
        (lambda: flowvi.fit(3), errors.TargetError, "a target is a Pyro model"),
        (lambda: flowvi.fit(lambda z: z, dim=2), errors.DimensionError, "one log density for each row"),
        (lambda: flowvi.fit(lambda: None), errors.NoLatentError, "no latent variable"),
    ],
)
def test_bad_input_is_named_before_any_work(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_subsampled_model_is_fitted_without_bias_and_judged_on_all_its_data():
    torch.manual_seed(0)
    y = 1 + torch.randn(40, dtype=torch.float64)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y), subsample_size=20) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    posterior = flowvi.fit(model, (y,), num_flows=2, num_steps=600, **QUIET)
    precision = 40 + 1 / 9
    mean, sd = y.sum().item() / precision, precision**-0.5
    assert posterior.mean()["mu"].item() == pytest.approx(mean, abs=0.2 * sd)
    assert posterior.std()["mu"].item() == pytest.approx(sd, rel=0.25)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(40).double(), 9 * torch.ones(40, 40) + torch.eye(40)
    ).log_prob(y)
    assert posterior.diagnose().log_evidence == pytest.approx(evidence.item(), abs=0.05)


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def test_compile_is_tried_measured_and_told(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(20, 2)
    options = {"args": (x, x.sum(-1)), "num_flows": 2, "num_steps": 20, "seed": 0, "verify": False, "progress": False}
    plain = flowvi.fit(regression, compile=False, **options)
    assert plain.config["compile"] == "no: compile=False"
    assert flowvi.fit(regression, **options).config["compile"].startswith("no: it is a program of flowvi's own machine")
    with kernels.use("torch"):
        assert "repay" in flowvi.fit(regression, **options).config["compile"]

    def broken(*args, **kwargs):
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    without = flowvi.fit(regression, compile=True, **options)
    assert "no: it can't be compiled here" in without.config["compile"]
    assert without.timing["compile"] > 0
    assert torch.equal(without.history.elbo, plain.history.elbo)

    monkeypatch.setattr(torch, "compile", lambda flat, **_: lambda *inputs: tuple(2 * v for v in flat(*inputs)))
    assert "gives other values" in flowvi.fit(regression, compile=True, **options).config["compile"]
    with pytest.raises(errors.OptionError, match="compile must be"):
        flowvi.fit(regression, compile="maybe", **options)


@pytest.mark.slow
def test_a_compiled_target_is_the_same_target():
    x = torch.randn(20, 2, dtype=torch.float64)
    for density in (
        flowvi.as_density(regression, args=(x, x.sum(-1))),
        flowvi.as_density(lambda z: -0.5 * (z - 1).square().sum(-1), dim=3, dtype=torch.float64),
    ):
        z = torch.randn(64, density.dim, dtype=torch.float64)
        value, grad = density.value_and_grad(z)
        report = density.compile(64)
        assert report.compiled is not None or "can't be compiled" in report.reason
        value_, grad_ = density.value_and_grad(z)
        assert torch.allclose(value, value_, rtol=1e-9)
        assert torch.allclose(grad, grad_, rtol=1e-9)


def test_a_tall_matrix_lies_column_by_column_in_the_flat_vector():
    torch.manual_seed(0)
    net = torch.nn.Sequential(tall(torch.nn.Linear(2, 40)), torch.nn.Tanh(), tall(torch.nn.Linear(40, 3)))
    values = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(5, 2)
    before = net(x).detach()
    flat = FlatParameters(net)
    assert torch.equal(flat.vector[:80].view(2, 40), values[0].t())
    assert not net[0].weight.is_contiguous()
    assert net[2].weight.is_contiguous()
    ordered = flat.ordered(flat.vector)
    assert torch.equal(ordered, torch.cat([v.reshape(-1) for v in values]))
    again = torch.zeros_like(ordered)
    flat.fill(again, ordered)
    assert torch.equal(again, flat.vector)
    assert torch.equal(net(x), before)
    loss = net(x).square().sum()
    expected = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    flat.backward(loss)
    for part, grad in zip(flat.split(flat.grad), expected, strict=True):
        assert torch.equal(part, grad)
    flat.move(torch.empty_like(flat.vector), torch.zeros_like(flat.grad))
    assert torch.equal(net(x), before)
    flat.release()
    assert all(p.is_contiguous() for p in net.parameters())
    for p, value in zip(net.parameters(), values, strict=True):
        assert torch.equal(p, value)
    other = copy.deepcopy(net)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), before)
