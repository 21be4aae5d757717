"""What is shown while there is nothing to count: where it is wanted, and nowhere else."""

from __future__ import annotations

import numba
import pytest

import flowvi
from flowvi import progress
from flowvi.kernels.compiled.jit import _announced
from flowvi.progress import waiting, wanted


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
