"""The masked network, and IAF and MAF made of it; what every transform must do is in test_transforms.py."""

from __future__ import annotations

import copy

import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import DimensionError, OptionError
from flowvi.transforms import IAF, MAF, conditional_iaf, conditional_maf
from flowvi.transforms.autoregressive import PATH_SCORE_LIMIT, Autoregressive
from flowvi.transforms.elementwise import Elementwise
from flowvi.transforms.masked import MaskedNetwork
from flowvi.transforms.networks import dense
from flowvi.transforms.registry import build

KINDS = {"iaf": IAF, "maf": MAF}


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return KINDS[request.param]


def perturbed(t, scale: float = 0.7, seed: int = 0):
    """Away from its start, in float64, with outputs of order one."""
    torch.manual_seed(seed)
    t = t.double()
    with torch.no_grad():
        for p in t.parameters():
            p.add_(scale * torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.dim() == 2 else 1))
    return t


def fast(t, x, *context):
    """The direction of one pass."""
    given = t.forward_given if t.fast == "forward" else t.inverse_given
    return given(x, *(context or (None,)))[0]


def jacobian(f, x):
    return torch.autograd.functional.jacobian(f, x)


# The masked network.


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize(
    ("dim", "hidden"), [(2, (8,)), (5, (4, 4)), (5, (7, 16)), (10, (9,)), (10, (32, 32)), (10, (64, 12, 33)), (4, ())]
)
def test_parameters_depend_on_all_coordinates_before_and_no_other(dim, hidden, context_dim):
    if context_dim and min(hidden, default=dim) < dim:
        pytest.skip("a unit of degree 0 takes the place of one that the last coordinate needs")
    net = perturbed(MaskedNetwork(dim, hidden, 2, context_dim=context_dim, activation="tanh"))
    context = torch.randn(context_dim, dtype=torch.float64) if context_dim else None
    j = jacobian(lambda v: net(v, context), torch.randn(dim, dtype=torch.float64))  # (D, P, D)
    before = torch.arange(dim) < torch.arange(dim).unsqueeze(-1)
    assert ((j != 0) == before.unsqueeze(1)).all()


@pytest.mark.parametrize(("dim", "hidden"), [(10, (3, 3)), (50, (16, 5)), (7, (1,))])
def test_narrow_network_sees_no_coordinate_that_it_must_not(dim, hidden):
    net = perturbed(MaskedNetwork(dim, hidden, 1, activation="tanh"))
    j = jacobian(net, torch.randn(dim, dtype=torch.float64)).squeeze(1)
    before = torch.arange(dim) < torch.arange(dim).unsqueeze(-1)
    assert (j[~before] == 0).all()
    assert (j[-1, :-1] != 0).all()  # the last one still sees all


def test_every_parameter_depends_on_the_context():
    for hidden in ((8, 8), ()):
        net = perturbed(MaskedNetwork(3, hidden, 2, context_dim=2, activation="tanh"))
        x = torch.randn(3, dtype=torch.float64)
        j = jacobian(lambda c, net=net, x=x: net(x, c), torch.randn(2, dtype=torch.float64))
        assert (j != 0).all()


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden", [(), (4,), (16, 9), (2, 2)])
@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
def test_network_step_by_step_is_the_network_at_once(context_dim, hidden, activation):
    net = perturbed(MaskedNetwork(5, hidden, 3, context_dim=context_dim, activation=activation))
    x = torch.randn(6, 5, dtype=torch.float64)
    context = torch.randn(6, context_dim, dtype=torch.float64) if context_dim else None
    seen = []

    def step(i, theta):
        seen.append(theta)
        return x[:, i], theta.sum(-1)

    found, kept = net.solve(step, x, context)
    assert torch.equal(found, x)
    assert torch.allclose(torch.stack(seen, 1), net(x, context), atol=1e-12)
    assert torch.allclose(kept, net(x, context).sum(-1), atol=1e-12)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("hidden", [(), (4,), (16, 9), (2, 2)])
@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
def test_transposed_solve_is_that_of_autograds_jacobian(context_dim, hidden, activation):
    net = perturbed(MaskedNetwork(5, hidden, 3, context_dim=context_dim, activation=activation))
    x = torch.randn(6, 5, dtype=torch.float64)
    context = torch.randn(6, context_dim, dtype=torch.float64) if context_dim else None
    offset, slope = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        weights, biases = net.flat_layers(context)
        p = net.solve_transposed(weights, dense(x, weights, biases, activation)[1], offset, slope)
    for n in range(6):
        j = jacobian(lambda v, n=n: net(v, None if context is None else context[n]), x[n])  # (D, P, D)
        weighted = torch.einsum("jp,jpi->ij", slope[n], j)  # p = J^T (offset - slope p)
        expected = torch.linalg.solve(
            torch.eye(5, dtype=torch.float64) + weighted, torch.einsum("jp,jpi->i", offset[n], j)
        )
        assert torch.allclose(p[n], expected, atol=1e-12)


# The flows.


@pytest.mark.parametrize("order", [None, "random", [2, 0, 3, 1]])
def test_jacobian_is_triangular_in_the_order_and_full_below(kind, order):
    t = perturbed(kind(4, order=order, activation="tanh"))
    j = jacobian(lambda v: fast(t, v), torch.randn(4, dtype=torch.float64))
    places = torch.arange(4) if t.order is None else t.order
    j = j[places][:, places]
    assert (j.triu(1) == 0).all()
    assert (j.tril() != 0)[torch.ones(4, 4).tril() == 1].all()
    if isinstance(order, list):
        assert places.tolist() == order


@pytest.mark.parametrize("dim", [1, 2, 10, 50])
@pytest.mark.parametrize("order", [None, "random"])
def test_slow_direction_inverts_the_fast_one(kind, dim, order):
    t = perturbed(kind(dim, order=order))
    x = torch.randn(50, dim, dtype=torch.float64)
    y, log_det = t.forward_and_log_det(x)
    back, back_det = t.inverse_and_log_det(y)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(back_det, -log_det, atol=1e-9)


def test_slow_direction_has_exact_gradients_to_any_order():
    t = perturbed(IAF(3, hidden_dims=(4,), activation="tanh"))
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in t.named_parameters()]

    def inverse(y, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(Inverse(t), {f"t.{k}": v for k, v in state.items()}, (y,))

    assert torch.autograd.gradcheck(inverse, (y, *t.parameters()))
    assert torch.autograd.gradgradcheck(inverse, (y, *t.parameters()), fast_mode=True)


class Inverse(torch.nn.Module):
    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, y):
        return self.t.inverse_and_log_det(y)


class Sinh(Elementwise):
    """A tau whose slope depends on x: sinh(asinh(x) + a) + b, a test of what the affine one does not exercise."""

    num_params = 2

    def forward(self, x, params):
        a, b = params.unbind(-1)
        u = torch.asinh(x) + a
        return torch.sinh(u) + b, torch.log(torch.cosh(u)) - 0.5 * torch.log1p(x * x)

    def inverse(self, y, params):
        a, b = params.unbind(-1)
        u = torch.asinh(y - b)
        x = torch.sinh(u - a)
        return x, 0.5 * torch.log1p(x * x) - torch.log(torch.cosh(u))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_path_score_is_autograds_for_any_elementwise_map(direction, dim, context_dim):
    t = perturbed(
        Autoregressive(dim, Sinh(), fast=direction, hidden_dims=(9, 8), order="random", context_dim=context_dim), 0.4
    )
    context = torch.randn(20, context_dim, dtype=torch.float64) if context_dim else None
    x = torch.randn(20, dim, dtype=torch.float64)
    y, log_det, score = t.score_given(x, -x, context)
    fresh = y.detach().requires_grad_()
    back, back_det = t.inverse_given(fresh, context)
    value = -0.5 * back.square().sum(-1) + back_det
    assert torch.allclose(score, torch.autograd.grad(value.sum(), fresh)[0], atol=1e-8)
    assert not score.requires_grad
    expected = t.forward_given(x, context)
    assert torch.allclose(y, expected[0], atol=1e-12)
    assert torch.allclose(log_det, expected[1], atol=1e-12)
    assert y.requires_grad
    assert log_det.requires_grad


def test_score_of_a_stack_is_autograds():
    for name, dim in (("iaf", PATH_SCORE_LIMIT), ("maf", 30)):
        layers = [perturbed(t, seed=k) for k, t in enumerate(build(name, dim, 3))]
        flow = flowvi.Flow(dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1), layers)
        z, log_q, score = flow.rsample_with_score(20)
        fresh = z.detach().clone().requires_grad_()
        value = flow.log_prob(fresh)
        assert torch.allclose(log_q, value, atol=1e-7)
        assert torch.allclose(score, torch.autograd.grad(value.sum(), fresh)[0], atol=1e-6)


def test_score_leaves_the_graph_of_the_sample_whole():
    t = perturbed(IAF(4))
    x = torch.randn(10, 4, dtype=torch.float64)
    weights = torch.randn(10, 4, dtype=torch.float64)

    def gradients(y, log_det):
        return torch.autograd.grad((y * weights).sum() + log_det.sum(), list(t.parameters()))

    with_score = gradients(*t.forward_with_score(x, -x)[:2])
    plain = gradients(*t.forward_and_log_det(x))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(with_score, plain, strict=True))


def test_where_the_path_score_costs_too_much_there_is_none():
    assert IAF(PATH_SCORE_LIMIT).has_path_score
    assert not IAF(PATH_SCORE_LIMIT + 1).has_path_score
    assert MAF(200).has_path_score

    def log_prob(z):
        return -0.5 * z.square().sum(-1)

    options = {"num_steps": 5, "num_particles": 16, "whiten": False, "verify": False, "progress": False, "seed": 0}
    for name, dim, gradient in (("iaf", 3, "path"), ("iaf", 20, "standard"), ("maf", 20, "path")):
        posterior = flowvi.fit(log_prob, dim=dim, flow=name, num_flows=2, **options)
        assert posterior.config["gradient"].startswith(gradient)


def test_stack_alternates_its_orderings():
    for name in KINDS:
        layers = build(name, 3, 4)
        assert [None if t.order is None else t.order.tolist() for t in layers] == [None, [2, 1, 0]] * 2
        torch.manual_seed(0)
        orders = [t.order.tolist() for t in build(name, 8, 3, order="random")]
        assert len({tuple(o) for o in orders}) == 3


def test_state_dict_carries_a_random_ordering(kind):
    t = perturbed(kind(6, order="random"))
    torch.manual_seed(5)
    other = kind(6, order="random").double()
    assert not torch.equal(other.order, t.order)
    other.load_state_dict(t.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(other(x), t(x))
    assert torch.allclose(other.inv(t(x).clone()), x, atol=1e-9)
    assert torch.equal(copy.deepcopy(t)(x.clone()), t(x))


@pytest.mark.parametrize("make", [conditional_iaf, conditional_maf])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_conditional_twin(make, dim):
    torch.manual_seed(0)
    twin = make(dim, context_dim=3).double()
    x, context = torch.randn(5, dim).double(), torch.randn(5, 3).double()
    assert torch.allclose(twin.condition(context)(x), x)  # the identity at the start, for every context
    perturbed(twin)
    at = twin.condition(context)
    y = at(x)
    assert torch.allclose(at.inv(y.clone()), x, atol=1e-9)
    assert not torch.allclose(y, twin.condition(context + 1)(x))
    single = twin.condition(context[2])
    assert torch.allclose(single(x[2]), y[2])
    assert single(x).shape == (5, dim)  # one context for many points
    assert twin.condition(context.unsqueeze(1))(x).shape == (5, 5, dim)
    assert torch.allclose(twin.condition(context.unsqueeze(1)).inv(x), at_pairs(twin, context, x), atol=1e-9)
    expected = torch.linalg.slogdet(jacobian(lambda v: single(v), x[2]))[1]
    assert torch.allclose(at.log_abs_det_jacobian(x, y)[2], expected, atol=1e-9)
    q = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(dim).double(), 1.0), [twin])
    z = q.condition(context).rsample()
    q.condition(context).log_prob(z).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    with pytest.raises(OptionError, match=r"condition\(context\)"):
        twin.transform(x)
    with pytest.raises(DimensionError, match="size C = 3"):
        twin.condition(torch.randn(5, 2).double())


def at_pairs(twin, context, x):
    return torch.stack([torch.stack([twin.condition(c).inv(v.clone()) for v in x]) for c in context])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: IAF(3, order=[0, 1]), "order must be a permutation of 0..2"),
        (lambda: IAF(3, order="shuffled"), "order must be a permutation of 0..2, 'random' or None"),
        (lambda: MAF(3, hidden_dims=(0,)), "hidden_dims must be positive integers"),
        (lambda: MAF(3, activation="gelu"), "activation must be one of relu, tanh, elu"),
        (lambda: IAF(3, clip=-1.0), "clip must be a positive number"),
        (lambda: Autoregressive(3, Sinh(), fast="both"), "fast must be one of forward, inverse"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(OptionError, match=text):
        call()


# What they are for.


@pytest.mark.parametrize("name", ["iaf", "maf"])
def test_correlated_gaussian_is_fitted_exactly(name):
    # A diagonal base, so that the correlation is the layer's to find.
    q = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, -2.0, 0.5]), scale_tril=torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [-0.5, 0.5, 0.7]])
    )
    posterior = flowvi.fit(
        q.log_prob,
        dim=3,
        flow=name,
        num_flows=1,
        base="diag",
        whiten=False,
        num_steps=400,
        num_particles=64,
        lr=0.1,
        seed=0,
        hidden_dims=(),
        verify=False,
        progress=False,
    )
    z, log_q = posterior.flow.rsample_and_log_prob(4000, generator=torch.Generator().manual_seed(0))
    assert (log_q - q.log_prob(z)).mean().item() == pytest.approx(0, abs=1e-4)
