"""A device that isn't the CPU, where there is none: nothing is asked of it, and nothing is left on the CPU.

On the meta device a tensor has a place but no values, and asking for one (`.item()`, `if x > 0`) is an error;
`OnePlace` makes an error of mixing its tensors with those of the CPU. So what runs there neither waits for a GPU nor
forgets a tensor.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowvi
from flowvi import energies, kernels
from flowvi.amortized import AmortizedGuide
from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.amortized_step import AmortizedStep
from flowvi.fit.batches import Batches
from flowvi.fit.distributed import ALONE
from flowvi.fit.factored_descent import make_descent
from flowvi.fit.replay import Replay, Update, make_update
from flowvi.fit.rmsprop import FlatRMSprop
from flowvi.fit.steps import make_step
from flowvi.models import DLGM
from flowvi.objectives import CoveringELBO

FLOWS = ["affine", "funnel", "householder", "iaf", "maf", "neural_spline", "nice", "planar", "radial", "real_nvp"]
SEED = 3
OBJECTIVES = [flowvi.ELBO, flowvi.PathELBO, flowvi.BalancedELBO, CoveringELBO]


class OnePlace(TorchDispatchMode):
    """No operation takes tensors of the CPU beside those of the meta device, but for single numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        places = {t.device.type for t in given if t.dim()} | {t.device.type for t in given if t.device.type != "cpu"}
        if len(places) > 1:
            raise RuntimeError(f"{func} takes tensors of {' and '.join(sorted(places))}")
        return func(*args, **(kwargs or {}))


class Gaussian:
    def value_and_grad(self, z):
        return -0.5 * (z - 1).square().sum(-1), 1 - z


class Waits(Gaussian):
    def value_and_grad(self, z):
        return super().value_and_grad(z if z[0, 0] > 0 else -z)


class Elsewhere(Gaussian):
    def value_and_grad(self, z):
        return -0.5 * (z - torch.ones(z.shape)).square().sum(-1), 1 - z


def on_meta(name, monkeypatch):
    """A flow without values, whose base can't be asked whether it is standard."""
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, 4, 3))
    flow.module.to("meta")
    zero = torch.zeros(4, device="meta")
    flow.base_dist = dist.Normal(zero, zero + 1, validate_args=False).to_event(1)
    monkeypatch.setattr(type(flow), "has_standard_base", True)
    return flow


@pytest.mark.parametrize("name", [*FLOWS, "sylvester"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("optimizer", [FlatAdam, FlatRMSprop])
def test_a_step_asks_the_device_for_nothing(name, objective, optimizer, monkeypatch):
    flow = on_meta(name, monkeypatch)
    flat = FlatParameters(flow.module)
    step, along = make_step(flow, Gaussian(), objective(64), flat), optimizer(flat.vector, flat.grad)
    with OnePlace():
        num, elbo = step(1.0, None)
        along.step(torch.zeros((), device="meta"), num > 0)
    assert {t.device.type for t in (num, elbo, flat.vector, flat.grad)} == {"meta"}


@pytest.mark.parametrize(("target", "words"), [(Waits(), "meta"), (Elsewhere(), "cpu and meta")])
@pytest.mark.parametrize("name", ["planar", "nice"])
def test_a_step_that_asks_or_mixes_is_found(name, target, words, monkeypatch):
    flow = on_meta(name, monkeypatch)
    step = make_step(flow, target, flowvi.ELBO(64), FlatParameters(flow.module))
    with pytest.raises(RuntimeError, match=words), OnePlace():
        step(1.0, None)


@pytest.mark.parametrize("likelihood", ["bernoulli", "logit_normal"])
@pytest.mark.parametrize(("flow", "num_flows"), [("planar", 0), ("planar", 3), ("radial", 3), ("iaf", 2), ("nice", 2)])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_an_amortized_step_asks_the_device_for_nothing(likelihood, flow, num_flows, num_particles):
    dlgm = DLGM(12, 4, 8, 4, likelihood)
    encoder = dlgm.encoder()
    x = torch.full((100, 12), 0.5) if likelihood == "logit_normal" else torch.ones(100, 12)
    data = Batches.of((x,), {})
    guide = AmortizedGuide(dlgm.model, encoder, flow, num_flows)
    first = data.minibatch(0, 10, 0)
    guide(*first[0], **first[1])
    step = AmortizedStep(dlgm.model, guide, flowvi.PathELBO(num_particles), first, data)
    for module in (dlgm, encoder, guide):
        module.to("meta")
    pyro.clear_param_store()
    with pyro.validation_enabled(False), OnePlace():
        flat = FlatParameters([*dlgm.parameters(), *guide.parameters()])
        descent = make_descent(flat, ALONE, "adam")
        loss = step(((torch.empty(10, 12, device="meta"),), {}), 0.5)
        flat.backward(loss.surrogate)
        assert descent.step(1e-3, loss.elbo).device.type == "meta"


@pytest.mark.parametrize(
    "energy",
    [energies.U1(), energies.U2(), energies.U3(), energies.U4(), energies.Funnel(4), energies.Banana()],
    ids=lambda e: type(e).__name__,
)
def test_energies_ask_the_device_for_nothing(energy):
    z = torch.empty(7, energy.dim, device="meta", requires_grad=True)
    own = getattr(energy, "log_density_and_grad", None)
    with OnePlace():
        assert torch.autograd.grad(energy(z).sum(), z)[0].device.type == "meta"
        if own is not None:
            assert [t.device.type for t in own(z.detach())] == ["meta", "meta"]


# A recording of the step, which is a graph on a GPU and here the step itself.


def setting(target=None):
    """An update of a planar flow by plain torch, in double precision."""
    torch.manual_seed(0)
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 3, 4), dtype=torch.float64)
    flat = FlatParameters(flow.module)
    with kernels.use("torch"):
        step = make_step(flow, target or Gaussian(), flowvi.BalancedELBO(32), flat)
        adam = FlatAdam(flat.vector, flat.grad)
    return step, adam, torch.Generator().manual_seed(SEED)


def as_a_graph(function, generator):
    function()
    update = function.__self__

    def replay():
        before = dict(vars(update))
        function()
        vars(update).update(before)  # a graph fills memory and runs no Python

    return replay


def frozen_noise(function, generator):
    state = torch.Generator().manual_seed(SEED).get_state()

    def again():
        generator.set_state(state)
        function()

    return again


def nothing(function, generator):
    return lambda: None


def refused(function, generator):
    raise RuntimeError("operation not permitted when stream is capturing")


def steps(update, betas):
    return torch.tensor([[float(v) for v in update(beta, 1e-2)] for beta in betas], dtype=torch.float64)


def test_a_recorded_step_is_the_step():
    plain, recorded = setting(), setting()
    update = make_update(*recorded, record=as_a_graph)
    assert isinstance(update, Replay)
    betas = [1.0, 1.0, 0.5, 1.0, 0.25, *[1.0] * 10]
    close = {"rtol": 1e-12, "atol": 1e-12}  # a number over a tensor rounds otherwise than a tensor over a tensor
    torch.testing.assert_close(steps(update, betas), steps(Update(*plain), betas), **close)
    for name in ("vector", "grad", "mean", "square", "state"):
        torch.testing.assert_close(getattr(recorded[1], name), getattr(plain[1], name), **close)
    assert torch.equal(plain[2].get_state(), recorded[2].get_state())


class Minibatch(Gaussian):
    """A target that draws something by itself at each call, as a recording wouldn't."""

    def __init__(self):
        self.calls = 0

    def value_and_grad(self, z):
        self.calls += 1
        value, grad = super().value_and_grad(z)
        return value * self.calls, grad * self.calls


@pytest.mark.parametrize(
    ("target", "record", "why"),
    [
        (None, nothing, "is not the step"),
        (None, frozen_noise, "same numbers again"),
        (Minibatch(), as_a_graph, "is not the step"),
        (None, refused, "capturing"),
    ],
)
def test_a_recording_that_would_be_another_step_is_not_used(target, record, why):
    step, adam, generator = setting(target)
    before, draws = adam.vector.clone(), generator.get_state()
    with pytest.raises(RuntimeError, match=why):
        Replay(Update(step, adam, generator), record)
    update = make_update(step, adam, generator, record=record)
    assert not update.recorded
    assert torch.equal(adam.vector, before)
    assert torch.equal(generator.get_state(), draws)
    assert adam.skipped == 0
    assert math.isfinite(float(update(1.0, 1e-2)[1]))


def test_on_the_cpu_nothing_is_recorded():
    assert type(make_update(*setting())) is Update


def test_a_step_that_ranks_share_is_not_recorded():
    step, adam, generator = setting()
    step.split = object()
    assert type(make_update(step, adam, generator, record=as_a_graph)) is Update


def other_error(function, generator):
    raise ValueError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")


def test_whatever_a_recording_raises_the_fit_goes_on():
    assert type(make_update(*setting(), record=other_error)) is Update
