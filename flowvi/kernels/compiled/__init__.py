"""Planar and radial stacks, and what a training step does beside them, as loops that numba compiles."""
