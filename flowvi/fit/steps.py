"""One step's gradient: without a tape where every layer can be bound to memory, by autograd otherwise."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flowvi.errors import OptionError
from flowvi.fit.adam import FlatParameters
from flowvi.fit.distributed import ALONE, Ranks, Split
from flowvi.flow import Flow
from flowvi.kernels import dispatch
from flowvi.kernels.step import Arrays
from flowvi.objectives import BALANCE, BALANCE_FALL, ELBO, BalancedELBO, CoveringELBO, Target

_LOG_2PI = math.log(2 * math.pi)
_PATH = 1  # flowvi.kernels.compiled.training.PATH, without importing numba


class Step(Protocol):
    """The gradient of -F_beta, left in the flat gradient."""

    fused: bool

    def __call__(self, beta: float, generator: torch.Generator) -> tuple[Tensor | float, Tensor | float]:
        """The number of finite particles, and their mean log p - log q (NaN if there is none)."""
        ...


def make_step(flow: Flow, target: Target, objective: ELBO, flat: FlatParameters, ranks: Ranks = ALONE) -> Step:
    """The fastest way there is for this flow, target and objective.

    Args:
        flow: q, whose parameters are views of `flat`.
        target: log p and its gradient.
        objective: the estimator.
        flat: the parameters and their gradient; it must outlive the step.
        ranks: over which the particles are split.

    Raises:
        OptionError: the objective's particles can't be split.
    """
    split = None
    if ranks.world > 1:
        check_split(objective, ranks)
        split = Split(ranks, objective.num_particles, flat.grad)
    if flow.has_standard_base and type(objective).backward is ELBO.backward:
        size = objective.num_particles if split is None else split.size
        layers = []
        if not _shares_parameters(flow):
            layers = [t.bind(size, objective.path) for t in flow.transforms if hasattr(t, "bind")]
        if layers and len(layers) == len(flow.transforms) and None not in layers:
            return FusedStep(flow, layers, target, objective, split)
    return TapeStep(flow, target, objective, flat, split)


def _shares_parameters(flow: Flow) -> bool:
    """Whether two transforms have a parameter in common: a bound one overwrites its gradient."""
    each = [{id(p) for p in t.parameters()} for t in flow.transforms if isinstance(t, nn.Module)]
    return len(set[int]().union(*each)) < sum(map(len, each))


def check_split(objective: ELBO, ranks: Ranks) -> None:
    """The objective's particles can be split over the ranks.

    Raises:
        OptionError: they can't; the message says why.
    """
    kind = type(objective)
    own = (ELBO.cotangents, BalancedELBO.cotangents, CoveringELBO.cotangents)
    if kind.backward is not ELBO.backward or kind.cotangents not in own:
        raise OptionError(
            f"the particles of {kind.__name__} can't be split over ranks, because it has a gradient of its own: "
            f'use distributed="restarts", or one of flowvi\'s objectives.'
        )
    if objective.num_particles < ranks.world:
        raise OptionError(
            f"{objective.num_particles} particles can't be split over {ranks.world} ranks: raise num_particles, "
            f"or launch fewer ranks."
        )


class TapeStep:
    """By autograd: any flow, any objective."""

    fused = False

    def __init__(
        self, flow: Flow, target: Target, objective: ELBO, flat: FlatParameters, split: Split | None = None
    ) -> None:
        self.flow, self.target, self.objective, self.flat, self.split = flow, target, objective, flat, split

    def __call__(self, beta: float, generator: torch.Generator) -> tuple[Tensor | float, Tensor | float]:
        """See `Step`."""
        self.flat.grad.zero_()
        if self.split is None:
            seen = self.objective.backward(self.flow, self.target, beta=beta, generator=generator)
        else:
            seen = self.objective.backward(self.flow, self.target, beta=beta, generator=generator, split=self.split)
            self.split.finish()
        num = seen.valid.sum()
        return num, torch.where(seen.valid, seen.log_p - seen.log_q, 0.0).sum() / num


class FusedStep:
    """By the layers' own forward and backward passes, on memory that is made once.

    Args:
        flow: q with a standard normal base.
        layers: its transforms, bound (`InvertibleMap.bind`).
        target: log p and its gradient.
        objective: the estimator.
        split: this process's part of the particles.
    """

    fused = True

    def __init__(
        self, flow: Flow, layers: list[Any], target: Target, objective: ELBO, split: Split | None = None
    ) -> None:
        self.layers, self.target, self.objective, self.split = layers, target, objective, split
        like: dict[str, Any] = {"dtype": flow.dtype, "device": flow.device}
        size, dim = objective.num_particles, flow.dim
        self._eps, self._g_z = torch.empty(size, dim, **like), torch.empty(size, dim, **like)
        self._log_q, self._g_log_q = torch.empty(size, **like), torch.empty(size, **like)
        self._rows = slice(None) if split is None else split.rows
        self._x, self._own_log_q = self._eps[self._rows], self._log_q[self._rows]
        self._cotangents: Any = None
        module = dispatch.compiled("training", self._eps)
        own = type(objective).cotangents
        if module is not None and own in (ELBO.cotangents, BalancedELBO.cotangents):
            plain = module.PATH if objective.path else module.STANDARD
            self._kind = module.BALANCED if own is BalancedELBO.cotangents else plain
            # Views of the memory above, made once: a torch operation costs more to call than most of this computes.
            self._x_log_q = self._x.numpy(), self._own_log_q.numpy()
            self._all_log_q = self._log_q.numpy()
            self._out = self._g_z.numpy(), self._g_log_q.numpy(), np.zeros(2)
            dtype = self._out[0].dtype.type
            self._base, self._cotangents = module.make_base(dtype), module.make_cotangents(dtype)
            self._arrays = Arrays()

    def __call__(self, beta: float, generator: torch.Generator) -> tuple[Tensor | float, Tensor | float]:
        """See `Step`."""
        x, log_q = self._x, self._own_log_q
        self._eps.normal_(generator=generator)
        if self._cotangents is None:
            torch.sum(x * x, 1, out=log_q).mul_(-0.5).sub_(0.5 * _LOG_2PI * x.shape[1])
        else:
            self._base(*self._x_log_q)
        z, score = x, None
        for layer in self.layers:
            z, log_det, score = layer.forward(z, score)
            log_q.sub_(log_det)
        log_p, grad = self.target.value_and_grad(z)
        if not log_p.dtype == grad.dtype == z.dtype:
            log_p, grad = log_p.to(z.dtype), grad.to(z.dtype)
        if self.split is not None:
            whole, log_p, grad, score = self.split.whole(log_q, log_p, grad, score, beta)
            self._log_q.copy_(whole)
        g_z, g_log_q, num, elbo = self._pull(log_p, grad, score, beta)
        if self.split is not None:
            g_z, g_log_q = g_z[self._rows], None if g_log_q is None else g_log_q[self._rows]
        g_log_det = None if g_log_q is None else g_log_q.neg_()
        for layer in reversed(self.layers):
            g_z = layer.backward(g_z, g_log_det)
        if self.split is not None:
            self.split.finish()
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
        pull = self._arrays("grad", grad)
        self._cotangents(
            self._all_log_q,
            self._arrays("log_p", log_p),
            pull,
            pull if score is None else self._arrays("score", score),
            beta,
            self._kind,
            BALANCE,
            BALANCE_FALL,
            *self._out,
        )
        num, elbo = self._out[2].tolist()
        return self._g_z, None if self._kind == _PATH else self._g_log_q, num, elbo
