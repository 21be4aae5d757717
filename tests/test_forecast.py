"""The forecast of a fit's memory: near what is used, told, and an error where there is far too little."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import errors, kernels
from flowvi.fit import memory
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.transforms import available

fit_module = importlib.import_module("flowvi.fit.fit")  # the name in the package is the function

GIB = 2**30
OPTIONS = {"whiten": False, "num_flows": 2, "num_steps": 5, "verify": False, "progress": False, "seed": 0}


def gaussian(z):
    return -0.5 * (z - 1).square().sum(-1)


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def by_torch(model, args):
    with kernels.use("torch"):
        return flowvi.fit(model, args, **OPTIONS)


def sized(flow="planar", dim=100, num_flows=2, base="low_rank", **changed):
    options = {"num_particles": 64, "itemsize": 4, "whiten": True, "verify": True} | changed
    return memory.forecast(FlowSpec(flow, dim, num_flows, base), **options)


MEASURE = """
import re, warnings
from pathlib import Path
import torch
from tests.test_forecast import OPTIONS, by_torch, flowvi, gaussian, regression
from tests.test_memory import resident
warnings.simplefilter("ignore")
torch.set_num_threads(1)
flowvi.fit(gaussian, dim=2, **OPTIONS | {"whiten": True})  # loads what is loaded once
before = resident()
posterior = CALL
# not ru_maxrss, which begins at what the parent process held when it started this one
most = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
print(most - before, posterior.config["memory"]["forecast"])
"""

CASES = {
    "a flow of networks": "flowvi.fit(gaussian, dim=100, flow='real_nvp', num_particles=8192, **OPTIONS)",
    "data": "flowvi.fit(regression, (torch.ones(10_000, 2), torch.ones(10_000)), **OPTIONS)",
    "data, by torch": "by_torch(regression, (torch.ones(10_000, 2), torch.ones(10_000)))",
    "low rank": "flowvi.fit(gaussian, dim=8000, **OPTIONS | {'whiten': True})",
    "full": "flowvi.fit(gaussian, dim=1000, base='full', **OPTIONS | {'whiten': True})",
    "verified": "flowvi.fit(gaussian, dim=1000, **OPTIONS | {'verify': True})",
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_near_what_is_used(case):
    code = MEASURE.replace("CALL", CASES[case])
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    used, told = map(float, run.stdout.split())
    told /= 2**20
    print(f"{case}: {used:.0f} MB used, {told:.0f} MB forecast")
    assert 0.85 < told / used < 2


def test_it_is_told_with_the_phase():
    told = flowvi.fit(gaussian, dim=2, **OPTIONS).config["memory"]
    phases = memory.forecast(FlowSpec("planar", 2, 2), num_particles=256, itemsize=4, whiten=False, verify=False)
    assert told == {"forecast": max(phases.values()), "phase": "check"}


@pytest.mark.parametrize("larger", [{"dim": 200}, {"num_particles": 500}, {"itemsize": 8}, {"num_data": 100}])
def test_more_takes_more(larger):
    assert sized(**larger)["steps"] > sized()["steps"]


def test_phases_that_are_left_out_take_nothing():
    assert list(sized(whiten=False, verify=False)) == ["steps", "check"]


@pytest.mark.parametrize("dim", [6, 600])  # even, because halves of an odd one differ from layer to layer
@pytest.mark.parametrize("name", sorted(set(available()) - {"mine"}))
def test_layers_are_counted_without_being_built(name, dim):
    state = torch.get_rng_state()
    counted, _, taped = memory._count(FlowSpec(name, dim, 3, "diag"))
    assert torch.equal(torch.get_rng_state(), state)
    flow = Flow.from_spec(FlowSpec(name, dim, 3, "diag"))
    assert counted == sum(p.numel() for p in flow.parameters()) - 2 * dim  # less the base
    assert taped == (name not in ("planar", "radial", "affine", "funnel"))


def test_far_too_large_a_fit_is_a_typed_error_before_the_work(monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda device: (64 * GIB, 64 * GIB))
    monkeypatch.setattr(fit_module, "Trial", pytest.fail)
    with pytest.raises(errors.TooLargeError, match="GiB at its peak, in the phase 'whiten', but cpu has 64 GiB"):
        flowvi.fit(gaussian, dim=100_000, base="full")
    assert issubclass(errors.TooLargeError, MemoryError)


def test_one_that_may_be_too_large_is_warned_of(monkeypatch):
    monkeypatch.setattr(memory, "memory_of", lambda device: (64 * GIB, 2**10))
    with pytest.warns(errors.MemoryWarning, match="'check', and cpu has 9.54e-07 GiB free"):
        flowvi.fit(gaussian, dim=2, **OPTIONS)


def test_where_the_machine_cannot_be_asked_nothing_is_said(monkeypatch):
    def unknown(name):
        raise OSError(name)

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    assert memory.memory_of(torch.device("cpu")) == (None, None)
    assert "memory" in flowvi.fit(gaussian, dim=2, **OPTIONS).config
