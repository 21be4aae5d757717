"""Mixtures of flows: their density, draws, gradients, files, guide and HMC."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import errors
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.history import History
from flowvi.hmc import FlowCoordinates
from flowvi.mixture import MixtureFlow, flow_from_spec
from flowvi.posterior import Posterior
from flowvi.short_run import symmetric_kl

HISTORY = History(
    step=torch.arange(0), elbo=torch.zeros(0), beta=torch.zeros(0), skipped_steps=0, nonfinite_particles=0
)


def bent(dim=2, loc=0.0, scale=1.0, num_flows=3, seed=0):
    """A planar flow away from the identity."""
    torch.manual_seed(seed)
    flow = Flow.from_spec(FlowSpec("planar", dim, num_flows), loc=loc, scale=scale, dtype=torch.float64)
    with torch.no_grad():
        for p in flow.transforms[0].parameters():
            p.add_(0.5 * torch.randn_like(p))
    return flow


def two(dim=2, weights=(0.2, 0.8), apart=6.0):
    flows = [bent(dim, -apart / 2, 0.7, seed=1), bent(dim, apart / 2, 1.2, seed=2)]
    return MixtureFlow(flows, torch.tensor(weights, dtype=torch.float64).log())


def density_of(flow):
    return flowvi.as_density(flow.log_prob, dim=flow.dim, dtype=torch.float64)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_log_prob_is_the_weighted_sum_and_integrates_to_one():
    q = two()
    z = 4 * torch.randn(50, 2, dtype=torch.float64)
    expected = (0.2 * q.flows[0].log_prob(z).exp() + 0.8 * q.flows[1].log_prob(z).exp()).log()
    assert torch.allclose(q.log_prob(z), expected)
    assert q.log_prob(z.view(5, 10, 2)).shape == (5, 10)
    line = torch.linspace(-16, 16, 500, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = q.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_draws_come_with_their_exact_density_and_in_proportion():
    q = two()
    z, log_q = q.rsample_and_log_prob(1001, generator=gen())
    assert torch.allclose(log_q, q.log_prob(z.detach()), atol=1e-8)
    again, _ = q.rsample_and_log_prob(1001, generator=gen())
    assert torch.equal(z, again)
    right = (q.flows[1].log_prob(z) + math.log(0.8) > q.flows[0].log_prob(z) + math.log(0.2)).double()
    assert abs(right.sum().item() - 801) <= 2
    assert abs(right[:200].mean().item() - 0.8) < 0.1  # in random order


def test_counts_are_systematic_and_unbiased():
    q = two(weights=(0.03, 0.97))
    first = torch.tensor([q._counts(10, gen(s))[0] for s in range(2000)]).double()
    assert set(first.tolist()) == {0.0, 1.0}
    assert first.mean().item() == pytest.approx(0.3, abs=0.04)
    assert sum(q._counts(7, gen())) == 7
    one, log_q = q.rsample_and_log_prob(1, generator=gen())
    assert torch.allclose(log_q, q.log_prob(one))


def test_sample_and_rsample_shapes_and_graph():
    q = two(3)
    assert q.sample().shape == (3,)
    assert q.sample((4, 5)).shape == (4, 5, 3)
    assert not q.sample((2,)).requires_grad
    assert q.rsample((6,)).requires_grad
    wide = q.expand((4,))
    assert wide.sample((2,)).shape == (2, 4, 3)
    assert wide.log_prob(wide.sample()).shape == (4,)


def test_the_gradient_of_an_expectation_is_right():
    """The gradient of E_q[f] in loc for f = sum z, whose value is the weight of the component."""
    q = two()
    (q.rsample_and_log_prob(400, generator=gen())[0].sum(-1)).mean().backward()
    grads = [flow.transforms[-1].loc.grad for flow in q.flows]
    assert torch.allclose(grads[0], torch.full((2,), 0.2, dtype=torch.float64), atol=3e-3)
    assert torch.allclose(grads[1], torch.full((2,), 0.8, dtype=torch.float64), atol=3e-3)


def test_training_the_components_together_raises_the_elbo():
    q = two()
    target = density_of(two(weights=(0.2, 0.8), apart=8.0))

    def elbo():
        with torch.no_grad():
            z, log_q = q.rsample_and_log_prob(2000, generator=gen())
            return (target(z) - log_q).mean().item()

    before = elbo()
    from flowvi.fit.engine import Schedule, optimize

    record = optimize(q, target, flowvi.ELBO(64), Schedule(60, 2e-2), generator=gen(), progress=False)
    assert not record.fused
    assert elbo() > before + 0.3
    assert q.weights.tolist() == pytest.approx([0.2, 0.8])


def test_score_is_that_of_the_mixture_and_there_is_no_path_score():
    q = two(apart=2.0)
    z = torch.randn(7, 2, dtype=torch.float64)
    h = 1e-5
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        slope = (q.log_prob(z + step) - q.log_prob(z - step)) / (2 * h)
        assert torch.allclose(q.score(z)[:, i], slope, atol=1e-6)
    assert not q.has_path_score
    assert not q.has_standard_base
    with pytest.raises(errors.OptionError, match="no path score"):
        q.rsample_with_score(3)


def test_weights_are_normalized_and_can_be_set():
    q = MixtureFlow([bent(seed=1), bent(seed=2)], torch.tensor([1.0, 1.0]))
    assert q.weights.tolist() == [0.5, 0.5]
    q.set_weights_(torch.tensor([0.0, math.log(3)]))
    assert q.weights.tolist() == pytest.approx([0.25, 0.75])
    assert "0.750" in repr(q)
    assert f"{sum(p.numel() for p in q.parameters())} parameters" in repr(q)
    assert not any(p is q.log_weights for p in q.parameters())
    assert len(list(q.parameters())) == sum(len(list(f.parameters())) for f in q.flows)


def test_bad_input_is_named():
    with pytest.raises(errors.OptionError, match="one finite log weight"):
        MixtureFlow([bent()], torch.zeros(2))
    with pytest.raises(errors.OptionError, match="one finite log weight"):
        MixtureFlow([], torch.zeros(0))
    with pytest.raises(errors.OptionError, match="one finite log weight"):
        MixtureFlow([bent(), bent()], torch.tensor([0.0, -math.inf]))
    with pytest.raises(errors.DimensionError, match="differ in D"):
        MixtureFlow([bent(2), bent(3)], torch.zeros(2))


def test_spec_and_state_build_it_again():
    q = two()
    assert q.spec is not None
    twin = flow_from_spec(FlowSpec.from_dict(q.spec.to_dict()), dtype=torch.float64)
    assert isinstance(twin, MixtureFlow)
    twin.load_state_dict(q.state_dict())
    z = torch.randn(9, 2, dtype=torch.float64)
    assert torch.equal(twin.log_prob(z), q.log_prob(z))
    assert twin.weights.tolist() == pytest.approx([0.2, 0.8])
    assert not isinstance(flow_from_spec(FlowSpec("planar", 2, 3)), MixtureFlow)
    by_hand = MixtureFlow([Flow(2, [bent().transforms[0]]), bent()], torch.zeros(2))
    assert by_hand.spec is None


def test_coordinates_have_the_density_of_their_base():
    q = two(apart=10.0)
    target = FlowCoordinates(q, density_of(q))
    e = target.draw(500, gen())
    state = target(e)
    assert target.log_weight(state).abs().max() < 1e-8
    assert torch.allclose(state.log_p, q.log_prob(state.z), atol=1e-10)
    shifted = flowvi.as_density(lambda z: q.log_prob(z - 0.3), dim=2, dtype=torch.float64)
    z, log_p, log_q = FlowCoordinates(q, shifted).values(e)
    assert torch.allclose(log_p - log_q, q.log_prob(z - 0.3) - q.log_prob(z))
    # in the frame each component has about unit scale, however far apart they are
    left = e[q.flows[0].log_prob(z) > q.flows[1].log_prob(z)]
    assert 0.2 < left.std(0).max() < 2


def test_the_short_run_sees_nothing_where_nothing_is_wrong_and_j_where_something_is():
    q = two(apart=10.0)
    right = symmetric_kl(q, density_of(q), num_chains=64, num_steps=30, generator=gen())
    assert abs(right.j) < 1e-6
    # both components too wide by a third: J is that of each component
    wide = MixtureFlow(
        [Flow.from_spec(FlowSpec("planar", 2, 0), loc=m, scale=1.3, dtype=torch.float64) for m in (-9.0, 9.0)],
        torch.zeros(2),
    )
    unit = MixtureFlow(
        [Flow.from_spec(FlowSpec("planar", 2, 0), loc=m, dtype=torch.float64) for m in (-9.0, 9.0)], torch.zeros(2)
    )
    found = symmetric_kl(wide, density_of(unit), num_chains=256, num_steps=60, generator=gen())
    exact = 2 * 0.5 * (1.3**2 + 1.3**-2 - 2)
    assert found.j == pytest.approx(exact, abs=4 * found.j_se + 0.03)


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.abs().sum(-1), scale), obs=y)


Y = torch.tensor([1.0, 2.0, 1.5, 0.5, 2.5])


@pytest.fixture
def posterior():
    torch.manual_seed(0)
    flows = [Flow.from_spec(FlowSpec("planar", 3, 4), loc=m, scale=0.5) for m in (-1.0, 1.0)]
    mixture = MixtureFlow(flows, torch.tensor([0.3, 0.7]).log())
    density = flowvi.as_density(model, args=(Y,))
    return Posterior(mixture, density, config={}, timing={}, history=HISTORY, seed=0)


def test_a_posterior_of_a_mixture_has_all_its_parts(posterior):
    draws = posterior.sample(4000, seed=1)["mu"]
    assert draws.shape == (4000, 2)
    assert (draws[:, 0] > 0).double().mean().item() == pytest.approx(0.7, abs=0.05)
    values = {"mu": torch.zeros(5, 2), "scale": torch.ones(5)}
    assert torch.allclose(posterior.log_prob(values), posterior.flow.log_prob(torch.zeros(5, 3)))
    assert posterior.quantiles([0.1, 0.9])["mu"].shape == (2, 2)
    assert posterior.resample(50, seed=1)["scale"].shape == (50,)
    assert math.isfinite(posterior.diagnose(1000).elbo)
    assert "mixture K = 2" in repr(posterior)


def test_it_saves_and_loads(posterior, tmp_path):
    posterior.save(tmp_path / "fit.pt")
    again = flowvi.load(tmp_path / "fit.pt", model)
    assert isinstance(again.flow, MixtureFlow)
    assert torch.equal(again.sample(20, seed=3)["mu"], posterior.sample(20, seed=3)["mu"])
    assert torch.equal(again.flow.log_weights, posterior.flow.log_weights)


def test_its_guide_draws_from_it_and_goes_on_with_svi(posterior):
    guide = posterior.guide
    values = {"mu": torch.tensor([0.5, -0.2]), "scale": torch.tensor(0.8)}
    assert torch.allclose(guide.log_prob(values, Y), posterior.log_prob(values), atol=1e-5)
    assert guide.median(Y)["mu"].tolist() == pytest.approx(posterior.median()["mu"].tolist(), abs=0.1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=flowvi.ELBO(16))
    losses = [svi.step(Y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert pyro.infer.Predictive(model, guide=guide, num_samples=7)(Y)["mu"].shape[0] == 7
    copy.deepcopy(guide)(Y)
    with pytest.raises(errors.OptionError, match="no transform"):
        guide.get_transform(Y)


def test_refine_runs_on_it(posterior):
    refined = posterior.refine(num_chains=16, ess=20.0, rhat=1.5, time_limit=4.0, seed=0, progress=False)
    assert refined.sample(10)["mu"].shape == (10, 2)
    assert isinstance(refined.diagnose().trusted, bool)


def test_a_diagnosis_draws_until_it_can_tell():
    # A few draws in ten thousand of q are where p has nothing: they double the sd of tau, and so few don't prove it.
    def model():
        pyro.sample("tau", dist.LogNormal(0.0, 0.8))

    near = Flow.from_spec(FlowSpec("planar", 1, 0), loc=0.0, scale=0.8, dtype=torch.float64)
    far = Flow.from_spec(FlowSpec("planar", 1, 0), loc=4.0, scale=0.3, dtype=torch.float64)
    density = flowvi.as_density(model, dtype=torch.float64)

    def diagnosed(share, **options):
        q = MixtureFlow([near, far], torch.tensor([1 - share, share], dtype=torch.float64).log())
        return Posterior(q, density, config={}, timing={}, history=HISTORY, seed=0).diagnose(hmc=False, **options)

    found = diagnosed(5e-4)
    assert found.num_samples > 10_000
    assert not found.trusted
    assert found.reweighted_site == "tau"
    right = diagnosed(1e-9)
    assert right.trusted
    assert right.num_samples == 10_000
    assert right.unsettled < 1e-6
