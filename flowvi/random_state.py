"""Random numbers: torch's global generator, left as it was found and held by one thread at a time; and others.

What draws without a generator of its own (the start of a network, somebody else's model) draws from it. Two threads
that set its seed at once would draw each other's numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

__all__ = ["ONE_AT_A_TIME", "kept", "own_generator", "reseed"]

ONE_AT_A_TIME = RLock()
"""The random state, Pyro's handlers and the default dtype belong to the whole process."""


@contextmanager
def kept(seed: int | None = None) -> Iterator[None]:
    """What is drawn inside is not seen outside; with a seed it is that seed's, whatever other threads draw."""
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def reseed(seed: int, device: torch.device) -> None:
    """Seed what draws on this device and on the CPU; to seed whatever there may be costs a third of a millisecond."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def own_generator(seed: int | None, purpose: str, device: torch.device | str) -> torch.Generator:
    """A generator of its own: from the seed and the purpose, or from the system's entropy without a seed."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        # apart from the noise of a fit with the same seed, and from each other
        words = hashlib.sha256(f"flowvi {purpose} {seed}".encode()).digest()
        generator.manual_seed(int.from_bytes(words[:7], "little"))
    return generator
