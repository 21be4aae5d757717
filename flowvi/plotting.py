"""Pictures of flows and fits: densities, layers, traces, weights, marginals, and error against the number of layers.

Every function takes `ax` (matplotlib axes, or an array of them where a picture has several panels) and returns what it
drew on; with `ax=None` it makes a figure. Text, lines and backgrounds follow matplotlib's current style, light or dark;
the colours are Okabe and Ito's, which colour-blind readers can tell apart. Matplotlib is imported on the first call.

Source of the colours: Okabe & Ito (2008), "Color universal design".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.distributions import constraints

from flowvi import plane
from flowvi.checks import as_array, flags, instances, lists_of_names, positive_integers, shown, whole_numbers
from flowvi.errors import DimensionError, FlowVIError, OptionError
from flowvi.flow import Flow
from flowvi.posterior import Posterior
from flowvi.psis import khat_limit, psis
from flowvi.random_state import own_generator
from flowvi.refined import RefinedPosterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_density",
    "plot_elbo",
    "plot_error_against_k",
    "plot_khat",
    "plot_layers",
    "plot_marginals",
]

ORANGE, BLUE, GREEN, VERMILION, PURPLE, SKY = "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (ORANGE, SKY, GREEN, VERMILION, PURPLE, BLUE)
MARKERS = "osD^vP"
DENSITY_COLOURS = "viridis"
MAX_MARGINALS = 12


# Densities in two dimensions


def plot_density(
    q: Flow | Posterior, target: Any = None, *, box: plane.Box | None = None, num: int = 250, ax: Any = None
) -> np.ndarray:
    """The density of a 2-D flow, q(z), beside its target's, p(z) / Z, on one scale of colours.

    Both are exact, evaluated on a grid in float64. Where a target's Z is not known, the grid's own integral is taken.
    Of a model's posterior the unconstrained coordinates are shown.

    Args:
        q: a flow with D = 2, or a posterior.
        target: an energy, or a callable z (S, 2) -> log p (S,), normalized or not. None: a posterior's own target; no
            second panel beside a flow.
        box: the window, ((low, high), (low, high)); None finds where there is something to see.
        num: cells along each side.
        ax: two axes, or one where there is no target.

    Returns:
        The axes used, (2,) or (1,): the flow's, then the target's.

    Raises:
        DimensionError: D is not 2.
        OptionError: too few axes.
    """
    flow, posterior = _flow_of(q)
    positive_integers(num=num)
    box = None if box is None else _window(box)
    if target is None and posterior is not None:
        target = posterior.density
    titles, functions = [_flow_title(flow, posterior)], [plane.exact(flow)]
    wide = plane.wide_box(flow, target) if box is None else box
    if target is not None:
        titles.append(f"target: {getattr(target, 'name', None) or type(target).__name__}")
        functions.append(plane.target_function(target, wide))
    box = plane.window(functions, wide) if box is None else box
    axes = _panels(ax, len(functions), size=(3.4, 3.2))[: len(functions)]
    images = [plane.on_grid(function, box, num) for function in functions]
    top = float(np.quantile(images[-1], 0.9999))
    for axis, title, image in zip(axes, titles, images, strict=True):
        shown = _draw_density(axis, image, box, top, posterior)
        axis.set_title(title, fontsize="medium")
    _name_coordinates(axes, posterior)
    axes[0].figure.colorbar(shown, ax=list(axes), label="density", extend="max", shrink=0.85)
    return axes


def plot_layers(
    q: Flow | Posterior,
    ks: Sequence[int] | None = None,
    *,
    box: plane.Box | None = None,
    num: int = 200,
    ax: Any = None,
) -> np.ndarray:
    """How z_0 becomes z_K: the exact density of the flow cut after its first k layers, for several k.

    The affine layer at a flow's end is kept in every panel, so that all are in the target's coordinates.

    Args:
        q: a flow with D = 2, or a posterior.
        ks: the numbers of layers, from 0 to K; None takes six of them in even steps.
        box: the window, as for `plot_density`.
        num: cells along each side.
        ax: as many axes as ks.

    Returns:
        The axes used, (len(ks),).

    Raises:
        DimensionError: D is not 2.
        OptionError: a k is not in [0, K], or too few axes.
    """
    flow, posterior = _flow_of(q)
    positive_integers(num=num)
    box = None if box is None else _window(box)
    total = plane.num_layers(flow)
    if ks is not None and (not isinstance(ks, Sequence | np.ndarray) or isinstance(ks, str | bytes) or not len(ks)):
        raise OptionError(f"ks must be numbers of layers from 0 to {total}, not {shown(ks)}.")
    ks = sorted({round(total * i / 5) for i in range(6)}) if ks is None else list(ks)
    functions = [plane.exact(plane.first_layers(flow, k)) for k in ks]
    box = plane.window(functions, plane.wide_box(flow)) if box is None else box
    height = 2.0
    if not _has_sites(posterior):
        height *= min(2.0, max(0.4, (box[1][1] - box[1][0]) / (box[0][1] - box[0][0])))
    axes = _panels(ax, len(ks), size=(2.3, height + 1.0))[: len(ks)]
    for axis, k, function in zip(axes, ks, functions, strict=True):
        image = plane.on_grid(function, box, num)
        # The shape is the message: each panel has its own scale of colours.
        _draw_density(axis, image, box, float(np.quantile(image, 0.9999)), posterior)
        axis.set_title(
            f"all {k} layers" if k == total else "no layer" if k == 0 else f"{k} layer{'s' * (k > 1)}",
            fontsize="medium",
        )
    _name_coordinates(axes, posterior)
    return axes


# What a fit did


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
    axis = _panels(ax, 1, size=(6.4, 3.6))[0]
    step, elbo = posterior.history.step.numpy(), posterior.history.elbo.numpy()
    rounds = posterior.config.get("rounds") or []
    diagnosis = _unrefined(posterior).diagnose()
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
    axis.axhline(diagnosis.log_evidence, ls="--", lw=1.2, color=_ink(), label="log evidence")
    # The first steps may be thousands of nats below: the window is that of most of the trace.
    finite = np.array([h for h in (*heights, diagnosis.elbo) if math.isfinite(h)])
    low = min([np.quantile(finite, 0.02), *(r["elbo"] for r in rounds if math.isfinite(r["elbo"]))])
    high = max(diagnosis.log_evidence, finite.max())
    axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.18 * (high - low) + 1e-3)
    for r, start in zip(rounds, [0, *ends], strict=False):
        if r["num_steps"]:
            axis.axvline(start, ls=":", lw=1, color=_ink(), alpha=0.6)
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
    fit = _unrefined(posterior)
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

    axis = _panels(ax, 1, size=(5.2, 3.6))[0]
    axis.axhline(1, lw=1, ls="--", color=_ink(), alpha=0.7, label="q = p")
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
    axes = _panels(ax, len(elements), size=(2.6, 2.1), columns=4)
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
            axis.hist(known, edges, density=True, color=_ink(), alpha=0.25, label="reference")
        for (label, colour, column), width in zip(columns, (2.2, 1.3), strict=False):
            heights = np.histogram(column, edges)[0] / (len(column) * np.diff(edges))  # what lies outside counts too
            axis.plot((edges[1:] + edges[:-1]) / 2, heights, lw=width, color=colour, label=label)
        axis.set(xlabel=name + (f"[{','.join(map(str, index))}]" if index else ""), yticks=[])
        axis.set_ylim(0, axis.get_ylim()[1] * (1.6 if axis is axes[0] else 1))  # the first holds the legend
    axes[0].set_ylabel("density")
    axes[0].legend(frameon=False, fontsize="small", loc="upper right", handlelength=1.2)
    return axes[: len(elements)]


def plot_error_against_k(
    rows: Sequence[Mapping[str, Any]], *, error: str | None = None, target: str | None = None, ax: Any = None
) -> np.ndarray:
    """The error against the number of layers K, one panel for each target and one line for each flow.

    Lines join medians over seeds, bars reach from the best to the worst seed. Both axes are logarithmic, so estimates
    that noise made zero or negative are left out.

    Args:
        rows: mappings with `flow`, `K`, an error in nats, and perhaps `energy` or `target`: the rows of an experiment's
            results.json.
        error: the error's key; None takes the first there is of `kl`, `gap` and `elbo_gap`.
        target: the key that names the panel; None takes `target` or `energy`, if there.
        ax: as many axes as targets.

    Returns:
        The axes used, one for each target.

    Raises:
        OptionError: no rows, a missing key, or too few axes.
    """
    if isinstance(rows, list | tuple) and not rows:
        raise OptionError("rows is empty: give the rows of an experiment's results.json.")
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise OptionError(f"rows must be those of an experiment's results.json, a list of dicts, not {shown(rows)}.")
    instances(str, type(None), error=error, target=target)
    error = error or next((key for key in ("kl", "gap", "elbo_gap") if key in rows[0]), "kl")
    target = target or next((key for key in ("target", "energy") if key in rows[0]), None)
    missing = [key for key in ("flow", "K", error, *([target] if target else [])) if key not in rows[0]]
    if missing:
        raise OptionError(f"the rows lack {', '.join(missing)}; they have {', '.join(rows[0])}.")
    names = list(dict.fromkeys(row[target] for row in rows)) if target else [None]
    flows = list(dict.fromkeys(row["flow"] for row in rows))
    axes = _panels(ax, len(names), size=(3.1, 2.9), columns=4, sharey=True)
    for axis, name in zip(axes, names, strict=False):
        for i, flow in enumerate(flows):
            found: dict[int, list[float]] = {}
            for row in rows:
                if row["flow"] == flow and (target is None or row[target] == name) and (row[error] or 0) > 0:
                    found.setdefault(row["K"], []).append(row[error])
            ks = sorted(found)
            middle = [median(found[k]) for k in ks]
            spread = [
                [m - min(found[k]) for k, m in zip(ks, middle, strict=True)],
                [max(found[k]) - m for k, m in zip(ks, middle, strict=True)],
            ]
            # few seeds: from the best to the worst, not a standard error
            style = {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)]}
            # each is thinner than those before it, so that of two at one place both are seen
            size = {"ms": max(3.5, 8.0 - i), "lw": max(0.8, 2.8 - 0.4 * i)}
            axis.errorbar(ks, middle, spread, capsize=2, elinewidth=1, label=flow, **style, **size)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xticks=(ticks := sorted({row["K"] for row in rows})), xticklabels=[str(k) for k in ticks])
        axis.minorticks_off()
        axis.set_xlabel("layers K")
        axis.set_title("" if name is None else str(name))
        axis.grid(alpha=0.25, lw=0.6)
    axes[0].set_ylabel("KL(q || p) (nats)" if error == "kl" else f"{error} (nats)")
    axes[0].legend(frameon=False, fontsize="small")
    return axes[: len(names)]


# Small things


def _panels(
    ax: Any, count: int, *, size: tuple[float, float], columns: int | None = None, **options: Any
) -> np.ndarray:
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


def _ink() -> str:
    """The style's colour of text: dark on light, light on dark."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def _flow_of(q: Any) -> tuple[Flow, Posterior | None]:
    """The flow, and the posterior where it is one."""
    instances(Flow, Posterior, q=q)
    return (q.flow, q) if isinstance(q, Posterior) else (q, None)


def _window(box: Any) -> plane.Box:
    """A box in two dimensions, checked."""
    pairs = as_array("box", box)
    if pairs.shape != (2, 2) or not np.isfinite(pairs).all() or not (pairs[:, 0] < pairs[:, 1]).all():
        raise OptionError(f"box must be ((low, high), (low, high)), finite with low < high, not {shown(box)}.")
    return tuple((float(low), float(high)) for low, high in pairs)


def _unrefined(posterior: Posterior) -> Posterior:
    return posterior.unrefined if isinstance(posterior, RefinedPosterior) else posterior


def _flow_title(flow: Flow, posterior: Posterior | None) -> str:
    """The flow's name, K, whether it has a funnel, and KL where it is known."""
    name = "flow"
    if flow.spec is not None:
        name = f"{flow.spec.name}, K = {flow.spec.num_flows}"
        name += ", funnel" if flow.spec.num_flows and flow.spec.funnels else ""
    kl = None if posterior is None else _unrefined(posterior).diagnose().kl
    return name if kl is None else f"{name} (KL {kl:.2g} nats)"


def _has_sites(posterior: Posterior | None) -> bool:
    """Whether the coordinates are a model's sites, each with units of its own."""
    return posterior is not None and posterior.density.model is not None


def _draw_density(axis: Any, density: np.ndarray, box: plane.Box, top: float, posterior: Posterior | None) -> Any:
    """An image of a density (n, n) whose axis 0 is z_1."""
    extent = (*box[0], *box[1])
    colours = {"cmap": DENSITY_COLOURS, "vmin": 0, "vmax": top}
    ratio = (box[0][1] - box[0][0]) / (box[1][1] - box[1][0])
    aspect = "equal" if 1 / 3 < ratio < 3 and not _has_sites(posterior) else "auto"
    return axis.imshow(density.T, origin="lower", extent=extent, interpolation="bilinear", aspect=aspect, **colours)


def _name_coordinates(axes: np.ndarray, posterior: Posterior | None) -> None:
    """Axis labels: z_1 and z_2, or a model's sites; the vertical one on the first panel only."""
    names = ["$z_1$", "$z_2$"]
    if posterior is not None and _has_sites(posterior):
        names = []
        for site in posterior.density.sites:
            support = site.support
            while hasattr(support, "base_constraint"):
                support = support.base_constraint
            words = "" if isinstance(support, type(constraints.real)) else " (unconstrained)"
            size = site.unconstrained_shape.numel()
            names += [posterior.density.coordinate_name(len(names) + i) + words for i in range(size)]
    for axis in axes:
        axis.grid(False)
        axis.set_xlabel(names[0])
    axes[0].set_ylabel(names[1])
    for axis in axes[1:]:
        axis.set_yticklabels([])


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the last `width` values, NaN left out; fewer at the start."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    views = np.lib.stride_tricks.sliding_window_view(padded, width)
    out = np.full(len(values), np.nan)
    some = np.isfinite(views).any(1)
    out[some] = np.nanmedian(views[some], 1)
    return out


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
