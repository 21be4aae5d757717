"""What every transform shares: the Pyro contract, shape checks, and a cache that can't go stale.

A family's own file holds only mathematics: `forward_and_log_det(x)`, `inverse(y)` and, where they are cheap,
`inverse_and_log_det(y)` and `forward_with_score(x, score)`. `Transform` turns these into a Pyro transform in
full; `Conditioned` does the same for parameters that came from a context.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.checks import as_shape, positive_integers, shown
from flowvi.errors import DimensionError, OptionError


class InvertibleMap(TorchTransform):
    """A bijection of R^D as a torch distributions transform; the base of `Transform` and `Conditioned`.

    The cache remembers one pair (x, y) and its log-determinant. It is dropped when y is garbage collected
    (no tensor or graph outlives its use), when a parameter changes or is replaced, and when gradients are
    switched on or off, so a stale value is never returned.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    has_path_score: ClassVar[bool] = False
    """Whether `forward_with_score` exists, at a cost of the order of the forward pass."""
    tapeless: ClassVar[bool] = False
    """Whether a bound step (`bind`) keeps next to nothing of the way forward."""

    input_dim: int
    _pair: Any = None  # (x, weak y, log|det|, version): what the cache remembers
    _once = False  # whether it is good for one question only

    # The mathematics, one family each.

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Y (..., D) and log|det dy/dx| (...) of x (..., D)."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """X (..., D) with forward(x) = y, differentiable in y and in the parameters."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """X (..., D) with forward(x) = y, and log|det dx/dy| (...), which is minus the forward log|det| at x.

        What the density of a given y is made of. Override it where one pass gives both, at about the cost of
        `inverse` alone; this default is the inverse and then the forward pass.
        """
        x = self.inverse(y)
        return x, -self.forward_and_log_det(x)[1]

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, log|det dy/dx|, and d log q(y)/dy (..., D) from d log q(x)/dx (..., D).

        The path gradient's ingredient (Vaitl et al. 2024, arXiv:2403.15881): s' = J^-T (s - d log|det J|/dx),
        with no inverse pass.
        """
        raise NotImplementedError

    def bind(self, num_particles: int, with_score: bool) -> Any:
        """Forward and backward passes without a tape, on this transform's parameters and their ``.grad``.

        What a training loop calls (`flowvi.kernels.step` has the contract); None where there is no such thing,
        and autograd does it.

        Args:
            num_particles: S.
            with_score: whether the forward pass carries the score.
        """
        return None

    # What identifies the parameters' present values.

    def _parameter_tensors(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _version(self) -> tuple[Any, ...]:
        parts: list[Any] = [torch.is_grad_enabled()]
        for p in self._parameter_tensors():
            parts += (id(p), 0 if p.is_inference() else p._version)
        return tuple(parts)

    # The contract of torch.distributions.Transform.

    def _check(self, value: Tensor, what: str) -> None:
        if not isinstance(value, Tensor):
            raise OptionError(
                f"{type(self).__name__} takes {what} as a tensor of shape (..., {self.input_dim}), not {shown(value)}."
            )
        if value.dim() == 0 or value.shape[-1] != self.input_dim:
            raise DimensionError(
                f"{type(self).__name__} acts on the last dimension, of size D = {self.input_dim}, but {what} has "
                f"shape {tuple(value.shape)}. Build it with input_dim={value.shape[-1] if value.dim() else 1}, or "
                f"pass {what} of shape (..., {self.input_dim})."
            )
        for p in self._parameter_tensors():
            if p.dtype != value.dtype:
                raise OptionError(
                    f"{type(self).__name__} has {p.dtype} parameters but {what} is {value.dtype}: convert one of "
                    f"them, for example with transform.to({value.dtype})."
                )
            break

    def _remember(self, x: Tensor, y: Tensor, log_det: Tensor | None) -> None:
        if self._cache_size == 0 or torch.compiler.is_compiling():
            return
        owner = weakref.ref(self)

        def forget(dead: Any) -> None:
            me = owner()
            if me is not None and me._pair is not None and me._pair[1] is dead:
                me._pair = None

        self._pair = (x, weakref.ref(y, forget), log_det, self._version())
        self._once = False

    def _recall(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        pair = self.__dict__.get("_pair")
        if pair is None or pair[3] != self._version():
            return None, None, None
        return pair[0], pair[1](), pair[2]

    def clear_cache(self) -> None:
        """Forget the remembered pair (never needed for correctness)."""
        self._pair = None

    def __call__(self, x: Tensor) -> Tensor:
        """Y = f(x), (..., D) to (..., D)."""
        x_old, y_old, _ = self._recall()
        if x is x_old and y_old is not None:
            return y_old
        self._check(x, "x")
        y, log_det = self.forward_and_log_det(x)
        if y is x:  # so that x and y stay two ends of a pair
            y = x.view_as(x)
        self._remember(x, y, log_det)
        return y

    def _call(self, x: Tensor) -> Tensor:
        return self(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        x_old, y_old, _ = self._recall()
        if y is y_old and x_old is not None and not self._once:
            return x_old
        self._check(y, "y")
        log_det = None
        if type(self).inverse_and_log_det is InvertibleMap.inverse_and_log_det:
            x = self.inverse(y)
        else:  # the log-determinant costs nothing more, and may be asked for next
            x, log_det = self.inverse_and_log_det(y)
            log_det = -log_det
        if x is y:  # so that x and y stay two ends of a pair
            x = y.view_as(y)
        self._remember(x, y, log_det)
        # The graph of x is its caller's to go backward through, and holds y: it serves the question that follows, once.
        self._once = x.requires_grad
        return x

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse_and_log_det` with the checks and the cache: x and log|det dx/dy| of y (..., D)."""
        x_old, y_old, _ = self._recall()
        if y is y_old and x_old is not None and not self._once:
            return x_old, -self.log_abs_det_jacobian(x_old, y)
        self._check(y, "y")
        x, log_det = self.inverse_and_log_det(y)
        if x is y:  # so that x and y stay two ends of a pair
            x = y.view_as(y)
        if not x.requires_grad:
            self._remember(x, y, -log_det)
        return x, log_det

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inv_call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| at x, of shape x.shape[:-1]; right for any pair (x, y = f(x))."""
        x_old, y_old, log_det = self._recall()
        known = x is x_old and y is y_old
        if known and self._once:
            self._pair = None
        if known and log_det is not None:
            return log_det
        self._check(x, "x")
        log_det = self.forward_and_log_det(x)[1]
        if known and not self._once:
            self._remember(x, y, log_det)
        return log_det

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of f(x) for x of `shape`, which must end in D."""
        return self._check_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of f^-1(y) for y of `shape`, which must end in D."""
        return self._check_shape(shape)

    def _check_shape(self, shape: torch.Size) -> torch.Size:
        shape = as_shape("shape", shape)
        if len(shape) < 1 or shape[-1] != self.input_dim:
            raise DimensionError(
                f"{type(self).__name__} has D = {self.input_dim}, but is asked to act on shape {tuple(shape)}: "
                f"its last dimension must be D."
            )
        return shape

    def with_cache(self, cache_size: int = 1) -> InvertibleMap:
        """The same transform, sharing its parameters, with another cache size (0 or 1)."""
        _check_cache_size(cache_size)
        if cache_size == self._cache_size:
            return self
        twin = copy.copy(self)
        twin._cache_size = cache_size
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_inv"] = None
        state["_cached_x_y"] = None, None
        state["_pair"] = None
        return state


def _check_cache_size(cache_size: Any) -> None:
    if not (isinstance(cache_size, int) and cache_size in (0, 1)):
        raise OptionError(f"cache_size must be 0 or 1, not {shown(cache_size)}.")


def check_context(context: Any, context_dim: int, like: Tensor) -> None:
    """A context (..., C) of the parameters' dtype.

    Raises:
        OptionError: it is not a tensor, or of another dtype.
        DimensionError: its last dimension is not C.
    """
    if not isinstance(context, Tensor):
        raise OptionError(f"context must be a tensor of shape (..., {context_dim}), not {shown(context)}.")
    if context.dim() == 0 or context.shape[-1] != context_dim:
        raise DimensionError(
            f"a context of size C = {context_dim} in its last dimension is needed, not one of shape "
            f"{tuple(context.shape)}."
        )
    if context.dtype != like.dtype:
        raise OptionError(
            f"context is {context.dtype}, but the parameters are {like.dtype}: convert one of them, for example by "
            f"context.to({like.dtype})."
        )


class Transform(InvertibleMap, TransformModule):
    """A bijection of R^D with learnable parameters: a Pyro `TransformModule` in full.

    To add a family, subclass it, create `nn.Parameter`s and write `forward_and_log_det` and `inverse` (and
    `forward_with_score`, with ``has_path_score = True``, where it is cheap); then `register` a name for it.

    Args:
        input_dim: D, at least 1.
        cache_size: 1 to remember the last pair (x, y), 0 to remember none.

    Raises:
        OptionError: input_dim is not a positive integer, or cache_size neither 0 nor 1.
    """

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        positive_integers(input_dim=input_dim)
        _check_cache_size(cache_size)
        super().__init__(cache_size=cache_size)
        self.input_dim = input_dim

    def _parameter_tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters())

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Conditioned(InvertibleMap):
    """A family's map at parameters that came from a context: what `condition(context)` returns.

    Args:
        family: the plain transform class, whose static `_forward`, `_inverse_map` and `_score` are used.
        params: its parameters, with the context's batch shape in front.
        options: what the family's static functions take beside the parameters.
    """

    def __init__(self, family: type[Any], params: tuple[Tensor, ...], **options: Any) -> None:
        super().__init__(cache_size=1)
        self.family, self.params, self.options = family, params, options
        self.input_dim = params[0].shape[-1]
        self.has_path_score = family.has_path_score  # type: ignore[misc]

    def _parameter_tensors(self) -> tuple[Tensor, ...]:
        return self.params

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.family._forward(x, *self.params, **self.options)

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.family._inverse_map(y, *self.params, **self.options)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.family._score(x, score, *self.params, **self.options)

    def __repr__(self) -> str:
        return f"Conditioned({self.family.__name__}, D={self.input_dim})"
