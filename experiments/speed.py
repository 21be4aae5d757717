"""Speed: flowvi against Pyro, normflows, zuko, flowjax and numpyro, and how the cost grows with K, D and S.

Everything that is compared runs interleaved in one process; each choice of threads has a process of its own. The
cases are in `experiments.speed_cases`, the others' steps in `experiments.speed_peers`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments import speed_peers
from experiments.report import Report, require_matplotlib
from experiments.speed_cases import Config, Row, measure, pin, starts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TITLE", "Config", "run"]

TITLE = "Speed: flowvi's step against others', and its cost in K, D and S"

STEEPEST = 1.05
"""The aim for the slopes of the cost."""

COLOURS = {"flowvi": "#d62728", "pyro": "#7f7f7f", "normflows": "#1f77b4", "flowjax": "#2ca02c"}
AXES = {"K": "K layers (D 2, S 256)", "D": "D dimensions (S 256, K 32)", "S": "S particles (D 2, K 32)"}


def run(config: Config, progress: bool = True, isolate: bool = True) -> Report:
    """Measure everything.

    Args:
        config: what to measure.
        progress: whether bars are shown.
        isolate: whether each choice of threads has a process of its own; only so does "one" bind all libraries.
    """
    require_matplotlib()
    start = time.perf_counter()
    rows: list[Row] = []
    for threads in config.threads:
        if not isolate:
            rows += measure(config, threads, progress)
            continue
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=pin, initargs=(threads,)) as pool:
            rows += pool.submit(measure, config, threads, progress).result()
    rows += [slope for threads in config.threads for slope in slopes(rows, threads)]
    rows += starts(config, progress)
    return Report(
        "speed", TITLE, config, rows, _table(rows), _notes(config), draw(config, rows), time.perf_counter() - start
    )


def slopes(rows: Sequence[Row], threads: str) -> list[Row]:
    """The slope of log cost over the log of K, D or S, by least squares over the larger half of the sizes."""
    out = []
    for axis in AXES:
        line = [row for row in _sweep(rows, threads, axis) if row["who"] == "flowvi"]
        line = line[len(line) // 2 :]
        if len(line) < 2:
            continue
        x, y = np.log([[row[axis], row["seconds"]] for row in line]).T
        slope = float(np.polyfit(x, y, 1)[0])
        empty = dict.fromkeys(line[0])
        what = {"group": "slope", "case": axis, "threads": threads, "who": "flowvi"}
        out.append(empty | what | {"slope": slope, "aim": STEEPEST, "met": slope <= STEEPEST})
    return out


def _sweep(rows: Sequence[Row], threads: str, axis: str) -> list[Row]:
    found = [row for row in rows if (row["group"], row["case"], row["threads"]) == ("sweep", axis, threads)]
    return sorted(found, key=lambda row: row[axis])


GROUPS = {
    "stack": "stack: forward, score, backward",
    "step": "whole step",
    "model": "whole step",
    "start": "start of a process",
}


def _table(rows: Sequence[Row]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        if row["group"] == "sweep" or (row["who"] == "flowvi" and row["case"] not in ("first step", *AXES)):
            continue
        same = ("group", "case", "threads", "D", "S", "K")
        own = next(r for r in rows if r["who"] == "flowvi" and all(r[key] == row[key] for key in same))
        sizes = [f"{key} {row[key]}" for key in ("D", "S", "K") if row[key] is not None]
        line = {"what": GROUPS.get(row["group"], "cost"), "case": ", ".join([row["case"], *sizes])}
        if row["group"] == "slope":
            line["case"] = f"slope in {row['case']}"
        line |= {"threads": row["threads"], "flowvi, ms": _milliseconds(own)}
        other = row["who"] != "flowvi"
        line |= {"against": row["who"] if other else "-", "its time, ms": _milliseconds(row) if other else "-"}
        if other:
            found, aim = f"{row['ratio']:.3g}x ({row['ratio_q1']:.3g} to {row['ratio_q3']:.3g})", "at least {:.3g}x"
        elif row["group"] == "slope":
            found, aim = f"slope {row['slope']:.2f}", "at most {:.3g}"
        else:
            found, aim = f"{row['seconds']:.2f} s", "at most {:.3g} s"
        line |= {"found": found, "aim": "-" if row["aim"] is None else aim.format(row["aim"])}
        table.append(line | {"met": {None: "-", True: "yes", False: "no"}[row["met"]]})
    return table


def _milliseconds(row: Row) -> str:
    if row["seconds"] is None:
        return "-"
    middle, low, high = (1e3 * row[f"seconds{end}"] for end in ("", "_q1", "_q3"))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _notes(config: Config) -> list[str]:
    here = [peer for peer in config.peers if speed_peers.installed(peer)]
    absent = [peer for peer in config.peers if peer not in here]
    first = config.rounds, config.sweep_rounds
    notes = [
        f"Medians over {first[0]} rounds ({first[1]} in the sweeps of the picture), quartiles in brackets. All that "
        "is compared takes turns in one process, and a ratio, the other's time by flowvi's, is the median of the "
        "rounds' own ratios. float32.",
        f"Made on {_machine()}. Threads: one is one core for the whole process, all is every core (flowvi's fit "
        "keeps to one thread where more don't repay).",
        *(["The clock is the process's CPU time, not the wall's."] if config.cpu_time else []),
        f"Against {', '.join(speed_peers.version(peer) for peer in here) or 'nobody'}.",
        "stack: for flowvi with the path score, which the loop of Pyro's layers doesn't compute.",
        "whole step: draws, flow, energy, gradient, Adam. U2 in two dimensions, Neal's funnel above. flowvi's has "
        "the path score, the log-variance gradient and an affine layer (full at D 2, else diagonal), which the "
        "others' have not. flowjax's is one jitted function whose result is waited for once a round. Pyro's is "
        "SVI.step with AutoNormalizingFlow and vectorized particles. Couplings and "
        "autoregressive layers have the same number of layers, units and bins everywhere; normflows' spline networks "
        "are residual.",
        "eight schools: flowvi's is fit's step on the model's program; Pyro's is SVI.step on the same "
        "model, which broadcasts over particles.",
        "slope: least squares through the larger half of a sweep's sizes, in logarithms.",
        "start: a new process for each number; the first step is a fit of one step, after the import, with compiled "
        "kernels in the disk cache, and byte code written, as it is where pip installed.",
        "amortized: the paper's model of images (784 pixels, 40 latents, 400 maxout units of 4), the parameters of a "
        "datum's K layers from 64 hidden units; beside it the same step with K = 0. The diagonal Gaussian is that with "
        "K = 0; numpyro's is its SVI.update, jitted, on the same model and networks.",
    ]
    if absent:
        notes.insert(-1, f"Not installed, so left out: {', '.join(absent)} (pip install 'flowvi[peers]').")
    if config.rounds < 10:
        notes.insert(0, "Few rounds: these are not the figures to quote.")
    return notes


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, no GPU used"


def draw(config: Config, rows: Sequence[Row]) -> Figure:
    """Rows: one thread and all. Columns: cost against K, D and S, both axes logarithmic."""
    from matplotlib.figure import Figure

    size = (11, 0.8 + 3.1 * len(config.threads))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(config.threads), len(AXES), squeeze=False, sharey=True)
    fitted = {(row["threads"], row["case"]): row["slope"] for row in rows if row["group"] == "slope"}
    for i, threads in enumerate(config.threads):
        for j, (axis, label) in enumerate(AXES.items()):
            axes = grid[i, j]
            swept = _sweep(rows, threads, axis)
            for who, colour in COLOURS.items():
                line = [row for row in swept if row["who"] == who]
                if not line:
                    continue
                x = [row[axis] for row in line]
                y, low, high = (np.array([row[f"seconds{end}"] for row in line]) * 1e3 for end in ("", "_q1", "_q3"))
                width = 2.2 if who == "flowvi" else 1.2
                axes.plot(x, y, "o-", color=colour, label=who, linewidth=width, markersize=3.5)
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3, which="major")
            if (slope := fitted.get((threads, axis))) is not None:
                axes.set_title(f"flowvi's slope, larger half: {slope:.2f}", fontsize="small")
            if i == len(config.threads) - 1:
                axes.set_xlabel(label)
        grid[i, 0].set_ylabel(f"ms a step, {threads} thread{'s' if threads == 'all' else ''}")
    lines, names = grid[0, 0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure
