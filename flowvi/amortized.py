r"""Amortized guides: an encoder gives every data point its own flow, so that local latents scale with the data.

An encoder maps x_n to features, and these give datum n its flow (`AmortizedFlow`). Global latents g beside the local
ones have a flow of their own, g = T(eps), and

    q(g, z) = q(g) prod_n q(z_n | x_n, eps),

so that the local flows know the global draw by its noise. That is a posterior's own form, which factorizes over the
data once g is given. Without eps there the product q(g) prod_n q(z_n | x_n) fits best where q(g) has the spread of g at
fixed z, which is smaller than that of its posterior.
"""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from flowvi.amortized_flow import AmortizedFlow, _layers
from flowvi.checks import flags, functions, instances
from flowvi.describe import head, num_parameters, site_lines, unset
from flowvi.errors import DimensionError, DiscreteLatentError, FlowVIError, OptionError, TargetError
from flowvi.flow import Flow
from flowvi.guides import AutoFlow, _discrete, forget_store
from flowvi.local_plate import LocalSite, PlateCall, choose_plate, find_call, local_sites, same_supports
from flowvi.random_state import kept
from flowvi.transforms.conditional_affine import _LIMIT
from flowvi.transforms.registry import lookup

__all__ = ["AmortizedFlow", "AmortizedGuide"]


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
        global_flow: keywords of `AutoFlow` for the global latents; by default ``{"num_flows": 0}``, a Gaussian with
            all correlations, since layers on top learn slowly from the noise of minibatches.
        coupled: whether the local flows are given the noise of the global draw beside the encoder's features. Without
            it the sds of global latents come out too small, as if the local ones were known.
        **options: of the flow's conditional form, such as `shared_directions` of planar layers.

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
        coupled: bool = True,
        **options: Any,
    ) -> None:
        if not callable(encoder):
            raise OptionError(f"encoder must be callable, data (n, ...) to features (n, C), not {encoder!r}.")
        functions(model=model, init_loc_fn=init_loc_fn)
        if inputs is not None:
            functions(inputs=inputs)
        instances(str, type(None), plate=plate)
        instances(list, tuple, hidden=hidden)
        instances(Mapping, type(None), global_flow=global_flow)
        flags(coupled=coupled)
        if not isinstance(flow, str):
            raise OptionError(f"flow must be the name of a registered flow, not {flow!r}.")
        if not isinstance(num_flows, int) or isinstance(num_flows, bool) or num_flows < 0:
            raise OptionError(f"num_flows must be a non-negative integer, not {num_flows!r}.")
        if not (isinstance(init_scale, (int, float)) and math.exp(-_LIMIT) < init_scale < math.exp(_LIMIT)):
            raise OptionError(f"init_scale must be a number between e^-7 and e^7, not {init_scale!r}.")
        lookup(flow)
        with kept():  # a throwaway finds a wrong option now, and not at the first call
            _layers(flow, 2, 1, min(num_flows, 1), tuple(hidden), dict(options))
        super().__init__(model)
        self.encoder = encoder
        self.flow_name, self.num_flows, self.plate_name, self.inputs = flow, num_flows, plate, inputs
        self.hidden, self.init_scale, self.init_loc_fn = tuple(hidden), float(init_scale), init_loc_fn
        self.global_flow, self.coupled, self.options = dict(global_flow or {"num_flows": 0}), bool(coupled), options
        self.plates: dict[str, Any] = {}

    # Set up, at the first call.

    def _trace_model(self, args: Any, kwargs: Any, skip: int = 0) -> Any:
        """A trace of the model; `skip` gives another draw. The random state is left alone."""
        with torch.no_grad(), kept():
            torch.rand(skip)
            model = poutine.block(InitMessenger(self.init_loc_fn)(self.model), self._prototype_hide_fn)
            try:
                return poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
            except FlowVIError:
                raise
            except Exception as error:  # the model is the user's, and so is what it may raise
                name = getattr(self.model, "__name__", type(self.model).__name__)
                raise TargetError(f"the model {name} failed with {type(error).__name__}: {error}") from error

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
        self.has_globals = bool(others)
        self.coupled = self.coupled and self.has_globals
        if others:
            part = poutine.block(self.model, expose=others)
            self.globals = AutoFlow(part, init_loc_fn=self.init_loc_fn, **self.global_flow)
            self.globals._setup_prototype(*args, **kwargs)
        self.local = AmortizedFlow(
            sum(s.numel for s in sites),
            features.shape[-1] + (self.globals.latent_dim if self.coupled else 0),
            self.flow_name,
            self.num_flows,
            hidden=self.hidden,
            init_scale=self.init_scale,
            **self.options,
        ).to(features)
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
        try:
            features = self.encoder(*rows)
        except FlowVIError:
            raise
        except Exception as error:  # the encoder is the user's, and so is what it may raise
            raise TargetError(
                f"the encoder failed on data of shape {', '.join(str(tuple(x.shape)) for x in rows)} with "
                f"{type(error).__name__}: {error}"
            ) from error
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

    def __repr__(self) -> str:
        if self.prototype_trace is None:
            return unset(self, self.flow_name, self.num_flows)
        # Read past Pyro, which would register the parameters of what a call reads.
        encoder, local, shared = (self._modules.get(name) for name in ("encoder", "local", "globals"))
        words = "a function" if encoder is None else f"{type(encoder).__name__}, {num_parameters(encoder)}"
        told = f"{local.context_dim - (shared.latent_dim if self.coupled else 0)} features"
        lines = [
            head(self, f"D = {local.input_dim} for each row of the plate {self.frame.name!r}"),
            f"  encoder: {words}",
            f"  each row: {self.flow_name} K = {self.num_flows}, {num_parameters(local)}, given {told}"
            + (f" and the global draw ({shared.latent_dim})" if self.coupled else ""),
            *("  " + line for line in site_lines({s.name: (*s.left, *s.right, *s.event) for s in self.sites})),
        ]
        if shared is not None:
            first, *rest = repr(shared).split("\n")
            lines += ["  all rows: " + first, *("  " + line for line in rest)]
        return "\n".join(lines)

    @property
    def global_sites(self) -> list[str]:
        """The latent sites outside the plate; known after the first call."""
        return [name for name, _ in self.globals.prototype_trace.iter_stochastic_nodes()] if self.has_globals else []

    def unpack(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The local sites of unconstrained rows.

        Args:
            z: (*particles, n, 1, ..., D), a draw of `posterior`.

        Returns:
            Site -> value, and the sum of all log|det d value/dz|.
        """
        parts = zip(self.sites, z.split([s.numel for s in self.sites], -1), strict=True)
        return _constrained((s.name, s.support, s.spread(part, self.frame.dim)) for s, part in parts)

    def unpack_globals(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The global sites of unconstrained rows.

        Args:
            z: (*particles, 1, ..., G), a draw of `globals`, with a 1 for every plate dimension.

        Returns:
            Site -> value, and the sum of all log|det d value/dz|.
        """
        return _constrained((s["name"], s["fn"].support, u) for s, u in self.globals._unpack_latent(z))

    def pack_globals(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What `unpack_globals` undoes.

        Args:
            values: site -> value, (*batch, *shape), of every global site; other entries are ignored.

        Returns:
            z (*batch, G) and log|det d value/dz| (*batch).

        Raises:
            OptionError: a global site is missing.
        """
        sites = dict(self.globals.prototype_trace.iter_stochastic_nodes())
        if missing := [name for name in sites if name not in values]:
            raise OptionError(f"there is no value of {missing}: give one of every global site, {list(sites)}.")
        parts, log_dets = [], []
        for name, site in sites.items():
            to_x, x = biject_to(site["fn"].support), torch.as_tensor(values[name])
            batch = x.shape[: x.dim() - site["value"].dim()]
            u = to_x.inv(x)
            parts.append(u.reshape(*batch, -1))
            log_dets.append(to_x.log_abs_det_jacobian(u, x).reshape(*batch, -1).sum(-1))
        return torch.cat(parts, -1), torch.stack(log_dets).sum(0)

    def posterior(self, features: Tensor, noise: Tensor | None = None) -> Flow:
        """q(z_n | x_n) over the unconstrained local latents; q(z_n | x_n, g) where the guide is `coupled`.

        Args:
            features: (n, 1, ..., C), what `encode` gives.
            noise: (..., G), the base point of the global draw, with batch dimensions to broadcast against those of the
                features; needed where the guide is coupled to global latents, and else ignored.

        Returns:
            The flows, of batch shape (n, 1, ...), with the noise's in front, and event shape (D,).

        Raises:
            OptionError: the noise is missing.
        """
        if not self.coupled:
            return self.local(features)
        if noise is None:
            raise OptionError("the local flows depend on the global latents: give the noise of a global draw.")
        batch = torch.broadcast_shapes(features.shape[:-1], noise.shape[:-1])
        return self.local(torch.cat([a.expand(*batch, a.shape[-1]) for a in (features, noise.to(features))], -1))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw of every latent site, those of the plate for this call's data: site -> value."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result, noise = self._forward_globals(args, kwargs) if self.has_globals else ({}, None)
        dim = self.frame.dim
        with plates[self.frame.name] as index:
            features = self._features(self._call, index, args, kwargs)
            context = features.reshape(len(features), *(1,) * (-dim - 1), -1)
            q = self.posterior(context, noise)
            z = pyro.sample(f"_{self._pyro_name}_local", q, infer={"is_auxiliary": True})
        parts = z.split([s.numel for s in self.sites], -1)
        for site, part in zip(self.sites, parts, strict=True):
            result[site.name] = self._sample(site, site.spread(part, dim))
        return result

    def _forward_globals(self, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """The global sites' draws, and the noise that they came from."""
        with poutine.trace() as tracer:
            result = dict(self.globals(*args, **kwargs))
        if not self.coupled:
            return result, None
        latent = tracer.trace.nodes[f"_{self.globals._pyro_name}_latent"]
        return result, latent["fn"]._base_point(latent["value"])

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
        forget_store(self)
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


def _constrained(parts: Iterable[tuple[str, Constraint, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Site -> value, of sites with their supports and unconstrained values, and the sum of all log|det dx/du|."""
    values: dict[str, Tensor] = {}
    log_det = torch.zeros(())
    for name, support, u in parts:
        to_x = biject_to(support)
        values[name] = x = to_x(u)
        if x is not u:
            log_det = log_det + to_x.log_abs_det_jacobian(u, x).sum()
    return values, log_det
