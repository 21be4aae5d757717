"""Invertible maps of R^D, each a Pyro transform in full, and the registry that names them."""

from flowvi.transforms.affine import Affine, affine
from flowvi.transforms.base import Transform
from flowvi.transforms.planar import (
    ConditionalPlanar,
    Planar,
    PlanarStack,
    conditional_planar,
    planar,
    planar_stack,
)
from flowvi.transforms.radial import (
    ConditionalRadial,
    Radial,
    RadialStack,
    conditional_radial,
    radial,
    radial_stack,
)
from flowvi.transforms.registry import available, register

__all__ = [
    "Affine",
    "ConditionalPlanar",
    "ConditionalRadial",
    "Planar",
    "PlanarStack",
    "Radial",
    "RadialStack",
    "Transform",
    "affine",
    "available",
    "conditional_planar",
    "conditional_radial",
    "planar",
    "planar_stack",
    "radial",
    "radial_stack",
    "register",
]
