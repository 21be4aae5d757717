"""The recurrences behind planar and radial flows, and the operators made of them."""

from flowvi.kernels.operators import planar_root, planar_stack, radial_stack

__all__ = ["planar_root", "planar_stack", "radial_stack"]
