"""flowvi: variational inference with normalizing flows, on Pyro and PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowvi import errors, transforms
from flowvi._version import __version__
from flowvi.compare import compare
from flowvi.diagnostics import Diagnostics
from flowvi.fit import fit
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.guides import AutoFlow, AutoPlanar, AutoRadial
from flowvi.history import History
from flowvi.objectives import ELBO, AnnealedELBO, BalancedELBO, CoveringELBO, LinearAnneal, PathELBO
from flowvi.posterior import Posterior
from flowvi.storage import load
from flowvi.targets import LogDensity, as_density

if TYPE_CHECKING:
    from flowvi import energies, models, plotting
    from flowvi.amortized import AmortizedGuide
    from flowvi.amortized_fit import AmortizedFit
    from flowvi.calibrate import sbc
    from flowvi.calibration import Calibration
    from flowvi.density_fit import DensityFit
    from flowvi.density_storage import load_density
    from flowvi.fit.density import fit_density
    from flowvi.importance import IWELBO
    from flowvi.likelihood import LogLikelihood, log_likelihood

__all__ = [
    "ELBO",
    "IWELBO",
    "AmortizedFit",
    "AmortizedGuide",
    "AnnealedELBO",
    "AutoFlow",
    "AutoPlanar",
    "AutoRadial",
    "BalancedELBO",
    "Calibration",
    "CoveringELBO",
    "DensityFit",
    "Diagnostics",
    "Flow",
    "FlowSpec",
    "History",
    "LinearAnneal",
    "LogDensity",
    "LogLikelihood",
    "PathELBO",
    "Posterior",
    "__version__",
    "as_density",
    "compare",
    "energies",
    "errors",
    "fit",
    "fit_density",
    "load",
    "load_density",
    "log_likelihood",
    "models",
    "plotting",
    "sbc",
    "transforms",
]

_LATER = {
    "AmortizedFit": "flowvi.amortized_fit",
    "AmortizedGuide": "flowvi.amortized",
    "Calibration": "flowvi.calibration",
    "DensityFit": "flowvi.density_fit",
    "energies": "flowvi.energies",
    "IWELBO": "flowvi.importance",
    "LogLikelihood": "flowvi.likelihood",
    "fit_density": "flowvi.fit.density",
    "load_density": "flowvi.density_storage",
    "log_likelihood": "flowvi.likelihood",
    "models": "flowvi.models",
    "plotting": "flowvi.plotting",
    "sbc": "flowvi.calibrate",
}
"""What is imported when it is first asked for: not every process has need of it."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'flowvi' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    found = module if name in ("energies", "models", "plotting") else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
