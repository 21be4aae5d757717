"""Energies and plain log densities as a `LogDensity`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from flowvi.errors import DimensionError, FlowVIError, NonFiniteError, OptionError, TargetError
from flowvi.targets.batch import close
from flowvi.targets.compiling import CompileReport, compile_flat
from flowvi.targets.density import Energy, LogDensity
from flowvi.targets.sites import Site
from flowvi.targets.trace import trace

__all__ = ["PlainDensity"]


class PlainDensity(LogDensity):
    """A batched function z (S, D) -> log p (S,).

    Args:
        function: the log density.
        dim: D.
        dtype: dtype of z.
        device: device of z.
        name: what to call it.
        log_normalizer: log of its integral, where known.
        value_and_grad: z -> log p (S,) and its gradient (S, D) without autograd, where there is a faster way.

    Raises:
        OptionError: If D is not a positive integer.
        DimensionError: If the function can't take D coordinates or returns another shape than (S,).
        NonFiniteError: If it is finite nowhere.
        TargetError: If it has no gradient.
    """

    path = "callable"

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        name: str,
        log_normalizer: float | None = None,
        value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise OptionError(f"dim must be a positive integer, the number of coordinates of z; got {dim!r}")
        self.name, self.dim, self.dtype, self.device = name, dim, dtype, device
        self.log_normalizer, self.kwargs = log_normalizer, {}
        self.generator = torch.Generator()
        shape = Size((dim,))
        self.sites = (Site("z", shape, shape, 1, constraints.real_vector, ()),)
        self._function, self._own_value_and_grad = function, value_and_grad
        self._compiled: dict[int, Callable[..., tuple[Tensor, ...]]] = {}
        self._probe()

    @classmethod
    def of_energy(cls, energy: Energy, *, dtype: torch.dtype, device: torch.device) -> PlainDensity:
        """The density proportional to exp(-U) of an energy."""
        name = getattr(energy, "name", None)
        try:
            log_normalizer = getattr(energy, "log_normalizer", None)
        except FlowVIError:  # an energy may say so where it has none
            log_normalizer = None
        return cls(
            energy.log_density,
            energy.dim,
            dtype=dtype,
            device=device,
            name=name if isinstance(name, str) else type(energy).__name__,
            log_normalizer=None if log_normalizer is None else float(log_normalizer),
            value_and_grad=getattr(energy, "log_density_and_grad", None),
        )

    def _log_prob(self, z: Tensor) -> Tensor:
        return self._function(z)

    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        compiled = self._compiled.get(len(z))
        if compiled is not None or self._own_value_and_grad is not None:
            with torch.no_grad():
                value, grad = (compiled or self._own_value_and_grad)(z)  # type: ignore[misc]
            return value, grad
        return self._by_autograd(z)

    def _by_autograd(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._function(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    def compile(self, num_particles: int, *, num_calls: int | None = None) -> CompileReport:
        """See `LogDensity`; only if asked for: a function may depend on more than z, and compiling freezes that."""
        if num_calls is not None:
            return CompileReport(False, "a function is compiled with compile=True only")
        generator = torch.Generator().manual_seed(0)
        z = (torch.rand(num_particles, self.dim, generator=generator, dtype=self.dtype) * 2 - 1).to(self.device)

        def value_and_grad(z: Tensor) -> tuple[Tensor, ...]:
            grad = torch.func.grad(lambda v: self._function(v).sum())(z)
            return self._function(z), grad

        def both(z: Tensor) -> dict[str, Tensor]:
            return dict(zip(("value", "grad"), value_and_grad(z), strict=True))

        try:
            flat = trace(both, {"z": z}).module("value", "grad")
        except (FlowVIError, RuntimeError) as error:
            return CompileReport(False, f"it can't be traced: {error}")
        if not all(close(a, b) for a, b in zip(flat(z), self._by_autograd(z), strict=True)):
            return CompileReport(False, "its graph gives other values")
        compiled, report = compile_flat(flat, z, agree=close)
        if compiled is not None:
            self._compiled[num_particles] = compiled
        return report

    def _constrain(self, z: Tensor) -> dict[str, Tensor]:
        return {"z": z}

    def _unconstrain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.where(x.isfinite().all(1), 0.0, math.nan).to(x)

    def _probe(self) -> None:
        """Evaluates once, at 20 points in U(-2, 2), and says what is wrong with what comes back."""
        particles = 20 if self.dim != 20 else 21  # so that a sum over the wrong axis shows
        generator = torch.Generator().manual_seed(0)
        z = torch.rand(particles, self.dim, generator=generator, dtype=self.dtype) * 4 - 2
        z = z.to(self.device).requires_grad_()
        call = f"the log density {self.name} with z of shape (S, dim) = ({particles}, {self.dim})"
        with torch.enable_grad():
            value: Any = self._try(call, z)
        if not isinstance(value, Tensor) or value.shape != (particles,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DimensionError(f"{call} returned {got}, expected ({particles},): one log density for each row of z")
        if not value.isfinite().any():
            raise NonFiniteError(
                f"{call} is finite at none of {particles} points in U(-2, 2), but {value[0].item()}: it must be "
                "finite around the origin; shift or scale its coordinates, or mend the NaN"
            )
        grad = None
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
        if grad is None:
            raise TargetError(
                f"{call} has no gradient with respect to z: write it in torch operations all the way, without "
                ".detach(), .item(), numpy or torch.no_grad()"
            )

    def _try(self, call: str, z: Tensor) -> Any:
        try:
            return self._function(z)
        except FlowVIError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            kind = DimensionError if _is_about_shapes(error) else TargetError
            raise kind(f"{call} failed: {str(error).strip()}. Is dim={self.dim} right?") from error


def _is_about_shapes(error: Exception) -> bool:
    words = ("shape", "size", "dimension", "index", "unpack")
    return isinstance(error, IndexError) or any(word in str(error).lower() for word in words)
