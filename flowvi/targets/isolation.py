"""Running somebody else's Pyro model without leaving a mark: every global that it may touch is put back.

Pyro and torch keep validation flags, the default dtype, random generators and the parameter store in globals.
The context managers here change what a run needs and restore it, whatever the model raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.settings
import pyro.util
import torch
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

__all__ = ["HeldParameters", "all_data", "dtype_and_device", "no_validation", "private_rng"]

_VALIDATION = (
    "validate_distributions_pyro",
    "validate_distributions_torch",
    "validate_infer",
    "validate_poutine",
)


@contextmanager
def no_validation() -> Iterator[None]:
    """Pyro's and torch's argument checks are off: they read values, and one bad particle must not raise."""
    with pyro.settings.context(**dict.fromkeys(_VALIDATION, False)):
        yield


@contextmanager
def dtype_and_device(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Tensors that the model makes get this dtype and are made on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if device == torch.get_default_device():
            yield
        else:
            with device:
                yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def private_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Random draws inside don't advance the user's generators (torch, CUDA, random, numpy).

    With a seed the draws are that seed's, without one they start where the user's generators are.
    """
    before = pyro.util.get_rng_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                pyro.set_rng_seed(seed)
            yield
    finally:
        pyro.util.set_rng_state(before)


@contextmanager
def all_data() -> Iterator[None]:
    """Every `pyro.plate` with a `subsample_size` takes all of its data instead."""
    original = SubsampleMessenger.__dict__["_subsample"]

    def whole(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any, **more: Any
    ) -> Any:
        if subsample is None:
            subsample_size = None
        return original.__func__(name, size, subsample_size, subsample, *rest, **more)

    SubsampleMessenger._subsample = staticmethod(whole)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = original


class HeldParameters:
    """The parameters that a model's own runs create, kept here and out of the user's parameter store.

    A parameter that the user's store has is read from there, live; one that it lacks is made by the model's
    first run and stays the same in all later ones.
    """

    def __init__(self) -> None:
        self._params: dict[str, Tensor] = {}
        self._constraints: dict[str, Any] = {}

    @property
    def names(self) -> dict[int, str]:
        """The name of every parameter of the user's store and of this one, by the tensor's id."""
        return {id(p): n for n, p in (self._params | pyro.get_param_store()._params).items()}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The store holds the user's parameters and these; afterwards it is the user's as it was."""
        store = pyro.get_param_store()
        params, names, constraints = store._params, store._param_to_name, store._constraints
        store._params = self._params | params
        store._param_to_name = {p: n for n, p in store._params.items()}
        store._constraints = self._constraints | constraints
        marked = {id(p) for p in store._params.values() if hasattr(p, "_pyro_subsample")}
        try:
            yield
            self._params |= {n: p for n, p in store._params.items() if n not in params}
            self._constraints |= {n: c for n, c in store._constraints.items() if n in self._params}
        finally:
            for p in store._params.values():  # a subsampling plate leaves its indices on a parameter
                if id(p) not in marked and hasattr(p, "_pyro_subsample"):
                    del p._pyro_subsample
            store._params, store._param_to_name, store._constraints = params, names, constraints
