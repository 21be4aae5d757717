"""`fit(encoder=)` and the deep latent Gaussian model: exact answers, resumed fits, what is refused."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import Dataset

import flowvi
from flowvi.errors import DimensionError, NonFiniteError, NumericalWarning, OptionError
from flowvi.fit import amortized, ascent
from flowvi.fit.amortized_record import Record
from flowvi.models import DLGM, Maxout

W = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.0, 0.0]])
NOISE = 0.6


def linear_gaussian(x):
    """A linear model, z ~ N(0, I), x ~ N(W z + mean, .6^2): the posterior of z is N(V W^T (x - mean) / .36, V)."""
    mean = pyro.param("mean", torch.zeros(3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T + mean, NOISE).to_event(1), obs=x)


def data(num=600):
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(num, 2, generator=g), torch.randn(num, 3, generator=g)
    return z @ W.T + NOISE * noise + torch.tensor([1.0, -1.0, 0.5])


def fit(x, steps=800, **options):
    encoder = nn.Identity()
    options = {"flow": "planar", "num_flows": 2, "lr": 2e-2, "seed": 1, "progress": False} | options
    return flowvi.fit(linear_gaussian, x, encoder=encoder, num_steps=steps, **options)


def test_linear_gaussian_is_exact():
    x = data()
    before = torch.get_rng_state()
    found = fit(x, validation=0)
    assert torch.equal(before, torch.get_rng_state())
    assert "mean" not in pyro.get_param_store()
    assert found.config["direct"]
    mean = found.params["mean"]
    assert torch.allclose(mean, x.mean(0), atol=0.1)  # that of maximum likelihood
    exact = dist.MultivariateNormal(mean, W @ W.T + NOISE**2 * torch.eye(3)).log_prob(x)
    likelihood = found.log_likelihood(x, num_importance_samples=100, seed=3)
    assert abs(likelihood.mean - exact.mean()) < 3 * likelihood.monte_carlo_error + 1e-3
    bounds = [found.log_likelihood(x, num_importance_samples=k, seed=4).mean for k in (1, 10, 100)]
    assert bounds[0] <= bounds[1] + 1e-3 <= bounds[2] + 2e-3
    assert float(exact.mean()) - found.elbo(x).mean < 0.02
    cov = torch.linalg.inv(torch.eye(2) + W.T @ W / NOISE**2)
    draws = found.sample(x[:4], num_samples=4000, seed=5)["z"]
    assert torch.allclose(draws.mean(0), (x[:4] - mean) @ W @ cov / NOISE**2, atol=0.06)
    assert torch.allclose(draws.std(0), cov.diagonal().sqrt().expand(4, 2), atol=0.05)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_resumed_to_the_bit(tmp_path, optimizer):
    x, cut_at = data(300), 25
    calls = {"now": 0}

    def anneal(step):
        calls["now"] += 1
        if step == cut_at and calls["now"] > cut_at:  # and not where the checkpoint looks at the schedule
            raise RuntimeError("cut off")
        return 1.0

    options = {"optimizer": optimizer, "patience": 1000}
    whole = fit(x, 60, anneal=lambda step: 1.0, **options)
    options |= {"anneal": anneal, "checkpoint": tmp_path, "checkpoint_every": 1e-9}
    with pytest.raises(RuntimeError, match="cut off"):
        fit(x, 60, **options)
    cut_at = 1000
    for _ in range(2):  # the second finds it finished
        again = fit(x, 60, **options)
        assert all(torch.equal(p, q) for p, q in zip(whole._parameters, again._parameters, strict=True))
        assert torch.equal(whole.history.train, again.history.train)
        assert torch.equal(whole.history.validation, again.history.validation)
    with pytest.raises(OptionError, match="another call"):
        fit(x + 1, 60, **options)


def test_early_stopping_keeps_the_best():
    x = data(100)
    found = fit(x[:40], 2000, validation=x[40:], patience=3, lr=0.05, hidden=(64,), num_flows=4)
    assert found.config["stopped"] == "no improvement"
    best = found.history.validation.argmax()
    assert found.history.best_step == found.history.step[best] < found.history.step[-1]


class Thrown(nn.Module):
    """An encoder whose weights some call throws far away, as an exploding step does."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.linear, self.at, self.calls = nn.Linear(3, 3), at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            with torch.no_grad():
                self.linear.weight.mul_(1e4)
        return self.linear(x)


@pytest.mark.parametrize(
    ("optimizer", "lr", "validation"),
    [
        ("adam", 1e-2, 0.2),
        ("rmsprop", 1e-3, 0),
        pytest.param("adam", 1e-2, 0, marks=pytest.mark.slow),
        pytest.param("rmsprop", 1e-3, 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_collapse_is_undone_and_told(optimizer, lr, validation):
    x = data()
    options = {"num_steps": 400, "num_flows": 2, "lr": lr, "seed": 1, "progress": False, "validation": validation}
    steady = flowvi.fit(linear_gaussian, x, encoder=Thrown(at=-1), optimizer=optimizer, **options)
    assert steady.config["collapses"] == 0
    with pytest.warns(NumericalWarning, match="collapsed 1 time;"):
        found = flowvi.fit(linear_gaussian, x, encoder=Thrown(at=300), optimizer=optimizer, **options)
    assert found.config["collapses"] == 1
    assert found.elbo(x).mean > steady.elbo(x).mean - 0.1


def test_a_slow_decline_or_a_schedule_is_no_collapse():
    record = Record()
    for train, beta in ((-5.0, 0.1), (-80.0, 0.5), (-100.0, 1.0), (-90.0, 1.0), (-96.0, 1.0), (-500.0, 1.0)):
        record.checks.append((1, train, math.nan, 1e-3, beta))
        assert not record.has_collapsed
    record.checks.append((1, -600.0, math.nan, 1e-3, 1.0))
    assert record.has_collapsed
    record.checks[-1] = (1, -90.0, -math.inf, 1e-3, 1.0)
    assert record.has_collapsed
    record.collapses.append(len(record.checks))
    for train in (-580.0, -610.0):  # from where it went on
        record.checks.append((1, train, math.nan, 1e-3, 1.0))
        assert not record.has_collapsed
    for nothing in (math.nan, -math.inf):  # to go back to
        record = Record([(1, nothing, nothing, 1e-3, 1.0)] * 3)
        assert not record.has_collapsed
        record.checks.append((1, -100.0, -100.0, 1e-3, 1.0))
        assert not record.has_collapsed


def test_save_and_load(tmp_path):
    x = data(100)
    found = fit(x, 20)
    found.save(tmp_path / "fit.pt")
    again = flowvi.AmortizedFit.load(tmp_path / "fit.pt", linear_gaussian, nn.Identity())
    assert torch.equal(found.params["mean"], again.params["mean"])
    assert found.elbo(x, seed=1) == again.elbo(x, seed=1)
    with pytest.raises(flowvi.errors.FileFormatError, match="doesn't fit"):
        flowvi.AmortizedFit.load(tmp_path / "fit.pt", linear_gaussian, nn.Linear(3, 5))
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    torch.save(content | {"version": 1}, tmp_path / "old.pt")
    with pytest.raises(flowvi.errors.FileFormatError, match="older flowvi"):
        flowvi.AmortizedFit.load(tmp_path / "old.pt", linear_gaussian, nn.Identity())


def test_a_dataset_is_its_tensors():
    x = data(200)
    one, two = fit(x, 20), fit(torch.utils.data.TensorDataset(x), 20)
    assert torch.equal(one.history.train, two.history.train)


def random_mean(x):
    """`linear_gaussian` with a prior over its mean, whose posterior is then Gaussian too."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T + mu, NOISE).to_event(1), obs=x)


def test_global_latents_beside_local_ones_are_exact(tmp_path):
    x = data(400)
    options = {"num_flows": 0, "lr": 2e-2, "seed": 1, "progress": False, "num_steps": 2000}
    found = flowvi.fit(random_mean, x, encoder=nn.Identity(), batch_size=100, **options)
    assert found.config["num_rows"] == 400  # global latents are those of all rows: none is held out
    assert found.config["global_sites"] == ["mu"]
    marginal = W @ W.T + NOISE**2 * torch.eye(3)
    cov = torch.linalg.inv(400 * torch.linalg.inv(marginal) + torch.eye(3) / 100)
    mean = 400 * torch.linalg.solve(marginal, x.mean(0)) @ cov
    draws = found.sample(x[:5], num_samples=8000, seed=0)
    sd = cov.diagonal().sqrt()
    assert ((draws["mu"].mean(0) - mean).abs() < 0.5 * sd).all()
    assert ((draws["mu"].std(0) / sd - 1).abs() < 0.15).all()  # .5 of it where z is taken as known
    assert draws["mu"].shape == (8000, 3)
    assert draws["z"].shape == (8000, 5, 2)
    # the local ones follow the draw of the global ones, with what is left of their spread given it
    given = torch.linalg.inv(torch.eye(2) + W.T @ W / NOISE**2)
    fitted = (x[:5] - draws["mu"][:, None]) @ W @ given / NOISE**2
    assert ((draws["z"] - fitted).std(0) / given.diagonal().sqrt() - 1).abs().max() < 0.15
    every = dist.MultivariateNormal(torch.zeros(3), marginal)
    at = mean.clone()  # log p(x) = log p(x | mu) p(mu) / p(mu | x), at any mu
    evidence = every.log_prob(x - at).sum() + dist.Normal(0.0, 10.0).log_prob(at).sum()
    evidence = evidence - dist.MultivariateNormal(mean, cov).log_prob(at)
    bound = found.elbo(x, num_samples=200, seed=1)
    assert -0.02 < bound.mean - evidence / 400 < 3 * bound.standard_error
    with pytest.raises(OptionError, match="sample"):
        found.posterior(x)
    with pytest.raises(flowvi.errors.TargetError, match="outside"):
        found.log_likelihood(x)
    found.save(tmp_path / "fit.pt")
    again = flowvi.AmortizedFit.load(tmp_path / "fit.pt", random_mean, nn.Identity())
    assert torch.equal(found.global_posterior().log_prob(mean), again.global_posterior().log_prob(mean))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"validation": 1.5}, OptionError, "validation"),
        ({"optimizer": "sgd"}, OptionError, "optimizer"),
        ({"lr_schedule": "step"}, OptionError, "lr_schedule"),
        ({"batch_size": 0}, OptionError, "batch_size"),
        ({"whiten": True}, OptionError, "whiten"),
        ({"no_such": 1}, OptionError, "no_such"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        fit(data(50), 5, **options)


def test_bad_data():
    x = data(50)
    x[3, 1] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        fit(x, 5)
    with pytest.raises(DimensionError, match="1 rows"):
        fit(data(1), 5)
    with pytest.raises(OptionError, match="goes with encoder"):
        flowvi.fit(flowvi.energies.U1(), batch_size=10)


def test_maxout():
    net = Maxout(3, 5, window=4).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    pieces = (x @ net.linear.weight.T + net.linear.bias).reshape(7, 4, 5)
    assert torch.allclose(net(x), pieces.amax(1))


@pytest.mark.parametrize("likelihood", ["bernoulli", "logit_normal"])
def test_dlgm_log_joint(likelihood):
    torch.manual_seed(0)
    dlgm = DLGM(6, 2, hidden=5, likelihood=likelihood).double()
    x = torch.rand(4, 6, dtype=torch.float64)
    x = (x > 0.5).double() if likelihood == "bernoulli" else x
    z = torch.randn(4, 2, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(dlgm.model, data={"z": z})).get_trace(x, size=12)
    out = dlgm.decoder(z)
    if likelihood == "bernoulli":
        p = torch.sigmoid(out)
        log_x = (x * p.log() + (1 - x) * (1 - p).log()).sum()
    else:
        scale = nn.functional.softplus(out[:, 6:]) + 1e-2
        y = (x / (1 - x)).log()
        log_x = (-((y - out[:, :6]) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2).sum()
        log_x = log_x - (x * (1 - x)).log().sum()
    log_z = (-(z**2) / 2 - math.log(2 * math.pi) / 2).sum()
    assert trace.log_prob_sum().item() == pytest.approx(3 * (log_x + log_z).item())
    pyro.clear_param_store()
    with pytest.raises(DimensionError, match=r"\(n, 6\)"):
        dlgm.model(x[:, :5])


# A recorded step.


class Drifts(nn.Module):
    """An encoder that becomes another one after so many calls."""

    def __init__(self, after):
        super().__init__()
        self.linear, self.calls, self.after = nn.Linear(3, 4), 0, after

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1.0 if self.calls < self.after else 3.0)


RECORDED = {
    "planar": {},
    "particles": {"num_particles": 3, "anneal": True, "flow": "radial"},
    "diagonal": {"num_flows": 0, "objective": flowvi.ELBO(2)},
    "autoregressive": {"flow": "iaf"},
    "importance weighted": {"objective": flowvi.IWELBO(5)},
    "importance weighted, doubly": {"objective": flowvi.IWELBO(5, dreg=True)},
    "global latents": {"model": random_mean},
    "apart from global latents": {"model": random_mean, "coupled": False, "num_particles": 2},
}


@pytest.mark.parametrize("case", RECORDED)
def test_a_recorded_fit_is_the_fit(case, monkeypatch):
    options = dict(RECORDED[case])
    model, x = options.pop("model", linear_gaussian), data(200)
    options = {"num_flows": 2, "lr": 2e-2, "seed": 1, "progress": False, "num_steps": 40} | options
    monkeypatch.setattr(ascent, "LOOK_EVERY", 10)
    fits = []
    for compile in (True, False):
        torch.manual_seed(0)
        fits.append(flowvi.fit(model, x, encoder=nn.Linear(3, 4), compile=compile, **options))
    assert [f.config["recorded"] for f in fits] == [True, False]
    assert fits[1].config["direct"] == ("importance" not in case)
    torch.testing.assert_close(fits[0].history.train, fits[1].history.train, rtol=1e-4, atol=1e-4)
    for a, b in zip(fits[0].guide.parameters(), fits[1].guide.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_pyros_own_loss_reads_its_value_and_is_not_recorded():
    assert not fit(data(200), steps=20, objective=pyro.infer.Trace_ELBO(), compile=True).config["recorded"]


def test_only_long_fits_are_recorded_unless_that_is_asked(monkeypatch):
    x = data(200)
    assert not fit(x, steps=20).config["recorded"]
    monkeypatch.setattr(amortized, "LEAST_STEPS", 20)
    assert fit(x, steps=20).config["recorded"]
    assert not fit(x, steps=20, compile=False).config["recorded"]
    with pytest.raises(OptionError, match="compile"):
        fit(x, compile="no")


def test_an_encoder_that_changes_in_time_is_told_of(monkeypatch):
    monkeypatch.setattr(ascent, "LOOK_EVERY", 1)
    x = data(200)
    options = {"num_flows": 2, "seed": 1, "progress": False, "num_steps": 300, "compile": True}
    encoder = Drifts(after=60)
    with pytest.warns(NumericalWarning, match="compile=False"):
        found = flowvi.fit(linear_gaussian, x, encoder=encoder, **options)
    assert not found.config["recorded"]
    assert encoder.calls > 250  # and from there every step asked it
    encoder = Drifts(after=2)  # before the recording is made: that is of what it is then
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flowvi.fit(linear_gaussian, x, encoder=encoder, **options).config["recorded"]


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.2)])
def test_layers_that_are_other_in_training(layer):
    x = data(200)
    encoder = nn.Sequential(nn.Linear(3, 4), layer)
    found = flowvi.fit(linear_gaussian, x, encoder=encoder, num_flows=2, num_steps=30, seed=1, compile=True)
    assert found.config["recorded"] == isinstance(layer, nn.Dropout)  # the other one's averages must go on


class Named(Dataset):
    """Rows with their names, which the model ignores."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], f"row {i}"


def named(x, names):
    assert len(names) == len(x)
    return linear_gaussian(x)


def test_what_is_no_tensor_is_not_recorded():
    found = flowvi.fit(named, (Named(data(100)),), encoder=nn.Linear(3, 4), num_flows=2, num_steps=20, compile=True)
    assert not found.config["recorded"]
