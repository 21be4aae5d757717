"""From a target to a posterior, or from data to a density: the loops, and the functions that decide."""

from flowvi.fit.density import fit_density
from flowvi.fit.fit import fit

__all__ = ["fit", "fit_density"]
