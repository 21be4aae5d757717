"""Pyro autoguides made of flows: `AutoFlow` for any registered flow, `AutoPlanar` and `AutoRadial` by name."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import ComposeTransformModule
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.checks import as_tensor, functions, instances, one_of, positive_numbers, shown
from flowvi.describe import head, layer_lines, site_lines, unset
from flowvi.errors import DiscreteLatentError, NoLatentError, OptionError, SubsampledLatentError, TargetError
from flowvi.flow import Flow
from flowvi.flow_spec import FULL_BASE_LIMIT, FlowSpec
from flowvi.mixture import MixtureFlow
from flowvi.random_state import kept
from flowvi.targets.density import LogDensity
from flowvi.targets.sites import _inside
from flowvi.transforms.affine import AFFINE_KINDS

__all__ = ["AutoFlow", "AutoPlanar", "AutoRadial"]

QUANTILE_DRAWS = 10_000


def default_base(dim: int) -> str:
    """The affine layer's kind where none is asked for: full up to D = 200, low rank above."""
    return "full" if dim <= FULL_BASE_LIMIT else "low_rank"


class AutoFlow(AutoContinuous):
    r"""A guide over all continuous latents: z = loc + A f_K(...f_1(eps)), eps ~ N(0, I), then each site's support.

    Use it wherever Pyro takes a guide. The flow starts at the identity, so that the guide starts as the
    Gaussian that `init_loc_fn` and `init_scale` describe. Everything is built on the first call, so that a
    fresh guide takes a state dict after one call ``guide(*args)``.

    Args:
        model: a Pyro model whose latents are continuous and of fixed shapes.
        flow: a registered name (`flowvi.transforms.available()`), or factory(input_dim, **options) such as
            Pyro's ``affine_autoregressive``.
        num_flows: K, the number of layers.
        base: the affine layer: "diag", "low_rank" or "full"; by default full up to D = 200, low rank above.
        init_loc_fn: per-site initialization, as for Pyro's autoguides.
        init_scale: the initial standard deviation in unconstrained space.
        **options: what the flow's factory takes.

    Raises:
        UnknownFlowError: no flow has this name.
        OptionError: another argument can't be used.
        NoLatentError, DiscreteLatentError, SubsampledLatentError: on the first call, if the model has no
            latent, a discrete one, or one in a subsampled plate.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, flowvi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, sigma), obs=y)
        >>> guide = flowvi.AutoFlow(model, flow="planar", num_flows=4)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), loss=flowvi.PathELBO())
        >>> loss = svi.step(torch.randn(10))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | Callable[..., TorchTransform] = "planar",
        num_flows: int = 16,
        *,
        base: str | None = None,
        init_loc_fn: Callable[[dict[str, Any]], Tensor] = init_to_median,
        init_scale: float = 0.1,
        **options: Any,
    ) -> None:
        functions(model=model, init_loc_fn=init_loc_fn)
        if base is not None:
            one_of(AFFINE_KINDS, base=base)
        positive_numbers(init_scale=init_scale)
        if not isinstance(flow, str) and not callable(flow):
            raise OptionError(f"flow must be a name or a factory(input_dim, **options), not {shown(flow)}.")
        # A throwaway of two dimensions finds a wrong name or option now, and not at the first call.
        with kept():
            Flow.from_spec(_spec(flow, 2, num_flows, base or "diag", options), factory=_factory(flow))
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.flow_name, self.num_flows, self.base, self.options = flow, num_flows, base, options
        self.init_scale = float(init_scale)

    @classmethod
    def from_posterior(cls, density: Any, flow: Flow) -> AutoFlow:
        """The guide that continues a fitted flow: same distribution, sharing its parameters.

        Args:
            density: a `flowvi.targets.LogDensity`, for its Pyro model and arguments.
            flow: the fitted q over its unconstrained space.

        Returns:
            The guide, set up; for a mixture one that draws from all of its components.
        """
        instances(LogDensity, density=density)
        instances(Flow, flow=flow)
        if isinstance(flow, MixtureFlow):
            from flowvi.mixture_guide import AutoMixture

            return AutoMixture(continuous_model(density), flow).set_up(*density.args, **density.kwargs)
        spec = flow.spec
        guide = cls(continuous_model(density), num_flows=0)
        if spec is not None:
            guide.flow_name, guide.num_flows, guide.base = spec.name, spec.num_flows, spec.base
            guide.options = dict(spec.options)
        guide._prebuilt = list(flow.transforms)
        guide._setup_prototype(*density.args, **density.kwargs)
        return guide

    _prebuilt: list[TorchTransform] | None = None

    # Pyro's autoguides drop their model when copied (and from the original too); these keep it.

    def __getstate__(self) -> dict[str, Any]:
        forget_store(self)
        state = self.__dict__.copy()
        state["master"] = None
        try:
            pickle.dumps(state["_model"])
        except (pickle.PicklingError, AttributeError, TypeError):
            state["_model"] = None  # a model that can't be pickled, such as a lambda: the fitted guide still can
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {k: v for k, v in self.__dict__.items() if k not in ("_model", "master")}
        twin.__dict__.update(copy.deepcopy(state, memo), _model=self._model, master=None)
        return twin

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except RuntimeError as e:
            if "no latent variables" in str(e):
                raise NoLatentError(
                    "the model has no latent variable to infer: give it a pyro.sample statement without obs=, "
                    "or check that the data is not passed as obs= to every site."
                ) from e
            raise
        except ValueError as e:
            if "cannot handle discrete sample site" in str(e):
                name = re.search(r"site '([^']*)'", str(e))
                raise DiscreteLatentError(_discrete(name.group(1) if name else "?")) from e
            raise
        self._check_subsampling()
        self._varying = self._varying_supports(args, kwargs)
        like = self._init_loc()
        if self._prebuilt is not None:
            layers, self._prebuilt = self._prebuilt, None
            learnt = (p for t in layers if isinstance(t, nn.Module) for p in t.parameters())
            like = like.to(next(learnt, like))  # a fit may be in another dtype than the model's first run
        else:
            spec = _spec(
                self.flow_name,
                self.latent_dim,
                self.num_flows,
                self.base or default_base(self.latent_dim),
                self.options,
            )
            layers = list(
                Flow.from_spec(
                    spec,
                    loc=like,
                    scale=self.init_scale,
                    dtype=like.dtype,
                    device=like.device,
                    factory=_factory(self.flow_name),
                ).transforms
            )
        self.transform = ComposeTransformModule(layers)
        self.register_buffer("_zero", torch.zeros_like(like), persistent=False)

    def _check_subsampling(self) -> None:
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            for frame in site["cond_indep_stack"]:
                full = getattr(frame, "full_size", None)
                if full is not None and full != frame.size:
                    raise SubsampledLatentError(
                        f"latent site {name!r} is inside plate {frame.name!r}, which is subsampled to {frame.size} of "
                        f"{full}: one slot would be shared by different data points. Drop subsample_size from "
                        f"the plate, or move the latent out of it."
                    )

    # Supports that depend on other latents.

    def _varying_supports(self, args: Any, kwargs: Any) -> bool:
        """Whether some site's support changes with the other latents' values."""
        with kept(0), torch.no_grad(), poutine.block():
            probe = self._init_loc() + 0.1 * torch.randn(self.latent_dim).to(self._init_loc())
            fixed = {s["name"]: biject_to(s["fn"].support)(u) for s, u in self._unpack_latent(probe)}
            varied = self._constrain_by_model(probe, args, kwargs)
        return any(not torch.allclose(fixed[n], value, rtol=1e-4) for n, (value, _, _) in varied.items())

    def _constrain_by_model(self, latent: Tensor, args: Any, kwargs: Any) -> dict[str, tuple[Tensor, Tensor, Any]]:
        """Each site's value, log|dz/dx| and distribution, each support read off the model at these latents."""
        parts = {site["name"]: u for site, u in self._unpack_latent(latent)}
        with poutine.block(), _ReadSupports(parts) as reader:
            self.model(*args, **kwargs)
        return reader.found

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw of every latent site, as Pyro's autoguides give it: site -> value."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if not self._varying:
            return super().forward(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, (value, log_density, fn) in self._constrain_by_model(latent, args, kwargs).items():
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                delta = dist.Delta(value, log_density=log_density, event_dim=fn.event_dim)
                result[name] = pyro.sample(name, delta)
        return result

    # What Pyro's tools ask of an AutoContinuous.

    def __repr__(self) -> str:
        if self.prototype_trace is None:
            return unset(self, self.flow_name, self.num_flows)
        sites = {name: site["value"].shape for name, site in self.prototype_trace.iter_stochastic_nodes()}
        return "\n".join([head(self, f"D = {self.latent_dim}"), *self._flow_lines(), *site_lines(sites)])

    def _flow_lines(self) -> list[str]:
        """The flow in words; read past Pyro, which would register the parameters of what a call reads."""
        return layer_lines("Normal", self._modules["transform"].parts)

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, I) over R^D."""
        return dist.Normal(self._zero, torch.ones_like(self._zero)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> TorchTransform:
        """The map from the base to the unconstrained latents, so that Pyro's ``NeuTraReparam`` works."""
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> Flow:
        """Q over the unconstrained latents, (D,)."""
        # The transform is read through the module, so that pyro registers its parameters.
        return Flow(self.get_base_dist(), list(self.transform.parts), validate_args=False)

    def _require_setup(self, args: Any, kwargs: Any) -> None:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, from draws (a flow's marginals have no closed form).

        The draws are the same at each call, and the global generator's state is left alone.

        Args:
            quantiles: numbers in [0, 1], Q of them.
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Returns:
            site -> (Q, *shape).

        Raises:
            OptionError: they are not numbers in [0, 1].
        """
        q = as_tensor("quantiles", quantiles, torch.float64).reshape(-1)
        if not bool(((q >= 0) & (q <= 1)).all()):
            raise OptionError(f"quantiles must be numbers in [0, 1], not {shown(quantiles)}.")
        self._require_setup(args, kwargs)
        generator = torch.Generator(self._zero.device).manual_seed(0)
        num = QUANTILE_DRAWS if not self._varying else QUANTILE_DRAWS // 10
        z, _ = self.get_posterior().rsample_and_log_prob(num, generator=generator)
        if self._varying:
            with kept():  # the model may draw something on the way
                each = [self._constrain_by_model(row, args, kwargs) for row in z]
            draws = {name: torch.stack([e[name][0] for e in each]) for name in each[0]}
        else:
            draws = {}
            pos = 0
            for name, site in self.prototype_trace.iter_stochastic_nodes():
                shape = self._unconstrained_shapes[name]
                u = z[:, pos : pos + shape.numel()].reshape(-1, *shape)
                pos += shape.numel()
                draws[name] = biject_to(site["fn"].support)(u)
        q = q.to(z)
        return {name: torch.quantile(x.to(z.dtype), q, dim=0) for name, x in draws.items()}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each latent: site -> (*shape), from draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log q of any values in the constrained space, exact, with each support's Jacobian.

        It is -inf outside of a support and on the edge of one, and NaN at NaN.

        Args:
            values: site -> value, (*shape), for every latent site; other entries are ignored.
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Returns:
            A scalar tensor.

        Raises:
            OptionError: values is not a dict, or a value not a tensor of numbers.
            TargetError: a latent site is missing.
            DimensionError: a value has another shape.
        """
        instances(Mapping, values=values)
        self._require_setup(args, kwargs)
        names = list(self._unconstrained_shapes)
        missing = [n for n in names if n not in values]
        if missing:
            raise TargetError(f"values has no {', '.join(map(repr, missing))}; it needs every latent site: {names}.")
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        if self._varying:
            data = {n: values[n] for n in names}
            with poutine.block(), poutine.trace() as tracer, poutine.condition(data=data):
                self.model(*args, **kwargs)
            sites = {n: tracer.trace.nodes[n] for n in names}
        parts, log_density, inside = [], self._zero.new_zeros(()), torch.tensor(True)
        for name in names:
            x = as_tensor(f"the value of site {name!r}", values[name], self._zero.dtype, self._zero.device)
            if x.isnan().any():
                return self._zero.new_tensor(math.nan)
            support = sites[name]["fn"].support
            to_x = biject_to(support)
            u = to_x.inv(x)
            parts.append(u.reshape(-1))
            log_density = log_density - to_x.log_abs_det_jacobian(u, x).sum()
            inside = inside & (_inside(support, x).all() & u.isfinite().all()).cpu()
        if not inside:
            return self._zero.new_tensor(-math.inf)
        return self.get_posterior().log_prob(torch.cat(parts)) + log_density


def forget_store(guide: nn.Module) -> None:
    """Drop the weak references that the parameter store leaves at parameters, and sets again: no pickle takes them."""
    for p in guide.parameters():
        p.__dict__.pop("unconstrained", None)


def continuous_model(density: Any) -> Callable[..., Any]:
    """The Pyro model of a `LogDensity` without its discrete latents, which no guide draws."""
    names = [site.name for site in density.discrete if not site.deterministic]
    return poutine.block(density.pyro_model, hide=names) if names else density.pyro_model


class AutoPlanar(AutoFlow):
    """`AutoFlow` with planar layers (Rezende & Mohamed 2015, eq. 10); arguments as there, without ``flow``."""

    def __init__(self, model: Callable[..., Any], num_flows: int = 16, **kwargs: Any) -> None:
        super().__init__(model, "planar", num_flows, **kwargs)


class AutoRadial(AutoFlow):
    """`AutoFlow` with radial layers (Rezende & Mohamed 2015, eq. 14); arguments as there, without ``flow``."""

    def __init__(self, model: Callable[..., Any], num_flows: int = 16, **kwargs: Any) -> None:
        super().__init__(model, "radial", num_flows, **kwargs)


class _ReadSupports(Messenger):
    """Set each latent to its unconstrained part mapped to the support it has at that point of the model."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parts = parts
        self.found: dict[str, tuple[Tensor, Tensor, Any]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.parts:
            return
        fn, u = msg["fn"], self.parts[name]
        to_x = biject_to(fn.support)
        x = to_x(u)
        log_density = to_x.inv.log_abs_det_jacobian(x, u)
        log_density = sum_rightmost(log_density, log_density.dim() - x.dim() + fn.event_dim)
        msg["value"], msg["done"] = x, True
        self.found[name] = (x, log_density, fn)


def _discrete(name: str) -> str:
    return (
        f"latent site {name!r} is discrete, which no flow can represent: make the guide for "
        f"poutine.block(model, hide=[{name!r}]) and give SVI config_enumerate(model) with TraceEnum_ELBO, which sums "
        "it out, as flowvi.fit does by itself; or marginalize it in the model."
    )


def _factory(flow: str | Callable[..., TorchTransform]) -> Callable[..., TorchTransform] | None:
    return None if isinstance(flow, str) else flow


def _spec(
    flow: str | Callable[..., TorchTransform], dim: int, num_flows: int, base: str, options: dict[str, Any]
) -> FlowSpec:
    name = flow if isinstance(flow, str) else getattr(flow, "__name__", type(flow).__name__)
    return FlowSpec(name, dim, num_flows, base, options)
