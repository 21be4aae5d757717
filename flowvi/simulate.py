"""A Pyro model as a generator: sites drawn from the prior, data given them, and the posterior density of such data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from flowvi.errors import FlowVIError, NoLatentError, OptionError, TargetError
from flowvi.inference_data import _Unobserve
from flowvi.targets import LogDensity, as_density
from flowvi.targets.model import default_dtype
from flowvi.targets.runner import Runner
from flowvi.targets.sites import is_delta

__all__ = ["Simulator"]


class _Simulate(_Unobserve):
    """As `_Unobserve`; knows at which site it is."""

    at = ""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.at = msg["name"]
        super()._pyro_sample(msg)


class _Given:
    """The model with other data: the same arguments, and the same signature for messages."""

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Tensor]) -> None:
        functools.update_wrapper(self, model, updated=())
        self.__name__ = getattr(model, "__name__", type(model).__name__)
        self._model, self._data = model, data

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.condition(data=self._data):
            return self._model(*args, **kwargs)


@dataclass(frozen=True)
class Simulator:
    """Draws from the joint density of a model: sites and data."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    observed: tuple[str, ...]
    latent: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        """The model's name."""
        return getattr(self.model, "__name__", type(self.model).__name__)

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        observed: Sequence[str] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        seed: int,
    ) -> Simulator:
        """Find the data sites, and simulate once: what can't be simulated is known before any fit."""
        if isinstance(args, str | bytes) or not isinstance(args, Sequence):
            raise OptionError(f"args must be a tuple of the model's arguments, such as args=(x, y), not {type(args)}.")
        if isinstance(observed, str):
            raise OptionError(f"observed must be a sequence of names, such as ({observed!r},), not one string.")
        where = torch.device(device) if device is not None else torch.get_default_device()
        given = dict(kwargs or {})
        plain = cls(model, tuple(args), given, (), (), dtype or default_dtype(tuple(args), given), where)
        nodes = plain.run(seed)
        _check_sites(nodes, plain.name)
        computed = plain.computed(nodes, seed)
        with_data = [name for name, node in nodes.items() if node["is_observed"] and name not in computed]
        names = tuple(with_data if observed is None else observed)
        unknown = [name for name in names if name not in nodes]
        if unknown:
            raise OptionError(f"observed names {', '.join(unknown)}, but the model's sites are {', '.join(nodes)}.")
        left = [name for name in with_data if name not in names]
        if left:
            raise OptionError(f"observed leaves out {', '.join(left)}: all data must be simulated, name them too.")
        if not names:
            raise TargetError(
                f"the model {plain.name} has no observed site: give it its data (obs=), or name the sites that are "
                "data by observed=."
            )
        latent = tuple(name for name in nodes if name not in names)
        if not latent:
            raise NoLatentError(f"the model {plain.name} has no latent variable: there is nothing to calibrate.")
        found = cls(plain.model, plain.args, given, names, latent, plain.dtype, where)
        found.run(seed)
        return found

    def run(self, seed: int) -> dict[str, Any]:
        """One run with everything drawn: the messages of its sample sites.

        Raises:
            TargetError: a site's distribution can't be sampled.
        """
        runner = Runner(self.model, self.args, self.kwargs, dtype=self.dtype, device=self.device)
        simulate = _Simulate(self.observed)
        try:
            with runner.isolated(seed=seed), torch.no_grad(), poutine.block(), poutine.trace() as tracer, simulate:
                runner.model(*runner.args, **runner.kwargs)
        except FlowVIError:
            raise
        except (NotImplementedError, TypeError) as error:
            if isinstance(error, TypeError) and not simulate.at:
                raise TargetError(f"the model {self.name} can't be called with these arguments: {error}") from error
            raise TargetError(
                f"the site {simulate.at!r} of the model {self.name} can't be simulated ({error}): calibration needs "
                "priors and likelihoods that can be drawn from."
            ) from error
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
            raise TargetError(f"the model {self.name} failed with {type(error).__name__}: {error}") from error
        return {name: node for name, node in tracer.trace.nodes.items() if node["type"] == "sample"}

    def computed(self, nodes: Mapping[str, Any], seed: int) -> list[str]:
        """The sites that are observed in name only, `poutine.reparam`'s: their values follow the draws of a run."""
        deltas = [name for name, node in nodes.items() if node["is_observed"] and is_delta(node)]
        other = self.run(seed + 1) if deltas else {}
        moved = (name for name in deltas if name in other)
        return [name for name in moved if not torch.equal(nodes[name]["value"], other[name]["value"])]

    def draw(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values of all sites but the data's, and the data."""
        values = {
            name: torch.as_tensor(node["value"])
            for name, node in self.run(seed).items()
            if not isinstance(node["fn"], _Subsample)
        }
        data = {name: values.pop(name).detach() for name in self.observed}
        return values, data

    def density(self, data: Mapping[str, Tensor]) -> LogDensity:
        """The posterior of these data."""
        given = _Given(self.model, data)
        return as_density(given, args=self.args, kwargs=self.kwargs, dtype=self.dtype, device=self.device)


def _check_sites(nodes: dict[str, Any], name: str) -> None:
    """Leave the latents and data in `nodes`; raise where a site has no generative meaning."""
    for site, node in list(nodes.items()):
        fn = node["fn"]
        if isinstance(fn, _Subsample):
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise TargetError(f"the plate {site!r} of the model {name} subsamples: leave out subsample_size.")
            del nodes[site]
        elif node["infer"].get("_deterministic"):
            del nodes[site]
        elif isinstance(getattr(fn, "base_dist", fn), Unit):
            raise TargetError(
                f"the site {site!r} of the model {name} is a pyro.factor: it changes the density, but can't be drawn."
            )
