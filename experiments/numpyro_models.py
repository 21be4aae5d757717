"""The models of `experiments.posteriors` once more, for NumPyro: the same densities, written as its users would.

Imported only where NumPyro is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from torch import Tensor

__all__ = ["MODELS", "nuts"]

Data = Mapping[str, Any]


def eight_schools(d: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(d["y"])):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def kidscore(d: Data) -> None:
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * d["mom_hs"] + beta[2] * d["mom_iq"]
    numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=d["kid_score"])


def autoregression(d: Data) -> None:
    y, order = d["y"], int(d["K"])
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = jnp.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], 1)
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def mesquite(d: Data) -> None:
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (6,)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    area = d["diam1"] * d["diam2"]
    columns = [area * d["canopy_height"], area, d["diam1"] / d["diam2"], d["total_height"]]
    x = jnp.stack([jnp.ones_like(area), *[jnp.log(c) for c in columns], d["group"]], 1)
    numpyro.sample("log_weight", dist.Normal(x @ beta, sigma), obs=jnp.log(d["weight"]))


def gauss_mix(d: Data) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=d["y"])


def gp_regression(d: Data) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    square = (d["x"][:, None] - d["x"]) ** 2
    cov = alpha**2 * jnp.exp(-square / (2 * rho**2)) + sigma * jnp.eye(len(d["x"]))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(d["x"])), cov), obs=d["y"])


def normal_mean(d: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=d["y"])


def linear_regression(d: Data) -> None:
    b = numpyro.sample("b", dist.Normal(jnp.zeros(d["x"].shape[1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(d["x"] @ b, 0.5), obs=d["y"])


def beta_binomial(d: Data) -> None:
    with numpyro.plate("groups", len(d["n"])):
        p = numpyro.sample("p", dist.Beta(2.0, 2.0))
        numpyro.sample("y", dist.Binomial(d["n"].astype(int), p), obs=d["y"])


def gamma_poisson(d: Data) -> None:
    with numpyro.plate("groups", len(d["y"])):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Poisson(rate), obs=d["y"])


MODELS: Mapping[str, Callable[[Data], None]] = {
    "eight_schools_noncentered": eight_schools,
    "kidscore_momhsiq": kidscore,
    "arK": autoregression,
    "logmesquite_logvash": mesquite,
    "low_dim_gauss_mix": gauss_mix,
    "gp_regr": gp_regression,
    "normal mean": normal_mean,
    "linear regression": linear_regression,
    "beta-binomial": beta_binomial,
    "gamma-Poisson": gamma_poisson,
}


def nuts(name: str, data: Mapping[str, Tensor], *, seed: int, num_warmup: int, num_draws: int) -> dict[str, Any]:
    """One chain of NUTS in float64.

    Args:
        name: one of `MODELS`.
        data: its data.
        seed: of everything.
        num_warmup: steps of the adaptation.
        num_draws: steps that are kept.

    Returns:
        Site -> draws (num_draws, *shape), as NumPy arrays.
    """
    numpyro.enable_x64()
    jax.clear_caches()  # so that every run pays for its own compiling
    arrays = {key: np.asarray(value) for key, value in data.items()}
    mcmc = MCMC(NUTS(MODELS[name]), num_warmup=num_warmup, num_samples=num_draws, progress_bar=False)
    mcmc.run(jax.random.PRNGKey(seed), arrays)
    return {key: np.array(value) for key, value in mcmc.get_samples().items()}
