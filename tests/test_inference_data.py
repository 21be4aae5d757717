"""A posterior as ArviZ's InferenceData (0.x) and DataTree (1.x): groups, names, and ArviZ's own functions on it."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

import flowvi.inference_data
from flowvi._version import __version__
from flowvi.errors import OptionError, TargetError
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.history import History
from flowvi.posterior import Posterior
from flowvi.targets import as_density

KINDS = ["inference_data", "datatree"]
ALL = {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"}
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
    assert groups(data) == ALL
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
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "school")
    assert data["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(data["posterior"]["school"].values, np.arange(8))


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_carry_the_diagnosis(posterior, kind):
    data = convert(posterior, kind)
    diagnosis = posterior.diagnose()
    for attrs in (data.attrs, data["posterior"].attrs):
        assert attrs["inference_library"] == "flowvi"
        assert attrs["inference_library_version"] == __version__
        assert attrs["pyro_version"] == pyro.__version__
        assert attrs["torch_version"] == torch.__version__
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
    assert data["posterior_predictive"]["data"].dims[2:] == ("rows", "columns", "data_dim_2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_reparametrized_site_belongs_to_the_draws_and_not_to_the_data(kind):
    fit = make(poutine.reparam(schools, config={"mu": LocScaleReparam(0.0)}), Y, SIGMA)
    names = {"mu_decentered", "mu", "tau", "eta", "theta"}
    assert set(fit.sample(2)) == names
    data = convert(fit, kind, num_samples=20)
    assert set(data["posterior"].data_vars) == names
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert set(data[group].data_vars) == {"y"}


@pytest.mark.parametrize("names", [("draw", "x", "y"), ("z", "chain", "y"), ("z", "x", "draw")])
def test_a_site_named_after_a_dimension_of_arviz_is_refused(names):
    latent, computed, data = names

    def model(y):
        z = pyro.sample(latent, dist.Normal(y.new_zeros(()), 1.0))
        pyro.deterministic(computed, z + 1)
        with pyro.plate("school", len(y)):
            pyro.sample(data, dist.Normal(z, 1.0), obs=y)

    fit = make(model, Y)
    with pytest.raises(OptionError, match=r"the site '(draw|chain)' of model has the name .* rename it"):
        fit.to_arviz(num_samples=20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_callable_has_no_likelihood(kind):
    energy = make(lambda z: -z.square().sum(-1), dim=3)
    data = convert(energy, kind)
    assert groups(data) == {"posterior", "sample_stats"}
    assert "predictive_left_out" not in data.attrs
    with pytest.raises(TargetError, match="no observed site"):
        convert(energy, kind, predictive=True)
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
    table = az.compare({"one": data, "other": convert(posterior, "inference_data", num_samples=2000)}, ic="loo")
    assert set(table.index) == {"one", "other"}


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
    table = stats.compare({"one": data, "other": convert(posterior, "datatree", num_samples=2000)})
    assert set(table.index) == {"one", "other"}


@pytest.fixture
def agg():
    """Pictures without a screen, closed afterwards."""
    matplotlib = need("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    need("matplotlib.pyplot").close("all")
    matplotlib.use(before)


@pytest.mark.filterwarnings("ignore")
def test_pictures_of_arviz_0(posterior, agg):
    az = need("arviz")
    data = convert(posterior, "inference_data", num_samples=200)
    assert az.plot_pair(data, var_names=["mu", "tau"]) is not None
    (axes,) = az.plot_forest(data, var_names=["theta"], combined=True)
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "theta[0]"
    az.plot_ppc(data, num_pp_samples=10)


@pytest.mark.filterwarnings("ignore")
def test_pictures_of_arviz_1(posterior, agg):
    plots = need("arviz_plots")
    data = convert(posterior, "datatree", num_samples=200)
    for picture in (
        plots.plot_pair(data, var_names=["mu", "tau"], backend="matplotlib"),
        plots.plot_forest(data, var_names=["theta"], backend="matplotlib"),
        plots.plot_ppc_dist(data, num_samples=10, backend="matplotlib"),
    ):
        assert "figure" in picture.viz


# simulated data


def simulate(posterior, num=4000, seed=3):
    values = posterior.sample(num, seed=1)
    return values, flowvi.inference_data._simulate(posterior.density, values, seed)


def one_by_one(monkeypatch):
    """Draw after draw, as for a model that vmap doesn't take."""

    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr(torch.func, "vmap", fail)


@pytest.mark.parametrize("way", ["together", "one by one"])
def test_simulated_data_belong_to_their_draws(posterior, way, monkeypatch):
    if way == "one by one":
        one_by_one(monkeypatch)
    num = 4000 if way == "together" else 500
    values, data = simulate(posterior, num)
    noise = (data["y"] - values["theta"]) / SIGMA  # standard normal, independent over draws and schools
    assert noise.mean().abs() < 4 / (8 * num) ** 0.5
    assert noise.std() == pytest.approx(1, abs=4 / (16 * num) ** 0.5)
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 5 / num**0.5
    again = simulate(posterior, num)[1]
    assert torch.equal(again["y"], data["y"])
    assert not torch.equal(simulate(posterior, num, seed=4)[1]["y"], data["y"])


def kinds_of_data(whole):
    zero = torch.zeros((), dtype=torch.float64)
    rate = pyro.sample("rate", dist.Gamma(zero + 3.0, 1.0))
    pyro.sample("broadcast", dist.Normal(zero, 1.0), obs=torch.zeros(6, dtype=torch.float64))
    pyro.factor("prior", -rate.square())
    state = rate
    for t in range(3):  # each step reads what the step before has observed
        state = pyro.sample(f"step_{t}", dist.Normal(state + 10.0, 0.01), obs=zero)
    with pyro.plate("part", 50, subsample_size=None if whole else 5) as index:
        pyro.sample("counts", dist.Poisson(rate).expand([len(index)]), obs=torch.arange(50.0).double()[index])


@pytest.mark.parametrize("whole", [True, False])
def test_simulated_data_of_many_kinds(whole):
    posterior = make(kinds_of_data, whole)
    values, data = simulate(posterior, 2000)
    assert {name: tuple(value.shape[1:]) for name, value in data.items()} == {
        "broadcast": (6,),
        **{f"step_{t}": () for t in range(3)},
        "counts": (50,),
    }
    assert data["broadcast"].std() == pytest.approx(1, abs=0.05)
    assert data["broadcast"].std(1).min() > 0  # six draws, not one six times
    torch.testing.assert_close(data["step_2"], values["rate"] + 30, atol=0.1, rtol=0)
    counts = data["counts"]
    assert torch.equal(counts, counts.round())
    assert (counts - values["rate"][:, None]).div(values["rate"][:, None].sqrt()).std() == pytest.approx(1, abs=0.03)


def two_ways():
    loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    scale = pyro.sample("scale", dist.Gamma(5.0, 5.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(loc, scale), obs=torch.tensor([0.1, 0.2, 0.4, 0.3]))
        pyro.sample("t", dist.StudentT(9.0, loc, scale), obs=torch.zeros(4))  # its draws can't be batched


def test_an_improper_prior_and_draws_that_cannot_be_batched():
    values, data = simulate(make(two_ways), 1000)
    for name in ("y", "t"):
        noise = (data[name] - values["loc"][:, None]) / values["scale"][:, None]
        assert noise.abs().median() == pytest.approx(0.68 if name == "y" else 0.70, abs=0.05)


def slopes(x, y):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson(torch.exp(slope * x)), obs=y)


def test_the_draws_are_those_of_pyros_predictive():
    """The same distribution at fixed latents, by the mean and the variance of each datum."""
    x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    latent = {"slope": torch.full((2000,), 0.7, dtype=torch.float64)}
    predictive = pyro.infer.Predictive(pyro.poutine.uncondition(slopes), latent, return_sites=["y"])
    theirs = predictive(x, x.round())["y"].reshape(2000, 3)
    ours = flowvi.inference_data._simulate(make(slopes, x, x.round()).density, latent, 3)["y"]
    for draws in (theirs, ours):
        rate = torch.exp(0.7 * x)
        assert ((draws.mean(0) - rate) / rate.sqrt()).abs().max() < 4 / 2000**0.5
        assert (draws.var(0) / rate - 1).abs().max() < 0.2


class DensityOnly(dist.Normal):
    def sample(self, *args, **kwargs):
        raise NotImplementedError("no draws")

    rsample = sample


def cannot_be_simulated():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", DensityOnly(mu, 1.0), obs=torch.zeros(()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_draws_is_left_out_or_refused(kind):
    posterior = make(cannot_be_simulated)
    data = convert(posterior, kind, num_samples=100)
    assert groups(data) == ALL - {"posterior_predictive"}
    assert "NotImplementedError: no draws" in data.attrs["predictive_left_out"]
    with pytest.raises(TargetError, match=r"predictive=\s?False"):
        convert(posterior, kind, predictive=True)
    assert "predictive_left_out" not in convert(posterior, kind, predictive=False).attrs


@pytest.mark.parametrize("kind", KINDS)
def test_without_simulated_data(posterior, kind):
    assert groups(convert(posterior, kind, predictive=False)) == ALL - {"posterior_predictive"}


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
