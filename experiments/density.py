"""Density estimation by maximum likelihood: every family of flows, on four sets of the plane and one table.

Every fit is `flowvi.fit_density` with its defaults: nothing is tuned per set or family. What is shown is the mean
log-likelihood of test rows that no fit has seen, in nats, with its standard error; for the sets of the plane, whose
density is known, also the gap to it on the same rows, an estimate of KL(p || q) with a smaller error. Planar and
radial flows are here by their exact inverses, with gradients by the implicit function theorem.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

import flowvi
from experiments import datasets
from experiments.report import Report, require_matplotlib, show_density
from flowvi.energies import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Maximum likelihood: held-out log-likelihood of every flow on 2-D sets and a table"

DECIDED = ("num_steps", "batch_size", "lr", "num_rows", "num_held_out", "stopped")
"""What `fit_density` decided by itself, kept in each row of results.json."""


@dataclass(frozen=True)
class Config:
    """Everything this experiment depends on."""

    seed: int = 0
    datasets: tuple[str, ...] = datasets.DATASETS
    flows: tuple[str, ...] | None = None
    """Registered names; None is all of them."""
    num_steps: int | None = None
    """Steps of each fit; None is flowvi's default."""
    num_train: int = 10_000
    """Training rows of the 2-D sets, of which `fit_density` holds out a tenth."""
    num_test: int = 20_000
    pixels: int = 200

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short fits, to see that it works: their scores are not the ones to quote."""
        return cls(seed=seed, num_steps=100, num_train=2000, num_test=2000, pixels=60)


def run(config: Config, progress: bool = True) -> Report:
    """Fit everything, and score it."""
    require_matplotlib()
    start = time.perf_counter()
    flows = tuple(flowvi.transforms.available()) if config.flows is None else config.flows
    sets = {name: datasets.load(name, config.num_train, config.num_test, config.seed) for name in config.datasets}
    rows: list[dict[str, Any]] = []
    images: dict[tuple[str, str], Tensor] = {}
    bar = tqdm(total=len(sets) * len(flows), desc="density", disable=not progress, unit="fit")
    for name, data in sets.items():
        truth = None if data.log_density is None else data.log_density(data.test)
        picture = None if truth is None else Grid.midpoints(((-data.extent, data.extent),) * 2, config.pixels)
        if truth is not None and data.log_density is not None and picture is not None:
            rows.append(_row(name, "truth", truth, None))
            images[name, "truth"] = data.log_density(picture.z)
        for flow in flows:
            bar.set_postfix_str(f"{name}, {flow}")
            begin = time.perf_counter()
            fit = flowvi.fit_density(data.train, flow, num_steps=config.num_steps, seed=config.seed, progress=False)
            seconds = time.perf_counter() - begin
            if fit.config["stopped"] == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
                raise KeyboardInterrupt
            row = _row(name, flow, fit.log_prob(data.test).double(), truth)
            rows.append(row | {"seconds": seconds, **_decided(fit)})
            if picture is not None:
                images[name, flow] = fit.log_prob(picture.z)
            bar.update()
    bar.close()
    figure = draw(config, sets, flows, images, rows)
    table, notes = _table(sets, flows, rows), _notes(config, sets)
    return Report("density", TITLE, config, rows, table, notes, figure, time.perf_counter() - start)


def _row(name: str, flow: str, log_q: Tensor, truth: Tensor | None) -> dict[str, Any]:
    """The score of one density on the test rows."""
    root = math.sqrt(len(log_q))
    gap = None if truth is None else truth - log_q
    return {
        "dataset": name,
        "flow": flow,
        "log_likelihood": log_q.mean().item(),
        "log_likelihood_se": log_q.std().item() / root,
        "gap": None if gap is None else gap.mean().item(),
        "gap_se": None if gap is None else gap.std().item() / root,
        "num_test": len(log_q),
        "K": None,
        "num_parameters": None,
        "best_step": None,
        "skipped_steps": None,
        "seconds": None,
        **dict.fromkeys(DECIDED),
    }


def _decided(fit: flowvi.DensityFit) -> dict[str, Any]:
    return {
        "K": fit.config["num_flows"],
        "num_parameters": fit.config["num_parameters"],
        "best_step": fit.history.best_step,
        "skipped_steps": fit.history.skipped_steps,
        **{key: fit.config[key] for key in DECIDED},
    }


def _table(
    sets: Mapping[str, datasets.Dataset], flows: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """One line for each flow, one column for each set."""
    found = {(row["flow"], row["dataset"]): row for row in rows}
    table = []
    for flow in ("truth", *flows):
        mine = [found[flow, name] for name in sets if (flow, name) in found]
        if not mine:
            continue
        line = {"flow": flow, "K": str(mine[0]["K"] or "-"), "parameters": str(mine[0]["num_parameters"] or "-")}
        for name in sets:
            row = found.get((flow, name))
            line[name] = "-" if row is None else f"{row['log_likelihood']:.3f} ± {row['log_likelihood_se']:.3f}"
            if row is not None and row["gap"] is not None:
                line[name] += f" ({row['gap']:.3f} ± {row['gap_se']:.3f})"
        seconds = [row["seconds"] for row in mine if row["seconds"] is not None]
        line["seconds per fit"] = f"{sum(seconds) / len(seconds):.1f}" if seconds else "-"
        table.append(line)
    return table


def _notes(config: Config, sets: Mapping[str, datasets.Dataset]) -> list[str]:
    notes = [
        "Mean log-likelihood of test rows, nats, ± one standard error; in brackets the truth's minus it on the same "
        "rows, an estimate of KL(p || q). Higher is better, and a gap of 0 is the truth.",
        "Rows: "
        + ", ".join(f"{name} {len(s.train):,} to fit, {len(s.test):,} to test" for name, s in sets.items())
        + "; parameters are those on the first set.",
        "Every fit is flowvi.fit_density with its defaults. Planar and radial flows are fitted through their exact "
        "inverses.",
        "checkerboard is not continuous, and no flow here can be exact on it.",
    ]
    if config.num_steps is not None:
        notes.insert(0, f"Short fits of {config.num_steps} steps: these are not the figures to quote.")
    return notes


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
    figure.supxlabel("below each panel: KL(p || q) in nats, from test rows", fontsize="small")
    return figure
