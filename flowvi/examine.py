"""How a fit is examined: which draws are made, and what is asked of them.

`flowvi.diagnostics` has the numbers that come of it, `flowvi.verdict` the words.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowvi.beyond import MAX_DIM, beyond
from flowvi.columns import columns
from flowvi.diagnostics import Diagnostics, judge
from flowvi.errors import NonFiniteError, OptionError
from flowvi.far_draws import overshoot
from flowvi.psis import khat_limit
from flowvi.short_run import ShortRun, symmetric_kl
from flowvi.threads import one_thread_if_small
from flowvi.verdict import SHIFT_LIMIT

if TYPE_CHECKING:
    from flowvi.fit.whiten import Start
    from flowvi.posterior import Posterior
    from flowvi.targets import LogDensity

__all__ = ["MAX_HMC_DIM", "examine"]

MAX_HMC_DIM = 2000
"""D above which there is no short HMC and no search."""

_DRAWS, _MOST_DRAWS = 10_000, 160_000  # at first, and at most where that leaves it undecided
_MOST_ELEMENTS = 2**23  # of z, of either
_AT_A_MODE, _HALF = 256, 0.5  # draws of a mode's Gaussian, and how much of it q must have
_FAR = 16  # times as many are drawn to see whether there are some far out


def examine(posterior: Posterior, num_samples: int | None, generator: torch.Generator, *, hmc: bool) -> Diagnostics:
    """The diagnostics of a fit; the arguments are those of `Posterior.diagnose`."""
    density = posterior.density.full
    dear = density.path == "eager"  # one particle at a time: hundreds of thousands of runs of the model
    further = hmc and not dear and density.dim <= MAX_HMC_DIM
    z, log_p, log_q = posterior._weigh(num_samples or _DRAWS, generator)
    starts = _starts_evidence(posterior)
    if starts is None and further and bool((log_p - log_q).isfinite().all()):
        starts = _search(posterior, z, log_p - log_q)
    moved = _short_run(posterior, generator) if further and log_p.isfinite().any() else None
    found = _judge(posterior, z, log_p, log_q, moved, starts)
    most = min(_MOST_DRAWS, _MOST_ELEMENTS // density.dim)
    while found.undecided and 2 * len(z) <= (num_samples or most):  # a few far draws decide an sd
        more = posterior._weigh(len(z), generator)
        z, log_p, log_q = (torch.cat(pair) for pair in zip((z, log_p, log_q), more, strict=True))
        found = _judge(posterior, z, log_p, log_q, moved, starts)
    num = min(_FAR * len(z), most)
    if found.trusted and num > len(z) and not dear:
        far = overshoot(z, found.log_evidence, posterior._draw(num, generator), density)
        found = replace(found, overshoot=far[0], overshoot_site=far[1])
        if not far[0] < SHIFT_LIMIT:
            return _judge(posterior, z, log_p, log_q, moved, starts, overshoot=far)
    in_doubt = not found.khat < khat_limit(found.num_samples)
    if found.trusted and in_doubt and further and density.dim <= MAX_DIM:
        missing = beyond(posterior.flow, density, z, log_p, log_q, generator)
        found = replace(found, beyond=missing[0], beyond_site=missing[1])
        if not missing[0] < SHIFT_LIMIT:
            far = found.overshoot, found.overshoot_site
            return _judge(posterior, z, log_p, log_q, moved, starts, overshoot=far, beyond=missing)
    return found


def _judge(
    posterior: Posterior,
    z: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    moved: ShortRun | None,
    starts_evidence: tuple[float, float] | None,
    **looked: tuple[float, str],
) -> Diagnostics:
    """What the draws say, and what was looked for: `overshoot` or `beyond` of `judge`."""
    seen, names = columns(posterior.density, z)
    return judge(
        log_p.cpu().numpy(),
        log_q.cpu().numpy(),
        dim=posterior.density.dim,
        log_normalizer=posterior.density.log_normalizer,
        z=seen.cpu().numpy(),
        moved=moved,
        starts_evidence=starts_evidence,
        name=names,
        **looked,
    )


def _starts_evidence(posterior: Posterior) -> tuple[float, float] | None:
    """What the fit found from all starts of its whitening."""
    found = posterior.config.get("starts_log_evidence")
    return None if found is None else (float(found[0]), float(found[1]))


def _search(posterior: Posterior, z: Tensor, log_w: Tensor) -> tuple[float, float] | None:
    """The log evidence with that of modes that q lacks, for a fit without starts; None where there are none."""
    from flowvi.fit.search import NUM_SCOUTS, elsewhere

    density = posterior.density.full
    generator = posterior._generator(posterior.seed or 0, "search")
    with one_thread_if_small(NUM_SCOUTS * density.dim):
        found = elsewhere(z, float(log_w.mean()), density, generator)
    log_evidence = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    lacking = [mode.elbo for mode in found if not _holds(posterior.flow, mode, log_evidence, density, generator)]
    return (float(np.logaddexp.reduce([log_evidence, *lacking])), 0.0) if lacking else None


@torch.no_grad()
def _holds(flow: Any, mode: Start, log_evidence: float, density: LogDensity, generator: torch.Generator) -> bool:
    """Whether q has at least half of what is at a mode: min(1, Z q / p) on the average over its Gaussian."""
    x = torch.randn(_AT_A_MODE, len(mode.loc), generator=generator, dtype=mode.loc.dtype, device=mode.loc.device)
    z = mode.place(x)
    try:
        log_q = flow.log_prob(z.to(flow.dtype)).double()
    except (KeyError, NotImplementedError, OptionError):  # somebody else's flow, that has no inverse
        return False
    share = (log_evidence + log_q - density(z.to(density.dtype)).double()).clamp(max=0.0).exp()
    return float(share.nan_to_num(0.0).mean()) > _HALF


def _short_run(posterior: Posterior, generator: torch.Generator) -> ShortRun | None:
    """The short HMC; None where it has nothing finite to start from."""
    density, flow = posterior.density.full, posterior.flow
    layers = flow.spec.num_flows if flow.spec is not None else 1
    try:
        with one_thread_if_small(128 * density.dim * max(1, layers)):
            return symmetric_kl(flow, density, generator=generator)
    except NonFiniteError:
        return None
