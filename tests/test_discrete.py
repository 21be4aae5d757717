"""Discrete latents: summed out exactly, fitted, simulated, and refused by name where they can't be."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch.distributions import biject_to, constraints

import flowvi
from flowvi import errors
from flowvi.targets import as_density

F64 = torch.float64
Y = torch.tensor([-2.1, -1.7, 0.2, 1.8, 2.4, 2.0], dtype=F64)


def mixture(y, part=None):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y), subsample_size=part) as i:
        k = pyro.sample("k", dist.Categorical(w))
        pyro.deterministic("centre", mu[k])
        pyro.sample("y", dist.Normal(mu[k], scale), obs=y[i])


def mixture_by_hand(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, scale)), obs=y)


def hidden_markov(y):
    step = pyro.sample("step", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    x = 0
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x{t}", dist.Categorical(step[x]))
        pyro.sample(f"y{t}", dist.Normal(mu[x], 0.5), obs=y[t])


def hidden_markov_by_hand(y):
    step = pyro.sample("step", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    forward = step[0].log() + dist.Normal(mu, 0.5).log_prob(y[0])
    for t in range(1, len(y)):
        forward = torch.logsumexp(forward[:, None] + step.log(), 0) + dist.Normal(mu, 0.5).log_prob(y[t])
    pyro.factor("forward", torch.logsumexp(forward, 0))


def noisy_or(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    a = pyro.sample("a", dist.Bernoulli(p[0]), infer={"enumerate": "sequential"})
    b = pyro.sample("b", dist.Bernoulli(p[1]), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(1 - 0.95 * (1 - 0.9 * a) * (1 - 0.7 * b)), obs=x)


def noisy_or_by_hand(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    parts = []
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            one = torch.tensor(1 - 0.95 * (1 - 0.9 * a) * (1 - 0.7 * b))
            prior = (p[0] if a else 1 - p[0]).log() + (p[1] if b else 1 - p[1]).log()
            parts.append(prior + dist.Bernoulli(one).log_prob(x).sum())
    pyro.factor("sum", torch.logsumexp(torch.stack(parts), 0))


def nested(y):
    """A global regime, a type for each datum, a count with a one-hot cause beside it, and no plate around `z`."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    regime = pyro.sample("regime", dist.Categorical(torch.tensor([0.3, 0.7])))
    with pyro.plate("data", len(y)):
        kind = pyro.sample("kind", dist.Bernoulli(torch.tensor([0.2, 0.6])[regime]))
        pyro.sample("y", dist.Normal(mu + shift * kind + regime, 1.0), obs=y)
    count = pyro.sample("count", dist.Binomial(3, torch.sigmoid(mu)))
    hot = pyro.sample("hot", dist.OneHotCategorical(torch.tensor([0.5, 0.5])))
    pyro.sample("z", dist.Normal(count + hot @ torch.tensor([0.0, 1.0]), 1.0), obs=y[:2])


def nested_by_hand(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    regimes = []
    for regime, p, q in ((0.0, 0.3, 0.2), (1.0, 0.7, 0.6)):
        kinds = [
            math.log(q if kind else 1 - q) + dist.Normal(mu + shift * kind + regime, 1.0).log_prob(y) for kind in (0, 1)
        ]
        regimes.append(math.log(p) + torch.logsumexp(torch.stack(kinds), 0).sum())
    pyro.factor("y", torch.logsumexp(torch.stack(regimes), 0))
    counts = dist.Binomial(3, torch.sigmoid(mu)).log_prob(torch.arange(4.0))
    parts = [
        counts[n] + math.log(0.5) + dist.Normal(n + float(h), 1.0).log_prob(y[:2]).sum()
        for n in range(4)
        for h in (0, 1)
    ]
    pyro.factor("z", torch.logsumexp(torch.stack(parts), 0))


PAIRS = {
    "mixture": (mixture, mixture_by_hand, Y),
    "hidden_markov": (hidden_markov, hidden_markov_by_hand, Y),
    "noisy_or": (noisy_or, noisy_or_by_hand, torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64)),
    "nested": (nested, nested_by_hand, Y),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_sum_and_its_gradient_are_those_of_a_marginal_written_by_hand(name):
    model, by_hand, data = PAIRS[name]
    found, expected = as_density(model, args=(data,)), as_density(by_hand, args=(data,))
    assert found.path == "graph"
    z = 1.5 * torch.randn(6, found.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(found(z), expected(z), rtol=1e-10, atol=1e-10)
    value, grad = found.value_and_grad(z)
    _, exact = expected.value_and_grad(z)
    torch.testing.assert_close(value, expected(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, exact, rtol=1e-8, atol=1e-8)


def test_observations_that_contradict_each_other_neither_underflow_nor_lose_their_gradient():
    """Each of two sites rules out the other's state by 200 nats, which a product in float32 can't hold."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("a", dist.Normal(20 * k + mu, 1.0), obs=torch.tensor(20.0))
        pyro.sample("b", dist.Normal(20 * k - mu, 1.0), obs=torch.tensor(0.0))

    density = as_density(model)
    value, grad = density.value_and_grad(torch.tensor([[0.5]]))
    # at k = 0: residuals 20 - mu and mu; at k = 1: -mu and mu - 20; alike, so that the two halves add up to one
    exact = -0.125 - 0.5 * (19.5**2 + 0.5**2) - 1.5 * math.log(2 * math.pi)
    assert float(value) == pytest.approx(exact, rel=1e-6)
    assert float(grad) == pytest.approx(-0.5 + 19.5 - 0.5, rel=1e-5)


def test_masked_data_drop_out_and_so_do_their_states():
    def model(y, keep):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=keep):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    keep = torch.tensor([True, True, False, True, False, True])
    z = torch.randn(4, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    masked = as_density(model, args=(Y, keep))(z)
    kept = as_density(model, args=(Y[keep], torch.ones(4, dtype=torch.bool)))(z)
    torch.testing.assert_close(masked, kept)


def test_a_minibatch_of_a_mixture_is_unbiased_in_value_and_gradient_and_full_is_exact():
    whole, part = as_density(mixture, args=(Y,)), as_density(mixture, args=(Y, 2))
    assert part.subsampled
    z = 0.5 * torch.randn(3, whole.dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part.full(z), whole(z))
    value, grad = whole.value_and_grad(z)
    draws = [part.value_and_grad(z) for _ in range(600)]
    for found, exact in zip((torch.stack(d) for d in zip(*draws, strict=True)), (value, grad), strict=True):
        assert (found.std(0) > 0).any()
        error = found.std(0) / len(draws) ** 0.5
        assert bool(((found.mean(0) - exact).abs() <= 5 * error + 1e-9).all())


def test_sites_that_depend_on_discrete_ones_are_set_apart():
    density = as_density(mixture, args=(Y,))
    assert [s.name for s in density.sites] == ["w", "mu", "scale"]
    assert [(s.name, s.deterministic) for s in density.discrete] == [("k", False), ("centre", True)]
    assert density.deterministic == ()
    z = torch.randn(5, density.dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        density.log_likelihood(z)["y"], as_density(mixture_by_hand, args=(Y,)).log_likelihood(z)["y"]
    )
    chain = as_density(hidden_markov, args=(Y,))
    assert "y0" in chain.inseparable
    assert chain.log_likelihood(torch.zeros(2, chain.dim)) == {}


def coin(y):
    """A coin of unknown bias, whose faces are only seen through noise."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        face = pyro.sample("face", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(3 * face, 1.0), obs=y)


def coin_data():
    generator = torch.Generator().manual_seed(0)
    face = (torch.rand(40, generator=generator, dtype=F64) < 0.7).double()
    return 3 * face + torch.randn(40, generator=generator, dtype=F64)


def coin_by_quadrature(y):
    """Posterior mean and sd of p, and the log evidence."""
    p = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    one, zero = dist.Normal(3.0, 1.0).log_prob(y)[:, None], dist.Normal(0.0, 1.0).log_prob(y)[:, None]
    log_joint = torch.logaddexp(p.log() + one, (1 - p).log() + zero).sum(0) + (6 * p * (1 - p)).log()
    weights = torch.softmax(log_joint, 0)
    mean = (weights * p).sum()
    return mean, (weights * (p - mean) ** 2).sum().sqrt(), torch.logsumexp(log_joint, 0) - math.log(20_000)


@pytest.fixture(scope="module")
def fitted():
    return flowvi.fit(coin, (coin_data().float(),), seed=0, progress=False)


def test_a_fit_is_the_known_posterior(fitted):
    mean, sd, log_evidence = coin_by_quadrature(coin_data())
    assert abs(fitted.mean()["p"] - mean) < 0.05 * sd
    assert abs(fitted.std()["p"] / sd - 1) < 0.05
    diagnosis = fitted.diagnose()
    assert abs(diagnosis.log_evidence - log_evidence) < 0.02
    assert diagnosis.trusted
    assert list(fitted.sample(3)) == ["p"]


def test_arviz_has_the_likelihood_with_the_faces_summed_out_and_data_with_new_faces(fitted):
    data = fitted.to_arviz(num_samples=1000, seed=0)
    y = coin_data()
    p = torch.as_tensor(data["posterior"]["p"].to_numpy()).double()[..., None]
    one, zero = dist.Normal(3.0, 1.0).log_prob(y), dist.Normal(0.0, 1.0).log_prob(y)
    exact = torch.logaddexp(p.log() + one, (1 - p).log() + zero)
    torch.testing.assert_close(
        torch.as_tensor(data["log_likelihood"]["y"].to_numpy()).double(), exact, rtol=1e-4, atol=1e-4
    )
    new = torch.as_tensor(data["posterior_predictive"]["y"].to_numpy()).flatten()
    assert abs(new.mean() - 3 * p.mean()) < 0.1
    assert new.var() > 2  # faces differ from draw to draw: 1 + 9 p (1 - p)


def test_arviz_says_which_data_have_no_likelihood_of_their_own():
    def switching(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + 3 * k, 1.0), obs=y)

    data = flowvi.fit(switching, (Y.float(),), seed=0, num_steps=5, verify=False, progress=False).to_arviz(
        num_samples=9
    )
    assert "log_likelihood" not in data
    assert "k, y" in data.attrs["log_likelihood_left_out"]
    assert "prior" in data.attrs["predictive_note"]


def test_the_guide_of_a_posterior_draws_the_continuous_sites(fitted):
    draws = pyro.infer.Predictive(coin, guide=fitted.guide, num_samples=200)(coin_data().float())
    assert abs(draws["p"].mean() - fitted.mean()["p"]) < 0.05


def test_a_guide_in_svi_with_traceenum_sums_out_and_without_it_says_how():
    y = coin_data().float()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pytest.raises(errors.DiscreteLatentError, match=r"'face' is discrete.*poutine.block.*TraceEnum_ELBO"):
        flowvi.AutoPlanar(coin)(y)
    guide = flowvi.AutoPlanar(poutine.block(coin, hide=["face"]), num_flows=2)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(config_enumerate(coin), guide, pyro.optim.Adam({"lr": 0.02}), loss)
    for _ in range(300):
        svi.step(y)
    mean, sd, _ = coin_by_quadrature(y.double())
    assert abs(guide.median(y)["p"] - mean) < sd


def poisson():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    count = pyro.sample("count", dist.Poisson(rate))
    pyro.sample("y", dist.Normal(count, 1.0), obs=torch.tensor(2.0))


def as_event():
    p = pyro.sample("p", dist.Beta(2.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(p).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(k.sum(-1), 1.0), obs=torch.tensor(2.0))


def without_plate():
    p = pyro.sample("p", dist.Beta(2.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(p).expand([3]))
    pyro.sample("y", dist.Normal(k, 1.0), obs=torch.ones(3))


def branching():
    p = pyro.sample("p", dist.Beta(2.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(p))
    pyro.sample("y", dist.Normal(1.0 if k else 0.0, 1.0), obs=torch.tensor(1.0))


def collapsing():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(mu + k.sum(), 1.0), obs=torch.tensor(1.0))


def varying_support():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    u = pyro.sample("u", dist.Uniform(0.0, 1.0 + k))
    pyro.sample("y", dist.Normal(u, 1.0), obs=torch.tensor(1.0))


def above_a_minibatch():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    with pyro.plate("data", 6, subsample_size=2) as i:
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=Y.float()[i])


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (poisson, errors.DiscreteLatentError, r"'count' \(Poisson\).*no finite list.*GammaPoisson.*relax"),
        (as_event, errors.DiscreteLatentError, r"'k' \(Bernoulli\).*drop .to_event.*pyro.plate"),
        (without_plate, errors.DiscreteLatentError, r"'k' has the batch shape \(3,\).*pyro.plate"),
        (branching, errors.DiscreteLatentError, r"discrete latents k.*ambiguous.*torch.where instead of `if`"),
        (collapsing, errors.TargetError, r"site 'y' is .* when the discrete latents k have one value each.*broadcast"),
        (varying_support, errors.DiscreteLatentError, r"support of the latent site 'u' depends on a discrete latent"),
        (above_a_minibatch, errors.DiscreteLatentError, r"k can't be summed out.*different scales.*subsample_size"),
    ],
)
def test_what_cannot_be_summed_out_is_named(model, error, text):
    with pytest.raises(error, match=text):
        as_density(model)


@pytest.mark.slow
def test_pyros_nuts_agrees():
    """NUTS of Pyro sums out by its own einsum; compared by mean and sd of p."""
    y = coin_data().float()  # Pyro's einsum takes one dtype only
    pyro.set_rng_seed(0)
    kernel = pyro.infer.NUTS(coin, max_plate_nesting=1)
    chain = pyro.infer.MCMC(kernel, num_samples=1500, warmup_steps=300, disable_progbar=True)
    chain.run(y)
    p = chain.get_samples()["p"]
    posterior = flowvi.fit(coin, (y,), seed=0, progress=False)
    assert abs(posterior.mean()["p"] - p.mean()) < 0.15 * p.std()
    assert abs(posterior.std()["p"] / p.std() - 1) < 0.1


def test_the_jacobian_is_that_of_the_continuous_sites_alone():
    density = as_density(coin, args=(Y,))
    z = torch.tensor([[0.3], [-1.0]], dtype=F64)
    p = density.constrain(z)["p"]
    log_det = biject_to(constraints.unit_interval).log_abs_det_jacobian(z[:, 0], p)
    back, found = density.unconstrain({"p": p})
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(found, -log_det)
