"""A posterior for ArviZ: `InferenceData` for ArviZ 0.x, an xarray `DataTree` for 1.x, from the same groups.

Dimensions are named after plates, so that sites in one plate share a dimension; other dimensions of a site are
called `<site>_dim_<i>`. All draws of a flow form one chain: they are independent, so R-hat and the ESS of a chain
say nothing about the fit. What does is in the attributes: k-hat, ELBO, log evidence, the verdict. A refined posterior
has its real chains.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flowvi._version import __version__
from flowvi.errors import OptionError

if TYPE_CHECKING:
    from flowvi.posterior import Posterior

__all__ = ["to_arviz"]

_KINDS = ("inference_data", "datatree")


def to_arviz(
    posterior: Posterior,
    kind: str | None = None,
    *,
    num_samples: int = 4000,
    resample: bool = False,
    seed: int | None = None,
) -> Any:
    """Draws, log densities, log likelihood and data in ArviZ's groups.

    Groups: `posterior` (1 chain, or those of a refined posterior; all sites), `sample_stats` (lp = log p, log_q,
    log_weight = log p - log q) and, for a model with observed sites, `log_likelihood` and `observed_data`, as `az.loo`
    wants them. Both the top and the group `posterior` carry the attributes.

    Args:
        posterior: The fit.
        kind: "inference_data" (ArviZ 0.x), "datatree" (1.x, or its part arviz-base), or None for what the
            installed ArviZ uses.
        num_samples: n, the number of draws.
        resample: Draws corrected by importance resampling (`Posterior.resample`) instead of draws of q.
        seed: Makes the call reproducible by itself; None continues the posterior's own sequence.

    Returns:
        An `arviz.InferenceData` or an `xarray.DataTree`.

    Raises:
        OptionError: An unknown kind, or one that the installed packages don't have.
    """
    if kind is not None and kind not in _KINDS:
        raise OptionError(f"kind must be one of {', '.join(_KINDS)} or None, got {kind!r}.")
    kind, module = _library(kind)
    density = posterior.density
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
    sites = (*density.sites, *density.deterministic, *density.observed_sites)
    shapes = {site.name: (site.shape, site.plates) for site in sites}
    if density.observed:
        log_likelihood = density.log_likelihood(z)
        groups["log_likelihood"] = {name: chain(value) for name, value in log_likelihood.items()}
        groups["observed_data"] = {name: _array(value) for name, value in density.observed.items()}
    dims, coords = _name_dimensions(shapes)
    attrs = _attributes(posterior, resample)
    if kind == "datatree":
        return module.from_dict(groups, dims=dims, coords=coords, attrs={"/": attrs, "posterior": attrs})
    data = module.from_dict(**groups, dims=dims, coords=coords)
    data.attrs.update(attrs)
    data.posterior.attrs.update(attrs)
    return data


def _library(kind: str | None) -> tuple[str, Any]:
    """The kind to make and the module whose `from_dict` makes it."""
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
            if name in shapes or name in ("chain", "draw"):
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
        "flow": posterior._made_by(short=True),
        "resampled": int(resample),
        **{name: float(getattr(diagnosis, name)) for name in names},
        "trusted": int(diagnosis.trusted),
        "verdict": diagnosis.verdict,
    }


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
