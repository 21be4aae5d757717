"""What flowvi stands on: licences that allow its use, versions that are pinned, and no network."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINNED = {line.split("==")[0].lower() for line in CONSTRAINTS.splitlines() if "==" in line}

ALLOWED = ("apache", "bsd", "mit", "psf", "python software foundation", "mpl-2.0", "isc", "hpnd", "unlicense", "zlib")
"""Words of permissive licences; MPL-2.0 covers only its own files."""
FORBIDDEN = ("agpl", "lgpl", "gpl", "affero", "general public", "proprietary", "non-commercial", "noncommercial")


CUDA = ("nvidia-", "cuda-")
"""NVIDIA's own libraries, under its own licence: they come with torch where its wheel is built for CUDA."""


def licence(distribution: metadata.Distribution) -> str:
    """The licence by its expression, its classifiers, or its first line of text, lower case."""
    info = distribution.metadata
    classifiers = [c.split(" :: ")[-1] for c in info.get_all("Classifier") or [] if c.startswith("License :: ")]
    text = (info.get("License") or "").strip().splitlines()
    return " ".join(filter(None, [info.get("License-Expression"), *classifiers, *text[:1]])).lower()


def closure(*roots: str) -> dict[str, metadata.Distribution]:
    """The distributions that these names need, and what those need, on this machine, by normalized name."""
    found: dict[str, metadata.Distribution] = {}
    asked, waiting = set(), [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key in asked:
            continue
        asked.add(key)
        found[key[0]] = distribution = metadata.distribution(requirement.name)
        for line in distribution.requires or []:
            need = Requirement(line)
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate(default_environment() | {"extra": e}) for e in extras):
                waiting.append(need)
    return found


def problem(text: str) -> str | None:
    """What is wrong with a licence, None if nothing."""
    if not text:
        return "no licence is told"

    def names(words: tuple[str, ...]) -> bool:
        return any(re.search(rf"\b{word}", text) for word in words)

    allowed = names(ALLOWED)
    if names(FORBIDDEN) and not (allowed and " or " in text):
        return text
    return None if allowed else text


def test_licences_of_the_dependencies():
    found = closure(*PROJECT["dependencies"])
    assert {"torch", "pyro-ppl", "numpy", "arviz", "numba", "llvmlite"} <= set(found)
    wrong = {name: problem(licence(d)) for name, d in found.items() if not name.startswith(CUDA)}
    assert {name: words for name, words in wrong.items() if words} == {}


@pytest.mark.parametrize(
    "text", ["", "gpl-3.0-or-later", "gnu general public license v3", "lgpl-2.1 and mit", "limited"]
)
def test_a_licence_that_is_not_allowed_is_named(text):
    assert problem(text)


def test_what_use_and_tests_need_is_pinned():
    """Each name that pyproject.toml gives itself; what those bring along follows from pip's own choice."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["test"], *extras["experiments"], *extras["notebooks"]]
    named = {Requirement(line).name.lower() for line in lines} - {"flowvi"}
    assert len(named) > 15
    assert named - PINNED == set()


def test_the_network_is_out_of_reach(no_network):
    with pytest.raises(ConnectionRefusedError, match=r"192\.0\.2\.1"):  # reserved for documentation
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert no_network == ["192.0.2.1"]
    no_network.clear()  # else the fixture fails this test, as it should any other
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


OFFLINE = """
import pkgutil, sys

def hook(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        raise SystemExit(f"the network is asked for: {event} {args}")

sys.addaudithook(hook)
import flowvi
for name in flowvi.__all__:
    getattr(flowvi, name)
"""


def test_the_import_needs_no_network():
    run = subprocess.run([sys.executable, "-c", OFFLINE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
