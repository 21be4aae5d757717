"""One run of a Pyro model with given latents, in isolation, and what it says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flowvi.errors import FlowVIError, TargetError
from flowvi.random_state import ONE_AT_A_TIME
from flowvi.targets.enumeration import EnumeratedRun, Enumeration
from flowvi.targets.isolation import HeldParameters, all_data, dtype_and_device, no_validation, private_rng
from flowvi.targets.run import Run
from flowvi.targets.sites import Reader

__all__ = ["Runner"]


class Runner:
    """A Pyro model with its arguments.

    Args:
        model: the Pyro model.
        args: its arguments; floating tensors in them are cast to `dtype` and moved to `device`.
        kwargs: its keyword arguments, likewise.
        dtype: of z and of what the model computes.
        device: where.
        whole: whether every subsampling plate takes all of its data.

    Attributes:
        enumeration: how the discrete latents are summed out, once that is known; None without any.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        self.name = getattr(model, "__name__", type(model).__name__)
        self.model, self.dtype, self.device = model, dtype, device
        self.args = tuple(_cast(a, dtype, device) for a in args)
        self.kwargs = {k: _cast(v, dtype, device) for k, v in kwargs.items()}
        self.held = HeldParameters()
        self.enumeration: Enumeration | None = None
        self._whole = whole

    @contextmanager
    def isolated(self, *, seed: int = 0, validation: bool = False) -> Iterator[None]:
        """No global state is left changed.

        Args:
            seed: of whatever the model draws by itself.
            validation: leaves the argument checks as the user has them; else they are off, so that one bad
                particle doesn't raise.
        """
        with ONE_AT_A_TIME, ExitStack() as stack:
            if not validation:
                stack.enter_context(no_validation())
            stack.enter_context(private_rng(self.device, seed))
            stack.enter_context(dtype_and_device(self.dtype, self.device))
            stack.enter_context(self.held())
            if self._whole:
                stack.enter_context(all_data())
            yield

    def __call__(self, reader: Reader) -> Run:
        """Runs the model with the latents that `reader` gives, out of sight of the handlers around the call.

        Discrete latents have all of their values where `enumeration` is set, else one, drawn from their prior.
        """
        with ExitStack() as stack:
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            stack.enter_context(reader)
            for handler in self.enumeration.handlers() if self.enumeration else ():
                stack.enter_context(handler)
            self.model(*self.args, **self.kwargs)
        if self.enumeration is None:
            return Run(tracer.trace.nodes, reader.log_det)
        return EnumeratedRun(tracer.trace, reader.log_det, self.enumeration)

    def failed(self, error: Exception) -> TargetError:
        """What to raise from an error that the model raised."""
        text = str(error).strip() or "no message"
        return TargetError(
            f"the model {self.name} failed with {type(error).__name__}: {text}. The error above is its own"
        )

    @contextmanager
    def typed(self) -> Iterator[None]:
        """Whatever the model raises inside is a `TargetError`, with the original as its cause."""
        try:
            yield
        except FlowVIError:
            raise
        except Exception as error:
            raise self.failed(error) from error

    def parameter_names(self, run: Run, recorded: list[Tensor]) -> list[str]:
        """The names of the parameters that a run or a graph reads."""
        names = dict(self.held.names)
        for module in self._modules():
            names |= {id(p): n for n, p in module.named_parameters()}
        found = [n["name"] for n in run.nodes.values() if n["type"] == "param"]
        found += [names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in recorded]
        return sorted({n.replace("$$$", ".") for n in found})  # as pyro.module joins names

    def _modules(self) -> Iterator[torch.nn.Module]:
        """The modules that the model is, belongs to, is given, or finds where it was written."""
        things = [self.model, getattr(self.model, "__self__", None), *self.args, *self.kwargs.values()]
        if inspect.isfunction(self.model):
            found = inspect.getclosurevars(self.model)
            things += [*found.nonlocals.values(), *found.globals.values()]
        yield from (thing for thing in things if isinstance(thing, torch.nn.Module))


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Floating tensors in nested data get the dtype; all tensors go to the device."""

    def move(t: Tensor) -> Tensor:
        if isinstance(t, torch.nn.Parameter):
            return t
        return t.detach().to(device, dtype) if t.is_floating_point() else t.to(device)

    return tree_map_only(Tensor, move, value)
