"""A Pyro model as a `LogDensity`: traced once into a graph, or run particle by particle where that can't be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flowvi.checks import positive_integers, whole_numbers
from flowvi.errors import FlowVIError, HeldFixedWarning, NonFiniteError, SlowPathWarning, TargetError, TraceError
from flowvi.targets.batch import BatchedGraph
from flowvi.targets.compiling import CompileReport
from flowvi.targets.density import LogDensity
from flowvi.targets.first_run import Structure, find_structure
from flowvi.targets.recording import Recording
from flowvi.targets.runner import Runner
from flowvi.targets.sites import FromConstrained, FromUnconstrained, Layout
from flowvi.targets.trace import trace

__all__ = ["ModelDensity", "default_dtype"]


class ModelDensity(LogDensity):
    """log p(x(z)) + log|dx/dz| of a Pyro model over its unconstrained latents; discrete ones are summed out.

    The model is run eagerly first, which finds its sites and its mistakes, then traced at one point. The graph
    is used if it gives the model's own values and gradients at three points; else the model itself is run, once
    for each particle, with one `SlowPathWarning`. A model that draws random numbers by itself has no log density
    that could be evaluated, and is refused.

    Args:
        model: the Pyro model.
        args: its arguments; floating tensors in them are cast to `dtype` and moved to `device`.
        kwargs: its keyword arguments, likewise.
        dtype: of z and of what the model computes.
        device: where.
        whole: whether every subsampling plate takes all of its data.

    Raises:
        NoLatentError: the model has no continuous latent site.
        DiscreteLatentError: a discrete latent can't be summed out.
        SubsampledLatentError: a latent can't be represented.
        NonFiniteError: log p, or its gradient, is finite at none of the points tried.
        TargetError: the model can't be called, fails, has no gradient, or draws random numbers outside of its
            sample sites.
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
        self._runner = Runner(model, args, kwargs, dtype=dtype, device=device, whole=whole)
        self.name, self.model, self.dtype, self.device = self._runner.name, model, dtype, device
        self.args, self.kwargs = self._runner.args, self._runner.kwargs
        self.generator = torch.Generator().manual_seed(0)
        found = find_structure(self._runner)
        self.sites, self.deterministic, self.observed_sites = found.sites, found.deterministic, found.observed_sites
        self.discrete, self.inseparable = found.discrete, found.inseparable
        self._layout = Layout(self.sites)
        self._start, self._data, self._masked = found.z, found.observed, found.masked
        self._free = found.free
        self.dim = self._layout.size
        self._subsampled = found.subsampled
        self.subsampled = bool(self._subsampled)
        if self.subsampled:
            with suppress(FlowVIError):  # the model needs its minibatch; `full` says so when it is asked for
                self._free = self._full._free
        self._recording = self._record(found)
        self.path = "eager" if self._recording is None else "graph"
        self._graphs: dict[str, tuple[list[str], BatchedGraph]] = {}
        self._graph = None if self._recording is None else self._select("log_p")[1]
        if self.subsampled:
            self._take_shapes_of_all_data()

    # One particle.

    def _outputs(self, z: Tensor, *indices: Tensor) -> dict[str, Tensor]:
        """All that one particle z (D,) gives: log p, the sites' values, the pointwise log-likelihoods."""
        given = dict(zip(self._subsampled, indices, strict=True))
        run = self._runner(self._reader(z, given))
        missing = [s.name for s in (*self.sites, *self.deterministic) if s.name not in run.nodes]
        if missing:
            raise TargetError(
                f"the site {missing[0]!r} is not in every run of the model {self.name}: its sites may not depend on "
                "the values of its latents; write one model for each structure"
            )
        out = {"log_p": run.log_prob(self.dtype)}
        for site in (*self.sites, *self.deterministic):
            out[f"site {site.name}"] = torch.as_tensor(run.nodes[site.name]["value"])
        for name in self._data:
            if (
                name in run.nodes and name not in self.inseparable
            ):  # a sequential plate that subsamples has other sites each time
                out[f"likelihood {name}"] = run.pointwise(name)
        return out

    def _reader(self, z: Tensor, indices: Mapping[str, Tensor]) -> FromUnconstrained:
        return FromUnconstrained(self._layout, z, indices=indices, masked=self._masked, free=self._free)

    def _inverse_outputs(self, x: Tensor, *indices: Tensor) -> dict[str, Tensor]:
        """z, log|dz/dx| and whether each site is inside its support, for one particle's constrained values."""
        given = dict(zip(self._subsampled, indices, strict=True))
        layout = Layout(self.sites, constrained=True)
        reader = FromConstrained(layout, x, indices=given, masked=self._masked)
        self._runner(reader)
        z = torch.cat([reader.unconstrained[s.name].flatten() for s in self.sites])
        inside = torch.stack([reader.inside[s.name] for s in self.sites]).all()
        return {"z": z, "log_det": -torch.as_tensor(reader.log_det), "inside": inside}

    def _eager(self, z: Tensor, *indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log p and its gradient for one particle by the model itself; NaN where it fails on these values.

        The gradient is None where autograd refuses it, as it does after some in-place operations.
        """
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            try:
                value = self._outputs(z, *indices)["log_p"]
            except (ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                return z.new_tensor(math.nan), torch.full_like(z, math.nan)
            except FlowVIError:
                raise
            except Exception as error:
                raise self._runner.failed(error) from error
            if not value.requires_grad:
                return value, torch.zeros_like(z)
            try:
                (grad,) = torch.autograd.grad(value, z, allow_unused=True)
            except RuntimeError:
                return value.detach(), None
        return value.detach(), torch.zeros_like(z) if grad is None else grad

    def _indices(self) -> list[Tensor]:
        """Each subsampling plate's indices, drawn afresh."""
        return [
            torch.randperm(size, generator=self.generator)[:part].to(self.device)
            for size, part in self._subsampled.values()
        ]

    # The trace.

    def _record(self, found: Structure) -> Recording | None:
        """The graph, if there is one and it agrees with the model; None, with a warning, otherwise."""
        indices = self._indices()
        points, expected = self._reference(indices)
        recording = None
        try:
            with self._runner.isolated():
                inputs = {"z": self._start} | {f"index_{i}": t for i, t in enumerate(indices)}
                recording = trace(self._outputs, inputs)
                graph = BatchedGraph(recording.module("log_p"), len(indices))
                if not self._agrees(graph, points, expected, indices):
                    raise TraceError("its graph and the model itself give different values or gradients")
        except (TraceError, RuntimeError) as error:
            self.reason = str(error) if isinstance(error, TraceError) else f"its graph can't be batched: {error}"
        held = self._runner.parameter_names(found.run, list(recording.parameters.values()) if recording else [])
        if held:
            warnings.warn(
                HeldFixedWarning(
                    f"the model's parameters are held at their present values: {', '.join(held)}. "
                    "pyro.infer.SVI with flowvi.AutoFlow learns them"
                ),
                stacklevel=5,
            )
        if self.reason is None:
            return recording
        if any(grad is None for _, grad in expected):
            raise TargetError(
                f"the model {self.name} can't be traced: {self.reason}. Nor has its log density a gradient, because a "
                "tensor that the gradient needs is changed in place: build it with torch.stack or torch.cat"
            )
        warnings.warn(
            SlowPathWarning(
                f"the model {self.name} can't be traced: {self.reason}. It is run once for each particle instead, "
                "which is right but slow. For the fast way write it in torch operations on the latents: torch.where "
                "instead of `if`, no .item(), float() or numpy of a latent"
            ),
            stacklevel=5,
        )
        return None

    def _reference(self, indices: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        """Three points, and the model's own value and gradient at each."""
        generator = torch.Generator().manual_seed(1)
        steps = torch.rand(3, self.dim, generator=generator, dtype=self.dtype).to(self.device) - 0.5
        points = torch.stack([self._start, self._start + steps[1], 4 * steps[2]])
        expected = []
        for z in points:
            with self._runner.isolated():
                value, grad = self._eager(z, *indices)
            with self._runner.isolated(seed=1):
                again, _ = self._eager(z, *indices)
            if not torch.allclose(value, again, rtol=self._tolerance, atol=self._tolerance, equal_nan=True):
                raise TargetError(
                    f"the model {self.name} gives another log density each time it is run at the same point, "
                    f"{float(value):.6g} and {float(again):.6g}: it draws random numbers outside of pyro.sample "
                    "(dropout, torch.rand, dist.sample()). Move them out of the model, call eval() on its modules, or "
                    "make them latents; for minibatches use subsample_size in pyro.plate"
                )
            expected.append((value, grad))
        grads = [grad for _, grad in expected if grad is not None]
        if grads and not any(bool(grad.any()) for grad in grads):
            raise TargetError(
                f"the log density of the model {self.name} has no gradient with respect to its latents: compute with "
                "them in torch operations, without .detach(), .item(), numpy or torch.no_grad()"
            )
        if grads and not any(bool(grad.isfinite().all()) for grad in grads):
            raise NonFiniteError(
                f"the log density of the model {self.name} is finite, but its gradient is not, at any of 3 points. "
                "Look for torch.where over a branch that is NaN, a square root at 0, or NaN in data behind a mask"
            )
        return points, expected

    @property
    def _tolerance(self) -> float:
        return 1e-9 if self.dtype == torch.float64 else 1e-4

    def _magnitude(self, z: Tensor, indices: list[Tensor]) -> float:
        given = dict(zip(self._subsampled, indices, strict=True))
        with self._runner.isolated(), torch.no_grad():
            run = self._runner(self._reader(z, given))
            return run.magnitude()

    def _agrees(
        self,
        graph: BatchedGraph,
        points: Tensor,
        expected: list[tuple[Tensor, Tensor | None]],
        indices: list[Tensor],
    ) -> bool:
        """Whether values and gradients are equal but for rounding; where one isn't finite, neither may be."""
        tolerance = self._tolerance
        parts = self._magnitude(self._start, indices)  # a sum of large parts that cancel is rounded like its parts
        for z, value, grad, (own_value, own_grad) in zip(
            points, *graph.value_and_grad(points, *indices), expected, strict=True
        ):
            scale = tolerance * max(1.0, parts, abs(float(own_value)))
            if not own_value.isfinite():
                if value.isfinite():
                    return False
                continue
            if not torch.allclose(value, own_value, rtol=0, atol=scale):
                return False
            if own_grad is None:  # then at least batching may not change it
                own_grad = graph.unbatched_grad(z, *indices)
            largest = float(own_grad.abs().max())
            if math.isfinite(largest) and not torch.allclose(
                grad, own_grad, rtol=0, atol=10 * max(scale, tolerance * largest)
            ):
                return False
        return True

    def _select(self, prefix: str) -> tuple[list[str], BatchedGraph]:
        """The graph of the outputs whose names start so, made once."""
        assert self._recording is not None
        if prefix not in self._graphs:
            keys = [k for k in self._recording.names if k.startswith(prefix)]
            self._graphs[prefix] = (keys, BatchedGraph(self._recording.module(*keys), len(self._subsampled)))
        return self._graphs[prefix]

    @cached_property
    def _inverse(self) -> tuple[tuple[str, ...], BatchedGraph] | None:
        """The graph from constrained to unconstrained values; None where there is none."""
        indices = self._indices()
        with self._runner.isolated(), torch.no_grad():
            values = self._outputs(self._start, *indices)
            x = torch.cat([values[f"site {s.name}"].flatten() for s in self.sites])
            try:
                recording = trace(self._inverse_outputs, {"x": x} | {f"index_{i}": t for i, t in enumerate(indices)})
                graph = BatchedGraph(recording.module(*recording.names), len(indices))
                found = dict(zip(recording.names, graph(x[None], *indices), strict=True))
                expected = self._inverse_outputs(x, *indices)
            except (TraceError, RuntimeError):
                return None
        same = all(torch.allclose(found[k][0].to(x), expected[k].to(x), rtol=1e-4, atol=1e-4) for k in expected)
        return (recording.names, graph) if same else None

    # What a LogDensity is asked.

    def _each(self, z: Tensor, prefix: str) -> dict[str, Tensor]:
        """The outputs whose names start so, by one run of the model for each particle."""
        indices = self._indices()
        with self._runner.isolated(), self._runner.typed():
            rows = [self._outputs(row, *indices) for row in z]
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0] if k.startswith(prefix)}

    def _log_prob(self, z: Tensor) -> Tensor:
        if not len(z):
            return z.sum(1)
        if self._graph is not None:
            return self._graph.value(z, *self._indices())
        value: Tensor = _Eager.apply(z, self)
        return value

    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not len(z):
            return z.sum(1), z
        if self._graph is not None:
            return self._graph.value_and_grad(z, *self._indices())
        indices = self._indices()
        with self._runner.isolated():
            pairs = [self._eager(row, *indices) for row in z]
        values = [value for value, _ in pairs]
        grads = [torch.full_like(z[0], math.nan) if grad is None else grad for _, grad in pairs]
        return torch.stack(values), torch.stack(grads)

    def prepare(self) -> None:
        """See `LogDensity`."""
        if self.subsampled:
            with suppress(FlowVIError):  # the model needs its minibatch; `full` says so when it is asked for
                self.full.prepare()
        elif self._graph is not None:
            self._graph.prepare(self._points_near(64, 2.0))

    @property
    def has_program(self) -> bool:
        """See `LogDensity`."""
        return self._graph is not None and self._graph.has_program

    def _points_near(self, size: int, width: float) -> Tensor:
        """Points (size, D) in a box around that where the graph was traced, always the same."""
        generator = torch.Generator().manual_seed(0)
        shift = torch.rand(size, self.dim, generator=generator, dtype=self.dtype).to(self.device) - 0.5
        return self._start + width * shift

    def compile(self, num_particles: int, *, num_calls: int | None = None) -> CompileReport:
        """See `LogDensity`."""
        positive_integers(num_particles=num_particles)
        if num_calls is not None:
            whole_numbers(num_calls=num_calls)
        if self._graph is None:
            return super().compile(num_particles)
        return self._graph.compile(self._points_near(num_particles, 0.1), *self._indices(), num_calls=num_calls)

    def _constrain(self, z: Tensor) -> dict[str, Tensor]:
        if self.subsampled and self.deterministic:  # they may be inside the plate
            return self.full._constrain(z)
        return self._named("site ", z)

    def _log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        return self.full._log_likelihood(z) if self.subsampled else self._named("likelihood ", z)

    def _named(self, prefix: str, z: Tensor) -> dict[str, Tensor]:
        """The outputs whose names start with the prefix, by the rest of their names."""
        points = z if len(z) else self._start[None]
        if self._recording is None:
            found = self._each(points, prefix)
        else:
            keys, graph = self._select(prefix)
            found = dict(zip(keys, graph(points, *self._indices()), strict=True)) if keys else {}
        return {k.removeprefix(prefix): v[: len(z)] for k, v in found.items()}

    def _unconstrain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_zeros(0, self.dim), x.new_zeros(0)
        indices = self._indices()
        if self._inverse is not None:
            names, graph = self._inverse
            found = dict(zip(names, graph(x, *indices), strict=True))
        else:
            with self._runner.isolated(), self._runner.typed():
                rows = [self._inverse_outputs(row, *indices) for row in x]
            found = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        log_det = found["log_det"].to(self.dtype)
        return found["z"].to(self.dtype), torch.where(found["inside"], log_det, math.nan)

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
        runner = self._runner
        with warnings.catch_warnings():  # the model's own density has said it already
            warnings.simplefilter("ignore")
            return ModelDensity(runner.model, self.args, self.kwargs, dtype=self.dtype, device=self.device, whole=True)

    def _take_shapes_of_all_data(self) -> None:
        """Sites inside a subsampling plate are reported for all of the data, and so are their shapes."""
        try:
            full = self._full
        except FlowVIError:
            return  # the model needs its minibatch; `full` says so when it is asked for
        self.deterministic, self.observed_sites = full.deterministic, full.observed_sites
        self.discrete, self.inseparable = full.discrete, full.inseparable


class _Eager(torch.autograd.Function):
    """log p by the model itself; its gradient reaches z, and not the model's parameters."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, density: ModelDensity) -> Tensor:
        value, grad = density._value_and_grad(z.detach())
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return cotangent[:, None] * grad, None


def default_dtype(args: Any, kwargs: Any) -> torch.dtype:
    """float64 if a floating tensor in the arguments is, else torch's default dtype."""
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return torch.float64 if any(t.dtype == torch.float64 for t in leaves) else torch.get_default_dtype()
