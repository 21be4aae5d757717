r"""One step of learning a model and its amortized guide: the loss of a minibatch, per data point.

Where all latents are local, z = T(eps) comes from the guide's flow in one pass with log q(z) (and its score, for the
path gradient), and one trace of the model gives log p(x, z): the guide's own Pyro call, which costs two more passes, is
left out. Anything else goes through the objective's own `differentiable_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn

from flowvi.amortized import AmortizedGuide
from flowvi.errors import OptionError
from flowvi.fit.batches import Call
from flowvi.local_plate import find_call
from flowvi.objectives import ELBO

__all__ = ["AmortizedStep", "Loss", "learnt_parameters"]

PARTICLES = "_flowvi_particles"


class Loss(NamedTuple):
    """What a minibatch gives: the surrogate to go downhill on, and the objective's value, both per data point."""

    surrogate: Tensor
    elbo: Tensor


class AmortizedStep:
    """The loss of a minibatch; the first one sets the guide up.

    Args:
        model: the Pyro model.
        guide: its guide.
        objective: what is maximized.
        first: the arguments of a minibatch.

    Raises:
        OptionError: the model draws a subsample of its own.
        TargetError and its children: the model can't have an amortized guide; the message says why.
    """

    def __init__(self, model: Callable[..., Any], guide: AmortizedGuide, objective: PyroELBO, first: Call) -> None:
        args, kwargs = first
        guide(*args, **kwargs)
        self.model, self.guide, self.objective = model, guide, objective
        call = find_call(model, guide.frame.name, args, kwargs)
        n = len(guide._data(args, kwargs)[0])
        if call.subsample_size != n or (call.subsample is None and call.size != n):
            raise OptionError(
                f"fit makes the minibatches, and plate {guide.frame.name!r} of the model takes {call.subsample_size} "
                f"of {call.size} by itself from a batch of {n}: write the plate as pyro.plate({guide.frame.name!r}, "
                f"len(x)), or with size N and subsample=torch.arange(len(x))."
            )
        if guide.has_globals:
            raise OptionError(
                f"the model has latents outside of plate {guide.frame.name!r}, which fit(encoder=...) doesn't take: "
                f"use flowvi.AmortizedGuide in pyro.infer.SVI, or make them parameters of the model (pyro.param)."
            )
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        frames = [f for site in trace.nodes.values() if site["type"] == "sample" for f in site["cond_indep_stack"]]
        self.rank = 1 + max(-f.dim for f in frames if f.vectorized)
        scales = {float(site["scale"]) for _, site in trace.iter_stochastic_nodes()}
        self.direct = isinstance(objective, ELBO) and len(scales) == 1

    def __call__(self, call: Call, beta: float = 1.0) -> Loss:
        """The loss at the annealing beta."""
        return (self._directly if self.direct else self._by_pyro)(call, beta)

    def _directly(self, call: Call, beta: float) -> Loss:
        args, kwargs = call
        objective: Any = self.objective
        num = objective.num_particles
        features = self.guide.encode(*args, **kwargs)
        q = self.guide.posterior(features)
        score = None
        if objective.path and q.has_path_score:
            z, log_q, score = q.rsample_with_score(num)
        else:
            z, log_q = q.rsample_and_log_prob(num)
        values, log_det = self.guide.unpack(z if num > 1 else z[0])
        trace, scale = self._joint(values, args, kwargs, num)
        log_p = trace.log_prob_sum() + scale * log_det
        entropy = -scale * log_q.sum()
        held = entropy if score is None else -scale * (z * score).sum()
        size = len(features) * scale * num
        return Loss(-(beta * log_p + held) / size, (log_p.detach() + entropy.detach()) / size)

    def _joint(self, values: dict[str, Tensor], args: Any, kwargs: Any, num: int) -> tuple[Any, float]:
        """A trace of the model at the latents, and the scale of its data plate."""
        model = poutine.condition(self.model, data=values)
        if num == 1:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        else:
            with pyro.plate(PARTICLES, num, dim=-self.rank):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        return trace, float(trace.nodes[self.guide.sites[0].name]["scale"])

    def _by_pyro(self, call: Call, beta: float) -> Loss:
        args, kwargs = call
        model, guide = self.model, self.guide
        size = len(self.guide._data(args, kwargs)[0]) * self._scale(args, kwargs)
        if beta != 1:
            model = poutine.scale(model, scale=beta)
        loss = self.objective.differentiable_loss(model, guide, *args, **kwargs) / size
        return Loss(loss, -torch.as_tensor(loss).detach())

    def _scale(self, args: Any, kwargs: Any) -> float:
        call = find_call(self.model, self.guide.frame.name, args, kwargs)
        return call.size / call.subsample_size


def learnt_parameters(model: Callable[..., Any], guide: AmortizedGuide, first: Call) -> list[Tensor]:
    """What is learnt: the guide's parameters with the encoder's, and the model's (`pyro.param`, modules), each once."""
    args, kwargs = first
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(model, param_only=True).get_trace(*args, **kwargs)
    found = [*guide.parameters()]
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        found += owner.parameters()
    found += [site["value"].unconstrained() for site in trace.nodes.values() if site["type"] == "param"]
    return list({id(p): p for p in found if p.requires_grad}.values())
