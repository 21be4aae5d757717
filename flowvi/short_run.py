r"""A short HMC in the flow's coordinates as a test of the flow: does q stay where it is?

Draws of q are moved by chains whose stationary density is the target p. If q is p nothing changes. If it isn't, the
moved draws tell by how much: with log w = log p - log q,

    J = E_p[log w] - E_q[log w] = KL(p || q) + KL(q || p),

the symmetric Kullback-Leibler divergence, for which no normalizer is needed; and the shift of each mean and sd.
Unlike the weights of draws of q, it looks at the places that q should visit and doesn't, as far as chains walk there.
A far mode they don't reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.chains import split_rhat
from flowvi.errors import NonFiniteError
from flowvi.flow import Flow
from flowvi.hmc import FlowCoordinates, HMCInfo, HMCState, Tuning, hmc_step
from flowvi.hmc_tuning import jitter, warm_up
from flowvi.progress import counting
from flowvi.targets import LogDensity

__all__ = ["ShortRun", "finite_start", "symmetric_kl"]

MAX_LEAPFROG = 16


@dataclass(frozen=True)
class ShortRun:
    """What moved when draws of q were handed to the target.

    Standard errors come from the chains, which are independent of each other, and from the draws of q. A chain that
    moves slowly is still near its start: then all differences are too small, and `r_hat` is well above 1.1.

    Attributes:
        j: The symmetric KL divergence of q and p, in nats; `j_se` its standard error.
        mean_shift: What is to be added to each mean of q, (D,) on the unconstrained space, in units of p's sd.
        mean_shift_se: Its standard errors (D,).
        sd_ratio: What each sd of q is to be multiplied by (D,): above 1 where q is too narrow.
        sd_ratio_se: Its standard errors (D,).
        acceptance: The mean acceptance probability.
        r_hat: The plain split R-hat of each coordinate over the moved draws (D,).
        divergences: The fraction of steps with an energy error above 1000 nats.
    """

    j: float
    j_se: float
    mean_shift: Tensor
    mean_shift_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor
    acceptance: float
    r_hat: Tensor
    divergences: float


@torch.no_grad()
def symmetric_kl(
    flow: Flow,
    density: LogDensity,
    *,
    num_chains: int = 128,
    num_steps: int = 100,
    generator: torch.Generator,
    num_draws: int = 4096,
) -> ShortRun:
    """J = E_p[log w] - E_q[log w], and the shift of means and sds, from a short HMC that starts at draws of q.

    The first half of the steps tunes step size, length and scale. The second half is averaged over time: a chain
    that forgets its start in a step or two gives many draws, not one.

    Args:
        flow: q.
        density: p, up to a constant.
        num_chains: C, at least 2.
        num_steps: Trajectories of each chain, at least 20; of 16 leapfrog steps at most.
        generator: Where the randomness comes from.
        num_draws: Fresh draws of q for the other side of the difference.

    Returns:
        J and the shifts, each with its standard error.

    Raises:
        NonFiniteError: Fewer than two draws of q have a finite density, or none has a gradient too.
    """
    target = FlowCoordinates(flow, density)
    z_q, log_p, log_q = target.values(target.draw(num_draws, generator))
    log_w = log_p - log_q
    fine = log_w.isfinite()
    if int(fine.sum()) < 2:
        raise NonFiniteError("fewer than two draws of the flow have a finite log density.")
    log_w, z_q = log_w[fine], z_q[fine]

    state = finite_start(target, lambda: target.draw(num_chains, generator), num_chains)
    tuning = Tuning(1.0, 1.0, torch.ones(target.dim, dtype=torch.float64, device=target.device), MAX_LEAPFROG)
    zs, ws, accepted, divergent = [], [], [], []
    with counting("check by a short HMC", num_steps) as bar:

        def count(_: HMCState, __: HMCInfo) -> bool:
            bar.update()
            return False

        state, tuning = warm_up(state, target, tuning, num_steps // 2, generator, on_step=count)
        for _, multiple in zip(range(num_steps - num_steps // 2), jitter(), strict=False):
            state, info = hmc_step(state, target, tuning, tuning.trajectory * multiple, generator)
            zs.append(state.z)
            ws.append(target.log_weight(state))
            accepted.append(info.acceptance)
            divergent.append(info.divergent)
            bar.update()
    z, moved = torch.stack(zs, 1), torch.stack(ws, 1)

    j, j_se = _difference(moved[..., None], log_w[:, None])
    shift, shift_se = _difference(z, z_q)
    # centred, so that a mean of squares is a variance
    around, around_q = (z - z.mean((0, 1))).square(), (z_q - z_q.mean(0)).square()
    variance, variance_q = around.mean((0, 1)), around_q.mean(0)
    sd = variance.sqrt()
    relative = (around.mean(1).var(0) / num_chains) / variance**2 + (around_q.var(0) / len(z_q)) / variance_q**2
    ratio = (variance / variance_q).sqrt()
    return ShortRun(
        j=float(j),
        j_se=float(j_se),
        mean_shift=shift / sd,
        mean_shift_se=shift_se / sd,
        sd_ratio=ratio,
        sd_ratio_se=ratio * relative.sqrt() / 2,
        acceptance=float(torch.stack(accepted).mean()),
        r_hat=split_rhat(z),
        divergences=float(torch.stack(divergent).double().mean()),
    )


def _difference(chains: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over chains (C, n, M) minus mean over draws (N, M), and its standard error, both (M,)."""
    each = chains.mean(1)
    variance = each.var(0) / len(each) + draws.var(0) / len(draws)
    return each.mean(0) - draws.mean(0), variance.sqrt()


def finite_start(target: FlowCoordinates, draw: Callable[[], Tensor], num: int) -> HMCState:
    """`num` chains where density and gradient are finite.

    Args:
        target: e -> state.
        draw: Gives candidates (num, D); called up to ten times.
        num: C.

    Returns:
        The state (C, D); fewer good candidates than C are used more than once.

    Raises:
        NonFiniteError: None is finite.
    """
    found: list[HMCState] = []
    count = 0
    for _ in range(10):
        state = target(draw())
        found.append(state.take(state.finite))
        count += len(found[-1].position)
        if count >= num:
            break
    if count == 0:
        raise NonFiniteError(
            "the target's log density or its gradient is finite at no draw of the flow: see posterior.diagnose()."
        )
    joined = HMCState(*(torch.cat([getattr(s, name) for s in found]) for name in HMCState.__dataclass_fields__))
    return joined.take(torch.arange(num, device=joined.position.device) % count)
