"""Models side by side: by their evidence, and by how well they predict data that they have not seen (LOO)."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowvi.checks import flags
from flowvi.diagnostics import Diagnostics
from flowvi.errors import DimensionError, OptionError, UntrustedWarning
from flowvi.inference_data import find_arviz
from flowvi.posterior import Posterior

__all__ = ["compare"]

_LOO_DRAWS = 4000
_LOO_ELEMENTS = 2**25  # of draws times data


def compare(posteriors: Mapping[str, Posterior], *, num_samples: int | None = None, loo: bool = True) -> Any:
    """Posteriors of different models of the same data, the best evidence first, with LOO beside it.

    Bayesian model comparison: with equal prior probabilities, p(model | data) is proportional to the evidence
    Z = integral of p(data | z) p(z) dz. The evidence depends on the priors, however much data there is: it means
    nothing where one is improper or was chosen carelessly wide.

    Log Z is estimated by importance sampling from the flow, or by bridge sampling for a refined posterior. Its
    standard error can be relied on where k-hat is below 0.5, or the posterior is refined (and then it is infinite
    where it can't).

    LOO asks another question: how well would each datum be predicted by a model that saw all the others? It hardly
    depends on wide priors. ArviZ computes it by PSIS from importance-resampled draws (a refined posterior's own). It
    takes data one by one: observed sites in a plate, or with a batch shape.

    Source: Kass & Raftery (1995), "Bayes factors", JASA 90(430); Vehtari, Gelman & Gabry (2017), "Practical Bayesian
    model evaluation using leave-one-out cross-validation and WAIC", Statistics and Computing 27.

    Args:
        posteriors: Name -> what `flowvi.fit` or `refine()` gave; at least two.
        num_samples: Draws of each flow behind the evidence, as for `Posterior.diagnose`.
        loo: Whether LOO is computed; its columns are NaN without.

    Returns:
        A pandas DataFrame with a row for each model, indexed by name. By evidence: `rank` (0 is the best),
        `log_evidence` and its standard error `se`, `log_evidence_diff` (the best one's minus this one's) and its
        standard error `dse`, `probability` (posterior model probability), `elbo`, `khat`, `trusted`, and `warning`,
        what is in doubt. By LOO: `elpd_loo` and its standard error `elpd_se`, `p_loo` (effective number of
        parameters), `elpd_diff` (the best one's minus this one's) and its standard error `elpd_dse`, both data by
        datum, `bad_pareto_k` (how many data have a Pareto k too large for PSIS), and `loo_warning`, what is in doubt
        or why there are no numbers. In a terminal, print the table's `.T`: pandas leaves out middle columns.

    Raises:
        OptionError: Not two or more posteriors by name, or pandas or ArviZ is missing.
        DimensionError: Two models were fitted to different data under the same name.

    Warns:
        UntrustedWarning: One of the posteriors isn't trusted.
    """
    _check(posteriors)
    flags(loo=loo)
    pandas = _pandas()
    found = {name: posterior.diagnose(num_samples) for name, posterior in posteriors.items()}

    def height(name: str) -> float:
        value = found[name].log_evidence
        return value if math.isfinite(value) else -math.inf

    order = sorted(found, key=height, reverse=True)
    loos = [_loo(posteriors[name]) if loo else _NoLoo("not asked for") for name in order]
    best_loo = max((one for one in loos if isinstance(one, _Loo)), key=lambda one: one.elpd, default=None)
    best = found[order[0]]
    ratios = [math.exp(height(name) - height(order[0])) if math.isfinite(height(name)) else 0.0 for name in order]
    rows = [
        {
            "rank": rank,
            "log_evidence": d.log_evidence,
            "se": d.log_evidence_se,
            "log_evidence_diff": best.log_evidence - d.log_evidence,
            "dse": math.hypot(best.log_evidence_se, d.log_evidence_se) if rank else 0.0,
            "probability": ratio / sum(ratios) if sum(ratios) else math.nan,
            "elbo": d.elbo,
            "khat": d.khat,
            "trusted": d.trusted,
            "warning": _warning(d),
            **one.columns(best_loo),
        }
        for rank, (d, ratio, one) in enumerate(zip((found[name] for name in order), ratios, loos, strict=True))
    ]
    doubtful = [name for name in order if not (found[name].trusted and math.isfinite(found[name].log_evidence_se))]
    if doubtful:
        warnings.warn(
            UntrustedWarning(
                f"the evidence of {', '.join(doubtful)} is in doubt (see the column warning): fit again, or "
                "refine(), before you compare."
            ),
            stacklevel=2,
        )
    return pandas.DataFrame(rows, index=pandas.Index(order, name="model"))


@dataclass(frozen=True)
class _Loo:
    """One model's leave-one-out cross-validation."""

    elpd: float
    se: float
    p: float
    pointwise: np.ndarray
    """elpd of each datum (N,)."""
    bad: int
    """Data whose Pareto k is above `good_k`."""
    good_k: float

    def columns(self, best: _Loo | None) -> dict[str, Any]:
        """Its part of a row; `best` is the model with the largest elpd."""
        words = []
        if self.bad:
            words.append(
                f"{self.bad} of {len(self.pointwise)} data have a Pareto k above {self.good_k:.2g}: their elpd is a "
                "guess, as the posterior without them would be another one."
            )
        diff = dse = math.nan
        if best is not None and len(best.pointwise) == len(self.pointwise):
            each = best.pointwise - self.pointwise
            diff, dse = float(each.sum()), float(np.sqrt(len(each) * each.var()))
        else:
            words.append("Its number of data is another one than the best model's: no difference.")
        return {
            "elpd_loo": self.elpd,
            "elpd_se": self.se,
            "p_loo": self.p,
            "elpd_diff": diff,
            "elpd_dse": dse,
            "bad_pareto_k": self.bad,
            "loo_warning": " ".join(words),
        }


@dataclass(frozen=True)
class _NoLoo:
    """Why a model has none."""

    why: str

    def columns(self, best: _Loo | None) -> dict[str, Any]:
        """NaN, and why."""
        numbers = ("elpd_loo", "elpd_se", "p_loo", "elpd_diff", "elpd_dse", "bad_pareto_k")
        return {**dict.fromkeys(numbers, math.nan), "loo_warning": f"No LOO: {self.why}."}


def _loo(posterior: Posterior) -> _Loo | _NoLoo:
    """LOO of all observed sites together, by the ArviZ at hand."""
    density = posterior.density.full
    if not density.observed:
        return _NoLoo("the target has no observed sites, and so no likelihood of single data")
    sizes = [math.prod(site.shape[: len(site.shape) - site.event_dim]) for site in density.observed_sites]
    num = max(200, min(_LOO_DRAWS, _LOO_ELEMENTS // max(1, sum(sizes))))
    values, z, _, _ = posterior._draws_with_densities(num, resample=True, seed=0)
    points = torch.cat([v.reshape(len(z), -1) for v in density.log_likelihood(z).values()], 1).double().cpu().numpy()
    points = points[:, (points != 0).any(0)]  # 0 at all draws is a datum that is masked out
    if points.shape[1] < 2:
        return _NoLoo(
            "the likelihood is one number for all the data; a plate instead of to_event tells them apart"
            if points.size
            else "all data are masked out"
        )
    if not np.isfinite(points).all():
        return _NoLoo("the likelihood of a datum is not finite at some draws")
    chains = posterior._num_chains
    groups = {
        "posterior": {name: _in_chains(value.cpu().numpy(), chains) for name, value in values.items()},
        "log_likelihood": {"data": _in_chains(points, chains)},
    }
    kind, module = find_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Pareto k: the table has it
        if kind == "inference_data":
            found = module.loo(module.from_dict(**groups), pointwise=True, scale="log")
            elpd, p, pointwise = found.elpd_loo, found.p_loo, found.loo_i
        else:
            found = _stats().loo(module.from_dict(groups), pointwise=True)
            elpd, p, pointwise = found.elpd, found.p, found.elpd_i
    bad = int((np.asarray(found.pareto_k) > found.good_k).sum())
    return _Loo(float(elpd), float(found.se), float(p), np.asarray(pointwise), bad, float(found.good_k))


def _in_chains(draws: np.ndarray, num_chains: int) -> np.ndarray:
    """(C n, ...) -> (C, n, ...)."""
    return draws.reshape(num_chains, -1, *draws.shape[1:])


def _stats() -> Any:
    try:
        return importlib.import_module("arviz_stats")
    except ImportError as error:
        raise OptionError(
            "LOO needs arviz-stats beside arviz-base: pip install arviz, or compare(loo=False)."
        ) from error


def _warning(d: Diagnostics) -> str:
    if not d.trusted:
        return d.verdict
    return "" if math.isfinite(d.log_evidence_se) else "The draws are trusted, their evidence isn't: use more flows."


def _check(posteriors: Any) -> None:
    if not isinstance(posteriors, Mapping) or len(posteriors) < 2:
        raise OptionError('compare takes two or more posteriors by name, such as {"linear": a, "quadratic": b}.')
    for name, posterior in posteriors.items():
        if not isinstance(name, str) or not isinstance(posterior, Posterior):
            raise OptionError(
                f"compare takes name -> posterior, as flowvi.fit returns it, not {name!r}: {type(posterior).__name__}."
            )
    seen: dict[str, tuple[str, torch.Tensor]] = {}
    for name, posterior in posteriors.items():
        for site, value in posterior.density.observed.items():
            first, data = seen.setdefault(site, (name, value))
            if data.shape != value.shape or not torch.allclose(data.double(), value.double(), equal_nan=True):
                raise DimensionError(
                    f"{first!r} and {name!r} were fitted to different data at the site {site!r}: evidences can only be "
                    "compared on the same data."
                )


def _pandas() -> Any:
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise OptionError("compare makes a pandas DataFrame: pip install pandas.") from error
