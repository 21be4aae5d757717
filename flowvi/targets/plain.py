"""Energies and plain log densities as a `LogDensity`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from flowvi.checks import is_count, positive_integers
from flowvi.errors import DimensionError, FlowVIError, NonFiniteError, OptionError, TargetError
from flowvi.targets.batch import close
from flowvi.targets.compiling import CompileReport, compile_flat
from flowvi.targets.density import Energy, LogDensity
from flowvi.targets.sites import Site
from flowvi.targets.trace import trace

__all__ = ["PlainDensity"]

LEAST_CALLS = 512
"""Of a function that fails, to find the rows that it fails at; a quarter of the rows, where they are more."""

_REFUSALS = (ArithmeticError, RuntimeError, ValueError)
"""What a function raises for values that it can't take."""


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

    Whatever the function raises comes out as a `TargetError` with the original as its cause. Where a later call fails
    for some rows of z alone, as torch's distributions do at a scale that underflows, their log p is NaN.

    Raises:
        OptionError: If D is not a positive integer.
        DimensionError: If the function can't take D coordinates or returns another shape than (S,).
        NonFiniteError: If it is finite nowhere.
        TargetError: If it fails, has no gradient, gives other values each time, or mixes the rows of z.
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
        if not is_count(dim):
            raise OptionError(f"dim must be a positive integer, the number of coordinates of z; got {dim!r}")
        self.name, self.dim, self.dtype, self.device = name, dim, dtype, device
        self.log_normalizer, self.kwargs = log_normalizer, {}
        self.generator = torch.Generator()
        shape = Size((dim,))
        self.sites = (Site("z", shape, shape, 1, constraints.real_vector, ()),)
        self._function, self._own_value_and_grad = function, value_and_grad
        self._compiled: dict[int, Callable[..., tuple[Tensor, ...]]] = {}
        self._works = False  # at the first points
        self._probe()
        self._works = True

    @classmethod
    def of_energy(cls, energy: Energy, *, dtype: torch.dtype, device: torch.device) -> PlainDensity:
        """The density proportional to exp(-U) of an energy."""
        name = getattr(energy, "name", None)
        return cls(
            energy.log_density,
            energy.dim,
            dtype=dtype,
            device=device,
            name=name if isinstance(name, str) else type(energy).__name__,
            log_normalizer=_log_normalizer(energy),
            value_and_grad=getattr(energy, "log_density_and_grad", None),
        )

    def _log_prob(self, z: Tensor) -> Tensor:
        try:
            return self._checked_value(self._call(self._function, z), z)
        except TargetError as error:
            if not (self._works and isinstance(error.__cause__, _REFUSALS)):
                raise
            return self._of_rows_that_work(z, error)

    def _of_rows_that_work(self, z: Tensor, error: TargetError) -> Tensor:
        """Log p (S,), NaN at the rows that the function refuses: halves of halves, as long as calls are left."""
        calls, works = max(LEAST_CALLS, len(z) // 4), False

        def of(part: Tensor) -> Tensor:
            nonlocal calls, works
            if len(part) == 1 or not calls:
                return part.sum(-1) * math.nan
            values = []
            for half in part.split(-(-len(part) // 2)):
                calls = max(0, calls - 1)
                try:
                    values.append(self._checked_value(self._call(self._function, half), half))
                    works = True
                except TargetError:
                    values.append(of(half))
            return torch.cat(values)

        value = of(z)
        if not works:
            raise error
        return value

    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        compiled = self._compiled.get(len(z))
        if compiled is not None:
            with torch.no_grad():
                value, grad = compiled(z)
            return value, grad
        if self._own_value_and_grad is not None:
            return self._by_itself(self._own_value_and_grad, z)
        return self._by_autograd(z)

    def _by_itself(self, function: Callable[[Tensor], Any], z: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient by the energy's own `log_density_and_grad`."""
        with torch.no_grad():
            found = self._call(function, z)
        items = _items(found)
        if len(items) == 2 and all(isinstance(t, Tensor) for t in items):
            value, grad = items
            if grad.shape == z.shape and value.shape == z.shape[:1]:
                return value, grad
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in items]
        raise DimensionError(
            f"log_density_and_grad of {self.name} returned {shapes} for z of shape {tuple(z.shape)}, expected "
            f"{[(len(z),), tuple(z.shape)]}: log p (S,) and its gradient (S, D)"
        )

    def _by_autograd(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self._log_prob(z)
            grad = self._gradient(value, z)
        return value.detach(), grad

    def _gradient(self, value: Tensor, z: Tensor) -> Tensor:
        """The gradient (S, D) of the value, or the error that says why there is none."""
        grad, failure = None, None
        if value.requires_grad:
            try:
                (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
            except RuntimeError as error:
                failure = error
        if grad is None:
            why = "" if failure is None else f" ({str(failure).strip()})"
            raise TargetError(
                f"{self._called_with(z)} has no gradient with respect to z{why}: write it in torch operations all the "
                "way, without .detach(), .item(), numpy, torch.no_grad(), or values that depend on no z"
            ) from failure
        return grad

    def compile(self, num_particles: int, *, num_calls: int | None = None) -> CompileReport:
        """See `LogDensity`; only if asked for: a function may depend on more than z, and compiling freezes that."""
        positive_integers(num_particles=num_particles)
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
        except Exception as error:  # whatever the function raises on a traced z
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

    # What somebody else's function may do wrong.

    def _called_with(self, z: Tensor) -> str:
        return f"the log density {self.name} with z of shape (S, dim) = {tuple(z.shape)}"

    def _call(self, function: Callable[[Tensor], Any], z: Tensor) -> Any:
        """What the function gives for z; whatever it raises is a typed error."""
        try:
            return function(z)
        except FlowVIError:
            raise
        except Exception as error:
            text = f"{self._called_with(z)} failed with {type(error).__name__}: {str(error).strip() or 'no message'}."
            if not self._works and _is_about_shapes(error):
                raise DimensionError(f"{text} Is dim={self.dim} right?") from error
            raise TargetError(text) from error

    def _checked_value(self, value: Any, z: Tensor) -> Tensor:
        """The value, if it is one real number for each row of z."""
        if not isinstance(value, Tensor) or value.shape != z.shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DimensionError(
                f"{self._called_with(z)} returned {got}, expected ({len(z)},): one log density for each row of z"
            )
        if not value.is_floating_point():
            raise TargetError(f"{self._called_with(z)} returned {value.dtype}: log p is a real floating number")
        return value

    def _probe(self) -> None:
        """Evaluates at 20 points in U(-2, 2), and says what is wrong with what comes back."""
        particles = 20 if self.dim != 20 else 21  # so that a sum over the wrong axis shows
        generator = torch.Generator().manual_seed(0)
        z = torch.rand(particles, self.dim, generator=generator, dtype=self.dtype) * 4 - 2
        z = z.to(self.device)
        with torch.enable_grad():
            given = z.clone().requires_grad_()
            value = self._log_prob(given)
            if not value.isfinite().any():
                raise NonFiniteError(
                    f"{self._called_with(z)} is finite at none of {particles} points in U(-2, 2), but "
                    f"{value[0].item()}: it must be finite around the origin; shift or scale its coordinates, or mend "
                    "the NaN"
                )
            grad = self._gradient(value, given)
        self._probe_rows(z, value.detach())
        if self._own_value_and_grad is not None:
            self._probe_own(z, value.detach(), grad)

    def _probe_rows(self, z: Tensor, value: Tensor) -> None:
        """Each log p is its own row's: the seven likeliest rows alone have the values that they have among all."""
        rows = value.nan_to_num(-math.inf).argsort()[-7:]  # of another mean than all, and in another order
        with torch.no_grad():
            again = self._log_prob(z.clone())
            alone = self._log_prob(z[rows])
        if not close(again, value):
            raise TargetError(
                f"{self._called_with(z)} gives other values each time it is called: it draws random numbers, keeps a "
                "state, or changes z in place. Make it a function of z alone (call eval() on its modules)"
            )
        if _alike(alone, value[rows]):
            return
        other = int((~torch.isclose(alone, value[rows], equal_nan=True)).nonzero()[0])
        raise TargetError(
            f"{self._called_with(z)} mixes the rows of z: one row's log p is {value[rows][other].item():.6g} among "
            f"{len(z)} rows and {alone[other].item():.6g} among {len(alone)}. Row i of the result must depend on z[i] "
            "alone: look for a mean, sum, maximum, sort or batch norm over dim 0, and give dim=-1 instead"
        )

    def _probe_own(self, z: Tensor, value: Tensor, grad: Tensor) -> None:
        """The energy's own value and gradient are those of its log density."""
        assert self._own_value_and_grad is not None
        found = self._by_itself(self._own_value_and_grad, z.clone())
        for what, mine, expected in zip(("value", "gradient"), found, (value, grad), strict=True):
            fine = mine.isfinite() & expected.isfinite()
            if not _alike(mine[fine], expected[fine]):
                raise TargetError(
                    f"log_density_and_grad of {self.name} gives another {what} than its log_density by autograd at "
                    f"{len(z)} points in U(-2, 2): mend it or leave it out"
                )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for what rounding may do to a badly conditioned function; finite at the same places."""
    fine, eps = b.isfinite(), max(torch.finfo(t.dtype).eps for t in (a, b))
    if not torch.equal(a.isfinite(), fine):
        return False
    a, b = a[fine].double(), b[fine].double()
    if not len(b):
        return True
    tolerance = eps**0.25 * (b.max() - b.min()) + 10 * eps * b.abs().max()
    return bool(((a - b).abs() <= tolerance).all())


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _log_normalizer(energy: Energy) -> float | None:
    """Log of the integral of an energy's exp(-U), None where it has none or says that it has none."""
    try:
        value = getattr(energy, "log_normalizer", None)
    except (FlowVIError, NotImplementedError):
        return None
    if value is None:
        return None
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TargetError(f"log_normalizer of an energy is a number or None, not {value!r}.") from error
    if not math.isfinite(number):
        raise TargetError(f"log_normalizer of an energy is a finite number or None, not {number}.")
    return number


def _is_about_shapes(error: Exception) -> bool:
    words = ("shape", "size", "dimension", "index", "unpack")
    return isinstance(error, IndexError) or any(word in str(error).lower() for word in words)
