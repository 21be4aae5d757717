"""Are fits right over the data sets that the model itself makes? Simulation-based calibration of three models.

Each is fitted to data simulated from its prior, always with the same options: short fits, whose errors may be seen in
the ranks of the true values among their draws (`flowvi.sbc`). The ranks must be uniform among draws corrected by
importance resampling, and must not be among draws that are spoiled in z: pulled together about their mean to .7 of
their width, or shifted by .3 sd.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import flowvi
from experiments.report import Report, require_matplotlib
from flowvi import Calibration, Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Simulation-based calibration: ranks of true values among draws of the fits"

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COVARIATES = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
SPOILED: Mapping[str, tuple[float, float]] = {"width x .7": (0.7, 0.0), "shift .3 sd": (1.0, 0.3)}
"""How draws are spoiled: their width is multiplied, and their mean shifted in sds."""
WAYS = ("as fitted", "resampled", *SPOILED)


def normal(y: Tensor) -> None:
    """A mean and a precision, conjugate: y ~ N(mu, 1 / tau), mu ~ N(0, 1 / tau), tau ~ Gamma(3, 3)."""
    tau = pyro.sample("tau", dist.Gamma(3.0, 3.0))
    mu = pyro.sample("mu", dist.Normal(0.0, tau.rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools (Rubin 1981), not centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic(y: Tensor, x: Tensor) -> None:
    """A logistic regression with three covariates."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a + x @ b), obs=y)


MODELS: Mapping[str, tuple[Callable[..., None], tuple[Tensor, ...]]] = {
    "normal": (normal, (torch.zeros(10),)),
    "eight schools": (eight_schools, (torch.zeros(8), SIGMA)),
    "logistic": (logistic, (torch.zeros(60), COVARIATES)),
}


@dataclass(frozen=True)
class Config:
    """Everything the rows depend on."""

    seed: int = 0
    num_simulations: int = 200
    num_draws: int = 199
    flow: str = "planar"
    num_flows: int = 16
    num_steps: int = 500
    alpha: float = 0.01

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Few simulations, to see that it works: not the figures to quote."""
        return cls(seed, num_simulations=20, num_steps=100)


class Fits:
    """Fits of one model, each made once: the same data come again for each way of spoiling.

    Args:
        name: the model's.
        config: the options.
    """

    def __init__(self, name: str, config: Config) -> None:
        self.model, self.args = MODELS[name]
        self.config = config
        self._known: dict[bytes, Posterior] = {}

    def calibrate(self, way: str, progress: bool | None = None) -> Calibration:
        """The ranks of draws taken so; the log-likelihood's too, but for spoiled ones."""
        config = self.config
        return flowvi.sbc(
            self.model,
            self.args,
            fit=lambda data: self._draws(data["y"], way),
            log_likelihood=way not in SPOILED,
            num_simulations=config.num_simulations,
            num_draws=config.num_draws,
            alpha=config.alpha,
            seed=config.seed,
            progress=progress,
        )

    def _draws(self, y: Tensor, way: str) -> Posterior | dict[str, Tensor]:
        key = y.numpy().tobytes()
        if key not in self._known:
            c = self.config
            self._known[key] = flowvi.fit(
                self.model,
                (y, *self.args[1:]),
                flow=c.flow,
                num_flows=c.num_flows,
                num_steps=c.num_steps,
                compile=False,
                seed=len(self._known),
                progress=False,
                verify=False,
            )
        posterior = self._known[key]
        if way == "as fitted":
            return posterior
        if way == "resampled":
            return posterior.resample(self.config.num_draws, seed=1)
        width, shift = SPOILED[way]
        z, _ = posterior.density.unconstrain(posterior.sample(self.config.num_draws, seed=1))
        mean = z.mean(0)
        return posterior.density.constrain(mean + width * (z - mean) + shift * z.std(0))


def run(config: Config, progress: bool | None = None) -> Report:
    """Calibrate all models: as fitted, corrected, and spoiled.

    Args:
        config: what to do.
        progress: whether bars are shown; None shows them in a terminal.
    """
    require_matplotlib()
    start = time.perf_counter()
    found: dict[tuple[str, str], Calibration] = {}
    for name in MODELS:
        fits = Fits(name, config)
        for way in WAYS:
            found[name, way] = fits.calibrate(way, progress)
    rows = [_row(*key, calibration) for key, calibration in found.items()]
    notes = [
        f"N = {config.num_simulations} data sets a model from its prior, {config.num_draws} draws of each posterior; "
        f"{config.flow}, K = {config.num_flows}, {config.num_steps} steps.",
        "The test: ECDF of the ranks, simultaneous over its steps (Säilynoja et al. 2022), Holm over the quantities: "
        f"all elements of all sites, and the log-likelihood; passed where the smallest p is above {config.alpha:g}.",
        "Not trusted: by k-hat, without the short HMC. These fits' ranks are counted like all others.",
        "Resampled: corrected by importance weights, `Posterior.resample`. As fitted, a short fit may fail the test.",
    ]
    table = [
        {
            "model": row["model"],
            "draws": row["draws"],
            "quantities": str(row["quantities"]),
            "simulations": str(row["simulations"]),
            "failed": str(row["failed"]),
            "not trusted": "" if row["untrusted"] is None else str(row["untrusted"]),
            "smallest p (Holm)": f"{row['p']:.2g}",
            "of": row["worst"],
            "passed": "yes" if row["passed"] else "no",
        }
        for row in rows
    ]
    return Report("calibration", TITLE, config, rows, table, notes, draw(found), time.perf_counter() - start)


def _row(model: str, way: str, found: Calibration) -> dict[str, Any]:
    worst = min(found.names, key=lambda name: found.p_values[name])
    return {
        "model": model,
        "draws": way,
        "quantities": len(found.names),
        "simulations": found.num_simulations,
        "failed": len(found.failures),
        "untrusted": None if all(t is None for t in found.trusted) else found.num_untrusted,
        "p": found.adjusted[worst],
        "worst": worst,
        "mean_rank": float(found.pit[:, found.names.index(worst)].mean()),
        "spread": float(found.pit[:, found.names.index(worst)].std() * math.sqrt(12)),
        "chi_square_p": found.chi_square[worst],
        "passed": found.passed,
    }


def draw(found: Mapping[tuple[str, str], Calibration]) -> Figure:
    """For each model and way the quantity with the smallest p-value: ECDF of its ranks, with the test's band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    grid = figure.subplots(len(MODELS), len(WAYS), squeeze=False, sharex=True, sharey=True)
    for ((model, way), calibration), axis in zip(found.items(), grid.ravel(), strict=True):
        worst = min(calibration.names, key=lambda name: calibration.p_values[name])
        calibration.plot(names=[worst], ax=axis)
        axis.set_title(f"{model}, {way}: {worst}\np = {calibration.adjusted[worst]:.2g}", fontsize="medium")
        axis.label_outer()
    return figure
