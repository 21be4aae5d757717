"""Marginal densities of a posterior's sites, beside reference draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowvi.checks import as_array, flags, instances, lists_of_names, whole_numbers
from flowvi.errors import DimensionError, OptionError
from flowvi.plotting.axes import SKY, VERMILION, ink, panels
from flowvi.posterior import Posterior
from flowvi.refined import RefinedPosterior

__all__ = ["MAX_MARGINALS", "plot_marginals"]

MAX_MARGINALS = 12


def plot_marginals(
    posterior: Posterior,
    reference: Mapping[str, Any] | Posterior | None = None,
    *,
    sites: Sequence[str] | None = None,
    corrected: bool = True,
    num_samples: int = 20_000,
    ax: Any = None,
) -> np.ndarray:
    """Marginal densities: q's draws, the draws corrected by importance resampling, and reference draws.

    Args:
        posterior: a fit.
        reference: draws to trust, site -> (n, *shape), such as ``mcmc.get_samples()``; or a posterior, such as what
            `refine()` gave.
        sites: which sites; None takes all, and of their elements the first 12.
        corrected: whether `Posterior.resample` is shown too.
        num_samples: draws of each.
        ax: as many axes as there are elements.

    Returns:
        The axes used, one for each element of each site.

    Raises:
        OptionError: an unknown site, or too few axes.
    """
    instances(Posterior, posterior=posterior)
    instances(Posterior, Mapping, type(None), reference=reference)
    flags(corrected=corrected)
    whole_numbers(1, num_samples=num_samples)
    if sites is not None:
        lists_of_names(sites=sites)
    groups: list[tuple[str, str, Mapping[str, Any]]] = []
    if isinstance(reference, Posterior):
        reference = reference.sample(num_samples, seed=0)
    groups.append(("q", SKY, posterior.sample(num_samples, seed=0)))
    if corrected and not isinstance(posterior, RefinedPosterior):
        groups.append(("q, resampled", VERMILION, posterior.resample(num_samples, seed=0)))
    draws = groups[0][2]
    unknown = [name for name in sites or () if name not in draws]
    if unknown:
        raise OptionError(f"no site is named {', '.join(unknown)}: there are {', '.join(draws)}.")
    elements = [(name, index) for name in sites or draws for index in np.ndindex(*draws[name].shape[1:])][
        : MAX_MARGINALS if sites is None else None
    ]
    axes = panels(ax, len(elements), size=(2.6, 2.1), columns=4)
    for axis, (name, index) in zip(axes, elements, strict=False):
        columns = [(label, colour, _column(values[name], index)) for label, colour, values in groups]
        known = _column(reference[name], index) if reference is not None and name in reference else None
        widest = columns[-1][2] if known is None else known
        low, high = np.quantile(widest, [0.002, 0.998])
        margin = 0.1 * (high - low)
        ends = (
            max(low - margin, min(c.min() for *_, c in columns)),
            min(high + margin, max(c.max() for *_, c in columns)),
        )
        edges = np.linspace(*ends, 45)  # no further than the draws: a support may end there
        if known is not None:
            axis.hist(known, edges, density=True, color=ink(), alpha=0.25, label="reference")
        for (label, colour, column), width in zip(columns, (2.2, 1.3), strict=False):
            heights = np.histogram(column, edges)[0] / (len(column) * np.diff(edges))  # what lies outside counts too
            axis.plot((edges[1:] + edges[:-1]) / 2, heights, lw=width, color=colour, label=label)
        axis.set(xlabel=name + (f"[{','.join(map(str, index))}]" if index else ""), yticks=[])
        axis.set_ylim(0, axis.get_ylim()[1] * (1.6 if axis is axes[0] else 1))  # the first holds the legend
    axes[0].set_ylabel("density")
    axes[0].legend(frameon=False, fontsize="small", loc="upper right", handlelength=1.2)
    return axes[: len(elements)]


def _column(values: Any, index: tuple[int, ...]) -> np.ndarray:
    """One element of a site's draws (n, *shape), finite ones only."""
    array: Any = as_array("draws of a site", values)
    if (
        array.ndim != 1 + len(index)
        or not array.size
        or any(i >= n for i, n in zip(index, array.shape[1:], strict=True))
    ):
        raise DimensionError(f"draws of a site must have its shape, (n, *shape), not {tuple(array.shape)}.")
    column = array[(slice(None), *index)]
    return column[np.isfinite(column)]
