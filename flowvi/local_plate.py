"""The data plate of a model with local latents: which one it is, what is in it, and how a call of the model fills it.

A guide over local latents needs the plate as the model is about to open it: its size, the size of its subsample and,
where the model gives one, the index itself. `find_call` runs the model up to its plate and no further.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from flowvi.errors import NoLatentError, OptionError, TargetError
from flowvi.random_state import kept


@dataclass(frozen=True)
class PlateCall:
    """A plate as one call of the model opens it.

    Attributes:
        size: of all data.
        subsample_size: of this call's.
        subsample: its index, (subsample_size,), where the model gives it; else None.
    """

    size: int
    subsample_size: int
    subsample: Tensor | None


@dataclass(frozen=True)
class LocalSite:
    """A latent site inside the data plate.

    Attributes:
        name: the site.
        plates: the names of all plates it is in.
        left: its batch shape left of the data plate, for one datum.
        right: its batch shape right of it.
        event: its event shape in unconstrained space.
        event_dim: the number of its event dimensions in the constrained space.
        support: its support, the same for every datum.
    """

    name: str
    plates: tuple[str, ...]
    left: torch.Size
    right: torch.Size
    event: torch.Size
    event_dim: int
    support: Constraint

    @property
    def numel(self) -> int:
        """How many unconstrained numbers one datum has here."""
        return self.left.numel() * self.right.numel() * self.event.numel()

    def spread(self, part: Tensor, dim: int) -> Tensor:
        """The site's unconstrained value (*particles, *left, n, *right, *event) of the rows (*particles, n, M).

        Args:
            part: (*particles, n, 1, ..., M), with a 1 for every dimension right of the plate.
            dim: the plate's dimension, negative.
        """
        rank = part.dim() - 1 + dim
        particles, n = part.shape[:rank], part.shape[rank]
        # What a particle plate leaves between itself and the data plate are ones: `left` takes their place.
        kept = particles[: max(len(particles) - len(self.left), 0)]
        x = part.reshape(*kept, n, *self.left, *self.right, *self.event)
        return x.movedim(len(kept), len(kept) + len(self.left))


def choose_plate(trace: Any, name: str | None) -> Any:
    """The frame of the plate whose latents are amortized.

    Args:
        trace: a trace of the model.
        name: the plate, where a user says it; else the only subsampled plate with latents in it, or the outermost
            plate of all latents that are in one.

    Raises:
        NoLatentError: the model has no latent.
        TargetError: no latent is in a plate.
        OptionError: no such plate, or more than one that it could be.
    """
    sites = [site for _, site in trace.iter_stochastic_nodes()]
    if not sites:
        raise NoLatentError("the model has no latent variable to infer: give it a pyro.sample statement without obs=.")
    stacks = [list(site["cond_indep_stack"]) for site in sites]
    for site, stack in zip(sites, stacks, strict=True):
        if not all(f.vectorized for f in stack):
            raise TargetError(
                f"latent site {site['name']!r} is in a sequential plate (for i in pyro.plate(...)), which an amortized "
                f"guide can't fill: open it by with pyro.plate(...)."
            )
    frames = {f.name: f for stack in stacks for f in stack}
    if name is not None:
        if name not in frames:
            raise OptionError(f"no latent site is in a plate named {name!r}; those with latents: {sorted(frames)}.")
        return frames[name]
    if not frames:
        raise TargetError(
            "no latent site is in a pyro.plate, so there is nothing to amortize: use flowvi.AutoFlow, or put the "
            "latents of each data point inside the plate of the data."
        )
    subsampled = [f for f in frames.values() if f.full_size is not None and f.full_size != f.size]
    found = {f.name for f in subsampled} or {stack[0].name for stack in stacks if stack}
    if len(found) != 1:
        raise OptionError(f"there are latents in the plates {sorted(found)}: say by plate= which holds the data.")
    return frames[found.pop()]


def local_sites(trace: Any, frame: Any) -> list[LocalSite]:
    """The latent sites in the plate `frame`, in the model's order.

    Raises:
        TargetError: a site's support differs between data points.
    """
    found = []
    for name, site in trace.iter_stochastic_nodes():
        plates = tuple(f.name for f in site["cond_indep_stack"])
        if frame.name not in plates:
            continue
        fn = site["fn"]
        batch = torch.Size(fn.batch_shape)
        at = len(batch) + frame.dim
        to_x = biject_to(fn.support)
        shape = to_x.inv(site["value"]).shape
        found.append(
            LocalSite(name, plates, batch[:at], batch[at + 1 :], shape[len(batch) :], fn.event_dim, _plain(name, fn))
        )
    return found


def _plain(name: str, fn: Any) -> Constraint:
    """The support with its bounds as numbers, so that it serves a minibatch of any size."""
    support = copy.copy(fn.support)
    inner = support
    while hasattr(inner, "base_constraint"):
        inner.base_constraint = copy.copy(inner.base_constraint)
        inner = inner.base_constraint
    for key, value in list(vars(inner).items()):
        if isinstance(value, Tensor) and value.dim():
            if not bool((value == value.reshape(-1)[0]).all()):
                raise TargetError(
                    f"the support of latent site {name!r} differs between data points, which an amortized guide "
                    f"can't follow: write the site on a fixed support and scale it in the model."
                )
            setattr(inner, key, value.reshape(-1)[0].detach())
    return support


def same_supports(one: Sequence[LocalSite], two: Sequence[LocalSite]) -> str | None:
    """The first site whose bounds differ between two traces of the model, or None."""
    for a, b in zip(one, two, strict=True):
        x, y = _bounds(a.support), _bounds(b.support)
        if any(not torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x):
            return a.name
    return None


def _bounds(support: Constraint) -> Mapping[str, Any]:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return {k: v for k, v in vars(support).items() if isinstance(v, (Tensor, float, int))}


class _Reached(Exception):
    """Not an error: how a run of the model ends at its plate."""

    def __init__(self, call: PlateCall) -> None:
        super().__init__()
        self.call = call


class _StopAt(Messenger):
    """End the model's run where it opens the plate `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.name and isinstance(msg["fn"], _Subsample):
            index = msg["value"]
            taken = msg["fn"].subsample_size if index is None else len(index)
            raise _Reached(PlateCall(msg["fn"].size, msg["fn"].size if taken is None else taken, index))
        for frame in msg["cond_indep_stack"]:  # a plate that was made outside the model says no more than its sizes
            if frame.name == self.name:
                raise _Reached(PlateCall(frame.full_size or frame.size, frame.size, None))


def find_call(model: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PlateCall:
    """How this call of the model opens its plate `name`; the random state is left alone.

    Raises:
        TargetError: the call doesn't open it.
    """
    try:
        with kept(), torch.no_grad(), poutine.block(), _StopAt(name):
            model(*args, **kwargs)
    except _Reached as reached:
        return reached.call
    raise TargetError(
        f"the model opens no plate {name!r} with these arguments, though it did at the guide's first call."
    )


class PlateOf(Messenger):
    """Inside, the data's plate scales its sites as one of `size` data points, whatever size the model gives it.

    Args:
        size: N.
        *names: the plate; if there are more over the same data, a site is scaled by the first that it is in.
    """

    def __init__(self, size: int, *names: str) -> None:
        super().__init__()
        self.size, self.names = size, names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.names:  # the plate's own factor, full_size / size, becomes N / size
                msg["scale"] = msg["scale"] * (self.size / (frame.full_size or frame.size))
                break
