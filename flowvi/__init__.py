"""flowvi: variational inference with normalizing flows, on Pyro and PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowvi import energies, errors, transforms
from flowvi._version import __version__
from flowvi.amortized import AmortizedGuide
from flowvi.compare import compare
from flowvi.diagnostics import Diagnostics
from flowvi.fit import fit
from flowvi.flow import Flow, FlowSpec
from flowvi.guides import AutoFlow, AutoPlanar, AutoRadial
from flowvi.importance import IWELBO, LogLikelihood, log_likelihood
from flowvi.objectives import ELBO, AnnealedELBO, BalancedELBO, LinearAnneal, PathELBO
from flowvi.posterior import History, Posterior
from flowvi.storage import load, load_density
from flowvi.targets import LogDensity, as_density

if TYPE_CHECKING:
    from flowvi import plotting
    from flowvi.density_fit import DensityFit
    from flowvi.fit.density import fit_density

__all__ = [
    "ELBO",
    "IWELBO",
    "AmortizedGuide",
    "AnnealedELBO",
    "AutoFlow",
    "AutoPlanar",
    "AutoRadial",
    "BalancedELBO",
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
    "plotting",
    "transforms",
]

_LATER = {
    "DensityFit": "flowvi.density_fit",
    "fit_density": "flowvi.fit.density",
    "plotting": "flowvi.plotting",
}
"""What is imported when it is first asked for: not every process plots or fits densities."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'flowvi' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    found = module if name == "plotting" else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
