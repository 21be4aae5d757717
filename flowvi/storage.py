"""Posteriors in files, and a flow back from its description and parameters; what a file is stands in `files`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowvi._version import __version__
from flowvi.checks import as_path, instances
from flowvi.conditional_flow import ConditionalFlow, flow_at
from flowvi.errors import FileFormatError, OptionError, TargetError
from flowvi.files import DTYPES, POSTERIOR, plain, read, unplain, write
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.history import History
from flowvi.mixture import flow_from_spec
from flowvi.posterior import Posterior
from flowvi.random_state import kept
from flowvi.targets import LogDensity, as_density

__all__ = ["load", "save"]


def save(posterior: Posterior, path: str | Path) -> None:
    """Writes a posterior; see `Posterior.save`.

    Args:
        posterior: What to write.
        path: The file.

    Raises:
        OptionError: The flow can't be built again from its name.
    """
    check_rebuild(posterior.flow)
    try:
        arguments, stored = plain({"args": posterior.density.args, "kwargs": posterior.density.kwargs}), True
    except TypeError:
        arguments, stored = {"args": (), "kwargs": {}}, False
    history = {name: getattr(posterior.history, name) for name in History.__dataclass_fields__}
    content = {
        "flowvi": __version__,
        "target": posterior.density.name,
        "spec": posterior.flow.spec.to_dict() if posterior.flow.spec else None,
        "state": dict(posterior.flow.state_dict()),
        "flow_dtype": str(posterior.flow.dtype),
        "dtype": str(posterior.density.dtype),
        "sites": site_table(posterior.density),
        "is_model": posterior.density.model is not None,
        "arguments_stored": stored,
        "config": posterior.config,
        "timing": posterior.timing,
        "history": history,
        "seed": posterior.seed,
        "chains": posterior._stored_chains(),
    }
    write(as_path("path", path), plain(content, otherwise=str) | {"arguments": arguments}, POSTERIOR)


def load(
    path: str | Path,
    target: Any = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Posterior:
    """Reads a posterior that `Posterior.save` wrote. No code from the file is run.

    Args:
        path: The file.
        target: What was fitted: the model, energy or callable, or a `LogDensity`. A file can't hold code.
        args: The model's positional arguments; None takes those of the file.
        kwargs: The model's keyword arguments; None takes those of the file.

    Returns:
        The posterior, on the CPU unless the target is a `LogDensity` elsewhere: the same log q and the same
        draws by seed.

    Raises:
        FileFormatError: The file isn't a posterior of flowvi, is damaged, or was written by a newer version.
        OptionError: The target is missing, or its arguments are neither given nor in the file.
        TargetError: The target has other sites than the one that was fitted.
        UnknownFlowError: The flow is one that was registered when the file was written, and isn't now.
        OptionError: The same for a flow that is registered as something else now.
    """
    content = read(as_path("path", path), POSTERIOR)
    instances(Sequence, type(None), args=args)
    instances(Mapping, type(None), kwargs=kwargs)
    if target is None:
        raise OptionError(f"pass what was fitted, {content['target']!r}, too: flowvi.load(path, model).")
    if args is None and kwargs is None and not content["arguments_stored"]:
        raise OptionError(
            f"the arguments of {content['target']!r} were not plain data, so the file doesn't hold them: pass "
            "them, flowvi.load(path, model, args=..., kwargs=...)."
        )
    try:
        spec = FlowSpec.from_dict(content["spec"])
        dtype = DTYPES[content["dtype"]]
        arguments = unplain(content["arguments"])
        history = History(**content["history"])
    except Exception as error:
        raise FileFormatError(f"{path} has parts that don't fit together ({error}): save the fit anew.") from error
    density = as_density(
        target,
        args=tuple(arguments["args"] if args is None else args),
        kwargs=dict(arguments["kwargs"] if kwargs is None else kwargs),
        dim=None if content["is_model"] else spec.dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    _compare_sites(content["sites"], site_table(density), content["target"])
    flow = rebuild(spec, content["state"], DTYPES[content["flow_dtype"]], density.device)
    posterior = Posterior(
        flow,
        density,
        config=content["config"],
        timing=content["timing"],
        history=history,
        seed=content["seed"],
    )
    if content.get("chains") is None:
        return posterior
    from flowvi.refined import RefinedPosterior

    return RefinedPosterior.restored(posterior, content["chains"])


def rebuild(
    spec: FlowSpec, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, context_dim: int = 0
) -> Any:
    """A flow, conditional where there is a context, from its description and its parameters."""
    flow: Flow | ConditionalFlow
    with kept():  # its start is random, and overwritten
        if context_dim:
            flow = ConditionalFlow(spec, context_dim, dtype=dtype, device=device)
        else:
            flow = flow_from_spec(spec, dtype=dtype, device=device)
    try:
        flow.load_state_dict(state)
    except (RuntimeError, OptionError) as error:
        raise OptionError(
            f"the flow that is registered as {spec.name!r} has other parameters than the fitted one: register the "
            f"same factory, flowvi.transforms.register({spec.name!r}, factory, overwrite=True). ({error})"
        ) from error
    return flow


def check_rebuild(flow: Flow | ConditionalFlow) -> None:
    """Raises, while the flow is still at hand, where a file wouldn't give it back."""
    remedy = "register its factory, flowvi.transforms.register(name, factory), here and before loading"
    if flow.spec is None:
        raise OptionError(
            f"a flow composed by hand can't be described in a file: {remedy}, and build it by Flow.from_spec; or "
            "save flow.state_dict() yourself."
        )
    context_dim = flow.context_dim if isinstance(flow, ConditionalFlow) else 0
    twin = rebuild(flow.spec, flow.state_dict(), flow.dtype, flow.device, context_dim)
    with torch.no_grad():
        at = torch.zeros(context_dim, dtype=flow.dtype, device=flow.device)
        ours, theirs = (
            flow_at(f, at).rsample_and_log_prob(2, generator=torch.Generator(flow.device).manual_seed(0))[1]
            for f in (flow, twin)
        )
    if not torch.equal(ours, theirs) and not ours.isnan().any():
        raise OptionError(f"the flow that is registered as {flow.spec.name!r} isn't the fitted one: {remedy}.")


def site_table(density: LogDensity) -> list[dict[str, Any]]:
    """What has to agree for z to mean the same."""
    return [
        {
            "name": site.name,
            "shape": tuple(site.shape),
            "unconstrained_shape": tuple(site.unconstrained_shape),
            "support": type(site.support).__name__.strip("_"),
        }
        for site in density.sites
    ]


def _compare_sites(saved: list[dict[str, Any]], present: list[dict[str, Any]], target: str) -> None:
    """Raises where the target isn't the one that was fitted, naming the sites that differ."""
    if saved == present:
        return
    old, new = ({row["name"]: row for row in table} for table in (saved, present))
    differences = [f"{name} is not in this model" for name in old if name not in new]
    differences += [f"{name} is not in the file" for name in new if name not in old]
    differences += [
        f"{name} has {key} {old[name][key]} in the file and {new[name][key]} in this model"
        for name in old
        if name in new
        for key in old[name]
        if old[name][key] != new[name][key]
    ]
    order = "the sites come in another order"
    raise TargetError(
        f"the file holds a posterior of another target, {target!r}: {'; '.join(differences) or order}. Load it "
        "with the model and the arguments that were fitted."
    )
