"""The verdict on a fit: its limits, and what is said in plain words of the numbers in `flowvi.diagnostics`.

Numbers come in, a decision and sentences go out; nothing is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowvi.checks import positive_integers
from flowvi.psis import MIN_DRAWS, khat_limit

if TYPE_CHECKING:
    from flowvi.diagnostics import Diagnostics

__all__ = ["ESS_LIMIT", "NONFINITE_LIMIT", "SHIFT_LIMIT", "decide", "gap_limit", "j_limit", "percent"]

ESS_LIMIT = 0.2  # of the draws, as PSIS weights see them
NONFINITE_LIMIT = 0.01  # of the draws
SHIFT_LIMIT = 0.1  # of a mean in sds, or of an sd relative to itself, beyond two standard errors
MISSED_LIMIT = 0.03  # nats of evidence, beyond three standard errors


def gap_limit(dim: int) -> float:
    """The largest KL(q || p) in nats to call small: min(0.05 + 0.01 D, 0.7).

    A joint KL adds up over dimensions while a user asks about marginals, so the limit grows with D. At small
    D it must be strict: a gap of g could be a single mean that is off by sqrt(2 g) standard deviations.

    Args:
        dim: D.

    Returns:
        The limit in nats.
    """
    positive_integers(dim=dim)
    return min(0.05 + 0.01 * dim, 0.7)


def j_limit(dim: int) -> float:
    """The largest symmetric KL in nats to call small: min(0.3 + 0.01 D, 1.2); as `gap_limit`, for both directions."""
    positive_integers(dim=dim)
    return min(0.3 + 0.01 * dim, 1.2)


def decide(d: Diagnostics, dim: int, *, flat: bool, settled: bool) -> tuple[bool, str, bool]:
    """Whether every check passed, the sentences, and whether more draws could change it.

    A comparison with NaN fails, as it must.
    """
    limit = gap_limit(dim)
    if not np.isfinite([d.elbo, d.log_evidence]).all():
        return (
            False,
            (
                "Do not trust this: no draw of the flow has a finite log density. Check the model and its data "
                "at a few points (posterior.density(z)), and try dtype=torch.float64."
            ),
            False,
        )
    bad: list[str] = []
    tail_ok = flat or d.khat < khat_limit(d.num_samples)
    if d.missed is not None and d.missed_se is not None and not d.missed < MISSED_LIMIT + 3 * d.missed_se:
        bad.append(
            f"There is more than the flow holds: with what the starts or the search found the log evidence is "
            f"{d.missed:.2g} ± {d.missed_se:.1g} nats larger, so a mode, or a part of one, is missing. Fit again with "
            "whiten=True, anneal=True or more restarts."
        )
    if d.j is not None and d.j_se is not None:
        bad += _bad_moves(d, j_limit(dim))
    if not d.reweighted < SHIFT_LIMIT:
        bad.append(
            f"The importance weights move the mean of {d.reweighted_site}, in sds, or change its sd by more than "
            f"{d.reweighted:.0%}: resample() takes the draws there, as far as k-hat lets it; a longer fit does too."
        )
    if not d.overshoot < SHIFT_LIMIT:
        bad.append(
            f"A few draws of the flow lie far outside, where the posterior has nothing, and enlarge the sd of "
            f"{d.overshoot_site} by {d.overshoot:.0%}: resample() leaves them out, and quantiles hardly know of them."
        )
    if not d.beyond < SHIFT_LIMIT:
        bad.append(
            f"The flow ends too early: chains that set out from the draws with the largest weights find more beyond, "
            f"which changes the mean of {d.beyond_site}, in sds, or its sd by more than {d.beyond:.0%}. Use more flows "
            "or another family, or fit longer."
        )
    waived = settled and not bad  # then the weights have no veto: k-hat refuses a third of the right ones
    if not d.nonfinite_fraction <= NONFINITE_LIMIT:
        bad.append(
            f"{percent(d.nonfinite_fraction)} of the draws have no finite log density: look for a division "
            "by zero, an overflow or a failed Cholesky in the model, or try dtype=torch.float64."
        )
    if d.kl is not None and not d.kl + 2 * (d.kl_se or 0.0) < limit:
        missing = d.log_evidence + limit < d.elbo + d.kl
        bad.append(
            f"The flow is {d.kl:.3g} nats from the target in KL(q || p) (limit {limit:.2g})"
            + (", and misses part of its mass, such as a mode: use anneal=True or more restarts." if missing else ".")
        )
    if not d.gap + 2 * d.gap_se < limit:
        known = d.gap - 2 * d.gap_se >= limit or not d.gap_se < limit
        bad.append(
            f"The ELBO is {d.gap:.2g} ± {d.gap_se:.1g} nats below the log evidence (limit {limit:.2g}): "
            + ("the flow lacks part of the posterior's shape. " if known else "that is not settled. ")
            + ("Use more flows or fit longer" if known else "Diagnose with more draws")
            + ("; until then resample() corrects the draws." if tail_ok and known and d.ess >= MIN_DRAWS else ".")
        )
    undecided = not bad and (waived or tail_ok) and not d.unsettled < SHIFT_LIMIT
    if not (waived and d.unsettled < SHIFT_LIMIT):
        bad += _bad_weights(d, tail_ok)
    if len(bad) == 1 and not tail_ok:
        bad.append(
            f"The bulk agrees (gap {d.gap:.2g} nats, ESS {d.ess_fraction:.0%}): it is extreme quantiles and tail "
            "probabilities that are in doubt."
        )
    if bad:
        return False, "Do not trust this yet. " + " ".join(bad), undecided
    weights = f"the importance weights are well behaved (k-hat {d.khat:.2f}, limit {khat_limit(d.num_samples):.2f})"
    if flat and not d.khat < khat_limit(d.num_samples):
        weights = "the importance weights are well behaved (none is above three times their mean)"
    elif not tail_ok:
        weights = (
            f"means and sds stay where they are under a short HMC (the tails are in doubt: k-hat {d.khat:.2f}, so "
            "take extreme quantiles from resample() or refine())"
        )
    words = (
        f"Trusted: {weights}, the ELBO is {max(d.gap, 0.0):.2g} nats below the log evidence "
        f"(limit {limit:.2g}), and {d.ess_fraction:.0%} of the draws are effective. "
        + (
            "The known normalizer confirms it."
            if d.kl is not None
            else "A mode that the flow never visits can't show here: if there may be several, fit again with "
            "another seed."
        )
    )
    return True, words, undecided


def _bad_weights(d: Diagnostics, tail_ok: bool) -> list[str]:
    """What the importance weights hold against the flow, where they have a veto."""
    bad = []
    if not tail_ok:
        bad.append(
            f"The largest importance weights have a heavy tail (k-hat {d.khat:.2f}, limit "
            f"{khat_limit(d.num_samples):.2f}): the flow is too narrow somewhere, and resample() can't "
            "repair it. Use more flows or another family, or fit longer."
        )
        if d.reweighted < SHIFT_LIMIT <= d.unsettled:
            bad.append(f"A mean or sd may be off by {d.unsettled:.0%}, within their noise.")
    if not d.ess_fraction >= ESS_LIMIT:
        bad.append(
            f"The draws are worth {d.ess:.0f} of {d.num_samples} (limit {ESS_LIMIT:.0%}): the flow and the "
            "posterior overlap too little. Use more flows or fit longer."
        )
    return bad


def _bad_moves(d: Diagnostics, limit: float) -> list[str]:
    """What the short HMC holds against the flow."""
    assert d.j is not None
    assert d.j_se is not None
    bad = []
    if not d.j + 2 * d.j_se < limit:
        bad.append(
            f"A short HMC that starts at its draws moves away: the symmetric KL is {d.j:.2g} ± {d.j_se:.1g} nats "
            f"(limit {limit:.2g}, twice the error included)."
        )
    if not d.shift < SHIFT_LIMIT:
        bad.append(f"It moves the mean of {d.shift_site} by more than {d.shift:.2g} sd.")
    if not d.stretch < SHIFT_LIMIT:
        bad.append(f"It changes the sd of {d.stretch_site} by more than {d.stretch:.0%}.")
    if bad:
        bad.append("refine() goes on with that HMC until it has settled; more flows or a longer fit may do as well.")
    return bad


def percent(fraction: float) -> str:
    """A fraction as a percentage, to two digits where it is small."""
    return f"{100 * fraction:.2g}%"
