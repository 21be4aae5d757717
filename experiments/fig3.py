"""Figure 3: the four energies of table 1, fitted by planar, radial and NICE flows of length K = 2, 8, 32.

Source: Rezende & Mohamed 2015 (arXiv:1505.05770), section 6.1 and figure 3, which has planar flows beside NICE;
the radial ones are added here. NICE mixes the coordinates between its layers by permutations, which in the plane
means that the two take turns, or by random orthogonal matrices (section 5). Every fit is `flowvi.fit` with its
defaults: nothing is tuned per energy. KL(q || p), the integral of q (log q - log p), is computed by quadrature on a
grid with log Z known, so it is an absolute number; log Z - ELBO from fresh draws estimates the same and checks it.
U2, U3 and U4 are soft-walled at |z1| = 4 (see `flowvi.energies.U2`): their divergences are to that target.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import flowvi
from experiments.report import Report, require_matplotlib, show_density
from flowvi.energies import ENERGIES, Grid
from flowvi.errors import NumericalWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Figure 3: U1 to U4 fitted by planar, radial and NICE flows, K = 2, 8, 32"

FLOWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "planar": ("planar", {}),
    "NICE-perm": ("nice", {"mixing": "perm", "start": 1.0}),
    "NICE-orth": ("nice", {"mixing": "orth", "start": 1.0}),
    "radial": ("radial", {}),
}
"""What the figure calls a flow -> its registered name and options; the paper's first."""

LETTERS = {"planar": "(b) ", "NICE-perm": "(c) ", "NICE-orth": "(c) "}
"""The part of the paper's figure that shows a flow."""

MARKS = {
    "planar": ("#0072B2", "o"),
    "NICE-perm": ("#E69F00", "^"),
    "NICE-orth": ("#D55E00", "v"),
    "radial": ("#56B4E9", "s"),
}
"""Colours that colour-blind readers can tell apart, and marks that need no colour."""

DECIDED = ("num_steps", "num_particles", "lr", "anneal", "gradient")
"""What the engine decided by itself, kept in each row of results.json."""


@dataclass(frozen=True)
class Config:
    """Everything figure 3 depends on."""

    seed: int = 0
    seeds: int = 1
    """How many seeds, from `seed` on; the picture shows the first."""
    energies: tuple[str, ...] = ("U1", "U2", "U3", "U4")
    flows: tuple[str, ...] = tuple(FLOWS)
    num_flows: tuple[int, ...] = (2, 8, 32)
    num_steps: int | None = None
    """Steps of each fit; None is flowvi's default."""
    num: int = 800
    """Cells of the KL's grid along each dimension."""
    box: float = 8.0
    """Half the side of the square that the KL integrates over."""
    num_draws: int = 100_000
    """Draws for the ELBO and for the mode mass of U1."""
    shown: float = 4.0
    """Half the side of the square that is drawn."""
    pixels: int = 250

    @classmethod
    def quick(cls, seed: int = 0, seeds: int = 1) -> Config:
        """Short fits, to see that it works: their KLs are not the ones to quote."""
        return cls(seed=seed, seeds=seeds, num_steps=400, num=250, num_draws=20_000, pixels=100)


def run(config: Config, progress: bool = True) -> Report:
    """Fit everything, and measure it."""
    require_matplotlib()
    start = time.perf_counter()
    picture = Grid.midpoints(((-config.shown, config.shown),) * 2, config.pixels)
    cases = [(e, f, k) for e in config.energies for f in config.flows for k in config.num_flows]
    rows: list[dict[str, Any]] = []
    images: dict[tuple[str, str, int], Tensor] = {
        (name, "true", 0): ENERGIES[name]().log_prob(picture.z) for name in config.energies
    }
    bar = tqdm(total=len(cases) * config.seeds, desc="fig3", disable=not progress, unit="fit")
    for seed in range(config.seed, config.seed + config.seeds):
        for name, flow, k in cases:
            bar.set_postfix_str(f"{name}, {flow} K = {k}, seed {seed}")
            row, q = fit_one(config, name, flow, k, seed)
            rows.append(row)
            if seed == config.seed:
                with torch.no_grad():
                    images[name, flow, k] = q.log_prob(picture.z)
            bar.update()
    bar.close()
    figure = draw(config, images, rows)
    return Report(
        "fig3", TITLE, config, rows, _table(config, rows), _notes(config), figure, time.perf_counter() - start
    )


def fit_one(config: Config, name: str, flow: str, num_flows: int, seed: int) -> tuple[dict[str, Any], flowvi.Flow]:
    """One fit: its row of results, and q in float64."""
    energy = ENERGIES[name]()
    registered, options = FLOWS[flow]
    start = time.perf_counter()
    posterior = flowvi.fit(
        energy,
        flow=registered,
        num_flows=num_flows,
        num_steps=config.num_steps,
        seed=seed,
        progress=False,
        verify=False,  # measured below, from more draws
        **options,
    )
    seconds = time.perf_counter() - start
    if posterior.config.get("stopped") == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
        raise KeyboardInterrupt
    # The same flow in float64, so that the quadrature measures the fit and not the rounding of inverses.
    spec = posterior.flow.spec
    assert spec is not None  # only a flow composed by hand has none
    q = flowvi.Flow.from_spec(spec, dtype=torch.float64)
    q.load_state_dict(posterior.flow.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # the mass has its own column
        kl, mass = energy.kl_divergence(q.log_prob, num=config.num, box=((-config.box, config.box),) * 2)
    diagnostics = posterior.diagnose(config.num_draws, hmc=False)  # numbers, not a verdict
    z = posterior.sample(config.num_draws, seed=seed)["z"]
    return {
        "energy": name,
        "flow": flow,
        "K": num_flows,
        "seed": seed,
        "kl": kl,
        "mass_on_grid": mass,
        "left_mode": (z[:, 0] < 0).double().mean().item() if name == "U1" else None,
        "log_normalizer": energy.log_normalizer,
        "elbo": diagnostics.elbo,
        "elbo_gap": energy.log_normalizer - diagnostics.elbo,
        "elbo_gap_se": diagnostics.elbo_se,
        "khat": diagnostics.khat,
        "seconds": seconds,
        **{key: posterior.config.get(key) for key in DECIDED},
    }, q


def _table(config: Config, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One line for each energy, flow and K: the median over seeds, and the worst where there are several."""
    table = []
    for name in config.energies:
        for flow in config.flows:
            for k in config.num_flows:
                runs = [row for row in rows if (row["energy"], row["flow"], row["K"]) == (name, flow, k)]
                kls = [row["kl"] for row in runs]
                left = [row["left_mode"] for row in runs if row["left_mode"] is not None]
                line = {"energy": name, "flow": flow, "K": str(k), "KL(q ‖ p), nats": f"{median(kls):.4f}"}
                if config.seeds > 1:
                    line["worst seed"] = f"{max(kls):.4f}"
                gap, error = (median(row[key] for row in runs) for key in ("elbo_gap", "elbo_gap_se"))
                line |= {
                    "log Z - ELBO": f"{gap:.4f} ± {error:.4f}",
                    "mass on grid": f"{median(row['mass_on_grid'] for row in runs):.4f}",
                    "U1: mass of the left mode": ", ".join(f"{value:.3f}" for value in left) or "-",
                    "seconds": f"{median(row['seconds'] for row in runs):.1f}",
                }
                table.append(line)
    return table


def _notes(config: Config) -> list[str]:
    logs = ", ".join(f"{name} {ENERGIES[name]().log_normalizer:.4f}" for name in config.energies)
    notes = [
        f"KL: midpoint quadrature, {config.num} x {config.num} cells on [-{config.box:g}, {config.box:g}]^2, "
        "float64; mass on grid is the part of q it saw. log Z - ELBO: the same quantity from "
        f"{config.num_draws:,} fresh draws, ± one standard error.",
        "U1 is the paper's, on the plane. U2, U3 and U4 have no finite normalizer there and are soft-walled:"
        " ((|z1| - 4)+ / 0.1)^2 / 2 added to U, and the KL is to that target.",
        f"log Z: {logs}.",
        "The paper shows planar flows beside NICE at these K (figure 3b, c), and its KL values as curves (figure 3d) "
        "that are not recorded in any source at hand, so only ours stand here. Radial flows are not in its figure.",
        "NICE is volume-preserving but for the affine layer that ends every flow here. Its layers hold networks "
        "(2 x 32 hidden units each), so K layers of it have many more parameters than K planar ones. They start at "
        "random (start=1): from the identity, NICE-perm stays at the best Gaussian of U1, where no layer gains on its "
        "own.",
    ]
    if config.num_steps is not None:
        notes.insert(0, f"Short fits of {config.num_steps} steps: these are not the figures to quote.")
    if config.seeds > 1:
        notes.append(f"Medians over seeds {config.seed} to {config.seed + config.seeds - 1}.")
    return notes


def draw(config: Config, images: dict[tuple[str, str, int], Tensor], rows: Sequence[dict[str, Any]]) -> Figure:
    """Rows: the energy. Columns: (a) the true density, (b), (c) each flow and K, (d) KL against K."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    columns = [("true", 0)] + [(flow, k) for flow in config.flows for k in config.num_flows]
    kls = {(r["energy"], r["flow"], r["K"]): r["kl"] for r in rows if r["seed"] == config.seed}
    figure = Figure(figsize=(1.35 * len(columns) + 3.2, 1.5 * len(config.energies) + 0.6), layout="constrained")
    ratios = [1.0] * len(columns) + [1.7]
    grid = figure.subplots(len(config.energies), len(columns) + 1, squeeze=False, width_ratios=ratios)
    for i, name in enumerate(config.energies):
        top = images[name, "true", 0].exp().max().item()
        for j, (flow, k) in enumerate(columns):
            axes = grid[i, j]
            image = show_density(axes, images[name, flow, k], config.shown, top)
            if i == 0:
                axes.set_title(_title(flow, k), fontsize="medium")
            if flow != "true":
                axes.set_xlabel(f"KL {kls[name, flow, k]:.3f}", labelpad=2, fontsize="small")
        grid[i, 0].set_ylabel(name)
        bar = figure.colorbar(image, ax=grid[i, :-1].tolist(), extend="max", shrink=0.85, pad=0.005, aspect=14)
        bar.set_label("density", fontsize="small")
        bar.ax.tick_params(labelsize="x-small")
        axes = grid[i, -1]
        for flow in config.flows:
            colour, mark = MARKS[flow]
            values = [kls[name, flow, k] for k in config.num_flows]
            axes.plot(config.num_flows, values, color=colour, marker=mark, markersize=4, linewidth=1.2, label=flow)
        axes.set(xscale="log", yscale="log", xticks=config.num_flows)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize="x-small")
        axes.grid(alpha=0.25)
    grid[0, -1].set_title("(d) KL, nats,\nagainst K", fontsize="medium")
    grid[0, -1].legend(fontsize="x-small", frameon=False, labelspacing=0.2)
    caption = f"every panel: z in [-{config.shown:g}, {config.shown:g}]$^2$; KL(q || p) in nats; letters as the paper's"
    figure.supxlabel(caption, fontsize="small")
    return figure


def _title(flow: str, k: int) -> str:
    return "(a) true\ndensity" if flow == "true" else f"{LETTERS.get(flow, '')}{flow}\nK = {k}"
