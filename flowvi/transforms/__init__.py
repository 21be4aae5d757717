"""Invertible maps of R^D, each a Pyro transform in full, and the registry that names them."""

from flowvi.transforms.affine import Affine, affine
from flowvi.transforms.autoregressive import IAF, MAF, conditional_iaf, conditional_maf, iaf, maf
from flowvi.transforms.base import Transform
from flowvi.transforms.conditional_affine import ConditionalAffine, conditional_affine
from flowvi.transforms.coupling import (
    NICE,
    Coupling,
    RealNVP,
    conditional_nice,
    conditional_real_nvp,
    nice,
    real_nvp,
)
from flowvi.transforms.funnel import ConditionalFunnel, Funnel, conditional_funnel, funnel
from flowvi.transforms.guests import from_pyro, from_zuko
from flowvi.transforms.mixing import Householder, conditional_householder, householder
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
from flowvi.transforms.spline import (
    AutoregressiveSpline,
    NeuralSpline,
    RationalQuadratic,
    conditional_neural_spline,
    neural_spline,
)
from flowvi.transforms.stack_conditional import (
    ConditionalStack,
    conditional_planar_stack,
    conditional_radial_stack,
)
from flowvi.transforms.sylvester import (
    ConditionalSylvester,
    Sylvester,
    SylvesterStack,
    conditional_sylvester,
    sylvester,
)
from flowvi.transforms.tails import ConditionalTails, Tails, conditional_tails, tails

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "Affine",
    "AutoregressiveSpline",
    "ConditionalAffine",
    "ConditionalFunnel",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalStack",
    "ConditionalSylvester",
    "ConditionalTails",
    "Coupling",
    "Funnel",
    "Householder",
    "NeuralSpline",
    "Planar",
    "PlanarStack",
    "Radial",
    "RadialStack",
    "RationalQuadratic",
    "RealNVP",
    "Sylvester",
    "SylvesterStack",
    "Tails",
    "Transform",
    "affine",
    "available",
    "conditional_affine",
    "conditional_funnel",
    "conditional_householder",
    "conditional_iaf",
    "conditional_maf",
    "conditional_neural_spline",
    "conditional_nice",
    "conditional_planar",
    "conditional_planar_stack",
    "conditional_radial",
    "conditional_radial_stack",
    "conditional_real_nvp",
    "conditional_sylvester",
    "conditional_tails",
    "from_pyro",
    "from_zuko",
    "funnel",
    "householder",
    "iaf",
    "maf",
    "neural_spline",
    "nice",
    "planar",
    "planar_stack",
    "radial",
    "radial_stack",
    "real_nvp",
    "register",
    "sylvester",
    "tails",
]
