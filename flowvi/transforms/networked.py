"""Transforms whose parameters a network computes, with and without a context: one contract for both.

A family with networks (coupling, autoregressive) writes its mathematics once, in three methods that take the
context or None. `NetworkTransform` makes the plain Pyro transform of them, `ConditionalNetworkTransform` the
conditional twin.
"""

from __future__ import annotations

from types import FunctionType

from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor
from torch.distributions import constraints

from flowvi.checks import whole_numbers
from flowvi.transforms.base import InvertibleMap, Transform, check_context


class NetworkTransform(Transform):
    """A bijection of R^D whose parameters a network computes from parts of x and, if there is one, a context.

    Args:
        input_dim: D.
        context_dim: C, the size of the context; 0 for none.

    Raises:
        OptionError: input_dim is not a positive integer, or context_dim negative.
    """

    def __init__(self, input_dim: int, *, context_dim: int = 0) -> None:
        super().__init__(input_dim)
        whole_numbers(context_dim=context_dim)
        self.context_dim = context_dim

    # The mathematics, one family each; context is (..., C), broadcast against the batch of x, or None.

    def forward_given(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Y (..., D) and log|det dy/dx| (...)."""
        raise NotImplementedError

    def inverse_given(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """X (..., D) and log|det dx/dy| (...)."""
        raise NotImplementedError

    def score_given(self, x: Tensor, score: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, log|det dy/dx|, and d log q(y)/dy (..., D) from d log q(x)/dx (..., D)."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.forward_given(x, None)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.inverse_given(y, None)[0]

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.inverse_given(y, None)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.score_given(x, score, None)


def is_as_written(transform: Transform, base: type[Transform]) -> bool:
    """Whether nothing that computes is overridden in a class of somebody's own: what a kernel does is then the same.

    Args:
        transform: an instance of `base`.
        base: the class that the kernel was written after.
    """
    mine = {name for kind in base.__mro__ for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    given, harmless = type(transform), {"__init__", "__repr__", "extra_repr"}
    return all(getattr(given, name) is getattr(base, name) for name in mine - harmless)


class WithContext(InvertibleMap):
    """A `NetworkTransform` at a context: what `condition(context)` returns."""

    def __init__(self, transform: NetworkTransform, context: Tensor) -> None:
        super().__init__(cache_size=1)
        self.transform, self.context = transform, context
        self.input_dim = transform.input_dim
        self.has_path_score = transform.has_path_score  # type: ignore[misc]

    def _parameter_tensors(self) -> tuple[Tensor, ...]:
        return (*self.transform.parameters(), self.context)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.transform.forward_given(x, self.context)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.transform.inverse_given(y, self.context)[0]

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.transform.inverse_given(y, self.context)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.transform.score_given(x, score, self.context)

    def __repr__(self) -> str:
        return f"WithContext({self.transform})"


class ConditionalNetworkTransform(ConditionalTransformModule):
    """The conditional twin of a `NetworkTransform` with ``context_dim`` C: the context joins its network's inputs.

    Args:
        transform: built with ``context_dim`` > 0.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, transform: NetworkTransform) -> None:
        super().__init__()
        self.transform = transform

    def condition(self, context: Tensor) -> WithContext:
        """The transform at a context of shape (..., C), acting on points (..., D).

        Raises:
            OptionError: the context is not a tensor of the parameters' dtype.
            DimensionError: its last dimension is not C.
        """
        check_context(context, self.transform.context_dim, next(self.transform.parameters()))
        return WithContext(self.transform, context)
