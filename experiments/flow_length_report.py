"""What the fits of `experiments.flow_length` say: log Z, KLs over seeds, the conclusion, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

from experiments.parallel import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.flow_length import Config

NUM_BEST = 10
"""Fits whose importance-sampling estimates of log Z are averaged, where it is not known."""
GOOD_MODE = 0.2
"""A mode is found where q gives it its mass but for this part of it."""
FLOOR = 1e-4
"""Below this a KL from 25,000 draws is noise, and is drawn at it."""
MARKS = {
    "planar": ("#0072B2", "o"),
    "radial": ("#56B4E9", "s"),
    "nice": ("#E69F00", "^"),
    "real_nvp": ("#D55E00", "v"),
    "iaf": ("#009E73", "D"),
    "neural_spline": ("#CC79A7", "X"),
}
"""Colours that colour-blind readers can tell apart, and marks that need no colour."""


class Cell(NamedTuple):
    """One target, flow and K: medians over seeds, with the range of the KL."""

    kl: float
    best: float
    worst: float
    khat: float
    seconds: float
    """Of all steps."""
    step: float
    """Seconds of one step."""


def log_normalizers(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Log Z of each target with its standard error: 0 where it is known.

    Where it is not, the mean of the estimates of the fits with the largest ESS, at most ten of them. Fits of one
    seed share their noise, so the error is that of one of them, not of their mean.
    """
    found = {}
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        if mine[0]["log_normalizer"] is not None:
            found[target] = (mine[0]["log_normalizer"], 0.0)
            continue
        usable = [row for row in mine if math.isfinite(row["log_z_estimate"])]
        best = sorted(usable, key=lambda row: -row["ess_fraction"])[:NUM_BEST]
        pairs = [(row["log_z_estimate"], row["log_z_estimate_se"]) for row in best]
        found[target] = (fmean(a for a, _ in pairs), fmean(b for _, b in pairs)) if pairs else (math.nan, math.nan)
    return found


def with_kl(row: Row, log_z: float, log_z_se: float) -> Row:
    """The row with KL = log Z - ELBO, and the standard error of both together."""
    return row | {"kl": log_z - row["elbo"], "kl_se": math.hypot(row["elbo_se"], log_z_se)}


def summarize(rows: Sequence[Row]) -> dict[tuple[str, str, int], Cell]:
    """(target, flow, K) -> what its seeds gave; a KL that is not finite counts as infinite."""
    runs: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["target"], row["flow"], row["K"]), []).append(row)
    cells = {}
    for key, mine in runs.items():
        kls = [row["kl"] if math.isfinite(row["kl"]) else math.inf for row in mine]
        khat = [math.inf if math.isnan(row["khat"]) else row["khat"] for row in mine]
        steps = [s for row in mine if math.isfinite(s := row["seconds_of_steps"])] or [math.inf]
        seconds = median(steps)
        num_steps = mine[0]["num_steps"]
        cells[key] = Cell(median(kls), min(kls), max(kls), median(khat), seconds, seconds / num_steps)
    return cells


def conclude(config: Config, cells: Mapping[tuple[str, str, int], Cell]) -> list[str]:
    """The answer in sentences, from the cells."""
    total = len(config.targets)

    def reached(flow: str, k: int) -> list[str]:
        return [target for target in config.targets if cells[target, flow, k].kl <= config.enough]

    def seconds(length: tuple[str, int]) -> float:
        return sum(cells[target, *length].seconds for target in config.targets)

    best = []  # of each family, the shortest that reaches the most targets
    for flow in config.flows + config.deep_flows:
        mine = [length for length in config.lengths if length[0] == flow]
        best.append(min(mine, key=lambda length: (-len(reached(*length)), length[1])))
    each = [f"{flow} {f'K = {k} ({num})' if (num := len(reached(flow, k))) else 'none'}" for flow, k in best]
    one = min(best, key=lambda length: (-len(reached(*length)), seconds(length)))
    failed = [target for target in config.targets if target not in reached(*one)]
    first = (
        f"How many layers: for a median KL of {config.enough:g} nats or less on as many of the {total} targets as it "
        f"can, each family needs (in brackets, how many targets it reaches): {', '.join(each)}."
    )
    if len(failed) < total:
        fails = f", which fails on {', '.join(failed)}" if failed else ""
        first += f" One choice for all: {one[0]} K = {one[1]}{fails}."
    quickest, out_of_reach = [], []
    for target in config.targets:
        there = [length for length in config.lengths if cells[(target, *length)].kl <= config.enough]
        if there:
            flow, k = min(there, key=lambda length: cells[(target, *length)].seconds)
            quickest.append(f"{target} {flow} K = {k} ({cells[target, flow, k].seconds:.1f} s)")
        else:
            flow, k = min(config.lengths, key=lambda length: cells[(target, *length)].kl)
            out_of_reach.append(f"{target} (best: {flow} K = {k}, {cells[target, flow, k].kl:.3f})")
    second = f"Quickest to {config.enough:g} nats, by the seconds of its steps: {', '.join(quickest) or 'none'}."
    if out_of_reach:
        second += f" Not reached by any: {', '.join(out_of_reach)}."
    return [first, second, *_last_doubling(config, cells)]


def modes(config: Config, rows: Sequence[Row]) -> list[str]:
    """Of a target whose modes are known: which lengths give each mode its mass, with every seed."""
    found = []
    for target in dict.fromkeys(row["target"] for row in rows if row.get("worst_mode") is not None):
        mine = [row for row in rows if row["target"] == target]
        good = {
            length: all(
                row["worst_mode"] is not None and row["worst_mode"] <= GOOD_MODE
                for row in mine
                if (row["flow"], row["K"]) == length
            )
            for length in config.lengths
        }
        each = []
        for flow in config.flows + config.deep_flows:
            ks = [str(k) for name, k in config.lengths if name == flow and good[name, k]]
            each.append(f"{flow} {'K = ' + ', '.join(ks) if ks else 'none'}")
        of = f"within {GOOD_MODE:.0%} of its mass, with {'each of ' if config.seeds > 1 else ''}{_seeds(config)}"
        found.append(f"{target}: every mode {of}: {'; '.join(each)}.")
    return found


def _last_doubling(config: Config, cells: Mapping[tuple[str, str, int], Cell]) -> list[str]:
    factors = []
    for flow in config.flows + config.deep_flows:
        ks = config.num_flows if flow in config.flows else config.deep_num_flows
        if len(ks) > 1:
            low, high = ks[-2:]
            ratios = [
                max(cells[t, flow, high].kl, FLOOR) / max(cells[t, flow, low].kl, FLOOR)
                for t in config.targets
                if math.isfinite(cells[t, flow, low].kl)
            ]
            factors.append(f"{flow} {median(ratios) if ratios else math.nan:.2f} (K {low} to {high})")
    if not factors:
        return []
    return [
        "What the last step in K does to the KL, as a factor, median over targets (near 1 or above: longer is no "
        f"better at this number of steps): {', '.join(factors)}."
    ]


def _seeds(config: Config) -> str:
    last = config.seed + config.seeds - 1
    return f"seed {config.seed}" if config.seeds == 1 else f"seeds {config.seed} to {last}"


# For people -----------------------------------------------------------------------------------------------


def table(config: Config, cells: Mapping[tuple[str, str, int], Cell], rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line for each flow and K, one column for each target."""
    dims = {row["target"]: row["dim"] for row in rows if row["dim"] is not None}
    lines = []
    for flow, k in config.lengths:
        line = {"flow": flow, "K": str(k)}
        for target in config.targets:
            cell = cells[target, flow, k]
            line[target] = f"{cell.kl:.4f} / {cell.worst:.4f} / {cell.khat:.2f}"
        steps: dict[int, list[float]] = {}
        for target, dim in sorted(dims.items(), key=lambda item: item[1]):
            steps.setdefault(dim, []).append(1e3 * cells[target, flow, k].step)
        line |= {f"ms per step, D {dim}": f"{median(values):.2f}" for dim, values in steps.items()}
        lines.append(line)
    return lines


def notes(config: Config, rows: Sequence[Row], log_z: Mapping[str, tuple[float, float]]) -> list[str]:
    """What a reader needs to read the table rightly."""
    known = [name for name in config.targets if log_z[name][1] == 0]
    estimated = [f"{name} {log_z[name][0]:.4f} ± {log_z[name][1]:.4f}" for name in config.targets if name not in known]
    failed = sum(not math.isfinite(row["kl"]) for row in rows)
    found = [
        f"A cell: median KL(q ‖ p) in nats / its worst / median k-hat, over {_seeds(config)}. "
        f"KL = log Z - ELBO, from {config.num_draws:,} fresh draws; below about {FLOOR:g} it is noise.",
        f"Every fit is flowvi.fit with its defaults (learning rate by family, S = 256, energies annealed, posteriors "
        f"whitened first) but for {config.num_steps} steps, and compile=False. nice and real_nvp mix by "
        "permutations (in the plane the two coordinates take turns); nice starts at random layers (start=1), since "
        "from the identity it stays at U1's best Gaussian.",
        f"log Z is known for {', '.join(known) or 'none'}. U2, U3 and U4 are soft-walled: ((|z1| - 4)+ / 0.1)^2 / 2 is "
        "added to U.",
        "Seconds are of the steps alone, on one thread, energies in float32 and posteriors in float64; the whitening "
        "of a posterior, the same for every K, is not in them. The sum at the end adds up all fits, over all workers.",
        "The paper (Rezende & Mohamed 2015, section 6.1) has K = 2, 8, 32, planar beside NICE.",
    ]
    if estimated:
        found.append(
            f"log Z is not known for the others: it is estimated by importance sampling, as the mean over the "
            f"{NUM_BEST} fits with the largest ESS: {', '.join(estimated)}. A region that no fit visits is missing in "
            "it."
        )
    if config.num_steps < 1000:
        found.insert(0, f"Short fits of {config.num_steps} steps: these are not the figures to quote.")
    for name in config.posteriors:
        mine = [row for row in rows if row["target"] == name and math.isfinite(row["kl"])]
        if mine:
            best = min(mine, key=lambda row: row["kl"])
            found.append(
                f"{name}: the fit with the least KL ({best['flow']} K = {best['K']}, seed {best['seed']}) is off by "
                f"{best['worst_mean_error']:.3f} sd in its worst mean and {best['worst_sd_error']:.3f} in its worst sd."
            )
    if failed:
        found.append(f"{failed} of {len(rows)} fits have no finite ELBO, and count as infinite.")
    return found


def draw(config: Config, cells: Mapping[tuple[str, str, int], Cell]) -> Figure:
    """For each target, above: KL against K; below: KL against the seconds of all steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    columns = min(4, len(config.targets))
    bands = math.ceil(len(config.targets) / columns)
    figure = Figure(figsize=(3.1 * columns, 5.2 * bands + 0.5), layout="constrained")
    grid = figure.subplots(2 * bands, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for i, target in enumerate(config.targets):
        above, below = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
        for flow in config.flows + config.deep_flows:
            mine = [(k, cells[target, flow, k]) for name, k in config.lengths if name == flow]
            mine = [(k, cell) for k, cell in mine if math.isfinite(cell.kl)]
            y = [max(cell.kl, FLOOR) for _, cell in mine]
            bars = [[value - max(cell.best, FLOOR) for value, (_, cell) in zip(y, mine, strict=True)]]
            tops = [cell.worst if math.isfinite(cell.worst) else cell.kl for _, cell in mine]
            bars.append([max(top, FLOOR) - value for value, top in zip(y, tops, strict=True)])
            colour, mark = MARKS.get(flow, ("black", "."))
            for axes, x in ((above, [k for k, _ in mine]), (below, [cell.seconds for _, cell in mine])):
                style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}
                axes.errorbar(x, y, bars, label=flow, **style)
        for axes, label in ((above, "K"), (below, f"seconds of {config.num_steps} steps")):
            axes.set_visible(True)
            axes.set(xscale="log", yscale="log", xlabel=label)
            axes.axhline(config.enough, color="grey", linewidth=0.8, linestyle=":")
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize="small")
        above.set_xticks(sorted({*config.num_flows, *config.deep_num_flows}))
        above.xaxis.set_major_formatter(ScalarFormatter())
        above.xaxis.set_minor_formatter(NullFormatter())
        above.set_title(target.replace("_", " "), fontsize="medium")
        if i % columns == 0:
            above.set_ylabel("KL(q || p), nats")
            below.set_ylabel("KL(q || p), nats")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    over = _seeds(config) if config.seeds == 1 else f"median over {_seeds(config)}, bars from least to largest"
    title = f"{over}; dotted: {config.enough:g} nats"
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * columns), title=title)
    return figure
