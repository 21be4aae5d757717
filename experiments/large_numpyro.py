"""The models of `experiments.large_models` once more, for NumPyro, and the long NUTS runs that flowvi is judged by.

Imported only where NumPyro is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from experiments.large_models import MODELS, NUM_EFFECTS, NUM_GROUPS, judged

__all__ = ["TWINS", "references"]

NUM_CHAINS, NUM_WARMUP, NUM_DRAWS = 4, 2000, 5000
ACCEPTANCE = 0.95

Data = Mapping[str, Any]


def hierarchical(d: Data) -> None:
    mu_a = numpyro.sample("mu_a", dist.Normal(0.0, 5.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 5.0))
    tau_a = numpyro.sample("tau_a", dist.HalfNormal(2.0))
    tau_b = numpyro.sample("tau_b", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("groups", NUM_GROUPS):
        a = numpyro.sample("a", dist.Normal(mu_a, tau_a))
        b = numpyro.sample("b", dist.Normal(mu_b, tau_b))
    numpyro.sample("y", dist.Normal(a[d["group"]] + b[d["group"]] * d["x"], sigma), obs=d["y"])


def horseshoe(d: Data) -> None:
    rows, p = d["x"].shape
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(NUM_EFFECTS / (p - NUM_EFFECTS) / rows**0.5))
    slab = numpyro.sample("slab", dist.InverseGamma(2.0, 8.0))
    with numpyro.plate("coefficients", p):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        lam = numpyro.sample("lambda", dist.HalfCauchy(1.0))
        shrunk = lam * jnp.sqrt(slab / (slab + tau**2 * lam**2))
        beta = numpyro.deterministic("beta", z * tau * shrunk)
    numpyro.sample("y", dist.Normal(intercept + d["x"] @ beta, sigma), obs=d["y"])


def volatility(d: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    eps = numpyro.sample("eps", dist.Normal(jnp.zeros(len(d["y"])), 1.0).to_event(1))

    def forward(h: Any, e: Any) -> tuple[Any, Any]:
        h = mu + phi * (h - mu) + sigma * e
        return h, h

    first = mu + sigma * eps[0] / jnp.sqrt(1 - phi**2)
    _, rest = jax.lax.scan(forward, first, eps[1:])
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(jnp.append(first, rest) / 2)), obs=d["y"])


TWINS: Mapping[str, Callable[[Data], None]] = {
    "hierarchical": hierarchical,
    "horseshoe": horseshoe,
    "volatility": volatility,
}


def references(
    name: str, *, num_chains: int = NUM_CHAINS, num_warmup: int = NUM_WARMUP, num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Long NUTS on one model: what `large_models.load` reads.

    Args:
        name: one of `TWINS`.
        num_chains: run one after the other.
        num_warmup: steps of the adaptation.
        num_draws: that each chain keeps.
        seed: of everything.

    Returns:
        Means and sds by site, of the logarithm where the site is a scale; the worst R-hat and the least ESS; the
        errors of the reference itself, from halves of the chains; divergences and seconds.
    """
    numpyro.enable_x64()
    data = {key: np.asarray(value) for key, value in MODELS[name].make().items()}
    kernel = NUTS(TWINS[name], target_accept_prob=ACCEPTANCE)
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_draws,
        num_chains=num_chains,
        chain_method="sequential",
        progress_bar=False,
    )
    start = time.perf_counter()
    mcmc.run(jax.random.PRNGKey(seed), data)
    raw = {key: torch.tensor(np.array(x)) for key, x in mcmc.get_samples(group_by_chain=True).items()}
    seconds = time.perf_counter() - start
    draws = judged(raw, MODELS[name].scales)
    mean = {key: x.mean((0, 1)) for key, x in draws.items()}
    std = {key: x.flatten(0, 1).std(0) for key, x in draws.items()}
    half = num_chains // 2
    halves = [{key: x[part].flatten(0, 1) for key, x in draws.items()} for part in (slice(half), slice(half, None))]
    # the halves differ by about twice as much as the whole is off
    off_mean = max(float(((halves[0][k].mean(0) - halves[1][k].mean(0)) / std[k]).abs().max()) for k in draws) / 2
    off_std = max(float(((halves[0][k].std(0) - halves[1][k].std(0)) / std[k]).abs().max()) for k in draws) / 2
    return {
        "mean": {key: _rounded(x) for key, x in mean.items()},
        "std": {key: _rounded(x) for key, x in std.items()},
        "r_hat": round(max(float(np.max(split_gelman_rubin(x.numpy()))) for x in draws.values()), 4),
        "ess": round(min(float(np.min(effective_sample_size(x.numpy()))) for x in draws.values())),
        "error_mean": round(off_mean, 4),
        "error_sd": round(off_std, 4),
        "divergences": int(mcmc.get_extra_fields()["diverging"].sum()),
        "chains": [num_chains, num_warmup, num_draws],
        "seconds": round(seconds, 1),
        "numpyro": numpyro.__version__,
    }


def _rounded(x: torch.Tensor) -> Any:
    """Six digits, as plain numbers."""
    return np.vectorize(lambda v: float(f"{v:.6g}"))(x.numpy()).tolist()
