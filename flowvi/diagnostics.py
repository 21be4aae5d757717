"""Is the fit any good? Numbers from fresh draws of q; the verdict on them is `flowvi.verdict`.

With draws z_s of q and log w_s = log p(z_s) - log q(z_s):

- ELBO = mean of log w, a lower bound of log Z whose gap is KL(q || p);
- log Z by importance sampling = log mean of w;
- k-hat, the shape of a generalized Pareto distribution fitted to the largest weights (PSIS): the weights have
  1 / k-hat finite moments, and from about 0.7 on neither weights nor draws can be relied on;
- the effective sample size of the smoothed weights, (sum w)^2 / sum w^2.

All of them look at the target through draws of q, and a place that q should visit and doesn't hardly shows. So draws
of q are handed to a short HMC in the flow's coordinates too (`flowvi.short_run`), which tells

- J = KL(q || p) + KL(p || q), and by how much each mean and sd would have to move.

The weights say the same of means and sds, as far as k-hat lets them. Each of the two finds what the other doesn't:
chains don't cross between modes, and weights know no tail that was not drawn.

**A far mode that neither draws nor chains reach shows in none of them**; only a known normalizer, or another
start, tells. So the evidence by importance sampling from all of the whitening's starts is compared with that by q; for
a fit that was not whitened, the evidence with what a search found beside q's draws:

- missed = log evidence by the starts - log evidence by q, above 0 where a start found mass that q has not.

What no start and no search found stays unseen. The verdict says so.

Sources: Vehtari, Simpson, Gelman, Yao, Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72);
Yao, Vehtari, Simpson, Gelman (2018), "Yes, but did it work? Evaluating variational inference", ICML.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowvi.checks import as_array, finite_numbers, functions, instances, positive_integers, shown
from flowvi.errors import DimensionError, OptionError
from flowvi.psis import MIN_DRAWS, khat_limit, psis
from flowvi.short_run import ShortRun
from flowvi.verdict import ESS_LIMIT, NONFINITE_LIMIT, decide, gap_limit, j_limit, percent

__all__ = [
    "ESS_LIMIT",
    "MIN_DRAWS",
    "NONFINITE_LIMIT",
    "Diagnostics",
    "gap_limit",
    "j_limit",
    "judge",
    "khat_limit",
    "psis",
]

FLAT_WEIGHT = 3.0  # times the mean: where no weight is larger, no tail of them matters
UNSURE = 0.1  # a standard error of an sd's ratio so large comes from a few far draws, and is twice as uncertain
SETTLED = 1.2  # R-hat of the short HMC, below which its chains have forgotten where they began
_BLOCK = 1_000_000  # values that are looked at together
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Diagnostics:
    """What fresh draws say about a fit.

    A standard error counts Monte Carlo noise only; with k-hat above 0.5 those of `log_evidence` and `gap` are
    too small. Draws whose log p or log q is not finite have weight zero in the evidence, k-hat and ESS, and
    are left out of the ELBO; `nonfinite_fraction` counts them.

    Attributes:
        elbo: E_q[log p - log q], and `elbo_se` its standard error.
        log_evidence: Log mean of the importance weights, and `log_evidence_se` (delta method).
        gap: `log_evidence - elbo`, an estimate of KL(q || p) where q visits all of p, and `gap_se`.
        khat: The Pareto shape of the largest weights; 0 where they are all equal, inf where too few are above
            zero to fit a tail.
        ess: The effective sample size of the PSIS weights, in draws.
        ess_fraction: The same as a fraction of `num_samples`.
        nonfinite_fraction: The fraction of draws whose log p or log q is NaN or infinite.
        num_samples: How many draws were made.
        trusted: Whether every check passed. Never true where a number is NaN.
        verdict: What was found and what to do, in plain words.
        j: The symmetric KL divergence by the short HMC, and `j_se`; None where it was not run.
        shift: The largest shift of a mean that the short HMC asks for, in sds, beyond two standard errors; and
            `shift_site` where. 0 where there is none.
        stretch: The same for an sd: how far its ratio is from 1 beyond its noise; and `stretch_site`.
        reweighted: The largest such change of a mean or sd that the importance weights ask for; and `reweighted_site`.
        unsettled: The largest change that they may ask for, noise not taken off.
        undecided: Whether that is beyond .1, and nothing else is against the fit: so few draws don't tell, and
            `Posterior.diagnose` makes more.
        overshoot: How much further draws of q, so far out and so seldom that those of a diagnosis have next to none of
            them, enlarge an sd where the target has nothing (`flowvi.far_draws`); and `overshoot_site`. 0 where it was
            not looked for, because something else is against the fit.
        beyond: The largest change of a mean or sd, as `reweighted`, by what chains find beyond the draws of q
            (`flowvi.beyond`); and `beyond_site`. 0 where k-hat gives no reason to look, or something else is against
            the fit.
        missed: Log evidence by all starts of the whitening, or with what a search found beside q, minus `log_evidence`,
            and `missed_se`; None where there is neither.
        kl: KL(q || p) = log Z - ELBO, where the target's normalizer is known, and `kl_se`. A missed mode does
            show in it.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    gap: float
    gap_se: float
    khat: float
    ess: float
    ess_fraction: float
    nonfinite_fraction: float
    num_samples: int
    trusted: bool
    verdict: str
    j: float | None = None
    j_se: float | None = None
    shift: float = 0.0
    shift_site: str = ""
    stretch: float = 0.0
    stretch_site: str = ""
    reweighted: float = 0.0
    reweighted_site: str = ""
    unsettled: float = 0.0
    undecided: bool = False
    overshoot: float = 0.0
    overshoot_site: str = ""
    beyond: float = 0.0
    beyond_site: str = ""
    missed: float | None = None
    missed_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None

    def numbers(self) -> str:
        """The numbers on one line, without the verdict."""
        parts = [
            f"ELBO {_pm(self.elbo, self.elbo_se)}",
            f"log evidence {_pm(self.log_evidence, self.log_evidence_se)}",
            f"k-hat {self.khat:.2f}",
            f"ESS {self.ess:.0f} of {self.num_samples} ({self.ess_fraction:.0%})",
        ]
        if self.kl is not None and self.kl_se is not None:
            parts.insert(2, f"KL {_pm(self.kl, self.kl_se)}")
        if self.j is not None and self.j_se is not None:
            parts.append(f"J {_pm(self.j, self.j_se)}")
        if self.nonfinite_fraction > 0:
            parts.append(f"{percent(self.nonfinite_fraction)} of the draws not finite")
        return ", ".join(parts)

    def __str__(self) -> str:
        return f"{self.numbers()}\n{self.verdict}"


def judge(
    log_p: _Array,
    log_q: _Array,
    *,
    dim: int,
    log_normalizer: float | None = None,
    z: _Array | None = None,
    moved: ShortRun | None = None,
    starts_evidence: tuple[float, float] | None = None,
    overshoot: tuple[float, str] = (0.0, ""),
    beyond: tuple[float, str] = (0.0, ""),
    name: Callable[[int], str] = "z[{}]".format,
) -> Diagnostics:
    """Diagnostics and verdict from log p and log q at fresh draws of q.

    The rule: trusted if

    - at most 1% of the draws are not finite;
    - the whitening's starts found no evidence that q misses (.03 nats and three standard errors);
    - the short HMC finds J below `j_limit`;
    - neither it nor, with k-hat below 1, the weights ask for a shift of a mean or sd beyond .1, no far draws of q
      enlarge an sd by that, and chains find nothing beyond the draws of q that changes one so;
    - the ELBO is less than `gap_limit` below the log evidence (two standard errors added) and, where log Z is
      known, KL(q || p) is below that too;
    - k-hat is below `khat_limit`, or no weight is above three times the mean; and the ESS is at least 20% of the
      draws. These two have no veto where the short HMC has settled and finds nothing to move, and the weights, noise
      included, ask for no change beyond .1: then means and sds are trusted, and the tails called in doubt.

    Over 220 targets with known moments (`python -m experiments verdict`) it trusted 141 of 150 right answers and none
    of 52 wrong ones; but it trusts nearly every answer that lacks a needle, a narrow mode in many dimensions.

    Args:
        log_p: Unnormalized log density of the target at the draws (S,).
        log_q: Log density of the flow at the draws (S,).
        dim: D, which sets the limit of the gap.
        log_normalizer: The target's log Z where it is known.
        z: The draws (S, D), with more columns if wanted; without them the weights say nothing of means and sds.
        moved: What the short HMC found, where it was run.
        starts_evidence: The log evidence by all starts of the whitening or with what a search found, and its error.
        overshoot: By how much far draws of q enlarge an sd, and which, where they were looked for.
        beyond: By how much what lies beyond the draws of q changes a mean or sd, and which, where it was looked for.
        name: What to call a coordinate of z, or a further column.

    Returns:
        The diagnostics.

    Raises:
        DimensionError: The arrays differ in shape or number of draws, or hold fewer than 100 of them.
        OptionError: An argument is of another kind.
    """
    positive_integers(dim=dim)
    functions(name=name)
    if log_normalizer is not None:
        finite_numbers(log_normalizer=log_normalizer)
    instances(ShortRun, type(None), moved=moved)
    if starts_evidence is not None and not (
        isinstance(starts_evidence, tuple)
        and len(starts_evidence) == 2
        and all(isinstance(value, float) for value in starts_evidence)
    ):
        raise OptionError(f"starts_evidence must be a log evidence and its error, not {shown(starts_evidence)}.")
    log_p, log_q = as_array("log_p", log_p), as_array("log_q", log_q)
    if log_p.shape != log_q.shape or log_p.ndim != 1 or log_p.size < MIN_DRAWS:
        raise DimensionError(
            f"log_p and log_q must both have shape (S,) with S >= {MIN_DRAWS}, got {log_p.shape} and {log_q.shape}."
        )
    num = log_p.size
    if z is not None:
        if not (isinstance(z, np.ndarray) and z.dtype.kind == "f"):  # float32 stays: a copy may be gigabytes
            z = as_array("z", z)
        if z.ndim != 2 or len(z) != num:
            raise DimensionError(f"z must hold the {num} draws of log_p, (S, D), got {z.shape}.")
    finite = np.isfinite(log_p) & np.isfinite(log_q)
    numbers: dict[str, Any] = dict.fromkeys(
        ("elbo", "elbo_se", "log_evidence", "log_evidence_se", "gap", "gap_se"), float("nan")
    )
    khat, ess, flat = float("inf"), 0.0, False
    if finite.sum() >= 2:
        log_w = np.full(num, -np.inf)
        log_w[finite] = log_p[finite] - log_q[finite]
        numbers.update(_estimates(log_w, finite))
        smoothed, khat = psis(log_w)
        if z is not None and khat < 1:
            numbers |= _reweighted(z, np.exp(smoothed), name)
        ess = float(1 / np.exp(2 * smoothed).sum())
        flat = bool(log_w.max() - numbers["log_evidence"] < np.log(FLAT_WEIGHT))
    numbers |= {
        "khat": khat,
        "ess": ess,
        "ess_fraction": ess / num,
        "nonfinite_fraction": float(1 - finite.mean()),
        "num_samples": num,
        "overshoot": overshoot[0],
        "overshoot_site": overshoot[1],
        "beyond": beyond[0],
        "beyond_site": beyond[1],
    }
    if log_normalizer is not None:
        numbers |= {"kl": float(log_normalizer) - numbers["elbo"], "kl_se": numbers["elbo_se"]}
    if starts_evidence is not None:
        numbers["missed"] = starts_evidence[0] - numbers["log_evidence"]
        numbers["missed_se"] = float(np.hypot(starts_evidence[1], numbers["log_evidence_se"]))
    settled = False
    if moved is not None:
        numbers |= _moves(moved, name)
        settled = bool(moved.r_hat.max() < SETTLED)
    found = Diagnostics(**numbers, trusted=False, verdict="")
    trusted, verdict, undecided = decide(found, dim, flat=flat, settled=settled)
    return Diagnostics(**numbers, trusted=trusted, verdict=verdict, undecided=undecided)


def _estimates(log_w: _Array, finite: NDArray[np.bool_]) -> dict[str, float]:
    """ELBO, log evidence and their difference, each with a standard error."""
    num, lw = log_w.size, log_w[finite]
    elbo = lw.mean()
    top = lw.max()
    w = np.exp(log_w - top)
    relative = w / w.mean()
    # the influence of one draw on log mean w - mean log w
    influence = relative[finite] - (lw - elbo)
    log_evidence = top + np.log(w.mean())
    return {
        "elbo": float(elbo),
        "elbo_se": float(lw.std(ddof=1) / np.sqrt(lw.size)),
        "log_evidence": float(log_evidence),
        "log_evidence_se": float(relative.std(ddof=1) / np.sqrt(num)),
        "gap": float(log_evidence - elbo),
        "gap_se": float(influence.std(ddof=1) / np.sqrt(lw.size)),
    }


def _moves(moved: ShortRun, name: Callable[[int], str]) -> dict[str, Any]:
    """J, and the worst shift and stretch beyond their noise, with their places."""
    shift = (moved.mean_shift.abs() - 2 * moved.mean_shift_se).clamp_min(0).nan_to_num(nan=np.inf)
    stretch = ((moved.sd_ratio - 1).abs() - _noise(moved.sd_ratio_se)).clamp_min(0).nan_to_num(nan=np.inf)
    return {
        "j": moved.j,
        "j_se": moved.j_se,
        "shift": float(shift.max()),
        "shift_site": name(int(shift.argmax())),
        "stretch": float(stretch.max()),
        "stretch_site": name(int(stretch.argmax())),
    }


def _noise(se: Any, sure: float = 2.0) -> Any:
    """So many standard errors of an sd's ratio, and more where the error is large, and so not known itself."""
    return sure * se * (1 + se / UNSURE)


def _reweighted(z: _Array, weights: _Array, name: Callable[[int], str]) -> dict[str, Any]:
    """The largest change of a mean, in sds, or of an sd that normalized weights (S,) ask for, beyond its noise."""
    size, num = z.shape[1], max(1, _BLOCK // len(z))
    sure = max(2.0, float(np.sqrt(2 * np.log(max(size, 1)))))  # standard errors: it is the largest of so many
    worst, at, unsettled = 0.0, 0, 0.0
    for start in range(0, size, num):  # a few columns at a time: all of them may be gigabytes
        change, estimate = _changes(np.asarray(z[:, start : start + num], dtype=np.float64), weights, sure)
        unsettled = max(unsettled, float(estimate.max(initial=0.0)))
        if change.size and change.max() > worst:
            worst, at = float(change.max()), start + int(change.argmax())
    return {"reweighted": worst, "reweighted_site": name(at) if size else "", "unsettled": unsettled}


def _changes(x: _Array, weights: _Array, sure: float) -> tuple[_Array, _Array]:
    """The change of each column beyond its noise, and as estimated.

    Values that are not finite are left out, and the change is inf where next to none is left.
    """
    fine = np.isfinite(x)
    x = np.where(fine, x, 0.0)
    count, mass = fine.sum(0), weights @ fine
    even, w = fine / np.maximum(count, 1), fine * weights[:, None] / np.maximum(mass, 1e-300)
    mean = (even * x).sum(0)
    sd = np.sqrt((even * (x - mean) ** 2).sum(0))
    moves = sd > 1e-6 * np.abs(mean)  # a constant, such as the corner of a Cholesky factor, does not
    x = np.where(fine, (x - mean) / np.where(moves, sd, 1.0), 0.0)
    excess = w - even
    shift, shift_noise = np.abs((excess * x).sum(0)), sure * np.sqrt(((excess * x) ** 2).sum(0))
    ratio = np.abs(np.sqrt((w * (x - (w * x).sum(0)) ** 2).sum(0)) - 1)
    ratio_se = np.sqrt(((excess * (x**2 - 1)) ** 2).sum(0)) / 2
    change = np.maximum(shift - shift_noise, ratio - _noise(ratio_se, sure))
    gone = (count < 2) | (mass <= 0)

    def told(c: _Array) -> _Array:
        return np.where(gone, np.inf, np.where(moves, np.nan_to_num(c, nan=np.inf), 0.0))

    return told(change), told(np.maximum(shift, ratio))


def _pm(value: float, error: float) -> str:
    """`value ± error`, the value to the error's second digit."""
    if not (np.isfinite(value) and np.isfinite(error)):
        return f"{value:.4g} ± {error:.2g}"
    digits = int(np.clip(1 - np.floor(np.log10(max(error, 1e-6))), 0, 6))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
