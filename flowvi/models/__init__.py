"""Models to start from, each a Pyro model with the inference network that fits it."""

from flowvi.models.dlgm import DLGM
from flowvi.models.networks import Maxout

__all__ = ["DLGM", "Maxout"]
