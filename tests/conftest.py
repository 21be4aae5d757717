"""What every test starts from: an empty parameter store, a seed, one thread; and where the references are."""

from __future__ import annotations

import os
from pathlib import Path

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def clean_state():
    """Nothing one test leaves behind reaches another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def references() -> Path:
    """The folder of reference posteriors, from $FLOWVI_REFERENCES or beside the repository."""
    default = Path(__file__).parents[2] / "shared" / "references"
    folder = Path(os.environ.get("FLOWVI_REFERENCES", default))
    if not folder.is_dir():
        pytest.skip(f"no reference posteriors at {folder}: set FLOWVI_REFERENCES to their folder")
    return folder
