"""The fault table: every row ends in a right answer, a typed error, or a verdict that says not to trust it."""

from __future__ import annotations

import importlib
import math
import os
import threading
import traceback
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import errors

attempt_module = importlib.import_module("flowvi.fit.attempt")

SMALL = {"num_flows": 2, "num_steps": 60, "num_particles": 64, "seed": 0, "progress": False}


def normal(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, scale), obs=x)


def conjugate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def data(bad=None):
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    if bad is not None:
        x[3] = bad
    return x


def exact(x):
    """Mean and sd of mu in `conjugate`."""
    x = x.double()
    precision = len(x) + 1 / 9
    return float(x.sum()) / precision, precision**-0.5


def assert_right(posterior, mean, sd):
    draws = posterior.sample(20_000, seed=0)["mu"].double()
    assert abs(float(draws.mean()) - mean) < 0.1 * sd
    assert abs(float(draws.std()) / sd - 1) < 0.1


def gaussian(z):
    return -0.5 * z.square().sum(-1)


def where(condition, value):
    """A Gaussian whose log density is `value` somewhere."""
    return lambda z: torch.where(condition(z), value, gaussian(z))


def not_trusted(fit):
    """The verdict is bad, and said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.NumericalWarning)
        with pytest.warns(errors.UntrustedWarning):
            posterior = fit()
    assert not posterior.diagnose().trusted


# Bad data.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_not_finite_are_a_typed_error(value):
    with pytest.raises(errors.NonFiniteError, match=r"index \(3,\)"):
        flowvi.fit(normal, (data(value),), **SMALL)


def test_zero_variance_data_are_not_trusted():
    # the posterior is a spike of infinite density at scale = 0
    not_trusted(partial(flowvi.fit, normal, (torch.full((30,), 2.0),), **SMALL))


def test_no_data_are_a_typed_error():
    with pytest.raises(errors.TargetError):
        flowvi.fit(normal, (torch.zeros(0),), **SMALL)


def test_float16_data_are_computed_with_in_a_wider_dtype():
    posterior = flowvi.fit(conjugate, (data().half(),), verify=False, **SMALL)
    assert posterior.config["dtype"] == "float32"
    assert_right(posterior, *exact(data().half()))


def test_float16_as_the_dtype_is_a_typed_error():
    with pytest.raises(errors.OptionError, match=r"float32 or torch\.float64"):
        flowvi.fit(conjugate, (data(),), dtype=torch.float16, **SMALL)


def test_float16_data_that_overflowed_are_a_typed_error():
    with pytest.raises(errors.NonFiniteError, match=r"index \(3,\)"):
        flowvi.fit(conjugate, (data(1e5).half(),), **SMALL)


def test_float16_points_are_computed_with_in_the_dtype_of_the_fit():
    posterior = flowvi.fit(gaussian, dim=2, verify=False, **SMALL)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).half()
    for call in (posterior.log_prob, posterior.density, lambda z: posterior.density.value_and_grad(z)[1]):
        assert call(z).dtype == torch.float32
        assert torch.equal(call(z), call(z.float()))
    with pytest.raises(errors.OptionError, match=r"float32 parameters but y is torch\.float16"):
        posterior.flow.log_prob(z)


# Bad models.


def changing(body, runs):
    """A model that is another one after so many runs, or at every second one (runs = 0)."""
    count = iter(range(10_000))

    def model(x):
        i = next(count)
        mu = body(i % 2 == 1 if runs == 0 else i >= runs)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return model


def one_more_site(changed):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    return mu + pyro.sample("extra", dist.Normal(0.0, 1.0)) if changed else mu


CHANGES = {
    "a site more": one_more_site,
    "a site fewer": lambda changed: one_more_site(not changed),
    "another support": lambda changed: pyro.sample("mu", dist.HalfNormal(3.0) if changed else dist.Normal(0.0, 3.0)),
    "another shape": lambda changed: pyro.sample(
        "mu", dist.Normal(0.0, 3.0).expand([1 + changed]).to_event(1)
    ).sum(),
}  # fmt: skip


@pytest.mark.parametrize("runs", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_between_runs_is_a_typed_error(change, runs):
    with pytest.raises(errors.TargetError, match="every run of the model"):
        flowvi.fit(changing(CHANGES[change], runs), (data(),), **SMALL)


def test_a_support_whose_kind_depends_on_a_latent_is_a_typed_error():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.sample("a", dist.HalfNormal(1.0) if mu > 0 else dist.Normal(0.0, 1.0))

    slow = pytest.warns(errors.SlowPathWarning)  # reads the latent's value
    with slow, pytest.raises(errors.TargetError, match="'a' is not the same in every run"):
        flowvi.fit(model, **SMALL)


def test_a_support_whose_bounds_depend_on_a_latent_is_right():
    def model():
        width = pyro.sample("width", dist.LogNormal(0.0, 0.3))
        pyro.sample("u", dist.Uniform(0.0, width))

    values = flowvi.fit(model, verify=False, **SMALL).sample(2000, seed=0)
    assert ((values["u"] > 0) & (values["u"] < values["width"])).all()


# Bad densities.

ROWS = {
    "log p is NaN at some z": where(lambda z: z[:, 0] > 0.5, math.nan),
    "log p is +inf at some z": where(lambda z: z[:, 0] > 0.8, math.inf),
    "log p is -inf on a half": where(lambda z: z[:, 0] > 0.2, -math.inf),
    "log p goes to +inf at a point": lambda z: gaussian(z) - 3 * z.square().sum(-1).log(),
    "the gradient is NaN on a half": lambda z: gaussian(z) - torch.where(z[:, 0] > 0, z[:, 0].sqrt(), 3.0),
    "no normalizer: flat": lambda z: 0 * z.sum(-1),
    "no normalizer: growing": lambda z: z.square().sum(-1),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_density_that_is_not_one_is_not_trusted(row):
    not_trusted(partial(flowvi.fit, ROWS[row], dim=2, **SMALL))


def test_u2_without_its_wall_is_not_trusted():
    not_trusted(partial(flowvi.fit, flowvi.energies.U2(wall=False), **SMALL))


@pytest.mark.parametrize(
    "target",
    [
        lambda z: gaussian(z) + math.inf,
        lambda z: gaussian(z) + math.nan,
        lambda z: gaussian(z) - (z[:, 0] - z[:, 0]).sqrt(),
    ],
    ids=["+inf", "nan", "nan gradient"],
)
def test_a_density_that_is_finite_nowhere_is_a_typed_error(target):
    with pytest.raises(errors.NonFiniteError):
        flowvi.fit(target, dim=2, **SMALL)


EXPLODING = pytest.mark.parametrize(("flow", "lr"), [("planar", 1e6), ("real_nvp", 50.0)])


@EXPLODING
def test_a_flow_that_explodes_is_not_trusted(flow, lr):
    not_trusted(partial(flowvi.fit, gaussian, dim=2, whiten=False, flow=flow, **SMALL | {"lr": lr}))


@EXPLODING
@pytest.mark.filterwarnings("ignore::flowvi.errors.NumericalWarning")
def test_steps_that_explode_leave_the_gaussian_that_they_began_at(flow, lr):
    fit = partial(flowvi.fit, gaussian, dim=2, verify=False, flow=flow, **SMALL | {"lr": lr})
    posterior = fit()
    assert "made it worse" in posterior.config["stopped"]
    z = posterior.sample(20_000, seed=0)["z"]
    assert z.mean(0).abs().max() < 0.05
    assert (z.std(0) - 1).abs().max() < 0.05
    # where the steps follow something else than the ELBO at beta = 1, that is no reason to undo them
    assert fit(anneal=lambda step: 0.5).config["stopped"] == "finished"


# Large.


def test_512_layers():
    posterior = flowvi.fit(conjugate, (data(),), verify=False, **SMALL | {"num_flows": 512, "num_steps": 20})
    assert_right(posterior, *exact(data()))


@pytest.mark.slow
def test_10_000_dimensions():
    posterior = flowvi.fit(lambda z: gaussian(z - 1), dim=10_000, **SMALL)
    assert posterior.diagnose().trusted
    draws = posterior.sample(1000, seed=0)["z"]
    assert float((draws.mean(0) - 1).abs().mean()) < 0.1
    assert float((draws.std(0) - 1).abs().mean()) < 0.1


# Ctrl-C.


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["flowvi.fit.fit.as_density", "flowvi.fit.attempt.whiten"])
def test_ctrl_c_before_the_first_step_is_a_keyboard_interrupt(phase, monkeypatch):
    # there is nothing to return yet
    module, name = phase.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        flowvi.fit(conjugate, (data(),), **SMALL)


def test_ctrl_c_in_the_steps_returns_what_there_is():
    calls = []

    def target(z):
        calls.append(None)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return gaussian(z)

    with pytest.warns(errors.InterruptedWarning):
        posterior = flowvi.fit(target, dim=2, whiten=False, verify=False, **SMALL)
    assert posterior.config["stopped"] == "interrupted"
    assert 20 < len(posterior.history.elbo) < 30
    assert posterior.sample(10)["z"].isfinite().all()


def test_ctrl_c_in_a_later_restart_keeps_the_earlier_ones(monkeypatch):
    whiten, calls = attempt_module.whiten, []

    def second(*args, **kwargs):
        calls.append(None)
        return whiten(*args, **kwargs) if len(calls) == 1 else interrupt()

    monkeypatch.setattr(attempt_module, "whiten", second)
    with pytest.warns(errors.InterruptedWarning):
        posterior = flowvi.fit(conjugate, (data(),), restarts=2, verify=False, **SMALL)
    assert_right(posterior, *exact(data()))


def test_ctrl_c_in_the_verification_keeps_the_fit(monkeypatch):
    monkeypatch.setattr(flowvi.Posterior, "diagnose", interrupt)
    with pytest.warns(errors.InterruptedWarning, match="before the fit was verified"):
        posterior = flowvi.fit(conjugate, (data(),), **SMALL)
    assert_right(posterior, *exact(data()))


# A full disk. (Checkpoints have their own tests.)


def test_a_kernel_runs_where_there_is_no_room_to_keep_it(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    jit = pytest.importorskip("flowvi.kernels.compiled.jit", exc_type=ImportError)
    monkeypatch.setattr(os, "replace", full)
    assert jit.kernel(twice)(3.0) == 6.0


def twice(x):
    return 2.0 * x


# Threads and processes.


def test_two_fits_in_two_threads():
    shifts = [0.0, 5.0]
    alone = [flowvi.fit(conjugate, (data() + s,), verify=False, **SMALL) for s in shifts]
    for _ in range(3):
        found, failed = {}, []

        def work(i, shift, found=found, failed=failed):
            try:
                found[i] = flowvi.fit(conjugate, (data() + shift,), verify=False, **SMALL)
            except Exception:
                failed.append(traceback.format_exc())

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(shifts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed[0]
        for i, shift in enumerate(shifts):
            assert_right(found[i], *exact(data() + shift))
            pairs = zip(found[i].flow.parameters(), alone[i].flow.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_after_a_fit():
    fit = partial(flowvi.fit, conjugate, (data(),), verify=False, **SMALL)
    expected = fit()
    child = os.fork()
    if not child:
        try:
            found = fit()
            pairs = zip(found.flow.parameters(), expected.flow.parameters(), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
        except BaseException:
            same = False
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_callable_that_fails_at_some_points_is_fitted():
    """Torch's distributions refuse a scale that is not positive, here from z[0] = -4 on."""

    def log_prob(z):
        nothing = 0 * dist.Normal(0.0, 4 + z[:, 0]).log_prob(torch.zeros(()))
        return dist.Normal(0.0, 1.0).log_prob(z).sum(1) + nothing

    with pytest.raises(ValueError, match="scale"):
        log_prob(torch.tensor([[-4.1, 0.0]]))
    posterior = flowvi.fit(log_prob, dim=2, **SMALL)  # its starts, its search and its HMC come there
    z = posterior.sample(20_000, seed=0)["z"]
    assert z.mean(0) == pytest.approx([0.0, 0.0], abs=0.05)
    assert z.std(0) == pytest.approx([1.0, 1.0], rel=0.05)
    assert posterior.diagnose().trusted
