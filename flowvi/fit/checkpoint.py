"""Checkpoints: a fit's whole state in a file, so that the same call goes on where a crash cut it off.

The file is one of `flowvi.files`: plain data, with a version and a checksum, read without running code from it. It
is written beside the old one, flushed to the disk, and then takes its place: at any moment there is one whole file.
A phase of the fit hands in a function that gives its present state (`Checkpoint.keep`), and asks at its start
for the state that a file had (`Checkpoint.take`).
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowvi._version import __version__
from flowvi.errors import CheckpointWarning, FileFormatError, OptionError
from flowvi.files import CHECKPOINT, digest, plain, read, write
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.objectives import ELBO
from flowvi.storage import site_table
from flowvi.targets import LogDensity

__all__ = ["Checkpoint", "describe", "whole_steps"]

FILE = "fit.checkpoint"
"""The file in the folder."""

NUM_PROBES = 4
"""Points at which the log density is compared with that of the file."""

State = Callable[[], Mapping[str, Any]]


class Checkpoint:
    """The state of a fit in a folder; one fit has one folder.

    Args:
        folder: where; made if it is not there.
        every: seconds between two files.
        call: which call the file belongs to, from `describe`.
        seed: the call's; where the caller gave none (in `call`), that of a file is taken instead.
        ranks: of which the first reads and writes the file, for all.

    Attributes:
        path: the file.
        seed: what is used.
        resumed: whether there was a file.

    Raises:
        OptionError: the file is of another call, or the folder is a file.
        FileFormatError: the file is damaged, of a newer version, or not a checkpoint.
    """

    def __init__(
        self, folder: str | Path, every: float, call: Mapping[str, Any], *, seed: int, ranks: Ranks = ALONE
    ) -> None:
        self.path = Path(folder) / FILE
        self._every, self._call, self._ranks = every, dict(call), ranks
        self._states: dict[str, State] = {}
        self._generators: dict[str, torch.Generator] = {}
        self._failed = False
        self._last = time.monotonic()
        self._found = ranks.first(self._open)
        self.seed = seed if self._found is None else int(self._found["call"]["seed"])
        self.resumed = self._found is not None

    def _open(self) -> dict[str, Any] | None:
        """What the file holds; None where there is none."""
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"checkpoint must be a folder, and {folder} is a file.")
        if not self.path.exists():
            return None
        try:
            content = read(self.path, CHECKPOINT)
        except Exception as error:  # whatever a damaged file can cause
            words = str(error) if isinstance(error, FileFormatError) else f"{self.path} can't be read ({error})."
            raise FileFormatError(f"{words} {self._afresh}") from error
        with self.reading():
            differences = compare(content["call"], self._call)
            int(content["call"]["seed"])
            content["parts"] = dict(content["parts"])
        if differences:
            raise OptionError(
                f"the checkpoint in {self.path.parent} belongs to another call of fit: {'; '.join(differences)}. "
                f"Make the same call to go on with it. {self._afresh}"
            )
        return content

    @property
    def _afresh(self) -> str:
        return f"To start afresh delete {self.path}, or give another folder."

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, state that doesn't fit is a damaged file.

        Raises:
            FileFormatError: some part of the state can't be used.
        """
        try:
            yield
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(
                f"{self.path} has parts that don't fit together ({type(error).__name__}: {error}). {self._afresh}"
            ) from error

    def take(self, part: str) -> Any:
        """A part of the file's state, once; None where there is none."""
        return None if self._found is None else self._found["parts"].pop(part, None)

    def look(self, part: str) -> Any:
        """The same, without taking it."""
        return None if self._found is None else self._found["parts"].get(part)

    def keep(self, part: str, state: State | None) -> None:
        """From now on a file gets this part from `state()`; None drops it."""
        self._states.pop(part, None)
        if state is not None:
            self._states[part] = state

    def follow(self, **generators: torch.Generator) -> None:
        """The generators whose states are part of the file from now on."""
        self._generators = generators

    def restore_generators(self) -> None:
        """Put the generators where they were when the file was written.

        Raises:
            FileFormatError: the file has no state for them.
        """
        if self._found is not None:
            with self.reading():
                for name, generator in self._generators.items():
                    generator.set_state(self._found["generators"][name])

    def due(self) -> bool:
        """Whether it is time for a file."""
        return time.monotonic() - self._last >= self._every

    def save(self) -> None:
        """Write the present state, on rank 0. Where that fails, the fit goes on, with one warning."""
        if not self._ranks.is_first:
            return
        content = {
            "flowvi": __version__,
            "call": self._call | {"seed": self.seed},
            "parts": {part: state() for part, state in self._states.items()},
            "generators": {name: generator.get_state() for name, generator in self._generators.items()},
        }
        try:
            data = plain(content)
        except TypeError as error:
            raise OptionError(
                f"this flow's state can't be kept in a checkpoint ({error}): leave checkpoint out."
            ) from error
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, data, CHECKPOINT)
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    CheckpointWarning(
                        f"no checkpoint could be written to {self.path.parent} ({error}). The fit goes on, and tries "
                        f"again every {self._every:g} s; an earlier checkpoint is still whole."
                    ),
                    stacklevel=2,
                )
        else:
            self._remove_leftovers()
        self._last = time.monotonic()

    def _remove_leftovers(self) -> None:
        """The half-written files of runs that were killed."""
        with suppress(OSError):
            for left in self.path.parent.glob(f".{FILE}.*.part"):
                left.unlink(missing_ok=True)


@contextmanager
def whole_steps(wanted: bool) -> Iterator[list[int]]:
    """Inside, Ctrl-C fills the list that is yielded, so that the loop can end between two steps.

    A second Ctrl-C interrupts at once. Nothing is changed where it is not `wanted`, in other threads, and where the
    program has its own handler.
    """
    seen: list[int] = []
    mine = wanted and threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return

    def wait(signum: int, frame: Any) -> None:
        seen.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, wait)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Which call a file belongs to.


@torch.no_grad()
def describe(density: LogDensity, seed: int | None, *settings: Any, **more: Any) -> dict[str, Any]:
    """What makes a call the same call: its target, by values too, and its settings, as plain data.

    Args:
        density: the target.
        seed: as the caller gave it; None is any.
        *settings: dataclasses of settings.
        **more: single settings.
    """
    generator = torch.Generator().manual_seed(0)
    z = (2 * torch.rand(NUM_PROBES, density.dim, generator=generator, dtype=density.dtype) - 1).to(density.device)
    arguments = plain({"args": density.args, "kwargs": density.kwargs}, otherwise=_name)
    call: dict[str, Any] = {
        "target": density.name,
        "dim": density.dim,
        "dtype": str(density.dtype).removeprefix("torch."),
        "device": density.device.type,
        "sites": site_table(density),
        "arguments": digest(arguments),
        "log_density": density.full(z).double().cpu(),
        "seed": seed,
    }
    for group in settings:
        assert is_dataclass(group)
        more |= {field.name: getattr(group, field.name) for field in fields(group)}
    steps = int(more.get("num_steps") or 1)
    return call | {name: _word(value, steps) for name, value in more.items()}


def compare(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What differs between two calls, in words.

    Args:
        saved: of the file.
        present: of the call; its seed may be None.
    """
    differences = []
    for name in [*saved, *(key for key in present if key not in saved)]:
        old, new = saved.get(name), present.get(name)
        if name == "seed" and new is None:
            continue
        if name == "log_density":
            if not _close(old, new, 1e-9 if present["dtype"] == "float64" else 1e-4):
                differences.append("the target's log density has other values, so its data or its code changed")
        elif digest(old) != digest(new):
            if name == "arguments":
                differences.append("the model's arguments have other values")
            elif name == "sites":
                differences.append("the target has other sites")
            else:
                differences.append(f"{name} is {old!r} there and {new!r} here")
    return differences


def _close(old: Tensor | None, new: Tensor | None, tolerance: float) -> bool:
    """Equal but for the rounding of another number of threads."""
    if old is None or new is None or old.shape != new.shape:
        return False
    size = float(new.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(old, new, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _word(value: Any, num_steps: int) -> Any:
    """A setting as plain data that is the same in another process."""
    if isinstance(value, ELBO):
        return f"{type(value).__name__}({value.num_particles})", _word(value.anneal, num_steps)
    if callable(value) and not isinstance(value, type):
        # a schedule, or a factory that some file has no name for
        with suppress(Exception):
            return _name(value), [float(value(step)) for step in _some(num_steps)]
        return _name(value)
    return plain(value, otherwise=_name)


def _some(num_steps: int) -> list[int]:
    """A few steps: the first ones, and some up to the last."""
    return sorted({min(step, num_steps - 1) for step in (0, 1, num_steps // 10, num_steps // 3, num_steps - 1)})


def _name(value: Any) -> str:
    """What to call an object that isn't plain data: never an address."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
