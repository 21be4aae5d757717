r"""Amortized guides: an encoder gives every data point its own flow, so that local latents scale with the data.

z_n = loc_n + scale_n f_K(...f_1(eps; theta_n)...; theta_n), eps ~ N(0, I): an encoder maps x_n to features, and linear
maps (or small networks) of these give loc_n, scale_n and the parameters theta_n of all K layers (Rezende & Mohamed
2015, arXiv:1505.05770, section 4; there the scale comes before the planar layers, which is the same family).
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from flowvi.conditional_flow import Reversal, conditional_factory
from flowvi.errors import DimensionError, DiscreteLatentError, OptionError, TargetError
from flowvi.flow import Flow
from flowvi.guides import AutoFlow, _discrete
from flowvi.local_plate import LocalSite, PlateCall, choose_plate, find_call, local_sites, same_supports
from flowvi.transforms.base import Conditioned
from flowvi.transforms.conditional_affine import _LIMIT, _ShiftScale
from flowvi.transforms.registry import lookup
from flowvi.transforms.stack_conditional import (
    ParameterNetwork,
    conditional_planar_stack,
    conditional_radial_stack,
)

__all__ = ["AmortizedFlow", "AmortizedGuide"]

STACKS: dict[str, Callable[..., Any]] = {"planar": conditional_planar_stack, "radial": conditional_radial_stack}
"""Flows whose K layers of each datum's own go through one kernel."""


class AmortizedFlow(nn.Module):
    """Features (..., C) of a datum to its flow over R^D; N(0, s^2 I) at the start, for every datum.

    Args:
        input_dim: D.
        context_dim: C.
        flow: a registered name that has a conditional form.
        num_flows: K; 0 is a Gaussian with a diagonal covariance.
        hidden: sizes of the hidden layers between the features and all parameters; () is linear.
        init_scale: s.
        **options: of the flow's conditional form.

    Raises:
        OptionError: an argument can't be used, or the flow has no conditional form.
        UnknownFlowError: the name is not registered.

    Example:
        >>> import torch
        >>> from flowvi.amortized import AmortizedFlow
        >>> q = AmortizedFlow(2, context_dim=8, num_flows=4)
        >>> q(torch.randn(100, 8)).rsample().shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        flow: str = "planar",
        num_flows: int = 16,
        *,
        hidden: Sequence[int] = (),
        init_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.input_dim, self.context_dim = input_dim, context_dim
        raw = _LIMIT * math.atanh(math.log(init_scale) / _LIMIT)
        self.base = ParameterNetwork(context_dim, hidden, [torch.zeros(input_dim), torch.full((input_dim,), raw)])
        self.layers = nn.ModuleList(_layers(flow, input_dim, context_dim, num_flows, tuple(hidden), options))

    def forward(self, context: Tensor) -> Flow:
        """The flows at features (..., C): batch shape (...), event shape (D,)."""
        loc, raw = self.base(context)
        layers: Any = self.layers
        at = [layer if isinstance(layer, Reversal) else layer.condition(context) for layer in layers]
        zero = torch.zeros((), dtype=loc.dtype, device=loc.device)
        base = dist.Normal(zero, zero + 1, validate_args=False).expand(loc.shape).to_event(1)
        return Flow(base, [*at, Conditioned(_ShiftScale, (loc, raw))], validate_args=False)


def _layers(
    flow: str, input_dim: int, context_dim: int, num_flows: int, hidden: tuple[int, ...], options: dict[str, Any]
) -> list[nn.Module]:
    if num_flows == 0:
        return []
    try:
        if flow in STACKS:
            return [STACKS[flow](input_dim, context_dim, num_flows, **({"hidden_dims": hidden} | options))]
        make = conditional_factory(flow)
        accepted = inspect.signature(make).parameters
        if "hidden_dims" in accepted:
            options = {"hidden_dims": hidden or (64,)} | options
        if "num_flows" in accepted:
            return [make(input_dim, context_dim, num_flows=num_flows, **options)]
        layers: list[nn.Module] = []
        for k in range(num_flows):
            if k and input_dim > 1:  # coupling and autoregressive layers treat the coordinates unequally
                layers.append(Reversal(input_dim))
            layers.append(make(input_dim, context_dim, **options))
    except TypeError as e:
        raise OptionError(f"an amortized {flow} can't be built with options {options}: {e}") from e
    return layers


class AmortizedGuide(AutoGuide):
    r"""A guide whose local latents, inside the data's plate, have a flow of each datum's own; global ones share one.

    The encoder sees what the call gives of the data: a minibatch, where the call's arguments hold one, or the rows of
    the plate's subsample, where they hold all data. So it serves `pyro.plate("data", N, subsample_size=B)`,
    `pyro.plate("data", N, subsample=index)` and `pyro.plate("data", len(x))` alike, and the plate's scale N / B is
    on all its sites. Latents outside the plate get an `AutoFlow` of their own beside it. All is built at the first
    call; the local part starts at N(0, init_scale^2) in unconstrained space.

    Args:
        model: a Pyro model with continuous latents inside a plate.
        encoder: features (n, C) of the data (n, ...) of n data points; an `nn.Module`, whose parameters are learnt.
        flow: a registered name: "planar" and "radial" by fused kernels, others by their conditional form.
        num_flows: K; 0 is a diagonal Gaussian.
        plate: the data's plate; by default the only one it can be.
        inputs: inputs(*args, **kwargs) gives what the encoder takes, a tensor or a tuple of them, each with the data
            along its first dimension; by default the first tensor among the arguments.
        hidden: sizes of the hidden layers between the features and the flow's parameters; () is linear.
        init_scale: the standard deviation at the start.
        init_loc_fn: per-site initialization of the global latents.
        global_flow: keywords of `AutoFlow` for the global latents.
        **options: of the flow's conditional form.

    Raises:
        OptionError, UnknownFlowError: an argument can't be used.
        NoLatentError, DiscreteLatentError, TargetError: at the first call, if the model has no latent, a discrete
            one, none in a plate, or one whose support changes.
        DimensionError: the data doesn't fit the plate, or the encoder's features are not (n, C).

    Example:
        >>> import pyro, pyro.distributions as dist, torch, flowvi
        >>> def model(x):
        ...     with pyro.plate("data", 1000, subsample_size=50) as i:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[i])
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU())
        >>> guide = flowvi.AmortizedGuide(model, encoder, num_flows=4)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=flowvi.PathELBO())
        >>> loss = svi.step(torch.randn(1000, 2))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Tensor],
        flow: str = "planar",
        num_flows: int = 16,
        *,
        plate: str | None = None,
        inputs: Callable[..., Any] | None = None,
        hidden: Sequence[int] = (),
        init_scale: float = 1.0,
        init_loc_fn: Callable[[dict[str, Any]], Tensor] = init_to_median,
        global_flow: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not callable(encoder):
            raise OptionError(f"encoder must be callable, data (n, ...) to features (n, C), not {encoder!r}.")
        if not isinstance(flow, str):
            raise OptionError(f"flow must be the name of a registered flow, not {flow!r}.")
        if not isinstance(num_flows, int) or isinstance(num_flows, bool) or num_flows < 0:
            raise OptionError(f"num_flows must be a non-negative integer, not {num_flows!r}.")
        if not (isinstance(init_scale, (int, float)) and math.exp(-_LIMIT) < init_scale < math.exp(_LIMIT)):
            raise OptionError(f"init_scale must be a number between e^-7 and e^7, not {init_scale!r}.")
        lookup(flow)
        with torch.random.fork_rng(devices=[]):  # a throwaway finds a wrong option now, and not at the first call
            _layers(flow, 2, 1, min(num_flows, 1), tuple(hidden), dict(options))
        super().__init__(model)
        self.encoder = encoder
        self.flow_name, self.num_flows, self.plate_name, self.inputs = flow, num_flows, plate, inputs
        self.hidden, self.init_scale, self.init_loc_fn = tuple(hidden), float(init_scale), init_loc_fn
        self.global_flow, self.options = dict(global_flow or {}), options
        self.plates: dict[str, Any] = {}

    # Set up, at the first call.

    def _trace_model(self, args: Any, kwargs: Any, skip: int = 0) -> Any:
        """A trace of the model; `skip` gives another draw. The random state is left alone."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.rand(skip)
            model = poutine.block(InitMessenger(self.init_loc_fn)(self.model), self._prototype_hide_fn)
            return poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = self._trace_model(args, kwargs)
        for name, site in trace.iter_stochastic_nodes():
            if site["fn"].support.is_discrete:
                raise DiscreteLatentError(_discrete(name))
        frame = choose_plate(trace, self.plate_name)
        sites = local_sites(trace, frame)
        varying = same_supports(sites, local_sites(self._trace_model(args, kwargs, skip=1), frame))
        if varying is not None:
            raise TargetError(
                f"the support of latent site {varying!r} depends on other latents, which an amortized guide can't "
                f"follow: write the site on a fixed support and scale it in the model."
            )
        self.frame, self.sites = frame, sites
        local = {s.name for s in sites}
        self._frames = {f.name: f for _, s in trace.iter_stochastic_nodes() for f in s["cond_indep_stack"]}
        others = [name for name, _ in trace.iter_stochastic_nodes() if name not in local]
        call = find_call(self.model, frame.name, args, kwargs)
        index = torch.arange(call.subsample_size) if call.subsample is None else call.subsample
        with torch.no_grad():
            features = self._features(call, index, args, kwargs)
        self.local = AmortizedFlow(
            sum(s.numel for s in sites),
            features.shape[-1],
            self.flow_name,
            self.num_flows,
            hidden=self.hidden,
            init_scale=self.init_scale,
            **self.options,
        ).to(features)
        if others:
            part = poutine.block(self.model, expose=others)
            self.globals = AutoFlow(part, init_loc_fn=self.init_loc_fn, **self.global_flow)
        self.has_globals = bool(others)
        self.prototype_trace = trace

    def _check_prototype(self, part_trace: Any) -> None:
        """What Pyro asks of a guide with parts; the parts come from this guide's own trace."""

    # A call.

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._call = find_call(self.model, self.frame.name, args, kwargs)
        shared = {} if self.master is None else self.master().plates
        call = self._call
        self.plates = dict(shared)
        for name, frame in self._frames.items():
            if name in shared:
                continue
            if name == self.frame.name:
                self.plates[name] = pyro.plate(
                    name, call.size, subsample_size=call.subsample_size, subsample=call.subsample, dim=frame.dim
                )
            else:
                size = frame.full_size or frame.size
                self.plates[name] = pyro.plate(name, size, subsample_size=frame.size, dim=frame.dim)
        return self.plates

    def _data(self, args: Any, kwargs: Any) -> Sequence[Tensor]:
        """What the encoder takes, of all rows."""
        if self.inputs is not None:
            data = self.inputs(*args, **kwargs)
            return data if isinstance(data, (tuple, list)) else (data,)
        data = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        if data is None:
            raise OptionError("the guide's arguments hold no tensor to encode: say by inputs= what the data is.")
        return (data,)

    def _features(self, call: PlateCall, index: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The encoder's features (n, C) of this call's n data points."""
        n = len(index)
        rows = []
        for x in self._data(args, kwargs):
            if len(x) == call.size and (n != call.size or call.subsample is not None):
                rows.append(x[index])
            elif len(x) == n:
                rows.append(x)
            else:
                raise DimensionError(
                    f"the encoder's data has {len(x)} rows, but plate {self.frame.name!r} holds {n} of {call.size}: "
                    f"its first dimension must be one of the two (or say by inputs= where the data is)."
                )
        features = self.encoder(*rows)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != n:
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise DimensionError(f"the encoder must give features (n, C) for n = {n} data points, not {what}.")
        return features

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """The encoder's features of a minibatch.

        Args:
            *args: what the model takes; all the data in it is encoded.
            **kwargs: likewise.

        Returns:
            (n, 1, ..., C), with a 1 for every plate dimension right of the data's, as `posterior` takes it.

        Raises:
            DimensionError: the features are not (n, C).
            OptionError: there is no tensor to encode.
        """
        data = self._data(args, kwargs)
        n = len(data[0])
        features = self._features(PlateCall(n, n, None), torch.arange(n, device=data[0].device), args, kwargs)
        return features.reshape(n, *(1,) * (-self.frame.dim - 1), -1)

    def unpack(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The local sites of unconstrained rows.

        Args:
            z: (*particles, n, 1, ..., D), a draw of `posterior`.

        Returns:
            Site -> value, and the sum of all log|det d value/dz|.
        """
        values, log_det = {}, z.new_zeros(())
        for site, part in zip(self.sites, z.split([s.numel for s in self.sites], -1), strict=True):
            to_x = biject_to(site.support)
            u = site.spread(part, self.frame.dim)
            values[site.name] = x = to_x(u)
            if x is not u:
                log_det = log_det + to_x.log_abs_det_jacobian(u, x).sum()
        return values, log_det

    def posterior(self, features: Tensor) -> Flow:
        """q(z_n | x_n) over the unconstrained local latents.

        Args:
            features: (n, C), what the encoder gives.

        Returns:
            The flows, of batch shape (n,) and event shape (D,).
        """
        return self.local(features)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw of every latent site, those of the plate for this call's data: site -> value."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = dict(self.globals(*args, **kwargs)) if self.has_globals else {}
        dim = self.frame.dim
        with plates[self.frame.name] as index:
            features = self._features(self._call, index, args, kwargs)
            context = features.reshape(len(features), *(1,) * (-dim - 1), -1)
            q = self.posterior(context)
            z = pyro.sample(f"_{self._pyro_name}_local", q, infer={"is_auxiliary": True})
        parts = z.split([s.numel for s in self.sites], -1)
        for site, part in zip(self.sites, parts, strict=True):
            result[site.name] = self._sample(site, site.spread(part, dim))
        return result

    def _sample(self, site: LocalSite, u: Tensor) -> Tensor:
        to_x = biject_to(site.support)
        x = to_x(u)
        log_density = to_x.inv.log_abs_det_jacobian(x, u)
        log_density = sum_rightmost(log_density, log_density.dim() - x.dim() + site.event_dim)
        with ExitStack() as stack:
            for name in site.plates:
                stack.enter_context(self.plates[name])
            return pyro.sample(site.name, dist.Delta(x, log_density=log_density, event_dim=site.event_dim))

    # Pyro's autoguides drop their model when copied (and from the original too); these keep it, as `AutoFlow` does.

    def __getstate__(self) -> dict[str, Any]:
        for p in self.parameters():  # weak references that the parameter store leaves there, and sets again
            p.__dict__.pop("unconstrained", None)
        state = self.__dict__ | {"master": None, "plates": {}}
        try:
            pickle.dumps(state["_model"])
        except (pickle.PicklingError, AttributeError, TypeError):
            state["_model"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AmortizedGuide:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {k: v for k, v in self.__dict__.items() if k not in ("_model", "master", "plates", "prototype_trace")}
        rest = {"_model": self._model, "master": None, "plates": {}, "prototype_trace": self.prototype_trace}
        twin.__dict__.update(copy.deepcopy(state, memo), **rest)
        if self.__dict__.get("has_globals"):
            twin.globals._update_master(weakref.ref(twin))
        return twin
