"""Three posteriors with hundreds of latents, simulated data, and the answers of long NUTS to judge by.

Every model is written as an ordinary user writes it: unbatched, plates where there are data, a loop over time. Their
twins for NumPyro are in `experiments.large_numpyro`, whose NUTS made `large_references.json`; the command that makes
it again is ``python -m experiments large --make-references``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from experiments.posteriors import Data, Known
from flowvi.errors import OptionError

REFERENCES = Path(__file__).with_name("large_references.json")
NUM_GROUPS, NUM_ROWS = 100, 1000
NUM_COEFFICIENTS, NUM_EFFECTS, NUM_TIMES = 48, 5, 147


@dataclass(frozen=True)
class Model:
    """A model, its data, and how it is judged.

    Attributes:
        name: what to call it.
        model: the Pyro model, called with `data`.
        make: seeded data.
        scales: positive sites, judged by their logarithms.
        seconds: that an answer may take, `refine()` included.
    """

    name: str
    model: Callable[[Data], None]
    make: Callable[[], dict[str, Tensor]]
    scales: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Large(Known):
    """A `Known` posterior whose mean and std are those of the logarithms at `scales`."""

    scales: tuple[str, ...] = ()
    seconds: float = math.inf

    def errors(self, draws: Mapping[str, Tensor]) -> tuple[float, float]:
        """See `Known.errors`; the draws of the scales are not yet logarithms."""
        return super().errors(judged(draws, self.scales))


def judged(draws: Mapping[str, Tensor], scales: tuple[str, ...]) -> dict[str, Tensor]:
    """The draws, with logarithms at the sites of `scales`."""
    return {site: x.log() if site in scales else x for site, x in draws.items()}


# The models.


def hierarchical(d: Data) -> None:
    """Varying intercepts and slopes, centered: 100 groups, 1,000 rows, D = 205."""
    mu_a, mu_b = pyro.sample("mu_a", dist.Normal(0.0, 5.0)), pyro.sample("mu_b", dist.Normal(0.0, 5.0))
    tau_a, tau_b = pyro.sample("tau_a", dist.HalfNormal(2.0)), pyro.sample("tau_b", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", NUM_GROUPS):
        a = pyro.sample("a", dist.Normal(mu_a, tau_a))
        b = pyro.sample("b", dist.Normal(mu_b, tau_b))
    group = d["group"].long()
    with pyro.plate("rows", len(d["y"])):
        pyro.sample("y", dist.Normal(a[group] + b[group] * d["x"], sigma), obs=d["y"])


def horseshoe(d: Data) -> None:
    """Regularized horseshoe regression (Piironen & Vehtari 2017, appendix C): 48 coefficients, 100 rows, D = 100."""
    p = d["x"].shape[1]
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(NUM_EFFECTS / (p - NUM_EFFECTS) / len(d["y"]) ** 0.5))
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 8.0))
    with pyro.plate("coefficients", p):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        lam = pyro.sample("lambda", dist.HalfCauchy(1.0))
        shrunk = lam * (slab / (slab + tau**2 * lam**2)).sqrt()
        beta = pyro.deterministic("beta", z * tau * shrunk)
    with pyro.plate("rows", len(d["y"])):
        pyro.sample("y", dist.Normal(intercept + d["x"] @ beta, sigma), obs=d["y"])


def volatility(d: Data) -> None:
    """Stochastic volatility, an AR(1) of log variances by its innovations: 147 days, D = 150."""
    y = d["y"]
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    eps = pyro.sample("eps", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    h = [mu + sigma * eps[0] / (1 - phi**2).sqrt()]
    for t in range(1, len(y)):
        h.append(mu + phi * (h[-1] - mu) + sigma * eps[t])
    with pyro.plate("days", len(y)):
        pyro.sample("y", dist.Normal(0.0, (torch.stack(h) / 2).exp()), obs=y)


# Their data.


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _hierarchical_data() -> dict[str, Tensor]:
    normal = _normal(1)
    group = torch.arange(NUM_ROWS) % NUM_GROUPS
    group[NUM_ROWS // 2 :] = (NUM_GROUPS * normal(NUM_ROWS // 2).abs().clamp(max=2.99) / 3).long()  # unequal sizes
    a, b = 1.0 + 0.8 * normal(NUM_GROUPS), -0.5 + 0.5 * normal(NUM_GROUPS)
    x = normal(NUM_ROWS)
    return {"group": group, "x": x, "y": a[group] + b[group] * x + normal(NUM_ROWS)}


def _horseshoe_data() -> dict[str, Tensor]:
    normal, rows = _normal(2), 100
    x = normal(rows, NUM_COEFFICIENTS)
    x[:, 1::2] = 0.6 * x[:, ::2] + 0.8 * x[:, 1::2]  # pairs of correlated columns
    beta = torch.zeros(NUM_COEFFICIENTS, dtype=torch.float64)
    beta[::10] = torch.tensor([2.0, -1.5, 1.0, 0.7, -0.4], dtype=torch.float64)
    return {"x": x, "y": 0.5 + x @ beta + normal(rows)}


def _volatility_data() -> dict[str, Tensor]:
    normal = _normal(3)
    mu, phi, sigma = -0.5, 0.95, 0.3
    h = [mu + sigma * normal(1) / math.sqrt(1 - phi**2)]
    for _ in range(1, NUM_TIMES):
        h.append(mu + phi * (h[-1] - mu) + sigma * normal(1))
    return {"y": (torch.cat(h) / 2).exp() * normal(NUM_TIMES)}


MODELS: Mapping[str, Model] = {
    m.name: m
    for m in (
        Model("hierarchical", hierarchical, _hierarchical_data, ("tau_a", "tau_b", "sigma"), 180.0),
        Model("horseshoe", horseshoe, _horseshoe_data, ("sigma", "tau", "slab", "lambda"), 600.0),
        Model("volatility", volatility, _volatility_data, ("sigma",), 180.0),
    )
}


def read_references(path: Path = REFERENCES) -> dict[str, Any]:
    """What `large_numpyro.references` gave, by model.

    Raises:
        OptionError: there is no such file.
    """
    if not path.is_file():
        raise OptionError(f"no references at {path}: python -m experiments large --make-references makes them.")
    return json.loads(path.read_text(encoding="utf-8"))


def load(path: Path = REFERENCES) -> list[Large]:
    """The three posteriors with the means and sds of long NUTS."""
    found = read_references(path)
    out = []
    for name, model in MODELS.items():
        mean, std = (
            {site: torch.tensor(x, dtype=torch.float64) for site, x in found[name][key].items()}
            for key in ("mean", "std")
        )
        out.append(Large(name, model.model, model.make(), mean, std, scales=model.scales, seconds=model.seconds))
    return out
