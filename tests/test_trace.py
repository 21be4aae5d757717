"""The tracer and what stands behind it: graphs with the code's own values and gradients, or a word on why not."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch.distributions import biject_to

from flowvi import errors
from flowvi.targets import as_density
from flowvi.targets.trace import trace

F64 = torch.float64
Y = torch.linspace(-1, 2, 12)


def traced(function, *shape):
    """The function's graph, traced at a random point, as a function."""
    z = torch.randn(shape, dtype=F64)
    module = trace(lambda z: {"out": function(z)}, {"z": z}).module("out")
    return lambda z: module(z)[0]


def fill(z):
    x = torch.zeros(4, dtype=F64)
    for i in range(1, 4):
        x[i] = z[0] * x[i - 1] + z[i]
    x[1:3] += z[0]
    return x.exp()


def views(z):
    x = z * 2
    part = x[1:3]
    part.mul_(x[0].clone())  # through a view, so x must change too
    return x.sum() + part.prod()


def slices_from_the_end(z):
    x = torch.zeros(4, dtype=F64)
    x[1:-1] = z[1:-1].exp()
    x[-1:] = z[:1] * x[1]
    x[::2] = x[::2] + z[-3:-1]
    return x * z


def masked_assignment(z):
    x = z * 2
    x[x > 0] = 1.0
    return x * z


def plain_buffer(z):
    buffer = torch.zeros(4, dtype=F64)
    first = z * buffer
    buffer[0] = 5.0  # after it was combined with z: the first product must not see it
    return first + z * buffer


def data_decides(z):
    data = torch.tensor([3, 0, 2])
    n = int(data.max()) + 1
    keep = data > 0
    scale = 2.0 if data.sum().item() > 4 else 1.0
    return scale * z[:n][data[keep]] + z.reshape(2, 2).T.contiguous().view(-1)[data[keep]]


def vector_times_matrix(z):
    x = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    return (z @ x).sum() * torch.matmul(z, x.expand(2, 4, 3)) + z.matmul(x)  # torch squeezes these in place


@pytest.mark.parametrize(
    "function",
    [fill, views, slices_from_the_end, masked_assignment, plain_buffer, data_decides, vector_times_matrix],
)
def test_a_graph_is_the_code_and_so_is_its_batch(function):
    graph = traced(function, 4)
    z = torch.randn(6, 4, dtype=F64)
    expected = torch.stack([function(row) for row in z])
    torch.testing.assert_close(torch.stack([graph(row) for row in z]), expected)
    torch.testing.assert_close(torch.func.vmap(graph)(z), expected)
    leaf = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.func.vmap(graph)(leaf).sum(), leaf)
    step = 1e-6 * torch.eye(4, dtype=F64)
    slope = torch.stack([torch.stack([(function(r + d) - function(r - d)).sum() / 2e-6 for d in step]) for r in z])
    torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda z: z if z.sum() > 0 else -z, r"reads the value of a latent .*`\(lambda z: z if z.sum\(\) > 0"),
        (lambda z: z * float(z[0]), "reads the value of a latent"),
        (lambda z: z * max(z), "reads the value of a latent"),
        (lambda z: torch.tensor(z.tolist()), r"reads the memory of a latent \(Tensor.tolist\)"),
        (lambda z: torch.as_tensor(z.numpy()), "reads the memory of a latent"),
        (lambda z: torch.tensor([z[0], z[1]]), "torch.stack keeps them"),
        (lambda z: z[z > 0], "a latent decides which elements are selected"),
        (lambda z: torch.nonzero(z), "reads the value of a latent"),
        (lambda z: torch.bernoulli(z.sigmoid()), "draws random numbers that depend on a latent"),
        (lambda z: z.as_strided((2,), (1,)), "memory layout"),
    ],
)
def test_what_would_be_baked_in_is_refused_with_its_line(function, reason):
    with pytest.raises(errors.TraceError, match=reason):
        traced(function, 4)


def test_writing_a_latent_into_outside_data_is_refused():
    outside = torch.zeros(4, dtype=F64)

    def function(z):
        outside[0] = z[0]
        return outside * 2

    with pytest.raises(errors.TraceError, match="while tracing"):
        traced(function, 4)


def test_only_what_depends_on_the_input_is_recorded():
    data = torch.arange(5, dtype=F64)
    module = trace(lambda z: {"out": z * data.exp().cumsum(0).log().sum() + data.mean()}, {"z": data[0]}).module("out")
    assert [n.op for n in module.graph.nodes].count("call_function") == 2
    assert torch.equal(module(data[2])[0], 2 * data.exp().cumsum(0).log().sum() + data.mean())


def test_parameters_stay_alive_and_get_no_gradient():
    layer = torch.nn.Linear(2, 1).double()
    graph = traced(lambda z: torch.tanh(layer(z)).sum(), 2)
    z = torch.ones(2, dtype=F64, requires_grad=True)
    graph(z).backward()
    assert layer.weight.grad is None
    with torch.no_grad():
        layer.weight.mul_(3.0)
    torch.testing.assert_close(graph(z), torch.tanh(layer(z)).sum())


def test_detach_is_part_of_the_code():
    graph = traced(lambda z: (z * z.detach()).sum(), 3)
    z = torch.randn(3, dtype=F64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(graph(z), z)[0], z.detach())


# Models.


def filled_in_place(y):
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    mean = torch.zeros(len(y))
    for t in range(1, len(y)):
        mean[t] = phi * mean[t - 1] + y[t - 1]
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def test_a_model_that_fills_a_tensor_in_place_has_the_right_gradient():
    density = as_density(filled_in_place, args=(Y,), dtype=F64)
    assert density.path == "graph"
    z = torch.randn(5, 2, dtype=F64)
    first = density.value_and_grad(z)
    for _ in range(12):  # until the batched graph is flat
        last = density.value_and_grad(z)
    step = 1e-6 * torch.eye(2, dtype=F64)
    slope = torch.stack([(density(z + d) - density(z - d)) / 2e-6 for d in step], 1)
    for value, grad in (first, last):
        torch.testing.assert_close(value, density(z))
        torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-5)


class Round(torch.autograd.Function):
    """Rounds forward, and is the identity backward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_gradient_of_the_models_own_is_kept():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(Round.apply(3 * a), 1.0), obs=torch.tensor(1.0))

    with pytest.warns(errors.SlowPathWarning, match="different values or gradients"):
        density = as_density(model, dtype=F64)
    z = torch.tensor([[0.3], [-0.4]], dtype=F64)
    expected = -z + 3 * (1 - (3 * z).round())
    torch.testing.assert_close(density.value_and_grad(z)[1], expected)


def test_eager_gradients_do_not_reach_the_models_parameters():
    def model(y):
        w = pyro.param("w", torch.tensor(2.0), constraint=constraints.positive)
        a = pyro.sample("a", dist.Normal(0.0, w))
        pyro.sample("y", dist.Normal(a, 1.0 if a > 0 else 2.0).expand([12]).to_event(1), obs=y)

    pyro.param("w", torch.tensor(2.0), constraint=constraints.positive)
    with pytest.warns(errors.FlowVIWarning) as caught:
        density = as_density(model, args=(Y,))
    assert [w.category for w in caught] == [errors.HeldFixedWarning, errors.SlowPathWarning]
    z = torch.tensor([[0.5], [-0.5]], requires_grad=True)
    density(z).sum().backward()
    assert pyro.param("w").unconstrained().grad is None
    torch.testing.assert_close(z.grad, density.value_and_grad(z)[1])


def test_a_model_without_any_gradient_in_place_is_refused():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        x = torch.zeros(3)
        for i in range(1, 3):
            x[i] = a * x[i - 1] + (1.0 if a > 0 else 2.0)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y[:3])

    with pytest.raises(errors.TargetError, match=r"changed in place: build it with torch\.stack"):
        as_density(model, args=(Y,))


def test_a_subsampled_sequential_plate_runs_eagerly_and_in_full():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", len(y), subsample_size=4):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])

    with pytest.warns(errors.SlowPathWarning):
        density = as_density(model, args=(Y,), dtype=F64)
    z = torch.tensor([[0.2]], dtype=F64)
    whole = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(z, 1.0).log_prob(Y.double()).sum(1)
    torch.testing.assert_close(density.full(z), whole)
    assert len(density.log_likelihood(z)) == len(density.observed) == 12
    values = torch.cat([density(z) for _ in range(200)])
    assert (values.mean() - whole).abs().item() < 4 * values.std().item() / math.sqrt(200)


def test_sites_inside_a_subsampled_plate_are_reported_for_all_data():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=4) as index:
            pyro.deterministic("rest", y[index] - mu, event_dim=0)
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    density = as_density(model, args=(Y,), dtype=F64)
    (rest,) = density.deterministic
    assert (rest.shape, rest.plates) == ((12,), ("rows",))
    z = torch.tensor([[0.2], [0.3]], dtype=F64)
    torch.testing.assert_close(density.constrain(z)["rest"], Y.double() - z)


def test_a_modules_dropout_is_found_and_its_parameters_are_named():
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(12, 1), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(net(x)[:, 0], 1.0).to_event(1), obs=y)

    with pytest.raises(errors.TargetError, match=r"another log density each time.*call eval\(\)"):
        as_density(model, args=(Y,))
    net.eval()
    with pytest.warns(errors.HeldFixedWarning, match=r"0\.bias, 0\.weight, 2\.bias, 2\.weight"):
        assert as_density(model, args=(Y,)).path == "graph"


def test_distributions_made_outside_with_their_own_checks_are_traced():
    outside = dist.Normal(torch.zeros(3), 1.0, validate_args=True).to_event(1)

    def model():
        a = pyro.sample("a", outside)
        pyro.sample("y", dist.Normal(a, 1.0).to_event(1), obs=torch.ones(3))

    assert as_density(model).path == "graph"
    assert outside.base_dist._validate_args is True


NORMAL = dist.Normal(torch.zeros((), dtype=F64), 1.0)


@pytest.mark.filterwarnings("ignore::flowvi.errors.SlowPathWarning")
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("gap", [math.nan, 0.5])
def test_missing_data_behind_obs_mask(gap, eager):
    """What `obs_mask` leaves out of y_unobserved is standard normal: so the evidence is that of the data there are."""
    keep = torch.arange(12) != 3

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if eager and mu > 1e9:
            return
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=keep)
            pyro.sample("w", dist.LogNormal(mu, 1.0).expand([12]), obs=y.exp(), obs_mask=keep)

    y = torch.where(keep, Y, gap).double()
    density = as_density(model, args=(y,))
    assert density.path == ("eager" if eager else "graph")
    assert [s.name for s in density.sites] == ["mu", "y_unobserved", "w_unobserved"]
    z = torch.randn(4, density.dim, dtype=F64)
    mu, free = z[:, :1], z[:, 1:].reshape(4, 2, 12)
    data = dist.Normal(mu, 1.0).log_prob(y[keep]) * 2 - y[keep]  # of y, and of exp(y), which is log-normal
    expected = NORMAL.log_prob(mu[:, 0]) + data.sum(1) + dist.Normal(mu, 1.0).log_prob(free[..., 3]).sum(1)
    torch.testing.assert_close(density(z), expected + NORMAL.log_prob(free[..., keep]).sum((1, 2)))
    assert density.value_and_grad(z)[1].isfinite().all()


def test_the_evidence_beside_obs_mask_is_that_of_the_data():
    y, keep = torch.tensor([1.0, 0.0, 2.0], dtype=F64), torch.tensor([True, False, True])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=keep)

    density = as_density(model, dtype=F64)
    top = -torch.func.hessian(lambda z: density(z[None])[0])(torch.zeros(4, dtype=F64))
    peak = torch.linalg.solve(top, density.value_and_grad(torch.zeros(1, 4, dtype=F64))[1][0])  # it is Gaussian
    evidence = density(peak[None])[0] + 2 * math.log(2 * math.pi) - top.logdet() / 2
    marginal = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64) + 1)
    torch.testing.assert_close(evidence, marginal.log_prob(y[keep]))
    torch.testing.assert_close(peak[0], torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(torch.linalg.inv(top)[0, 0], torch.tensor(1 / 3, dtype=F64))


def test_a_mask_over_a_latent_that_the_data_depend_on_is_a_flat_prior():
    def model(y):
        with poutine.mask(mask=False):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
            pyro.sample("b", dist.Dirichlet(torch.ones(3)))  # nothing depends on it
        step = pyro.sample("step", dist.Normal(0.0, 1.0).mask(False))
        c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])))
        pyro.sample("y", dist.Normal(a + (step.detach() > 0), 1.0), obs=y)
        pyro.sample("x", dist.Normal(c[0], 1.0), obs=y)

    y = torch.tensor(0.3, dtype=F64)
    z = torch.randn(4, 6, dtype=F64)
    a, b, step, c = z[:, 0], z[:, 1:3], z[:, 3], z[:, 4:]
    density = as_density(model, args=(y,))
    expected = a + dist.Normal(a.exp() + (step > 0), 1.0).log_prob(y) + dist.Normal(c[:, 0], 1.0).log_prob(y)
    expected = expected + NORMAL.log_prob(b).sum(1) + NORMAL.log_prob(c).sum(1)
    torch.testing.assert_close(density(z), expected)


def test_what_a_minibatch_leaves_out_is_not_what_a_mask_leaves_out():
    def model(y):
        with poutine.mask(mask=False), pyro.plate("group", 12):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))  # a flat prior
            pyro.sample("b", dist.Normal(0.0, 1.0))  # nothing depends on it
        with pyro.plate("rows", 12, subsample_size=3) as index:
            pyro.sample("y", dist.Normal(a[index], 1.0), obs=y[index])

    density = as_density(model, args=(Y.double(),))
    z = torch.randn(2, 24, dtype=F64)
    for each in (density, density.full):
        grad = each.value_and_grad(z)[1]
        torch.testing.assert_close(grad[:, 12:], -z[:, 12:])
        assert (grad[0, :12] != 0).sum() == (3 if each is density else 12)


def test_a_large_cancelling_sum_in_float32_is_still_traced():
    y = torch.randn(200_000) + 3

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)
        pyro.factor("shift", torch.tensor(9e5))

    assert as_density(model, args=(y,)).path == "graph"


def test_a_density_can_be_copied():
    density = as_density(filled_in_place, args=(Y,), dtype=F64)
    z = torch.randn(3, 2, dtype=F64)
    other = copy.deepcopy(density)
    torch.testing.assert_close(other(z), density(z))
    torch.testing.assert_close(other.value_and_grad(z)[1], density.value_and_grad(z)[1])


def linear(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x * beta, 1.0).to_event(1), obs=y)


HOLE = torch.where(torch.arange(12) == 3, math.nan, Y)
DOUBLE = torch.ones(12, 1, dtype=F64)


def root_in_a_dead_branch():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.where(a < 100, -a.square(), (a - 200).sqrt()))


def detached():
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(a.detach(), 1.0), obs=torch.tensor(0.0))


def sites_that_come_and_go():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if a > 0:
        pyro.sample("b", dist.Normal(0.0, 1.0))


def double_inside(y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(DOUBLE @ beta, 1.0).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore::flowvi.errors.SlowPathWarning")
@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (linear, {}, errors.TargetError, r"linear\(x, y\) can't be called with these 0 args.*'x'.*args=.*dim=D"),
        (lambda z: -z.square().sum(-1), {}, errors.TargetError, "for a plain log density .* give dim=D"),
        (linear, {"args": (HOLE, Y)}, errors.NonFiniteError, r"args\[0\] of the model linear has NaN"),
        (linear, {"kwargs": {"x": HOLE, "y": Y}}, errors.NonFiniteError, r"kwargs\['x'\]"),
        (linear, {"args": (Y, HOLE)}, errors.NonFiniteError, r"site 'y' has 1 values .* of 12.* index \(3,\).*mask"),
        (
            lambda: (pyro.sample("m", dist.Normal(0.0, 1.0)), pyro.sample("y", dist.Poisson(1.0), obs=-torch.ones(()))),
            {},
            errors.NonFiniteError,
            "data of site 'y' lie outside the support of its distribution, Poisson",
        ),
        (
            lambda: pyro.sample("k", dist.Delta(torch.tensor(1.0))),
            {},
            errors.NonFiniteError,
            r"site 'k' \(Delta\) is -inf at each of 20 points",
        ),
        (root_in_a_dead_branch, {}, errors.NonFiniteError, "its gradient is not.*torch.where"),
        (detached, {}, errors.TargetError, "has no gradient with respect to its latents"),
        (sites_that_come_and_go, {}, errors.TargetError, "'b' is not in every run"),
        (double_inside, {"args": (Y,)}, errors.TargetError, "run in torch.float32: give dtype="),
        (lambda: pyro.sample("k", dist.Wishart(torch.tensor(5.0), torch.eye(2))), {}, errors.TargetError, "bijection"),
    ],
)
def test_a_model_that_cannot_be_used_is_told_why(model, options, error, text):
    def use():
        density = as_density(model, **options)
        return density(torch.randn(50, density.dim))

    with pytest.raises(error, match=text):
        use()


def test_the_models_own_dtype_can_be_given():
    assert as_density(double_inside, args=(Y,), dtype=F64).path == "graph"


# Larger models, against Pyro's own log joint.


def arma(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    error = y[0] - (mu + phi * mu)
    for t in range(1, len(y)):
        error = y[t] - (mu + phi * y[t - 1] + theta * error)
        pyro.sample(f"error_{t}", dist.Normal(0.0, sigma), obs=error)


def garch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    a0 = pyro.sample("a0", dist.HalfNormal(5.0))
    a1 = pyro.sample("a1", dist.Uniform(0.0, 1.0))
    b1 = pyro.sample("b1", dist.Uniform(0.0, 1 - a1))
    variance = [torch.tensor(1.0)]
    for t in range(1, len(y)):
        variance.append(a0 + a1 * (y[t - 1] - mu) ** 2 + b1 * variance[-1])
    pyro.sample("y", dist.Normal(mu, torch.stack(variance).sqrt()).to_event(1), obs=y)


def hidden_markov(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    alpha = dist.Normal(mu, 1.0).log_prob(y[0])
    for t in range(1, len(y)):
        alpha = torch.logsumexp(alpha[:, None] + p.log(), 0) + dist.Normal(mu, 1.0).log_prob(y[t])
    pyro.factor("likelihood", torch.logsumexp(alpha, 0))


def poisson_gp(x, k):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f = pyro.sample("f", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    cov = alpha**2 * torch.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + 1e-6 * torch.eye(len(x))
    pyro.sample("k", dist.Poisson((torch.linalg.cholesky(cov) @ f).exp()).to_event(1), obs=k)


def varying_slopes(index, x, y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(2)).to_event(1))
    chol = pyro.sample("chol", dist.LKJCholesky(2, 1.0))
    with pyro.plate("group", int(index.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(mu, scale_tril=tau[:, None] * chol))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson((b[index, 0] + b[index, 1] * x).exp()), obs=y)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (arma, (torch.linspace(-1, 1, 40),)),
        (garch, (torch.linspace(-1, 1, 40),)),
        (hidden_markov, (torch.linspace(-1, 1, 30),)),
        (poisson_gp, (torch.linspace(-5, 5, 11), torch.arange(11.0))),
        (varying_slopes, (torch.arange(600) % 150, torch.linspace(-1, 1, 600), torch.ones(600))),
    ],
)
def test_larger_models_are_traced_and_equal_pyros(model, args):
    density = as_density(model, args=args, dtype=F64)
    assert density.path == "graph"
    z = 0.5 * torch.randn(2, density.dim, dtype=F64)
    values = density.constrain(z)
    torch.set_default_dtype(F64)
    try:
        for i, found in enumerate(density(z)):
            data = {s.name: values[s.name][i] for s in density.sites}
            run = poutine.trace(poutine.condition(model, data)).get_trace(*density.args)
            expected = run.log_prob_sum()
            for site in density.sites:
                to_x = biject_to(run.nodes[site.name]["fn"].support)
                u = to_x.inv(data[site.name])
                expected = expected + to_x.log_abs_det_jacobian(u, data[site.name]).sum()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(density.unconstrain(values)[0], z, rtol=1e-6, atol=1e-6)
