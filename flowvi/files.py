"""flowvi's files: `torch.save` of plain data under a header, read without running code from the file.

A file is a dict: a header (format, version, digest) and the content. The digest is there because `torch.load`
doesn't notice damaged numbers.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi._version import __version__
from flowvi.errors import FileFormatError, OptionError


class Kind(NamedTuple):
    """What a file holds: its name, its version, and its content's keys."""

    noun: str
    version: int
    keys: frozenset[str]
    reader: str

    @property
    def format(self) -> str:
        """What the header says."""
        return f"flowvi.{self.noun}"


_COMMON = ("flowvi", "spec", "state", "flow_dtype", "config", "timing", "history", "seed")
POSTERIOR = Kind(
    "posterior",
    1,
    frozenset((*_COMMON, "target", "dtype", "sites", "is_model", "arguments", "arguments_stored")),
    "flowvi.load",
)
DENSITY = Kind("density", 1, frozenset((*_COMMON, "context_dim", "held_out")), "flowvi.load_density")
CHECKPOINT = Kind(
    "checkpoint", 2, frozenset(("flowvi", "call", "parts", "generators")), "flowvi.fit(..., checkpoint=folder)"
)
AMORTIZED = Kind(
    "amortized fit",
    2,  # 1, and checkpoints of version 1: the networks behind planar layers had no gain
    frozenset(("flowvi", "parameters", "example", "config", "timing", "history", "seed")),
    "flowvi.AmortizedFit.load",
)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


def write(path: Path, content: dict[str, Any], kind: Kind = POSTERIOR) -> None:
    """Writes beside the file and then replaces it, so that a crash leaves the old file whole."""
    if not path.name:
        raise OptionError(f"path must name a file, and {str(path)!r} is a folder.")
    header = {"format": kind.format, "version": kind.version, "digest": digest(content)}
    memory = io.BytesIO()  # straight to a full disk, torch.save has another error than OSError
    torch.save(header | content, memory)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder can't be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path, kind: Kind = POSTERIOR) -> dict[str, Any]:
    """The content of a file, checked."""
    unreadable = (
        f"{path} can't be read as a flowvi {kind.noun}: it is another kind of file, or damaged. Copy it again, or "
        "fit and save anew."
    )
    with path.open("rb") as file:
        try:
            if not zipfile.is_zipfile(file):  # torch.load would look for an older format of its own
                raise zipfile.BadZipFile("not a zip archive")
            file.seek(0)
            # only tensors and plain containers: anything else in the file is refused before it can act
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FileFormatError(unreadable) from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    for other in (POSTERIOR, DENSITY, CHECKPOINT, AMORTIZED):
        if found == other.format != kind.format:
            raise FileFormatError(f"{path} holds a flowvi {other.noun}, not a {kind.noun}: use {other.reader}.")
    if found != kind.format:
        raise FileFormatError(f"{path} is not a flowvi {kind.noun}: it was written by something else.")
    version = content.pop("version", None)
    if isinstance(version, int) and version > kind.version:
        raise FileFormatError(
            f"{path} has format version {version}, written by flowvi {content.get('flowvi')}; this flowvi "
            f"({__version__}) reads up to {kind.version}: pip install --upgrade flowvi."
        )
    if isinstance(version, int) and version < kind.version:
        raise FileFormatError(
            f"{path} has format version {version}, written by an older flowvi ({content.get('flowvi')}): its "
            f"numbers mean something else now. Fit and save anew, or read it with that one."
        )
    if version != kind.version or content.pop("digest", None) != digest(content):
        raise FileFormatError(f"{path} is damaged (wrong checksum): copy it again, or fit and save anew.")
    missing = kind.keys - content.keys()
    if missing:
        raise FileFormatError(f"{path} lacks {', '.join(sorted(missing))}: fit and save anew.")
    return content


def digest(value: Any) -> str:
    """A checksum of nested plain data."""
    digest = hashlib.sha256()

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            flat = part.reshape(-1).clone(memory_format=torch.contiguous_format)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            digest.update(f"dict{len(part)}".encode())
            for key in part:
                visit(key)
                visit(part[key])
        elif isinstance(part, list | tuple):
            digest.update(f"{type(part).__name__}{len(part)}".encode())
            for item in part:
                visit(item)
        else:
            digest.update(repr(part).encode())

    visit(value)
    return digest.hexdigest()


def plain(value: Any, otherwise: Any = None) -> Any:
    """A copy made of CPU tensors, numbers, strings, dicts, lists and tuples; arrays become marked tensors.

    Anything else is turned into `otherwise(value)`, or is a TypeError.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        return value.detach().cpu().clone().contiguous()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {_ARRAY: torch.from_numpy(np.array(value))}
    if isinstance(value, np.generic):
        return plain(value.item(), otherwise)
    if isinstance(value, Mapping) and all(type(key) in (str, int) and key != _ARRAY for key in value):
        return {key: plain(item, otherwise) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        items = [plain(item, otherwise) for item in value]
        return items if type(value) is list else tuple(items)
    if otherwise is None:
        raise TypeError(f"{type(value).__name__} is not plain data")
    return otherwise(value)


_ARRAY = "__array__"


def unplain(value: Any) -> Any:
    """The opposite of `plain`: marked tensors become arrays."""
    if isinstance(value, dict):
        if _ARRAY in value:
            return value[_ARRAY].numpy()
        return {key: unplain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unplain(item) for item in value)
    return value
