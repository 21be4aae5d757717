"""The error against the number of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from flowvi.checks import instances, shown
from flowvi.errors import OptionError
from flowvi.plotting.axes import CYCLE, MARKERS, panels

__all__ = ["plot_error_against_k"]


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
    axes = panels(ax, len(names), size=(3.1, 2.9), columns=4, sharey=True)
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
