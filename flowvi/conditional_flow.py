r"""ConditionalFlow: a density q(x | c) made of a standard normal, layers that know a context c, and an affine map."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from flowvi import transforms
from flowvi.errors import DimensionError, FlowVIError, OptionError
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.transforms.affine import Affine
from flowvi.transforms.base import Transform
from flowvi.transforms.conditional_affine import ConditionalAffine
from flowvi.transforms.registry import available, lookup

__all__ = ["ConditionalFlow"]


class ConditionalFlow(nn.Module):
    r"""x = loc + A g(h_K(...h_1(eps; c); c); c), eps ~ N(0, I): a `Flow` at every context c.

    h_1 to h_K are the flow's conditional layers; the order of the coordinates is reversed from each to the next,
    because a coupling or autoregressive layer treats them unequally. g is a conditional shift and scale, which
    holds the regression of x on c, and loc + A z is the same for every context. Contexts are standardized by a
    fixed shift and scale first. At the start q(x | c) is N(0, I) for every context.

    Args:
        spec: the structure; ``spec.name`` is a flow that has a conditional form.
        context_dim: C.
        dtype: of the parameters; torch's default if None.
        device: of the parameters.
        factory: builds a conditional layer, factory(input_dim, context_dim, **options), in place of the
            registered ``spec.name``.

    Raises:
        OptionError: the flow has no conditional form, or an option can't be used.
        UnknownFlowError: ``spec.name`` is not registered.

    Example:
        >>> import torch
        >>> from flowvi import FlowSpec
        >>> from flowvi.conditional_flow import ConditionalFlow
        >>> q = ConditionalFlow(FlowSpec("planar", dim=2, num_flows=4), context_dim=3)
        >>> q.condition(torch.zeros(5, 3)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    context_loc: Tensor
    context_scale: Tensor

    def __init__(
        self,
        spec: FlowSpec,
        context_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        factory: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.context_dim = spec, context_dim
        make = factory or conditional_factory(spec.name)
        try:
            layers = _build(make, spec, context_dim)
        except FlowVIError:
            raise
        except Exception as e:  # the factory is the user's, and so is what it may raise
            raise OptionError(f"conditional {spec.name} can't be built with options {dict(spec.options)}: {e!r}") from e
        for layer in layers:
            if not (isinstance(layer, Reversal) or callable(getattr(layer, "condition", None))):
                raise OptionError(
                    f"the factory of conditional {spec.name} returned {type(layer).__name__}, which has no condition()."
                )
        self.layers = nn.ModuleList([*layers, ConditionalAffine(spec.dim, context_dim)])
        self.affine = Affine(spec.dim, spec.base)
        self.register_buffer("context_loc", torch.zeros(context_dim))
        self.register_buffer("context_scale", torch.ones(context_dim))
        self.to(device=device, dtype=dtype or torch.get_default_dtype())

    @property
    def dim(self) -> int:
        """D."""
        return self.spec.dim

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.affine.loc.dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.affine.loc.device

    def condition(self, context: Tensor) -> Flow:
        """q(. | context), with the context's batch shape.

        Args:
            context: (..., C).

        Returns:
            A flow with batch shape (...) and event shape (D,).

        Raises:
            DimensionError: the context's last dimension is not C.
        """
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise DimensionError(
                f"this flow takes contexts (..., C) with C = {self.context_dim}, not of shape {tuple(context.shape)}."
            )
        context = (context - self.context_loc) / self.context_scale
        one = self.affine.loc.new_ones(())
        base = dist.Normal(0 * one, one, validate_args=False).expand([*context.shape[:-1], self.dim]).to_event(1)
        layers: Any = self.layers
        at = [layer if isinstance(layer, Reversal) else layer.condition(context) for layer in layers]
        return Flow(base, [*at, self.affine])

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.dim}, C={self.context_dim}"


class Reversal(Transform):
    """x_1, ..., x_D -> x_D, ..., x_1."""

    has_path_score = True

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return x.flip(-1), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return y.flip(-1)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`."""
        return *self.forward_and_log_det(x), score.flip(-1)


def _build(make: Callable[..., Any], spec: FlowSpec, context_dim: int) -> list[Any]:
    """K conditional layers: by one call where the factory takes num_flows, else one by one."""
    options = dict(spec.options)
    if spec.num_flows and "num_flows" in inspect.signature(make).parameters:
        return [make(spec.dim, context_dim, num_flows=spec.num_flows, **options)]
    layers: list[Any] = []
    for k in range(spec.num_flows):
        if k and spec.dim > 1:
            layers.append(Reversal(spec.dim))
        layers.append(make(spec.dim, context_dim, **options))
    return layers


def conditional_factory(name: str) -> Callable[..., Any]:
    """What builds one conditional layer of a registered flow: factory(input_dim, context_dim, **options).

    It is the registry's, or the function ``conditional_<name>`` of `flowvi.transforms`.

    Raises:
        OptionError: the flow has no conditional form; the message lists those that have.
        UnknownFlowError: the name is not registered.
    """
    factory = _find(name)
    if factory is None:
        have = ", ".join(n for n in available() if _find(n) is not None)
        raise OptionError(f"flow {name!r} has no conditional form; these have: {have}.")
    return factory


def _find(name: str) -> Callable[..., Any] | None:
    return lookup(name).conditional or getattr(transforms, f"conditional_{name}", None)


def flow_at(flow: Flow | ConditionalFlow, context: Tensor | None) -> Flow:
    """The flow at a context, if it takes one."""
    if isinstance(flow, ConditionalFlow):
        assert context is not None  # checked where a user's context comes in
        return flow.condition(context)
    return flow
