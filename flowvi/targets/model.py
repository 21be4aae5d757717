"""A Pyro model as a `LogDensity`: traced once into a graph, or run particle by particle where that can't be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flowvi.errors import (
    HeldFixedWarning,
    NoLatentError,
    NonFiniteError,
    SlowPathWarning,
    TargetError,
    TraceError,
)
from flowvi.targets.batch import BatchedGraph
from flowvi.targets.density import LogDensity
from flowvi.targets.isolation import HeldParameters, all_data, dtype_and_device, no_validation, private_rng
from flowvi.targets.sites import FromConstrained, FromRandom, FromUnconstrained, Layout, Reader, site_of
from flowvi.targets.trace import Recording, trace

__all__ = ["ModelDensity"]

_TRIES = 20
_CHECKS = 3


class ModelDensity(LogDensity):
    """log p(x(z)) + log|dx/dz| of a Pyro model over its unconstrained latents.

    Args:
        model: the Pyro model.
        args: its arguments; floating tensors in them are cast to `dtype` and moved to `device`.
        kwargs: its keyword arguments, likewise.
        dtype: of z and of what the model computes.
        device: where.
        whole: whether every subsampling plate takes all of its data.

    Raises:
        NoLatentError: the model has no latent site.
        DiscreteLatentError, SubsampledLatentError: a latent can't be represented.
        NonFiniteError: log p is finite at none of 20 points.
        TargetError: the model draws random numbers outside of its sample sites.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        self.name = getattr(model, "__name__", type(model).__name__)
        self.model, self.dtype, self.device = model, dtype, device
        self.args = tuple(_cast(a, dtype, device) for a in args)
        self.kwargs = {k: _cast(v, dtype, device) for k, v in kwargs.items()}
        self.generator = torch.Generator().manual_seed(0)
        self._whole = whole
        self._held = HeldParameters()
        z = self._first_run()
        recording = self._record(z)
        self.path = "eager" if recording is None else "graph"
        self._recording = recording
        self._graph = None if recording is None else BatchedGraph(recording.module("log_p"), len(self._subsampled))

    # Running the model.

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """No global state is read or left changed, and argument checks don't raise for one bad particle."""
        with ExitStack() as stack:
            stack.enter_context(no_validation())
            stack.enter_context(private_rng(self.device, 0))
            stack.enter_context(dtype_and_device(self.dtype, self.device))
            stack.enter_context(self._held())
            if self._whole:
                stack.enter_context(all_data())
            yield

    def _run(self, reader: Reader) -> Any:
        """The trace of one run with the latents that `reader` gives."""
        with poutine.block(), poutine.trace() as tracer, reader:
            self.model(*self.args, **self.kwargs)  # type: ignore[misc]
        return tracer.trace

    def _outputs(self, z: Tensor, *indices: Tensor) -> dict[str, Tensor]:
        """All that one particle z (D,) gives: log p, the sites' values, the pointwise log-likelihoods."""
        given = dict(zip(self._subsampled, indices, strict=True))
        reader = FromUnconstrained(self._layout, z, indices=given, masked=self._masked)
        nodes = self._run(reader)
        out = {"log_p": nodes.log_prob_sum() + reader.log_det}
        for site in (*self.sites, *self.deterministic):
            out[f"site {site.name}"] = torch.as_tensor(nodes.nodes[site.name]["value"])
        nodes.compute_log_prob()
        for name in self._data:
            node = nodes.nodes[name]
            pointwise, mask = node["unscaled_log_prob"], node["mask"]
            if isinstance(mask, Tensor):
                pointwise = torch.where(mask, pointwise, 0.0)
            out[f"likelihood {name}"] = pointwise
        return out

    def _first_run(self) -> Tensor:
        """Find the sites, and a point where log p is finite."""
        generator = torch.Generator().manual_seed(0)
        last: Any = None
        with self._isolated():
            for _ in range(_TRIES):
                reader = FromRandom(generator, self.dtype, self.device)
                try:
                    last = self._run(reader)
                except TraceError:
                    raise
                except (ValueError, RuntimeError) as error:
                    if isinstance(error, TargetError):
                        raise
                    last = error
                    continue
                if not reader.unconstrained:
                    raise NoLatentError(
                        f"the model {self.name} has no latent variable: every pyro.sample has obs=, or there is "
                        f"none. For a plain log density z (S, D) -> (S,) give dim=D as well"
                    )
                log_p = last.log_prob_sum() + reader.log_det
                if math.isfinite(float(torch.as_tensor(log_p).detach())):
                    break
            else:
                raise _non_finite(self.name, last)
        nodes = last.nodes.values()
        samples = [n for n in nodes if n["type"] == "sample" and n["name"] not in reader.subsampled]
        latent = [n for n in samples if not n["is_observed"] and type(n["fn"]).__name__ != "_Subsample"]
        self.sites = tuple(site_of(n) for n in latent)
        self.deterministic = tuple(site_of(n) for n in samples if n["infer"].get("_deterministic"))
        self.observed_sites = tuple(site_of(n) for n in samples if n["name"] in reader.observed)
        self._layout = Layout(self.sites)
        self.dim = self._layout.size
        self._subsampled, self._data = reader.subsampled, reader.observed
        self._masked = frozenset(reader.masked)
        self.subsampled = bool(self._subsampled)
        return torch.cat(reader.unconstrained)

    def _record(self, z: Tensor) -> Recording | None:
        """The graph, if there is one and it agrees with the model; None, with a warning, otherwise."""
        with self._isolated():
            first = self._outputs(z, *self._indices())
            with private_rng(self.device, 1):
                again = self._outputs(z, *self._indices())
            if not self.subsampled and not _same(first["log_p"], again["log_p"]):
                raise TargetError(
                    f"the model {self.name} gives another log density each time it is run at the same point: it draws "
                    f"random numbers outside of pyro.sample. Move them out of the model, or make them latents"
                )
            try:
                recording = self._traced(z)
            except TraceError as error:
                self._fall_back(str(error))
                return None
            if not self._agrees(recording, z):
                self._fall_back("its graph and the model itself give different values")
                return None
        held = recording.parameters
        if held:
            names = sorted(self._parameter_name(t) for t in held.values())
            warnings.warn(
                HeldFixedWarning(
                    f"the model's parameters are held at their present values: {', '.join(names)}. "
                    f"pyro.infer.SVI with flowvi.AutoFlow learns them"
                ),
                stacklevel=5,
            )
        return recording

    def _traced(self, z: Tensor) -> Recording:
        inputs = {"z": z} | {f"index_{i}": t for i, t in enumerate(self._indices())}
        return trace(self._outputs, inputs)

    def _agrees(self, recording: Recording, z: Tensor) -> bool:
        module = recording.module("log_p")
        generator = torch.Generator().manual_seed(1)
        for _ in range(_CHECKS):
            step = torch.rand(z.shape, generator=generator, dtype=z.dtype).to(z.device) - 0.5
            indices = self._indices()
            (found,) = module(z + step, *indices)
            try:
                expected = self._outputs(z + step, *indices)["log_p"]
            except (ValueError, RuntimeError):  # such as a Cholesky factorization, which the graph makes NaN
                expected = torch.full_like(found, math.nan)
            if not _same(found, expected):
                return False
        return True

    def _fall_back(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(
            SlowPathWarning(
                f"the model {self.name} can't be traced: {reason}. It is run once for each particle instead, which is "
                f"right but slow; write it in torch operations on the latents to have the fast way"
            ),
            stacklevel=6,
        )

    def _parameter_name(self, tensor: Tensor) -> str:
        names = dict(self._held.names)
        if isinstance(self.model, torch.nn.Module):
            names |= {id(p): n for n, p in self.model.named_parameters()}
        return names.get(id(tensor), f"a parameter of shape {tuple(tensor.shape)}")

    def _indices(self) -> list[Tensor]:
        """Each subsampling plate's indices, drawn afresh."""
        return [
            torch.randperm(size, generator=self.generator)[:part].to(self.device)
            for size, part in self._subsampled.values()
        ]

    # What a LogDensity is asked.

    def _each(self, z: Tensor, keys: Callable[[str], bool]) -> dict[str, Tensor]:
        """The eager path: one run of the model for each particle."""
        indices = self._indices()
        with self._isolated():
            rows = [{k: v for k, v in self._outputs(row, *indices).items() if keys(k)} for row in z]
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    def _eager_log_p(self, z: Tensor, indices: list[Tensor]) -> Tensor:
        """Log p of one particle z (D,); NaN, as in a graph, where a factorization fails."""
        try:
            return self._outputs(z, *indices)["log_p"]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return z.sum() * math.nan

    def _log_prob(self, z: Tensor) -> Tensor:
        if not len(z):
            return z.sum(1)
        if self._graph is not None:
            return self._graph(z, *self._indices())[0]
        indices = self._indices()
        with self._isolated():
            return torch.stack([self._eager_log_p(row, indices) for row in z])

    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not len(z):
            return z.sum(1), z
        if self._graph is not None:
            return self._graph.value_and_grad(z, *self._indices())
        with torch.enable_grad():
            z = z.requires_grad_()
            value = self._log_prob(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    def _constrain(self, z: Tensor) -> dict[str, Tensor]:
        return self._named("site ", z)

    def _log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        return self.full._log_likelihood(z) if self.subsampled else self._named("likelihood ", z)

    def _named(self, prefix: str, z: Tensor) -> dict[str, Tensor]:
        if not len(z):
            return {k: v[:0] for k, v in self._named(prefix, self._start[None]).items()}
        if self._recording is None:
            found = self._each(z, lambda k: k.startswith(prefix))
        else:
            if prefix not in self._named_graphs:
                keys = [k for k in self._recording.names if k.startswith(prefix)]
                module = self._recording.module(*keys)
                self._named_graphs[prefix] = (keys, BatchedGraph(module, len(self._subsampled)))
            keys, graph = self._named_graphs[prefix]
            found = dict(zip(keys, graph(z, *self._indices()), strict=True)) if keys else {}
        return {k.removeprefix(prefix): v for k, v in found.items()}

    @cached_property
    def _named_graphs(self) -> dict[str, tuple[list[str], BatchedGraph]]:
        return {}

    def _unconstrained_outputs(self, x: Tensor, *indices: Tensor) -> dict[str, Tensor]:
        given = dict(zip(self._subsampled, indices, strict=True))
        layout = Layout(self.sites, constrained=True)
        reader = FromConstrained(layout, x, indices=given, masked=self._masked)
        self._run(reader)
        out = {"z": torch.cat([reader.unconstrained[s.name].flatten() for s in self.sites])}
        out["log_det"] = -torch.as_tensor(reader.log_det)
        return out | {f"inside {s.name}": reader.inside[s.name] for s in self.sites}

    @cached_property
    def _inverse(self) -> tuple[tuple[str, ...], BatchedGraph] | None:
        with self._isolated():
            values = self._outputs(self._start, *self._indices())
            x = torch.cat([values[f"site {s.name}"].flatten() for s in self.sites])
            inputs = {"x": x} | {f"index_{i}": t for i, t in enumerate(self._indices())}
            try:
                recording = trace(self._unconstrained_outputs, inputs)
            except TraceError:
                return None
        return recording.names, BatchedGraph(recording.module(*recording.names), len(self._subsampled))

    @cached_property
    def _start(self) -> Tensor:
        return torch.zeros(self.dim, dtype=self.dtype, device=self.device)

    def _unconstrain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_zeros(0, self.dim), x.new_zeros(0)
        indices = self._indices()
        if self._graph is not None and self._inverse is not None:
            names, graph = self._inverse
            found = dict(zip(names, graph(x, *indices), strict=True))
        else:
            with self._isolated():
                rows = [self._unconstrained_outputs(row, *indices) for row in x]
            found = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        inside = torch.stack([found[f"inside {s.name}"] for s in self.sites]).all(0)
        return found["z"], torch.where(inside, found["log_det"], math.nan)

    @property
    def observed(self) -> dict[str, Tensor]:
        """The observed values by site; all of the data where a plate subsamples."""
        return self.full.observed if self.subsampled else dict(self._data)

    @property
    def full(self) -> LogDensity:
        """The same density with all the data in every plate; itself where nothing is subsampled."""
        return self._full if self.subsampled else self

    @cached_property
    def _full(self) -> ModelDensity:
        with warnings.catch_warnings():  # the model's own density has said it already
            warnings.simplefilter("ignore")
            return ModelDensity(
                self.model,  # type: ignore[arg-type]
                self.args,
                self.kwargs,
                dtype=self.dtype,
                device=self.device,
                whole=True,
            )


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Floating tensors in nested data get the dtype; all tensors go to the device."""

    def move(t: Tensor) -> Tensor:
        if isinstance(t, torch.nn.Parameter):
            return t
        return t.detach().to(device, dtype) if t.is_floating_point() else t.to(device)

    return tree_map_only(Tensor, move, value)


def default_dtype(args: Any, kwargs: Any) -> torch.dtype:
    """float64 if a floating tensor in the arguments is, else torch's default dtype."""
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return torch.float64 if any(t.dtype == torch.float64 for t in leaves) else torch.get_default_dtype()


def _same(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if b.dtype == torch.float64 else 1e-4
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * 10, equal_nan=True)


def _non_finite(name: str, last: Any) -> Exception:
    """Why log p is finite nowhere: the first site whose part of it is not."""
    if isinstance(last, Exception):
        return TargetError(f"the model {name} fails at each of {_TRIES} points: {last}")
    last.compute_log_prob()
    for site_name, node in last.nodes.items():
        if node["type"] != "sample" or bool(torch.isfinite(node["log_prob_sum"])):
            continue
        value = torch.as_tensor(node["value"])
        if node["is_observed"] and value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            return NonFiniteError(
                f"the data of site {site_name!r} has {count} values that are NaN or infinite, of {value.numel()}: "
                f"remove them, or leave them out with poutine.mask"
            )
        return NonFiniteError(
            f"the log density of site {site_name!r} is {float(node['log_prob_sum'])} at each of {_TRIES} points in "
            f"U(-2, 2) of unconstrained space: check its data, its support, and the scales of its parameters"
        )
    return NonFiniteError(f"the log density of the model {name} is finite at none of {_TRIES} points")
