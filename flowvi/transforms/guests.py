"""Transforms of other libraries as ours: any Pyro (or torch) transform, and any zuko flow or lazy transform.

A guest is wrapped once, when a flow is built, and from then on keeps our contract: value and log-determinant in one
call; an inverse, or a typed error that says what to do; shape and dtype checks; no tensor or graph kept between calls
but the one pair that our own cache holds while it is used. What a guest does not have, a path score and the identity
at the start, it doesn't gain: the engine takes the standard gradient for it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.distributions.torch_transform import ComposeTransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.errors import OptionError
from flowvi.transforms.base import InvertibleMap, Transform


class Guest(Transform):
    """A transform of another library behind our contract: the base of `PyroGuest` and `ZukoGuest`.

    Args:
        guest: the transform; a module's parameters are learnt.
        input_dim: D.
    """

    def __init__(self, guest: Any, input_dim: int) -> None:
        super().__init__(input_dim)
        self.guest = guest

    def _there(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log|det dy/dx|, as `forward_and_log_det`."""
        raise NotImplementedError

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """X and log|det dx/dy|, as `inverse_and_log_det`; KeyError or NotImplementedError where there is no inverse."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self._there(x)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`.

        Raises:
            OptionError: the guest has no inverse.
        """
        try:
            return self._back(y)
        except (KeyError, NotImplementedError) as e:  # how Pyro's and torch's transforms say it
            raise OptionError(
                f"{type(self.guest).__name__} has no inverse, so log_prob of a value that was not just sampled, and "
                f"path gradients, are not available. For a fit, use the standard ELBO (flowvi.ELBO); for a flow with "
                f"an inverse, take one of flowvi.transforms.available(), such as 'planar' or 'iaf'."
            ) from e

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.inverse_and_log_det(y)[0]

    # The cache keeps x and log|det| while y lives. A guest's log|det|, and an x that came from y, may hold y in their
    # graphs, and would keep it alive: neither is kept.

    def _remember(self, x: Tensor, y: Tensor, log_det: Tensor | None) -> None:
        super()._remember(x, y, None if log_det is None or log_det.requires_grad else log_det)

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        x, y_old, _ = self._recall()
        if y is y_old and x is not None:
            return x, -self.log_abs_det_jacobian(x, y)
        self._check(y, "y")
        return self.inverse_and_log_det(y)

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"{type(self.guest).__name__}, D={self.input_dim}"


class PyroGuest(Guest):
    """A Pyro or torch transform of R^D.

    Its own caches are emptied after each call, for they would keep the last graph alive. It stays in evaluation mode:
    in training mode, Pyro's ``BatchNorm`` is not one bijection, since its inverse depends on the batch.

    Args:
        guest: the transform, from R^D to R^D or from R to R.
        input_dim: D.

    Raises:
        OptionError: its domain or codomain is something else, or it is not bijective.
    """

    def __init__(self, guest: TorchTransform, input_dim: int) -> None:
        if isinstance(guest, ComposeTransform) and not isinstance(guest, nn.Module):
            guest = ComposeTransformModule(guest.parts)  # torch's own would hide its parts' parameters
        super().__init__(guest, input_dim)
        for what, constraint in (("domain", guest.domain), ("codomain", guest.codomain)):
            if not _is_real(constraint):
                raise OptionError(
                    f"a flow's layers map R^D to R^D, but the {what} of {type(guest).__name__} is {constraint}."
                )
        if not guest.bijective:
            raise OptionError(f"a flow's layers are bijective; {type(guest).__name__} says that it is not.")
        self.train()

    def train(self, mode: bool = True) -> PyroGuest:
        """As for any module, but the guest stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.guest, nn.Module):
            self.guest.eval()
        return self

    def _there(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            y = self.guest(x)
            return y, _per_point(self.guest.log_abs_det_jacobian(x, y), x, self.guest)
        finally:
            _forget(self.guest)

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            with _default_dtype(y.dtype):  # Pyro's autoregressive inverse begins with zeros of torch's default
                x = self.guest.inv(y)
            return x, -_per_point(self.guest.log_abs_det_jacobian(x, y), x, self.guest)
        finally:
            _forget(self.guest)


class ZukoGuest(Guest):
    """A zuko flow or lazy transform, without context.

    A zuko flow's transform leads from data to the base, so as a flow of ours it is taken backwards, and what is fast
    in zuko, the density, is fast here. A lazy transform is taken as it is, from the base outwards. So for variational
    inference with an autoregressive one, which needs fast sampling, give the transform:
    ``flow=lambda d: zuko.flows.NSF(d).transform``.

    Args:
        guest: a ``zuko.lazy.Flow`` over R^D with base N(0, I), or a ``zuko.lazy.LazyTransform``.
        input_dim: D.

    Raises:
        OptionError: the flow's base is something else.
    """

    def __init__(self, guest: Any, input_dim: int) -> None:
        lazy = sys.modules["zuko"].lazy
        is_transform = isinstance(guest, lazy.LazyTransform)
        if not is_transform and not isinstance(guest, lazy.Flow):
            raise OptionError(f"{type(guest).__name__} is not made of a transform, so it can't be a flow's layer.")
        super().__init__(guest if is_transform else guest.transform, input_dim)
        self.backwards = not is_transform
        if self.backwards and not _is_standard_normal(guest.base()):
            name = type(guest).__name__
            raise OptionError(
                f"the base of {name} is {guest.base()}, not N(0, I) on R^D, and a flow here has its own base. Give the "
                f"transform alone, if it maps R^D to R^D: flow=lambda d: {name}(d).transform."
            )

    def _there(self, x: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.guest().inv if self.backwards else self.guest()
        y, log_det = transform.call_and_ladj(x)
        return y, _per_point(log_det, x, transform)

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.guest() if self.backwards else self.guest().inv
        x, log_det = transform.call_and_ladj(y)
        return x, _per_point(log_det, y, transform)


def from_pyro(transform: Any, input_dim: int | None = None) -> Any:
    """A Pyro or torch transform as one of ours; or, from a factory, the factory of such transforms.

    ``flow=`` takes Pyro's helpers as they are and does this by itself; it is for a `flowvi.Flow` composed by hand.

    Args:
        transform: a transform, or factory(input_dim, **options) -> transform.
        input_dim: D of a transform.

    Raises:
        OptionError: it is not a bijection of R^D, or input_dim is missing.

    Example:
        >>> import flowvi, pyro.distributions.transforms as T
        >>> from flowvi.transforms import from_pyro
        >>> flow = flowvi.Flow(2, [from_pyro(T.affine_autoregressive(2), 2)])
        >>> flow.log_prob(flow.sample((5,)) + 1).shape
        torch.Size([5])
    """
    if isinstance(transform, TorchTransform):
        return adapt(transform, _require_dim(transform, input_dim))
    return _from(transform, input_dim)


def from_zuko(flow: Any, input_dim: int | None = None) -> Any:
    """A zuko flow or lazy transform as one of our transforms, see `ZukoGuest`; or, from a factory, such a factory.

    ``flow=`` takes zuko's classes as they are and does this by itself; it is for a `flowvi.Flow` composed by hand.

    Args:
        flow: a ``zuko.lazy.Flow``, a ``zuko.lazy.LazyTransform``, or factory(input_dim, **options) of one.
        input_dim: D of a flow or transform.

    Raises:
        OptionError: it can't be a layer of a flow, or input_dim is missing.
    """
    if _is_lazy(flow):
        return adapt(flow, _require_dim(flow, input_dim))
    return _from(flow, input_dim)


def adapt(layer: Any, input_dim: int) -> InvertibleMap:
    """Anything that can be a layer, as an `InvertibleMap`; ours are returned as they are.

    Raises:
        OptionError: it is not a transform.
    """
    if isinstance(layer, InvertibleMap):
        return layer
    if _is_lazy(layer):
        return ZukoGuest(layer, input_dim)
    if isinstance(layer, TorchTransform):
        return PyroGuest(layer, input_dim)
    raise OptionError(
        f"a flow's factory must return a transform (flowvi's, torch's, Pyro's or zuko's); it returned "
        f"{type(layer).__name__}, which is not a transform."
    )


def stack_of(factory: Callable[..., Any]) -> Callable[..., Any] | None:
    """stack(input_dim, num_flows, **options) for a zuko flow class, which takes K as ``transforms``; else None."""
    zuko = sys.modules.get("zuko")
    if zuko is None or not (isinstance(factory, type) and issubclass(factory, zuko.lazy.Flow)):
        return None
    if not any("transforms" in inspect.signature(c).parameters for c in factory.__mro__[:-1]):
        return None
    return lambda input_dim, num_flows, **options: factory(input_dim, transforms=num_flows, **options)


def _from(factory: Any, input_dim: int | None) -> Callable[..., InvertibleMap]:
    if not callable(factory):
        raise OptionError(f"expected a transform or a factory(input_dim, **options) of one, not {factory!r}.")
    if input_dim is not None:
        raise OptionError("input_dim goes with a transform; a factory is told it when it is called.")
    return partial(_build, factory)


def _build(factory: Callable[..., Any], input_dim: int, **options: Any) -> InvertibleMap:
    return adapt(factory(input_dim, **options), input_dim)


def _require_dim(transform: Any, input_dim: int | None) -> int:
    dim = getattr(transform, "input_dim", None) if input_dim is None else input_dim
    if not isinstance(dim, int):
        raise OptionError(f"{type(transform).__name__} does not say its D: give input_dim.")
    return dim


def _is_lazy(layer: Any) -> bool:
    zuko = sys.modules.get("zuko")  # who holds an object of zuko's has imported it
    return zuko is not None and isinstance(layer, (zuko.lazy.LazyDistribution, zuko.lazy.LazyTransform))


def _is_real(constraint: Any) -> bool:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


def _is_standard_normal(base: torch.distributions.Distribution) -> bool:
    inner = base
    while isinstance(inner, torch.distributions.Independent):
        inner = inner.base_dist
    return isinstance(inner, torch.distributions.Normal) and bool((inner.loc == 0).all() and (inner.scale == 1).all())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _per_point(log_det: Tensor, x: Tensor, transform: TorchTransform) -> Tensor:
    """log|det| (...) of x (..., D), from one that broadcasts to it, or to (..., D) where the map is elementwise."""
    if transform.domain.event_dim == 0 or log_det.dim() == x.dim():
        return log_det.expand(x.shape).sum(-1)
    return log_det.expand(x.shape[:-1])


def _parts(transform: Any) -> Iterator[Any]:
    """The transform and all that it is made of, each of which may have a cache."""
    seen, todo = set(), [transform]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, nn.Module):
            todo += part.children()
        for value in vars(part).values():
            todo += [
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, TorchTransform)
            ]


def _forget(transform: Any) -> None:
    """Empty the caches of a torch or Pyro transform: its last (x, y), and what belonged to them."""
    for part in _parts(transform):
        for name, value in list(vars(part).items()):
            if name == "_cached_x_y":
                part.__dict__[name] = (None, None)
            elif name.startswith("_cache") and isinstance(value, Tensor):
                part.__dict__[name] = None
