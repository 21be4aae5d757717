"""Named variables of a model, and the Pyro handlers that read them from a flat vector.

A latent site with support C has the bijection T = biject_to(C) from unconstrained to constrained values. z in
R^D holds every latent's unconstrained value, flattened, in model order. The bijection is looked up when the
model runs, so a support that depends on another latent, as in Uniform(0, a), is right. With x = T(z),

    log p(z) = log p(x) + sum over latent sites of log|dx/dz|.

Elements of a latent that a mask leaves out, and that nothing else depends on, would make that improper: those of
`y_unobserved` where `obs_mask` says that y is observed. They count as standard normal in z, which changes no other
marginal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions import Delta, Distribution, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Size, Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from flowvi.errors import DiscreteLatentError, SubsampledLatentError, TargetError

__all__ = [
    "FromConstrained",
    "FromRandom",
    "FromUnconstrained",
    "Layout",
    "Reader",
    "Site",
    "element_name",
    "is_delta",
    "is_discrete",
    "left_out",
    "site_of",
    "without_validation",
]


@dataclass(frozen=True)
class Site:
    """One named variable."""

    name: str
    shape: Size
    """Shape of one constrained value, plates included."""
    unconstrained_shape: Size
    """Shape of one unconstrained value; differs from `shape` for simplexes and the like."""
    event_dim: int
    support: Constraint
    """The support at the point where the model was first run; it may depend on other latents."""
    plates: tuple[str | None, ...]
    """The plate's name of each batch dimension, None where there is no plate."""
    deterministic: bool = False


def element_name(name: str, shape: tuple[int, ...], index: int) -> str:
    """What an element of a site is called, such as "tau" or "theta[2]"."""
    place = np.unravel_index(index, shape) if shape else ()
    return f"{name}[{','.join(str(int(k)) for k in place)}]" if shape else name


def site_of(message: Mapping[str, Any], *, computed: bool = False) -> Site:
    """The `Site` of a Pyro message that has its value.

    Args:
        message: the message.
        computed: whether it is an observed site in name only, whose value is computed from the latents.
    """
    fn, value = message["fn"], message["value"]
    recorded = bool(message["infer"].get("_deterministic"))
    deterministic = recorded or computed
    shape = Size(value.shape)
    support = constraints.real if deterministic else fn.support
    latent = not (deterministic or message["is_observed"] or is_discrete(message))
    unconstrained = Size(_bijection(message).inverse_shape(shape)) if latent else shape
    batch = len(shape) - (0 if recorded else fn.event_dim)  # pyro.deterministic calls everything an event
    plates: list[str | None] = [None] * batch
    for frame in message["cond_indep_stack"]:
        if frame.dim is not None and -frame.dim <= batch and shape[:batch][frame.dim] == frame.size:
            plates[frame.dim] = frame.name
    return Site(message["name"], shape, unconstrained, fn.event_dim, support, tuple(plates), deterministic)


class Layout:
    """Where each site lies in a flat vector.

    Args:
        sites: the sites, in order.
        constrained: whether the vector holds constrained values (else unconstrained ones).
    """

    def __init__(self, sites: tuple[Site, ...], *, constrained: bool = False) -> None:
        self.sites = sites
        self.shapes = {s.name: s.shape if constrained else s.unconstrained_shape for s in sites}
        self.constrained = {s.name: s.shape for s in sites}
        self._kinds = {s.name: _kind(s.support) for s in sites}
        self.slices: dict[str, slice] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.slices[name] = slice(self.size, self.size + shape.numel())
            self.size += shape.numel()

    def read(self, vector: Tensor, name: str, shape: Size, support: Constraint) -> Tensor:
        """The value of one site out of a vector (size,).

        Args:
            vector: all sites' values.
            name: the site.
            shape: of its distribution in this run; in front there may be dimensions of discrete latents.
            support: in this run. Its bounds may be others than in the first run, its kind may not.

        Raises:
            TargetError: If the model had no such site in its first run, or one of another shape or kind of support.
        """
        if name not in self.slices:
            raise TargetError(
                f"the latent site {name!r} is not in every run of the model: its sites may not depend on the "
                "values of its latents; write one model for each structure"
            )
        expected, kind = self.constrained[name], _kind(support)
        if shape[max(0, len(shape) - len(expected)) :] != expected or kind is not self._kinds[name]:
            had, has = self._kinds[name].__name__.strip("_"), kind.__name__.strip("_")
            raise TargetError(
                f"the latent site {name!r} is not the same in every run of the model: it had shape {tuple(expected)} "
                f"and a support of the kind {had}, and now has {tuple(shape)} and {has}. Neither may depend on the "
                "values of its latents or on earlier runs; write one model for each structure"
            )
        return vector[self.slices[name]].reshape(self.shapes[name])


class Reader(Messenger):
    """Gives each latent site a value and each subsampling plate its indices; sums log|dx/dz|.

    Args:
        indices: the indices of each subsampling plate, by its name.
        masked: the observed sites whose masked-out entries are NaN.
    """

    def __init__(self, indices: Mapping[str, Tensor] | None = None, masked: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.log_det: Tensor | float = 0.0
        self._indices = indices or {}
        self._masked = masked

    def read(self, name: str, shape: Size, transform: Transform, support: Constraint) -> Tensor:
        """The constrained value of a site."""
        raise NotImplementedError

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            self._read_indices(msg)
        elif msg["is_observed"]:
            self._read_observed(msg)
        elif msg["value"] is None:  # else enumeration or a handler inside the model has given it a value
            if is_discrete(msg):
                _check_enumerable(msg)
                return  # Pyro draws a value
            msg["fn"] = without_validation(msg["fn"])
            transform = _bijection(msg)
            msg["value"] = self.read(msg["name"], Size(msg["fn"].shape()), transform, msg["fn"].support)
            msg["done"] = True

    def _read_indices(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._indices:
            msg["value"] = self._indices[msg["name"]]
            msg["done"] = True

    def _read_observed(self, msg: dict[str, Any]) -> None:
        msg["fn"] = without_validation(msg["fn"])
        if msg["name"] in self._masked:
            msg["value"] = fill_masked(msg["value"], msg["mask"], msg["fn"].event_dim)


class FromUnconstrained(Reader):
    """Reads the latents from an unconstrained vector z (D,).

    Args:
        layout: where each site lies in z.
        z: all sites' values.
        free: which elements of a latent, (*batch), nothing depends on; they get a standard normal density.
        **options: of `Reader`.
    """

    def __init__(self, layout: Layout, z: Tensor, *, free: Mapping[str, Tensor] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._layout, self._z, self._free = layout, z, free or {}

    def read(self, name: str, shape: Size, transform: Transform, support: Constraint) -> Tensor:
        """X = T(z), and its log|dx/dz|."""
        u = self._layout.read(self._z, name, shape, support)
        x = transform(u)
        if x.dim() > len(self._layout.constrained[name]):
            raise DiscreteLatentError(
                f"the support of the latent site {name!r} depends on a discrete latent, which then can't be summed "
                "out: give the site a fixed support and scale its value in the model"
            )
        log_det = transform.log_abs_det_jacobian(u, x)
        if name in self._free:
            free = self._free[name]
            normal = -(u.square() + math.log(2 * math.pi)) / 2
            log_det, normal = (t.reshape(*free.shape, -1).sum(-1) for t in (log_det, normal))
            log_det = torch.where(free, normal, log_det)
        self.log_det = self.log_det + log_det.sum()
        return x


class FromRandom(Reader):
    """Draws each latent's unconstrained value from U(-2, 2), for the first run, when no layout is known yet.

    It also notes the plates that subsample and the observed data, and draws the plates' indices.
    """

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._generator, self._dtype, self._device = generator, dtype, device
        self.unconstrained: list[Tensor] = []
        self.subsampled: dict[str, tuple[int, int]] = {}
        self.observed: dict[str, Tensor] = {}
        self.masked: set[str] = set()

    def read(self, name: str, shape: Size, transform: Transform, support: Constraint) -> Tensor:
        """X = T(u) of a random u."""
        u = torch.rand(transform.inverse_shape(shape), generator=self._generator, dtype=self._dtype) * 4 - 2
        u = u.to(self._device)
        self.unconstrained.append(u.flatten())
        x = transform(u)
        self.log_det = self.log_det + transform.log_abs_det_jacobian(u, x).sum()
        return x

    def _read_indices(self, msg: dict[str, Any]) -> None:
        size, part = msg["fn"].size, msg["fn"].subsample_size
        if msg["value"] is None and part is not None and part < size:  # else all, or the user's own indices
            self.subsampled[msg["name"]] = (size, part)

    def _read_observed(self, msg: dict[str, Any]) -> None:
        if msg["infer"].get("_deterministic") or msg["infer"].get("is_auxiliary"):
            return
        self.observed[msg["name"]] = value = torch.as_tensor(msg["value"]).detach()
        filled = fill_masked(value, msg["mask"], msg["fn"].event_dim)
        if filled is not value:
            self.masked.add(msg["name"])
            msg["value"] = filled


class FromConstrained(Reader):
    """Reads the latents from a vector of constrained values, and maps them back to unconstrained ones."""

    def __init__(self, layout: Layout, x: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self._layout, self._x = layout, x
        self.unconstrained: dict[str, Tensor] = {}
        self.inside: dict[str, Tensor] = {}

    def read(self, name: str, shape: Size, transform: Transform, support: Constraint) -> Tensor:
        """X as given; keeps z = T^-1(x), log|dx/dz|, and whether x lies inside the support."""
        x = self._layout.read(self._x, name, shape, support)
        u = transform.inv(x)
        self.unconstrained[name] = u
        self.inside[name] = _inside(support, x).all() & u.isfinite().all()
        self.log_det = self.log_det + transform.log_abs_det_jacobian(u, x).sum()
        return x


def _bijection(msg: Mapping[str, Any]) -> Transform:
    """biject_to of a latent site's support, or an error that says why there is none."""
    name, fn = msg["name"], msg["fn"]
    kind = type(getattr(fn, "base_dist", fn)).__name__
    for frame in msg["cond_indep_stack"]:
        if frame.full_size is not None and frame.full_size > frame.size:
            raise _subsampled_latent(name, frame)
    try:
        return biject_to(fn.support)
    except (NotImplementedError, AttributeError) as error:
        raise TargetError(
            f"the latent site {name!r} ({kind}) has a support that no bijection from R^n is known for: give "
            "its distribution a `support` that torch.distributions.biject_to knows, or register one there"
        ) from error


def is_discrete(msg: Mapping[str, Any]) -> bool:
    """Whether a site's distribution has a discrete support."""
    try:
        return bool(msg["fn"].support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def is_delta(msg: Mapping[str, Any]) -> bool:
    """Whether a site's distribution is a Delta at the site's own value, as `poutine.reparam` leaves behind."""
    fn, value = msg["fn"], msg["value"]
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta) and isinstance(value, Tensor) and fn.v.data_ptr() == value.data_ptr()


def left_out(msg: Mapping[str, Any], batch: Size) -> Tensor | None:
    """Which elements (*batch) of a site have no log density, because of masks; None without a mask of that shape."""
    fn, masks = msg["fn"], [msg["mask"]]
    while isinstance(fn, MaskedDistribution):
        masks.append(fn._mask)
        fn = fn.base_dist
    out = None
    for mask in masks:
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask, device=msg["value"].device)
        if mask.dim() > len(batch) or any(m not in (1, b) for m, b in zip(mask.shape[::-1], batch[::-1], strict=False)):
            return None
        missing = ~mask.bool().expand(batch)
        out = missing if out is None else out | missing
    return out


def _check_enumerable(msg: Mapping[str, Any]) -> None:
    """Raises `DiscreteLatentError` if a discrete latent's values can't be listed."""
    fn = msg["fn"]
    kind = type(getattr(fn, "base_dist", fn)).__name__
    try:
        if fn.has_enumerate_support:
            fn.enumerate_support(expand=False)
            return
        why = "has no finite list of values"
    except NotImplementedError as error:
        why = f"can't list its values: {error}"
    if fn.event_dim and getattr(getattr(fn, "base_dist", None), "has_enumerate_support", False):
        raise DiscreteLatentError(
            f"the latent site {msg['name']!r} ({kind}) is discrete, and its .to_event({fn.event_dim}) makes one value "
            "of it that can't be listed: drop .to_event and put the site in `with pyro.plate(...)`, so that its "
            "elements are summed out one by one"
        )
    raise DiscreteLatentError(
        f"the latent site {msg['name']!r} ({kind}) is discrete and {why}, so that it can't be summed out. Write what "
        "depends on it with a marginal distribution (GammaPoisson for a Poisson of a Gamma, BetaBinomial, "
        "ZeroInflatedPoisson, MixtureSameFamily), cut it off to a Categorical over 0, ..., n, or relax it "
        "(RelaxedBernoulli, a LogNormal for a count)"
    )


def _subsampled_latent(name: str, frame: Any) -> SubsampledLatentError:
    return SubsampledLatentError(
        f"the latent site {name!r} is inside the plate {frame.name!r}, which takes {frame.size} of its "
        f"{frame.full_size} elements: different data would share its slots. Drop `subsample_size` (or "
        "`subsample`) from that plate, so that every element has its own slot"
    )


def _base(support: Constraint) -> Constraint:
    """The support of one element."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _kind(support: Constraint) -> type:
    return type(_base(support))


def _inside(support: Constraint, x: Tensor) -> Tensor:
    """Whether x lies in the support; sums to one are checked loosely, because draws may come in float32."""
    base = _base(support)
    if base is constraints.simplex:
        return (x >= 0).all(-1) & ((x.sum(-1) - 1).abs() < 1e-5)
    if base is constraints.corr_cholesky:
        unit = (x.square().sum(-1) - 1).abs() < 1e-5
        return unit.all(-1) & constraints.lower_cholesky.check(x)
    return support.check(x)


def without_validation(fn: Any) -> Any:
    """The distribution without checks of its own: one made outside the model keeps a flag of its own."""
    own = getattr(fn, "__dict__", {})
    parts = {k: v for k, v in own.items() if isinstance(v, Distribution | torch.distributions.Distribution)}
    plain = {k: without_validation(v) for k, v in parts.items()}
    changed = {k: v for k, v in plain.items() if v is not parts[k]}
    if not changed and not own.get("_validate_args"):
        return fn
    fn = copy.copy(fn)
    fn.__dict__.update(changed, _validate_args=False)
    return fn


def fill_masked(value: Any, mask: Any, event_dim: int) -> Any:
    """Replaces NaN in masked-out data by a valid entry, because 0 * NaN would make the gradient NaN.

    Args:
        value: the observed data, (*batch, *event).
        mask: which of the batch take part, (*batch); anything but a tensor leaves the data as they are.
        event_dim: the number of event dimensions.

    Returns:
        The same object where nothing has to be filled.
    """
    if not isinstance(value, Tensor) or not isinstance(mask, Tensor) or value.isfinite().all():
        return value
    keep = mask.reshape(mask.shape + (1,) * event_dim)
    shape = torch.broadcast_shapes(keep.shape, value.shape)
    keep, full = keep.expand(shape), value.expand(shape)
    bad = ~full.isfinite() & ~keep
    event = shape[len(shape) - event_dim :]
    good = (keep & full.isfinite()).reshape(-1, event.numel()).all(1)
    if not (bad.any() and good.any()):
        return value
    return torch.where(bad, full.reshape(-1, *event)[good.nonzero()[0, 0]], full)
