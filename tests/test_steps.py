"""The step without a tape is the step by autograd; Adam on a flat vector is torch's Adam, and skips what it must."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import flowvi
from flowvi import kernels
from flowvi.fit.adam import CLIP, FlatAdam, FlatParameters
from flowvi.fit.rmsprop import FlatRMSprop
from flowvi.fit.steps import TapeStep, make_step
from flowvi.kernels.compiled import threads
from flowvi.kernels.tiles import tape_shape
from flowvi.transforms.elementwise import Additive
from flowvi.transforms.networks import DenseNetwork
from flowvi.transforms.spline import RationalQuadratic

OBJECTIVES = (flowvi.ELBO, flowvi.PathELBO, flowvi.BalancedELBO, flowvi.CoveringELBO)


def away_from_the_start(name, base, dim, dtype):
    torch.manual_seed(0)
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, dim, 4, base), dtype=dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def one(flow, target, objective, tape):
    flat = FlatParameters(flow.module)
    try:
        step = TapeStep(flow, target, objective, flat) if tape else make_step(flow, target, objective, flat)
        num, elbo = step(0.7, torch.Generator().manual_seed(3))
        return step.fused, float(num), float(elbo), flat.grad.clone()
    finally:
        flat.release()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["planar", "radial"])
@pytest.mark.parametrize("base", ["diag", "low_rank", "full"])
@pytest.mark.parametrize("dim", [2, 14])
def test_a_step_without_a_tape_is_the_step_by_autograd(backend, name, base, dim):
    target = flowvi.as_density(flowvi.energies.Funnel(dim), dtype=torch.float64)
    flow = away_from_the_start(name, base, dim, torch.float64)
    for kind in OBJECTIVES:
        with kernels.use(backend):
            fused, *found = one(flow, target, kind(64), tape=False)
        _, *expected = one(flow, target, kind(64), tape=True)
        assert fused
        assert found[:2] == pytest.approx(expected[:2], rel=1e-12)
        assert torch.allclose(found[2], expected[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_bad_particles_are_left_out_without_a_tape_too(backend, kind):
    class Holes:
        def value_and_grad(self, z):
            return torch.where(z[:, 0] > 0.5, math.nan, -0.5 * z.square().sum(-1)), -z

    flow = away_from_the_start("planar", "full", 2, torch.float64)
    with kernels.use(backend):
        _, *found = one(flow, Holes(), kind(64), tape=False)
    _, *expected = one(flow, Holes(), kind(64), tape=True)
    assert 0 < found[0] < 64
    assert found[:2] == pytest.approx(expected[:2], rel=1e-12)
    assert torch.allclose(found[2], expected[2], rtol=1e-10, atol=1e-10)


WITH_NETWORKS = [
    ("real_nvp", 5, 4, {}),
    ("real_nvp", 2, 3, {"activation": "tanh"}),
    ("real_nvp", 7, 2, {"activation": "elu", "hidden_dims": (9,), "mixing": "none", "clip": 0.7}),
    ("real_nvp", 14, 1, {"hidden_dims": (6, 5, 4)}),
    ("nice", 5, 3, {"start": 1.0}),
    ("nice", 6, 3, {"hidden_dims": ()}),
    ("neural_spline", 5, 3, {}),
    ("neural_spline", 4, 2, {"num_bins": 3, "bound": 1.0, "min_share": 0.1, "min_slope": 0.2}),
    ("neural_spline", 2, 2, {"num_bins": 2, "activation": "tanh", "hidden_dims": (8,)}),
    ("iaf", 5, 4, {}),
    ("iaf", 2, 2, {"activation": "elu"}),
    ("iaf", 7, 3, {"hidden_dims": (20, 15, 9), "activation": "tanh"}),
    ("iaf", 6, 2, {"hidden_dims": (3,)}),  # fewer units than coordinates: some degrees have none
    ("iaf", 3, 2, {"hidden_dims": (), "order": "random"}),
    ("iaf", 14, 2, {"clip": 0.5}),
]


def with_networks(name, dim, num_flows, options, dtype):
    torch.manual_seed(0)
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, dim, num_flows, "diag", options), dtype=dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return flow


@pytest.mark.parametrize(("name", "dim", "num_flows", "options"), WITH_NETWORKS)
@pytest.mark.parametrize("num", [37, 600])
def test_a_step_through_networks_is_the_step_by_autograd(name, dim, num_flows, options, num, monkeypatch):
    monkeypatch.setattr(threads, "REPAYS", 10_000)
    before = torch.get_num_threads()
    target = flowvi.as_density(flowvi.energies.Funnel(dim), dtype=torch.float64)
    flow = with_networks(name, dim, num_flows, options, torch.float64)
    for kind in OBJECTIVES:
        _, *expected = one(flow, target, kind(num), tape=True)
        for num_threads in (1, 2):  # tiles over threads
            torch.set_num_threads(num_threads)
            try:
                fused, *found = one(flow, target, kind(num), tape=False)
            finally:
                torch.set_num_threads(before)
            assert fused
            assert found[:2] == pytest.approx(expected[:2], rel=1e-11)
            assert torch.allclose(found[2], expected[2], rtol=1e-9, atol=1e-9 * float(expected[2].abs().max()))
    with kernels.use("torch"):
        assert not one(flow, target, flowvi.ELBO(8), tape=False)[0]


@pytest.mark.parametrize("name", ["real_nvp", "nice", "neural_spline", "iaf"])
def test_a_step_through_networks_in_single_precision(name):
    flow = with_networks(name, 4, 4, {}, torch.float32)
    target = flowvi.as_density(lambda z: -0.5 * z.square().sum(-1), dim=4, dtype=torch.float32)
    _, *expected = one(flow, target, flowvi.BalancedELBO(256), tape=True)
    fused, *found = one(flow, target, flowvi.BalancedELBO(256), tape=False)
    assert fused
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert torch.allclose(found[2], expected[2], rtol=1e-3, atol=1e-4 * float(expected[2].abs().max()))


@pytest.mark.parametrize(
    ("name", "dim", "options"),
    [
        ("real_nvp", 4, {"mixing": "orth"}),
        ("real_nvp", 4, {"direction": "inverse"}),
        ("real_nvp", 1, {}),
        ("iaf", 1, {}),
        ("maf", 3, {}),
        ("neural_spline", 3, {"kind": "autoregressive"}),
    ],
)
def test_networks_that_have_no_kernel_go_by_autograd(name, dim, options):
    flow = with_networks(name, dim, 2, options, torch.float32)
    target = flowvi.as_density(lambda z: -0.5 * z.square().sum(-1), dim=dim)
    assert not one(flow, target, flowvi.PathELBO(8), tape=False)[0]


class Slower(flowvi.transforms.RealNVP):
    def _by_coordinate(self, out):
        return 0.5 * super()._by_coordinate(out)


class Scored(flowvi.transforms.IAF):
    def score_given(self, x, score, context):
        return super().score_given(x, score, context)


class Shift(Additive):
    def forward(self, x, params):
        return super().forward(x, 0.5 * params)


class Spline(RationalQuadratic):
    def forward_with_tape(self, x, params):
        return super().forward_with_tape(x, 0.5 * params)


class Network(DenseNetwork):
    def forward(self, x, context=None):
        return 0.5 * super().forward(x, context)


def other_network():
    layer = flowvi.transforms.RealNVP(4, 1)
    layer.networks[0] = Network(2, (8,), 4)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Slower(4, 2),
        lambda: Scored(4),
        lambda: flowvi.transforms.coupling.Coupling(4, Shift(), 2),
        lambda: flowvi.transforms.coupling.Coupling(4, Spline(4), 2),
        other_network,
    ],
)
def test_somebodys_own_class_is_not_taken_for_ours(make):
    flow = flowvi.Flow(4, [make(), flowvi.transforms.Affine(4)])
    flat = FlatParameters(flow.module)
    assert flow.transforms[0].bind(8, False) is None
    flat.release()


@pytest.mark.parametrize("layer", [flowvi.transforms.RealNVP, flowvi.transforms.PlanarStack])
def test_layers_that_share_parameters_go_by_autograd(layer):
    torch.manual_seed(0)
    twice = layer(4, 2).double()
    with torch.no_grad():
        for p in twice.parameters():
            p.add_(0.2 * torch.randn_like(p))
    flow = flowvi.Flow(4, [twice, twice])
    target = flowvi.as_density(lambda z: -0.5 * z.square().sum(-1), dim=4, dtype=torch.float64)
    fused, *found = one(flow, target, flowvi.PathELBO(16), tape=False)
    _, *expected = one(flow, target, flowvi.PathELBO(16), tape=True)
    assert not fused
    assert torch.equal(found[2], expected[2])


def test_no_path_score_is_none_by_kernels_too():
    flow = with_networks("iaf", 20, 1, {}, torch.float32)
    flat = FlatParameters(flow.module)
    assert flow.transforms[0].bind(8, True) is None
    assert flow.transforms[0].bind(8, False) is not None
    flat.release()


@pytest.mark.parametrize(("num", "width"), [(1, 5), (17, 32), (256, 32), (1105, 600), (4096, 64)])
def test_every_tile_has_particles(num, width):
    tiles, rows, columns = tape_shape(num, 7, width, torch.ones(1))
    assert rows == 7
    assert columns % 16 == 0
    assert (tiles - 1) * columns < num <= tiles * columns


@pytest.mark.parametrize("name", ["real_nvp", "neural_spline", "iaf"])
def test_a_particle_that_is_lost_spoils_no_other(name):
    class Lost:
        def value_and_grad(self, z):
            return torch.where(z[:, 0] > 0.5, math.nan, -0.5 * z.square().sum(-1)), -z

    flow = with_networks(name, 4, 2, {}, torch.float64)
    _, *expected = one(flow, Lost(), flowvi.BalancedELBO(64), tape=True)
    _, *found = one(flow, Lost(), flowvi.BalancedELBO(64), tape=False)
    assert 0 < found[0] < 64
    assert found[0] == expected[0]
    assert torch.allclose(found[2], expected[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["real_nvp", "neural_spline", "iaf"])
def test_the_same_fit_with_and_without_kernels(name):
    options = {"num_flows": 2, "num_steps": 50, "seed": 0, "progress": False, "verify": False}
    fits = []
    for backend in ("auto", "torch"):
        with kernels.use(backend):
            fits.append(flowvi.fit(flowvi.energies.Funnel(3), flow=name, whiten=False, dtype=torch.float64, **options))
    torch.testing.assert_close(fits[0].history.elbo, fits[1].history.elbo, rtol=1e-6, atol=1e-8)


def test_what_cannot_be_bound_goes_by_autograd():
    target = flowvi.as_density(flowvi.energies.U2())
    wide = flowvi.Flow(torch.distributions.Normal(torch.zeros(2), 2.0), [flowvi.transforms.PlanarStack(2, 4)])
    assert not one(wide, target, flowvi.PathELBO(8), tape=False)[0]
    layers = flowvi.Flow(2, [flowvi.transforms.Planar(2), flowvi.transforms.Affine(2)])
    assert not one(layers, target, flowvi.PathELBO(8), tape=False)[0]

    class Mine(flowvi.PathELBO):
        def backward(self, *args, **options):
            return super().backward(*args, **options)

    flow = away_from_the_start("planar", "full", 2, torch.float32)
    assert one(flow, target, flowvi.PathELBO(8), tape=False)[0]
    assert not one(flow, target, Mine(8), tape=False)[0]


def test_a_flat_gradient_is_that_of_autograd():
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    shared = nn.Linear(3, 3, dtype=torch.float64)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net = [*table.parameters(), *shared.parameters(), unused]

    def loss():
        return shared(shared(table(torch.tensor([1, 1, 4])))).square().sum()

    expected = torch.autograd.grad(loss(), net[:-1])
    flat = FlatParameters(net)
    for _ in range(2):  # the second replaces the first
        flat.backward(loss())
    found = flat.grad.split([p.numel() for p in net])
    for a, b in zip(found, [*expected, torch.zeros(2)], strict=True):
        torch.testing.assert_close(a, b.to_dense().reshape(-1).double())
    flat.release()
    assert all(p.grad is None for p in net)


OPTIMIZERS = [
    (FlatAdam, lambda p: torch.optim.Adam(p, lr=0.1)),
    (FlatRMSprop, lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.99, momentum=0.9)),
]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "torchs"), OPTIMIZERS, ids=["adam", "rmsprop"])
def test_optimizers_are_torchs(kind, torchs, backend, dtype):
    torch.manual_seed(0)
    start = torch.randn(50, dtype=dtype)
    ours, grad = start.clone(), torch.zeros(50, dtype=dtype)
    theirs = start.clone().requires_grad_()
    with kernels.use(backend):
        optimizer = kind(ours, grad)
        expected = torchs([theirs])
        for step in range(30):
            grad.copy_(torch.randn(50, dtype=dtype))
            theirs.grad = grad.clone()
            expected.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step(0.1 / (1 + step))
            expected.step()
    assert torch.allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-13)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("kind", "again"), [(FlatAdam, (0.9, 0.1)), (FlatRMSprop, (0.9, 1.0))])
def test_optimizers_skip_and_clip(kind, again, backend):
    vector, grad = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with kernels.use(backend):
        optimizer = kind(vector, grad)
        optimizer.step(0.1)
        before = [a.clone() for a in (vector, optimizer.mean, optimizer.square, optimizer.state[:2])]
        for bad, usable in ((math.nan, True), (math.inf, True), (1.0, False), (1.0, torch.tensor(False))):
            grad.fill_(bad)
            optimizer.step(0.1, usable)
        assert optimizer.skipped == 4
        after = (vector, optimizer.mean, optimizer.square, optimizer.state[:2])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        grad.fill_(1e6)
        optimizer.step(0.1)
        kept, taken = again
        added = CLIP if kind is FlatAdam else CLIP / (optimizer.square.sqrt() + 1e-8)
        assert torch.allclose(optimizer.mean, kept * before[1] + taken * added)
