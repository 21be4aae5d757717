"""Posteriors with trusted answers: six from posteriordb by their draws, four conjugate ones by formula.

The six, with 10,000 draws each, are read from a folder (``--references``) that holds one folder each with
data.npz and draws.npz (posteriordb, BSD-3: github.com/stan-dev/posteriordb). The four need nothing.
Every model is written as an ordinary user writes it: unbatched, plates where there are data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from flowvi.errors import OptionError

Data = Mapping[str, Tensor]


@dataclass(frozen=True)
class Known:
    """A model, its data, and the true means and standard deviations.

    Attributes:
        name: what to call it.
        model: the Pyro model, called with `data`.
        data: its argument.
        mean: site -> true mean, of the site's shape.
        std: site -> true standard deviation.
        log_evidence: log p(data), where it is known.
    """

    name: str
    model: Callable[[Data], None]
    data: Data
    mean: Mapping[str, Tensor]
    std: Mapping[str, Tensor]
    log_evidence: float | None = None

    def errors(self, draws: Mapping[str, Tensor]) -> tuple[float, float]:
        """The worst error of a mean, in true sds, and the worst relative error of an sd.

        Args:
            draws: site -> (n, *shape).
        """
        worst_mean = worst_std = 0.0
        for site, mean in self.mean.items():
            x, std = draws[site].double(), self.std[site]
            worst_mean = max(worst_mean, ((x.mean(0) - mean).abs() / std).max().item())
            worst_std = max(worst_std, (x.std(0) / std - 1).abs().max().item())
        return worst_mean, worst_std


# The six of posteriordb.


def eight_schools(d: Data) -> None:
    """Eight schools, not centered."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(d["y"])):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def kidscore(d: Data) -> None:
    """A regression of children's test scores."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * d["mom_hs"] + beta[2] * d["mom_iq"]
    with pyro.plate("children", len(mean)):
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=d["kid_score"])


def autoregression(d: Data) -> None:
    """AR(5)."""
    y, order = d["y"], int(d["K"])
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha + sum(beta[k] * y[order - k - 1 : len(y) - k - 1] for k in range(order))
    with pyro.plate("times", len(y) - order):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y[order:])


def mesquite(d: Data) -> None:
    """A log-log regression of the mass of mesquite bushes; coordinates correlated up to .99."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (6,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    area = d["diam1"] * d["diam2"]
    columns = [area * d["canopy_height"], area, d["diam1"] / d["diam2"], d["total_height"]]
    x = torch.stack([torch.ones_like(area), *[c.log() for c in columns], d["group"]], 1)
    with pyro.plate("bushes", len(x)):
        pyro.sample("log_weight", dist.Normal(x @ beta, sigma), obs=d["weight"].log())


def gauss_mix(d: Data) -> None:
    """A mixture of two normals, ordered."""
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(d["y"])):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=d["y"])


def gp_regression(d: Data) -> None:
    """The hyperparameters of a Gaussian process."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    square = (d["x"][:, None] - d["x"]) ** 2
    cov = alpha**2 * torch.exp(-square / (2 * rho**2)) + sigma * torch.eye(len(d["x"]))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(d["x"])), cov), obs=d["y"])


REFERENCES: Mapping[str, Callable[[Data], None]] = {
    "eight_schools_noncentered": eight_schools,
    "kidscore_momhsiq": kidscore,
    "arK": autoregression,
    "logmesquite_logvash": mesquite,
    "low_dim_gauss_mix": gauss_mix,
    "gp_regr": gp_regression,
}


def load_references(folder: Path) -> list[Known]:
    """The posteriors whose data and draws are in `folder`.

    Args:
        folder: holds one folder for each name in `REFERENCES`, with data.npz and draws.npz.

    Raises:
        OptionError: the folder is not there, or holds none of them.
    """
    found = []
    for name, model in REFERENCES.items():
        here = folder / name
        if not (here / "data.npz").is_file():
            continue
        data = {k: torch.as_tensor(v).double() for k, v in np.load(here / "data.npz").items()}
        draws = {k: torch.as_tensor(v).double() for k, v in np.load(here / "draws.npz").items()}
        mean = {k: v.mean(0) for k, v in draws.items()}
        found.append(Known(name, model, data, mean, {k: v.std(0) for k, v in draws.items()}))
    if not found:
        raise OptionError(f"no reference posteriors in {folder}: it should hold {', '.join(REFERENCES)}.")
    return found


# The four with exact answers. Data are made here, from fixed seeds.


def normal_mean(d: Data) -> None:
    """Y ~ N(mu, 1), mu ~ N(0, 3)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(d["y"])):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=d["y"])


def linear_regression(d: Data) -> None:
    """Y = x b + noise of sd .5, b ~ N(0, I): ten correlated coefficients."""
    x = d["x"]
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 0.5), obs=d["y"])


def beta_binomial(d: Data) -> None:
    """Six successes of ten, and none of five, p ~ Beta(2, 2) each."""
    with pyro.plate("groups", len(d["n"])):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Binomial(d["n"], p), obs=d["y"])


def gamma_poisson(d: Data) -> None:
    """Three counts, rate ~ Gamma(2, 1) each."""
    with pyro.plate("groups", len(d["y"])):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Poisson(rate), obs=d["y"])


def exact() -> list[Known]:
    """Four conjugate posteriors, with their evidence."""
    generator = torch.Generator().manual_seed(0)
    y = 1.5 + torch.randn(20, generator=generator, dtype=torch.float64)
    precision = torch.tensor(len(y) + 1 / 9, dtype=torch.float64)
    out = [
        Known(
            "normal mean",
            normal_mean,
            {"y": y},
            {"mu": y.sum() / precision},
            {"mu": precision.rsqrt()},
            _gaussian_evidence(y, torch.eye(len(y)).double() + 9.0),
        )
    ]
    mix = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 10, generator=generator, dtype=torch.float64) @ (torch.eye(10) + 0.5 * mix).double()
    y = x @ torch.randn(10, generator=generator, dtype=torch.float64)
    y = y + 0.5 * torch.randn(50, generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv(torch.eye(10).double() + x.mT @ x / 0.25)
    out.append(
        Known(
            "linear regression",
            linear_regression,
            {"x": x, "y": y},
            {"b": covariance @ x.mT @ y / 0.25},
            {"b": covariance.diagonal().sqrt()},
            _gaussian_evidence(y, 0.25 * torch.eye(50).double() + x @ x.mT),
        )
    )
    n, k = torch.tensor([10.0, 5.0]).double(), torch.tensor([6.0, 0.0]).double()
    beta = dist.Beta(2 + k, 2 + n - k)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    evidence = log_choose + _log_beta(2 + k, 2 + n - k) - _log_beta(torch.tensor(2.0), torch.tensor(2.0))
    out.append(
        Known(
            "beta-binomial",
            beta_binomial,
            {"n": n, "y": k},
            {"p": beta.mean},
            {"p": beta.stddev},
            evidence.sum().item(),
        )
    )
    counts = torch.tensor([0.0, 3.0, 11.0]).double()
    gamma = dist.Gamma(2 + counts, torch.tensor(2.0).double())
    evidence = torch.lgamma(2 + counts) - torch.lgamma(counts + 1) - (2 + counts) * math.log(2)
    out.append(
        Known(
            "gamma-Poisson",
            gamma_poisson,
            {"y": counts},
            {"rate": gamma.mean},
            {"rate": gamma.stddev},
            evidence.sum().item(),
        )
    )
    return out


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _gaussian_evidence(y: Tensor, covariance: Tensor) -> float:
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()


def posteriors(references: Path | None) -> list[Known]:
    """Those of a folder, or, without one, the four with exact answers."""
    return exact() if references is None else load_references(references)
