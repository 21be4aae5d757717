"""What each process of tests/test_distributed.py runs: `ranks_program.py SCENARIO FOLDER`; results go to rankN.pt."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed

import flowvi
from experiments import images, mnist
from flowvi.errors import InterruptedWarning, OptionError, RankLostError, TargetError
from flowvi.fit import factored_descent
from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.descent import SharedDescent
from flowvi.fit.distributed import Ranks, Split
from flowvi.fit.factored_descent import FactoredDescent
from flowvi.fit.gradient import Gradient, RecordedGradient
from flowvi.fit.steps import make_step

QUIET = {"progress": False, "verify": False, "seed": 0, "dtype": torch.float64}
SMALL = {"num_flows": 4, "num_steps": 60, "num_particles": 33, **QUIET}
KILLED_AT = 30


def bent(z):
    return -0.5 * z.square().sum(-1) - (z[:, 0] - z[:, 1].square()).square()


def minibatch(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=5) as i:
        pyro.sample("y", dist.Normal(x[i] @ beta, 0.5), obs=y[i])


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0], dtype=torch.float64)


class Rows:
    """`bent`, but NaN for the particles from a given one on; it is told where a call's rows begin."""

    def __init__(self, bad, first):
        self.bad, self.first = bad, first

    def value_and_grad(self, z):
        z = z.detach().requires_grad_()
        log_p = bent(z)
        (grad,) = torch.autograd.grad(log_p.sum(), z)
        row = self.first + torch.arange(len(z))
        return torch.where(row >= self.bad, math.nan, log_p.detach()), grad


def one_step(ranks, name, kind, bad):
    """The number of finite particles, the ELBO and the gradient of one step, away from the start."""
    torch.manual_seed(0)
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, 2, 3, "full"), dtype=torch.float64)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    flat = FlatParameters(flow.module)
    step = make_step(flow, Rows(bad, ranks.share(33).start), kind(33), flat, ranks)
    generator = torch.Generator().manual_seed(3)
    seen = [tuple(map(float, step(0.7, generator))) for _ in range(2)]
    grad = flat.grad.clone()
    flat.release()
    return seen, grad


def gradients(ranks):
    """Relative differences of the split step from that of one process, and whether the counts are the same."""
    found = {}
    for name in ("planar", "radial", "real_nvp"):
        for kind in (flowvi.ELBO, flowvi.PathELBO, flowvi.BalancedELBO, flowvi.CoveringELBO):
            if name == "real_nvp" and kind is not flowvi.ELBO:
                continue
            for bad in (99, 10, 0):  # all finite; all of the last rank's bad; none finite
                (seen, grad), (expected, whole) = (one_step(r, name, kind, bad) for r in (ranks, Ranks()))
                error = float((grad - whole).abs().max() / whole.abs().max().clamp_min(1e-300))
                num = [n for n, _ in seen] == [n for n, _ in expected]
                elbo = torch.allclose(torch.tensor(seen), torch.tensor(expected), rtol=1e-13, equal_nan=True)
                found[name, kind.__name__, bad] = error, num and elbo
    return found


def parameters(posterior):
    return torch.cat([p.detach().reshape(-1) for p in posterior.flow.parameters()])


def outcome(posterior):
    return {
        "parameters": parameters(posterior),
        "elbo": posterior.history.elbo,
        "skipped": posterior.history.skipped_steps,
        "config": str(posterior.config),
        "timing": {k: v for k, v in posterior.timing.items() if k != "diagnose"},
    }


def every_step(fit):
    """What `fit` returns, and the parameters after every step of Adam."""
    after, step = [], FlatAdam.step

    def watched(self, *args):
        step(self, *args)
        after.append(self.vector.clone())

    FlatAdam.step = watched
    try:
        return fit(), torch.stack(after)
    finally:
        FlatAdam.step = step


def raised(function, kind):
    try:
        function()
    except kind as error:
        return str(error)
    return None


def refuse():
    raise TargetError("no such thing")


def nan_on_the_last_rank(ranks):
    """A fit in which the gradient of the last rank is not finite at two steps."""
    finish, calls = Split.finish, []

    def spoil(self):
        calls.append(None)
        if len(calls) in (7, 8) and ranks.rank == ranks.world - 1:
            self._grad[0] = math.nan
        finish(self)

    Split.finish = spoil
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            posterior = flowvi.fit(bent, dim=2, whiten=False, distributed=True, **SMALL)
    finally:
        Split.finish = finish
    return outcome(posterior) | {"warnings": [str(w.message) for w in seen]}


def ctrl_c_on_the_last_rank(ranks):
    calls = []

    def target(z):
        calls.append(None)
        if len(calls) == 100 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return bent(z)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        posterior = flowvi.fit(target, dim=2, whiten=False, distributed=True, **SMALL | {"num_steps": 20_000})
    return outcome(posterior) | {"warned": [w.category is InterruptedWarning for w in seen]}


def amortized(distributed, optimizer="adam"):
    """The parameters of an encoder after a few minibatches, its last checked ELBO, and how a bad batch size is met."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    encoder = torch.nn.Linear(3, 8)
    x = torch.randn(200, 3)
    made = {"encoder": encoder, "num_flows": 2, "num_steps": 200, "seed": 0, "progress": False, "validation": 0}
    made["optimizer"] = optimizer
    fit = flowvi.fit(model, (x,), batch_size=20, lr=1e-2, distributed=distributed, **made)
    odd = raised(lambda: flowvi.fit(model, (x,), batch_size=21, distributed=distributed, **made), OptionError)
    weights = torch.cat([p.detach().reshape(-1) for p in encoder.parameters()])
    return {"weights": weights, "train": fit.history.train, "odd": odd}


def factored(compiled, dtype, skip=()):
    """What `amortized` gives, of layers large enough that ranks exchange factors, and how many steps went without.

    Args:
        compiled: whether steps are recorded, so that there are factors.
        dtype: of everything.
        skip: steps that this rank takes by autograd.
    """
    calls, taken, recorded = [], [], RecordedGradient.__call__
    kinds = (SharedDescent, SharedDescent.step), (FactoredDescent, FactoredDescent.step)

    def count(kind, step):
        def counted(self, lr, elbo):
            taken.append(kind)
            return step(self, lr, elbo)

        kind.step = counted

    def sometimes(self, *inputs):
        calls.append(None)
        return Gradient.__call__(self, *inputs) if len(calls) in skip else recorded(self, *inputs)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(2, 40, dtype=dtype), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Tanh(), torch.nn.Linear(50, 30)).to(dtype)
    x = torch.randn(200, 40, dtype=dtype)
    for kind, step in kinds:
        count(kind, step)
    RecordedGradient.__call__, smallest, factored_descent.SMALLEST = sometimes, factored_descent.SMALLEST, 0
    try:
        fit = flowvi.fit(
            model, (x,), encoder=encoder, num_flows=2, num_steps=60, batch_size=8, lr=1e-3, validation=0, seed=0,
            compile=compiled, distributed=True, progress=False,
        )  # fmt: skip
    finally:
        RecordedGradient.__call__, factored_descent.SMALLEST = recorded, smallest
        for kind, step in kinds:
            kind.step = step
    weights = torch.cat([p.detach().reshape(-1) for p in encoder.parameters()])
    return {"weights": weights, "train": fit.history.train, "taken": [taken.count(kind) for kind, _ in kinds]}


def by_messages(ranks, function):
    """What a function gives when the ranks share no memory."""
    memory, ranks._memory = ranks._memory, None
    try:
        return function()
    finally:
        ranks._memory = memory


def sums(ranks):
    """Sums over the ranks by memory and by messages, and what memory they used."""
    found, before = [], ranks._memory and ranks._memory._rows[0]
    for dtype in (torch.float32, torch.float64, torch.int64):
        for shape in ((), (0,), (7,), (3, 5), (3_000,), (70_000,), (2,)):
            g = torch.Generator().manual_seed(ranks.rank)
            mine = (100 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
            there = ranks.sum_(mine.clone()), by_messages(ranks, lambda x=mine: ranks.sum_(x.clone()))
            strided = torch.stack([mine, mine], -1)[..., 0]
            found.append((*there, ranks.sum_(strided)))
    return {"sums": found, "grown": before is not None and ranks._memory._rows[0] is not before}


def experiment(folder):
    """The rows of an experiment that splits its minibatches, and whether its folder holds them."""
    g = torch.Generator().manual_seed(0)
    made = images.Images(*((torch.rand(n, 12, generator=g) < 0.3).float() for n in (200, 50, 60)), "synthetic")
    config = mnist.Config(updates=10, lengths=(0, 2), num_test=20, num_samples=5, hidden=4, latent_dim=2)
    report = mnist.run(config, folder / "mnist", progress=False, images=lambda config, folder: made)
    files = sorted(path.name for path in (folder / "mnist" / "rows").iterdir())
    return {"rows": [{k: row[k] for k in ("K", "F", "nll", "ranks")} for row in report.rows], "files": files}


class Own(flowvi.ELBO):
    def backward(self, *args, **kwargs):
        return super().backward(*args, **kwargs)


def silent_rank(ranks):
    """The seconds until the first rank gives up one that is there and says nothing, and the error."""
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=1))
    impatient = Ranks(ranks.rank, ranks.world, group, group)
    start = time.perf_counter()
    if ranks.is_first:
        words = raised(impatient.barrier, RankLostError)
        return words, time.perf_counter() - start
    time.sleep(3)
    return None


def everything(folder):
    ranks = Ranks.join()
    fit = {"distributed": True, **SMALL}
    posterior, after = every_step(lambda: flowvi.fit(bent, dim=2, **fit))
    found = {
        "world": ranks.world,
        "shares": [ranks.share(n) for n in (2, 33)],
        "gradients": gradients(ranks),
        "fit": outcome(posterior),
        "after": after,
        "alone": outcome(flowvi.fit(bent, dim=2, **SMALL)),
        "subsampled": outcome(flowvi.fit(minibatch, data(), **fit)),
        "subsampled alone": outcome(flowvi.fit(minibatch, data(), **SMALL)),
        "rounds": outcome(flowvi.fit(bent, dim=2, time_limit=1.0, distributed=True, **QUIET)),
        "restarts": outcome(flowvi.fit(bent, dim=2, whiten=False, distributed="restarts", restarts=3, **SMALL)),
        "restarts alone": outcome(flowvi.fit(bent, dim=2, whiten=False, restarts=3, **SMALL)),
        "amortized": amortized(True),
        "amortized alone": amortized(False),
        "amortized by messages": by_messages(ranks, lambda: amortized(True)),
        "rmsprop": amortized(True, "rmsprop"),
        "rmsprop by messages": by_messages(ranks, lambda: amortized(True, "rmsprop")),
        "fit by messages": by_messages(ranks, lambda: outcome(flowvi.fit(bent, dim=2, **fit))),
        "whole": factored(False, torch.float64),
        "factored": factored(True, torch.float64),
        "factored, not always": factored(True, torch.float64, skip=(10, 11, 30) if ranks.rank else (11, 20)),
        "factored float32": factored(True, torch.float32),
        "whole float32": factored(False, torch.float32),
        **sums(ranks),
        "experiment": experiment(folder),
        "not finite": nan_on_the_last_rank(ranks),
        "ctrl-c": ctrl_c_on_the_last_rank(ranks),
        "seed": flowvi.fit(bent, dim=2, whiten=False, **fit | {"seed": None, "num_steps": 2}).config["seed"],
        "first": ranks.first(lambda: ranks.rank),
        "refused": raised(lambda: ranks.first(refuse), TargetError),
        "own": raised(lambda: flowvi.fit(bent, dim=2, objective=Own(33), distributed=True), OptionError),
        "few": raised(lambda: flowvi.fit(bent, dim=2, num_particles=1, distributed=True), OptionError),
        "too few": raised(lambda: flowvi.fit(bent, dim=2, restarts=1, distributed="restarts"), OptionError),
    }
    torch.save(found | {"silent": silent_rank(ranks)}, folder / f"rank{ranks.rank}.pt")


def checkpointed(folder, kill):
    """A fit with a checkpoint at every step, in which the last rank is killed."""
    ranks, step, calls = Ranks.join(), FlatAdam.step, []

    def killed(self, *args):
        step(self, *args)
        calls.append(None)
        if kill and len(calls) == KILLED_AT and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    FlatAdam.step = killed
    start = time.perf_counter()
    try:
        posterior = flowvi.fit(bent, dim=2, checkpoint=folder / "fit", checkpoint_every=1e-9, distributed=True, **SMALL)
    except RankLostError as error:
        torch.save({"error": str(error), "seconds": time.perf_counter() - start}, folder / f"rank{ranks.rank}.pt")
        raise
    torch.save(outcome(posterior) | {"calls": len(calls)}, folder / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # a file at every step need not reach the disk
    scenario, where = sys.argv[1], Path(sys.argv[2])
    if scenario == "everything":
        everything(where)
    else:
        checkpointed(where, kill=scenario == "killed")
