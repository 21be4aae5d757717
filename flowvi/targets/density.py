"""LogDensity: the one form in which the rest of the package sees a target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from flowvi.checks import is_count, shown
from flowvi.errors import DimensionError, OptionError
from flowvi.targets.compiling import CompileReport
from flowvi.targets.sites import Site, element_name

__all__ = ["Energy", "LogDensity"]


@runtime_checkable
class Energy(Protocol):
    """What an energy offers; it may add `log_normalizer`, the known log of the integral of exp(log_density)."""

    dim: int

    def log_density(self, z: Tensor) -> Tensor:
        """-U(z): (..., D) -> (...)."""
        ...


class LogDensity(ABC):
    """log p(z) of an unnormalized density over z in R^D, with its gradient, and the way back to named sites.

    Made by `as_density`. Non-finite values and gradients are returned as they are.

    Attributes:
        name: what to call the target in a message.
        dim: D.
        dtype: dtype of values and gradients; z is cast to it.
        device: where they are computed.
        sites: the latent sites, in model order. Energies and callables have one, "z", of shape (D,).
        deterministic: the `pyro.deterministic` sites, and those that `poutine.reparam` computes from others.
        observed_sites: the sites with data.
        discrete: the discrete latent sites, which are summed out, and the deterministic sites that depend on them.
        inseparable: those of them, and of the observed sites, that share one sum over discrete values with other data,
            as all of a hidden Markov model's do: their data have no pointwise log-likelihood.
        path: "graph" (a traced Pyro model), "eager" (one that can't be traced, run particle by particle) or
            "callable" (an energy or a plain log density).
        reason: why the path is "eager", else None.
        log_normalizer: log of the integral of p, where an energy knows it.
        model, args, kwargs: the Pyro model and its arguments, None and empty without one.
        subsampled: the model subsamples a plate. Its indices are drawn afresh at each call, and shared by the
            call's particles; the value is then an unbiased estimate, and `full` is the exact density.
        generator: draws those indices.
    """

    name: str
    dim: int
    dtype: torch.dtype
    device: torch.device
    sites: tuple[Site, ...]
    deterministic: tuple[Site, ...] = ()
    observed_sites: tuple[Site, ...] = ()
    discrete: tuple[Site, ...] = ()
    inseparable: tuple[str, ...] = ()
    path: str
    reason: str | None = None
    log_normalizer: float | None = None
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any]
    subsampled: bool = False
    generator: torch.Generator

    def __repr__(self) -> str:
        return f"LogDensity({self.name}, dim={self.dim}, path={self.path}, dtype={self.dtype})"

    def __call__(self, z: Tensor) -> Tensor:
        """Log p(z), differentiable by autograd with respect to z.

        Args:
            z: (S, D).

        Returns:
            (S,).

        Raises:
            DimensionError: If z is not (S, D).
        """
        return self._log_prob(self._checked(z))

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(z) and its gradient, detached.

        Args:
            z: (S, D).

        Returns:
            (S,) and (S, D).

        Raises:
            DimensionError: If z is not (S, D).
        """
        return self._value_and_grad(self._checked(z).detach())

    def compile(self, num_particles: int, *, num_calls: int | None = None) -> CompileReport:
        """Compile `value_and_grad` for so many particles, and keep what is measured to be faster.

        Never an error: without a C++ compiler, or where compiling fails, things stay as they are.

        Args:
            num_particles: S.
            num_calls: how many calls are to come; it is only tried if they would repay it. None: in any case.
                0: never, but what comes before compiling is done, so that all calls from here round alike.

        Returns:
            Whether the compiled one is used, and why.
        """
        return CompileReport(False, f"a target of the kind {self.path!r} is not compiled")

    def prepare(self) -> None:  # noqa: B027 - there may be nothing to do
        """Do now what would be done after a few calls to make later ones quicker, so that all of them round alike."""

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The values of all sites at z, without gradients.

        Args:
            z: (S, D).

        Returns:
            (S, *shape) for each site, the latent ones in order, then the deterministic ones.

        Raises:
            DimensionError: If z is not (S, D).
        """
        with torch.no_grad():
            return self._constrain(self._checked(z).detach())

    def unconstrain(self, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Z of any constrained values of the latent sites, and log|det dz/dx|.

        A value outside its support, or on the edge of it, gives log|det dz/dx| = NaN.

        For a simplex, an ordered vector and the like, dx is over the coordinates that torch's transform counts.
        Sites that are not latent are ignored.

        Args:
            values: (S, *shape) for each latent site.

        Returns:
            z (S, D) and log|det dz/dx| (S,).

        Raises:
            OptionError: If a site is missing, or its value is no tensor of numbers.
            DimensionError: If a value has the wrong shape.
        """
        return self._unconstrain(self._packed(values))

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """The pointwise log-likelihood of each observed site: not scaled, 0 where masked out, no gradients.

        Discrete latents are summed out datum by datum; a site where that can't be, one of `inseparable`, is left out.

        Args:
            z: (S, D).

        Returns:
            (S, *batch_shape) for each observed site; of all the data where a plate subsamples.

        Raises:
            DimensionError: If z is not (S, D).
        """
        with torch.no_grad():
            return self._log_likelihood(self._checked(z).detach())

    def coordinate_name(self, index: int) -> str:
        """The site, with its element, that a coordinate of z belongs to; of unconstrained values.

        Args:
            index: 0 to D - 1.

        Returns:
            Such as "tau" or "theta[2]".

        Raises:
            OptionError: There is no such coordinate.
        """
        if not is_count(index, 0):
            raise OptionError(f"index must be a whole number from 0 to {self.dim - 1}, not {shown(index)}.")
        start = 0
        for site in self.sites:
            shape = tuple(site.unconstrained_shape)
            if index < start + math.prod(shape):
                return element_name(site.name, shape, index - start)
            start += math.prod(shape)
        raise OptionError(f"there is no coordinate {index} of z in D = {self.dim} of them.")

    @property
    def observed(self) -> dict[str, Tensor]:
        """The observed values by site; all of the data where a plate subsamples."""
        return {}

    @property
    def num_data(self) -> int:
        """How many observed numbers there are."""
        return sum(value.numel() for value in self.observed.values())

    @property
    def has_program(self) -> bool:
        """Whether `value_and_grad` is a program (`flowvi.program`) already."""
        return False

    @property
    def full(self) -> LogDensity:
        """The same density evaluated with all the data in every plate; itself where nothing is subsampled."""
        return self

    @property
    def pyro_model(self) -> Callable[..., Any]:
        """The Pyro model; for an energy or a callable an equivalent one, over one site "z" of shape (D,)."""
        if self.model is not None:
            return self.model

        def model() -> None:
            z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (self.dim,)))
            log_p = self._log_prob(z.reshape(-1, self.dim).to(self.dtype)).reshape(z.shape[:-1])
            pyro.factor("log_density", log_p)

        return model

    @abstractmethod
    def _log_prob(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _constrain(self, z: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def _unconstrain(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def _log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        return {}

    def _checked(self, z: Tensor) -> Tensor:
        if not isinstance(z, Tensor) or z.is_complex():
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise OptionError(f"{self.name} takes z as a real tensor of shape (S, {self.dim}), not {kind}")
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise DimensionError(
                f"{self.name} takes z of shape (S, {self.dim}), S particles of {self.dim} coordinates each; "
                f"got {tuple(z.shape)}"
            )
        return z if z.dtype == self.dtype and z.device == self.device else z.to(self.device, self.dtype)

    def _packed(self, values: Mapping[str, Any]) -> Tensor:
        """The latent sites' values as one tensor (S, total size)."""
        if not isinstance(values, Mapping):
            raise OptionError(f"values are a dict of tensors by site name, not {type(values).__name__}")
        columns: list[Tensor] = []
        for site in self.sites:
            if site.name not in values:
                raise OptionError(
                    f"no value for the latent site {site.name!r}: give one of shape (S, *{tuple(site.shape)}) for "
                    f"each of {[s.name for s in self.sites]}"
                )
            try:
                value = torch.as_tensor(values[site.name]).to(self.device, self.dtype)
            except (RuntimeError, TypeError, ValueError) as error:
                raise OptionError(
                    f"the value of site {site.name!r} can't be made a tensor of numbers: {error}"
                ) from error
            particles = len(columns[0]) if columns else (value.shape[0] if value.ndim else 1)
            if value.shape != (particles, *site.shape):
                raise DimensionError(
                    f"the value of site {site.name!r} has shape {tuple(value.shape)}, expected "
                    f"{(particles, *site.shape)}: S values of shape {tuple(site.shape)}"
                )
            columns.append(value.reshape(particles, site.shape.numel()))
        return torch.cat(columns, 1)
