r"""Flows whose parameters come from a datum's features: the part of an amortized guide that has no model in it.

z_n = loc_n + scale_n f_K(...f_1(eps; theta_n)...; theta_n), eps ~ N(0, I): linear maps (or small networks) of the
features of x_n give loc_n, scale_n and the parameters theta_n of all K layers (Rezende & Mohamed 2015,
arXiv:1505.05770, section 4; there the scale comes before the planar layers, which is the same family).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from flowvi.conditional_flow import Reversal, conditional_factory
from flowvi.errors import OptionError
from flowvi.flow import Flow
from flowvi.transforms.base import Conditioned
from flowvi.transforms.conditional_affine import _LIMIT, _ShiftScale
from flowvi.transforms.stack_conditional import (
    ParameterNetwork,
    conditional_planar_stack,
    conditional_radial_stack,
)

__all__ = ["AmortizedFlow"]

STACKS: dict[str, Callable[..., Any]] = {"planar": conditional_planar_stack, "radial": conditional_radial_stack}
"""Flows whose K layers of each datum's own go through one kernel."""


class AmortizedFlow(nn.Module):
    """Features (..., C) of a datum to its flow over R^D; N(0, s^2 I) at the start, for every datum.

    Args:
        input_dim: D.
        context_dim: C.
        flow: a registered name that has a conditional form.
        num_flows: K; 0 is a Gaussian with a diagonal covariance.
        hidden: sizes of the hidden layers between the features and all parameters; () is linear.
        init_scale: s.
        **options: of the flow's conditional form.

    Raises:
        OptionError: an argument can't be used, or the flow has no conditional form.
        UnknownFlowError: the name is not registered.

    Example:
        >>> import torch
        >>> from flowvi.amortized_flow import AmortizedFlow
        >>> q = AmortizedFlow(2, context_dim=8, num_flows=4)
        >>> q(torch.randn(100, 8)).rsample().shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        flow: str = "planar",
        num_flows: int = 16,
        *,
        hidden: Sequence[int] = (),
        init_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.input_dim, self.context_dim = input_dim, context_dim
        raw = _LIMIT * math.atanh(math.log(init_scale) / _LIMIT)
        self.base = ParameterNetwork(context_dim, hidden, [torch.zeros(input_dim), torch.full((input_dim,), raw)])
        self.layers = nn.ModuleList(_layers(flow, input_dim, context_dim, num_flows, tuple(hidden), options))

    def forward(self, context: Tensor) -> Flow:
        """The flows at features (..., C): batch shape (...), event shape (D,)."""
        loc, raw = self.base(context)
        layers: Any = self.layers
        at = [layer if isinstance(layer, Reversal) else layer.condition(context) for layer in layers]
        zero = torch.zeros((), dtype=loc.dtype, device=loc.device)
        base = dist.Normal(zero, zero + 1, validate_args=False).expand(loc.shape).to_event(1)
        return Flow(base, [*at, Conditioned(_ShiftScale, (loc, raw))], validate_args=False)


def _layers(
    flow: str, input_dim: int, context_dim: int, num_flows: int, hidden: tuple[int, ...], options: dict[str, Any]
) -> list[nn.Module]:
    if num_flows == 0:
        return []
    try:
        if flow in STACKS:
            return [STACKS[flow](input_dim, context_dim, num_flows, **({"hidden_dims": hidden} | options))]
        make = conditional_factory(flow)
        accepted = inspect.signature(make).parameters
        if "hidden_dims" in accepted:
            options = {"hidden_dims": hidden or (64,)} | options
        if "num_flows" in accepted:
            return [make(input_dim, context_dim, num_flows=num_flows, **options)]
        layers: list[nn.Module] = []
        for k in range(num_flows):
            if k and input_dim > 1:  # coupling and autoregressive layers treat the coordinates unequally
                layers.append(Reversal(input_dim))
            layers.append(make(input_dim, context_dim, **options))
    except TypeError as e:
        raise OptionError(f"an amortized {flow} can't be built with options {options}: {e}") from e
    return layers
