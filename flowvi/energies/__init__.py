"""Unnormalized targets p(z) = exp(-U(z)) / Z with everything known that a test or a figure asks for.

`U1` to `U4` are the energies of Rezende & Mohamed 2015 (arXiv:1505.05770), table 1. The others have a known
log Z in any dimension: `Funnel`, `Banana`, `RingOfGaussians`, `CorrelatedGaussian`, `StudentT`. `ENERGIES`
names all of them. In dimensions 1 and 2 an energy also compares itself with any density on a grid
(`Energy.kl_divergence`).

Values and gradients are finite at every z where U(z) itself fits z's dtype.
"""

from __future__ import annotations

from .base import Energy, Grid, GridKL
from .known import Banana, CorrelatedGaussian, Funnel, RingOfGaussians, StudentT
from .paper import U1, U2, U3, U4

__all__ = [
    "ENERGIES",
    "U1",
    "U2",
    "U3",
    "U4",
    "Banana",
    "CorrelatedGaussian",
    "Energy",
    "Funnel",
    "Grid",
    "GridKL",
    "RingOfGaussians",
    "StudentT",
]

ENERGIES: dict[str, type[Energy]] = {
    kind.__name__: kind for kind in (U1, U2, U3, U4, Funnel, Banana, RingOfGaussians, CorrelatedGaussian, StudentT)
}
"""Every energy by name; each can be made without arguments."""
