"""Ranks: two processes take the steps of one, decide together, and end together; see `ranks_program.py`."""

from __future__ import annotations

import errno
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import flowvi
from flowvi.errors import OptionError
from flowvi.fit import distributed, host_memory
from flowvi.fit.distributed import ALONE, TIMEOUT_NAME, VARIABLES, Ranks, _timeout, local_device
from flowvi.fit.host_memory import SWITCH, HostMemory
from flowvi.kernels.dispatch import has_numba
from tests import ranks_program

PROGRAM = Path(ranks_program.__file__)
ROOT = PROGRAM.parents[1]


shares_memory = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"), reason="ranks share no memory here"
)


def environment(**more):
    """Of a process of the tests: one thread, and this flowvi."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def launch(scenario, folder):
    """Two processes, without torchrun, which would kill the one that is left; their exit codes and words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), scenario, str(folder)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    words = [process.communicate(timeout=100)[1] for process in started]
    return [process.returncode for process in started], words


def results(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes under torchrun found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM), "everything"]
    done = subprocess.run(
        [sys.executable, *command, str(folder)], env=environment(), capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return results(folder)


def same(one, other):
    assert torch.equal(one["parameters"], other["parameters"])
    assert torch.equal(one["elbo"].nan_to_num(), other["elbo"].nan_to_num())
    assert {k: v for k, v in one.items() if k in ("config", "skipped", "timing")} == {
        k: v for k, v in other.items() if k in ("config", "skipped", "timing")
    }


def test_the_gradient_is_that_of_one_process_with_all_particles(both):
    for found in both:
        assert found["world"] == 2
        assert len(found["gradients"]) == 27
        for error, seen in found["gradients"].values():
            assert error < 1e-12
            assert seen
    first, second = both
    assert first["shares"] == [slice(0, 1), slice(0, 16)]
    assert second["shares"] == [slice(1, 2), slice(16, 33)]


def test_parameters_are_the_same_bits_on_both_after_every_step(both):
    first, second = both
    assert len(first["after"]) == 60
    assert torch.equal(first["after"], second["after"])


@pytest.mark.parametrize("case", ["fit", "subsampled", "rounds", "restarts", "not finite", "ctrl-c"])
def test_every_rank_returns_the_same_posterior(both, case):
    same(both[0][case], both[1][case])


@pytest.mark.parametrize(("split", "alone"), [("fit", "alone"), ("subsampled", "subsampled alone")])
def test_a_split_fit_is_the_fit_of_one_process_but_for_rounding(both, split, alone):
    for found in both:
        assert torch.allclose(found[split]["parameters"], found[alone]["parameters"], rtol=1e-8, atol=1e-8)
        assert torch.allclose(found[split]["elbo"], found[alone]["elbo"], rtol=1e-8, atol=1e-8)


def test_restarts_over_ranks_give_the_best_of_all_to_the_bit(both):
    for found in both:
        assert torch.equal(found["restarts"]["parameters"], found["restarts alone"]["parameters"])


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both_and_told_by_the_first(both):
    first, second = (found["not finite"] for found in both)
    assert first["skipped"] == second["skipped"] == 2
    assert any("2 of 60 steps were skipped" in words for words in first["warnings"])
    assert second["warnings"] == []


def test_minibatches_of_an_encoder_are_split(both):
    first, second = (found["amortized"] for found in both)
    alone = both[0]["amortized alone"]
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["train"], second["train"])
    assert "split evenly over 2 ranks" in first["odd"]
    assert alone["odd"] is None
    assert float(first["train"][-20:].mean()) == pytest.approx(float(alone["train"][-20:].mean()), abs=0.3)
    assert float(first["train"][-20:].mean()) > float(first["train"][0])


@shares_memory
@pytest.mark.skipif(not has_numba(), reason="products are left open where numba is installed")
def test_ranks_that_exchange_factors_learn_what_they_learn_from_whole_gradients(both):
    for name, whole, plainly in (
        ("factored", "whole", 1),  # the first step, before which nobody knows how long a gradient is
        ("factored, not always", "whole", 1 + 4),
        ("factored float32", "whole float32", 1),
    ):
        first, second = (found[name] for found in both)
        expected = both[0][whole]
        tolerance = 1e-3 if "32" in name else 1e-9
        assert first["taken"] == second["taken"] == [plainly, 60]
        assert expected["taken"] == [60, 0]
        for part in ("weights", "train"):
            assert torch.equal(first[part], second[part])
            torch.testing.assert_close(first[part], expected[part], rtol=tolerance, atol=tolerance)


@shares_memory
def test_sums_by_memory_are_those_by_messages(both):
    for found, other in zip(both[0]["sums"], both[1]["sums"], strict=True):
        by_memory, by_messages, strided = found
        assert torch.equal(by_memory, other[0])
        assert torch.equal(by_memory, strided)
        assert torch.equal(by_memory, by_messages)  # of two numbers: more could round in another order
    assert both[0]["grown"]
    assert both[1]["grown"]


@pytest.mark.parametrize("name", ["amortized", "rmsprop"])
def test_an_encoder_learns_the_same_with_and_without_common_memory(both, name):
    for found in both:
        by_memory, by_messages = found[name], found[f"{name} by messages"]
        assert torch.equal(by_memory["weights"], both[0][name]["weights"])
        assert torch.allclose(by_memory["weights"], by_messages["weights"], rtol=1e-3, atol=1e-3)
        assert torch.allclose(by_memory["train"], by_messages["train"], rtol=1e-3, atol=1e-3)


def test_a_fit_is_the_same_with_and_without_common_memory(both):
    for found in both:
        for part in ("parameters", "elbo"):
            assert torch.equal(found["fit"][part], found["fit by messages"][part])


def test_ctrl_c_on_one_rank_ends_both_at_one_step(both):
    first, second = (found["ctrl-c"] for found in both)
    assert 80 < len(first["elbo"]) == len(second["elbo"]) < 20_000
    assert "interrupted" in first["config"]
    assert any(first["warned"])
    assert second["warned"] == []


def test_what_rank_0_decides_or_refuses_holds_on_both(both):
    for found in both:
        assert found["first"] == 0
        assert found["refused"] == "no such thing"
        assert found["seed"] == both[0]["seed"]
        assert "Own" in found["own"]
        assert "restarts" in found["own"]
        assert "1 particles" in found["few"]
        assert "1 restarts" in found["too few"]


def test_a_silent_rank_is_given_up_in_bounded_time(both):
    words, seconds = both[0]["silent"]
    assert "did not answer in time" in words
    assert TIMEOUT_NAME in words
    assert 0.9 < seconds < 3


def test_a_rank_that_dies_ends_the_other_with_an_error_and_the_same_call_resumes(both, tmp_path):
    codes, words = launch("killed", tmp_path)
    assert codes == [1, -signal.SIGKILL]
    assert "RankLostError" in words[0]
    error = torch.load(tmp_path / "rank0.pt", weights_only=False)
    assert "checkpoint" in error["error"]
    codes, words = launch("resumed", tmp_path)
    assert codes == [0, 0], words
    for found, whole in zip(results(tmp_path), both, strict=True):
        assert found["calls"] == 60 - ranks_program.KILLED_AT
        assert torch.equal(found["parameters"], whole["fit"]["parameters"])
        assert torch.equal(found["elbo"], whole["fit"]["elbo"])


def test_alone_it_says_how_to_launch(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not Ranks.launched()
    with pytest.raises(OptionError, match="torchrun --nproc-per-node"):
        flowvi.fit(flowvi.energies.U2(), distributed=True)
    with pytest.raises(OptionError, match="distributed must be True, False"):
        flowvi.fit(flowvi.energies.U2(), distributed="threads")


def test_an_experiment_splits_its_minibatches(both):
    one, other = (found["experiment"] for found in both)
    assert one == other
    assert [(row["K"], row["ranks"]) for row in one["rows"]] == [(0, 2), (2, 2)]
    assert one["files"] == ["planar_K0.json", "planar_K2.json"]


def test_one_process_is_left_as_it_is():
    x = torch.randn(3)
    assert ALONE.sum_(x) is ALONE.mean_(x) is x
    ALONE.broadcast_(x)
    ALONE.barrier()
    assert ALONE.same(x) is x
    assert ALONE.gather(1) == [1]
    assert ALONE.any(True)
    assert not ALONE.stop_asked()
    assert local_device("cuda", ALONE) == "cuda"
    with ALONE.working(), ALONE.quiet():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_timeout_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(TIMEOUT_NAME, "2.5")
    assert _timeout().total_seconds() == 2.5
    for wrong in ("soon", "-1", "0", "1e9"):
        monkeypatch.setenv(TIMEOUT_NAME, wrong)
        with pytest.raises(OptionError, match=TIMEOUT_NAME):
            _timeout()


def alone_of_two(timeout=0.5):
    """The memory of rank 0 of two, whose rank 1 agrees with all it says, and never comes."""
    return HostMemory.between(0, 2, timeout, lambda value: [value, value])


@shares_memory
def test_a_rank_waits_in_common_memory_only_while_the_other_lives(monkeypatch):
    memory = alone_of_two()
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        memory.meet()
    monkeypatch.setattr(HostMemory, "_lives", lambda self, other: True)
    with pytest.raises(RuntimeError, match=r"rank 1 was silent for 0\.5 seconds"):
        memory.sum_(torch.ones(3))
    memory.close()
    memory.close()


@shares_memory
def test_an_interrupted_sum_leaves_the_others(monkeypatch):
    # Else this rank would have come once more than the others, and what they sum later would be wrong.
    memory = alone_of_two()
    ranks = Ranks(0, 2, memory=memory)
    monkeypatch.setattr(distributed, "_joined", (None, ranks))
    monkeypatch.setattr(HostMemory, "_wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ranks.sum_(torch.ones(3))
    assert ranks._memory is None
    assert memory._locks is None
    with pytest.raises(ValueError, match="not been initialized"):  # torch's own: there is no group any more
        ranks.barrier()


def no_room(file, first, size):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "why",
    [
        lambda patch: patch.setenv(SWITCH, "0"),
        lambda patch: patch.setattr(platform, "machine", lambda: "aarch64"),  # whose writes may be seen out of order
        lambda patch: patch.setattr(sys, "platform", "darwin"),
        lambda patch: patch.setattr(host_memory, "FOLDER", "/no/such/folder"),
        lambda patch: patch.setattr(os, "posix_fallocate", no_room),
        lambda patch: patch.setattr(tempfile, "mkstemp", lambda **_: no_room(0, 0, 0)),
    ],
)
def test_without_common_memory_ranks_use_messages(monkeypatch, why):
    before = set(Path("/dev/shm").glob("flowvi-*"))
    why(monkeypatch)
    assert alone_of_two() is None
    assert set(Path("/dev/shm").glob("flowvi-*")) == before


@shares_memory
def test_what_finds_no_room_later_goes_by_messages(monkeypatch):
    memory = alone_of_two()
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert memory.tensor((4, 5), torch.float32) is None
    assert not memory.sum_(torch.ones(host_memory.SMALL))
    assert ALONE.shared((4, 5), torch.ones(1)) is None
    memory.close()


def test_cuda_is_the_ranks_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    two = Ranks(1, 2)
    assert local_device("cuda", two) == torch.device("cuda", 1)
    assert local_device("cuda:0", two) == torch.device("cuda", 0)
    assert local_device("cpu", two) == torch.device("cpu")
    assert local_device(None, two) is None
