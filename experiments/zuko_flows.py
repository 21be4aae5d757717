"""zuko's flows of the families that flowvi has too, of a given length and width: what its own are compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

__all__ = ["FAMILIES", "has_zuko", "zuko_flow", "zuko_version"]

FAMILIES = ("maf", "neural_spline", "nice", "real_nvp")
"""flowvi's names of them."""


def has_zuko() -> bool:
    """Whether zuko can be imported (extra `zuko`)."""
    return importlib.util.find_spec("zuko") is not None


def zuko_version() -> str:
    """Its name and version."""
    return f"zuko {version('zuko')}"


def zuko_flow(name: str, dim: int, num_flows: int, *, hidden_dims: Sequence[int], num_bins: int) -> Any:
    """A ``zuko.flows.Flow`` over R^D, its orderings and masks alternating as ours do.

    Args:
        name: one of `FAMILIES`; "neural_spline" is the coupling.
        dim: D.
        num_flows: K.
        hidden_dims: sizes of each network's hidden layers.
        num_bins: bins of each spline.

    Raises:
        ImportError: zuko is not installed.
        KeyError: zuko has no such family.
    """
    import zuko

    additive, spline = zuko.transforms.AdditiveTransform, zuko.transforms.MonotonicRQSTransform
    make, options = {
        "maf": (zuko.flows.MAF, {}),
        "nice": (zuko.flows.NICE, {"univariate": additive, "shapes": [()]}),  # affine, as in RealNVP, unless told
        "real_nvp": (zuko.flows.RealNVP, {}),
        "neural_spline": (
            zuko.flows.RealNVP,
            {"univariate": spline, "shapes": [(num_bins,), (num_bins,), (num_bins - 1,)]},
        ),
    }[name]
    return make(dim, transforms=num_flows, hidden_features=tuple(hidden_dims), **options)
