"""Amortized guides: a flow of each datum's own, right scales for every way of subsampling, globals beside locals."""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

import flowvi
from flowvi import Flow
from flowvi.amortized import AmortizedFlow
from flowvi.errors import DimensionError, DiscreteLatentError, NoLatentError, OptionError, TargetError, UnknownFlowError
from flowvi.transforms import conditional_planar_stack, conditional_radial_stack

F64 = torch.float64
STACKS = {
    "planar": conditional_planar_stack,
    "planar, shared directions": partial(conditional_planar_stack, shared_directions=True),
    "radial": conditional_radial_stack,
}
W = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.0, 0.0]], dtype=F64)  # orthogonal columns: the posterior is diagonal
NOISE = 0.6
X = torch.randn(12, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def observe(x, z, scale=NOISE):
    pyro.sample("x", dist.Normal(z @ W.T, scale).to_event(1), obs=x)


def latent():
    return pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))


def whole(x):
    with pyro.plate("data", len(x)):
        observe(x, latent())


def by_size(x):
    with pyro.plate("data", len(x), subsample_size=4) as i:
        observe(x[i], latent())


def by_index(x, index):
    with pyro.plate("data", len(x), subsample=index):
        observe(x[index], latent())


def by_minibatch(x, size):
    with pyro.plate("data", size, subsample_size=len(x)):
        observe(x, latent())


def encoder(size=3, width=8):
    return nn.Sequential(nn.Linear(size, width), nn.Tanh()).double()


def shaken(guide, *args, scale=0.2, **kwargs):
    """The guide with its parameters moved from the start, the same at each call."""
    guide(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(scale * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return guide


def gradient(loss, model, guide, *args):
    guide.zero_grad()
    loss.loss_and_grads(model, guide, *args)
    return torch.cat([p.grad.reshape(-1) for p in guide.parameters()])


# The stacks.


@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize(
    ("contexts", "points"),
    [((5,), (5,)), ((5,), (7, 5)), ((5, 1), (7, 5, 3)), ((), (4,)), ((6, 1, 5), (6, 2, 5)), ((1, 5), (5,)), ((5,), ())],
)
def test_a_stack_is_that_of_each_context_alone(family, contexts, points):
    stack = STACKS[family](2, 3, 4, hidden_dims=()).double()
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.3 * torch.randn_like(p))
    c, x = torch.randn(*contexts, 3, dtype=F64), torch.randn(*points, 2, dtype=F64)
    at = stack.condition(c)
    y, log_det = at.forward_and_log_det(x)
    shape = torch.broadcast_shapes(contexts, points)
    assert y.shape == (*shape, 2)
    assert log_det.shape == shape
    torch.testing.assert_close(at.inverse(y), x.expand(*shape, 2), atol=1e-8, rtol=0)
    each = zip(c.expand(*shape, 3).reshape(-1, 3), x.expand(*shape, 2).reshape(-1, 2), strict=True)
    alone = [stack.condition(a).forward_and_log_det(b) for a, b in each]
    torch.testing.assert_close(torch.stack([a for a, _ in alone]), y.reshape(-1, 2))
    torch.testing.assert_close(torch.stack([b for _, b in alone]), log_det.reshape(-1))


@pytest.mark.parametrize("family", STACKS)
def test_a_stacks_score_and_determinant_are_those_of_autograd(family):
    stack = STACKS[family](3, 2, 3, hidden_dims=(4,)).double()
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.3 * torch.randn_like(p))
    at = stack.condition(torch.randn(5, 2, dtype=F64))
    x = torch.randn(4, 5, 3, dtype=F64)
    log_det = at.forward_and_log_det(x)[1]
    for i, j in ((0, 0), (3, 4)):

        def one(v, i=i, j=j):
            return at.forward_and_log_det(put(x, i, j, v))[0][i, j]

        jacobian = torch.autograd.functional.jacobian(one, x[i, j])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[i, j].detach())
    flow = Flow(dist.Normal(torch.zeros(5, 3, dtype=F64), 1.0).to_event(1), [at])
    z = flow.rsample((4,))
    found = flow.score(z)
    leaf = z.detach().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)[0])


def put(x, i, j, v):
    x = x.clone()
    x[i, j] = v
    return x


@pytest.mark.parametrize("constraint", ["squareplus", "softplus"])
def test_planar_options_reach_the_stack(constraint):
    assert AmortizedFlow(2, 3, "planar", 2, constraint=constraint).layers[0].options == {"constraint": constraint}


# The flows of an encoder.


@pytest.mark.parametrize("flow", ["planar", "radial", "sylvester", "iaf", "real_nvp", "neural_spline", "affine"])
def test_every_datum_starts_at_the_same_gaussian(flow):
    q = AmortizedFlow(3, 4, flow, 3, init_scale=0.5).double()(torch.randn(6, 4, dtype=F64))
    z = torch.randn(6, 3, dtype=F64)
    truth = torch.distributions.Normal(0.0, 0.5).log_prob(z).sum(-1)
    torch.testing.assert_close(q.log_prob(z), truth)
    drawn = q.rsample((2,))
    assert drawn.shape == (2, 6, 3)
    torch.testing.assert_close(q.score(drawn), -drawn / 0.25)


@pytest.mark.parametrize("flow", ["planar", "radial", "sylvester", "iaf"])
def test_the_score_of_a_draw_is_the_gradient_of_its_log_density(flow):
    net = AmortizedFlow(3, 4, flow, 3).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    q = net(torch.randn(6, 4, dtype=F64))
    wide = q.expand((2, 6))
    z = wide.rsample()
    leaf = z.detach().requires_grad_()
    truth = torch.autograd.grad(q.log_prob(leaf).sum(), leaf)[0]
    torch.testing.assert_close(wide.score(z), truth)  # from the base point of the draw
    torch.testing.assert_close(q.score(z.detach().clone()), truth)  # from the value alone


# The guide and its plates.


def particles(num, kind=flowvi.ELBO):
    return kind(num, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("kind", [flowvi.ELBO, flowvi.PathELBO])
@pytest.mark.parametrize("flow", ["planar", "sylvester"])
def test_subsampled_and_full_gradients_agree_in_expectation(kind, flow):
    guide = shaken(flowvi.AmortizedGuide(whole, encoder(), flow, 2), X)
    full = torch.stack([gradient(particles(100, kind), whole, guide, X) for _ in range(20)])
    ways = {
        "size": lambda _: (by_size, X),
        "index": lambda i: (by_index, X, i),
        "minibatch": lambda i: (by_minibatch, X[i], 12),
    }
    for way, call in ways.items():
        model = call(torch.arange(4))[0]
        twin = copy.deepcopy(guide)
        twin._model = (model,)
        each = []
        for _ in range(60):
            _, *args = call(torch.randperm(12)[:4])
            each.append(gradient(particles(30, kind), model, twin, *args))
        part = torch.stack(each)
        error = (full.var(0) / len(full) + part.var(0) / len(part)).sqrt()
        gap = (full.mean(0) - part.mean(0)).abs()
        assert (gap < 4.5 * error + 1e-12).all(), way
        assert (full.mean(0).abs() > 6 * error).sum() > 10, way  # enough gradients that are not zero


def test_the_partition_of_the_data_has_the_full_objective(monkeypatch):
    # The same noise for each datum, by a guide without any: the batches' scaled losses have the whole's mean, exactly.
    guide = shaken(flowvi.AmortizedGuide(by_index, encoder(), num_flows=2), X, torch.arange(4))
    noise = torch.randn(12, 2, dtype=F64)
    index = None

    def rsample(self, sample_shape=()):
        z = noise[index]
        for t in self.transforms:
            z = t(z)
        return z

    monkeypatch.setattr(Flow, "rsample", rsample)
    losses = []
    for part in (torch.arange(12), *torch.randperm(12).split(4)):
        index = part
        losses.append(Trace_ELBO().loss(by_index, guide, X, part))
    assert sum(losses[1:]) / 3 == pytest.approx(losses[0], rel=1e-10)


def test_the_guide_encodes_the_rows_that_the_model_sees():
    guide = shaken(flowvi.AmortizedGuide(by_size, encoder(), num_flows=0), X, scale=1.0)
    trace = poutine.trace(guide).get_trace(X)
    index = trace.nodes["data"]["value"]
    context = guide.encoder(X[index])
    loc = guide.local.base(context)[0]
    base = trace.nodes["_AmortizedGuide_local"]["fn"].transforms[-1].params[0]
    torch.testing.assert_close(base, loc)
    assert trace.nodes["z"]["scale"] == 3
    assert trace.nodes["_AmortizedGuide_local"]["scale"] == 3
    replayed = poutine.trace(poutine.replay(by_size, trace)).get_trace(X)
    assert torch.equal(replayed.nodes["data"]["value"], index)


def test_batches_of_any_size_are_taken():
    guide = flowvi.AmortizedGuide(by_minibatch, encoder(), num_flows=2)
    for size in (5, 3, 12, 1):
        assert guide(X[:size], 12)["z"].shape == (size, 2)
        assert math.isfinite(Trace_ELBO().loss(by_minibatch, guide, X[:size], 12))


def test_path_gradient_is_zero_at_the_posterior():
    guide = flowvi.AmortizedGuide(whole, nn.Identity(), num_flows=0)
    guide(X)
    precision = W.T @ W / NOISE**2 + torch.eye(2, dtype=F64)
    variance = torch.linalg.inv(precision)
    loc, raw = guide.local.base.heads
    with torch.no_grad():
        loc.weight.copy_(variance @ W.T / NOISE**2)
        raw.bias[:] = 7 * torch.atanh(variance.diagonal().sqrt().log() / 7)
    assert float(gradient(flowvi.PathELBO(), whole, guide, X).abs().max()) < 1e-10
    assert float(gradient(particles(9, flowvi.PathELBO), whole, guide, X).abs().max()) < 1e-10
    assert float(gradient(flowvi.ELBO(), whole, guide, X).abs().max()) > 1e-2
    covariance = W @ W.T + NOISE**2 * torch.eye(3, dtype=F64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), covariance).log_prob(X)
    assert Trace_ELBO().loss(whole, guide, X) == pytest.approx(-float(truth.sum()))
    found = flowvi.log_likelihood(whole, guide, X, num_importance_samples=3)
    torch.testing.assert_close(found.values, truth)
    assert float(gradient(flowvi.IWELBO(5), whole, guide, X).abs().max()) < 1e-10


def test_importance_weighted_gradients_agree_through_the_stacks():
    guide = shaken(flowvi.AmortizedGuide(whole, encoder(), num_flows=3), X)
    plain, dreg = (
        torch.stack([gradient(flowvi.IWELBO(5, dreg=dreg), whole, guide, X) for _ in range(150)])
        for dreg in (False, True)
    )
    error = ((plain.var(0) + dreg.var(0)) / 150).sqrt()
    assert ((plain.mean(0) - dreg.mean(0)).abs() < 4.5 * error + 1e-12).all()
    assert (plain.mean(0).abs() > 5 * error).sum() > 10


@pytest.mark.parametrize("flow", ["planar", "radial", "iaf"])
def test_it_learns(flow):
    def bent(x):
        with pyro.plate("data", len(x)):
            z = latent()
            pyro.sample("x", dist.Normal(z.square().sum(-1), 0.3), obs=x)

    x = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=F64)
    guide = flowvi.AmortizedGuide(bent, nn.Sequential(nn.Unflatten(0, (4, 1)), encoder(1, 16)), flow, 4)
    svi = SVI(bent, guide, pyro.optim.Adam({"lr": 1e-2}), loss=particles(8, flowvi.PathELBO))
    before = particles(300).loss(bent, guide, x)
    for _ in range(120):
        svi.step(x)
    assert particles(300).loss(bent, guide, x) < before - 20


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 3.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    with pyro.plate("data", 50, subsample_size=10) as i:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])


def whole_hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 3.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    with pyro.plate("data", 50):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_globals_beside_locals():
    x = 2 + torch.randn(50, dtype=F64)
    net = nn.Sequential(nn.Unflatten(0, (-1, 1)), encoder(1))
    guide = flowvi.AmortizedGuide(hierarchy, net, num_flows=2, global_flow={"num_flows": 2})
    shaken(guide, x, scale=0.1)
    assert {k: tuple(v.shape) for k, v in guide(x).items()} == {"mu": (), "tau": (), "z": (10,)}
    twin = copy.deepcopy(guide)
    twin._model = (whole_hierarchy,)
    part = torch.stack([gradient(particles(20), hierarchy, guide, x) for _ in range(50)])
    full = torch.stack([gradient(particles(20), whole_hierarchy, twin, x) for _ in range(25)])
    error = (full.var(0) / len(full) + part.var(0) / len(part)).sqrt()
    assert ((full.mean(0) - part.mean(0)).abs() < 4.5 * error + 1e-12).all()
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 2e-2}), loss=particles(4, flowvi.PathELBO))
    for _ in range(200):
        svi.step(x)
    mu = torch.stack([guide(x)["mu"].detach() for _ in range(200)])
    assert abs(float(mu.mean()) - float(x.mean())) < 0.35
    assert 0.03 < float(mu.std()) < 0.5


# Shapes, supports, and what Pyro asks.


def test_supports_and_plates_on_both_sides():
    y = torch.rand(4, 5, 3, dtype=F64)  # 4 groups (left), 5 data points, 3 replicates (right)

    def model(y):
        one = torch.ones((), dtype=F64)
        with pyro.plate("data", 5, dim=-2):
            a = pyro.sample("a", dist.LogNormal(0 * one, one))
            b = pyro.sample("b", dist.Dirichlet(torch.ones(3, dtype=F64)))
            with pyro.plate("replicates", 3, dim=-1):
                c = pyro.sample("c", dist.Uniform(0 * torch.ones(5, 3, dtype=F64), 2.0))
                with pyro.plate("groups", 4, dim=-3):
                    d = pyro.sample("d", dist.Normal(c, one))
                    pyro.sample("y", dist.Normal(d * a + b[..., 0], one), obs=y)

    guide = flowvi.AmortizedGuide(
        model, encoder(12), plate="data", inputs=lambda y: y.movedim(1, 0).flatten(1), num_flows=2
    )
    shaken(guide, y)
    drawn = guide(y)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {"a": (5, 1), "b": (5, 1, 3), "c": (5, 3), "d": (4, 5, 3)}
    assert bool((drawn["a"] > 0).all() and (drawn["c"] > 0).all() and (drawn["c"] < 2).all())
    torch.testing.assert_close(drawn["b"].sum(-1), torch.ones(5, 1, dtype=F64))
    wide = flowvi.ELBO(2000, vectorize_particles=True, max_plate_nesting=3)
    one = flowvi.ELBO(1, max_plate_nesting=3)
    each = torch.tensor([one.loss(model, guide, y) for _ in range(200)])
    assert abs(wide.loss(model, guide, y) - float(each.mean())) < 5 * float(each.std()) / math.sqrt(200)


def test_log_density_is_in_the_constrained_space():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    x = torch.rand(6, dtype=F64)
    guide = flowvi.AmortizedGuide(model, nn.Unflatten(0, (-1, 1)), num_flows=0, init_scale=0.7)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    log_q = trace.nodes["_AmortizedGuide_local"]["log_prob"] + trace.nodes["a"]["log_prob"]
    a = trace.nodes["a"]["value"]
    torch.testing.assert_close(log_q, torch.distributions.LogNormal(torch.zeros((), dtype=F64), 0.7).log_prob(a))


def test_copies_pickles_and_states():
    guide = shaken(flowvi.AmortizedGuide(whole, encoder(), num_flows=2), X)
    twin = copy.deepcopy(guide)
    pyro.set_rng_seed(1)
    z = guide(X)["z"]
    pyro.set_rng_seed(1)
    torch.testing.assert_close(twin(X)["z"], z)
    fresh = flowvi.AmortizedGuide(whole, encoder(), num_flows=2)
    fresh(X)
    fresh.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(1)
    torch.testing.assert_close(fresh(X)["z"], z)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(loaded(X)["z"], z)
    assert guide.model is whole


def test_print_says_what_each_row_and_all_rows_have():
    net = nn.Sequential(nn.Unflatten(0, (-1, 1)), encoder(1))
    guide = flowvi.AmortizedGuide(whole_hierarchy, net, num_flows=3)
    assert repr(guide) == "<AmortizedGuide of whole_hierarchy: planar K = 3, not called yet>"
    guide(torch.randn(50, dtype=F64))
    pyro.clear_param_store()
    found = repr(guide)
    local, shared = guide.local.input_dim, guide.globals.latent_dim
    assert f"AmortizedGuide of whole_hierarchy, D = {local} for each row of the plate 'data'" in found
    assert f"{sum(p.numel() for p in guide.parameters())} parameters" in found
    assert f"given 8 features and the global draw ({shared})" in found
    assert f"all rows: AutoFlow of whole_hierarchy, D = {shared}" in found
    assert not list(pyro.get_param_store().keys())
    function = flowvi.AmortizedGuide(whole, lambda x: x, num_flows=3)
    function(X)
    assert "encoder: a function" in repr(function)
    assert "all rows" not in repr(function)


def test_the_first_call_leaves_the_random_state_to_the_draw():
    guide = flowvi.AmortizedGuide(whole, encoder(), num_flows=0)
    with torch.random.fork_rng():
        guide(X)
    pyro.set_rng_seed(2)
    eps = torch.randn(12, 2, dtype=F64)
    pyro.set_rng_seed(2)
    torch.testing.assert_close(guide(X)["z"], eps)


def test_it_joins_other_guides():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as i:
            z = latent()
            observe(x[i] - mu, z)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["mu"])))
    guide.append(flowvi.AmortizedGuide(poutine.block(model, hide=["mu"]), encoder(), num_flows=2))
    for _ in range(3):
        assert math.isfinite(flowvi.PathELBO().loss_and_grads(model, guide, X))
    assert guide(X)["z"].shape == (4, 2)


def test_predictive_takes_it():
    guide = flowvi.AmortizedGuide(whole, encoder(), num_flows=2)
    draws = Predictive(whole, guide=guide, num_samples=7)(X)
    assert draws["z"].shape == (7, 12, 2)


def discrete(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))


def none(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1), obs=x)


def outside(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def varying(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(0.0, 1 + x[:, 0].abs()))


def linked(x):
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(torch.zeros(()), top))


def doubled(x):
    with pyro.plate("one", 12):
        pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("two", 12):
        pyro.sample("b", dist.Normal(0.0, 1.0))


def one_by_one(x):
    for i in pyro.plate("data", 2):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (discrete, DiscreteLatentError, "'k' is discrete"),
        (none, NoLatentError, "no latent"),
        (outside, TargetError, "nothing to amortize"),
        (one_by_one, TargetError, "sequential plate"),
        (varying, TargetError, "differs between data points"),
        (linked, TargetError, "depends on other latents"),
        (doubled, OptionError, "say by plate="),
    ],
)
def test_what_can_not_be_amortized_says_so(model, error, words):
    with pytest.raises(error, match=words):
        flowvi.AmortizedGuide(model, encoder())(X)


def test_wrong_arguments_say_so():
    with pytest.raises(UnknownFlowError, match="planar"):
        flowvi.AmortizedGuide(whole, encoder(), "planer")
    with pytest.raises(OptionError, match="can't be built with options"):
        flowvi.AmortizedGuide(whole, encoder(), "planar", wrong=1)
    with pytest.raises(OptionError, match="num_flows"):
        flowvi.AmortizedGuide(whole, encoder(), num_flows=-1)
    with pytest.raises(OptionError, match="init_scale"):
        flowvi.AmortizedGuide(whole, encoder(), init_scale=0.0)
    with pytest.raises(OptionError, match="encoder"):
        flowvi.AmortizedGuide(whole, None)
    with pytest.raises(OptionError, match="plate named 'wrong'"):
        flowvi.AmortizedGuide(whole, encoder(), plate="wrong")(X)
    with pytest.raises(DimensionError, match="features"):
        flowvi.AmortizedGuide(whole, lambda x: x.sum())(X)
    with pytest.raises(DimensionError, match="has 5 rows"):
        flowvi.AmortizedGuide(whole, encoder(), inputs=lambda x: x[:5])(X)
