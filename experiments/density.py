"""Density estimation by maximum likelihood: every family of flows, on four sets of the plane and one table.

Every fit is `flowvi.fit_density` with its defaults: nothing is tuned per set or family. What is shown is the mean
log-likelihood of test rows that no fit has seen, in nats, with its standard error; for the sets of the plane, whose
density is known, also the gap to it on the same rows, an estimate of KL(p || q) with a smaller error. Planar and
radial flows are here by their exact inverses, with gradients by the implicit function theorem.

Each flow is fitted from several seeds, which draw its start, the rows held out and the minibatches: one fit differs
from the next by more than the error of its score.

Where zuko is installed, its flow of the same family and size is fitted beside ours: the same rows, split,
standardization, affine layer, minibatches, steps and schedule, by the same loop (`experiments.zuko_flows`). The
difference of the two is taken seed by seed, and its standard error is that over the seeds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import flowvi
from experiments import datasets, zuko_flows
from experiments.report import Report, require_matplotlib, show_density
from flowvi.energies import Grid
from flowvi.transforms.coupling import HIDDEN_DIMS
from flowvi.transforms.registry import lookup
from flowvi.transforms.spline import NUM_BINS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Maximum likelihood: held-out log-likelihood of every flow on 2-D sets and a table"

DECIDED = ("num_steps", "batch_size", "lr", "num_rows", "num_held_out", "stopped")
"""What `fit_density` decided by itself, kept in each row of results.json."""

GOOD_MODE = 0.2
"""A mode is found where q gives it its mass but for this part of it."""


@dataclass(frozen=True)
class Config:
    """Everything this experiment depends on."""

    seed: int = 0
    seeds: int = 3
    """How many fits of each flow, from `seed` on; the data are those of `seed`."""
    datasets: tuple[str, ...] = datasets.DATASETS
    flows: tuple[str, ...] | None = None
    """Registered names; None is all of them."""
    zuko: bool = True
    """Whether zuko's flows are fitted beside ours, where it is installed."""
    num_steps: int | None = None
    """Steps of each fit; None is flowvi's default."""
    num_train: int = 10_000
    """Training rows of the 2-D sets, of which `fit_density` holds out a tenth."""
    num_test: int = 20_000
    pixels: int = 200

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short fits, to see that it works: their scores are not the ones to quote."""
        return cls(seed=seed, seeds=1, num_steps=100, num_train=2000, num_test=2000, pixels=60)


def run(config: Config, progress: bool = True) -> Report:
    """Fit everything, and score it.

    Raises:
        UnknownFlowError: a flow is not registered.
    """
    require_matplotlib()
    start = time.perf_counter()
    flows = tuple(flowvi.transforms.available()) if config.flows is None else config.flows
    for flow in flows:
        lookup(flow)  # a wrong name is told now, not after the fits before it
    sets = {name: datasets.load(name, config.num_train, config.num_test, config.seed) for name in config.datasets}
    peers = {flow for flow in flows if flow in zuko_flows.FAMILIES and config.zuko and zuko_flows.has_zuko()}
    rows: list[dict[str, Any]] = []
    images: dict[tuple[str, str], Tensor] = {}
    num_fits = len(sets) * (len(flows) + len(peers)) * config.seeds
    bar = tqdm(total=num_fits, desc="density", disable=not progress, unit="fit")
    for name, data in sets.items():
        truth = None if data.log_density is None else data.log_density(data.test)
        picture = None if truth is None else Grid.midpoints(((-data.extent, data.extent),) * 2, config.pixels)
        if truth is not None and data.log_density is not None and picture is not None:
            rows.append(_row(name, "truth", truth, None, [0.0]))
            images[name, "truth"] = data.log_density(picture.z)
        for flow in flows:
            bar.set_postfix_str(f"{name}, {flow}")
            fits = _fits(config, data, flow, bar)
            log_q = torch.stack([fit.log_prob(data.test).double() for fit, _ in fits])
            row = _row(name, flow, log_q.mean(0), truth, log_q.mean(1).tolist()) | _decided(fits)
            if data.modes is not None:
                row["worst_mode"] = max(datasets.worst_mode(q.sample(20_000, seed=0), *data.modes) for q, _ in fits)
            if picture is not None:
                images[name, flow] = fits[0][0].log_prob(picture.z)
            if flow in peers:
                bar.set_postfix_str(f"{name}, {flow} by zuko")
                row |= _by_zuko(config, data, flow, fits[0][0].config["num_flows"], log_q.mean(1), bar)
            rows.append(row)
    bar.close()
    figure = draw(config, sets, flows, images, rows)
    table, notes = _table(rows, bool(peers)), _notes(config, sets, rows, peers)
    return Report("density", TITLE, config, rows, table, notes, figure, time.perf_counter() - start)


Fit = tuple[flowvi.DensityFit, float]
"""A fit, and its seconds."""


def _fits(config: Config, data: datasets.Dataset, flow: Any, bar: tqdm[Any], **options: Any) -> list[Fit]:
    """One from each seed, with flowvi's defaults."""
    fits = []
    for seed in range(config.seed, config.seed + config.seeds):
        begin = time.perf_counter()
        fit = flowvi.fit_density(data.train, flow, num_steps=config.num_steps, seed=seed, progress=False, **options)
        if fit.config["stopped"] == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
            raise KeyboardInterrupt
        fits.append((fit, time.perf_counter() - begin))
        bar.update()
    return fits


def _by_zuko(
    config: Config, data: datasets.Dataset, flow: str, num_flows: int, ours: Tensor, bar: tqdm[Any]
) -> dict[str, Any]:
    """The columns of zuko's flow of the same family, length and widths, fitted by the same loop at the same rate.

    Args:
        config: what is run.
        data: what is fitted.
        flow: the family.
        num_flows: K.
        ours: the mean log-likelihood of each seed's fit, by flowvi.
        bar: shows the progress.
    """

    def make(dim: int) -> Any:
        return zuko_flows.zuko_flow(flow, dim, num_flows, hidden_dims=HIDDEN_DIMS, num_bins=NUM_BINS)

    fits = _fits(config, data, make, bar, num_flows=1)
    log_q = torch.stack([fit.log_prob(data.test).double() for fit, _ in fits])
    ahead = (ours - log_q.mean(1)).tolist()
    mean, se = _mean(log_q.mean(0))
    return {
        "zuko_log_likelihood": mean,
        "zuko_log_likelihood_se": se,
        "zuko_log_likelihood_by_seed": log_q.mean(1).tolist(),
        "zuko_num_parameters": fits[0][0].config["num_parameters"],
        "zuko_seconds": sum(seconds for _, seconds in fits) / len(fits),
        "ahead_of_zuko": statistics.fmean(ahead),
        "ahead_of_zuko_se": None if len(ahead) == 1 else statistics.stdev(ahead) / math.sqrt(len(ahead)),
    }


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def _row(name: str, flow: str, log_q: Tensor, truth: Tensor | None, by_seed: list[float]) -> dict[str, Any]:
    """The score of one density on the test rows: `log_q` is the mean over the seeds' fits, row by row."""
    mean, se = _mean(log_q)
    gap, gap_se = (None, None) if truth is None else _mean(truth - log_q)
    rest = ("K", "num_parameters", "best_step", "skipped_steps", "seconds", "worst_mode", *DECIDED)
    zuko = ("zuko_log_likelihood", "zuko_log_likelihood_se", "zuko_log_likelihood_by_seed", "zuko_num_parameters")
    return {
        "dataset": name,
        "flow": flow,
        "log_likelihood": mean,
        "log_likelihood_se": se,
        "log_likelihood_by_seed": by_seed,
        "gap": gap,
        "gap_se": gap_se,
        "num_test": len(log_q),
        **dict.fromkeys((*rest, *zuko, "zuko_seconds", "ahead_of_zuko", "ahead_of_zuko_se")),
    }


def _decided(fits: Sequence[Fit]) -> dict[str, Any]:
    """What the first fit decided, and what is the mean or the sum of all."""
    first = fits[0][0]
    return {
        "K": first.config["num_flows"],
        "num_parameters": first.config["num_parameters"],
        "best_step": first.history.best_step,
        "skipped_steps": sum(fit.history.skipped_steps for fit, _ in fits),
        "seconds": sum(seconds for _, seconds in fits) / len(fits),
        **{key: first.config[key] for key in DECIDED},
    }


def _table(rows: Sequence[Mapping[str, Any]], with_zuko: bool) -> list[dict[str, str]]:
    """One line for each set and flow, the best first."""

    def number(row: Mapping[str, Any], name: str, digits: int = 3, sign: str = "") -> str:
        if row[name] is None:
            return "-"
        text = f"{row[name]:{sign}.{digits}f}"
        return text if row.get(f"{name}_se") is None else f"{text} ± {row[f'{name}_se']:.{digits}f}"

    table = []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == name]
        for row in sorted(mine, key=lambda row: (row["flow"] != "truth", -row["log_likelihood"])):
            by_seed = row["log_likelihood_by_seed"]
            line = {
                "set": name,
                "flow": row["flow"],
                "K": str(row["K"] or "-"),
                "parameters": str(row["num_parameters"] or "-"),
                "held-out nats": number(row, "log_likelihood"),
                "KL(p, q)": number(row, "gap"),
                "spread": "-" if len(by_seed) < 2 else f"{statistics.stdev(by_seed):.3f}",
                "worst mode": "-" if row["worst_mode"] is None else f"{row['worst_mode']:.0%}",
                "seconds": number(row, "seconds", 1),
            }
            if with_zuko:
                line |= {
                    "zuko, held-out nats": number(row, "zuko_log_likelihood"),
                    "flowvi minus zuko": number(row, "ahead_of_zuko", sign="+"),
                    "zuko, seconds": number(row, "zuko_seconds", 1),
                }
            table.append(line)
    return table


def _notes(
    config: Config, sets: Mapping[str, datasets.Dataset], rows: Sequence[Mapping[str, Any]], peers: Collection[str]
) -> list[str]:
    notes = [
        "held-out nats: the mean log-likelihood of test rows that no fit has seen, ± one standard error; higher is "
        "better. KL(p, q): the truth's minus it on the same rows, which estimates KL(p || q); 0 is the truth.",
        "Rows: "
        + ", ".join(f"{name} {len(s.train):,} to fit, {len(s.test):,} to test" for name, s in sets.items())
        + "; a tenth of those to fit is held out by the fit itself.",
        f"Every fit is flowvi.fit_density with its defaults. Each flow is fitted from {config.seeds} seeds: scores and "
        "seconds are means over them, and spread is the standard deviation of the scores. Planar and radial flows are "
        "fitted through their exact inverses.",
    ]
    if any(row["worst_mode"] is not None for row in rows):
        notes.append(_modes(rows))
    if "checkerboard" in sets:
        notes.append("checkerboard is not continuous, and no flow here can be exact on it.")
    if peers:
        notes.append(
            f"{zuko_flows.zuko_version()}: its flow of the same family, layers, widths and bins, on the same rows, "
            f"split and standardization, with the same affine layer, minibatches, steps and step sizes. flowvi minus "
            f"zuko: the mean difference seed by seed, ± its standard error; above 0, flowvi's is better."
        )
    elif config.zuko:
        notes.append("zuko is not installed, so nothing is compared with it (pip install 'flowvi[zuko]').")
    if config.num_steps is not None:
        notes.insert(0, f"Short fits of {config.num_steps} steps: these are not the figures to quote.")
    return notes


def _modes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which flows find all modes, in a sentence."""
    told = [row for row in rows if row["worst_mode"] is not None]
    good = [row["flow"] for row in told if row["worst_mode"] <= GOOD_MODE]
    bad = [row["flow"] for row in told if row["worst_mode"] > GOOD_MODE]
    return (
        f"worst mode: by how much of its mass, within three standard deviations, the worst of the equal modes is off, "
        f"from 20,000 draws, in the worst seed. All within {GOOD_MODE:.0%}: {', '.join(good) or 'none'}; not: "
        f"{', '.join(bad) or 'none'}."
    )


def draw(
    config: Config,
    sets: Mapping[str, datasets.Dataset],
    flows: Sequence[str],
    images: Mapping[tuple[str, str], Tensor],
    rows: Sequence[Mapping[str, Any]],
) -> Figure:
    """Rows: the sets of the plane. Columns: the true density, then each flow with its gap to it."""
    from matplotlib.figure import Figure

    columns = ("truth", *flows)
    names = [name for name in sets if (name, "truth") in images]
    gaps = {(row["dataset"], row["flow"]): row["gap"] for row in rows}
    figure = Figure(figsize=(1.35 * len(columns) + 0.6, 1.6 * max(1, len(names)) + 0.3), layout="constrained")
    if not names:
        return figure
    grid = figure.subplots(len(names), len(columns), squeeze=False)
    for i, name in enumerate(names):
        top = images[name, "truth"].exp().max().item()
        for j, flow in enumerate(columns):
            show_density(grid[i, j], images[name, flow], sets[name].extent, top)
            if i == 0:
                grid[i, j].set_title(flow, fontsize="small")
            if flow != "truth":
                grid[i, j].set_xlabel(f"{gaps[name, flow]:.3f}", labelpad=2, fontsize="small")
        grid[i, 0].set_ylabel(name.replace("_", " "), fontsize="small")
    words = "KL(p || q) in nats, from test rows" + (", the mean over seeds" if config.seeds > 1 else "")
    figure.supxlabel(f"a panel: the first seed's; below it {words}", fontsize="small")
    return figure
