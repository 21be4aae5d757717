"""Targets: traced models equal Pyro's own log joint; sites, supports, plates; what can't be used is named."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, SplitReparam, TransformReparam
from torch.distributions import biject_to

import flowvi
from flowvi import errors
from flowvi.targets import as_density
from flowvi.targets.compiling import compile_flat

F64 = torch.float64


def pyro_log_joint(model, args, density, z):
    """The log joint, log p(x(z)) + log|dx/dz|, by Pyro's own handlers, one particle at a time."""
    values = density.constrain(z)
    out = []
    for i in range(len(z)):
        data = {s.name: values[s.name][i] for s in density.sites}
        trace = poutine.trace(poutine.condition(model, data)).get_trace(*args)
        log_det = 0.0
        for site in density.sites:
            to_x = biject_to(trace.nodes[site.name]["fn"].support)
            u = to_x.inv(data[site.name])
            log_det = log_det + to_x.log_abs_det_jacobian(u, data[site.name]).sum()
        out.append(trace.log_prob_sum() + log_det)
    return torch.stack(out)


# Four models as ordinary users write them, none of them batched.


def regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + x @ beta, sigma), obs=y)


def groups(index, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", int(index.max()) + 1):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[index], 1.0), obs=y)


def over_time(y):
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    level = torch.tensor(0.0)
    for t in range(1, len(y)):
        level = phi * level + y[t - 1] * (1 - phi)
        pyro.sample(f"y_{t}", dist.Normal(level, sigma), obs=y[t])


def dependent(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(b, 0.1), obs=y)


def ordinary():
    torch.manual_seed(1)
    x = torch.randn(20, 3)
    return {
        "x @ beta": (regression, (x, x.sum(1) + 0.3 * torch.randn(20))),
        "a group index": (groups, (torch.randint(0, 5, (30,)), torch.randn(30))),
        "a loop over time": (over_time, (torch.randn(15),)),
        "a dependent support": (dependent, (torch.tensor(0.5),)),
    }


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", ordinary())
def test_traced_log_joint_is_pyros(name, dtype):
    model, args = ordinary()[name]
    density = as_density(model, args=args, dtype=dtype)
    assert density.path == "graph"
    z = torch.randn(8, density.dim, dtype=dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        expected = pyro_log_joint(model, density.args, density, z)
    finally:
        torch.set_default_dtype(default)
    tolerance = 1e-9 if dtype == F64 else 2e-4
    assert torch.allclose(density(z), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ordinary())
def test_gradient_is_that_of_the_value(name):
    model, args = ordinary()[name]
    density = as_density(model, args=args, dtype=F64)
    z = torch.randn(5, density.dim, dtype=F64)
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.grad(density(leaf).sum(), leaf)[0]
    for _ in range(12):  # past the point where the batched graph is flattened
        value, grad = density.value_and_grad(z)
    assert torch.allclose(value, density(z), atol=1e-10)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-9)
    step = torch.zeros_like(z)
    step[:, 0] = 1e-6
    slope = (density(z + step) - density(z - step)) / 2e-6
    assert torch.allclose(grad[:, 0], slope, rtol=1e-5, atol=1e-5)
    assert not value.requires_grad
    assert not grad.requires_grad


@pytest.mark.parametrize("name", ordinary())
def test_round_trip_and_jacobian(name):
    model, args = ordinary()[name]
    density = as_density(model, args=args, dtype=F64)
    z = torch.randn(4, density.dim, dtype=F64)
    back, log_det = density.unconstrain(density.constrain(z))
    assert torch.allclose(back, z, atol=1e-8)
    # In these models every site has as many coordinates as unconstrained ones, so autograd's Jacobian is square.
    x = torch.cat([density.constrain(z)[s.name].reshape(4, -1) for s in density.sites], 1)

    def to_z(row):
        pos, values = 0, {}
        for s in density.sites:
            values[s.name] = row[pos : pos + s.shape.numel()].reshape(1, *s.shape)
            pos += s.shape.numel()
        return density.unconstrain(values)[0][0]

    for row, found in zip(x, log_det, strict=True):
        expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(to_z, row))[1]
        assert found.item() == pytest.approx(expected.item(), abs=1e-8)


def many_supports():
    pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
    ordered = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    )
    pyro.sample("ordered", ordered)
    pyro.sample("chol", dist.LKJCholesky(3, 1.0))
    pyro.deterministic("odds", p / (1 - p))


def test_sites_know_their_shapes_supports_and_plates():
    density = as_density(many_supports, dtype=F64)
    weights, p, ordered, chol = density.sites
    assert (weights.shape, weights.unconstrained_shape) == ((3,), (2,))
    assert (p.shape, p.plates, p.event_dim) == ((2, 3), ("rows", "columns"), 0)
    assert ordered.event_dim == 1
    assert (chol.shape, chol.unconstrained_shape) == ((3, 3), (3,))
    assert density.dim == 2 + 6 + 3 + 3
    assert [s.name for s in density.deterministic] == ["odds"]
    z = torch.randn(5, density.dim, dtype=F64)
    x = density.constrain(z)
    assert list(x) == ["weights", "p", "ordered", "chol", "odds"]
    assert torch.allclose(x["weights"].sum(-1), torch.ones(5, dtype=F64))
    assert (x["ordered"].diff(dim=-1) > 0).all()
    assert torch.allclose(x["odds"], x["p"] / (1 - x["p"]))
    assert torch.allclose(density.unconstrain(x)[0], z, atol=1e-6)
    assert torch.allclose(density(z), pyro_log_joint(many_supports, (), density, z), atol=1e-8)


def reference_models():
    def eight_schools(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("J", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def gp(x, y):
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        k = alpha**2 * torch.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), k), obs=y)

    def mixture(y):
        ordered = dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 2.0).to_event(1), dist.transforms.OrderedTransform()
        )
        mu = pyro.sample("mu", ordered)
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        parts = dist.Normal(mu, sigma).log_prob(y[:, None]) + torch.stack([theta.log(), torch.log1p(-theta)])
        pyro.factor("likelihood", torch.logsumexp(parts, -1).sum())

    def ark(y):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        mean = alpha
        for k in range(5):
            mean = mean + beta[k] * y[4 - k : len(y) - 1 - k]
        pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y[5:])

    return {
        "eight_schools_noncentered": (eight_schools, ("y", "sigma")),
        "gp_regr": (gp, ("x", "y")),
        "low_dim_gauss_mix": (mixture, ("y",)),
        "arK": (ark, ("y",)),
    }


@pytest.mark.parametrize("name", reference_models())
def test_reference_models_are_traced(name, references):
    model, keys = reference_models()[name]
    data = np.load(references / name / "data.npz")
    args = tuple(torch.as_tensor(data[k]).double() for k in keys)
    density = as_density(model, args=args)
    assert (density.path, density.dtype) == ("graph", F64)
    z = 0.5 * torch.randn(4, density.dim, dtype=F64)
    torch.set_default_dtype(F64)
    try:
        expected = pyro_log_joint(model, args, density, z)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(density(z), expected, rtol=1e-8)


def test_control_flow_on_a_latent_falls_back_and_says_so():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = 1.0 if mu > 0 else 2.0
        pyro.sample("y", dist.Normal(mu, scale), obs=y)

    with pytest.warns(errors.SlowPathWarning, match=r"can't be traced: .*if mu > 0"):
        density = as_density(model, args=(torch.tensor(0.3),), dtype=F64)
    assert density.path == "eager"
    z = torch.tensor([[0.7], [-0.4]], dtype=F64)
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    expected = expected + dist.Normal(z[:, 0], torch.tensor([1.0, 2.0], dtype=F64)).log_prob(torch.tensor(0.3))
    assert torch.allclose(density(z), expected)
    leaf = z.clone().requires_grad_()
    assert torch.allclose(density.value_and_grad(z)[1], torch.autograd.grad(density(leaf).sum(), leaf)[0])
    assert torch.allclose(density.constrain(z)["mu"], z[:, 0])
    assert torch.allclose(density.unconstrain({"mu": z[:, 0]})[0], z)


def test_a_failed_factorization_is_one_particles_trouble():
    def model():
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        cov = torch.eye(2) + rho * (1 - torch.eye(2))  # not positive definite for |rho| >= 1
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), cov), obs=torch.zeros(2))

    density = as_density(model)
    value, _ = density.value_and_grad(torch.tensor([[0.5], [3.0], [-0.2]]))
    assert torch.isfinite(value[[0, 2]]).all()
    assert not torch.isfinite(value[1])


def subsampled(y, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=size) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def test_subsampled_data_are_drawn_afresh_and_unbiased():
    y = torch.randn(20, dtype=F64)
    density = as_density(subsampled, args=(y, 5))
    assert density.subsampled
    z = torch.tensor([[0.3], [-1.0]], dtype=F64)
    whole = as_density(subsampled, args=(y,))
    assert torch.allclose(density.full(z), whole(z))
    values = torch.stack([density(z) for _ in range(2000)])
    assert values.std(0).min() > 0
    error = values.mean(0) - whole(z)
    assert (error.abs() < 4 * values.std(0) / math.sqrt(2000)).all()
    assert torch.allclose(density.observed["y"], y)
    assert density.log_likelihood(z)["y"].shape == (2, 20)


def test_parameters_are_held_read_live_and_named():
    pyro.param("offset", torch.tensor(1.0))

    def model():
        x = pyro.sample("x", dist.Normal(pyro.param("offset"), 1.0))
        pyro.sample("y", dist.Normal(x, pyro.param("made_here", torch.tensor(2.0)).exp()), obs=torch.tensor(0.0))

    with pytest.warns(errors.HeldFixedWarning, match="made_here, offset"):
        density = as_density(model)
    assert list(pyro.get_param_store()) == ["offset"]
    z = torch.zeros(1, 1)
    before = density(z).item()
    with torch.no_grad():
        pyro.param("offset").unconstrained().add_(2.0)
    moved = dist.Normal(3.0, 1.0).log_prob(torch.tensor(0.0)) - dist.Normal(1.0, 1.0).log_prob(torch.tensor(0.0))
    assert density(z).item() == pytest.approx(before + moved.item(), abs=1e-5)


def test_modules_partials_and_keywords_are_models_too():
    class Model(pyro.nn.PyroModule):
        def forward(self, y, scale=1.0):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y, z = torch.tensor(0.4), torch.tensor([[0.2]])
    expected = dist.Normal(0.0, 3.0).log_prob(z[:, 0]) + dist.Normal(z[:, 0], 1.0).log_prob(y)
    for density in (
        as_density(Model(), args=(y,), kwargs={"scale": 3.0}),
        as_density(functools.partial(Model(), scale=3.0), args=(y,)),
    ):
        assert torch.allclose(density(z), expected)


def test_pointwise_likelihood_and_masks():
    y = torch.tensor([1.0, math.nan, 2.0])

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    density = as_density(model)
    z = torch.tensor([[0.5], [-0.5]])
    pointwise = density.log_likelihood(z)["y"]
    expected = dist.Normal(z, 1.0).log_prob(torch.tensor([1.0, 0.0, 2.0])) * torch.tensor([1.0, 0.0, 1.0])
    assert torch.allclose(pointwise, expected)
    assert torch.allclose(density(z), dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + expected.sum(-1))
    assert torch.isfinite(density.value_and_grad(z)[1]).all()


@pytest.mark.parametrize(
    ("reparam", "prior", "stretch"),
    [
        (LocScaleReparam(0.0), dist.Normal(1.0, 2.0), 2.0),
        (
            TransformReparam(),
            dist.TransformedDistribution(dist.Normal(0.0, 1.0), [torch.distributions.AffineTransform(1.0, 2.0)]),
            2.0,
        ),
        (SplitReparam([1, 1], -1), dist.Normal(torch.ones(2), 2.0).to_event(1), 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore::flowvi.errors.SlowPathWarning")  # Pyro's SplitReparam reads a latent's value
def test_a_reparametrized_site_is_deterministic_and_data_stay_data(reparam, prior, stretch):
    def model(y):
        with pyro.plate("group", 3):
            m = pyro.sample("m", prior)
            pyro.sample("fixed", dist.Delta(y), obs=y)  # data, though at a Delta
            pyro.sample("y", dist.Normal(m.reshape(3, -1).sum(-1), 1.0), obs=y)

    y = torch.arange(3.0)
    density = as_density(poutine.reparam(model, config={"m": reparam}), args=(y,))
    plain = as_density(model, args=(y,))
    assert [(s.name, s.plates) for s in density.deterministic] == [("m", ("group",))]
    assert density.deterministic[0].shape == plain.sites[0].shape
    assert set(density.observed) == {s.name for s in density.observed_sites} == {"fixed", "y"}
    z = torch.randn(5, density.dim)
    m = density.constrain(z)["m"]
    assert torch.allclose(density(z), plain(m.reshape(5, -1)) + 3 * math.log(stretch), atol=1e-4)
    assert set(density.log_likelihood(z)) == {"fixed", "y"}


def test_no_global_state_is_changed():
    def breaks(y):
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise RuntimeError("the model's own")

    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    as_density(regression, args=ordinary()["x @ beta"][1], dtype=F64)
    torch.set_rng_state(before[0])
    density = as_density(regression, args=ordinary()["x @ beta"][1], dtype=F64)
    torch.set_rng_state(before[0])
    density(torch.zeros(2, 5, dtype=F64))
    with pytest.raises(errors.TargetError, match="the model's own"):
        as_density(breaks, args=(torch.zeros(1),))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]
    assert torch.distributions.Distribution._validate_args == before[2]
    assert not list(pyro.get_param_store())


def test_plain_targets():
    density = as_density(lambda z: -0.5 * z.square().sum(-1), dim=3)
    assert (density.path, density.dim, density.sites[0].name) == ("callable", 3, "z")
    z = torch.randn(4, 3)
    assert torch.allclose(density.value_and_grad(z)[1], -z)
    energy = as_density(flowvi.energies.U1())
    assert energy.log_normalizer == pytest.approx(1.8775, abs=1e-3)
    trace = poutine.trace(poutine.condition(energy.pyro_model, {"z": z[0, :2]})).get_trace()
    assert trace.log_prob_sum().item() == pytest.approx(energy(z[:1, :2]).item(), rel=1e-5)
    assert as_density(energy) is energy


def nan_data():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(x, 1.0, validate_args=False), obs=torch.tensor([1.0, math.nan, 2.0]))


def stochastic():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x + torch.rand(()), 1.0), obs=torch.tensor(0.0))


def local_latents():
    with pyro.plate("rows", 10, subsample_size=3):
        pyro.sample("local", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: as_density(lambda: None), errors.NoLatentError, "no latent variable.*give dim=D"),
        (
            lambda: as_density(lambda: pyro.sample("k", dist.Bernoulli(0.5))),
            errors.DiscreteLatentError,
            "'k' .*discrete",
        ),
        (lambda: as_density(nan_data), errors.NonFiniteError, "data of site 'y' has 1 values that are NaN"),
        (lambda: as_density(stochastic), errors.TargetError, "another log density each time"),
        (lambda: as_density(local_latents), errors.SubsampledLatentError, "'local' .*'rows'.*Drop `subsample_size`"),
        (lambda: as_density(lambda z: z, dim=2), errors.DimensionError, "one log density for each row of z"),
        (lambda: as_density(lambda z: z.sum(), dim=2), errors.DimensionError, r"returned \(\), expected \(20,\)"),
        (lambda: as_density(lambda z: z @ torch.ones(3), dim=2), errors.DimensionError, "Is dim=2 right"),
        (lambda: as_density(lambda z: z.sum(-1) * math.nan, dim=2), errors.NonFiniteError, "finite at none of 20"),
        (lambda: as_density(lambda z: z.detach().sum(-1), dim=2), errors.TargetError, "has no gradient"),
        (lambda: as_density(lambda z: z.sum(-1), dim=0), errors.OptionError, "dim must be a positive integer"),
        (lambda: as_density(flowvi.energies.U1(), dim=3), errors.OptionError, "the energy has dim 2"),
        (lambda: as_density(regression, args=torch.zeros(3)), errors.OptionError, "args must be a tuple"),
        (lambda: as_density(regression, dtype=torch.float16), errors.OptionError, "float32 or torch.float64"),
        (lambda: as_density("model"), errors.TargetError, "a target is a Pyro model"),
        (lambda: as_density(lambda z: z.sum(-1), dim=2, args=(1,)), errors.OptionError, "belong to Pyro models"),
    ],
)
def test_what_cannot_be_used_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def gaussian(z):
    return -0.5 * z.square().sum(-1)


class OwnGradient:
    """An energy whose own gradient is what it is given."""

    dim, log_normalizer = 2, None

    def __init__(self, own):
        self.log_density, self.log_density_and_grad = gaussian, own


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (lambda z: gaussian(z) - gaussian(z).mean(), errors.TargetError, "mixes the rows of z"),
        (lambda z: gaussian(z).flip(0), errors.TargetError, "mixes the rows of z"),
        (lambda z: gaussian(z / z.std(0)), errors.TargetError, "mixes the rows of z"),
        (lambda z: gaussian(z) + torch.randn(len(z)), errors.TargetError, "other values each time"),
        (lambda z: gaussian(z) + 0j, errors.TargetError, "returned torch.complex64"),
        (lambda z: 1.0, errors.DimensionError, "returned float"),
        (OwnGradient(lambda z: (gaussian(z), z[:1])), errors.DimensionError, "log_density_and_grad of OwnGradient"),
        (OwnGradient(lambda z: (gaussian(z), z)), errors.TargetError, "another gradient than its log_density"),
        (OwnGradient(lambda z: (2 * gaussian(z), -z)), errors.TargetError, "another value than its log_density"),
    ],
)
def test_what_is_no_log_density_of_each_row_is_named(target, error, text):
    with pytest.raises(error, match=text):
        as_density(target, dim=2)


def test_what_a_function_raises_is_the_cause_of_a_typed_error():
    def late(z):
        if bool((z > 3).any()):
            raise KeyError("late")
        return gaussian(z)

    density = as_density(late, dim=2)
    for evaluate in (density, density.value_and_grad):
        with pytest.raises(errors.TargetError, match="KeyError: 'late'") as caught:
            evaluate(torch.full((5, 2), 4.0))
        assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [KeyError, NameError, AttributeError, AssertionError])
def test_what_a_model_raises_is_the_cause_of_a_typed_error(error):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise error("mine")

    with pytest.raises(errors.TargetError, match=f"{error.__name__}: .?mine") as caught:
        as_density(model)
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"a": torch.zeros(2)}, errors.OptionError, "no value for the latent site 'b'"),
        ({"a": torch.ones(2), "b": torch.ones(2, 3)}, errors.DimensionError, "site 'b' has shape"),
    ],
)
def test_values_that_do_not_fit_are_named(values, error, text):
    density = as_density(dependent, args=(torch.tensor(0.5),))
    with pytest.raises(error, match=text):
        density.unconstrain(values)
    with pytest.raises(errors.DimensionError, match=r"takes z of shape \(S, 2\)"):
        density(torch.zeros(3))


def test_a_value_outside_of_a_dependent_support_has_no_density():
    density = as_density(dependent, args=(torch.tensor(0.5),), dtype=F64)
    values = {"a": torch.tensor([1.0, 1.0, -1.0]), "b": torch.tensor([0.5, 2.0, 0.5])}
    log_det = density.unconstrain(values)[1]
    assert torch.isfinite(log_det).tolist() == [True, False, False]


@pytest.mark.parametrize("validate", [True, False])
def test_compiling_leaves_the_checks_of_distributions_as_they_are(validate, monkeypatch):
    def stand_in(function, **options):
        torch.distributions.Distribution.set_default_validate_args(False)  # as torch's does when it is first called
        return function

    monkeypatch.setattr(torch, "compile", stand_in)
    torch.distributions.Distribution.set_default_validate_args(validate)
    compile_flat(lambda z: (z * 2,), torch.ones(3), agree=torch.equal)
    assert torch.distributions.Distribution._validate_args == validate
