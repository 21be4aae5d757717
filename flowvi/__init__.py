"""flowvi: variational inference with normalizing flows, on Pyro and PyTorch."""

from flowvi import energies, errors, plotting, transforms
from flowvi._version import __version__
from flowvi.compare import compare
from flowvi.density_fit import DensityFit
from flowvi.diagnostics import Diagnostics
from flowvi.fit import fit, fit_density
from flowvi.flow import Flow, FlowSpec
from flowvi.guides import AutoFlow, AutoPlanar, AutoRadial
from flowvi.objectives import ELBO, AnnealedELBO, BalancedELBO, LinearAnneal, PathELBO
from flowvi.posterior import History, Posterior
from flowvi.storage import load, load_density
from flowvi.targets import LogDensity, as_density

__all__ = [
    "ELBO",
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
    "plotting",
    "transforms",
]
