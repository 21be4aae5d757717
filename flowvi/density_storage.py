"""Density fits in files."""

from __future__ import annotations

from pathlib import Path

import torch

from flowvi._version import __version__
from flowvi.checks import as_path
from flowvi.density_fit import DensityFit, DensityHistory
from flowvi.errors import FileFormatError
from flowvi.files import DENSITY, DTYPES, plain, read, write
from flowvi.flow_spec import FlowSpec
from flowvi.storage import check_rebuild, rebuild

__all__ = ["load_density", "save_density"]


def save_density(fit: DensityFit, path: str | Path) -> None:
    """Writes a density fit; see `DensityFit.save`.

    Args:
        fit: What to write.
        path: The file.

    Raises:
        OptionError: The flow can't be built again from its name.
    """
    check_rebuild(fit.flow)
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
    write(as_path("path", path), plain(content, otherwise=str), DENSITY)


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
    content = read(as_path("path", path), DENSITY)
    try:
        spec = FlowSpec.from_dict(content["spec"])
        history = DensityHistory(**content["history"])
        dtype, context_dim = DTYPES[content["flow_dtype"]], int(content["context_dim"])
    except Exception as error:
        raise FileFormatError(f"{path} has parts that don't fit together ({error}): save the fit anew.") from error
    return DensityFit(
        rebuild(spec, content["state"], dtype, torch.device("cpu"), context_dim),
        config=content["config"],
        timing=content["timing"],
        history=history,
        held_out=content["held_out"],
        seed=content["seed"],
    )
