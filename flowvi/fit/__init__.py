"""From a target to a posterior: whitening, the loop, and the function that decides."""

from flowvi.fit.fit import fit

__all__ = ["fit"]
