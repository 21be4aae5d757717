"""The recurrences behind planar and radial flows, and layers with networks in them, compiled where they can be.

`planar_stack` and the like are operators with gradients; `planar_step`, `radial_step`, `coupling_step` and
`autoregressive_step` are work bound to memory, for a training loop; `use` chooses what does it. The reference of all is
plain torch: `planar`, `radial`, `root`, and for layers with networks their transforms.
"""

from flowvi.kernels.autoregressive import autoregressive_step
from flowvi.kernels.coupling import coupling_step
from flowvi.kernels.dispatch import in_use, use
from flowvi.kernels.functions import (
    planar_root,
    planar_stack,
    planar_stack_inverse,
    planar_stack_score,
    radial_stack,
    radial_stack_inverse,
    radial_stack_score,
)
from flowvi.kernels.step import PlanarStep, RadialStep, planar_step, radial_step

__all__ = [
    "PlanarStep",
    "RadialStep",
    "autoregressive_step",
    "coupling_step",
    "in_use",
    "planar_root",
    "planar_stack",
    "planar_stack_inverse",
    "planar_stack_score",
    "planar_step",
    "radial_stack",
    "radial_stack_inverse",
    "radial_stack_score",
    "radial_step",
    "use",
]
