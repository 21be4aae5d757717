r"""One step of learning a model and its amortized guide: the loss of a minibatch, per data point.

With N rows to learn from, a minibatch of B, local latents z_n and global ones g, it estimates, without bias,

    ELBO / N = mean over the batch of [log p(x_n, z_n | g) - log q(z_n | x_n, g)] + [log p(g) - log q(g)] / N.

So the data's plate counts as one of N, once, whatever size the model gives it (`PlateOf`); what is outside counts as
it is. z = T(eps) comes from the guide's flow in one pass with log q(z) (and its score, for the path gradient), and one
trace of the model gives log p: the guide's own Pyro call, which costs two more passes, is left out. Anything else goes
through the objective's own `differentiable_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn

from flowvi.amortized import AmortizedGuide
from flowvi.errors import OptionError
from flowvi.fit.batches import Batches, Call
from flowvi.flow import Flow
from flowvi.local_plate import PlateOf, find_call
from flowvi.objectives import ELBO
from flowvi.random_state import kept

__all__ = ["AmortizedStep", "Loss", "learnt_parameters"]

PARTICLES = "_flowvi_particles"


class Loss(NamedTuple):
    """What a minibatch gives: the surrogate to go downhill on, and the objective's value, both per data point."""

    surrogate: Tensor
    elbo: Tensor


class AmortizedStep:
    """The loss of a minibatch.

    Args:
        model: the Pyro model.
        guide: its guide, set up.
        objective: what is maximized.
        first: the arguments of a minibatch.
        train: the rows that are learnt from.

    Raises:
        OptionError: the model draws a subsample of its own, or its plates don't say what counts N / B times.
        TargetError and its children: the model can't have an amortized guide; the message says why.
    """

    def __init__(
        self, model: Callable[..., Any], guide: AmortizedGuide, objective: PyroELBO, first: Call, train: Batches
    ) -> None:
        args, kwargs = first
        name = guide.frame.name
        self.guide, self.objective, self.size = guide, objective, len(train)
        call = find_call(model, name, args, kwargs)
        n = len(guide._data(args, kwargs)[0])
        if call.subsample_size != n or (call.subsample is None and call.size != n):
            raise OptionError(
                f"fit makes the minibatches, and plate {name!r} of the model takes {call.subsample_size} "
                f"of {call.size} by itself from a batch of {n}: write the plate as pyro.plate({name!r}, "
                f"len(x)), or with size N and subsample=torch.arange(len(x))."
            )
        if guide.has_globals:
            if call.size not in (n, train.num, len(train)):
                raise OptionError(
                    f"plate {name!r} of the model has size {call.size}, and the data {train.num} rows: which of them "
                    f"global latents are to be the posterior of is not clear. Write pyro.plate({name!r}, len(x)): fit "
                    f"scales it by the number of rows it learns from."
                )
            if guide.globals._varying:
                raise OptionError(
                    "the support of a global latent depends on another one, which fit(encoder=) doesn't take: write it "
                    "on a fixed support and scale it in the model, or use flowvi.AmortizedGuide in pyro.infer.SVI."
                )
        with torch.no_grad(), kept():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        frames: list[Any] = []
        beside: dict[str, str] = {}  # plate -> one of its sites
        for site in (site for site in trace.nodes.values() if site["type"] == "sample"):
            stack = [f for f in site["cond_indep_stack"] if f.vectorized]
            frames += stack
            if all(f.name != name for f in stack):
                beside |= {f.name: site["name"] for f in stack if f.size == n}
        if guide.has_globals and beside:
            raise OptionError(
                f"site {next(iter(beside.values()))!r} has the batch's {n} rows but is not in plate {name!r}, so that "
                f"it would count once where that counts {self.size} / {n} times: put it in that plate."
            )
        self.rank = 1 + max(-f.dim for f in frames)
        self.plates = PlateOf(self.size, name, *beside)
        self.model = self.plates(model)
        local, factor = [s.name for s in guide.sites], call.size / n
        usual = all(  # no further scale on a latent site, which the guide wouldn't know of
            math.isclose(float(site["scale"]), factor if at in local else 1.0)
            for at, site in trace.iter_stochastic_nodes()
        )
        self.direct = isinstance(objective, ELBO) and usual

    def __call__(self, call: Call, beta: float | Tensor = 1.0) -> Loss:
        """The loss at the annealing beta."""
        return (self._directly if self.direct else self._by_pyro)(call, beta)

    def _directly(self, call: Call, beta: float | Tensor) -> Loss:
        args, kwargs = call
        objective: Any = self.objective
        guide, num = self.guide, objective.num_particles
        features = guide.encode(*args, **kwargs)
        scale = self.size / len(features)
        values: dict[str, Tensor] = {}
        log_q, held, log_det, noise = features.new_zeros(()), features.new_zeros(()), features.new_zeros(()), None
        if guide.has_globals:
            q = guide.globals.get_posterior()
            g = q.rsample((num,))
            log_q = q.log_prob(g).sum()
            held = (g * q.score(g)).sum() if objective.path and q.has_path_score else log_q
            noise = q._base_point(g).reshape(num, *(1,) * (features.dim() - 1), -1)
            values, log_det = guide.unpack_globals(g.reshape(num, *(1,) * (self.rank - 1), -1) if num > 1 else g[0])
        if guide.coupled and num > 1:  # each draw of the globals has its own flow of each datum
            z, log_q_z, held_z = (part[0] for part in self._draw(guide.posterior(features, noise), 1))
        else:
            z, log_q_z, held_z = self._draw(guide.posterior(features, None if noise is None else noise[0]), num)
            z = z if num > 1 else z[0]
        local, log_det_z = guide.unpack(z)
        log_p = self._log_joint(values | local, args, kwargs, num) + scale * log_det_z + log_det
        log_q, held = log_q + scale * log_q_z.sum(), held + scale * held_z.sum()
        size = self.size * num
        return Loss((held - beta * log_p) / size, (log_p - log_q).detach() / size)

    def _draw(self, q: Flow, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws (num, ..., D), log q, and what stands for it in the surrogate, both (num, ...)."""
        if self.objective.path and q.has_path_score:
            z, log_q, score = q.rsample_with_score(num)
            return z, log_q, (z * score).sum(-1)
        z, log_q = q.rsample_and_log_prob(num)
        return z, log_q, log_q

    def _log_joint(self, values: dict[str, Tensor], args: Any, kwargs: Any, num: int) -> Tensor:
        """Log p of the model at the latents, summed."""
        model = poutine.condition(self.model, data=values)
        if num == 1:
            return poutine.trace(model).get_trace(*args, **kwargs).log_prob_sum()
        with pyro.plate(PARTICLES, num, dim=-self.rank):
            return poutine.trace(model).get_trace(*args, **kwargs).log_prob_sum()

    def _by_pyro(self, call: Call, beta: float | Tensor) -> Loss:
        args, kwargs = call
        model = self.model if not isinstance(beta, Tensor) and beta == 1 else poutine.scale(self.model, scale=beta)
        loss = self.objective.differentiable_loss(model, self.plates(self.guide), *args, **kwargs) / self.size
        return Loss(loss, -torch.as_tensor(loss).detach())


def learnt_parameters(model: Callable[..., Any], guide: AmortizedGuide, first: Call) -> list[Tensor]:
    """What is learnt: the guide's parameters with the encoder's, and the model's (`pyro.param`, modules), each once."""
    args, kwargs = first
    with torch.no_grad(), kept():
        trace = poutine.trace(model, param_only=True).get_trace(*args, **kwargs)
    found = [*guide.parameters()]
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        found += owner.parameters()
    found += [site["value"].unconstrained() for site in trace.nodes.values() if site["type"] == "param"]
    return list({id(p): p for p in found if p.requires_grad}.values())
