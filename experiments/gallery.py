"""The README's gallery: one picture of each kind that `flowvi.plotting` makes, from fits that anyone can repeat.

The posterior is that of eight schools (Rubin 1981), in the coordinates of a standard effect; the plane is the paper's
U1 and U2 (Rezende & Mohamed 2015, table 1). Error against K is read from the committed results of figure 3.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from tqdm import tqdm

import flowvi
from experiments.report import require_matplotlib
from flowvi import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The gallery of pictures that flowvi.plotting makes, for the README"

FIG3 = Path(__file__).parent / "results" / "fig3" / "results.json"

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@dataclass(frozen=True)
class Config:
    """Everything the gallery depends on."""

    seed: int = 0
    num_flows: int = 32
    num_steps: int | None = None
    """Steps of the fits on the plane; None is flowvi's default."""
    time_limit: float = 60.0
    """Seconds of the fit to the eight schools, which chooses its own layers and steps."""
    num: int = 250
    """Cells of the densities along each side."""

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short fits: every picture, none to be quoted."""
        return cls(seed=seed, num_flows=8, num_steps=300, time_limit=3.0, num=80)


def schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
    """Eight schools: effects theta ~ N(mu, tau^2), measured as y ~ N(theta, sigma^2)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def run(config: Config, out: Path, *, style: str | None = None, progress: bool = True) -> list[Path]:
    """Fit, draw, and write the PNGs.

    Args:
        config: what to fit.
        out: the folder, made where missing.
        style: one of matplotlib's styles, such as "dark_background"; None is its default.
        progress: whether a bar is shown.

    Returns:
        The paths.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    fits = _fits(config, progress)
    paths = []
    with plt.style.context(style or "default"):
        for name, draw in pictures(config, fits).items():
            figure = draw()
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return paths


def pictures(config: Config, fits: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws it."""
    u1, u2, posterior, exact = (fits[name] for name in ("U1", "U2", "schools", "refined"))
    rows = json.loads(FIG3.read_text(encoding="utf-8"))["rows"] if FIG3.exists() else fits["rows"]
    sites = ["mu", "tau"]
    return {
        "density": lambda: plotting.plot_density(u1, num=config.num)[0].figure,
        "layers": lambda: plotting.plot_layers(u2, num=config.num)[0].figure,
        "elbo": lambda: plotting.plot_elbo(posterior).figure,
        "elbo_annealed": lambda: plotting.plot_elbo(u1).figure,
        "khat": lambda: plotting.plot_khat(posterior).figure,
        "marginals": lambda: plotting.plot_marginals(fits["gaussian"], exact, sites=sites)[0].figure,
        "error_against_k": lambda: plotting.plot_error_against_k(rows)[0].figure,
    }


def _fits(config: Config, progress: bool) -> dict[str, Any]:
    """The fits that the pictures show, each within a minute."""
    plane: dict[str, Any] = {"flow": "planar", "num_flows": config.num_flows, "num_steps": config.num_steps}
    common: dict[str, Any] = {"seed": config.seed, "progress": False, "verify": False}
    data = torch.tensor(EFFECTS).double(), torch.tensor(ERRORS).double()
    fits: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "U1": lambda: flowvi.fit(flowvi.energies.U1(), **plane, **common),
        "U2": lambda: flowvi.fit(flowvi.energies.U2(), **plane, **common),
        "schools": lambda: flowvi.fit(schools, data, time_limit=config.time_limit, compile=False, **common),
        # one layer on purpose: something is left to correct
        "gaussian": lambda: flowvi.fit(schools, data, num_flows=1, num_steps=500, compile=False, **common),
        "refined": lambda: fits["schools"].refine(seed=config.seed, progress=False, time_limit=config.time_limit),
    }
    bar = tqdm(steps.items(), desc="gallery", disable=not progress, unit="fit")
    for name, fit in bar:
        start = time.perf_counter()
        fits[name] = fit()
        bar.set_postfix_str(f"{name} {time.perf_counter() - start:.1f} s")
    fits["rows"] = [{"flow": "planar", "K": config.num_flows, "energy": "U1", "kl": fits["U1"].diagnose().kl}]
    return fits
