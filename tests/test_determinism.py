"""The same seed on the same machine with as many threads gives the same bits: fits, draws, verdicts, chains."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.mixture import MixtureFlow
from flowvi.random_state import kept

Y = torch.tensor([2.8, 0.8, -0.3, 0.7, 1.1, 0.2, 1.9, 1.4])


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def linear(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([8]).to_event(1), obs=y)


def two_modes(z):
    return torch.logsumexp(torch.stack([-0.5 * ((z - c) ** 2).sum(-1) / 0.01 for c in (-3.0, 3.0)]), 0)


QUIET = {"seed": 3, "progress": False, "verify": False}
FITS = {
    "model": lambda: flowvi.fit(normal, (Y,), flow="planar", num_flows=4, num_steps=100, **QUIET),
    "energy": lambda: flowvi.fit(flowvi.energies.U2(), flow="radial", num_flows=4, num_steps=100, **QUIET),
    "coupling": lambda: flowvi.fit(flowvi.energies.U2(), flow="real_nvp", num_flows=2, num_steps=30, **QUIET),
    "auto": lambda: flowvi.fit(linear, (Y,), **QUIET),
    "mixture": lambda: flowvi.fit(two_modes, dim=2, num_flows=2, num_steps=100, **QUIET),
}


def same(a, b):
    """Equal to the bit, NaN with NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b or (a != a and b != b)


@pytest.fixture(scope="module")
def twice():
    """Each fit, made twice; the second after other random numbers were drawn."""
    found = {}

    def get(name):
        if name not in found:
            first = FITS[name]()
            torch.randn(7)
            found[name] = first, FITS[name]()
        return found[name]

    return get


@pytest.mark.parametrize("name", FITS)
def test_a_fit_and_its_draws(name, twice):
    one, two = twice(name)
    assert isinstance(one.flow, MixtureFlow) == (name == "mixture")
    assert same(dict(one.flow.state_dict()), dict(two.flow.state_dict()))
    assert same(one.history, two.history)
    assert {k: v for k, v in one.config.items() if k != "compile"} == {
        k: v for k, v in two.config.items() if k != "compile"
    }  # how long things took is told there
    for draws in ("sample", "resample"):
        first = getattr(one, draws)(50)
        assert same(first, getattr(two, draws)(50))  # the posterior's own sequence
        assert not same(first, getattr(one, draws)(50))
        getattr(two, draws)(50)
        assert same(getattr(one, draws)(50, seed=8), getattr(two, draws)(50, seed=8))


@pytest.mark.parametrize("name", ["model", "mixture"])
def test_a_diagnosis(name, twice):
    one, two = twice(name)
    assert same(one.diagnose(1000), two.diagnose(1000))


def test_refining(twice):
    one, two = (posterior.refine(num_chains=8, ess=50.0, rhat=1.2, seed=5) for posterior in twice("model"))
    assert same(one.chains.z, two.chains.z)
    assert same(one.sample(20, seed=1), two.sample(20, seed=1))


def test_a_density_fit():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    one, two = (
        flowvi.fit_density(x, flow="planar", num_flows=2, num_steps=60, seed=4, progress=False) for _ in range(2)
    )
    assert same(dict(one.flow.state_dict()), dict(two.flow.state_dict()))
    assert same(one.sample(20, seed=1), two.sample(20, seed=1))


DIGEST = """
import hashlib, sys
import torch
torch.set_num_threads(1)
from tests.test_determinism import FITS
for name in ("model", "auto"):
    posterior = FITS[name]()
    parts = [*posterior.flow.state_dict().values(), *posterior.resample(50, seed=1).values()]
    print(name, hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest())
"""


@pytest.mark.slow
def test_another_process_with_another_order_of_hashes():
    told = set()
    for hashes in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": hashes}
        root = Path(__file__).parents[1]
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=env, cwd=root, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        told.add(run.stdout)
    assert len(told) == 1
    assert all(len(text.splitlines()) == 2 for text in told)


def test_threads_that_draw_from_the_global_generator_draw_their_own_seeds_numbers():
    def draws(seed, found):
        for _ in range(200):
            with kept(seed):
                found.append([torch.randn(3) for _ in range(5)])
            with kept():
                torch.randn(2)

    before = torch.get_rng_state()
    alone = {seed: [] for seed in range(4)}
    for seed, found in alone.items():
        draws(seed, found)
    together = {seed: [] for seed in range(4)}
    threads = [threading.Thread(target=draws, args=pair) for pair in together.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in together.items():
        assert len(found) == 200
        assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(found, alone[seed], strict=True))
    assert torch.equal(torch.get_rng_state(), before)
