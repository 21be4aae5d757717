"""Posteriors and densities in files: `torch.save` of plain data, read without running code from the file.

A file is a dict: a header (format, version, digest) and the content. The digest is there because `torch.load`
doesn't notice damaged numbers.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi._version import __version__
from flowvi.conditional_flow import ConditionalFlow
from flowvi.density_fit import DensityFit, DensityHistory, flow_at
from flowvi.errors import FileFormatError, OptionError, TargetError
from flowvi.flow import Flow, FlowSpec
from flowvi.mixture import flow_from_spec
from flowvi.posterior import History, Posterior
from flowvi.targets import LogDensity, as_density

__all__ = ["load", "load_density", "save", "save_density"]


def save(posterior: Posterior, path: str | Path) -> None:
    """Writes a posterior; see `Posterior.save`.

    Args:
        posterior: What to write.
        path: The file.

    Raises:
        OptionError: The flow can't be built again from its name.
    """
    _check_rebuild(posterior.flow)
    try:
        arguments, stored = _plain({"args": posterior.density.args, "kwargs": posterior.density.kwargs}), True
    except TypeError:
        arguments, stored = {"args": (), "kwargs": {}}, False
    history = {name: getattr(posterior.history, name) for name in History.__dataclass_fields__}
    content = {
        "flowvi": __version__,
        "target": posterior.density.name,
        "spec": posterior.flow.spec.to_dict() if posterior.flow.spec else None,
        "state": dict(posterior.flow.state_dict()),
        "flow_dtype": str(posterior.flow.dtype),
        "dtype": str(posterior.density.dtype),
        "sites": _site_table(posterior.density),
        "is_model": posterior.density.model is not None,
        "arguments_stored": stored,
        "config": posterior.config,
        "timing": posterior.timing,
        "history": history,
        "seed": posterior.seed,
        "chains": posterior._stored_chains(),
    }
    _write(Path(path), _plain(content, otherwise=str) | {"arguments": arguments}, _POSTERIOR)


def load(
    path: str | Path,
    target: Any = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Posterior:
    """Reads a posterior that `Posterior.save` wrote. No code from the file is run.

    Args:
        path: The file.
        target: What was fitted: the model, energy or callable, or a `LogDensity`. A file can't hold code.
        args: The model's positional arguments; None takes those of the file.
        kwargs: The model's keyword arguments; None takes those of the file.

    Returns:
        The posterior, on the CPU unless the target is a `LogDensity` elsewhere: the same log q and the same
        draws by seed.

    Raises:
        FileFormatError: The file isn't a posterior of flowvi, is damaged, or was written by a newer version.
        OptionError: The target is missing, or its arguments are neither given nor in the file.
        TargetError: The target has other sites than the one that was fitted.
        UnknownFlowError: The flow is one that was registered when the file was written, and isn't now.
        OptionError: The same for a flow that is registered as something else now.
    """
    content = _read(Path(path), _POSTERIOR)
    if target is None:
        raise OptionError(f"pass what was fitted, {content['target']!r}, too: flowvi.load(path, model).")
    if args is None and kwargs is None and not content["arguments_stored"]:
        raise OptionError(
            f"the arguments of {content['target']!r} were not plain data, so the file doesn't hold them: pass "
            "them, flowvi.load(path, model, args=..., kwargs=...)."
        )
    try:
        spec = FlowSpec.from_dict(content["spec"])
        dtype = _DTYPES[content["dtype"]]
        arguments = _unplain(content["arguments"])
        history = History(**content["history"])
    except Exception as error:
        raise FileFormatError(f"{path} has parts that don't fit together ({error}): save the fit anew.") from error
    density = as_density(
        target,
        args=tuple(arguments["args"] if args is None else args),
        kwargs=dict(arguments["kwargs"] if kwargs is None else kwargs),
        dim=None if content["is_model"] else spec.dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    _compare_sites(content["sites"], _site_table(density), content["target"])
    flow = _rebuild(spec, content["state"], _DTYPES[content["flow_dtype"]], density.device)
    posterior = Posterior(
        flow,
        density,
        config=content["config"],
        timing=content["timing"],
        history=history,
        seed=content["seed"],
    )
    if content.get("chains") is None:
        return posterior
    from flowvi.refined import RefinedPosterior

    return RefinedPosterior.restored(posterior, content["chains"])


def save_density(fit: DensityFit, path: str | Path) -> None:
    """Writes a density fit; see `DensityFit.save`.

    Args:
        fit: What to write.
        path: The file.

    Raises:
        OptionError: The flow can't be built again from its name.
    """
    _check_rebuild(fit.flow)
    content = {
        "flowvi": __version__,
        "spec": fit.flow.spec.to_dict() if fit.flow.spec else None,
        "context_dim": fit.context_dim,
        "state": dict(fit.flow.state_dict()),
        "flow_dtype": str(fit.flow.dtype),
        "config": fit.config,
        "timing": fit.timing,
        "history": {name: getattr(fit.history, name) for name in DensityHistory.__dataclass_fields__},
        "held_out": fit.held_out,
        "seed": fit.seed,
    }
    _write(Path(path), _plain(content, otherwise=str), _DENSITY)


def load_density(path: str | Path) -> DensityFit:
    """Reads a density that `DensityFit.save` wrote. No code from the file is run.

    Args:
        path: The file.

    Returns:
        The fit, on the CPU: the same log q, and the same draws by seed.

    Raises:
        FileFormatError: The file isn't a density of flowvi, is damaged, or was written by a newer version.
        UnknownFlowError: The flow is one that was registered when the file was written, and isn't now.
        OptionError: The same for a flow that is registered as something else now.
    """
    content = _read(Path(path), _DENSITY)
    try:
        spec = FlowSpec.from_dict(content["spec"])
        history = DensityHistory(**content["history"])
        dtype, context_dim = _DTYPES[content["flow_dtype"]], int(content["context_dim"])
    except Exception as error:
        raise FileFormatError(f"{path} has parts that don't fit together ({error}): save the fit anew.") from error
    return DensityFit(
        _rebuild(spec, content["state"], dtype, torch.device("cpu"), context_dim),
        config=content["config"],
        timing=content["timing"],
        history=history,
        held_out=content["held_out"],
        seed=content["seed"],
    )


def _rebuild(
    spec: FlowSpec, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, context_dim: int = 0
) -> Any:
    """A flow, conditional where there is a context, from its description and its parameters."""
    flow: Flow | ConditionalFlow
    with torch.random.fork_rng(devices=[]):  # its start is random, and overwritten
        if context_dim:
            flow = ConditionalFlow(spec, context_dim, dtype=dtype, device=device)
        else:
            flow = flow_from_spec(spec, dtype=dtype, device=device)
    try:
        flow.load_state_dict(state)
    except RuntimeError as error:
        raise OptionError(
            f"the flow that is registered as {spec.name!r} has other parameters than the fitted one: register the "
            f"same factory, flowvi.transforms.register({spec.name!r}, factory, overwrite=True). ({error})"
        ) from error
    return flow


def _check_rebuild(flow: Flow | ConditionalFlow) -> None:
    """Raises, while the flow is still at hand, where a file wouldn't give it back."""
    remedy = "register its factory, flowvi.transforms.register(name, factory), here and before loading"
    if flow.spec is None:
        raise OptionError(
            f"a flow composed by hand can't be described in a file: {remedy}, and build it by Flow.from_spec; or "
            "save flow.state_dict() yourself."
        )
    context_dim = flow.context_dim if isinstance(flow, ConditionalFlow) else 0
    twin = _rebuild(flow.spec, flow.state_dict(), flow.dtype, flow.device, context_dim)
    with torch.no_grad():
        at = torch.zeros(context_dim, dtype=flow.dtype, device=flow.device)
        ours, theirs = (
            flow_at(f, at).rsample_and_log_prob(2, generator=torch.Generator(flow.device).manual_seed(0))[1]
            for f in (flow, twin)
        )
    if not torch.equal(ours, theirs) and not ours.isnan().any():
        raise OptionError(f"the flow that is registered as {flow.spec.name!r} isn't the fitted one: {remedy}.")


class _Kind(NamedTuple):
    """What a file holds: its name, its version, and its content's keys."""

    noun: str
    version: int
    keys: frozenset[str]
    reader: str

    @property
    def format(self) -> str:
        return f"flowvi.{self.noun}"


_COMMON = ("flowvi", "spec", "state", "flow_dtype", "config", "timing", "history", "seed")
_POSTERIOR = _Kind(
    "posterior",
    1,
    frozenset((*_COMMON, "target", "dtype", "sites", "is_model", "arguments", "arguments_stored")),
    "flowvi.load",
)
_DENSITY = _Kind("density", 1, frozenset((*_COMMON, "context_dim", "held_out")), "flowvi.load_density")
CHECKPOINT = _Kind(
    "checkpoint", 1, frozenset(("flowvi", "call", "parts", "generators")), "flowvi.fit(..., checkpoint=folder)"
)
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


def _write(path: Path, content: dict[str, Any], kind: _Kind = _POSTERIOR) -> None:
    """Writes beside the file and then replaces it, so that a crash leaves the old file whole."""
    header = {"format": kind.format, "version": kind.version, "digest": _digest(content)}
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


def _read(path: Path, kind: _Kind = _POSTERIOR) -> dict[str, Any]:
    """The content of a file, checked."""
    unreadable = (
        f"{path} can't be read as a flowvi {kind.noun}: it is another kind of file, or damaged. Copy it again, or "
        "fit and save anew."
    )
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise FileFormatError(unreadable)
        file.seek(0)
        try:
            # only tensors and plain containers: anything else in the file is refused before it can act
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FileFormatError(unreadable) from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    for other in (_POSTERIOR, _DENSITY, CHECKPOINT):
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
    if version != kind.version or content.pop("digest", None) != _digest(content):
        raise FileFormatError(f"{path} is damaged (wrong checksum): copy it again, or fit and save anew.")
    missing = kind.keys - content.keys()
    if missing:
        raise FileFormatError(f"{path} lacks {', '.join(sorted(missing))}: fit and save anew.")
    return content


def _digest(value: Any) -> str:
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


def _plain(value: Any, otherwise: Any = None) -> Any:
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
        return _plain(value.item(), otherwise)
    if isinstance(value, Mapping) and all(type(key) in (str, int) and key != _ARRAY for key in value):
        return {key: _plain(item, otherwise) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        items = [_plain(item, otherwise) for item in value]
        return items if type(value) is list else tuple(items)
    if otherwise is None:
        raise TypeError(f"{type(value).__name__} is not plain data")
    return otherwise(value)


_ARRAY = "__array__"


def _unplain(value: Any) -> Any:
    """The opposite of `_plain`: marked tensors become arrays."""
    if isinstance(value, dict):
        if _ARRAY in value:
            return value[_ARRAY].numpy()
        return {key: _unplain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unplain(item) for item in value)
    return value


def _site_table(density: LogDensity) -> list[dict[str, Any]]:
    """What has to agree for z to mean the same."""
    return [
        {
            "name": site.name,
            "shape": tuple(site.shape),
            "unconstrained_shape": tuple(site.unconstrained_shape),
            "support": type(site.support).__name__.strip("_"),
        }
        for site in density.sites
    ]


def _compare_sites(saved: list[dict[str, Any]], present: list[dict[str, Any]], target: str) -> None:
    """Raises where the target isn't the one that was fitted, naming the sites that differ."""
    if saved == present:
        return
    old, new = ({row["name"]: row for row in table} for table in (saved, present))
    differences = [f"{name} is not in this model" for name in old if name not in new]
    differences += [f"{name} is not in the file" for name in new if name not in old]
    differences += [
        f"{name} has {key} {old[name][key]} in the file and {new[name][key]} in this model"
        for name in old
        if name in new
        for key in old[name]
        if old[name][key] != new[name][key]
    ]
    order = "the sites come in another order"
    raise TargetError(
        f"the file holds a posterior of another target, {target!r}: {'; '.join(differences) or order}. Load it "
        "with the model and the arguments that were fitted."
    )
