"""Transforms of Pyro, torch and zuko behind our contract."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn

import flowvi
from flowvi.errors import DimensionError, OptionError
from flowvi.transforms import available, from_pyro, register
from flowvi.transforms.base import InvertibleMap
from flowvi.transforms.guests import PyroGuest
from flowvi.transforms.registry import build

WITH_INVERSE = {
    "affine_autoregressive": T.affine_autoregressive,
    "stable": lambda d: T.affine_autoregressive(d, stable=True),
    "spline": T.spline,
    "spline_coupling": T.spline_coupling,
    "spline_autoregressive": T.spline_autoregressive,
    "affine_coupling": T.affine_coupling,
    "householder": T.householder,
    "batchnorm": T.batchnorm,
    "matrix_exponential": T.matrix_exponential,
    "permute": T.permute,
    "iterated": lambda d: T.iterated(2, T.affine_autoregressive, d),
    "compose": lambda d: T.ComposeTransform([T.permute(d), T.affine_autoregressive(d)]),
    "affine": lambda d: T.AffineTransform(1.0, 2.0),
}
WITHOUT_INVERSE = {
    "planar": T.planar,
    "radial": T.radial,
    "sylvester": T.sylvester,
    "neural_autoregressive": T.neural_autoregressive,
    "block_autoregressive": T.block_autoregressive,
    "polynomial": T.polynomial,
}
QUIET = {"verify": False, "progress": False, "seed": 0, "whiten": False}


def guest(factory, dim: int = 4, seed: int = 0):
    torch.manual_seed(seed)
    return build(factory, dim, 1)[0].double()


def log_prob(z):
    """A banana."""
    return -0.5 * (z[:, 0].square() + 4 * (z[:, 1] - z[:, 0].square()).square())


@pytest.fixture(params=[*WITH_INVERSE, *WITHOUT_INVERSE], ids=str)
def factory(request):
    return (WITH_INVERSE | WITHOUT_INVERSE)[request.param]


def test_value_and_log_det_are_autograds(factory):
    t = guest(factory)
    for x in torch.randn(3, 4, dtype=torch.float64):
        y, log_det = t.forward_and_log_det(x.unsqueeze(0))
        jacobian = torch.autograd.functional.jacobian(lambda v: t(v.unsqueeze(0)).squeeze(0), x)
        assert log_det.shape == (1,)
        assert torch.allclose(log_det[0], torch.linalg.slogdet(jacobian)[1], atol=1e-7)
        assert t.log_abs_det_jacobian(x.unsqueeze(0), y).shape == (1,)


@pytest.mark.parametrize("name", WITH_INVERSE)
def test_inverse_and_any_pair(name):
    t = guest(WITH_INVERSE[name])
    x, other = torch.randn(2, 6, 4, dtype=torch.float64)
    y, log_det = t.forward_and_log_det(x)
    back, back_det = t.inverse_and_log_det(y)
    atol = 1e-4 if "spline" in name else 1e-9  # Pyro's inverse spline divides by a difference with an epsilon
    assert torch.allclose(back, x, atol=atol)
    assert torch.allclose(back_det, -log_det, atol=10 * atol)
    assert torch.allclose(t.log_abs_det_jacobian(other, t(x)), t.forward_and_log_det(other)[1])
    flow = flowvi.Flow(dist.Normal(torch.zeros(4).double(), 1.0).to_event(1), [t])
    z = flow.rsample((5,))
    assert torch.allclose(flow.log_prob(z), flow.log_prob(z.clone()), atol=10 * atol)


@pytest.mark.parametrize("name", WITHOUT_INVERSE)
def test_without_an_inverse_the_error_names_the_remedy(name):
    t = guest(WITHOUT_INVERSE[name])
    flow = flowvi.Flow(dist.Normal(torch.zeros(4).double(), 1.0).to_event(1), [t])
    z = flow.rsample((5,))
    assert flow.log_prob(z).shape == (5,)  # a value just sampled is not inverted
    for ask in (flow.log_prob, flow.score, t.inv, t.inverse_and_log_det):
        with pytest.raises(OptionError, match=r"has no inverse.*flowvi\.ELBO.*'planar'"):
            ask(z + 1)


def tensors_held_by(t):
    found = []

    def look(value):
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            for v in value:
                look(v)

    for module in t.modules():
        for name, value in vars(module).items():
            if name not in ("_buffers", "_parameters", "_modules", "_pair"):
                look(value)
    return found


def test_nothing_is_held_between_calls(factory):
    t = guest(factory)
    before = {id(v) for v in tensors_held_by(t)}
    x = torch.randn(6, 4, dtype=torch.float64)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    held = [weakref.ref(v) for v in (x, y, log_det)]
    assert all(id(v) in before or v.grad_fn is None for v in tensors_held_by(t))
    del x, y, log_det
    gc.collect()
    assert all(ref() is None for ref in held)
    if any(factory is f for f in WITH_INVERSE.values()):
        y = torch.randn(6, 4, dtype=torch.float64)
        x, log_det = t.inverse_and_log_det(y)
        held = [weakref.ref(v) for v in (x, y, log_det)]
        del x, y, log_det
        gc.collect()
        assert all(ref() is None for ref in held)


def test_pyros_own_transform_does_hold_its_last_graph():
    """What the adapter is there for."""
    t = T.affine_autoregressive(4)
    y = t(torch.randn(6, 4))
    held = weakref.ref(y)
    del y
    gc.collect()
    assert held() is not None


def test_contract_of_shapes_dtypes_and_copies():
    t = guest(T.affine_autoregressive)
    with pytest.raises(DimensionError, match="input_dim"):
        t(torch.randn(2, 3).double())
    with pytest.raises(OptionError, match="float32"):
        t(torch.randn(2, 4))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    y = t(x)
    assert t(x) is y
    assert t.inv(y) is x
    for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert torch.equal(twin(x.clone()), y)
    assert not t.has_path_score
    assert "AffineAutoregressive" in repr(t)
    with torch.no_grad():
        next(t.parameters()).add_(0.5)
    assert not torch.equal(t(x), y)


def test_batch_norm_is_one_bijection_whatever_the_mode_and_the_batch():
    t = guest(T.batchnorm)
    x = torch.randn(8, 4, dtype=torch.float64)
    for mode in (True, False):
        t.train(mode)
        y = t(x)
        assert torch.allclose(t.inverse(y), x)
        assert torch.allclose(t.inverse(y[:1]), x[:1])
    assert torch.equal(t.guest.moving_mean, torch.zeros(4).double())


def test_fit_takes_pyros_helpers():
    posterior = flowvi.fit(log_prob, dim=2, flow=T.affine_autoregressive, num_flows=2, num_steps=60, **QUIET)
    assert posterior.config["flow"] == "affine_autoregressive"
    assert posterior.config["gradient"] == "standard"
    assert all(isinstance(t, InvertibleMap) for t in posterior.flow.transforms)
    z = torch.randn(7, 2)
    grid = torch.cartesian_prod(*[torch.linspace(-8, 8, 161)] * 2)
    with torch.no_grad():
        assert posterior.flow.log_prob(grid).exp().sum().item() * 0.01 == pytest.approx(1, abs=2e-2)
    without = flowvi.fit(log_prob, dim=2, flow=T.planar, num_flows=2, num_steps=30, **QUIET)
    with pytest.raises(OptionError, match="has no inverse"):
        without.flow.log_prob(z)


def test_fit_keeps_no_graph_between_steps():
    refs = []

    def factory(input_dim):
        t = T.affine_autoregressive(input_dim)
        call = t.arn.forward

        def watched(x, *rest):
            refs.append(weakref.ref(x))
            return call(x, *rest)

        t.arn.forward = watched
        return t

    flowvi.fit(log_prob, dim=2, flow=factory, num_flows=2, num_steps=20, **QUIET)
    gc.collect()
    assert len(refs) > 40
    assert not any(ref() is not None for ref in refs)


def model(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(a, 1.0))
    pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)


def test_guide_takes_pyros_helpers():
    pyro.clear_param_store()
    guide = flowvi.AutoFlow(model, flow=T.affine_autoregressive, num_flows=1, hidden_dims=[8])
    y = torch.tensor(1.3)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=flowvi.ELBO())
    losses = [svi.step(y) for _ in range(5)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert guide.log_prob({"a": torch.tensor(0.1), "b": torch.tensor(2.0)}, y).isfinite()
    names = [n for n in pyro.get_param_store() if "arn" in n]
    assert names
    assert set(guide.median(y)) == {"a", "b"}


def test_guest_can_be_registered_and_saved(tmp_path):
    register("pyro's iaf", T.affine_autoregressive, overwrite=True)
    assert "pyro's iaf" in available()
    posterior = flowvi.fit(flowvi.energies.U2(), flow="pyro's iaf", num_flows=2, num_steps=20, **QUIET)
    posterior.save(tmp_path / "p.pt")
    loaded = flowvi.load(tmp_path / "p.pt", flowvi.energies.U2())
    z = torch.randn(5, 2)
    assert torch.allclose(loaded.flow.log_prob(z), posterior.flow.log_prob(z))


def test_composed_by_hand():
    torch.manual_seed(0)
    flow = flowvi.Flow(3, [from_pyro(T.affine_autoregressive(3), 3), from_pyro(T.spline)(3)])
    z, log_q = flow.rsample_and_log_prob(4)
    assert torch.allclose(flow.log_prob(z), log_q, atol=1e-3)
    assert isinstance(from_pyro(T.spline(3), 3), PyroGuest)
    assert isinstance(from_pyro(T.householder(3)), PyroGuest) == hasattr(T.householder(3), "input_dim")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: from_pyro(T.ExpTransform(), 2), "codomain of ExpTransform"),
        (lambda: from_pyro(T.LowerCholeskyTransform(), 2), "codomain of LowerCholeskyTransform"),
        (lambda: from_pyro(T.AffineTransform(0.0, 1.0)), "does not say its D: give input_dim"),
        (lambda: from_pyro(T.spline, 2), "a factory is told it"),
        (lambda: from_pyro(3, 2), "expected a transform or a factory"),
        (lambda: build(lambda d: nn.Linear(d, d), 2, 1), "returned Linear, which is not a transform"),
        (lambda: build(lambda d: T.AbsTransform(), 2, 1), "codomain of AbsTransform|says that it is not"),
    ],
)
def test_what_cannot_be_a_layer(call, text):
    with pytest.raises(OptionError, match=text):
        call()


# zuko.


@pytest.fixture
def zuko():
    return pytest.importorskip("zuko", reason="the extra 'zuko' is not installed")


@pytest.mark.parametrize("name", ["NSF", "MAF", "NICE", "RealNVP", "SOSPF", "UNAF"])
def test_zuko_flow_has_its_own_density_and_our_contract(zuko, name):
    make = getattr(zuko.flows, name)
    (t,) = build(make, 3, 2)
    t = t.double()
    torch.manual_seed(0)
    original = make(3, transforms=2).double()
    torch.manual_seed(0)
    twin = flowvi.Flow(
        dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), [flowvi.transforms.from_zuko(make(3, transforms=2), 3)]
    )
    twin.module.double()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(twin.log_prob(x), original().log_prob(x), atol=1e-9)
    y, log_det = t.forward_and_log_det(x)
    back, back_det = t.inverse_and_log_det(y)
    atol = 1e-9 if name in ("NSF", "MAF", "NICE", "RealNVP") else 1e-4  # the others invert by bisection
    assert torch.allclose(back, x, atol=atol)
    assert torch.allclose(back_det, -log_det, atol=10 * atol)
    (y.square().sum() + log_det.sum()).backward()
    assert all(p.grad is not None for p in t.parameters())
    held = weakref.ref(y)
    del y, log_det, back, back_det
    gc.collect()
    assert held() is None


def test_zuko_transform_goes_forward(zuko):
    torch.manual_seed(0)
    lazy = zuko.flows.MAF(3, transforms=2).transform
    t = flowvi.transforms.from_zuko(lazy, 3)
    x = torch.randn(5, 3)
    y, log_det = lazy().call_and_ladj(x)
    assert torch.equal(t(x), y)
    assert torch.equal(t.log_abs_det_jacobian(x, t(x)), log_det)


def test_fit_takes_zukos_flows(zuko):
    options = {"num_flows": 2, "num_steps": 15, "num_particles": 32, "hidden_features": (16,), **QUIET}
    posterior = flowvi.fit(log_prob, dim=2, flow=zuko.flows.MAF, **options)
    assert posterior.config["flow"] == "MAF"
    assert len(posterior.flow.transforms) == 2  # zuko's two layers as one transform, and the affine one
    assert posterior.flow.log_prob(torch.randn(4, 2)).isfinite().all()
    guide = flowvi.AutoFlow(model, flow=lambda d: zuko.flows.NSF(d).transform, num_flows=1)
    guide(torch.tensor(1.0))
    assert guide.log_prob({"a": torch.tensor(0.1), "b": torch.tensor(2.0)}, torch.tensor(1.0)).isfinite()


def test_zuko_flows_that_cannot_be_layers(zuko):
    with pytest.raises(OptionError, match=r"not N\(0, I\).*transform alone"):
        build(zuko.flows.NCSF, 2, 1)
    with pytest.raises(OptionError, match="not made of a transform"):
        build(zuko.flows.GMM, 2, 1)
