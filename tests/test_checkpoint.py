"""Checkpoints: a fit that was cut off ends as if it had not been, and a bad file is refused without harm."""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import errors
from flowvi.files import CHECKPOINT, read, write
from flowvi.fit import checkpoint as checkpoint_module
from flowvi.fit import rounds
from flowvi.fit.checkpoint import FILE, Checkpoint, whole_steps

fit_module = importlib.import_module("flowvi.fit.fit")  # the name in the package is the function
attempt_module = importlib.import_module("flowvi.fit.attempt")

QUIET = {"progress": False, "verify": False, "seed": 0}
SMALL = {"num_flows": 4, "num_steps": 60, "num_particles": 32, **QUIET}


class Crash(Exception):
    """Stands for the end of the process."""


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


def minibatch(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=5) as i:
        pyro.sample("y", dist.Normal(x[i] @ beta, 0.5), obs=y[i])


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(20, generator=generator)


def bent(z):
    return -0.5 * z.square().sum(-1) - (z[:, 0] - z[:, 1].square()).square()


CASES = {
    "energy": partial(flowvi.fit, flowvi.energies.U2(), **SMALL),
    "callable": partial(flowvi.fit, bent, dim=2, dtype=torch.float64, **SMALL),
    "model": partial(flowvi.fit, regression, data(), **SMALL),
    "subsampled": partial(flowvi.fit, minibatch, data(), **SMALL),
    "restarts": partial(flowvi.fit, bent, dim=2, restarts=2, **SMALL),
    "autograd": partial(flowvi.fit, bent, dim=2, flow="neural_spline", **SMALL | {"num_flows": 2}),
    "coupling": partial(flowvi.fit, bent, dim=3, flow="real_nvp", **SMALL | {"num_flows": 2}),
    "objective": partial(flowvi.fit, bent, dim=2, objective=flowvi.ELBO(16), num_flows=2, num_steps=60, **QUIET),
    "factory": partial(
        flowvi.fit,
        bent,
        dim=2,
        flow=pyro.distributions.transforms.affine_coupling,
        objective=flowvi.ELBO(16),
        **{"num_flows": 2, "num_steps": 60} | QUIET,
    ),
}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Hundreds of files need not reach the disk; the test of SIGKILL has a process of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def crash_after(monkeypatch, num_saves):
    """The process ends right after so many files; one is due at every eighth step."""
    save, seen, steps = Checkpoint.save, [], itertools.count(1)

    def save_and_crash(self):
        save(self)
        seen.append(None)
        if len(seen) >= num_saves:
            raise Crash

    monkeypatch.setattr(Checkpoint, "save", save_and_crash)
    monkeypatch.setattr(Checkpoint, "due", lambda self: next(steps) % 8 == 0)


def cut_off(fit, folder, num_saves):
    """A fit that crashes; whether it did."""
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, num_saves)
        try:
            fit(checkpoint=folder)
        except Crash:
            return True
    return False


def same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.flow.parameters(), other.flow.parameters(), strict=True))
    assert torch.equal(one.history.elbo.nan_to_num(), other.history.elbo.nan_to_num())
    assert torch.equal(one.history.beta, other.history.beta)
    assert one.history.skipped_steps == other.history.skipped_steps
    assert one.config == other.config
    for name, draws in one.sample(5, seed=1).items():
        assert torch.equal(draws, other.sample(5, seed=1)[name])
    return True


def clean(posterior):
    """Without measured times in the words on compiling."""
    posterior.config["compile"] = str(posterior.config["compile"]).split("(")[0]
    return posterior


SLOW_CASES = ("autograd", "factory", "objective")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW_CASES else c for c in CASES])
def test_a_crash_at_any_file_leaves_the_same_result(case, tmp_path):
    fit = CASES[case]
    whole = clean(fit())
    for num_saves in (2, 3, 9):  # after the whitening, at the first step, close to the end
        folder = tmp_path / str(num_saves)
        assert cut_off(fit, folder, num_saves)
        assert same(whole, clean(fit(checkpoint=folder)))
    assert same(whole, clean(fit(checkpoint=tmp_path / "none")))  # and where there was no crash


def test_a_crash_after_another_crash(tmp_path):
    fit = CASES["restarts"]
    crashes = 0
    while cut_off(fit, tmp_path, 4):
        crashes += 1
    assert crashes > 3
    assert same(fit(), fit(checkpoint=tmp_path))


def test_a_finished_fit_is_returned_without_a_step(tmp_path, monkeypatch):
    fit = CASES["model"]
    first = fit(checkpoint=tmp_path)
    monkeypatch.setattr(attempt_module, "optimize", pytest.fail)
    monkeypatch.setattr(attempt_module, "whiten", pytest.fail)
    again = fit(checkpoint=tmp_path)
    assert same(first, again)
    assert again.timing.keys() == first.timing.keys()


def test_rounds_go_on_with_what_they_decided(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "ROUND_STEPS", 40)
    monkeypatch.setattr(rounds, "CLOSE_STEPS", 40)
    monkeypatch.setattr(rounds, "MIN_STEPS", 10)
    monkeypatch.setattr(rounds, "GOAL_PER_DIM_WHITENED", 1e-9)
    monkeypatch.setattr(rounds, "FIRST", 2)
    monkeypatch.setattr(rounds, "GROW", 2)
    monkeypatch.setattr(rounds, "MAX_FLOWS", 4)
    monkeypatch.setattr(rounds, "NUM_DRAWS", 1000)
    monkeypatch.setattr(attempt_module, "ROUND_STEPS", 40)
    fit = partial(flowvi.fit, bent, dim=2, num_particles=32, **QUIET)
    whole = fit()
    assert [c["covering"] for c in whole.config["rounds"]] == [False, False, True, False, True]  # the Gaussian's first
    cut = set()
    for num_saves in (5, 10, 16, 28):
        folder = tmp_path / str(num_saves)
        assert cut_off(fit, folder, num_saves)
        this = read(folder / FILE, CHECKPOINT)["parts"]["rounds"]["round"]
        cut.add((this["num_flows"], this["covering"]))
        resumed = fit(checkpoint=folder)
        # the machine is fast enough here that no time limit cuts a round, so even these bits agree
        for posterior in (whole, resumed):
            for check in posterior.config["rounds"]:
                check["seconds"] = 0
        assert same(whole, resumed)
    assert cut == {(2, 0), (2, 1), (4, 0), (4, 1)}


def test_the_steps_that_fit_a_time_limit_are_measured_once(tmp_path):
    fit = partial(flowvi.fit, bent, dim=2, num_flows=2, num_particles=16, num_steps=10**6, time_limit=0.1, **QUIET)
    assert cut_off(fit, tmp_path, 4)
    decided = read(tmp_path / FILE, CHECKPOINT)["parts"]["loop"]["num_steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempt_module, "seconds_per_step", pytest.fail)
        assert fit(checkpoint=tmp_path).config["num_steps"] == decided


def test_without_a_seed_the_files_seed_goes_on(tmp_path):
    fit = partial(flowvi.fit, bent, dim=2, num_flows=2, num_steps=30, progress=False, verify=False)
    assert cut_off(fit, tmp_path, 4)
    resumed = fit(checkpoint=tmp_path)
    assert resumed.seed == read(tmp_path / FILE, CHECKPOINT)["call"]["seed"]
    assert same(resumed, fit(seed=resumed.seed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 61}, "num_steps is 60 there and 61 here"),
        ({"num_flows": 5}, "num_flows is 4 there and 5 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"lr": 0.5}, "lr is "),
        ({"num_particles": 33}, "num_particles"),
        ({"flow": "radial"}, "name is 'planar' there and 'radial' here"),
        ({"base": "diag"}, "base"),
        ({"restarts": 2}, "restarts is 1 there and 2 here"),
        ({"whiten": False}, "whiten is True there"),
        ({"anneal": True}, "anneal"),
        ({"dtype": torch.float64}, "dtype"),
        ({"args": (data()[0], data()[1] + 1)}, "the model's arguments have other values"),
    ],
)
def test_another_call_is_refused(change, words, tmp_path):
    call = {"args": data(), **SMALL}
    flowvi.fit(regression, checkpoint=tmp_path, **call | {"num_steps": 60})
    with pytest.raises(errors.OptionError, match=words) as refused:
        flowvi.fit(regression, checkpoint=tmp_path, **call | change)
    assert "start afresh" in str(refused.value)


def test_other_data_in_a_closure_or_schedule_are_another_call(tmp_path):
    def fit(shift, half):
        return flowvi.fit(
            lambda z: bent(z - shift),
            dim=2,
            anneal=lambda step: min(1.0, 0.1 + step / half),
            checkpoint=tmp_path,
            **SMALL,
        )

    fit(0.0, 30)
    fit(0.0, 30)  # new functions that do the same are the same call
    with pytest.raises(errors.OptionError, match="log density has other values"):
        fit(0.1, 30)
    with pytest.raises(errors.OptionError, match="anneal is"):
        fit(0.0, 20)


# Bad files.


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return Path.touch, (self.witness,)


@pytest.fixture
def folder(tmp_path):
    """A fit that was cut off in its steps."""
    assert cut_off(CASES["model"], tmp_path / "folder", 5)
    return tmp_path / "folder"


def damage(folder, kind):
    path = folder / FILE
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "torn":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "one_bit":  # of a parameter: torch.load doesn't see it
        position = whole.index(torch.load(path)["parts"]["loop"]["flow"]["1.loc"].numpy().tobytes())
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "zip":
        torch.save({"weights": torch.ones(3)}, path)
    elif kind == "hostile_zip":
        torch.save({"format": "flowvi.checkpoint", "version": 1, "call": Hostile(folder / "ran")}, path)
    elif kind == "hostile_pickle":
        path.write_bytes(pickle.dumps(Hostile(folder / "ran")))
    elif kind == "future":
        torch.save(torch.load(path) | {"version": CHECKPOINT.version + 1}, path)
    elif kind == "posterior":
        CASES["model"]().save(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        content = read(path, CHECKPOINT)
        if kind == "no_steps":
            content["parts"]["loop"] = {}
        elif kind == "other_shapes":
            content["parts"]["loop"]["flow"]["1.loc"] = torch.zeros(7)
        elif kind == "no_moments":
            content["parts"]["loop"]["adam"] = [1.0, 2.0, 3.0]
        elif kind == "no_generator":
            content["generators"] = {"fit": torch.zeros(3)}
        elif kind == "no_call":
            content["call"] = None
        elif kind == "no_parts":
            content["parts"] = 3
        write(path, content, CHECKPOINT)


@pytest.mark.parametrize(
    "kind",
    [
        *("empty", "torn", "one_bit", "text", "zip", "hostile_zip", "hostile_pickle", "future", "posterior", "folder"),
        *("no_steps", "other_shapes", "no_moments", "no_generator", "no_call", "no_parts"),
    ],
)
def test_a_bad_file_is_a_typed_error_and_runs_nothing(kind, folder):
    damage(folder, kind)
    before = None if kind == "folder" else (folder / FILE).read_bytes()
    with pytest.raises(errors.FileFormatError, match="start afresh") as refused:
        CASES["model"](checkpoint=folder)
    assert str(folder) in str(refused.value)
    assert not (folder / "ran").exists()
    assert before is None or (folder / FILE).read_bytes() == before  # it is not overwritten either
    if kind == "future":
        assert "upgrade" in str(refused.value)


def test_a_checkpoint_is_no_posterior(folder):
    with pytest.raises(errors.FileFormatError, match="checkpoint"):
        flowvi.load(folder / FILE, regression)


def test_the_folder_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.OptionError, match="must be a folder"):
        CASES["energy"](checkpoint=tmp_path / "file")
    with pytest.raises(errors.OptionError, match="checkpoint_every"):
        CASES["energy"](checkpoint=tmp_path, checkpoint_every=0)


# Disks that fail.


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_costs_one_warning_and_nothing_else(call, folder, monkeypatch):
    before = (folder / FILE).read_bytes()
    whole = clean(CASES["model"]())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.warns(errors.CheckpointWarning, match="No space left") as seen:
        resumed = CASES["model"](checkpoint=folder, checkpoint_every=1e-9)
    assert len(seen) == 1
    assert same(whole, clean(resumed))
    assert os.listdir(folder) == [FILE]
    assert (folder / FILE).read_bytes() == before


def test_a_disk_that_has_room_again_is_used_again(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def full_at_first(*args):
        calls.append(args)
        if len(calls) < 10:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", full_at_first)
    with pytest.warns(errors.CheckpointWarning):
        CASES["energy"](checkpoint=tmp_path, checkpoint_every=1e-9)
    assert len(read(tmp_path / FILE, CHECKPOINT)["parts"]["fit"]["tries"]) == 1


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(errors.CheckpointWarning) as seen:
        resumed = CASES["energy"](checkpoint=tmp_path / "file" / "folder")
    assert len(seen) == 1
    assert same(CASES["energy"](), resumed)


def test_files_of_killed_runs_are_removed(tmp_path):
    (tmp_path / f".{FILE}.1.part").touch()
    CASES["energy"](checkpoint=tmp_path)
    assert os.listdir(tmp_path) == [FILE]


# Ctrl-C.


def test_ctrl_c_writes_a_last_file_and_the_same_call_goes_on(tmp_path):
    calls = []

    def target(z):
        calls.append(None)
        if len(calls) == 30 and not resumed:
            signal.raise_signal(signal.SIGINT)
        return bent(z)

    fit = partial(flowvi.fit, target, dim=2, whiten=False, num_flows=2, num_steps=60, **QUIET)
    resumed = False
    with pytest.warns(errors.InterruptedWarning, match="after 2. steps"):
        part = fit(checkpoint=tmp_path, checkpoint_every=1000)
    assert part.config["stopped"] == "interrupted"
    taken = len(part.history.elbo)
    assert len(read(tmp_path / FILE, CHECKPOINT)["parts"]["loop"]["beta"]) == taken < 60
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = True
    calls.clear()
    assert same(fit(), fit(checkpoint=tmp_path))


def test_ctrl_c_waits_for_the_step_once():
    with whole_steps(True) as seen:
        signal.raise_signal(signal.SIGINT)
        assert seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole_steps(True):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def work():
        with whole_steps(True):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_ctrl_c_between_rounds_keeps_the_best(monkeypatch):
    check, calls = rounds.check, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return check(*args, **kwargs)

    monkeypatch.setattr(rounds, "check", interrupted)
    monkeypatch.setattr(attempt_module, "ROUND_STEPS", 250)
    with pytest.warns(errors.InterruptedWarning):
        posterior = flowvi.fit(bent, dim=2, num_particles=32, **QUIET)
    assert posterior.config["stopped"] == "interrupted"
    assert posterior.config["num_flows"] == rounds.FIRST
    assert posterior.history.elbo[-20:].mean() > posterior.history.elbo[:20].mean()


def test_nothing_is_written_or_asked_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_module, "Checkpoint", pytest.fail)
    monkeypatch.setattr(checkpoint_module, "digest", pytest.fail)
    CASES["energy"]()
    assert os.listdir(tmp_path) == []


# SIGKILL.

PATIENCE = 60
"""Seconds that a forked fit of less than one may take, on a machine however busy; then it hangs."""


def kill_and_resume(folder: Path, num: int) -> None:
    """Fits in forked children, each killed at a random moment and resumed to the end; prints what differs."""
    torch.set_num_threads(1)
    fits = [CASES["energy"], CASES["model"]]
    warm = [digest(clean(fit())) for fit in fits]  # kernels are compiled and loaded before the forks
    lengths = []
    for i, fit in enumerate(fits):
        start = time.monotonic()
        finish(fork(fit, folder / f"whole {i}"))
        lengths.append(time.monotonic() - start)
        assert (folder / f"whole {i}" / "digest").read_text() == warm[i]
    moments, killed = random.Random(0), 0
    for i in range(4 * num):
        which = i % len(fits)
        place = folder / str(i)
        child = fork(fits[which], place)
        time.sleep(moments.uniform(0, lengths[which]))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(wait(child)):  # it was done before: the machine is less busy now
            lengths[which] *= 0.9
            continue
        finish(fork(fits[which], place))
        found = (place / "digest").read_text()
        print("same" if found == warm[which] else "OTHER", flush=True)
        killed += 1
        if killed == num:
            break


def fork(fit, place: Path) -> int:
    child = os.fork()
    if child:
        return child
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # says where it hangs, and ends it
    try:
        place.mkdir(exist_ok=True)
        posterior = fit(checkpoint=place, checkpoint_every=0.01)
        (place / "digest").write_text(digest(clean(posterior)))
    except BaseException as error:
        print(f"failed: {error!r}", flush=True)
    finally:
        os._exit(0)


def wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def finish(child: int) -> None:
    """Waits for a fit that nobody kills."""
    status = wait(child)
    if status:
        sys.exit(f"a fit hung for {PATIENCE} s (its stack is above), or died: wait status {status}")


def digest(posterior) -> str:
    parts = [*posterior.flow.parameters(), posterior.history.elbo, posterior.sample(10, seed=0).popitem()[1]]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parts)).hexdigest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("num", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_changes_no_bit(num, tmp_path):
    limit = 300 + 6 * num
    try:
        run = subprocess.run(
            [sys.executable, __file__, str(tmp_path), str(num)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(flowvi.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode()
        pytest.fail(f"{said.count('same')} of {num} fits were killed and resumed within {limit} s: too busy?\n{said}")
    assert run.stdout.split() == [b"same"] * num, run.stdout.decode()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kill_and_resume(Path(sys.argv[1]), int(sys.argv[2]))


def two_modes(z):
    return torch.logaddexp(-0.5 * z.square().sum(-1), -0.5 * (z - 8).square().sum(-1))


def test_a_finished_mixture_is_returned_too(tmp_path):
    options = {"dim": 2, "num_flows": 2, "num_steps": 20, "seed": 0, "verify": False, "progress": False}
    first = flowvi.fit(two_modes, checkpoint=tmp_path, **options)
    again = flowvi.fit(two_modes, checkpoint=tmp_path, **options)
    assert first.config["weights"] == pytest.approx([0.5, 0.5], abs=0.02)
    assert torch.equal(first.sample(50, seed=1)["z"], again.sample(50, seed=1)["z"])
    assert again.config["weights"] == first.config["weights"]


def test_ctrl_c_in_one_component_ends_the_mixture(monkeypatch):
    real, calls = attempt_module.optimize, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        record = real(*args, **kwargs)
        record.stopped = "interrupted"
        return record

    monkeypatch.setattr(attempt_module, "optimize", interrupted)
    with pytest.warns(errors.InterruptedWarning):
        posterior = flowvi.fit(two_modes, dim=2, num_flows=2, num_steps=20, seed=0, verify=False, progress=False)
    assert len(calls) == 1
    assert posterior.config["stopped"] == "interrupted"
    assert posterior.config["weights"] == pytest.approx([0.5, 0.5], abs=0.02)
