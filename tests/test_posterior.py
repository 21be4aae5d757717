"""A Posterior against distributions that are known exactly: densities, draws, summaries, diagnosis, files."""

from __future__ import annotations

import copy
import math
import os
import pickle
from contextlib import suppress

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flowvi
from flowvi.energies import CorrelatedGaussian
from flowvi.errors import (
    DimensionError,
    FileFormatError,
    NonFiniteError,
    OptionError,
    TargetError,
    UnknownFlowError,
)
from flowvi.files import read, write
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.guides import AutoFlow
from flowvi.history import History
from flowvi.posterior import Posterior
from flowvi.psis import systematic
from flowvi.storage import load
from flowvi.targets import as_density
from flowvi.transforms import Affine, Radial, registry

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
HISTORY = History(torch.arange(0, 30, 10), torch.tensor([-9.0, -5.0, -4.0]), torch.tensor([0.1, 0.5, 1.0]))
CONFIG = {"flow": "planar", "num_flows": 0, "num_steps": 30, "num_particles": 64, "anneal": False, "lr": None}


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def unit_site():
    pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=torch.float64), 3.0))


def positive_site():
    pyro.sample("s", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 3.0))


def several_supports():
    one = torch.ones((), dtype=torch.float64)
    pyro.sample("weights", dist.Dirichlet(torch.ones(4, dtype=torch.float64)))
    pyro.sample("bounded", dist.Uniform(-2.0 * one, 3.0).expand([2, 3]).to_event(2))
    pyro.sample("chol", dist.LKJCholesky(3, one))
    pyro.sample("scalar", dist.Normal(0.0 * one, 1.0))


def make(target, *, loc=0.0, scale=1.0, num_flows=0, args=(), seed=0, dim=None, dtype=torch.float64, spread=0.0):
    """A posterior whose q is known: an affine flow, or a planar one with random parameters."""
    density = as_density(target, args=args, kwargs={}, dim=dim, dtype=dtype, device=torch.device("cpu"))
    spec = FlowSpec("planar", density.dim, num_flows, "diag", {})
    flow = Flow.from_spec(spec, loc=loc, scale=scale, dtype=dtype, device=torch.device("cpu"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in flow.parameters():
            parameter += spread * torch.randn_like(parameter)
    return Posterior(flow, density, config=CONFIG, timing={"fit": 1.0}, history=HISTORY, seed=seed)


def eight_schools(**options):
    return make(schools, args=(Y, SIGMA), **({"loc": 0.5, "scale": 0.3} | options))


def gaussian(mean=0.0, sd=1.0, dim=2, log_z=0.0, **options):
    """Target exp(log_z) N(mean, sd^2) against q = N(0, 1)."""

    def log_density(z):
        return (-0.5 * ((z - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)).sum(-1) + log_z

    return make(log_density, dim=dim, **options)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# densities


def test_log_prob_is_the_analytic_density_with_the_jacobian():
    posterior = eight_schools()
    x = posterior.sample(500)
    q = dist.Normal(torch.tensor(0.5, dtype=torch.float64), 0.3)
    expected = q.log_prob(x["mu"]) + dist.LogNormal(q.loc, q.scale).log_prob(x["tau"]) + q.log_prob(x["eta"]).sum(-1)
    torch.testing.assert_close(posterior.log_prob(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("model", "site", "grid"), [(unit_site, "p", (0, 1)), (positive_site, "s", (0, 40))])
def test_log_prob_integrates_to_one_over_a_constrained_site(model, site, grid):
    posterior = make(model, num_flows=3, spread=0.5)
    low, high = grid
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    x, weight = low + (high - low) * u**3, (high - low) * 3 * u**2 / 20_000  # dense at the lower end
    assert (posterior.log_prob({site: x}).exp() * weight).sum() == pytest.approx(1.0, abs=2e-3)


def test_log_prob_of_draws_equals_log_q_of_their_z_and_volume():
    posterior = make(several_supports, num_flows=2, spread=0.3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        z, log_q = posterior.flow.rsample_and_log_prob(200, generator=generator)
    x = posterior.density.constrain(z)
    _, log_jacobian = posterior.density.unconstrain({site.name: x[site.name] for site in posterior.density.sites})
    torch.testing.assert_close(posterior.log_prob(x), log_q + log_jacobian, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (0,)])
def test_values_may_have_any_batch_shape(batch):
    posterior = eight_schools()
    flat = posterior.sample(math.prod(batch), seed=0)
    log_q = posterior.log_prob({name: value.reshape(batch + value.shape[1:]) for name, value in flat.items()})
    assert log_q.shape == batch
    torch.testing.assert_close(log_q.reshape(-1), posterior.log_prob(flat))


def test_outside_of_the_support_the_density_is_zero():
    x = {
        "mu": torch.tensor([0.0, 0.0, math.nan]),
        "tau": torch.tensor([1.0, -1.0, 1.0]),
        "eta": torch.zeros(3, 8),
    }
    log_q = eight_schools().log_prob(x)
    assert log_q[0].isfinite()
    assert log_q[1] == -math.inf
    assert log_q[2].isnan()
    p = torch.tensor([-0.1, 0.5, 1.5])
    assert make(unit_site).log_prob({"p": p}).isfinite().tolist() == [False, True, False]
    several = make(several_supports)
    x = {name: value[:2].clone() for name, value in several.sample(2).items()}
    x["weights"][1] *= 1.1
    assert several.log_prob(x).isfinite().tolist() == [True, False]


def test_log_prob_has_gradients_where_values_ask_for_them():
    posterior = eight_schools()
    x = {name: value.requires_grad_() for name, value in posterior.sample(4).items()}
    posterior.log_prob(x).sum().backward()
    torch.testing.assert_close(x["mu"].grad, -(x["mu"] - 0.5).detach() / 0.09)
    assert not posterior.log_prob({name: value.detach() for name, value in x.items()}).requires_grad


def test_a_target_with_one_site_takes_its_value_alone():
    posterior = gaussian()
    z = posterior.sample(5)["z"]
    assert torch.equal(posterior.log_prob(z), posterior.log_prob({"z": z}))
    assert posterior.log_prob(np.zeros(2)).item() == pytest.approx(-math.log(2 * math.pi))


def test_log_prob_says_what_is_wrong_with_values():
    posterior = eight_schools()
    x = posterior.sample(3)
    with pytest.raises(OptionError, match="lacks the latent sites tau"):
        posterior.log_prob({name: x[name] for name in ("mu", "eta")})
    with pytest.raises(DimensionError, match=r"'eta' has shape \(8,\).*got \(3, 7\)"):
        posterior.log_prob(x | {"eta": x["eta"][:, :7]})
    with pytest.raises(DimensionError, match="must agree"):
        posterior.log_prob(x | {"mu": x["mu"][:2]})
    with pytest.raises(OptionError, match="dict with the sites mu, tau, eta"):
        posterior.log_prob(x["mu"])


def test_flow_and_target_must_have_the_same_dimension():
    density = gaussian(dim=3).density
    with pytest.raises(DimensionError, match="D = 2, the target 3"):
        Posterior(gaussian(dim=2).flow, density, config={}, timing={}, history=HISTORY, seed=None)


# draws and summaries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_gives_every_site_in_its_shape_and_dtype(dtype):
    posterior = make(schools, args=(Y.to(dtype), SIGMA.to(dtype)), dtype=dtype)
    x = posterior.sample(11)
    assert {name: tuple(value.shape) for name, value in x.items()} == {
        "mu": (11,),
        "tau": (11,),
        "eta": (11, 8),
        "theta": (11, 8),
    }
    assert all(value.dtype == dtype and not value.requires_grad for value in x.values())
    torch.testing.assert_close(x["theta"], x["mu"][:, None] + x["tau"][:, None] * x["eta"])
    assert (x["tau"] > 0).all()
    assert posterior.log_prob(x).dtype == dtype
    assert posterior.log_prob(x).isfinite().all()


def test_a_flow_in_float32_serves_a_target_in_float64():
    posterior = eight_schools()
    flow = Flow.from_spec(posterior.flow.spec, loc=0.5, scale=0.3, dtype=torch.float32)
    mixed = Posterior(flow, posterior.density, config={}, timing={}, history=HISTORY, seed=0)
    x = mixed.sample(100)
    assert x["mu"].dtype == torch.float64
    torch.testing.assert_close(mixed.log_prob(x), posterior.log_prob(x), rtol=1e-4, atol=1e-4)
    assert mixed.diagnose(500).elbo == pytest.approx(posterior.diagnose(500).elbo, rel=0.05)


def test_seeds_and_the_global_generator():
    posterior = eight_schools()
    before = torch.get_rng_state()
    a, b = posterior.sample(5, seed=1), posterior.sample(5, seed=1)
    assert same(a, b)
    assert not torch.equal(a["mu"], posterior.sample(5, seed=2)["mu"])
    first, second = posterior.sample(5), posterior.sample(5)
    assert not torch.equal(first["mu"], second["mu"])
    again = eight_schools()  # the sequence of a seeded fit is reproducible
    assert same(first, again.sample(5))
    assert same(second, again.sample(5))
    assert not torch.equal(eight_schools(seed=None).sample(5)["mu"], eight_schools(seed=None).sample(5)["mu"])
    posterior.resample(5)
    posterior.diagnose(500)
    posterior.mean()
    posterior.log_prob(a)
    assert torch.equal(torch.get_rng_state(), before)


def test_many_draws_come_in_chunks(monkeypatch):
    posterior = eight_schools()
    rows = []
    constrain = posterior.density.constrain
    monkeypatch.setattr(posterior.density, "constrain", lambda z: rows.append(len(z)) or constrain(z), raising=False)
    x = posterior.sample(100_000, seed=0)
    assert sum(rows) == 100_000
    assert max(rows) <= 16_384
    assert x["mu"].mean() == pytest.approx(0.5, abs=4 * 0.3 / 100_000**0.5)
    assert len(x["mu"].unique()) == 100_000


def test_no_draws_at_all():
    x = eight_schools().sample(0)
    assert {name: tuple(value.shape) for name, value in x.items()}["theta"] == (0, 8)


def test_summaries_match_the_known_marginals():
    posterior = eight_schools()
    assert posterior.mean()["mu"] == pytest.approx(0.5, abs=0.01)
    assert posterior.std()["mu"] == pytest.approx(0.3, abs=0.01)
    assert posterior.median()["tau"] == pytest.approx(math.exp(0.5), abs=0.02)
    assert posterior.mean()["tau"] == pytest.approx(math.exp(0.5 + 0.045), abs=0.02)
    quantiles = posterior.quantiles([0.05, 0.5, 0.95])
    assert quantiles["eta"].shape == (3, 8)
    normal = torch.distributions.Normal(0.5, 0.3)
    torch.testing.assert_close(quantiles["mu"].float(), normal.icdf(torch.tensor([0.05, 0.5, 0.95])), atol=0.02, rtol=0)
    torch.testing.assert_close(quantiles["tau"].log(), quantiles["mu"], atol=0.02, rtol=0)
    assert posterior.quantiles(0.5)["eta"].shape == (8,)
    assert same(posterior.quantiles([0.1]), posterior.quantiles(torch.tensor([0.1], dtype=torch.float64)))
    with pytest.raises(OptionError, match="probability in"):
        posterior.quantiles([5, 95])


def test_resample_corrects_a_wrong_mean_and_scale():
    posterior = gaussian(mean=0.6, sd=0.7)  # q = N(0, 1)
    num = 20_000
    z = posterior.resample(num, seed=0)["z"]
    assert posterior.diagnose().khat < 0.7
    error = 5 / (0.25 * num) ** 0.5  # an ESS of at least a fourth of the draws
    assert (z.mean(0) - 0.6).abs().max() < error
    assert (z.std(0) - 0.7).abs().max() < error
    raw = posterior.sample(num, seed=0)["z"]
    assert raw.mean(0).abs().max() < error
    order = z[:, 0]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05  # in random order, not sorted as it was drawn
    assert same(posterior.resample(10, seed=1), posterior.resample(10, seed=1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(any), st.integers(1, 200), st.integers(0, 2**31))
def test_systematic_resampling_takes_each_as_often_as_its_weight_says_to_within_one(weights, num, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    index = systematic(weights, num, torch.Generator().manual_seed(seed))
    counts = index.bincount(minlength=len(weights))
    assert index.shape == (num,)
    assert (counts - num * weights / weights.sum()).abs().max() < 1 + 1e-6


def test_resample_of_constrained_sites_keeps_them_together():
    x = eight_schools().resample(500)
    torch.testing.assert_close(x["theta"], x["mu"][:, None] + x["tau"][:, None] * x["eta"])


def test_resample_without_a_finite_density_is_a_typed_error():
    with pytest.raises(NonFiniteError, match="no draw of the flow"):
        make(lambda z: z.sum(-1) + torch.where(z[:, 0] > -1e-3, 0.0, math.nan), dim=1, loc=-50.0).resample(10)


@pytest.mark.parametrize("num_flows", [0, 2])
def test_the_guide_of_a_fit_in_float64_is_in_float64_whatever_the_priors(num_flows):
    def model(y):  # priors in float32, data in float64
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    posterior = flowvi.fit(model, (y,), num_flows=num_flows, num_steps=5, seed=0, verify=False, progress=False)
    assert posterior.flow.dtype == torch.float64
    guide = posterior.guide
    assert guide(y)["m"].dtype == torch.float64
    torch.testing.assert_close(guide.median(y)["m"], posterior.median()["m"], atol=0.05, rtol=0)
    draws = pyro.infer.Predictive(model, guide=guide, num_samples=500)(y)["m"]
    assert (draws.mean() - posterior.mean()["m"]).abs() < 0.15
    torch.testing.assert_close(guide.log_prob({"m": 1.0}, y), posterior.log_prob({"m": 1.0}))


@pytest.mark.parametrize("num", [-1, 2.5, True, "10"])
def test_counts_are_checked(num):
    with pytest.raises(OptionError, match="num_samples must be a whole number"):
        eight_schools().sample(num)


# diagnosis


def test_diagnose_matches_closed_forms():
    mean, sd = 0.1, 0.9
    kl = 2 * (math.log(sd) + (1 + mean**2) / (2 * sd**2) - 0.5)
    d = gaussian(mean, sd, log_z=1.5).diagnose(20_000)
    assert abs(d.elbo - (1.5 - kl)) < 4 * d.elbo_se
    assert abs(d.log_evidence - 1.5) < 4 * d.log_evidence_se
    assert d.trusted


def test_diagnose_of_an_energy_reports_kl():
    energy = CorrelatedGaussian(dim=2)
    posterior = make(energy)
    d = posterior.diagnose()
    assert d.kl == pytest.approx(energy.log_normalizer - d.elbo)
    exact = energy.kl_divergence(posterior.flow.log_prob, box=((-9.0, 9.0), (-9.0, 9.0))).kl
    assert abs(d.kl - exact) < 4 * d.kl_se


def test_diagnose_of_the_exact_posterior():
    # conjugate: x ~ N(0, 1), y = 2 ~ N(x, 1): posterior N(1, 1/2), evidence N(2; 0, sqrt 2)
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0, dtype=torch.float64))

    posterior = make(model, loc=1.0, scale=0.5**0.5)
    d = posterior.diagnose()
    evidence = -0.5 * math.log(2 * math.pi * 2) - 1.0
    assert d.elbo == pytest.approx(evidence, abs=1e-6)
    assert d.log_evidence == pytest.approx(evidence, abs=1e-6)
    assert d.trusted
    torch.testing.assert_close(posterior.resample(3)["x"].shape, torch.Size([3]))


def test_diagnose_is_cached_and_seeded():
    posterior = gaussian(0.1)
    assert posterior.diagnose(500) is posterior.diagnose(500)
    assert posterior.diagnose(500, seed=1).elbo != posterior.diagnose(500, seed=2).elbo
    assert posterior.diagnose(500).num_samples == 500
    with pytest.raises(OptionError, match="at least 100"):
        posterior.diagnose(10)


def test_heavy_tails_are_not_trusted():
    posterior = make(lambda z: -torch.log1p(z.square()).sum(-1), dim=8, scale=0.5)
    d = posterior.diagnose()
    assert d.khat > 0.7
    assert not d.trusted
    assert "heavy tail" in str(posterior)


def test_a_nan_density_is_not_trusted_and_still_printed():
    posterior = make(lambda z: torch.where(z[:, 0] > 1.0, math.nan, -z.square().sum(-1)), dim=2)
    assert not posterior.diagnose().trusted
    assert "no finite log density" in str(posterior)


# words


def test_print_shows_a_table_numbers_a_verdict_and_how_it_was_made():
    text = str(eight_schools())
    lines = text.splitlines()
    assert lines[2].split() == ["site", "mean", "sd", "5%", "50%", "95%"]
    assert len({len(line) for line in lines[2:21]}) == 1  # columns line up
    row = next(line for line in lines if line.startswith("eta[3]"))
    assert float(row.split()[1]) == pytest.approx(0.5, abs=0.02)
    for words in (
        "tau",
        "theta[7]",
        "ELBO",
        "log evidence",
        "k-hat",
        "ESS",
        "30 steps of 64 particles",
        "1.0 s",
    ):
        assert words in text
    assert "trust" in text.lower()


def test_print_is_cut_where_there_are_many_elements():
    text = str(gaussian(dim=150))
    assert "z[29]" in text
    assert "z[30]" not in text
    assert "... 120 more" in text
    matrices = str(make(several_supports))
    assert "bounded[1,2]" in matrices
    assert "chol[2,0]" in matrices


def test_repr_is_short_and_draws_nothing(monkeypatch):
    posterior = eight_schools()
    monkeypatch.setattr(posterior.flow, "rsample_and_log_prob", None)
    assert "mu, tau, eta" in repr(posterior)
    assert "D = 10" in repr(posterior)
    assert "\n" not in repr(posterior)


# files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_round_trip_bit_for_bit(tmp_path, dtype):
    posterior = make(schools, args=(Y.to(dtype), SIGMA.to(dtype)), num_flows=4, spread=0.3, dtype=dtype)
    posterior.save(tmp_path / "fit.pt")
    loaded = load(tmp_path / "fit.pt", schools)
    assert same(posterior.sample(20, seed=3), loaded.sample(20, seed=3))
    x = posterior.sample(20, seed=4)
    assert torch.equal(posterior.log_prob(x), loaded.log_prob(x))
    assert posterior.diagnose(500) == loaded.diagnose(500)
    assert loaded.config == posterior.config
    assert loaded.timing == posterior.timing
    assert loaded.seed == 0
    assert torch.equal(loaded.history.elbo, HISTORY.elbo)
    assert loaded.history.skipped_steps == 0
    assert str(loaded) == str(posterior)
    assert os.listdir(tmp_path) == ["fit.pt"]  # nothing left beside it


def test_arguments_travel_where_they_are_plain(tmp_path):
    def model(data, *, scale, extra):
        assert isinstance(data["y"], np.ndarray)
        assert extra == (1, [2.0, "three", None])
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(x, scale), obs=torch.as_tensor(data["y"]).sum())

    kwargs = {
        "scale": torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        "extra": (1, [2.0, "three", None]),
    }
    density = as_density(
        model,
        args=({"y": np.arange(3.0)},),
        kwargs=kwargs,
        dim=None,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    flow = Flow.from_spec(FlowSpec("radial", 1, 2, "diag", {}), dtype=torch.float64)
    posterior = Posterior(flow, density, config={}, timing={}, history=HISTORY, seed=None)
    posterior.save(tmp_path / "fit.pt")
    assert load(tmp_path / "fit.pt", model).diagnose(500, seed=0) == posterior.diagnose(500, seed=0)


class Data:
    def __init__(self, y):
        self.y = y


def test_arguments_that_are_not_plain_must_be_passed(tmp_path):
    def model(data):
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=data.y)

    data = Data(torch.tensor(1.0, dtype=torch.float64))
    posterior = make(model, args=(data,))
    posterior.save(tmp_path / "fit.pt")
    with pytest.raises(OptionError, match=r"not plain data.*args="):
        load(tmp_path / "fit.pt", model)
    assert load(tmp_path / "fit.pt", model, args=(data,)).diagnose(500) == posterior.diagnose(500)


def test_callables_and_energies_round_trip(tmp_path):
    posterior = gaussian(0.3, num_flows=2, spread=0.2)
    posterior.save(tmp_path / "fit.pt")
    loaded = load(tmp_path / "fit.pt", posterior.density)
    assert torch.equal(loaded.sample(5, seed=0)["z"], posterior.sample(5, seed=0)["z"])
    energy = make(CorrelatedGaussian(dim=2))
    energy.save(tmp_path / "energy.pt")
    assert load(tmp_path / "energy.pt", CorrelatedGaussian(dim=2)).diagnose(500) == energy.diagnose(500)


def test_another_model_is_refused_by_name_of_its_sites(tmp_path):
    eight_schools().save(tmp_path / "fit.pt")

    def other(y, sigma):
        pyro.sample("mu", dist.HalfNormal(y.new_ones(())))
        pyro.sample("tau", dist.HalfCauchy(y.new_ones(())))
        pyro.sample("theta", dist.Normal(y.new_zeros(8), 1.0).to_event(1))

    with pytest.raises(TargetError, match=r"eta is not in this model; theta is not in the file; mu has support"):
        load(tmp_path / "fit.pt", other)
    with pytest.raises(TargetError, match=r"eta has shape \(8,\) in the file and \(7,\)"):
        load(tmp_path / "fit.pt", schools, args=(Y[:7], SIGMA[:7]))
    with pytest.raises(OptionError, match=r"pass what was fitted.*flowvi.load\(path, model\)"):
        load(tmp_path / "fit.pt")


def test_a_flow_composed_by_hand_says_how_to_be_saved(tmp_path):
    posterior = gaussian()
    by_hand = Posterior(
        Flow(2, [Affine(2).double()]), posterior.density, config={}, timing={}, history=HISTORY, seed=None
    )
    with pytest.raises(OptionError, match="register"):
        by_hand.save(tmp_path / "fit.pt")
    assert not os.listdir(tmp_path)
    assert "a flow of your own" in repr(by_hand)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    gaussian().save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        gaussian(num_flows=3).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["fit.pt"]


def saved(tmp_path):
    path = tmp_path / "fit.pt"
    gaussian(num_flows=1).save(path)
    return path


def test_a_damaged_file_is_never_read_as_something_else(tmp_path):
    path = saved(tmp_path)
    raw = path.read_bytes()
    target = gaussian().density
    reference = load(path, target).diagnose(100, hmc=False)
    damaged = 0
    for i in range(0, len(raw), len(raw) // 60):
        broken = bytearray(raw)
        broken[i] ^= 0x10
        path.write_bytes(broken)
        try:
            same = load(path, target).diagnose(100, hmc=False) == reference
        except FileFormatError as error:
            damaged += 1
            assert "fit.pt" in str(error)  # noqa: PT017
        else:
            assert same  # the byte was padding
    assert damaged > 20


@pytest.mark.parametrize("bit", [0, 7])
def test_any_damage_to_a_files_directory_is_a_typed_error(tmp_path, bit):
    path = saved(tmp_path)
    raw = path.read_bytes()
    for i in range(len(raw) - 500, len(raw)):
        broken = bytearray(raw)
        broken[i] ^= 1 << bit
        path.write_bytes(broken)
        with suppress(FileFormatError):  # or the byte is one that nobody reads
            read(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_a_typed_error(tmp_path, keep):
    path = saved(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    with pytest.raises(FileFormatError, match=r"fit\.pt can't be read as a flowvi posterior"):
        load(path, gaussian().density)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
@pytest.mark.parametrize("whole", [True, False])
def test_no_code_from_a_file_runs(tmp_path, writer, whole):
    path = tmp_path / "fit.pt"
    bomb = Bomb(tmp_path / "exploded")
    writer(bomb if whole else {"format": "flowvi.posterior", "version": 1, "spec": bomb}, path)
    with pytest.raises(FileFormatError):
        load(path, gaussian().density)
    assert not (tmp_path / "exploded").exists()


def test_foreign_and_newer_files_say_so(tmp_path):
    path = tmp_path / "fit.pt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with pytest.raises(FileFormatError, match="is not a flowvi posterior"):
        load(path, gaussian().density)
    path.write_text("site,mean\nmu,1\n")
    with pytest.raises(FileFormatError, match="another kind of file, or damaged"):
        load(path, gaussian().density)
    content = torch.load(saved(tmp_path), weights_only=True)
    assert content["format"] == "flowvi.posterior"
    torch.save(content | {"version": 2, "flowvi": "9.1"}, path)
    with pytest.raises(FileFormatError, match=r"written by flowvi 9\.1.*upgrade"):
        load(path, gaussian().density)
    torch.save(content | {"seed": 5}, path)
    with pytest.raises(FileFormatError, match="checksum"):
        load(path, gaussian().density)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt", gaussian().density)


def test_a_flow_must_be_registered_as_it_was(tmp_path, monkeypatch):
    path, density = tmp_path / "fit.pt", gaussian().density
    registered = dict(registry._REGISTRY)
    monkeypatch.setattr(registry, "_REGISTRY", registered)

    def with_flow(name, factory=None):
        flow = Flow.from_spec(FlowSpec(name, 2, 1, "diag"), dtype=torch.float64, factory=factory)
        return Posterior(flow, density, config={}, timing={}, history=HISTORY, seed=None)

    with pytest.raises(UnknownFlowError, match="mine"):  # while the flow is still at hand
        with_flow("mine", Radial).save(path)
    with pytest.raises(OptionError, match="registered as 'planar' has other parameters"):
        with_flow("planar", Radial).save(path)
    registered["mine"] = registry.FlowEntry(Radial)
    with_flow("mine").save(path)
    assert load(path, density).flow.spec.name == "mine"
    del registered["mine"]
    with pytest.raises(UnknownFlowError, match="mine"):
        load(path, density)


def test_a_registered_flow_with_other_options_is_not_saved(tmp_path, monkeypatch):
    registered = dict(registry._REGISTRY)
    monkeypatch.setattr(registry, "_REGISTRY", registered)
    registered["mine"] = registry.FlowEntry(lambda input_dim: dist.transforms.Permute(torch.tensor([1, 0])))
    flow = Flow.from_spec(FlowSpec("mine", 2, 1, "diag"), loc=torch.tensor([1.0, 2.0]), dtype=torch.float64)
    posterior = Posterior(flow, gaussian().density, config={}, timing={}, history=HISTORY, seed=None)
    posterior.save(tmp_path / "fit.pt")
    scaling = dist.transforms.AffineTransform(0.0, 2.0)  # no parameters either
    registered["mine"] = registry.FlowEntry(lambda input_dim: scaling)
    with pytest.raises(OptionError, match="registered as 'mine' isn't the fitted one"):
        posterior.save(tmp_path / "fit.pt")


def test_saving_and_loading_leave_the_global_generator_alone(tmp_path):
    posterior = gaussian(num_flows=2)
    before = torch.get_rng_state()
    posterior.save(tmp_path / "fit.pt")
    load(tmp_path / "fit.pt", posterior.density)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_lacks_a_part_says_so(tmp_path):
    path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    for name in ("format", "version", "digest", "target"):
        del content[name]
    write(path, content)
    with pytest.raises(FileFormatError, match="lacks target"):
        load(path, gaussian().density)


def test_a_model_that_subsamples_is_judged_on_all_of_its_data():
    y = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(part):
        x = pyro.sample("x", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", 50, subsample_size=part) as index:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    options = {"loc": float(y.sum()) / 51, "scale": 51**-0.5}
    parts, whole = (make(model, args=(part,), **options).diagnose(500) for part in (5, None))
    assert parts.elbo == pytest.approx(whole.elbo, rel=1e-9)
    assert parts.trusted  # q is the exact posterior


def test_deepcopy_and_the_guide():
    posterior = eight_schools(num_flows=2)
    posterior.sample(3)
    twin = copy.deepcopy(posterior)
    assert same(twin.sample(3), posterior.sample(3))
    guide = posterior.guide
    assert isinstance(guide, AutoFlow)
    assert posterior.guide is guide
    draws = pyro.infer.Predictive(posterior.density.model, guide=guide, num_samples=2000)(Y, SIGMA)
    expected = posterior.mean()
    for name in ("mu", "tau"):
        assert draws[name].mean() == pytest.approx(float(expected[name]), abs=5 * float(draws[name].std()) / 2000**0.5)
