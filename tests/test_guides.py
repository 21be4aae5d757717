"""Guides: everything that Pyro does with a guide, and the traps that a naive one falls into."""

from __future__ import annotations

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalizingFlow, init_to_value
from pyro.infer.reparam import NeuTraReparam

import flowvi
from flowvi import errors

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
DATA = (Y, SIGMA)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def one():
    x = pyro.sample("x", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def dependent():
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(b, 0.1), obs=torch.tensor(0.5))


GUIDES = {
    "planar": partial(flowvi.AutoPlanar, num_flows=4),
    "radial": partial(flowvi.AutoRadial, num_flows=4),
    "flow, low rank": partial(flowvi.AutoFlow, flow="planar", num_flows=2, base="low_rank"),
}


@pytest.fixture(params=GUIDES, ids=str)
def make(request):
    return GUIDES[request.param]


def shaken(make, model, *args):
    """A guide away from its start."""
    guide = make(model)
    guide(*args)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return guide


@pytest.mark.parametrize(
    "loss",
    [
        lambda: Trace_ELBO(4),
        lambda: TraceGraph_ELBO(4),
        lambda: TraceEnum_ELBO(4, max_plate_nesting=1),
        lambda: JitTrace_ELBO(4),
        lambda: flowvi.ELBO(4),
        lambda: flowvi.PathELBO(4),
        lambda: flowvi.AnnealedELBO(2, anneal=flowvi.LinearAnneal(4, start=0.5)),
        lambda: flowvi.PathELBO(32, vectorize_particles=True, max_plate_nesting=1),
        lambda: Trace_ELBO(32, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=[
        "Trace",
        "TraceGraph",
        "TraceEnum",
        "JitTrace",
        "ELBO",
        "Path",
        "Annealed",
        "Path vectorized",
        "Trace vectorized",
    ],
)
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:TraceEnum_ELBO found"
)
def test_svi_with_every_loss_improves(make, loss):
    guide = make(schools, init_loc_fn=init_to_value(values={"mu": torch.tensor(40.0)}))
    before = np.median([Trace_ELBO().loss(schools, guide, *DATA) for _ in range(8)])
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss())
    losses = [svi.step(*DATA) for _ in range(15)]
    assert np.isfinite(losses).all()
    after = np.median([Trace_ELBO().loss(schools, guide, *DATA) for _ in range(8)])
    assert after < before - 1


def test_guide_starts_as_the_gaussian_it_is_told(make):
    values = {"mu": torch.tensor(2.0), "tau": torch.tensor(3.0), "eta": torch.linspace(-1, 1, 8)}
    guide = make(schools, init_loc_fn=init_to_value(values=values), init_scale=0.25)
    guide(*DATA)
    z = guide.get_posterior().sample((4000,))
    expected = torch.cat([torch.tensor([2.0, math.log(3.0)]), torch.linspace(-1, 1, 8)])
    assert torch.allclose(guide.transform.parts[-1].loc, expected)
    assert torch.allclose(z.mean(0), expected, atol=0.03)
    assert torch.allclose(z.std(0), torch.full((10,), 0.25), rtol=0.08)


def test_quantiles_and_median(make):
    guide = shaken(make, schools, *DATA)
    state = torch.get_rng_state()
    found = guide.quantiles([0.05, 0.5, 0.95], *DATA)
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: v.shape for k, v in found.items()} == {"mu": (3,), "tau": (3,), "eta": (3, 8)}
    assert all((v.diff(dim=0) > 0).all() for v in found.values())
    for name, value in guide.median(*DATA).items():
        assert torch.equal(value, found[name][1])
    draws = guide.get_posterior().sample((4000,))[:, 0]  # mu is real, and comes first
    assert ((draws < found["mu"][2]).float().mean() - 0.95).abs() < 0.015


def test_log_prob_is_that_of_the_draw_and_of_any_value(make):
    guide = shaken(make, schools, *DATA)
    trace = poutine.trace(guide).get_trace(*DATA)
    values = {n: trace.nodes[n]["value"].detach().clone() for n in ("mu", "tau", "eta")}
    assert guide.log_prob(values, *DATA).item() == pytest.approx(trace.log_prob_sum().item(), abs=1e-3)
    fresh = {"mu": torch.tensor(1.5), "tau": torch.tensor(0.7), "eta": torch.linspace(-1.0, 2.0, 8)}
    z = torch.cat([fresh["mu"].reshape(1), fresh["tau"].log().reshape(1), fresh["eta"]])
    expected = guide.get_posterior().log_prob(z) - fresh["tau"].log()  # du/dtau = 1 / tau
    assert guide.log_prob(fresh, *DATA).item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(errors.TargetError, match="'eta'"):
        guide.log_prob({"mu": values["mu"], "tau": values["tau"]}, *DATA)


def test_log_prob_integrates_to_one_in_one_dimension(make):
    guide = shaken(make, one)
    x = torch.linspace(1e-3, 20, 300)
    with torch.no_grad():
        density = torch.stack([guide.log_prob({"x": v}).exp() for v in x])
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize(
    ("s", "w", "expected"),
    [
        (1.0, [0.5, 0.6], -math.inf),
        (-1.0, [0.5, 0.5], -math.inf),
        (0.0, [0.5, 0.5], -math.inf),
        (1.0, [-0.5, 1.5], -math.inf),
        (math.nan, [0.5, 0.5], math.nan),
    ],
)
def test_log_prob_outside_of_a_support_is_minus_infinity(make, s, w, expected):
    def model():
        pyro.sample("s", dist.HalfNormal(1.0))
        pyro.sample("w", dist.Dirichlet(torch.ones(2)))

    guide = shaken(make, model)
    assert guide.log_prob({"s": 1.0, "w": [0.5, 0.5]}).isfinite()
    assert guide.log_prob({"s": s, "w": w}).item() == pytest.approx(expected, nan_ok=True)


def test_log_prob_and_quantiles_of_a_simplex():
    def model():
        with pyro.plate("rows", 2):
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    guide = shaken(GUIDES["planar"], model)
    trace = poutine.trace(guide).get_trace()
    values = {"p": trace.nodes["p"]["value"].detach().clone()}
    assert guide.get_posterior().dim == 4
    assert guide.log_prob(values).item() == pytest.approx(trace.log_prob_sum().item(), abs=1e-3)
    assert guide.quantiles([0.1, 0.9])["p"].shape == (2, 2, 3)


def test_copies_before_and_after_a_call(make):
    fresh = make(schools)
    twins = [copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))]
    for twin in twins:
        assert twin(*DATA).keys() == {"mu", "tau", "eta"}
    guide = shaken(make, schools, *DATA)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(guide),
        pickle.loads(pickle.dumps(guide)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin.median(*DATA)["mu"], guide.median(*DATA)["mu"])


def test_a_guide_that_was_called_once_can_be_pickled(make):
    guide = make(schools)
    pyro.clear_param_store()
    guide(*DATA)  # the store leaves weak references at the parameters
    assert torch.equal(pickle.loads(pickle.dumps(guide)).median(*DATA)["mu"], guide.median(*DATA)["mu"])


def test_print_says_what_a_guide_is_before_and_after_its_first_call():
    guide = flowvi.AutoPlanar(schools, num_flows=4)
    assert repr(guide) == "<AutoPlanar of schools: planar K = 4, not called yet>"
    guide(*DATA)
    pyro.clear_param_store()
    count = sum(p.numel() for p in guide.parameters())
    assert str(guide).splitlines() == [
        f"AutoPlanar of schools, D = 10, {count} parameters",
        "  base  Normal",
        "  ->    PlanarStack(D=10, K=4)",
        "  ->    Affine(D=10, full)",
        "  mu   ()",
        "  tau  ()",
        "  eta  (8,)",
    ]
    assert not list(pyro.get_param_store().keys())  # looking registers nothing
    assert repr(flowvi.AutoFlow(lambda: one(), "maf", 2)).startswith("<AutoFlow of <lambda>: maf K = 2")


def test_print_says_equal_layers_once_and_the_first_of_many_sites():
    def many():
        for i in range(40):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

    guide = flowvi.AutoFlow(many, "tails", 3)
    guide()
    found = repr(guide)
    assert "->    3 x Tails(D=40)" in found
    assert "x29" in found
    assert "x30" not in found
    assert found.endswith("... 10 more")


def test_fresh_guide_takes_a_state_dict_after_one_call(make):
    guide = shaken(make, schools, *DATA)
    fresh = make(schools)
    fresh(*DATA)
    fresh.load_state_dict(guide.state_dict())
    assert torch.equal(fresh.median(*DATA)["eta"], guide.median(*DATA)["eta"])
    pyro.set_rng_seed(4)
    expected = guide(*DATA)
    pyro.set_rng_seed(4)
    assert all(torch.equal(value, expected[name]) for name, value in fresh(*DATA).items())


def test_predictive(make):
    guide = shaken(make, schools, *DATA)
    draws = Predictive(schools, guide=guide, num_samples=7, return_sites=("mu", "eta", "y"))(None, SIGMA)
    assert draws["eta"].shape == (7, 8)
    assert draws["y"].shape == (7, 8)
    samples = Predictive(guide, num_samples=5)(*DATA)
    samples = {name: samples[name].detach() for name in ("mu", "tau", "eta")}
    again = Predictive(schools, posterior_samples=samples)(None, SIGMA)
    assert again["y"].shape == (5, 8)


def test_guide_list_and_neutra(make):
    parts = AutoGuideList(schools)
    parts.append(make(poutine.block(schools, expose=["mu", "tau"])))
    parts.append(AutoNormal(poutine.block(schools, hide=["mu", "tau"])))
    assert math.isfinite(SVI(schools, parts, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO()).step(*DATA))
    assert copy.deepcopy(parts)(*DATA).keys() == {"mu", "tau", "eta"}
    guide = shaken(make, schools, *DATA)
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(
        NUTS(poutine.reparam(schools, config=lambda _: neutra)),
        num_samples=5,
        warmup_steps=2,
        disable_progbar=True,
    )
    mcmc.run(*DATA)
    latent = next(iter(mcmc.get_samples().values()))
    sites = neutra.transform_sample(latent.unsqueeze(1))
    assert sites["eta"].shape == (5, 8)


def test_one_dimension_is_fitted(make):
    guide = make(one)
    svi = SVI(
        one, guide, pyro.optim.Adam({"lr": 0.05}), flowvi.PathELBO(64, vectorize_particles=True, max_plate_nesting=0)
    )
    for _ in range(150):
        svi.step()
    x = torch.linspace(1e-3, 12, 4000)
    p = (dist.Gamma(3.0, 2.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.tensor(1.0))).exp()
    cumulative = torch.cumsum(p, 0) / p.sum()
    expected = x[(cumulative - 0.5).abs().argmin()]
    assert guide.median()["x"].item() == pytest.approx(expected.item(), abs=0.05)


def test_a_support_that_depends_on_a_latent(make):
    guide = shaken(make, dependent)
    for _ in range(20):
        draw = guide()
        assert 0 < draw["b"] < draw["a"]
    trace = poutine.trace(guide).get_trace()
    values = {n: trace.nodes[n]["value"].detach().clone() for n in ("a", "b")}
    assert guide.log_prob(values).item() == pytest.approx(trace.log_prob_sum().item(), abs=1e-3)
    state = torch.get_rng_state()
    assert guide.median().keys() == {"a", "b"}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_support_that_depends_on_a_latent_is_fitted():
    guide = flowvi.AutoPlanar(dependent, 4)
    loss = flowvi.PathELBO(32, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(dependent, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    for _ in range(180):
        svi.step()
    # The posterior on a grid of log a ~ N(0, 1) and b / a ~ U(0, 1).
    log_a, share = torch.linspace(-4, 5, 1500).unsqueeze(1), (torch.arange(400) + 0.5) / 400
    likelihood = dist.Normal(share * log_a.exp(), 0.1).log_prob(torch.tensor(0.5))
    weight = (dist.Normal(0.0, 1.0).log_prob(log_a) + likelihood).exp()
    weight = weight / weight.sum()
    cumulative = weight.sum(1).cumsum(0)
    expected = log_a[(cumulative - 0.5).abs().argmin(), 0]
    found = guide.median()
    assert found["a"].log().item() == pytest.approx(expected.item(), abs=0.1)
    mean_b = (weight * share * log_a.exp()).sum().item()
    assert found["b"].item() == pytest.approx(mean_b, abs=0.04)


def test_our_layers_inside_pyros_own_guide():
    guide = AutoNormalizingFlow(schools, partial(dist.transforms.iterated, 3, flowvi.transforms.planar))
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    assert all(math.isfinite(svi.step(*DATA)) for _ in range(5))


def test_pyros_layers_inside_our_guide():
    guide = flowvi.AutoFlow(schools, flow=dist.transforms.affine_autoregressive, num_flows=1)
    for loss in (Trace_ELBO(), flowvi.PathELBO()):
        svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
        assert all(math.isfinite(svi.step(*DATA)) for _ in range(5))


def test_a_flow_without_inverse_is_named():
    guide = flowvi.AutoFlow(schools, flow=dist.transforms.planar, num_flows=2)
    assert math.isfinite(SVI(schools, guide, pyro.optim.Adam({}), loss=Trace_ELBO()).step(*DATA))
    with pytest.raises(errors.OptionError, match=r"Planar has no inverse.*flowvi.ELBO"):
        SVI(schools, guide, pyro.optim.Adam({}), loss=flowvi.PathELBO()).step(*DATA)


def naive(model, **options):
    return AutoNormalizingFlow(model, partial(dist.transforms.iterated, 2, dist.transforms.planar), **options)


def ours(model, **options):
    return flowvi.AutoPlanar(model, 2, **options)


def starts_where_told(make):
    guide = make(schools, init_loc_fn=init_to_value(values={"mu": torch.tensor(20.0)}))
    assert abs(guide(*DATA)["mu"].item() - 20) < 5


def is_copied_after_a_call(make):
    guide = make(schools)
    SVI(schools, guide, pyro.optim.Adam({}), loss=Trace_ELBO()).step(*DATA)
    copy.deepcopy(guide)(*DATA)


def scores_a_fresh_value(make):
    guide = make(schools)
    guide(*DATA)
    assert torch.isfinite(guide.get_posterior().log_prob(torch.zeros(10)))


def refuses_a_subsampled_plate(make):
    with pytest.raises(errors.SubsampledLatentError):
        make(local_latents)()


def has_a_median(make):
    guide = make(schools)
    guide(*DATA)
    assert guide.median(*DATA)["eta"].shape == (8,)


def runs_jitted(make):
    guide = make(schools)
    svi = SVI(schools, guide, pyro.optim.Adam({}), loss=JitTrace_ELBO())
    assert math.isfinite(svi.step(*DATA))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "check",
    [
        starts_where_told,
        is_copied_after_a_call,
        scores_a_fresh_value,
        refuses_a_subsampled_plate,
        has_a_median,
        runs_jitted,
    ],
)
def test_traps_of_a_naive_guide(check):
    check(ours)
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(naive)


def test_eight_schools_in_a_pyro_users_three_lines(references):
    data = np.load(references / "eight_schools_noncentered" / "data.npz")
    draws = np.load(references / "eight_schools_noncentered" / "draws.npz")
    args = tuple(torch.as_tensor(data[k], dtype=torch.float32) for k in ("y", "sigma"))
    guide = flowvi.AutoPlanar(schools)
    loss = flowvi.PathELBO(32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.03}), loss=loss)
    for _ in range(300):
        svi.step(*args)
    found = guide.quantiles([0.5], *args)
    for name in ("mu", "tau"):
        error = (found[name].item() - np.median(draws[name])) / draws[name].std()
        assert abs(error) < 0.2, name


def local_latents():
    with pyro.plate("rows", 10, subsample_size=3):
        pyro.sample("local", dist.Normal(0.0, 1.0))


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def nothing():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: flowvi.AutoFlow(one, flow="plannar"), errors.UnknownFlowError, "Did you mean 'planar'"),
        (lambda: flowvi.AutoFlow(one, base="round"), errors.OptionError, "one of diag, low_rank, full"),
        (lambda: flowvi.AutoPlanar(one, init_scale=0.0), errors.OptionError, "init_scale must be a positive"),
        (lambda: flowvi.AutoPlanar(one, num_flows=-1), errors.OptionError, "num_flows must be"),
        (lambda: flowvi.AutoPlanar(one, colour="red"), errors.OptionError, "could not be built with options"),
        (lambda: flowvi.AutoPlanar(nothing)(), errors.NoLatentError, "without obs="),
        (lambda: flowvi.AutoPlanar(discrete)(), errors.DiscreteLatentError, r"'k' is discrete.*TraceEnum_ELBO"),
        (
            lambda: flowvi.AutoPlanar(local_latents)(),
            errors.SubsampledLatentError,
            r"'local' is inside plate 'rows', which is subsampled to 3 of 10.*Drop subsample_size",
        ),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
