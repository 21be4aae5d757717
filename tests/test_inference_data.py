"""A posterior as ArviZ's InferenceData (0.x) and DataTree (1.x): groups, names, and ArviZ's own functions on it."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi.inference_data
from flowvi._version import __version__
from flowvi.errors import OptionError
from flowvi.flow import Flow, FlowSpec
from flowvi.posterior import History, Posterior
from flowvi.targets import as_density

KINDS = ["inference_data", "datatree"]
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_full((), 5.0)))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def make(model, *args, dim=None):
    device = torch.device("cpu")
    density = as_density(model, args=args, kwargs={}, dim=dim, dtype=torch.float64, device=device)
    spec = FlowSpec("planar", density.dim, 2, "diag", {})
    flow = Flow.from_spec(spec, scale=0.5, dtype=torch.float64, device=device)
    history = History(torch.arange(2), torch.zeros(2), torch.ones(2))
    return Posterior(flow, density, config={}, timing={}, history=history, seed=0)


@pytest.fixture(scope="module")
def posterior():
    return make(schools, Y, SIGMA)


def need(name):
    """Skip where ArviZ can't be imported: 0.23 fails beside arviz-plots 0.8 and matplotlib 3.11."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} can't be imported here: {error!r}")


def convert(posterior, kind, **options):
    need("arviz" if kind == "inference_data" else "arviz_base")
    return posterior.to_arviz(kind, **({"num_samples": 500} | options))


def groups(data):
    return {name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)} - {""}


@pytest.mark.parametrize("kind", KINDS)
def test_groups_hold_the_draws_and_their_densities(posterior, kind):
    data = convert(posterior, kind, seed=5)
    assert groups(data) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    draws = data["posterior"]
    assert set(draws.data_vars) == {"mu", "tau", "eta", "theta"}
    assert draws["theta"].shape == (1, 500, 8)
    expected = posterior.sample(500, seed=5)
    for name, value in expected.items():
        np.testing.assert_array_equal(draws[name].values[0], value.numpy())
    stats = data["sample_stats"]
    np.testing.assert_allclose(stats["log_weight"].values, stats["lp"].values - stats["log_q"].values)
    z, log_jacobian = posterior.density.unconstrain({name: expected[name] for name in ("mu", "tau", "eta")})
    np.testing.assert_allclose(stats["lp"].values[0], posterior.density(z).numpy())
    log_q = (posterior.log_prob(expected) - log_jacobian).numpy()
    np.testing.assert_allclose(stats["log_q"].values[0], log_q, rtol=1e-6)
    likelihood = dist.Normal(expected["theta"], SIGMA).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], likelihood.numpy())
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_are_named_after_plates_and_shared(posterior, kind):
    data = convert(posterior, kind)
    assert data["posterior"]["eta"].dims == ("chain", "draw", "school")
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert data["posterior"]["mu"].dims == ("chain", "draw")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert data["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(data["posterior"]["school"].values, np.arange(8))


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_carry_the_diagnosis(posterior, kind):
    data = convert(posterior, kind)
    diagnosis = posterior.diagnose()
    for attrs in (data.attrs, data["posterior"].attrs):
        assert attrs["inference_library"] == "flowvi"
        assert attrs["inference_library_version"] == __version__
        assert attrs["khat"] == diagnosis.khat
        assert attrs["elbo"] == diagnosis.elbo
        assert attrs["elbo_se"] == diagnosis.elbo_se
        assert attrs["log_evidence"] == diagnosis.log_evidence
        assert attrs["trusted"] == int(diagnosis.trusted)
        assert attrs["verdict"] == diagnosis.verdict
        assert attrs["resampled"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_resampled_draws(posterior, kind):
    data = convert(posterior, kind, resample=True, seed=1)
    assert data.attrs["resampled"] == 1
    np.testing.assert_array_equal(data["posterior"]["mu"].values[0], posterior.resample(500, seed=1)["mu"].numpy())
    assert data["sample_stats"]["lp"].shape == (1, 500)


def plates_and_events():
    zero = torch.zeros((), dtype=torch.float64)
    with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
        x = pyro.sample("x", dist.Normal(zero, 1.0).expand([2]).to_event(1))
        pyro.sample("data", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(3, 4, 2, dtype=torch.float64))
    with pyro.plate("chain", 5):  # a name that ArviZ keeps for itself
        pyro.sample("y", dist.Normal(zero, 1.0))
    with pyro.plate("again", 2):
        pyro.sample("first", dist.Normal(zero, 1.0))
    pyro.sample("w", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_event_dimensions_and_names_that_clash(kind):
    data = convert(make(plates_and_events), kind, num_samples=100)
    dims = {name: value.dims[2:] for name, value in data["posterior"].data_vars.items()}
    assert dims == {
        "x": ("rows", "columns", "x_dim_2"),
        "y": ("chain_dim",),
        "first": ("again",),
        "w": ("w_dim_0",),
    }
    assert data["log_likelihood"]["data"].shape == (1, 100, 3, 4)
    assert data["log_likelihood"]["data"].dims[2:] == ("rows", "columns")
    assert data["observed_data"]["data"].dims == ("rows", "columns", "data_dim_2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_callable_has_no_likelihood(kind):
    data = convert(make(lambda z: -z.square().sum(-1), dim=3), kind)
    assert groups(data) == {"posterior", "sample_stats"}
    assert data["posterior"]["z"].dims == ("chain", "draw", "z_dim_0")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_functions_of_arviz_0(posterior):
    az = need("arviz")
    data = convert(posterior, "inference_data", num_samples=2000)
    assert isinstance(data, az.InferenceData)
    summary = az.summary(data, round_to="none")
    assert summary.loc["eta[3]", "mean"] == pytest.approx(float(data.posterior["eta"][0, :, 3].mean()))
    loo = az.loo(data)
    assert loo.n_data_points == 8
    assert np.isfinite(loo.elpd_loo)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_functions_of_arviz_1(posterior):
    stats, xarray = need("arviz_stats"), need("xarray")
    data = convert(posterior, "datatree", num_samples=2000)
    assert isinstance(data, xarray.DataTree)
    summary = stats.summary(data, round_to="none")
    assert float(summary.loc["eta[3]", "mean"]) == pytest.approx(float(data["posterior"]["eta"][0, :, 3].mean()))
    loo = stats.loo(data)
    assert loo.n_data_points == 8
    assert np.isfinite(loo.elpd)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_through_a_file(posterior, kind, tmp_path):
    need("h5netcdf")
    data = convert(posterior, kind)
    path = str(tmp_path / "fit.nc")
    data.to_netcdf(path)
    back = need("arviz").from_netcdf(path) if kind == "inference_data" else need("xarray").open_datatree(path)
    assert back["posterior"].attrs["khat"] == posterior.diagnose().khat
    np.testing.assert_array_equal(back["posterior"]["mu"].values, data["posterior"]["mu"].values)
    back.close()


def test_kind_follows_the_installed_arviz(posterior, monkeypatch):
    need("arviz_base")
    for version, expected in (("0.23.4", "InferenceData"), ("1.2.0", "DataTree"), (None, "DataTree")):

        def installed(name, version=version):
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        if version == "0.23.4":
            need("arviz")
        monkeypatch.setattr(flowvi.inference_data.importlib.metadata, "version", installed)
        assert type(posterior.to_arviz(num_samples=100)).__name__ == expected


def test_an_arviz_that_cannot_be_imported_is_passed_over(posterior, monkeypatch):
    need("arviz_base")
    monkeypatch.setattr(flowvi.inference_data.importlib.metadata, "version", lambda name: "0.23.4")
    monkeypatch.setitem(sys.modules, "arviz", None)
    assert type(posterior.to_arviz(num_samples=100)).__name__ == "DataTree"
    with pytest.raises(OptionError, match="pip install 'arviz<1'"):
        posterior.to_arviz("inference_data")
    with pytest.raises(OptionError, match="kind must be one of inference_data, datatree"):
        posterior.to_arviz("xarray")
