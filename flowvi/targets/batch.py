"""One particle's graph, evaluated for any number of particles."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.func import grad_and_value, vmap

from flowvi.errors import TraceError
from flowvi.kernels import dispatch
from flowvi.program.instruction import NotLowered
from flowvi.program.lowering import NUM_PARTICLES, lower
from flowvi.program.program import Program
from flowvi.targets.compiling import CompileReport, compile_flat, repays, seconds_per_call
from flowvi.targets.simplify import simplify
from flowvi.targets.trace import trace

__all__ = ["BatchedGraph", "close"]

# Flattening costs about as much as 50 calls save; a size that came up this often will come up again.
_FLATTEN_AFTER = 8
_FLAT_SIZES = 4
_MOST_POINTS = 256


class BatchedGraph:
    """vmap over a graph of z (D,) and shared inputs.

    After a few calls value and gradient are traced once more, into one flat graph of both that neither vmap nor
    autograd has to walk. That graph becomes a program of flowvi's own machine (`flowvi.program`), for any number of
    particles; where it can't, because of an operation that the machine hasn't, a parameter that may change, indices of
    a minibatch, or a device, torch walks a flat graph for each number of particles that comes up again and again. It
    happens at a fixed call, so that a run with the same calls gives the same numbers.

    Args:
        module: a graph that takes z (D,) and the shared inputs, and returns a tuple of tensors.
        num_shared: the number of inputs that all particles share.
    """

    def __init__(self, module: fx.GraphModule, num_shared: int) -> None:
        self.module = module
        self._dims = (0, *[None] * num_shared)
        self._outputs = vmap(module.forward, in_dims=self._dims)
        self._value = vmap(self._first, in_dims=self._dims)
        self._value_and_grad = vmap(grad_and_value(self._first), in_dims=self._dims)
        self._calls: dict[int, int] = {}
        self._flat: dict[int, Callable[..., Any]] = {}
        self._can_flatten = True
        live = any(n.op == "get_attr" and str(n.target).startswith("parameter") for n in module.graph.nodes)
        self._can_lower = not (live or num_shared)
        self._num_calls, self._lock = 0, threading.Lock()
        self._programs: tuple[Program, Program] | None = None

    def __call__(self, z: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """All outputs, each with a leading dimension of particles."""
        return self._outputs(z, *shared)

    def value(self, z: Tensor, *shared: Tensor) -> Tensor:
        """The first output (S,)."""
        if type(z) is Tensor and not (torch.is_grad_enabled() and z.requires_grad):
            programs = self._lowered(z)
            if programs is not None:
                return programs[1](z)[0]
        return self._value(z, *shared)

    def _first(self, *inputs: Tensor) -> Tensor:
        return self.module.forward(*inputs)[0]

    def value_and_grad(self, z: Tensor, *shared: Tensor) -> tuple[Tensor, Tensor]:
        """The first output (S,) and its gradient with respect to z (S, D), detached."""
        particles = len(z)
        flat = self._flat.get(particles)
        if flat is not None:
            with torch.no_grad():
                return flat(z, *shared)
        programs = self._lowered(z)
        if programs is not None:
            return programs[0](z)
        if self._can_flatten:
            self._calls[particles] = self._calls.get(particles, 0) + 1
            if self._calls[particles] >= _FLATTEN_AFTER:
                self.flatten(z, *shared)
        return self._by_autograd(z, *shared)

    def _lowered(self, z: Tensor, now: bool = False) -> tuple[Program, Program] | None:
        """The programs of value and gradient and of the value, from a fixed call on; None where there are none."""
        inside = peek_interpreter_stack() is not None or forward_ad._current_level >= 0  # a transform of torch.func
        if not self._can_lower or inside or dispatch.compiled("machine", z) is None:
            return None
        with self._lock:
            self._num_calls += 1
            if self._programs is None and self._can_lower and (now or self._num_calls >= _FLATTEN_AFTER):
                self._programs = self._lower(z)
                self._can_lower = self._programs is not None
        return self._programs if self._programs is not None and self._programs[0].dtype == z.dtype else None

    @property
    def has_program(self) -> bool:
        """Whether there are programs."""
        return self._programs is not None

    def prepare(self, z: Tensor) -> None:
        """Have the programs now, if there can be any, and not from a later call on.

        Args:
            z: (S, D), points where they must give what autograd gives.
        """
        self._lowered(z, now=True)

    def _lower(self, z: Tensor) -> tuple[Program, Program] | None:
        """Programs that give what autograd gives at these points, or None."""
        points = z[:_MOST_POINTS]
        few = points[torch.arange(NUM_PARTICLES) % len(points)]
        flat = self._flat_graph(few)
        if flat is None:
            return None
        try:
            programs = lower(flat.forward, few)
            value, grad = self._by_autograd(points)
            found = (*programs[0](points), programs[1](points)[0])
            same = all(close(a, b) for a, b in zip(found, (value, grad, value), strict=True))
        except (NotLowered, RuntimeError):
            return None
        return programs if same else None

    def _by_autograd(self, z: Tensor, *shared: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._value(z, *shared)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    def unbatched_grad(self, z: Tensor, *shared: Tensor) -> Tensor:
        """The gradient (D,) of the first output at one point z (D,)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self._first(z, *shared), z)
        return grad

    def flatten(self, z: Tensor, *shared: Tensor) -> fx.GraphModule | None:
        """The flat graph of value and gradient for len(z) particles; None where that can't be had."""
        flat = self._flat_graph(z, *shared)
        if flat is None:
            self._can_flatten = False
            return None
        while len(self._flat) >= _FLAT_SIZES:
            del self._flat[next(iter(self._flat))]
        self._flat[len(z)] = flat.forward
        return flat

    def _flat_graph(self, z: Tensor, *shared: Tensor) -> fx.GraphModule | None:
        def both(*inputs: Tensor) -> dict[str, Tensor]:
            grad, value = self._value_and_grad(*inputs)
            return {"value": value, "grad": grad}

        inputs = {"z": z} | {f"shared_{i}": t for i, t in enumerate(shared)}
        for simpler in (True, False):
            try:
                flat = trace(both, inputs).module("value", "grad")
                if simpler:
                    simplify(flat, z, *shared)
                with torch.no_grad():
                    found = flat.forward(z, *shared)
                if all(close(a, b) for a, b in zip(found, self._by_autograd(z, *shared), strict=True)):
                    return flat
            except (TraceError, RuntimeError):
                pass
        return None

    def compile(self, z: Tensor, *shared: Tensor, num_calls: int | None = None) -> CompileReport:
        """Compile value and gradient for len(z) particles, if that pays.

        Args:
            z: (S, D).
            *shared: the shared inputs.
            num_calls: how many calls are to come; 0 only flattens, and None compiles in any case.
        """
        programs = self._lowered(z, now=True)
        if programs is not None and num_calls is not None:
            return CompileReport(False, "it is a program of flowvi's own machine, which needs no compiling")
        flat = self.flatten(z, *shared)
        if flat is None:
            return CompileReport(False, "there is no flat graph of value and gradient")
        if num_calls == 0:
            return CompileReport(False, "it is only flattened")
        num_nodes = len(flat.graph.nodes)
        if num_calls is not None:
            flat_seconds = seconds_per_call(flat.forward, z, *shared)
            if not repays(flat_seconds, num_nodes, num_calls):
                return CompileReport(False, "the calls to come would not repay compiling", flat_seconds)
        current = None if programs is None else programs[0]
        compiled, report = compile_flat(flat, z, *shared, agree=close, current=current)
        if compiled is not None:
            self._flat[len(z)] = compiled
        elif programs is not None:
            del self._flat[len(z)]
        return report

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "num_shared": len(self._dims) - 1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, NaN for NaN."""
    size = b[b.isfinite()].abs().max() if b.isfinite().any() else b.new_zeros(())
    tolerance = 1e-9 if b.dtype == torch.float64 else 1e-4
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + size.item()), equal_nan=True)
