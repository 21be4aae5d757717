"""flowvi: variational inference with normalizing flows, on Pyro and PyTorch."""

from flowvi import transforms
from flowvi._version import __version__
from flowvi.flow import Flow, FlowSpec
from flowvi.guides import AutoFlow, AutoPlanar, AutoRadial
from flowvi.objectives import ELBO, AnnealedELBO, LinearAnneal, PathELBO

__all__ = [
    "ELBO",
    "AnnealedELBO",
    "AutoFlow",
    "AutoPlanar",
    "AutoRadial",
    "Flow",
    "FlowSpec",
    "LinearAnneal",
    "PathELBO",
    "__version__",
    "transforms",
]
