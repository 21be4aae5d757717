r"""What is maximized: the ELBO, by its standard or its path gradient, annealed or not.

With z = T(eps) from q and beta in (0, 1], the objective is (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 20)

    F_beta = E_q[beta log p(x, z) - log q(z)],

whose value at beta = 1 is the ELBO. beta multiplies the whole log joint, not only its KL part. Two unbiased
estimators of the gradient:

- standard: the derivative of everything, d/dphi (beta log p(z_phi) - log q_phi(z_phi));
- path (Roeder et al. 2017, arXiv:1703.09194; Vaitl et al. 2022, arXiv:2207.08219): the derivative through z
  alone, (beta d log p/dz - d log q/dz) dz/dphi. What it leaves out, d log q_phi/dphi at fixed z, has mean zero;
  so it is unbiased too, and exactly zero, sample by sample, where q equals p^beta.

A third gradient sees what these two hardly do. Where p has separate modes, only the few samples between them
pull mass from one to the other, and the modes' masses drift. The log-variance gradient (Richter et al. 2020,
arXiv:2010.10436: the score-function estimator with the mean as its baseline),
mean of (log w - mean log w) d log q_phi/dphi at fixed z, log w = log q - beta log p, sees it in every sample:
too many on one side have too large a log w. It is noisy far from the optimum and exactly zero at it.
`BalancedELBO` mixes it with the path gradient, the more the smaller the variance of log w.

Each class here is both: the engine's estimator (`backward`, on a Flow and a LogDensity), and a Pyro ELBO that
`SVI` takes as its ``loss``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import detach, scale_and_mask
from pyro.infer import Trace_ELBO
from torch import Tensor

from flowvi.checks import finite_numbers, functions, instances, is_count, is_number, positive_integers, shown
from flowvi.errors import OptionError
from flowvi.flow import Flow

__all__ = ["ELBO", "AnnealedELBO", "BalancedELBO", "CoveringELBO", "LinearAnneal", "PathELBO"]


BALANCE, BALANCE_FALL = 0.9, 3.0
"""The share of the log-variance gradient is BALANCE / (1 + BALANCE_FALL Var log w)."""

FORWARD = 0.75
"""The share of KL(p || q). Alone it left draws of Neal's funnel where log p is thousands of nats too low."""


class Target(Protocol):
    """What an objective asks of a target: log p(z) (S,) and its gradient (S, D)."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log p (S,) and d log p/dz (S, D) at z (S, D), without a graph."""
        ...


class Split(Protocol):
    """Particles over several processes, as the engine has them (`flowvi.fit.distributed`)."""

    rows: slice

    def whole(
        self, log_q: Tensor, log_p: Tensor, grad: Tensor, score: Tensor | None, beta: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The same of all particles, from those of this process's `rows`."""
        ...


@dataclass(frozen=True)
class LinearAnneal:
    """beta_t = min(1, start + t / num_steps), the paper's schedule (eq. 20: start 0.01, num_steps 10000).

    Args:
        num_steps: steps from 0 to 1; beta is 1 from about then on.
        start: beta at step 0, in (0, 1].

    Raises:
        OptionError: a value out of range.
    """

    num_steps: int = 10_000
    start: float = 0.01

    def __post_init__(self) -> None:
        if not is_count(self.num_steps) or not is_number(self.start) or not 0 < self.start <= 1:
            raise OptionError(
                f"annealing takes num_steps >= 1 and 0 < start <= 1, not {shown(self.num_steps)} and "
                f"{shown(self.start)}."
            )

    def __call__(self, step: int) -> float:
        """Beta at a step, counted from 0."""
        if not isinstance(step, int) or step < 0:
            raise OptionError(f"step must be a whole number of at least 0, not {shown(step)}.")
        return min(1.0, self.start + step / self.num_steps)


class Estimate(NamedTuple):
    """What one step of an objective saw, without graphs: log q, log p and which particles were finite, (S,)."""

    log_q: Tensor
    log_p: Tensor
    valid: Tensor


class ELBO(Trace_ELBO):
    """The evidence lower bound with its standard gradient; `SVI` takes it as ``loss``.

    Args:
        num_particles: S, samples for each gradient.
        anneal: beta at each step, such as `LinearAnneal`; None is beta = 1. As a Pyro loss it counts the calls
            of ``loss_and_grads``; ``loss`` alone is never annealed.
        **options: of Pyro's ``Trace_ELBO`` (``vectorize_particles``, ``max_plate_nesting``, ...).

    Example:
        >>> import flowvi
        >>> flowvi.PathELBO(num_particles=256)
        PathELBO(num_particles=256)
    """

    path = False
    gradient = "standard"

    def __init__(self, num_particles: int = 1, *, anneal: Callable[[int], float] | None = None, **options: Any) -> None:
        positive_integers(num_particles=num_particles)
        if anneal is not None:
            functions(anneal=anneal)
        super().__init__(num_particles=num_particles, **options)
        self.anneal = anneal
        self._step = 0

    def __repr__(self) -> str:
        schedule = f", anneal={self.anneal}" if self.anneal is not None else ""
        return f"{type(self).__name__}(num_particles={self.num_particles}{schedule})"

    def beta(self, step: int) -> float:
        """Beta at a step.

        Args:
            step: counted from 0.

        Returns:
            The schedule's value; 1 without one.

        Raises:
            OptionError: the schedule gives something else than a number.
        """
        if self.anneal is None:
            return 1.0
        beta = self.anneal(step)
        if not is_number(beta):
            raise OptionError(f"anneal must give a number, beta, at each step, and gave {shown(beta)} at {step}.")
        return beta

    # For the engine.

    def backward(
        self,
        flow: Flow,
        target: Target,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
        split: Split | None = None,
    ) -> Estimate:
        """Add the gradient of -F_beta to the ``.grad`` of the flow's parameters.

        A particle with a non-finite log p, log q or gradient is left out of the mean.

        Args:
            flow: q, over R^D.
            target: log p and its gradient.
            beta: the annealing, `beta(step)` for a step of the schedule.
            generator: where the randomness comes from.
            split: this process's part of the particles; the gradient is then its part of a sum.

        Returns:
            What the step saw: log q, log p and which particles were finite, (S,).

        Raises:
            OptionError: the path gradient is asked of a flow without a path score, or an argument can't be used.
        """
        instances(Flow, flow=flow)
        finite_numbers(beta=beta)
        if not hasattr(target, "value_and_grad"):
            raise OptionError(f"target must have value_and_grad(z), as a LogDensity has, and {shown(target)} has none.")
        if split is not None and not hasattr(split, "whole"):
            raise OptionError(f"split must be a process's part of the particles or None, not {shown(split)}.")
        beta = float(beta)
        score = None
        rows = slice(None) if split is None else split.rows
        if self.path:
            z, log_q, score = flow.rsample_with_score(self.num_particles, generator=generator, rows=rows)
        else:
            z, log_q = flow.rsample_and_log_prob(self.num_particles, generator=generator, rows=rows)
        z_, log_q_ = z.detach(), log_q.detach()
        log_p, grad = target.value_and_grad(z_)
        if split is not None:
            log_q_, log_p, grad, score = split.whole(log_q_, log_p, grad, score, beta)
        g_z, g_log_q, valid = self.cotangents(log_q_, log_p, grad, score, beta)
        g_z, g_log_q = g_z[rows], None if g_log_q is None else g_log_q[rows]
        if g_log_q is None:
            torch.autograd.backward(z, g_z.to(z.dtype))
        else:
            torch.autograd.backward([z, log_q], [g_z.to(z.dtype), g_log_q.to(log_q.dtype)])
        return Estimate(log_q_, log_p, valid)

    def cotangents(
        self, log_q: Tensor, log_p: Tensor, grad: Tensor, score: Tensor | None, beta: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The cotangents of -F_beta, by which autograd finds the gradient of the flow's parameters.

        Args:
            log_q: log q(z), (S,).
            log_p: log p(z), (S,).
            grad: d log p/dz, (S, D).
            score: d log q/dz, (S, D), for the path gradient; else None.
            beta: the annealing.

        Returns:
            What -F_beta pulls on z (S, D) and on log q (S,) (None is zero), and which particles counted (S,).
        """
        pull = -beta * grad if score is None else score - beta * grad
        valid = torch.isfinite(log_p) & torch.isfinite(log_q) & torch.isfinite(pull).all(-1)
        weight = valid.to(log_q.dtype) / valid.sum().clamp_min(1)
        g_z = torch.where(valid.unsqueeze(-1), pull, 0.0) * weight.unsqueeze(-1)
        return g_z, None if self.path else weight, valid

    # As a Pyro loss.

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        beta = self.__dict__.get("_beta_now", 1.0)
        if beta != 1.0:
            model = poutine.scale(model, scale=beta)
        return super()._get_trace(model, guide, args, kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Pyro's ``loss_and_grads``: -F_beta at this call's beta, and its gradient.

        Args:
            model: the Pyro model.
            guide: its guide.
            *args: what both are called with.
            **kwargs: likewise.

        Returns:
            The estimate of -F_beta; the gradient is added to the parameters' ``.grad``.
        """
        self._beta_now = self.beta(self._step)
        try:
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
        finally:
            self._beta_now = 1.0
        self._step += 1
        return loss

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        if not self.path:
            return super()._differentiable_loss_particle(model_trace, guide_trace)
        elbo = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        surrogate = model_trace.log_prob_sum()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                surrogate = surrogate - path_log_prob(name, site).sum()
        return -float(elbo.detach()), -surrogate


class PathELBO(ELBO):
    """The ELBO with its path gradient: less noise, and none at all where q equals the posterior.

    For flowvi's guides it costs one more forward recurrence; any other fully reparameterized guide is taken
    too. Source: Roeder et al. 2017, arXiv:1703.09194.
    """

    path = True
    gradient = "path"


class BalancedELBO(PathELBO):
    r"""The path gradient and the log-variance gradient in one: (1 - a) path + a log-variance.

    a = .9 / (1 + 3 Var log w) of the step's particles: no part of it far from the optimum, nearly all of it close
    by. Both are estimates of the gradient of -F_beta, and both are zero, sample by sample, where q equals p^beta. On
    U1 with planar K = 32 (10 seeds) it kept the modes' masses at .494 to .504, where the path gradient alone
    gave .48 to .77 (5 seeds); on U4 it halved the KL. As a Pyro loss it is `PathELBO`.

    Source: Richter et al. 2020, arXiv:2010.10436, for the log-variance gradient.
    """

    gradient = "path and log-variance"

    def cotangents(
        self, log_q: Tensor, log_p: Tensor, grad: Tensor, score: Tensor | None, beta: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `ELBO.cotangents`."""
        g_z, _, valid = super().cotangents(log_q, log_p, grad, score, beta)
        assert score is not None
        weight = valid.to(log_q.dtype) / valid.sum().clamp_min(1)
        log_w = torch.where(valid, log_q - beta * log_p, 0.0)
        centred = torch.where(valid, log_w - (weight * log_w).sum(), 0.0)
        num = valid.sum().to(log_q.dtype)
        unbiased = weight * (num / (num - 1).clamp_min(1))
        share = BALANCE / (1 + BALANCE_FALL * (unbiased * centred.square()).sum())
        g_log_q = share * unbiased * centred
        return (1 - share) * g_z - g_log_q.unsqueeze(-1) * torch.where(valid.unsqueeze(-1), score, 0.0), g_log_q, valid


class CoveringELBO(PathELBO):
    r"""The path gradient of 3/4 KL(p || q) + 1/4 KL(q || p), for a q that is near p already.

    KL(q || p), the ELBO's, forgives a q that is too narrow; KL(p || q) doesn't, and forgives draws where p is next to
    nothing. With weights w_s = p / q, normalized over the step's S particles, the gradient is
    sum_s (3/4 w_s + 1/4 S^-1) (d log q/dz - d log p/dz) dz/d phi. After an ELBO has been maximized it widens tails,
    brings k-hat down, and has the sds right sooner than more steps on the ELBO do; with few effective draws it is
    noise, and so it is with minibatches, whose weights are not those of all data. Zero, sample by sample, where q
    equals p. The ELBO is still what is reported. The normalized weights bring a bias of order 1 / S. The masses of
    modes far apart it leaves alone. As a Pyro loss it is `PathELBO`.

    Sources: Tucker et al. 2019, arXiv:1810.04152 (the wake update of q, reparametrized twice); Vaitl et al. 2022,
    arXiv:2207.08219 (the same for flows).
    """

    gradient = "path of both KL divergences"

    def cotangents(
        self, log_q: Tensor, log_p: Tensor, grad: Tensor, score: Tensor | None, beta: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See `ELBO.cotangents`."""
        g_z, _, valid = super().cotangents(log_q, log_p, grad, score, beta)
        log_w = torch.where(valid, beta * log_p - log_q, -math.inf)
        w = torch.nan_to_num(torch.softmax(log_w, 0), nan=0.0) * valid.sum()  # `super` divides by their number
        return g_z * (FORWARD * w + (1 - FORWARD)).unsqueeze(-1), None, valid


class AnnealedELBO(ELBO):
    """The standard ELBO with the paper's annealing, beta_t = min(1, 0.01 + t / 10000) (eq. 20), unless told."""

    def __init__(self, num_particles: int = 1, *, anneal: Callable[[int], float] | None = None, **options: Any) -> None:
        super().__init__(num_particles, anneal=LinearAnneal() if anneal is None else anneal, **options)


def path_log_prob(name: str, site: dict[str, Any]) -> Tensor:
    """Log q of one guide site, (*batch), scaled and masked, whose gradient runs through the sampled value alone.

    Raises:
        OptionError: the site is not reparameterized.
    """
    fn, value = site["fn"], site["value"]
    if isinstance(fn, (pyro.distributions.Delta, pyro.distributions.Unit)):
        log_q = fn.log_prob(value)
    elif not fn.has_rsample:
        raise OptionError(
            f"the path gradient needs a reparameterized guide, but site {name!r} is drawn from "
            f"{type(fn).__name__}, which has no rsample: use flowvi.ELBO or pyro.infer.TraceGraph_ELBO."
        )
    else:
        log_q = (value * fn.score(value)).sum(-1) if isinstance(fn, Flow) else detach(fn).log_prob(value)
    return scale_and_mask(log_q, site["scale"], site["mask"])
