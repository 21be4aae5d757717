"""What flowvi is compared with on a Pyro model: Pyro's own guides and NUTS, and NumPyro's NUTS, as users run them.

Each takes a `Known` posterior and gives draws of its sites. The guides: `SVI` with one particle (Pyro's default; the
models are not written to be vectorized over particles), 5,000 steps of Adam, lr from 1e-2 down to 1e-4. NUTS: one
chain, 1,000 warm-up steps and 1,000 draws, defaults. Where they start is Pyro's own choice, but for improper priors,
which it can't start: U(-2, 2), unconstrained. All in float64, as the data are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions import ImproperUniform
from pyro.distributions.transforms import iterated, planar
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

import flowvi
from experiments.posteriors import Known

__all__ = ["GUIDES", "has_numpyro", "numpyro_nuts", "pyro_guide", "pyro_nuts"]

LR, LR_END = 1e-2, 1e-4

GUIDES: Mapping[str, Callable[[Any], Any]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoNormalizingFlow, 16 planar": lambda model: AutoNormalizingFlow(model, partial(iterated, 16, planar)),
    "AutoIAFNormal": AutoIAFNormal,
}


class _Start(Messenger):
    """Where a site with an improper prior starts: U(-2, 2), unconstrained. Pyro starts all others by itself."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], ImproperUniform) and msg["value"] is None:
            transform = biject_to(msg["fn"].support)
            shape = transform.inverse_shape(msg["fn"].shape())
            msg["value"], msg["done"] = transform(4 * torch.rand(shape) - 2), True


@contextmanager
def _fresh(seed: int) -> Iterator[None]:
    """Pyro from a seed, in float64, and everything as it was afterwards."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()


def pyro_guide(known: Known, name: str, *, seed: int, num_steps: int, num_draws: int) -> dict[str, Tensor]:
    """A guide of Pyro's, fitted by SVI.

    Args:
        known: the posterior.
        name: one of `GUIDES`.
        seed: of everything.
        num_steps: of Adam.
        num_draws: draws of the fitted guide.

    Returns:
        Site -> draws (num_draws, *shape), deterministic sites included.
    """
    with _fresh(seed):
        guide = GUIDES[name](_Start()(known.model))
        decay = (LR_END / LR) ** (1 / num_steps)
        svi = SVI(known.model, guide, pyro.optim.ClippedAdam({"lr": LR, "lrd": decay}), Trace_ELBO())
        for _ in range(num_steps):
            svi.step(known.data)
        with torch.no_grad():
            draws = _sites(guide, _latent(guide, known, num_draws))
        return with_deterministic(known, draws)


def _latent(guide: Any, known: Known, num_draws: int) -> Tensor:
    """Draws of all sites' unconstrained coordinates side by side (num_draws, D)."""
    if not isinstance(guide, AutoNormal):
        return guide.get_posterior(known.data).sample((num_draws,))
    moments = [guide._get_loc_and_scale(name) for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    loc, scale = (torch.cat([moment[i].reshape(-1) for moment in moments]) for i in (0, 1))
    return loc + scale * torch.randn(num_draws, len(loc))


def _sites(guide: Any, latent: Tensor) -> dict[str, Tensor]:
    """The constrained sites; Pyro's own unpacking does not take a batch beside a plate."""
    draws, start = {}, 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        transform = biject_to(site["fn"].support)
        shape = transform.inv(site["value"]).shape
        draws[name] = transform(latent[:, start : start + shape.numel()].reshape(-1, *shape))
        start += shape.numel()
    return draws


def pyro_nuts(known: Known, *, seed: int, num_warmup: int, num_draws: int) -> dict[str, Tensor]:
    """Pyro's NUTS, one chain, its defaults.

    Args:
        known: the posterior.
        seed: of everything.
        num_warmup: steps of the adaptation.
        num_draws: steps that are kept.

    Returns:
        As for `pyro_guide`.
    """
    with _fresh(seed):
        mcmc = MCMC(NUTS(_Start()(known.model)), num_samples=num_draws, warmup_steps=num_warmup, disable_progbar=True)
        mcmc.run(known.data)
        return with_deterministic(known, mcmc.get_samples())


def has_numpyro() -> bool:
    """Whether NumPyro and JAX can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("numpyro", "jax"))


def numpyro_nuts(known: Known, *, seed: int, num_warmup: int, num_draws: int) -> dict[str, Tensor]:
    """NumPyro's NUTS, one chain, its defaults, compiling included; see `pyro_nuts`.

    Raises:
        ImportError: NumPyro is not installed.
        KeyError: the posterior has no NumPyro model in `experiments.numpyro_models`.
    """
    from experiments.numpyro_models import nuts

    draws = nuts(known.name, known.data, seed=seed, num_warmup=num_warmup, num_draws=num_draws)
    return with_deterministic(known, {name: torch.as_tensor(value) for name, value in draws.items()})


@torch.no_grad()
def with_deterministic(known: Known, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The draws with the model's deterministic sites beside them."""
    if set(known.mean) <= set(draws):
        return dict(draws)
    density = flowvi.as_density(known.model, args=(known.data,), dtype=torch.float64)
    z, _ = density.unconstrain({site.name: draws[site.name].double() for site in density.sites})
    return {**density.constrain(z), **draws}
