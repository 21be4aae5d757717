"""Simulation-based calibration: exact posteriors pass, wrong ones are caught, and nothing is dropped without a word."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

import flowvi
from flowvi.calibration import Calibration, _coverage, _null
from flowvi.errors import DiscreteLatentError, NoLatentError, NonFiniteError, OptionError, TargetError
from flowvi.simulate import Simulator

Y = torch.zeros(4, dtype=torch.float64)


def model(y):
    """Conjugate: mu | y ~ N(sum y / (n + 1), 1 / (n + 1))."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact(data, width=1.0, shift=0.0, num=100):
    n = len(data["y"])
    sd = 1 / math.sqrt(n + 1)
    return {"mu": data["y"].sum() / (n + 1) + sd * (shift + width * torch.randn(num, dtype=torch.float64))}


def narrow(data):
    return exact(data, width=0.7)


def calibrate(fit, **options):
    """Without the log-likelihood, which needs each data set's model to be traced."""
    settings = {"num_simulations": 150, "num_draws": 99, "seed": 1, "log_likelihood": False}
    return flowvi.sbc(model, (Y,), **(settings | options), fit=fit)


@pytest.fixture(scope="module")
def right():
    return calibrate(exact, num_simulations=60, log_likelihood=True)


def test_exact_draws_pass(right):
    assert right.passed
    assert right.names == ("mu", "log_likelihood")
    assert right.ranks.shape == (60, 2)
    assert right.ranks.min() >= 0
    assert right.ranks.max() <= 99
    assert not right.failures
    assert right.trusted == (None,) * 60
    assert "Calibrated" in right.verdict
    assert "mu" in str(right)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0.7}, "draws too narrow"),
        ({"width": 1.5}, "draws too wide"),
        ({"shift": 0.4}, "draws too high"),
        ({"shift": -0.4}, "draws too low"),
    ],
)
def test_wrong_draws_are_caught(options, words):
    found = calibrate(lambda data: exact(data, **options))
    assert not found.passed
    assert found.adjusted["mu"] <= found.alpha
    assert words in found.verdict


def test_the_prior_in_place_of_the_posterior_is_caught_by_the_likelihood_alone():
    found = calibrate(lambda _: {"mu": torch.randn(99, dtype=torch.float64)}, num_simulations=60, log_likelihood=True)
    assert found.p_values["mu"] > 0.01  # the prior's ranks in the prior are uniform
    assert found.p_values["log_likelihood"] < 1e-3
    assert not found.passed


def test_the_engines_fit_passes():
    options = {"num_flows": 0, "num_steps": 100, "whiten": False, "lr": 0.1}
    found = flowvi.sbc(model, (Y,), num_simulations=30, num_draws=99, seed=0, **options)
    assert found.passed, found
    assert None not in found.trusted


def test_seed_workers_and_callers_state():
    before = torch.get_rng_state()
    one = calibrate(narrow, num_simulations=12)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(one.ranks, calibrate(narrow, num_simulations=12).ranks)
    np.testing.assert_array_equal(one.ranks[:5], calibrate(narrow, num_simulations=5).ranks)
    assert not np.array_equal(one.ranks, calibrate(narrow, num_simulations=12, seed=2).ranks)


def test_two_workers_find_what_one_finds():
    one, two = (calibrate(narrow, num_simulations=6, workers=w) for w in (1, 2))
    np.testing.assert_array_equal(one.ranks, two.ranks)


def test_failures_and_doubts_are_counted():
    def fails(data):
        if data["y"].sum() > 2:
            raise RuntimeError("no convergence")
        return exact(data)

    found = calibrate(fails, num_simulations=40)
    sums = 40 - len(found.ranks)
    assert 0 < sums == len(found.failures)
    assert not found.passed
    assert "no convergence" in found.verdict
    assert found.num_simulations == 40
    poor = flowvi.sbc(model, (Y,), num_simulations=3, num_draws=9, seed=0, num_flows=0, num_steps=1, whiten=False)
    assert poor.num_untrusted == 3
    assert "not trusted" in poor.verdict

    def never(data):
        raise NonFiniteError("nothing is finite")

    with pytest.raises(TargetError, match=r"none of 3 .*nothing is finite"):
        calibrate(never, num_simulations=3)


def test_a_programming_error_is_no_failure_of_a_fit():
    with pytest.raises(KeyError, match="z"):
        calibrate(lambda data: data["z"], num_simulations=3)


def test_discrete_quantities_and_quantities_of_ones_own():
    def ours(values, data):
        return {"positive": values["mu"] > 0, "error": (values["mu"] - data["y"].mean()).abs()}

    found = calibrate(exact, quantities=ours)
    assert found.names[-2:] == ("positive", "error")
    assert found.passed


def test_data_sites_of_a_model_without_data():
    def generative():
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mu, 1.0))

    named = flowvi.sbc(generative, fit=exact, observed=["y"], num_simulations=15, num_draws=99, seed=1)
    assert named.names == ("mu", "log_likelihood")
    assert named.passed
    with pytest.raises(TargetError, match="no observed site"):
        flowvi.sbc(generative, fit=exact)
    with pytest.raises(OptionError, match="w, but the model's sites are mu, y"):
        flowvi.sbc(generative, fit=exact, observed=["w"])


def test_constant_elements_are_left_out():
    def correlated(y):
        chol = pyro.sample("chol", dist.LKJCholesky(2, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=chol), obs=y)

    found = flowvi.sbc(
        correlated, (torch.zeros(2),), num_simulations=5, num_draws=9, seed=0, num_flows=0, num_steps=5, whiten=False
    )
    assert found.names == ("chol[1,0]", "chol[1,1]", "log_likelihood")


def discrete(y):
    pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def factor(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("more", -mu.abs())
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def no_latent(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=2) as i:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (discrete, DiscreteLatentError, "k"),
        (improper, TargetError, "'mu'.*can't be simulated"),
        (factor, TargetError, "'more'.*pyro.factor"),
        (no_latent, NoLatentError, "no latent"),
        (subsampled, TargetError, "'data'.*subsample"),
    ],
)
def test_models_that_cannot_be_calibrated(bad, error, words):
    with pytest.raises(error, match=words):
        flowvi.sbc(bad, (torch.zeros(4),), num_simulations=2, num_steps=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_simulations": 0}, "num_simulations"),
        ({"num_draws": 2.5}, "num_draws"),
        ({"workers": -1}, "workers"),
        ({"alpha": 1.5}, "alpha"),
        ({"fit": 3}, "fit must be"),
        ({"observed": "y"}, "one string"),
        ({"observed": []}, "leaves out y"),
        ({"num_flows": 2}, "options of flowvi.fit"),
        ({"fit": None, "progress": False, "verify": True}, "verify"),
        ({"fit": None, "num_steps": 0}, "num_steps"),
        ({"fit": lambda _: {"mu": torch.zeros(5)}}, "5 draws of mu"),
        ({"fit": lambda _: {}}, "lack mu"),
        ({"fit": lambda _: 3}, "not a int"),
        ({"workers": 2, "fit": lambda data: data}, "picklable"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(OptionError, match=words):
        calibrate(**({"fit": exact, "num_simulations": 2} | options))


def test_a_target_without_data():
    with pytest.raises(TargetError, match="an energy or a log density"):
        flowvi.sbc(flowvi.energies.U1())
    with pytest.raises(TargetError, match="can't be called"):
        flowvi.sbc(model)


# the test of uniformity


def of_ranks(ranks, num_draws=19, **changes):
    """A calibration of ranks that are known."""
    ranks = np.atleast_2d(np.asarray(ranks).T).T
    given = {
        "names": tuple(f"q{i}" for i in range(ranks.shape[1])),
        "ranks": ranks,
        "num_draws": num_draws,
        "num_simulations": len(ranks),
        "trusted": (None,) * len(ranks),
        "failures": {},
        "warnings": {},
        "alpha": 0.05,
        "target": "model",
        "seed": 0,
        "seconds": 0.0,
    }
    return Calibration(**given | changes)


def test_the_binomial_tails_are_exact():
    num, points = 7, 3
    found = _coverage(num, points - 1)
    for k in (1, 2):
        mass = [math.comb(num, c) * (k / points) ** c * (1 - k / points) ** (num - c) for c in range(num + 1)]
        expected = [2 * min(sum(mass[: c + 1]), sum(mass[c:])) for c in range(num + 1)]
        np.testing.assert_allclose(found[k - 1], expected, rtol=1e-12)


def test_p_values_of_uniform_ranks_are_uniform():
    random = np.random.default_rng(5)
    ps = np.array(list(of_ranks(random.integers(0, 20, (50, 2000))).p_values.values()))
    for level in (0.01, 0.05, 0.2, 0.5):  # discrete: at most the level, and near to it
        assert abs((ps <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / 2000) + 0.01
    assert 1 / len(_null(50, 19, 10_000)) / 2 < ps.min()


def test_the_band_is_the_test():
    random = np.random.default_rng(6)
    inside, steps = [], np.arange(1, 20)
    for column in random.integers(0, 20, (50, 400)).T:
        one = of_ranks(column)
        low, high = one.band()
        ecdf = (column[None] < steps[:, None]).mean(1)
        inside.append(bool(((ecdf >= low - 1e-9) & (ecdf <= high + 1e-9)).all()))
        assert inside[-1] == one.passed
    assert 0.9 < np.mean(inside) < 1
    assert not any(of_ranks(column).passed for column in random.integers(0, 12, (50, 5)).T)


def test_holm_by_hand():
    found = of_ranks(np.zeros((10, 3), dtype=int))
    vars(found)["p_values"] = {"q0": 0.04, "q1": 0.01, "q2": 0.03}
    assert found.adjusted == pytest.approx({"q0": 0.06, "q1": 0.03, "q2": 0.06})


def test_chi_square_by_hand():
    found = of_ranks(np.repeat([0, 15], [15, 5]))  # two bins, 10 expected in each: (25 + 25) / 10 = 5
    assert found.chi_square["q0"] == pytest.approx(math.erfc(math.sqrt(5 / 2)), rel=1e-6)


# for people


def test_arviz_takes_it(right):
    data = right.to_arviz()
    assert "prior_sbc" in data.groups()
    assert data.prior_sbc.attrs["passed"] == 1
    np.testing.assert_allclose(data.prior_sbc["mu"].values[0], (right.ranks[:, 0] + 0.5) / 100)
    plots = pytest.importorskip("arviz_plots")
    tree = right.to_arviz("datatree")
    assert tree["prior_sbc"]["mu"].shape == (1, 60)
    plots.plot_ecdf_pit(tree, backend="none")
    with pytest.raises(OptionError, match="kind must be"):
        right.to_arviz("csv")


def test_pictures(right):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    axes = right.plot()
    assert [axis.get_title().split(" ")[0] for axis in axes] == ["mu", "log_likelihood"]
    line = axes[0].lines[0].get_ydata()
    assert len(line) == 99
    assert abs(line).max() < 0.25
    _, own = plt.subplots(1, 1)
    assert right.plot("hist", names=["mu"], ax=own)[0] is own
    assert sum(bar.get_height() for bar in own.patches) == 60
    with pytest.raises(OptionError, match="kind"):
        right.plot("pie")
    with pytest.raises(OptionError, match="nu"):
        right.plot(names=["nu"])
    with pytest.raises(OptionError, match="2 panels"):
        right.plot(ax=own)
    plt.close("all")


@pytest.mark.slow
def test_corrected_draws_of_three_models_are_calibrated_and_spoiled_ones_are_caught():
    from experiments.calibration import MODELS, SPOILED, Config, run

    passed = {(row["model"], row["draws"]): row["passed"] for row in run(Config(), progress=False).rows}
    assert {model for model in MODELS if not passed[model, "resampled"]} == set()
    assert {(model, way) for model in MODELS for way in SPOILED if passed[model, way]} == set()
    assert passed["normal", "as fitted"]
    assert passed["logistic", "as fitted"]


def test_what_a_reparametrized_site_became_is_no_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    noncentred = poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})
    found = Simulator.of(noncentred, (torch.zeros(3),), None, None, None, None, 0)
    assert found.observed == ("y",)
    assert set(found.latent) == {"mu", "theta_decentered", "theta"}
    values, data = found.draw(1)
    torch.testing.assert_close(values["theta"], values["mu"] + 2 * values["theta_decentered"])
    density = found.density(data)
    assert set(density.observed) == {"y"}
    assert [site.name for site in density.deterministic] == ["theta"]
