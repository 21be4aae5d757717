"""A posterior for ArviZ: `InferenceData` for ArviZ 0.x, an xarray `DataTree` for 1.x, from the same groups.

Dimensions are named after plates, so that sites in one plate share a dimension; other dimensions of a site are
called `<site>_dim_<i>`. All draws of a flow form one chain: they are independent, so R-hat and the ESS of a chain
say nothing about the fit. What does is in the attributes: k-hat, ELBO, log evidence, the verdict. A refined posterior
has its real chains.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from flowvi._version import __version__
from flowvi.checks import flags, flags_or_none, one_of
from flowvi.errors import OptionError, TargetError
from flowvi.targets.model import ModelDensity

if TYPE_CHECKING:
    from flowvi.posterior import Posterior
    from flowvi.targets import LogDensity

__all__ = ["find_arviz", "to_arviz"]

_KINDS = ("inference_data", "datatree")
_DIMENSIONS = ("chain", "draw")  # of every draw, by ArviZ's convention
_CHUNK_ELEMENTS = 2**21  # of data and latents at a time, while the model is simulated


def to_arviz(
    posterior: Posterior,
    kind: str | None = None,
    *,
    num_samples: int = 4000,
    resample: bool = False,
    predictive: bool | None = None,
    seed: int | None = None,
) -> Any:
    """Draws, log densities, log likelihood, simulated data and data in ArviZ's groups.

    Groups: `posterior` (1 chain, or those of a refined posterior; all sites), `sample_stats` (lp = log p, log_q,
    log_weight = log p - log q) and, for a model with observed sites, `log_likelihood`, `posterior_predictive` (one
    data set simulated at each draw) and `observed_data`, as `az.loo` and `az.plot_ppc` want them. Both the top and the
    group `posterior` carry the attributes. For the draws of a flow, one chain, take `az.summary(data, kind="stats")`:
    R-hat needs more chains.

    Discrete latents are summed out of the log likelihood, datum by datum; observed sites that share one sum with
    others, as in a hidden Markov model, are left out of it, and the attribute `log_likelihood_left_out` names them.
    In the simulated data discrete latents are drawn anew from their prior, given the draw's continuous ones.

    Where the model takes its own data as a covariate too, as an autoregression does, the simulated data are one step
    ahead of the true ones.

    Args:
        posterior: The fit.
        kind: "inference_data" (ArviZ 0.x), "datatree" (1.x, or its part arviz-base), or None for what the
            installed ArviZ uses.
        num_samples: n, the number of draws.
        resample: Draws corrected by importance resampling (`Posterior.resample`) instead of draws of q.
        predictive: Whether data are simulated. None leaves the group out where the model can't be simulated (a
            distribution that has a density only); the attribute `predictive_left_out` says why.
        seed: Makes the call reproducible by itself; None continues the posterior's own sequence.

    Returns:
        An `arviz.InferenceData` or an `xarray.DataTree`.

    Raises:
        OptionError: An unknown kind, or one that the installed packages don't have; a site called "chain" or "draw".
        TargetError: `predictive=True` for a target that can't be simulated.
    """
    if kind is not None:
        one_of(_KINDS, kind=kind)
    flags(resample=resample)
    flags_or_none(predictive=predictive)
    kind, module = find_arviz(kind)
    density = posterior.density
    sites = (*density.sites, *density.deterministic, *density.observed_sites)
    shapes = {site.name: (site.shape, site.plates) for site in sites}
    taken = [name for name in _DIMENSIONS if name in shapes]
    if taken:  # ArviZ would leave it out, without a word
        raise OptionError(
            f"the site {taken[0]!r} of {density.name} has the name of one of ArviZ's dimensions, chain and draw, and "
            "would be lost: rename it in the model."
        )
    values, z, log_p, log_q = posterior._draws_with_densities(num_samples, resample=resample, seed=seed)
    num_chains = posterior._num_chains

    def chain(value: Tensor) -> np.ndarray:
        """(C n, ...) -> (C, n, ...)."""
        array = _array(value)
        return array.reshape(num_chains, -1, *array.shape[1:])

    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": {name: chain(value) for name, value in values.items()},
        "sample_stats": {"lp": chain(log_p), "log_q": chain(log_q), "log_weight": chain(log_p - log_q)},
    }
    if density.observed:
        log_likelihood = density.log_likelihood(z)
        if log_likelihood:
            groups["log_likelihood"] = {name: chain(value) for name, value in log_likelihood.items()}
        groups["observed_data"] = {name: _array(value) for name, value in density.observed.items()}
    attrs = _attributes(posterior, resample)
    if density.inseparable:
        names = ", ".join(density.inseparable)
        attrs["log_likelihood_left_out"] = f"these sites share one sum over discrete values: {names}"
        attrs["predictive_note"] = f"the discrete ones of these are drawn from their prior, given the draw: {names}"
    if predictive is not False:
        generator = posterior._generator(seed, "predictive")
        simulated = int(torch.randint(2**32, (), generator=generator, device=generator.device))
        try:
            found = _simulate(density, values, simulated)
            groups["posterior_predictive"] = {name: chain(value) for name, value in found.items()}
        except TargetError as error:
            if predictive:
                raise
            if density.observed:
                attrs["predictive_left_out"] = str(error)
    dims, coords = _name_dimensions(shapes)
    if kind == "datatree":
        return module.from_dict(groups, dims=dims, coords=coords, attrs={"/": attrs, "posterior": attrs})
    data = module.from_dict(**groups, dims=dims, coords=coords)
    data.attrs.update(attrs)
    data.posterior.attrs.update(attrs)
    return data


class _Unobserve(Messenger):
    """Draws the named sites instead of observing them, each of its data's shape."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] or msg["name"] not in self._names:
            return
        fn, shape = msg["fn"], torch.as_tensor(msg["value"]).shape
        batch = shape[: len(shape) - fn.event_dim]
        if fn.batch_shape != batch:  # a density that was broadcast over the data, without a plate
            fn = fn.expand(batch)
        # not rsample, which Pyro calls: that of a normal can't be batched
        msg["value"], msg["is_observed"], msg["done"] = fn.sample(), False, True


def _simulate(density: LogDensity, values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """One data set of the model at each draw: observed site -> (n, *shape), for all the data of a subsampled plate.

    All draws of a chunk at once by `torch.func.vmap`, which takes most models as they are; else one after the other, as
    Pyro's `Predictive` does. That one draws from the prior first, which an improper prior can't.
    """
    full = density.full
    if not isinstance(full, ModelDensity) or not full.observed_sites:
        raise TargetError(f"{density.name} has no observed site, so that there are no data to simulate.")
    shapes = {site.name: tuple(site.shape) for site in full.observed_sites}
    latent = {site.name: values[site.name] for site in full.sites}
    model = _Unobserve(shapes)(full.model)

    def one(given: dict[str, Tensor]) -> dict[str, Tensor]:
        with poutine.block(), poutine.trace() as tracer:
            poutine.condition(model, data=given)(*full.args, **full.kwargs)
        return {name: tracer.trace.nodes[name]["value"] for name in shapes}

    def together(given: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.func.vmap(one, randomness="different")(given)
        return found

    def one_by_one(given: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = [one({name: value[i] for name, value in given.items()}) for i in range(len(next(iter(given.values()))))]
        return {name: torch.stack([row[name] for row in rows]) for name in shapes}

    num = len(next(iter(values.values())))
    elements = sum(math.prod(shape) for shape in shapes.values()) + full.dim
    rows = max(1, _CHUNK_ELEMENTS // elements)
    out: dict[str, Tensor] = {}
    simulate = together if full.path == "graph" else one_by_one
    with full._runner.isolated(seed=seed), torch.no_grad():
        for start in range(0, num, rows):
            chunk = {name: value[start : start + rows] for name, value in latent.items()}
            try:
                found = _try(simulate, chunk)
            except TargetError:
                if simulate is one_by_one:
                    raise
                simulate = one_by_one
                found = _try(simulate, chunk)
            for name, value in found.items():
                if name not in out:
                    out[name] = value.new_empty((num, *shapes[name]))
                out[name][start : start + rows] = value.reshape(-1, *shapes[name])
    return out


def _try(simulate: Callable[[dict[str, Tensor]], dict[str, Tensor]], chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any failure as a `TargetError`: the model is the user's, and so is what it may raise without its data."""
    try:
        return simulate(chunk)
    except Exception as error:
        raise TargetError(
            f"the model can't be simulated without its data ({type(error).__name__}: {error}). to_arviz(predictive="
            "False) goes without the group posterior_predictive."
        ) from error


def find_arviz(kind: str | None = None) -> tuple[str, Any]:
    """The kind of data that the installed ArviZ takes, and the module whose `from_dict` makes it.

    Args:
        kind: As for `to_arviz`.

    Returns:
        "inference_data" or "datatree", and a module.

    Raises:
        OptionError: No ArviZ that makes this kind can be imported.
    """
    if kind is None:
        try:
            old = int(importlib.metadata.version("arviz").split(".")[0]) < 1
        except importlib.metadata.PackageNotFoundError:
            old = False
        kinds: Iterable[str] = ("inference_data", "datatree") if old else ("datatree",)
    else:
        kinds = (kind,)
    problem: Exception | None = None
    for choice in kinds:
        try:
            module = importlib.import_module("arviz" if choice == "inference_data" else "arviz_base")
        except Exception as error:  # not only ImportError: ArviZ 0.23 beside arviz-plots 0.8 and matplotlib 3.11
            problem = error
            continue
        if choice == "datatree" or hasattr(module, "InferenceData"):
            return choice, module
    remedy = "'arviz<1'" if kind == "inference_data" else "arviz, or arviz-base"
    raise OptionError(f"no ArviZ that makes this kind of data can be imported: pip install {remedy}. ({problem!r})")


def _name_dimensions(
    shapes: Mapping[str, tuple[Iterable[int], Iterable[str | None]]],
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Variable -> dimension names, and dimension -> coordinates 0, 1, ...; plates are shared."""
    dims: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for variable, (shape, plates) in shapes.items():
        plate_names = list(plates)
        dims[variable] = []
        for axis, size in enumerate(shape):
            own = f"{variable}_dim_{axis}"
            name = (plate_names[axis] if axis < len(plate_names) else None) or own
            if name in shapes or name in _DIMENSIONS:
                name = f"{name}_dim"  # xarray keeps this name for a variable
            if sizes.setdefault(name, size) != size:
                name = own  # a plate that was used with two sizes
                sizes[name] = size
            dims[variable].append(name)
    return dims, {name: np.arange(size) for name, size in sizes.items()}


def _attributes(posterior: Posterior, resample: bool) -> dict[str, Any]:
    """How the draws were made and what the diagnosis found: numbers and words, as netCDF can hold them."""
    diagnosis = posterior.diagnose()
    names = (
        "khat",
        "elbo",
        "elbo_se",
        "log_evidence",
        "log_evidence_se",
        "ess_fraction",
        "nonfinite_fraction",
        *(name for name in ("r_hat", "ess_bulk", "ess_tail") if hasattr(diagnosis, name)),
    )
    return {
        "inference_library": "flowvi",
        "inference_library_version": __version__,
        "pyro_version": str(pyro.__version__),
        "torch_version": str(torch.__version__),
        "flow": posterior._made_by(short=True),
        "resampled": int(resample),
        **{name: float(getattr(diagnosis, name)) for name in names},
        "trusted": int(diagnosis.trusted),
        "verdict": diagnosis.verdict,
    }


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
