"""A model's first runs: they find its sites and a point where log p is finite, or say why there is none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowvi.errors import DiscreteLatentError, FlowVIError, NoLatentError, NonFiniteError, TargetError
from flowvi.targets.enumeration import BROADCAST, EnumeratedRun, Enumeration, some
from flowvi.targets.run import Run
from flowvi.targets.runner import Runner
from flowvi.targets.sites import FromRandom, FromUnconstrained, Layout, Site, is_delta, left_out, site_of

__all__ = ["Structure", "find_structure"]

_TRIES = 20
_PLAIN_RUNS = 3  # at which a model whose discrete latents are summed out is compared with itself


@dataclass(frozen=True)
class Structure:
    """What the first runs find out about a model."""

    z: Tensor
    """A point (D,) where log p is finite."""
    run: Run
    """The run at that point."""
    sites: tuple[Site, ...]
    deterministic: tuple[Site, ...]
    discrete: tuple[Site, ...]
    """The discrete latents, and the deterministic sites that depend on them."""
    inseparable: tuple[str, ...]
    """The sites whose data have no log-likelihood of their own once the discrete latents are summed out."""
    observed_sites: tuple[Site, ...]
    observed: dict[str, Tensor]
    masked: frozenset[str]
    """The observed sites whose masked-out entries are not finite."""
    free: dict[str, Tensor]
    """Which elements of a latent a mask leaves out, (*batch), so that nothing depends on them."""
    subsampled: dict[str, tuple[int, int]]
    """Size and subsample size of each plate that subsamples."""


def find_structure(runner: Runner) -> Structure:
    """Runs the model at random points, U(-2, 2) in unconstrained space, until log p is finite.

    Discrete latents have a drawn value each in a first run, which tells the sites' shapes; from there on the runner
    sums them out.

    Pyro's and torch's argument checks are as the user has them.

    Raises:
        NoLatentError: If the model has no continuous latent site.
        DiscreteLatentError, SubsampledLatentError: If a latent can't be represented.
        NonFiniteError: If log p is finite at none of the points.
        TargetError: If the model can't be called, or fails at every point.
    """
    _check_call(runner)
    generator = torch.Generator().manual_seed(0)
    failure: Exception | None = None
    run: Run | None = None
    data: dict[str, Tensor] = {}
    for _ in range(_TRIES):
        reader = FromRandom(generator, runner.dtype, runner.device)
        runner.enumeration = None
        try:
            with runner.isolated(validation=True), torch.no_grad():
                run = runner(reader)
        except FlowVIError:
            raise
        except (ArithmeticError, RuntimeError, ValueError) as error:  # another point may do
            failure = error
            continue
        except Exception as error:
            raise runner.failed(error) from error
        if not reader.unconstrained:
            if run.discrete:
                names = ", ".join(repr(n["name"]) for n in run.discrete)
                raise DiscreteLatentError(
                    f"the latent sites {names} of the model {runner.name} are all discrete: once they are summed out "
                    "there is nothing left to infer. pyro.infer.infer_discrete draws them exactly"
                )
            raise NoLatentError(
                f"the model {runner.name} has no latent variable: every pyro.sample has obs=, or there is none. "
                "For a plain log density z (S, D) -> (S,) give dim=D as well"
            )
        data, failure = reader.observed, None
        z, sites = torch.cat(reader.unconstrained), tuple(site_of(n) for n in run.latent)
        try:
            with runner.isolated(), torch.no_grad():
                computed = _computed(runner, run, reader, z, sites)
                summed = _sum_out(runner, run, reader, z, sites)
                if not math.isfinite(summed.log_prob(runner.dtype)):
                    continue
                free = _free(runner, run, reader, z, sites)
            _validate_values(runner, run)
        except FlowVIError:
            raise
        except (ArithmeticError, RuntimeError, ValueError) as error:
            failure = error
            continue
        except Exception as error:
            raise runner.failed(error) from error
        data = {name: value for name, value in data.items() if name not in computed}
        deterministic = [n for n in run.samples if n["infer"].get("_deterministic") or n["name"] in computed]
        varying = [n for n in deterministic if n["value"].shape != summed.nodes[n["name"]]["value"].shape]
        return Structure(
            z=z,
            run=summed,
            sites=sites,
            deterministic=tuple(site_of(n, computed=n["name"] in computed) for n in deterministic if n not in varying),
            discrete=tuple(site_of(n, computed=n["name"] in computed) for n in (*run.discrete, *varying)),
            inseparable=summed.inseparable,
            observed_sites=tuple(site_of(n) for n in run.samples if n["name"] in data),
            observed=data,
            masked=frozenset(reader.masked),
            free=free,
            subsampled=reader.subsampled,
        )
    with runner.isolated(), torch.no_grad():
        raise _why(runner, run, data, failure) from failure


def _computed(runner: Runner, run: Run, reader: FromRandom, z: Tensor, sites: tuple[Site, ...]) -> frozenset[str]:
    """The sites that are observed in name only: `poutine.reparam` puts a Delta in the place of a latent.

    Its value then is another one where the latents are. That of an observed Delta with data stays the same.
    """
    deltas = [n["name"] for n in run.samples if n["name"] in reader.observed and is_delta(n)]
    if not deltas:
        return frozenset()
    indices = {name: run.nodes[name]["value"] for name in reader.subsampled}
    other = runner(FromUnconstrained(Layout(sites), 0.9 * z, indices=indices, masked=frozenset(reader.masked)))
    return frozenset(
        name
        for name in deltas
        if name not in other.nodes or not torch.equal(run.nodes[name]["value"], other.nodes[name]["value"])
    )


def _free(runner: Runner, run: Run, reader: FromRandom, z: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Which elements of the latents have no log density, because of a mask, and don't change that of anything else.

    A mask alone doesn't tell: it may be there for a flat prior. What a minibatch depends on doesn't tell either.
    """
    layout = Layout(sites)
    batches = {n["name"]: n["fn"].batch_shape for n in run.latent}
    free = {n["name"]: missing for n in run.latent if (missing := left_out(n, batches[n["name"]])) is not None}
    free = {name: missing for name, missing in free.items() if missing.any()}
    if not free or reader.subsampled:
        return {}

    def run_at(point: Tensor) -> tuple[Run, Tensor]:
        again = runner(FromUnconstrained(layout, point, masked=frozenset(reader.masked)))
        return again, torch.stack([torch.as_tensor(v) for v in again.site_log_probs().values()]).sum()

    slope, elsewhere = torch.zeros_like(z), run
    with suppress(RuntimeError), torch.enable_grad():  # autograd refuses some in-place operations
        point = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(run_at(point)[1], point, materialize_grads=True)
    with suppress(ArithmeticError, RuntimeError, ValueError):
        elsewhere = run_at(-z)[0]
    found, here = {}, run_at(z)[1]
    for name, missing in free.items():
        there = left_out(elsewhere.nodes[name], batches[name]) if name in elsewhere.nodes else None
        if there is None or not torch.equal(there, missing):
            continue  # the mask depends on the latents
        flat = missing & (slope[layout.slices[name]] == 0).reshape(*missing.shape, -1).all(-1)
        step = torch.zeros_like(z)
        step[layout.slices[name]].view(*missing.shape, -1)[flat] = 3.0
        if all(torch.allclose(run_at(z + s)[1], here, rtol=1e-6, atol=1e-6) for s in (step, -step)):
            found[name] = flat  # else something depends on it without a gradient
    return {name: flat for name, flat in found.items() if flat.any()}


def _sum_out(runner: Runner, run: Run, reader: FromRandom, z: Tensor, sites: tuple[Site, ...]) -> Run:
    """The run at the same point with all values of the discrete latents; the run itself where there are none.

    Raises:
        DiscreteLatentError, TargetError: If the model can't be run so, or says something else then.
    """
    enumeration = Enumeration.of(run)
    if enumeration is None:
        return run
    indices = {name: run.nodes[name]["value"] for name in reader.subsampled}

    def once_more() -> Run:
        return runner(FromUnconstrained(Layout(sites), z, indices=indices, masked=frozenset(reader.masked)))

    plain = [run, *(once_more() for _ in range(_PLAIN_RUNS))]
    runner.enumeration = enumeration
    try:
        summed = once_more()
        assert isinstance(summed, EnumeratedRun)
        for one in plain:
            summed.check(one)
        summed.log_prob(runner.dtype)
    except (FlowVIError, ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        raise
    except Exception as error:
        raise DiscreteLatentError(
            f"the model {runner.name} fails when its discrete latents {some(enumeration.names)} are summed out "
            f"({type(error).__name__}: {str(error).strip()}){BROADCAST}"
        ) from error
    return summed


def _check_call(runner: Runner) -> None:
    """Raises if the model can't take its arguments: a forgotten args= is the commonest mistake."""
    model = runner.model.forward if isinstance(runner.model, torch.nn.Module) else runner.model
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*runner.args, **runner.kwargs)
    except TypeError as error:
        raise TargetError(
            f"the model {runner.name}{signature} can't be called with these {len(runner.args)} args and kwargs "
            f"{sorted(runner.kwargs)}: {error}. Give its arguments by args=(...) and kwargs={{...}}; for a plain log "
            "density z (S, D) -> (S,) give dim=D"
        ) from error


def _validate_values(runner: Runner, run: Run) -> None:
    """Raises ValueError if a value lies outside its distribution's support, where the user has that checked."""
    with runner.isolated(validation=True), torch.no_grad():
        for node in run.samples:
            if node["infer"].get("_deterministic"):
                continue
            try:
                node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
            except ValueError as error:
                raise ValueError(f"site {node['name']!r}: {error}") from error


def _why(runner: Runner, run: Run | None, data: Mapping[str, Tensor], failure: Exception | None) -> TargetError:
    """Why log p is finite at none of the points."""
    try:
        parts = {} if run is None else run.site_log_probs()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        parts, failure = {}, failure or error
    wrong = [name for name, value in parts.items() if not math.isfinite(value)]
    for name in wrong:
        value = data.get(name)
        if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
            bad = ~value.isfinite()
            return NonFiniteError(
                f"the data of site {name!r} has {int(bad.sum())} values that are NaN or infinite, of {value.numel()}, "
                f"the first at index {tuple(bad.nonzero()[0].tolist())}: remove them, or leave them out with "
                "poutine.mask, or with obs_mask in pyro.sample"
            )
    for place in _not_a_number({"args": runner.args, "kwargs": runner.kwargs}):
        return NonFiniteError(
            f"{place} of the model {runner.name} has NaN in it, and log p is finite at none of {_TRIES} points: "
            "remove what is missing from the data, or mask it"
        )
    if failure is not None:
        text = str(failure).strip()
        hint = ""
        if "dtype" in text or "scalar type" in text:
            hint = (
                f". The model was run in {runner.dtype}: give dtype= the dtype of the tensors that it makes or holds "
                "itself, or pass them as args, which are converted"
            )
        return TargetError(f"the model {runner.name} fails at each of {_TRIES} points: {text}{hint}")
    if wrong:
        assert run is not None
        node = run.nodes[wrong[0]]
        kind = type(node["fn"]).__name__
        if wrong[0] in data and not _in_support(node):
            return NonFiniteError(
                f"the data of site {wrong[0]!r} lie outside the support of its distribution, {kind}: "
                f"{node['fn'].support}"
            )
        return NonFiniteError(
            f"the log density of site {wrong[0]!r} ({kind}) is {float(parts[wrong[0]])} at each of {_TRIES} points in "
            "U(-2, 2) of unconstrained space: check its data, its support, and the scales of its parameters"
        )
    return NonFiniteError(f"the log density of the model {runner.name} is finite at none of {_TRIES} points")


def _in_support(node: Mapping[str, Any]) -> bool:
    try:
        return bool(node["fn"].support.check(torch.as_tensor(node["value"])).all())
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return True  # can't tell


def _not_a_number(value: Any, place: str = "") -> Iterator[str]:
    """Where in nested arguments there is a NaN, as the Python expression that reads it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_a_number(item, f"{place}[{key!r}]" if place else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _not_a_number(item, f"{place}[{i}]")
    elif isinstance(value, Tensor):
        if bool(value.isnan().any()):
            yield place
    elif isinstance(value, float) and math.isnan(value):
        yield place
