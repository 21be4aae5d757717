"""Targets: energies, callables and Pyro models, all as one `LogDensity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowvi.checks import as_device, float_or_double, keywords, positive_integers
from flowvi.errors import OptionError, TargetError
from flowvi.targets.density import Energy, LogDensity
from flowvi.targets.model import ModelDensity, default_dtype
from flowvi.targets.plain import PlainDensity
from flowvi.targets.sites import Site

__all__ = ["Energy", "LogDensity", "Site", "as_density"]


def as_density(
    target: Any,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LogDensity:
    """Any target as a `LogDensity`.

    Args:
        target: an energy (it has `dim` and `log_density`); a callable z (S, D) -> log p (S,), with `dim`; a Pyro
            model; or a `LogDensity`, which is returned as it is.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        dim: D of a callable.
        dtype: float64 if an argument is, else torch's default, if None.
        device: where to compute; the CPU if None.

    Returns:
        The density over z in R^D, with its gradient and the way back to the target's own variables.

    Raises:
        OptionError: arguments that don't go with this target.
        TargetError and its children: the target can't be used; the message says why.
    """
    if isinstance(target, LogDensity):
        return target
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise OptionError(f"args must be a tuple of the model's arguments, such as args=(x, y), not {type(args)}.")
    keywords(kwargs=kwargs)
    float_or_double(dtype)
    dtype = dtype or default_dtype(args, kwargs)
    where = as_device(device) or torch.get_default_device()
    if isinstance(target, Energy):
        if dim is not None:
            positive_integers(dim=dim)
        if dim is not None and dim != target.dim:
            raise OptionError(f"the energy has dim {target.dim}, but dim={dim} was given: leave it out.")
        if args or kwargs:
            raise OptionError("args and kwargs belong to Pyro models: give the energy what it needs when it is made.")
        return PlainDensity.of_energy(target, dtype=dtype, device=where)
    if not callable(target):
        raise TargetError(
            f"a target is a Pyro model, an energy with `dim` and `log_density`, or a callable with dim=; "
            f"{type(target).__name__} is none of these."
        )
    if dim is not None:
        if args or kwargs:
            raise OptionError("args and kwargs belong to Pyro models: bind them into the callable (functools.partial).")
        name = getattr(target, "__name__", type(target).__name__)
        return PlainDensity(target, dim, dtype=dtype, device=where, name=name)
    return ModelDensity(target, tuple(args), dict(kwargs or {}), dtype=dtype, device=where)
