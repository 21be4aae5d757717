"""What a fit did: the ELBO of its steps, and the weights of its draws."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.checks import instances
from flowvi.plotting.axes import ORANGE, SKY, VERMILION, ink, panels, unrefined
from flowvi.posterior import Posterior
from flowvi.psis import khat_limit, psis
from flowvi.random_state import own_generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_elbo", "plot_khat"]


def plot_elbo(posterior: Posterior, *, ax: Any = None) -> Axes:
    """The ELBO of every step, smoothed, with the phases of the fit and the log evidence that it can reach.

    Thin: the estimate from each step's particles; thick: its running median. Shaded: the annealed steps (beta < 1).
    Dotted lines: where a round began, with its number of layers. Dots: the ELBO of fresh draws after each round (at
    step 0: of the Gaussian, by whitening). Dashed: the log evidence, above which no ELBO can lie.

    Args:
        posterior: a fit.
        ax: the axes.

    Returns:
        The axes.
    """
    instances(Posterior, posterior=posterior)
    axis = panels(ax, 1, size=(6.4, 3.6))[0]
    step, elbo = posterior.history.step.numpy(), posterior.history.elbo.numpy()
    rounds = posterior.config.get("rounds") or []
    diagnosis = unrefined(posterior).diagnose()
    ends = np.cumsum([r["num_steps"] for r in rounds])
    heights = [float(r["elbo"]) for r in rounds]
    if len(step):
        smooth = _running_median(elbo, max(5, len(elbo) // 100))
        axis.plot(step, elbo, lw=0.6, alpha=0.45, color=SKY)
        axis.plot(step, smooth, lw=1.8, color=SKY, label="ELBO")
        heights += list(smooth[len(smooth) // 20 :])
        annealed = np.flatnonzero(posterior.history.beta.numpy() < 1)
        if len(annealed):
            axis.axvspan(0, annealed[-1] + 1, color=ORANGE, alpha=0.25, lw=0, label=r"annealed ($\beta$ < 1)")
    if rounds:
        axis.plot(ends, [r["elbo"] for r in rounds], "o", color=VERMILION, ms=5, zorder=4, label="fresh draws")
    axis.axhline(diagnosis.log_evidence, ls="--", lw=1.2, color=ink(), label="log evidence")
    # The first steps may be thousands of nats below: the window is that of most of the trace.
    finite = np.array([h for h in (*heights, diagnosis.elbo) if math.isfinite(h)])
    low = min([np.quantile(finite, 0.02), *(r["elbo"] for r in rounds if math.isfinite(r["elbo"]))])
    high = max(diagnosis.log_evidence, finite.max())
    axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.18 * (high - low) + 1e-3)
    for r, start in zip(rounds, [0, *ends], strict=False):
        if r["num_steps"]:
            axis.axvline(start, ls=":", lw=1, color=ink(), alpha=0.6)
            words = f" K = {r['num_flows']}"
            axis.text(start, 0.98, words, transform=axis.get_xaxis_transform(), va="top", fontsize="small")
    whitened = ", after whitening" if posterior.config.get("whiten") else ""
    axis.set(xlabel=f"step of Adam{whitened}", ylabel="ELBO (nats)")
    axis.margins(x=0.01)
    axis.legend(loc="lower right", frameon=False)
    return axis


def plot_khat(posterior: Posterior, *, num_samples: int = 10_000, ax: Any = None) -> Axes:
    """The importance weights p / q of draws of q, largest first, and k-hat, the slope of their tail.

    On these axes a generalized Pareto tail of shape k is a line that falls with slope -k; it is flat where q is p.

    Args:
        posterior: a fit; of a refined one, the flow that it started from.
        num_samples: S, the draws; they are those of `diagnose`.
        ax: the axes.

    Returns:
        The axes.
    """
    instances(Posterior, posterior=posterior)
    fit = unrefined(posterior)
    diagnosis = fit.diagnose(num_samples)
    _, log_p, log_q = fit._weigh(num_samples, own_generator(fit.seed or 0, "diagnose", fit.density.device))
    log_w = (log_p - log_q).cpu().numpy()
    log_w[~np.isfinite(log_w)] = -np.inf
    order = np.argsort(-log_w)
    top = log_w.max()
    raw = np.exp(log_w - top)
    smoothed = np.exp(psis(log_w)[0])
    rank = 1 + np.arange(num_samples)
    tail = rank <= min(0.2 * num_samples, 3 * math.sqrt(num_samples))

    axis = panels(ax, 1, size=(5.2, 3.6))[0]
    axis.axhline(1, lw=1, ls="--", color=ink(), alpha=0.7, label="q = p")
    axis.plot(rank, raw[order] / raw.mean(), ".", ms=4, color=SKY, label="weights", rasterized=True)
    axis.plot(rank[tail], (smoothed / smoothed.mean())[order][tail], lw=2, color=VERMILION, label="Pareto tail")
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 1e-3), max(high, 3))
    limit = khat_limit(num_samples)
    word = "below" if diagnosis.khat < limit else "above"
    axis.set_title(f"k-hat {diagnosis.khat:.2f}, {word} the limit {limit:.2f}")
    axis.set(xlabel=f"rank of the draw (of {num_samples:,})", ylabel="weight / mean weight")
    axis.legend(loc="lower left", frameon=False)
    return axis


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the last `width` values, NaN left out; fewer at the start."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    views = np.lib.stride_tricks.sliding_window_view(padded, width)
    out = np.full(len(values), np.nan)
    some = np.isfinite(views).any(1)
    out[some] = np.nanmedian(views[some], 1)
    return out
