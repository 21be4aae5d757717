r"""Importance-weighted bounds, one for each data point of the outer plate.

With z_1..z_K from q(z | x_n) and w_k = p(x_n, z_k) / q(z_k | x_n),

    L_K = sum_n E[log (1/K) sum_k w_nk],

which rises with K from the ELBO (K = 1) to sum_n log p(x_n) (Burda et al. 2016, arXiv:1509.00519). Each data point has
its own logsumexp: one over the whole data's weights, as Pyro's RenyiELBO has it, is a far weaker bound.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer.enum import get_importance_trace
from pyro.util import warn_if_nan
from torch import Tensor

from flowvi.checks import flags, instances, positive_integers, whole_numbers
from flowvi.errors import OptionError, TargetError
from flowvi.objectives import path_log_prob

__all__ = ["IWELBO"]

PARTICLES = "_flowvi_importance"


@dataclass
class _Weighted:
    """One traced set of K importance samples.

    Attributes:
        log_w: log p(x, z) - log q(z | x), (K, N), each datum unscaled.
        path: the same with q's parameters held, for DReG; or None.
        scale: full size / subsample size of the plate.
        frame: the plate, or None where the model has none and all data is one datum.
        latents: the guide's draws: name, value, its number of event dimensions, whether it is reparameterized.
        rank: the number of batch dimensions, with that of the particles.
    """

    log_w: Tensor
    path: Tensor | None
    scale: float
    frame: Any
    latents: list[tuple[str, Tensor, int, bool]]
    rank: int

    def per_datum(self, log_prob: Tensor) -> Tensor:
        """A site's scaled log probability as (K, N), without the plate's scale; a dimension that it lacks is 1."""
        log_prob = log_prob.reshape((1,) * (self.rank - log_prob.dim()) + tuple(log_prob.shape))
        kept = (0,) if self.frame is None else (0, self.rank + self.frame.dim)
        others = [d for d in range(self.rank) if d not in kept]
        summed = log_prob.sum(others) if others else log_prob
        return summed.reshape(len(log_prob), -1) / self.scale

    def beside(self, weight: Tensor, event_dim: int) -> Tensor:
        """A weight (K, N), shaped to multiply a draw with this many event dimensions."""
        shape = [1] * (self.rank + event_dim)
        shape[0] = len(weight)
        if self.frame is not None:
            shape[self.rank + self.frame.dim] = weight.shape[1]
        return weight.reshape(shape)


class IWELBO(PyroELBO):
    r"""The importance-weighted bound L_K per data point, as a Pyro loss; model and guide are learnt together.

    With ``dreg=True`` the guide's gradient is the doubly reparameterized one, sum_k v_k^2 (d log w_k / dz_k) dz_k/dphi
    with v_k = w_k / sum_j w_j, whose signal does not vanish as K grows; the model's is sum_k v_k d log w_k / dtheta.
    One backward pass gives both. Both are unbiased for the gradient of L_K.

    Notes:
        All latents must be inside one plate, the data's. A subsampled plate's scale multiplies each datum's bound and
        not its weights. The K samples run as one vectorized plate on the left of all others, so model and guide must
        broadcast over it, as for ``Trace_ELBO(vectorize_particles=True)``.

    Sources: Burda et al. 2016, arXiv:1509.00519, eq. 8; Tucker et al. 2019, arXiv:1810.04152, eq. 8.

    Args:
        num_samples: K.
        dreg: the doubly reparameterized gradient; it needs a reparameterized guide, in which no site's distribution
            depends on another's draw.
        plate: the data's plate; by default the outermost that holds all latents and data.
        max_plate_nesting: as in Pyro; guessed by a run if left out.

    Raises:
        OptionError: num_samples is not a positive integer; at a call, if the guide does not serve `dreg`.
        TargetError: at a call, if a latent or a factor is outside the plate.

    Example:
        >>> import flowvi
        >>> flowvi.IWELBO(num_samples=10)
        IWELBO(num_samples=10, dreg=True)
    """

    def __init__(
        self,
        num_samples: int = 10,
        *,
        dreg: bool = True,
        plate: str | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        positive_integers(num_samples=num_samples)
        flags(dreg=dreg)
        instances(str, type(None), plate=plate)
        if not (isinstance(max_plate_nesting, float) and math.isinf(max_plate_nesting)):
            whole_numbers(max_plate_nesting=max_plate_nesting)
        super().__init__(num_particles=num_samples, max_plate_nesting=max_plate_nesting)
        self.num_samples, self.dreg, self.plate = num_samples, dreg, plate
        self._checked = False

    def __repr__(self) -> str:
        return f"IWELBO(num_samples={self.num_samples}, dreg={self.dreg})"

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """What Pyro asks of a loss: one trace of both, without particles."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """As Pyro's, without its line in the log: who asks for a likelihood did not ask for that."""
        log = logging.getLogger("pyro.infer.elbo")
        level = log.level
        log.setLevel(logging.WARNING)
        try:
            super()._guess_max_plate_nesting(model, guide, args, kwargs)
        finally:
            log.setLevel(level)

    def weighted(self, model: Any, guide: Any, args: Any, kwargs: Any, *, path: bool = False) -> _Weighted:
        """One set of K importance samples for every datum.

        Args:
            model: the Pyro model.
            guide: its guide.
            args: what both are called with.
            kwargs: likewise.
            path: whether the parts of the doubly reparameterized gradient are found as well.

        Returns:
            The log weights of all data, with what their gradient needs.
        """
        if math.isinf(self.max_plate_nesting):
            with torch.no_grad():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
        rank = int(self.max_plate_nesting) + 1
        traces = get_importance_trace(
            "flat",
            rank,
            _over_particles(model, self.num_samples, rank),
            _over_particles(guide, self.num_samples, rank),
            args,
            kwargs,
        )
        return _weigh(*traces, num=self.num_samples, rank=rank, plate=self.plate, path=path)

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """-L_K, an estimate without bias, without gradient.

        Args:
            model: the Pyro model.
            guide: its guide.
            *args: what both are called with.
            **kwargs: likewise.

        Returns:
            A number.
        """
        found = self.weighted(model, guide, args, kwargs)
        return -float(found.scale * _bound(found.log_w).sum())

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """-L_K whose backward pass gives the estimator's gradient.

        Args:
            model: the Pyro model.
            guide: its guide.
            *args: what both are called with.
            **kwargs: likewise.

        Returns:
            A scalar tensor.
        """
        found = self.weighted(model, guide, args, kwargs, path=self.dreg)
        for name, _, _, reparameterized in found.latents:
            if not reparameterized:
                raise OptionError(f"guide site {name!r} has no rsample, which the importance-weighted gradient needs.")
        if found.path is None:
            return -found.scale * _bound(found.log_w).sum()
        if not self._checked:
            _require_flat(found)
            self._checked = True
        value = -found.scale * _bound(found.log_w.detach()).sum()
        share = torch.softmax(found.log_w.detach(), 0)
        # The surrogate weighs log w_k by v_k; what passes through z_k to the guide is weighed by v_k once more.
        for _, z, event_dim, _ in found.latents:
            if z.requires_grad:
                z.register_hook(_times(found.beside(share, event_dim)))
        surrogate = -found.scale * (share * found.path).sum()
        return value + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """-L_K, and its gradient added to the parameters' ``.grad``.

        Args:
            model: the Pyro model.
            guide: its guide.
            *args: what both are called with.
            **kwargs: likewise.

        Returns:
            A number, the estimate of -L_K.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        warn_if_nan(loss.detach(), "loss")
        return float(loss.detach())


def _times(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda g: g * weight


def _bound(log_w: Tensor) -> Tensor:
    """Log (1/K) sum_k w_k, (N,), of log w (K, N)."""
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def _over_particles(fn: Callable[..., Any], num: int, rank: int) -> Callable[..., Any]:
    """Fn inside a plate of K particles on the left of all others."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, num, dim=-rank):
            return fn(*args, **kwargs)

    return run


def _require_flat(found: _Weighted) -> None:
    """No draw of the guide may depend on another: the weights of DReG would be wrong for it."""
    for i, (later, z, _, _) in enumerate(found.latents):
        for earlier, x, _, _ in found.latents[:i]:
            if not (x.requires_grad and z.requires_grad):
                continue
            if torch.autograd.grad(z.sum(), x, retain_graph=True, allow_unused=True)[0] is not None:
                raise OptionError(
                    f"guide site {later!r} depends on the draw of {earlier!r}, for which the doubly reparameterized "
                    f"gradient does not hold: use IWELBO(..., dreg=False)."
                )


def _weigh(model_trace: Any, guide_trace: Any, *, num: int, rank: int, plate: str | None, path: bool) -> _Weighted:
    model_sites = {n: s for n, s in model_trace.nodes.items() if s["type"] == "sample"}
    guide_sites = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    frame = _data_plate(model_sites, plate)
    for name, site in guide_sites.items():
        _require_inside(name, site, frame)
    scale = 1.0 if frame is None else (frame.full_size or frame.size) / frame.size
    found = _Weighted(torch.zeros(()), None, scale, frame, [], rank)
    log_p = sum((found.per_datum(s["log_prob"]) for s in model_sites.values()), torch.zeros(()))
    log_q = sum((found.per_datum(s["log_prob"]) for s in guide_sites.values()), torch.zeros(()))
    found.log_w = log_p - log_q
    if found.log_w.dim() == 0:
        raise TargetError("model and guide have no sample site.")
    found.log_w = found.log_w.expand(num, -1)
    for name, site in guide_sites.items():
        if not _is_point(site["fn"]):
            found.latents.append((name, site["value"], len(site["fn"].event_shape), bool(site["fn"].has_rsample)))
    if path and all(latent[3] for latent in found.latents):
        held = sum((found.per_datum(path_log_prob(n, s)) for n, s in guide_sites.items()), torch.zeros(()))
        found.path = (log_p - held).expand(num, -1)
    return found


def _data_plate(sites: Mapping[str, Any], name: str | None) -> Any:
    """The frame of the outermost plate that all of the model's sites are in; None where there is no plate at all."""
    stacks = {n: [f for f in s["cond_indep_stack"] if f.vectorized and f.name != PARTICLES] for n, s in sites.items()}
    if name is None and not any(stacks.values()):
        return None
    for frame in max(stacks.values(), key=len, default=[]):
        if name in (None, frame.name) and all(frame in stack for stack in stacks.values()):
            return frame
    if name is not None and all(f.name != name for stack in stacks.values() for f in stack):
        raise OptionError(f"the model has no site in a plate named {name!r}.")
    depth = {n: len(stack) for n, stack in stacks.items()}
    outside = min(depth, key=lambda n: (name in [f.name for f in stacks[n]], depth[n]))
    raise TargetError(_outside(outside))


def _require_inside(name: str, site: Any, frame: Any) -> None:
    if frame is not None and frame not in site["cond_indep_stack"] and not _is_point(site["fn"]):
        raise TargetError(_outside(name))


def _outside(name: str) -> str:
    return (
        f"site {name!r} is outside the data's plate, so the data points have no importance weights of their own: learn "
        f"it as a pyro.param, or use flowvi.PathELBO, which has no need of them."
    )


def _is_point(fn: Any) -> bool:
    return isinstance(fn, (dist.Delta, dist.Unit))
