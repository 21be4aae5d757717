"""A model's density as a program of one machine that numba compiles once: no compiler is needed for a model."""
