"""What is shown while there is nothing to count: where it is wanted, and nowhere else."""

from __future__ import annotations

import os
import signal
import threading

import numba
import pytest
from tqdm.auto import tqdm

import flowvi
from flowvi import progress
from flowvi.kernels.compiled.jit import _announced
from flowvi.progress import Bar, waiting, wanted


def test_a_wait_is_shown_where_it_is_wanted_and_goes_when_it_is_over(capsys):
    with wanted(True):
        with waiting("look for it"):
            assert "look for it" in capsys.readouterr().err
        assert not capsys.readouterr().err.strip()  # blanks over the words
        with wanted(False), waiting("look for it"):
            pass
    with waiting("look for it"):  # stderr is no terminal here
        pass
    assert not capsys.readouterr().err


def test_a_kernel_says_once_that_it_compiles(capsys):
    kernel = _announced(numba.njit(lambda x: x + 1))
    with wanted(True):
        assert kernel(1.0) == 2.0
        assert "compile the kernel test_progress.<lambda>" in capsys.readouterr().err
        kernel(2.0)
    assert not capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::flowvi.errors.UntrustedWarning")
@pytest.mark.parametrize("shown", [True, False])
def test_the_check_of_a_fit_has_a_bar_unless_the_fit_is_to_be_silent(capsys, monkeypatch, shown):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    flowvi.fit(flowvi.energies.U2(), num_flows=2, num_steps=20, seed=0, progress=shown)
    found = capsys.readouterr().err
    assert ("check by a short HMC" in found) == shown
    assert bool(found) == shown


class Held:
    """A lock that another thread holds."""

    def __init__(self, lock):
        self.lock, self.held, self.over = lock, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)

    def hold(self):
        with self.lock:
            self.held.set()
            self.over.wait()

    def __enter__(self):
        self.thread.start()
        self.held.wait()

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()


def test_a_bar_does_not_wait_for_the_lock_that_processes_share():
    """Which a process that was killed may hold for ever."""
    made = threading.Thread(target=lambda: Bar(disable=True), daemon=True)
    with Held(tqdm.get_lock()):
        made.start()
        made.join(10)
        assert not made.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_bar_after_a_fork_has_a_lock_of_its_own():
    with Held(Bar.get_lock()):
        child = os.fork()
        if not child:
            signal.alarm(10)  # ends it where it waits
            Bar(disable=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
