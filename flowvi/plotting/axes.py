"""What several pictures need: panels, colours, and the fit behind a refined posterior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flowvi.checks import shown
from flowvi.errors import FlowVIError, OptionError
from flowvi.posterior import Posterior
from flowvi.refined import RefinedPosterior

__all__ = ["CYCLE", "MARKERS", "ORANGE", "SKY", "VERMILION", "ink", "panels", "unrefined"]

ORANGE, BLUE, GREEN, VERMILION, PURPLE, SKY = "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (ORANGE, SKY, GREEN, VERMILION, PURPLE, BLUE)
MARKERS = "osD^vP"


def panels(ax: Any, count: int, *, size: tuple[float, float], columns: int | None = None, **options: Any) -> np.ndarray:
    """The axes given, as an array; or those of a new figure, `size` inches each."""
    if not count:
        raise OptionError("there is nothing to draw: the list of what to show is empty.")
    if ax is not None:
        axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if not all(hasattr(axis, "set_xlabel") for axis in axes):
            raise OptionError(f"ax must be matplotlib axes, or an array of them, not {shown(ax)}.")
        if len(axes) < count:
            raise OptionError(f"this picture has {count} panels, but ax holds {len(axes)}: give an array of axes.")
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise FlowVIError("pictures are drawn by matplotlib, which is missing: pip install matplotlib") from e
    across = min(count, columns or count)
    down = math.ceil(count / across)
    shape = (size[0] * across, size[1] * down)
    axes = plt.subplots(down, across, figsize=shape, squeeze=False, layout="constrained", **options)[1].ravel()
    for spare in axes[count:]:
        spare.set_axis_off()
    return axes


def ink() -> str:
    """The style's colour of text: dark on light, light on dark."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def unrefined(posterior: Posterior) -> Posterior:
    """Of a refined posterior, the flow that it started from."""
    return posterior.unrefined if isinstance(posterior, RefinedPosterior) else posterior
