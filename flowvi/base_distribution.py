"""What a flow begins with: a distribution over R^D, its draws from a generator, and its score."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from flowvi.checks import positive_integers, shown
from flowvi.errors import DimensionError, OptionError
from flowvi.random_state import kept

__all__ = ["as_base", "innermost", "is_standard", "log_prob", "rsample", "score"]


def as_base(base: Distribution | int, module: nn.Module) -> Distribution:
    """The base as a distribution with event shape (D,).

    Args:
        base: a distribution over R^D, or over batches of D numbers; or D, for the standard normal.
        module: whose parameters' dtype and device the standard normal has.

    Raises:
        OptionError: it is no distribution.
        DimensionError: it is none over R^D.
    """
    if isinstance(base, int):
        positive_integers(base=base)
        like = next(module.parameters(), torch.empty(0))
        # Without torch's check of values: a point with NaN has log density NaN.
        return dist.Normal(like.new_zeros(()), like.new_ones(()), validate_args=False).expand([base]).to_event(1)
    if not isinstance(base, Distribution):
        raise OptionError(f"base must be a distribution over R^D, or D, not {shown(base)}.")
    if base.event_shape == () and base.batch_shape:
        return Independent(base, 1)
    if len(base.event_shape) != 1:
        raise DimensionError(
            f"the base of a Flow is a distribution over R^D, with event shape (D,); this one has event shape "
            f"{tuple(base.event_shape)} and batch shape {tuple(base.batch_shape)}."
        )
    return base


def innermost(base: Distribution) -> Distribution:
    """The distribution of one element, where elements are independent."""
    while isinstance(base, Independent):
        base = base.base_dist
    return base


def is_standard(base: Distribution) -> bool:
    """Whether it is N(0, I)."""
    inner = innermost(base)
    return isinstance(inner, Normal) and bool((inner.loc == 0).all() and (inner.scale == 1).all())


def rsample(base: Distribution, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Draws (*shape, *batch_shape, D), from torch's global generator if None is given.

    Raises:
        OptionError: it is no generator.
    """
    if generator is None:
        return base.rsample(shape)
    if not isinstance(generator, torch.Generator):
        raise OptionError(f"generator must be a torch.Generator or None, not {shown(generator)}.")
    inner = innermost(base)
    if isinstance(inner, Normal):
        eps = torch.randn(
            shape + base.batch_shape + base.event_shape,
            generator=generator,
            dtype=inner.loc.dtype,
            device=inner.loc.device,
        )
        return inner.loc + inner.scale * eps
    with kept(int(torch.randint(2**62, (), generator=generator, device=generator.device))):
        return base.rsample(shape)


def log_prob(base: Distribution, x: Tensor) -> Tensor:
    """Log q_0(x), also of no points."""
    return base.log_prob(x) if x.numel() else x.sum(-1)  # torch's own refuse no points


def score(base: Distribution, x: Tensor) -> Tensor:
    """D log q_0(x) / dx, without a graph."""
    inner = innermost(base)
    if isinstance(inner, Normal):
        with torch.no_grad():
            return (inner.loc - x) / inner.scale.square()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_prob(base, x).sum(), x)[0]
