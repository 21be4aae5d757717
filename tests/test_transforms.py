"""One conformance suite that walks the registry and the classes: a new flow is tested by being registered."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import Transform as TorchTransform

import flowvi
from flowvi.errors import DimensionError, OptionError, UnknownFlowError
from flowvi.transforms import (
    Affine,
    Planar,
    PlanarStack,
    Radial,
    RadialStack,
    available,
    conditional_planar,
    conditional_radial,
    register,
)
from flowvi.transforms.registry import build

CASES = {
    **{name: partial(lambda name, d: build(name, d, 4)[0], name) for name in available()},
    "planar layer": Planar,
    "planar layer, the paper's constraint": partial(Planar, constraint="softplus"),
    "planar stack, the paper's constraint": partial(PlanarStack, num_flows=3, constraint="softplus"),
    "radial layer": Radial,
    "affine diag": partial(Affine, kind="diag"),
    "affine low rank": partial(Affine, kind="low_rank"),
    "affine full": partial(Affine, kind="full"),
}
DIMS = (1, 2, 10)
NEED_TWO = {"funnel", "householder"}  # flows that refuse D = 1


def perturbed(make, dim: int, *, scale: float = 0.7, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A transform away from its start."""
    torch.manual_seed(seed)
    t = make(dim).to(dtype)
    with torch.no_grad():
        for name, p in t.named_parameters():
            fan_in = p.shape[-1] if "layer" in name and p.dim() == 2 else 1  # a network's outputs stay of order one
            p.add_(scale * fan_in**-0.5 * torch.randn_like(p))
    return t


@pytest.fixture(params=CASES, ids=str)
def make(request):
    make = CASES[request.param]
    if request.param in NEED_TWO and request.getfixturevalue("dim") == 1:
        with pytest.raises(OptionError, match="use"):
            make(1)
        pytest.skip("has nothing to do at D = 1, and says what to use")
    return make


@pytest.fixture(params=DIMS, ids=lambda d: f"D={d}")
def dim(request):
    return request.param


def test_log_det_is_that_of_autograds_jacobian(make, dim):
    t = perturbed(make, dim)
    for x in torch.randn(5, dim, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda v, t=t: t(v), x)
        expected = torch.linalg.slogdet(jacobian)[1]
        assert t.log_abs_det_jacobian(x, t(x)).item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_round_trip(make, dim, dtype, tolerance):
    t = perturbed(make, dim, dtype=dtype)
    x = 2 * torch.randn(200, dim, dtype=dtype)
    y = t(x)
    back = t.inv(y.clone())  # a clone, so that the cache can't answer
    assert torch.allclose(back, x, rtol=tolerance, atol=tolerance)
    new = 2 * torch.randn(200, dim, dtype=dtype)
    assert torch.allclose(t(t.inv(new).clone()), new, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_fifty_dimensions(name):
    """Round trips, and one log-determinant against autograd's Jacobian, where sums over D are long."""
    dim = 50
    t = perturbed(CASES[name], dim)
    x = torch.randn(20, dim, dtype=torch.float64)
    back, log_det = t.invert(t(x).clone())
    assert torch.allclose(back, x, rtol=1e-6, atol=1e-6)
    assert torch.allclose(-log_det, t.forward_and_log_det(x)[1], atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(lambda v: t(v), x[0])
    assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(-log_det[0].item(), abs=1e-6)


def test_log_det_is_right_for_any_pair(make, dim):
    t = perturbed(make, dim)
    x, other = torch.randn(2, 7, dim, dtype=torch.float64)
    y, y_other = t(x), t(other)
    assert torch.allclose(t.log_abs_det_jacobian(x, y), t.forward_and_log_det(x)[1])
    assert torch.allclose(t.log_abs_det_jacobian(other, y_other), t.forward_and_log_det(other)[1])
    x_new = t.inv(y.clone())
    assert torch.allclose(t.log_abs_det_jacobian(x_new, y), t.forward_and_log_det(x)[1], atol=1e-9)
    assert torch.allclose(t.inv.log_abs_det_jacobian(y, x), -t.forward_and_log_det(x)[1], atol=1e-9)


def test_shapes(make, dim):
    t = perturbed(make, dim)
    for batch in ((), (3,), (2, 3)):
        x = torch.randn(*batch, dim, dtype=torch.float64)
        y = t(x)
        assert y.shape == x.shape
        assert t.log_abs_det_jacobian(x, y).shape == batch
        assert t.inv(y.clone()).shape == x.shape
    assert t.forward_shape(torch.Size([4, dim])) == (4, dim)
    with pytest.raises(DimensionError, match=f"D = {dim}"):
        t.forward_shape(torch.Size([4, dim + 1]))
    with pytest.raises(DimensionError, match="input_dim"):
        t(torch.randn(4, dim + 1, dtype=torch.float64))
    with pytest.raises(OptionError, match=r"to\(torch.float32\)"):
        t(torch.randn(4, dim, dtype=torch.float32))


def test_starts_as_the_identity(make, dim, request):
    if "paper" in request.node.name:  # m(0) = -0.307 there: that is why it is not the default
        assert not torch.allclose(make(dim)(torch.ones(3, dim)), torch.ones(3, dim))
        return
    t = make(dim)
    x = torch.randn(5, dim)
    assert torch.allclose(t(x), x, atol=1e-2 if "low rank" in request.node.name else 1e-6)


def test_gradients_by_gradcheck(make, dim):
    t = perturbed(make, dim)
    x = torch.randn(3, dim, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in t.named_parameters()]

    def both(x, *params):
        state = dict(zip(names, params, strict=True))
        out = torch.func.functional_call(_Call(t), {f"t.{k}": v for k, v in state.items()}, (x,))
        return tuple(v for v in out if v.requires_grad)  # not the log|det| of a flow that keeps volumes

    many = sum(p.numel() for p in t.parameters()) > 500  # a network: along random directions, not one by one
    assert torch.autograd.gradcheck(both, (x, *t.parameters()), fast_mode=many)


class _Call(torch.nn.Module):
    """y, log|det| and the inverse at y + .1, for gradcheck."""

    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, x):
        return *self.t.forward_and_log_det(x), self.t.inverse(x + 0.1)


def test_gradients_reach_every_parameter(make, dim):
    t = perturbed(make, dim)
    x = torch.randn(20, dim, dtype=torch.float64)
    y, log_det = t.forward_and_log_det(x)
    (y.square().sum() + log_det.sum()).backward()
    for name, p in t.named_parameters():
        assert p.grad is not None, name
        strictly_lower_of_one = name == "lower" and dim == 1
        assert strictly_lower_of_one or p.grad.abs().max() > 0, name


def test_score_is_autograds(make, dim):
    t = perturbed(make, dim)
    assert t.has_path_score
    flow = flowvi.Flow(dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1), [t])
    z, log_q, score = flow.rsample_with_score(50)
    fresh = z.detach().clone().requires_grad_()
    value = flow.log_prob(fresh)
    expected = torch.autograd.grad(value.sum(), fresh)[0]
    assert torch.allclose(log_q, value, atol=1e-8)
    assert torch.allclose(score, expected, atol=1e-7)
    assert torch.allclose(flow.score(z.detach().clone()), expected, atol=1e-7)


def test_works_under_vmap_and_grad(make, dim):
    t = perturbed(make, dim)
    x = torch.randn(3, 4, dim, dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(t)(x), t(x))
    single = torch.func.vmap(torch.func.vmap(lambda v: t.forward_and_log_det(v)[1]))(x)
    assert torch.allclose(single, t.forward_and_log_det(x)[1])
    assert torch.allclose(torch.func.vmap(t.inverse)(x), t.inverse(x), atol=1e-10)
    per_point = torch.func.vmap(torch.func.grad(lambda v: t.forward_and_log_det(v)[1]))(x[0])
    leaf = x[0].clone().requires_grad_()
    total = t.forward_and_log_det(leaf)[1].sum() + 0 * leaf.sum()  # an affine map's does not depend on x
    assert torch.allclose(per_point, torch.autograd.grad(total, leaf)[0], atol=1e-10)


def test_cache_answers_and_never_goes_stale(make, dim):
    t = perturbed(make, dim)
    x = torch.randn(4, dim, dtype=torch.float64)
    y = t(x)
    assert t(x) is y
    assert t.inv(y) is x
    with torch.no_grad():
        next(t.parameters()).add_(0.5)
    fresh = t(x)
    assert not torch.equal(fresh, y)
    assert torch.allclose(t.inv(y), t.inv(y.clone()))
    with torch.no_grad():
        silent = t(x)
    assert not silent.requires_grad
    assert t(x).requires_grad  # a value without a graph does not answer for one with


def test_cache_holds_nothing_that_is_no_longer_used(make, dim):
    t = perturbed(make, dim)
    y = t(torch.randn(4, dim, dtype=torch.float64))
    assert t._pair is not None
    del y
    gc.collect()
    assert t._pair is None


def test_cache_can_be_switched_off(make, dim):
    t = perturbed(make, dim)
    x = torch.randn(4, dim, dtype=torch.float64)
    plain = t.with_cache(0)
    assert plain(x) is not plain(x)
    assert torch.equal(plain(x), t(x))
    assert plain.with_cache(1)(x) is not None
    assert t.with_cache(1) is t


def test_copies_before_and_after_a_call(make, dim):
    t = perturbed(make, dim)
    x = torch.randn(4, dim, dtype=torch.float64)
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(t, buffer)
        buffer.seek(0)
        twins = [copy.deepcopy(t), pickle.loads(pickle.dumps(t)), torch.load(buffer, weights_only=False)]
        for twin in twins:
            assert torch.equal(twin(x), t(x.clone()))
            assert all(a is not b for a, b in zip(twin.parameters(), t.parameters(), strict=True))
        t.log_abs_det_jacobian(x, t(x))  # fills the cache for the second round
    assert str(dim) in repr(t)


def test_inside_pyro(make, dim):
    t = perturbed(make, dim)
    base = dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1)
    q = dist.TransformedDistribution(base, [t])
    z = q.rsample((6,))
    assert torch.allclose(q.log_prob(z), q.log_prob(z.clone()), atol=1e-8)
    layers = dist.transforms.iterated(3, partial(make, dim))
    layers.double()
    x = torch.randn(2, dim, dtype=torch.float64)
    y = layers(x)
    assert torch.allclose(layers.inv(y.clone()), x, atol=1e-8)
    assert isinstance(t, TorchTransform)
    pyro.clear_param_store()
    pyro.module("t", t)
    count = sum(name.startswith("t$$$") for name in pyro.get_param_store())
    assert count == len(list(t.parameters()))


@pytest.mark.parametrize("make", [conditional_planar, conditional_radial])
@pytest.mark.parametrize("dim", DIMS)
def test_conditional_twin_is_the_plain_form_at_its_parameters(make, dim):
    torch.manual_seed(0)
    twin = make(dim, context_dim=3).double()
    x, context = torch.randn(5, dim).double(), torch.randn(5, 3).double()
    assert torch.allclose(twin.condition(context)(x), x)  # the identity at the start, for every context
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn_like(p))
    at = twin.condition(context)
    y = at(x)
    assert torch.allclose(at.inv(y.clone()), x, atol=1e-9)
    plain = (Planar if make is conditional_planar else Radial)(dim).double()
    params = [p[2] for p in at.params]
    with torch.no_grad():
        for p, value in zip(plain.parameters(), params, strict=True):
            p.copy_(value)
    assert torch.allclose(plain(x[2]), y[2])
    assert torch.allclose(plain.log_abs_det_jacobian(x[2], plain(x[2])), at.log_abs_det_jacobian(x, y)[2])
    jacobian = torch.autograd.functional.jacobian(lambda v: twin.condition(context[0])(v), x[0])
    expected = torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(at.log_abs_det_jacobian(x, y)[0], expected, atol=1e-9)
    q = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(dim).double(), 1.0), [twin])
    z = q.condition(context).rsample()
    q.condition(context).log_prob(z).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_conditional_jacobian_at_broadcast_contexts():
    twin = conditional_planar(2, context_dim=3)
    assert twin.condition(torch.randn(3))(torch.randn(7, 2)).shape == (7, 2)


@pytest.mark.parametrize(("stack", "layer"), [(PlanarStack, Planar), (RadialStack, Radial)])
def test_stack_is_its_layers_in_a_row(stack, layer, dim):
    t = perturbed(lambda d: stack(d, num_flows=5), dim)
    x = torch.randn(20, dim, dtype=torch.float64)
    y, log_det = x, torch.zeros(20, dtype=torch.float64)
    for k in range(5):
        one = layer(dim).double()
        with torch.no_grad():
            for p, whole in zip(one.parameters(), t.parameters(), strict=True):
                p.copy_(whole[k])
        y, part = one.forward_and_log_det(y)
        log_det = log_det + part
    assert torch.allclose(t(x), y, atol=1e-12)
    assert torch.allclose(t.log_abs_det_jacobian(x, t(x)), log_det, atol=1e-12)


@pytest.mark.parametrize("name", ["planar", "radial"])
@pytest.mark.parametrize("seed", range(3))
def test_density_of_a_random_flow_integrates_to_one(name, seed):
    t = perturbed(lambda d: build(name, d, 4)[0], 2, scale=1.5, seed=seed)
    flow = flowvi.Flow(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), [t])
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=5e-3)


# The registry.


def test_registered_name_works_everywhere():
    register("test flow", lambda input_dim, shift=0.0: Affine(input_dim, loc=shift), overwrite=True)
    assert "test flow" in available()
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("test flow", 2, 3, "diag", {"shift": 1.0}))
    assert flow.rsample_and_log_prob(4)[0].shape == (4, 2)
    posterior = flowvi.fit(
        flowvi.energies.U2(), flow="test flow", num_flows=1, num_steps=20, verify=False, progress=False
    )
    assert posterior.config["flow"] == "test flow"
    with pytest.raises(OptionError, match="overwrite=True"):
        register("test flow", Planar)


def test_unknown_name_says_what_there_is():
    with pytest.raises(UnknownFlowError, match=r"Did you mean 'planar'\? Available: .*radial"):
        build("planr", 2, 4)
    with pytest.raises(UnknownFlowError, match="no flow named 'nonsense'"):
        flowvi.fit(flowvi.energies.U1(), flow="nonsense")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Planar(0), "input_dim must be a positive integer"),
        (lambda: PlanarStack(2, 0), "num_flows must be a positive integer"),
        (lambda: RadialStack(2, 1.5), "num_flows must be a positive integer"),
        (lambda: Planar(2, constraint="abs"), "constraint must be one of squareplus, softplus"),
        (lambda: Affine(2, kind="round"), "kind must be one of diag, low_rank, full"),
        (lambda: Affine(2, scale=-1.0), "scale must be positive"),
        (lambda: build("planar", 2, -1), "num_flows must be a whole number of at least 0"),
        (lambda: build(lambda input_dim: 3, 2, 1), "not a transform"),
        (lambda: build("planar", 2, 1, colour="red"), "could not be built with options"),
        (lambda: register("x", 3), "factory must be callable"),
        (lambda: Planar(2).with_cache(3), "cache_size must be 0 or 1"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(OptionError, match=text):
        call()


def test_log_prob_goes_backward_again_on_the_same_tensor(make, dim):
    # Gradients are accumulated without a step between: no graph may be handed out twice, nor outlive its use.
    t = perturbed(make, dim)
    y = torch.randn(4, dim, dtype=torch.float64)
    flow = flowvi.Flow(dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1), [t])
    plain = dist.TransformedDistribution(dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1), [t])
    first = flow.log_prob(y).sum()
    if not first.requires_grad:
        pytest.skip("no parameters that log q depends on")
    first.backward()
    for q in (flow, plain, plain):
        again = q.log_prob(y).sum()
        assert again.item() == pytest.approx(first.item(), abs=1e-9)
        again.backward()
    alive = weakref.ref(y)
    del y, again, first
    gc.collect()
    assert alive() is None
