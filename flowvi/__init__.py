"""flowvi: variational inference with normalizing flows, on Pyro and PyTorch."""

from flowvi import energies, errors, transforms
from flowvi._version import __version__
from flowvi.diagnostics import Diagnostics
from flowvi.fit import fit
from flowvi.flow import Flow, FlowSpec
from flowvi.guides import AutoFlow, AutoPlanar, AutoRadial
from flowvi.objectives import ELBO, AnnealedELBO, LinearAnneal, PathELBO
from flowvi.posterior import History, Posterior
from flowvi.storage import load
from flowvi.targets import LogDensity, as_density

__all__ = [
    "ELBO",
    "AnnealedELBO",
    "AutoFlow",
    "AutoPlanar",
    "AutoRadial",
    "Diagnostics",
    "Flow",
    "FlowSpec",
    "History",
    "LinearAnneal",
    "LogDensity",
    "PathELBO",
    "Posterior",
    "__version__",
    "as_density",
    "energies",
    "errors",
    "fit",
    "load",
    "transforms",
]
