"""Pictures of flows and fits: densities, layers, traces, weights, marginals, and error against the number of layers.

Every function takes `ax` (matplotlib axes, or an array of them where a picture has several panels) and returns what it
drew on; with `ax=None` it makes a figure. Text, lines and backgrounds follow matplotlib's current style, light or dark;
the colours are Okabe and Ito's, which colour-blind readers can tell apart. Matplotlib is imported on the first call.

Source of the colours: Okabe & Ito (2008), "Color universal design".
"""

from __future__ import annotations

from flowvi.plotting.densities import plot_density, plot_layers
from flowvi.plotting.fits import plot_elbo, plot_khat
from flowvi.plotting.lengths import plot_error_against_k
from flowvi.plotting.marginals import plot_marginals

__all__ = [
    "plot_density",
    "plot_elbo",
    "plot_error_against_k",
    "plot_khat",
    "plot_layers",
    "plot_marginals",
]
