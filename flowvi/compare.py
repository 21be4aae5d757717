"""Models side by side, by their evidence."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from flowvi.diagnostics import Diagnostics
from flowvi.errors import DimensionError, OptionError, UntrustedWarning
from flowvi.posterior import Posterior

__all__ = ["compare"]


def compare(posteriors: Mapping[str, Posterior], *, num_samples: int = 10_000) -> Any:
    """Posteriors of different models of the same data, the best evidence first.

    Bayesian model comparison: with equal prior probabilities, p(model | data) is proportional to the evidence
    Z = integral of p(data | z) p(z) dz. The evidence depends on the priors, however much data there is: it means
    nothing where one is improper or was chosen carelessly wide.

    Log Z is estimated by importance sampling from the flow, or by bridge sampling for a refined posterior. Its
    standard error can be relied on where k-hat is below 0.5, or the posterior is refined (and then it is infinite
    where it can't).

    Source: Kass & Raftery (1995), "Bayes factors", JASA 90(430).

    Args:
        posteriors: Name -> what `flowvi.fit` or `refine()` gave; at least two.
        num_samples: Draws of each flow behind the numbers, at least 100.

    Returns:
        A pandas DataFrame with a row for each model, indexed by name: `rank` (0 is the best), `log_evidence` and its
        standard error `se`, `log_evidence_diff` (the best one's minus this one's) and its standard error `dse`,
        `probability` (posterior model probability), `elbo`, `khat`, `trusted`, and `warning`, what is in doubt.

    Raises:
        OptionError: Not two or more posteriors by name, or pandas is missing.
        DimensionError: Two models were fitted to different data under the same name.

    Warns:
        UntrustedWarning: One of the posteriors isn't trusted.
    """
    _check(posteriors)
    pandas = _pandas()
    found = {name: posterior.diagnose(num_samples) for name, posterior in posteriors.items()}

    def height(name: str) -> float:
        value = found[name].log_evidence
        return value if math.isfinite(value) else -math.inf

    order = sorted(found, key=height, reverse=True)
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
        }
        for rank, (d, ratio) in enumerate(zip((found[name] for name in order), ratios, strict=True))
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
