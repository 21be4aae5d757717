"""From a target to a posterior, or from data to a density (`flowvi.fit.density`): the loops, and what decides."""

from flowvi.fit.fit import fit

__all__ = ["fit"]
