"""One step's gradient: without a tape where every layer can be bound to memory, by autograd otherwise."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowvi.fit.adam import FlatParameters
from flowvi.flow import Flow
from flowvi.kernels import dispatch
from flowvi.objectives import BALANCE, BALANCE_FALL, ELBO, BalancedELBO, Target

_LOG_2PI = math.log(2 * math.pi)
_PATH = 1  # flowvi.kernels.compiled.training.PATH, without importing numba


class Step(Protocol):
    """The gradient of -F_beta, left in the flat gradient."""

    fused: bool

    def __call__(self, beta: float, generator: torch.Generator) -> tuple[Tensor | float, Tensor | float]:
        """The number of finite particles, and their mean log p - log q (NaN if there is none)."""
        ...


def make_step(flow: Flow, target: Target, objective: ELBO, flat: FlatParameters) -> Step:
    """The fastest way there is for this flow, target and objective.

    Args:
        flow: q, whose parameters are views of `flat`.
        target: log p and its gradient.
        objective: the estimator.
        flat: the parameters and their gradient; it must outlive the step.
    """
    if flow.has_standard_base and type(objective).backward is ELBO.backward:
        layers = [t.bind(objective.num_particles, objective.path) for t in flow.transforms if hasattr(t, "bind")]
        if layers and len(layers) == len(flow.transforms) and None not in layers:
            return FusedStep(flow, layers, target, objective)
    return TapeStep(flow, target, objective, flat)


class TapeStep:
    """By autograd: any flow, any objective."""

    fused = False

    def __init__(self, flow: Flow, target: Target, objective: ELBO, flat: FlatParameters) -> None:
        self.flow, self.target, self.objective, self.flat = flow, target, objective, flat

    def __call__(self, beta: float, generator: torch.Generator) -> tuple[Tensor | float, Tensor | float]:
        """See `Step`."""
        self.flat.grad.zero_()
        seen = self.objective.backward(self.flow, self.target, beta=beta, generator=generator)
        num = seen.valid.sum()
        return num, torch.where(seen.valid, seen.log_p - seen.log_q, 0.0).sum() / num


class FusedStep:
    """By the layers' own forward and backward passes, on memory that is made once.

    Args:
        flow: q with a standard normal base.
        layers: its transforms, bound (`InvertibleMap.bind`).
        target: log p and its gradient.
        objective: the estimator.
    """

    fused = True

    def __init__(self, flow: Flow, layers: list[Any], target: Target, objective: ELBO) -> None:
        self.layers, self.target, self.objective = layers, target, objective
        like: dict[str, Any] = {"dtype": flow.dtype, "device": flow.device}
        size, dim = objective.num_particles, flow.dim
        self._eps, self._g_z = torch.empty(size, dim, **like), torch.empty(size, dim, **like)
        self._log_q, self._g_log_q = torch.empty(size, **like), torch.empty(size, **like)
        self._cotangents: Any = None
        module = dispatch.compiled("training", self._eps)
        own = type(objective).cotangents
        if module is not None and own in (ELBO.cotangents, BalancedELBO.cotangents):
            plain = module.PATH if objective.path else module.STANDARD
            self._kind = module.BALANCED if own is BalancedELBO.cotangents else plain
            # Views of the memory above, made once: a torch operation costs more to call than most of this computes.
            self._eps_log_q = self._eps.numpy(), self._log_q.numpy()
            self._out = self._g_z.numpy(), self._g_log_q.numpy(), np.zeros(2)
            dtype = self._out[0].dtype.type
            self._base, self._cotangents = module.make_base(dtype), module.make_cotangents(dtype)

    def __call__(self, beta: float, generator: torch.Generator) -> tuple[Tensor | float, Tensor | float]:
        """See `Step`."""
        eps, log_q = self._eps, self._log_q
        eps.normal_(generator=generator)
        if self._cotangents is None:
            torch.sum(eps * eps, 1, out=log_q).mul_(-0.5).sub_(0.5 * _LOG_2PI * eps.shape[1])
        else:
            self._base(*self._eps_log_q)
        z, score = eps, None
        for layer in self.layers:
            z, log_det, score = layer.forward(z, score)
            log_q.sub_(log_det)
        log_p, grad = self.target.value_and_grad(z)
        if not log_p.dtype == grad.dtype == z.dtype:
            log_p, grad = log_p.to(z.dtype), grad.to(z.dtype)
        g_z, g_log_q, num, elbo = self._pull(log_p, grad, score, beta)
        g_log_det = None if g_log_q is None else g_log_q.neg_()
        for layer in reversed(self.layers):
            g_z = layer.backward(g_z, g_log_det)
        return num, elbo

    def _pull(
        self, log_p: Tensor, grad: Tensor, score: Tensor | None, beta: float
    ) -> tuple[Tensor, Tensor | None, Tensor | float, Tensor | float]:
        """The cotangents of z and log q, and what was seen."""
        log_q = self._log_q
        if self._cotangents is None:
            g_z, g_log_q, valid = self.objective.cotangents(log_q, log_p, grad, score, beta)
            finite = valid.sum()
            return g_z, g_log_q, finite, torch.where(valid, log_p - log_q, 0.0).sum() / finite
        pull = grad.contiguous().numpy()
        self._cotangents(
            self._eps_log_q[1],
            log_p.contiguous().numpy(),
            pull,
            pull if score is None else score.contiguous().numpy(),
            beta,
            self._kind,
            BALANCE,
            BALANCE_FALL,
            *self._out,
        )
        num, elbo = self._out[2].tolist()
        return self._g_z, None if self._kind == _PATH else self._g_log_q, num, elbo
