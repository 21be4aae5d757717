"""Targets at the edges: no particles, failed factorizations without a graph, bad options, global state, references."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.settings
import pytest
import torch
from pyro.distributions import constraints

from flowvi import errors
from flowvi.targets import as_density

F64 = torch.float64
Y = torch.linspace(-1, 2, 12)


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def branching(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def subsampling(y, part=4):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=part) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def with_parameter(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.param("scale", lambda: torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def stochastic(y):
    mu = pyro.sample("mu", dist.Normal(torch.rand(()), 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


def raises_late(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.param("made by the model", torch.tensor(1.0))
    raise KeyError("no such column")


@pytest.mark.filterwarnings("ignore::flowvi.errors.SlowPathWarning")
@pytest.mark.parametrize(("model", "args"), [(regression, (torch.ones(12, 2), Y)), (branching, (Y,))])
def test_no_particles_have_empty_answers(model, args):
    density = as_density(model, args=args, dtype=F64)
    z = torch.zeros(0, density.dim, dtype=F64)
    value, grad = density.value_and_grad(z)
    assert (density(z).shape, value.shape, grad.shape) == ((0,), (0,), (0, density.dim))
    values = density.constrain(z)
    assert {s.name: tuple(values[s.name].shape) for s in density.sites} == {
        s.name: (0, *s.shape) for s in density.sites
    }
    back, log_det = density.unconstrain(values)
    assert (back.shape, log_det.shape) == ((0, density.dim), (0,))
    assert density.log_likelihood(z)["y"].shape == (0, 12)


@pytest.mark.parametrize("branch", [False, True], ids=["graph", "eager"])
@pytest.mark.filterwarnings("ignore::flowvi.errors.SlowPathWarning")
def test_a_failed_factorization_is_one_particles_trouble_on_both_paths(branch):
    def model():
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        if branch and rho > 100:
            return
        cov = torch.eye(2) + rho * (1 - torch.eye(2))  # positive definite for |rho| < 1 alone
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), cov), obs=torch.ones(2))

    density = as_density(model, dtype=F64)
    assert density.path == ("eager" if branch else "graph")
    z = torch.tensor([[0.5], [1.5], [-0.3], [-2.0]], dtype=F64)
    value, grad = density.value_and_grad(z)
    assert value.isfinite().tolist() == [True, False, True, False]
    assert grad[::2].isfinite().all()
    rho = z[::2, 0]  # the quadratic form at (1, 1) is 2 / (1 + rho)
    expected = dist.Normal(0.0, 1.0).log_prob(rho) - math.log(2 * math.pi)
    expected = expected - (1 - rho**2).log() / 2 - 1 / (1 + rho)
    torch.testing.assert_close(value[::2], expected)
    torch.testing.assert_close(density(z).detach(), value, equal_nan=True)


class Bowl:
    dim = 2

    def log_density(self, z):
        return -z.square().sum(-1) / 2


@pytest.mark.parametrize(
    ("target", "options", "error", "text"),
    [
        (regression, {"args": "xy"}, errors.OptionError, "args must be a tuple"),
        (regression, {"args": 3}, errors.OptionError, "args must be a tuple"),
        (regression, {"kwargs": (Y,)}, errors.OptionError, "kwargs must be a dict"),
        (Bowl(), {"args": (Y,)}, errors.OptionError, "belong to Pyro models"),
        (Bowl(), {"dtype": "float32"}, errors.OptionError, "torch.float32 or torch.float64"),
        (lambda z: -z.square(), {"dim": 1}, errors.DimensionError, r"returned \(20, 1\), expected \(20,\)"),
        (lambda z: -z.square().sum(0), {"dim": 20}, errors.DimensionError, r"returned \(20,\), expected \(21,\)"),
        (lambda z: 0.0, {"dim": 2}, errors.DimensionError, "returned float"),
        (lambda z: z.sum(1), {"dim": True}, errors.OptionError, "dim must be a positive integer.*got True"),
        (lambda z: torch.as_tensor(z.numpy().sum(1)), {"dim": 2}, errors.TargetError, "numpy"),
    ],
)
def test_bad_options_are_named(target, options, error, text):
    with pytest.raises(error, match=text):
        as_density(target, **options)


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize(
    ("model", "raised"),
    [
        (branching, None),
        (subsampling, None),
        (with_parameter, None),
        (stochastic, errors.TargetError),
        (raises_late, errors.TargetError),
    ],
)
@pytest.mark.filterwarnings("ignore::flowvi.errors.FlowVIWarning")
def test_every_global_is_left_as_it_was(model, raised, validation):
    def state():
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002 - the global state is what is looked at
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            {k: v for k, v in pyro.settings.get().items() if k.startswith("validat")},
            list(pyro.get_param_store().keys()),
            len(pyro.poutine.runtime._PYRO_STACK),
        )

    with pyro.settings.context(validate_distributions_pyro=validation, validate_distributions_torch=validation):
        before = state()
        if raised is None:
            density = as_density(model, args=(Y,), dtype=F64)
            z = torch.zeros(3, density.dim, dtype=F64)
            density(z)
            density.value_and_grad(z)
            density.unconstrain(density.constrain(z))
            density.log_likelihood(z)
            assert density.full.dim == density.dim
        else:
            with pytest.raises(raised):
                as_density(model, args=(Y,), dtype=F64)
        assert state() == before


def test_a_parameter_is_announced_once_and_nothing_else_is():
    with pytest.warns(errors.HeldFixedWarning, match="present values: scale") as caught:
        density = as_density(with_parameter, args=(Y,), dtype=F64)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.value_and_grad(torch.zeros(2, 1, dtype=F64))


def test_a_flat_graph_reads_parameters_live():
    pyro.param("scale", torch.tensor(1.0, dtype=F64), constraint=constraints.positive)
    with pytest.warns(errors.HeldFixedWarning):
        density = as_density(with_parameter, args=(Y,), dtype=F64)
    z = torch.tensor([[0.5]], dtype=F64)
    for _ in range(12):
        density.value_and_grad(z)
    with torch.no_grad():
        pyro.param("scale").unconstrained().fill_(math.log(2.0))
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(z, 2.0).log_prob(Y.double()).sum(1)
    torch.testing.assert_close(density.value_and_grad(z)[0], expected)


def test_a_generators_seed_repeats_the_indices():
    density = as_density(subsampling, args=(Y,), dtype=F64)
    z = torch.full((3, 1), 0.3, dtype=F64)
    density.generator.manual_seed(5)
    first, second = density(z), density(z)
    density.generator.manual_seed(5)
    assert torch.equal(density(z), first)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, first[:1].expand(3))  # the particles of a call share them


def test_a_float64_argument_decides_the_dtype():
    assert as_density(branching_free, kwargs={"data": {"y": [Y]}}).dtype == torch.float32
    density = as_density(branching_free, kwargs={"data": {"y": [Y.double()]}})
    assert density.dtype == F64
    assert density(torch.zeros(1, 1)).dtype == F64


def branching_free(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([12]).to_event(1), obs=data["y"][0])


# At draws from the posterior the gradient of log p averages to zero: a wrong density shows.


def eight_schools(d):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(d["y"])):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def kidscore(d):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * d["mom_hs"] + beta[2] * d["mom_iq"]
    pyro.sample("score", dist.Normal(mean, sigma).to_event(1), obs=d["kid_score"])


def ar_k(d):
    y, order = d["y"], int(d["K"])
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha
    for k in range(order):
        mean = mean + beta[k] * y[order - k - 1 : len(y) - k - 1]
    pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y[order:])


def mesquite(d):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (6,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    area = d["diam1"] * d["diam2"]
    columns = [area * d["canopy_height"], area, d["diam1"] / d["diam2"], d["total_height"]]
    x = torch.stack([torch.ones_like(area), *[c.log() for c in columns], d["group"]], 1)
    pyro.sample("log_weight", dist.Normal(x @ beta, sigma).to_event(1), obs=d["weight"].log())


def gauss_mix(d):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    mix = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(d["y"])):
        pyro.sample("y", dist.MixtureSameFamily(mix, dist.Normal(mu, sigma)), obs=d["y"])


def gp_regression(d):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    square = (d["x"][:, None] - d["x"]) ** 2
    cov = alpha**2 * torch.exp(-square / (2 * rho**2)) + sigma * torch.eye(len(d["x"]))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(d["x"])), cov), obs=d["y"])


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("eight_schools_noncentered", eight_schools),
        ("kidscore_momhsiq", kidscore),
        ("arK", ar_k),
        ("logmesquite_logvash", mesquite),
        ("low_dim_gauss_mix", gauss_mix),
        ("gp_regr", gp_regression),
    ],
)
def test_reference_draws_are_draws_from_the_density(name, model, references):
    data = {k: torch.as_tensor(v).double() for k, v in np.load(references / name / "data.npz").items()}
    draws = {k: torch.as_tensor(v[::10]).double() for k, v in np.load(references / name / "draws.npz").items()}
    if "theta" in draws and "tau" in draws:
        draws["theta_trans"] = (draws["theta"] - draws["mu"][:, None]) / draws["tau"][:, None]
    density = as_density(model, args=(data,))
    assert (density.path, density.dtype) == ("graph", F64)
    z, _ = density.unconstrain(draws)
    value, score = density.value_and_grad(z)
    assert value.isfinite().all()
    assert score.isfinite().all()
    back = density.constrain(z)
    for site, x in draws.items():
        torch.testing.assert_close(back[site], x, rtol=1e-6, atol=1e-6)
    error = score.std(0) / math.sqrt(len(score) / 2)  # a chain's draws: allow for some autocorrelation
    assert (score.mean(0).abs() < 4.5 * error).all()


# Functions that fail at some rows, after they worked at the first points.


def scaled(z):
    """Its second coordinate is the log of a scale, which torch refuses where it underflows."""
    return dist.Normal(0.0, z[:, 1].exp()).log_prob(z[:, 0]) - 0.5 * z[:, 1].square()


def of_matrix(z):
    """[[1, a], [a, 1]] has no Cholesky factor from |a| = 1 on, nor has a batch that holds one such."""
    a = z[:, 0] / 3
    one = torch.ones_like(a)
    matrix = torch.stack([torch.stack([one, a], -1), torch.stack([a, one], -1)], -1)
    return torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1) - z.square().sum(-1)


@pytest.mark.parametrize(("function", "bad"), [(scaled, (0.0, -1e6)), (of_matrix, (4.0, 0.0))])
@pytest.mark.parametrize("where", [[0], [63], [5, 6, 40], list(range(50))])
def test_rows_that_a_function_refuses_are_nan_and_the_others_as_ever(function, bad, where):
    density = as_density(function, dim=2, dtype=F64)
    z = torch.rand(64, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    value, grad = density.value_and_grad(z)
    spoiled = z.clone()
    spoiled[where] = torch.tensor(bad, dtype=F64)
    with pytest.raises((ValueError, RuntimeError)):
        function(spoiled)
    found, found_grad = density.value_and_grad(spoiled)
    fine = torch.tensor([i not in where for i in range(64)])
    assert found[~fine].isnan().all()
    torch.testing.assert_close(found[fine], value[fine])
    torch.testing.assert_close(found_grad[fine], grad[fine])
    torch.testing.assert_close(density(spoiled)[fine], value[fine])


def test_a_function_that_refuses_every_row_is_an_error():
    density = as_density(scaled, dim=2, dtype=F64)
    with pytest.raises(errors.TargetError, match=r"failed with ValueError: .*scale"):
        density.value_and_grad(torch.full((8, 2), -1e6, dtype=F64))


def test_so_many_calls_are_enough_to_find_refused_rows(monkeypatch):
    density = as_density(scaled, dim=2, dtype=F64)
    calls, real = [], density._function
    monkeypatch.setattr(density, "_function", lambda z: calls.append(len(z)) or real(z))
    z = torch.rand(4096, 2, dtype=F64)
    z[::2, 1] = -1e6
    value = density(z)
    assert len(calls) < 1100
    assert value[::2].isnan().all()
    assert 0 < value[1::2].isfinite().sum() < 2048  # those that were not looked at count as refused
