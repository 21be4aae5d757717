"""What `experiments.speed` times: flowvi's own side, the cases, and the clock.

Every case is a few functions that do the same work. They take turns, round by round (A B A B ...), so that what
else the machine does meets all of them alike; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from tqdm import tqdm

import flowvi
from experiments import speed_peers
from experiments.posteriors import eight_schools
from experiments.speed_peers import Run, energy
from flowvi import kernels
from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.amortized_gradient import AmortizedGradient
from flowvi.fit.amortized_step import AmortizedStep, learnt_parameters
from flowvi.fit.batches import Batches
from flowvi.fit.distributed import ALONE
from flowvi.fit.factored_descent import make_descent
from flowvi.fit.steps import make_step
from flowvi.models import DLGM
from flowvi.objectives import ELBO, BalancedELBO
from flowvi.targets import LogDensity
from flowvi.threads import one_thread_if_small

SCHOOLS = {
    "y": (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0),
    "sigma": (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0),
}
"""Rubin 1981, "Estimation in parallel randomized experiments", table 1."""

AFFINE, NECK = "flowvi, K 0", 64

IMAGES = 784, 40, 400, 4
"""Of the paper's model of images: pixels, latents, maxout units and their window."""


@dataclass(frozen=True)
class Config:
    """Everything the benchmark depends on but the machine.

    Cases are (D, S, K), and for each the least ratio that is aimed at: the other's time by flowvi's.
    """

    seed: int = 0
    threads: tuple[str, ...] = ("one", "all")
    """ "one" is one CPU core for the whole process, and "all" is all of them."""
    peers: tuple[str, ...] = ("pyro", "normflows", "zuko", "flowjax", "numpyro")
    """Who is compared, where installed."""
    rounds: int = 25
    sweep_rounds: int = 9
    start_rounds: int = 5
    cpu_time: bool = False
    """The clock is the process's CPU time, which other processes disturb less; for "one" core only."""
    seconds: float = 0.02
    """A turn in a round lasts about so long, one call at least."""
    stacks: tuple[tuple[str, int, int, int, float], ...] = (
        ("planar", 2, 256, 32, 30),
        ("planar", 2, 256, 128, 45),
        ("planar", 2, 4096, 32, 7),
        ("planar", 50, 256, 32, 15),
        ("planar", 1000, 256, 32, 12),
        ("radial", 2, 256, 32, 15),
    )
    steps: tuple[tuple[int, int, int, dict[str, float]], ...] = (
        (2, 256, 8, {"flowjax": 1 / 0.6}),
        (2, 256, 32, {"flowjax": 1 / 0.6, "pyro": 50}),
        (2, 256, 128, {"flowjax": 1 / 0.7}),
        (2, 4096, 32, {"flowjax": 1 / 0.4}),
        (1000, 256, 32, {"flowjax": 1 / 0.06}),
    )
    networks: tuple[tuple[str, int, int, int], ...] = (
        ("real_nvp", 10, 256, 8),
        ("neural_spline", 10, 256, 4),
        ("iaf", 10, 256, 4),
    )
    schools: tuple[int, int, float] | None = (256, 16, 15)
    """S and K of the step on eight schools, and the aim."""
    amortized: tuple[int, int, float] | None = (100, 80, 1 / 1.3)
    """Batch size and K of the step with layers of each datum's own, and the aim against K = 0: directions shared by all
    data, as the experiment `mnist` has them, and each datum's own."""
    sweep_k: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    sweep_d: tuple[int, ...] = (2, 4, 8, 30, 100, 300, 1000)
    sweep_s: tuple[int, ...] = (64, 256, 1024, 4096, 16384)

    @classmethod
    def quick(cls, seed: int = 0, cpu_time: bool = False) -> Config:
        """One thread, few rounds and short sweeps, to see that it works: its figures are not the ones to quote."""
        return cls(
            seed=seed,
            threads=("one",),
            cpu_time=cpu_time,
            rounds=3,
            sweep_rounds=3,
            start_rounds=1,
            seconds=0.005,
            sweep_k=(8, 32, 128),
            sweep_d=(2, 30, 1000),
            sweep_s=(64, 1024, 4096),
        )


Row = dict[str, Any]


# flowvi's side.


def flowvi_stack(family: str, dim: int, num_particles: int, num_flows: int) -> Run:
    """The stack as the training step calls it: forward with log-determinant and path score, and backward."""
    if family == "planar":
        params = [torch.randn(num_flows, dim) * 0.3, torch.randn(num_flows, dim) * 0.3, torch.randn(num_flows)]
        options: tuple[Any, ...] = ("squareplus",)
        make: Callable[..., Any] = kernels.planar_step
    else:
        params = [torch.randn(num_flows, dim), torch.randn(num_flows), torch.randn(num_flows)]
        options, make = (), kernels.radial_step
    grads = tuple(torch.zeros_like(p) for p in params)
    step = make(*params, *options, grads=grads, num_particles=num_particles, with_score=True)
    x, g_z = torch.randn(num_particles, dim), torch.randn(num_particles, dim)
    g_log_det = torch.randn(num_particles)

    def one() -> None:
        step.forward(x)
        step.backward(g_z, g_log_det)

    return speed_peers.repeat(one)


def flowvi_step(spec: flowvi.FlowSpec, target: Any, num_particles: int, seed: int) -> Run:
    """One step of `flowvi.fit`, draws to Adam, with the gradient that `fit` chooses for this flow."""
    torch.manual_seed(seed)
    flow = flowvi.Flow.from_spec(spec)
    objective = (BalancedELBO if flow.has_path_score else ELBO)(num_particles)
    density = target if isinstance(target, LogDensity) else flowvi.as_density(target)
    flat = FlatParameters(flow.module)
    adam = FlatAdam(flat.vector, flat.grad)
    step = make_step(flow, density, objective, flat)
    generator = torch.Generator().manual_seed(seed)

    def run(n: int) -> None:
        with one_thread_if_small(num_particles * spec.dim * max(1, spec.num_flows)):
            for _ in range(n):
                num, _ = step(1.0, generator)
                adam.step(speed_peers.LR, num > 0)

    return run


def amortized_step(batch_size: int, num_flows: int, shared_directions: bool, seed: int) -> Run:
    """One step of `flowvi.fit(encoder=...)` on the paper's model of images, with K layers of each datum's own."""
    torch.manual_seed(seed)
    dlgm = DLGM(*IMAGES, "bernoulli")
    data = Batches.of(((torch.rand(10 * batch_size, IMAGES[0]) < 0.13).float(),), {}, None)
    options: dict[str, Any] = {}
    if num_flows:
        options = {"hidden_dims": (NECK,), "shared_directions": shared_directions}
    store = pyro.get_param_store()
    with store.scope() as learnt:  # what is learnt here stays here
        guide = flowvi.AmortizedGuide(dlgm.model, dlgm.encoder(), "planar", num_flows, **options)
        first = data.minibatch(0, batch_size, seed)
        guide(*first[0], **first[1])
        step = AmortizedStep(dlgm.model, guide, flowvi.PathELBO(1), first, data)
        flat = FlatParameters(learnt_parameters(dlgm.model, guide, first))
        gradient = AmortizedGradient(step, flat, (first, data.minibatch(1, batch_size, seed)), record=True)
        descent = make_descent(flat, ALONE, "adam", gradient)
    turns = itertools.count()

    def run(n: int) -> None:
        with store.scope(learnt), pyro.validation_enabled(False):
            for _ in range(n):
                elbo = gradient(data.minibatch(next(turns), batch_size, seed), 1.0)
                descent.step(speed_peers.LR, elbo)

    return run


# The clock.


@dataclass(frozen=True)
class Times:
    """Seconds per call, one for each round, by who."""

    seconds: Mapping[str, np.ndarray]

    def row(self, who: str, aim: float | None = None, **what: Any) -> Row:
        """Medians and quartiles of one of them, and of its ratio to flowvi."""
        quartiles = np.quantile(self.seconds[who], (0.5, 0.25, 0.75)).tolist()
        row: Row = {"who": who} | {f"seconds{end}": q for end, q in zip(("", "_q1", "_q3"), quartiles, strict=True)}
        ratios: list[Any] = [None, None, None]
        if who != "flowvi":
            ratios = np.quantile(self.seconds[who] / self.seconds["flowvi"], (0.5, 0.25, 0.75)).tolist()
        row |= {f"ratio{end}": q for end, q in zip(("", "_q1", "_q3"), ratios, strict=True)}
        met = None if aim is None else ratios[0] >= aim
        return {**what, **row, "slope": None, "aim": aim, "met": met}


def alternate(runs: Mapping[str, Run], config: Config, rounds: int) -> Times:
    """Let all of them take turns.

    Args:
        runs: who -> the work.
        config: the clock, and how long a turn is.
        rounds: turns for each.
    """
    clock = time.process_time if config.cpu_time else time.perf_counter

    def clocked(run: Run, n: int) -> float:
        start = clock()
        run(n)
        return clock() - start

    calls = {}
    for who, run in runs.items():
        run(2)  # compiles, allocates
        n, spent = 1, clocked(run, 1)
        while spent < config.seconds:
            n *= 2 if spent > 0.25 * config.seconds else 4
            spent = clocked(run, n)
        calls[who] = n
    took: dict[str, list[float]] = {who: [] for who in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for who, run in runs.items():
                took[who].append(clocked(run, calls[who]) / calls[who])
    finally:
        gc.enable()
    return Times({who: np.array(t) for who, t in took.items()})


# The cases.


def pin(threads: str) -> None:
    """Give this process one core, or all of them; before anything has started threads."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if threads != "one":
        torch.set_num_threads(len(cores))
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(cores)})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    torch.set_num_threads(1)


def measure(config: Config, threads: str, progress: bool = True) -> list[Row]:
    """All cases, in this process."""
    peers = [peer for peer in config.peers if speed_peers.installed(peer)]
    cases = list(_cases(config, peers))
    rows: list[Row] = []
    for what, rounds, aims, make in tqdm(cases, desc=f"speed, threads: {threads}", disable=not progress, unit="case"):
        with torch.random.fork_rng(devices=[]):
            runs = make()
            times = alternate(runs, config, rounds)
        rows += [times.row(who, aims.get(who), threads=threads, **what) for who in runs]
    return rows


Case = tuple[dict[str, Any], int, Mapping[str, float], Callable[[], dict[str, Run]]]
"""What it is, rounds, aims by peer, and what makes the runs."""


def _cases(config: Config, peers: list[str]) -> Iterator[Case]:
    def what(group: str, case: str, dim: int, size: int, k: int) -> dict[str, Any]:
        return {"group": group, "case": case, "D": dim, "S": size, "K": k}

    def planar(dim: int, size: int, k: int) -> Callable[[], dict[str, Run]]:
        spec = flowvi.FlowSpec("planar", dim, k, "full" if dim == 2 else "diag")
        return lambda: {
            "flowvi": flowvi_step(spec, energy(dim), size, config.seed),
            **speed_peers.planar_steps(peers, dim, size, k, config.seed),
        }

    def stack(family: str, *sizes: int) -> Callable[[], dict[str, Run]]:
        return lambda: {"flowvi": flowvi_stack(family, *sizes), "pyro": speed_peers.pyro_stack(family, *sizes)}

    def network(name: str, dim: int, size: int, k: int) -> Callable[[], dict[str, Run]]:
        bins = {"num_bins": speed_peers.BINS} if name == "neural_spline" else {}
        spec = flowvi.FlowSpec(name, dim, k, "diag", {"hidden_dims": speed_peers.HIDDEN, **bins})
        make: dict[str, Callable[..., Run]] = {"flowjax": partial(speed_peers.flowjax_network_step, seed=config.seed)}
        if name != "iaf":  # zuko's and normflows' go the other way
            make |= {"zuko": speed_peers.zuko_step, "normflows": speed_peers.normflows_coupling_step}
        return lambda: {
            "flowvi": flowvi_step(spec, energy(dim), size, config.seed),
            **{peer: make[peer](name, dim, size, k) for peer in peers if peer in make},
        }

    for family, dim, size, k, aim in config.stacks:
        if "pyro" in peers:
            yield what("stack", family, dim, size, k), config.rounds, {"pyro": aim}, stack(family, dim, size, k)
    for dim, size, k, aims in config.steps:
        yield what("step", "planar", dim, size, k), config.rounds, aims, planar(dim, size, k)
    for name, dim, size, k in config.networks:
        if ({"flowjax"} if name == "iaf" else {"zuko", "normflows", "flowjax"}) & set(peers):
            aims = {"zuko": 1.0, "normflows": 1.0, "flowjax": 1.0}
            yield what("step", name, dim, size, k), config.rounds, aims, network(name, dim, size, k)
    if config.schools is not None and "pyro" in peers:
        size, k, aim = config.schools
        yield what("model", "eight schools", 10, size, k), config.rounds, {"pyro": aim}, lambda: _schools(config)
    if config.amortized is not None:
        size, k, aim = config.amortized
        for shared, words in ((True, "shared"), (False, "each datum's own")):
            yield (
                what("step", f"amortized planar, with its networks; directions: {words}", IMAGES[1], size, k),
                config.rounds,
                {AFFINE: aim},
                partial(_amortized, size, k, shared, config.seed),
            )
        if "numpyro" in peers:
            case = what("step", "amortized diagonal Gaussian, with its networks", IMAGES[1], size, 0)
            yield case, config.rounds, {"numpyro": 1.0}, partial(_amortized_numpyro, size, config.seed)
    for k in config.sweep_k:
        yield what("sweep", "K", 2, 256, k), config.sweep_rounds, {}, planar(2, 256, k)
    for dim in config.sweep_d:
        yield what("sweep", "D", dim, 256, 32), config.sweep_rounds, {}, planar(dim, 256, 32)
    for size in config.sweep_s:
        yield what("sweep", "S", 2, size, 32), config.sweep_rounds, {}, planar(2, size, 32)


def _amortized(batch_size: int, num_flows: int, shared_directions: bool, seed: int) -> dict[str, Run]:
    return {
        who: amortized_step(batch_size, k, shared_directions, seed) for who, k in (("flowvi", num_flows), (AFFINE, 0))
    }


def _amortized_numpyro(batch_size: int, seed: int) -> dict[str, Run]:
    return {
        "flowvi": amortized_step(batch_size, 0, False, seed),
        "numpyro": speed_peers.numpyro_images_step(batch_size, IMAGES, seed),
    }


def _schools(config: Config) -> dict[str, Run]:
    assert config.schools is not None
    size, k, _ = config.schools
    data = {name: torch.tensor(values) for name, values in SCHOOLS.items()}
    density = flowvi.as_density(eight_schools, args=(data,))
    spec = flowvi.FlowSpec("planar", density.dim, k, "full")
    return {
        "flowvi": flowvi_step(spec, density, size, config.seed),
        "pyro": speed_peers.pyro_svi(eight_schools, (data,), size, k, 1),
    }


# Starting.

_FIRST_STEP = """
import time, flowvi
start = time.perf_counter()
flowvi.fit(flowvi.energies.U2(), num_steps=1, seed=0, progress=False, verify=False)
print(time.perf_counter() - start)
"""


def _import(name: str) -> str:
    return f"import time\nstart = time.perf_counter()\nimport {name}\nprint(time.perf_counter() - start)"


def starts(config: Config, progress: bool = True) -> list[Row]:
    """Imports and the first step, each in new processes, one after the other; with byte code, as it is installed."""
    if config.start_rounds < 1:
        return []
    scripts = {"flowvi": _import("flowvi"), "pyro": _import("pyro"), "first step": _FIRST_STEP}
    took: dict[str, list[float]] = {who: [] for who in scripts}
    rounds: Iterable[int] = range(config.start_rounds + 1)  # the first fills the caches
    with tempfile.TemporaryDirectory() as folder:
        told = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": folder}
        for turn in tqdm(rounds, desc="speed, starts", disable=not progress, unit="round"):
            for who, script in scripts.items():
                call = [sys.executable, "-c", script]
                done = subprocess.run(call, capture_output=True, text=True, check=True, env=told)
                if turn:
                    took[who].append(float(done.stdout))
    what: Row = {"threads": "all", "group": "start", "D": None, "S": None, "K": None}
    imports = Times({who: np.array(took[who]) for who in ("flowvi", "pyro")})
    rows = [imports.row("flowvi", case="import", **what), imports.row("pyro", 1 / 1.1, case="import", **what)]
    first = Times({"flowvi": np.array(took["first step"])}).row("flowvi", case="first step", **what)
    return [*rows, first | {"aim": 1.0, "met": statistics.median(took["first step"]) <= 1.0}]
