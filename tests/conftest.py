"""What every test starts from: an empty parameter store, a seed, one thread, no network; and where the references are.

`--slow-report FILE` writes a table of the tests that ran: `python -m pytest -m slow --slow-report tests/SLOW.md`.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import signal
import sys
import threading
from pathlib import Path

import hypothesis
import pyro
import pytest
import torch

import flowvi

_REACHED: list[str] = []
"""The hosts that the present test tried to reach."""


def _no_network(event: str, args: tuple) -> None:
    """An audit hook: Python tells it of each name that is looked up and each address that is connected to."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else None  # else a socket in the file system
    else:
        return
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if name in ("localhost", "::1", "0.0.0.0") or name.startswith("127."):
        return
    _REACHED.append(name)
    raise ConnectionRefusedError(f"the tests have no network, and {name!r} is not this machine")


def pytest_addoption(parser):
    parser.addoption("--slow-report", metavar="FILE", help="write a table of each test's outcome and seconds to FILE")


def pytest_configure(config):
    if not hasattr(sys, "flowvi_has_no_network"):  # a hook stays for good
        sys.addaudithook(_no_network)
        sys.flowvi_has_no_network = True
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    # The same examples at each run: a failure is the change's. The slow tests draw theirs from seeds of their own.
    hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("same")
    path = config.getoption("slow_report")
    if path and not hasattr(config, "workerinput"):  # the workers' reports reach the first process
        config.pluginmanager.register(SlowReport(Path(path)))


def pytest_collection_finish():
    """What the imports made stays to the end: garbage collections, which some tests ask for, need not look at it."""
    gc.collect()
    gc.freeze()


class SlowReport:
    """Collects outcomes; at the end a markdown table. Rows of test files that had no part in the run stay."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, tuple[str, float]] = {}

    def pytest_runtest_logreport(self, report):
        outcome, seconds = self.found.get(report.nodeid, ("passed", 0.0))
        outcome = report.outcome if report.outcome != "passed" else outcome
        self.found[report.nodeid] = (outcome, seconds + report.duration)

    def pytest_sessionfinish(self):
        if not self.found:
            return
        files = {name.split("::")[0] for name in self.found}
        old = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        rows = {line for line in old if line.startswith("| tests/") and line[2:].split("::")[0] not in files}
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        rows |= {f"| {name} | {what} | {seconds:.1f} | {today} |" for name, (what, seconds) in self.found.items()}
        versions = {"Python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
        lines = [
            "# The slow tests, last results",
            "",
            "Made by `python -m pytest -m slow --slow-report tests/SLOW.md`; a run of some files renews their rows.",
            "",
            "| test | outcome | seconds | date |",
            "|---|---|---|---|",
            *sorted(rows),
            "",
            f"flowvi {flowvi.__version__}, " + ", ".join(f"{k} {v}" for k, v in versions.items()) + " (the last run).",
        ]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def no_network():
    """A test that reaches for another machine fails, even where a library hides that it could not."""
    _REACHED.clear()
    yield _REACHED
    reached = sorted(set(_REACHED))
    assert not reached, f"the test tried to reach {', '.join(reached)}"


@pytest.fixture(autouse=True)
def clean_state():
    """Nothing one test leaves behind reaches another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile turns it off


@pytest.fixture(scope="session")
def references() -> Path:
    """The folder of reference posteriors, from $FLOWVI_REFERENCES or beside the repository."""
    default = Path(__file__).parents[2] / "shared" / "references"
    folder = Path(os.environ.get("FLOWVI_REFERENCES", default))
    if not folder.is_dir():
        pytest.skip(f"no reference posteriors at {folder}: set FLOWVI_REFERENCES to their folder")
    return folder
