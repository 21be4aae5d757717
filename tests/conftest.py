"""What all tests share: the same start for each of them, and the folder of reference posteriors."""

from __future__ import annotations

import os
from pathlib import Path

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Empty parameter store, seed 0, one thread."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def references() -> Path:
    """The folder of reference posteriors: FLOWVI_REFERENCES, or shared/references beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "references"
    folder = Path(os.environ.get("FLOWVI_REFERENCES", beside))
    if not folder.is_dir():
        pytest.skip("no reference posteriors: set FLOWVI_REFERENCES to their folder")
    return folder
