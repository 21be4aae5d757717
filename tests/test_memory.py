"""Memory stays where it is: over many steps, and while a million draws are streamed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import OptionError


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + scale * eta)
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.fixture(scope="module")
def posterior():
    options = {"num_steps": 5, "seed": 0, "progress": False, "verify": False}
    return flowvi.fit(model, (torch.zeros(8),), flow="planar", num_flows=2, whiten=False, **options)


@pytest.mark.parametrize(("num", "chunk_size"), [(40_000, 16_384), (17_000, 5000), (7, 3), (0, 10)])
def test_pieces_joined_are_the_draws(posterior, num, chunk_size):
    pieces = list(posterior.stream(num, chunk_size=chunk_size, seed=3))
    assert all(1 <= len(piece["theta"]) <= chunk_size for piece in pieces)
    whole = posterior.sample(num, seed=3)
    for name in whole if pieces else ():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), whole[name])
    assert sum(len(piece["mu"]) for piece in pieces) == num


def test_a_stream_goes_on_with_the_posteriors_own_sequence(posterior):
    one, two = (torch.cat([p["mu"] for p in posterior.stream(100)]) for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("options", "name"), [({"num_samples": -1}, "num_samples"), ({"chunk_size": 0}, "chunk_size")])
def test_bad_counts(posterior, options, name):
    with pytest.raises(OptionError, match=name):
        posterior.stream(**({"num_samples": 5} | options))


STREAM = """
import torch
from tests.test_memory import flowvi, model, resident
torch.set_num_threads(1)
options = dict(num_steps=5, seed=0, progress=False, verify=False, whiten=False)
posterior = flowvi.fit(model, (torch.zeros(8),), flow="planar", num_flows=16, **options)
for _ in posterior.stream(100_000, seed=0):
    pass
before, total, most = resident(), 0, 0.0
for piece in posterior.stream(1_000_000, seed=0):
    total += len(piece["mu"])
    most = max(most, resident() - before)
print(total, most)
"""

STEPS = """
import time, torch
from tests.test_memory import flowvi, model, resident
from flowvi.fit import engine
torch.set_num_threads(1)
marks = []
taken = engine.FlatAdam.step

def step(self, *args, **kwargs):
    marks.append((time.perf_counter(), resident() if len(marks) % 500 == 0 else None))
    return taken(self, *args, **kwargs)

engine.FlatAdam.step = step
options = dict(num_steps=20_000, seed=0, progress=False, verify=False, whiten=False, compile=False)
flowvi.fit(model, (torch.zeros(8),), flow="planar", num_flows=8, num_particles=64, **options)
sizes = [size for _, size in marks if size is not None]
first, last = marks[5000][0] - marks[0][0], marks[-1][0] - marks[-5001][0]
print(len(marks), max(sizes[4:]) - sizes[4])
print(f"{first / 5 * 1e3:.0f} us a step in the first quarter, {last / 5 * 1e3:.0f} in the last")
"""


def resident() -> float:
    """Megabytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def told(code: str) -> list[str]:
    """What a fresh process prints."""
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    print(run.stdout)
    return run.stdout.split()


on_linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")


@pytest.mark.slow
@on_linux
def test_a_million_draws_are_streamed_in_the_memory_of_one_piece():
    total, most = told(STREAM)[:2]
    assert int(total) == 1_000_000
    assert float(most) < 20  # all of them would take 72 MB


@pytest.mark.slow
@on_linux
def test_20_000_steps_take_no_more_memory():
    steps, growth = told(STEPS)[:2]
    assert int(steps) == 20_000
    assert float(growth) < 5
