"""`fit_density`: from data to a density q(x) or q(x | context), by maximum likelihood."""

from __future__ import annotations

import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.checks import (
    as_device,
    as_seed,
    flags_or_none,
    float_or_double,
    one_of,
    positive_integers_or_none,
    positive_numbers_or_none,
    shown,
    whole_numbers,
)
from flowvi.conditional_flow import ConditionalFlow, flow_at
from flowvi.density_fit import DensityFit, DensityHistory, MeanLogProb
from flowvi.errors import InterruptedWarning, NumericalWarning, OptionError
from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.engine import Schedule
from flowvi.fit.gradient import LOOK_EVERY, Gradient, make_gradient
from flowvi.fit.rows import Rows, Scaling, as_rows, split
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.guides import default_base
from flowvi.progress import Bar, wanted
from flowvi.random_state import kept
from flowvi.threads import one_thread_if_small
from flowvi.transforms.affine import AFFINE_KINDS
from flowvi.transforms.networks import ZeroStart
from flowvi.transforms.registry import FlowEntry, lookup

__all__ = ["fit_density"]

NUM_STEPS = 2000
BATCH_SIZE = 512
LR = 5e-3
LR_SHALLOW = 2e-2  # of fused stacks, which have few parameters and no network
PATIENCE = 40
STIR = 1.0  # size of what a network's last layer adds to a coordinate at the start, in sds of the data
CHECKS = 100  # of the held-out rows, in the course of a fit
LEAST_STEPS = 2000  # that repay the seconds that it costs to record one
OPTIONS: dict[str, dict[str, Any]] = {
    "maf": {"clip": 2.0},
    "real_nvp": {"direction": "inverse"},
    "neural_spline": {"bound": 4.0, "min_share": 0.1, "min_slope": 0.01},
}
"""Options without a context, of families whose defaults are those of variational inference: data have sharper edges,
and standardized ones stay in a smaller box; eight layers with scales up to e^3 gave one test row of 20,000 a log q of
-270,000. Given a context, the layers have to shift too, and the defaults serve."""
CHECKED_ROWS = 10_000  # held-out rows at most for one check; the final score takes all


def fit_density(
    x: Any,
    flow: str | Callable[..., Any] = "maf",
    context: Any = None,
    *,
    num_flows: int | None = None,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    validation: float | Any = 0.1,
    validation_context: Any = None,
    patience: int | None = None,
    base: str | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    **options: Any,
) -> DensityFit:
    r"""Maximize the mean of log q(x_n), or log q(x_n | context_n), over rows of data.

    The density is that of x = loc + A f_K(...f_1(eps)), eps ~ N(0, I); log q(x) goes through the exact inverses,
    so that planar and radial flows work too. All work is done on standardized data, and the result is in the data's
    units. The affine layer starts at the data's mean and covariance and is learnt with the rest; layers with networks
    start at random, which leaves the saddles of symmetric data. Adam with a warm-up, a cosine schedule and gradient
    clipping, on minibatches without replacement; steps with a non-finite gradient are skipped and counted. The
    parameters with the best held-out score are kept, and the fit ends early where that score has stopped improving.
    Ctrl-C returns the best so far.

    A column with many equal values (rounded, counted) has no density: add noise of the rounding's size first.

    Args:
        x: data (N, D): a tensor, an array, or what numpy makes one of; N at least 10.
        flow: a registered name (`flowvi.transforms.available`), or factory(input_dim, **options); with a context,
            factory(input_dim, context_dim, **options). Families with a fast inverse (planar, radial, couplings,
            maf) train fast; iaf, whose inverse takes D passes, trains slowly.
        context: (N, C), to fit q(x | context).
        num_flows: K; by default the flow's own.
        num_steps: steps of Adam; 2000.
        num_epochs: passes through the data, in place of `num_steps`.
        batch_size: rows per step; 512.
        lr: the largest step size; 5e-3, or 2e-2 for fused stacks (planar, radial).
        validation: the fraction of rows held out, drawn by the seed; 0 for none; or held-out data (V, D).
        validation_context: (V, C), with held-out data of your own.
        patience: checks of the held-out score (there are 100 in a full fit) without improvement that end the
            fit; 40.
        base: the affine layer, "diag", "low_rank" or "full"; by default full up to D = 200.
        seed: makes the fit reproducible (same machine, same threads); drawn if None. The global random state is
            left alone either way.
        device: where to compute.
        dtype: of the computation; that of the data if it is floating, else torch's default.
        progress: whether a bar is shown; None shows it in a terminal or notebook.
        **options: what the flow's factory takes. Without a context real_nvp's direction, the clip of maf, and the
            bound, min_share and min_slope of neural_spline have defaults of their own, which suit data.

    Returns:
        The fit: `sample`, `log_prob`, `log_likelihood`, `history`, `config`, `timing`, `save`.

    Raises:
        OptionError, UnknownFlowError: an argument can't be used; a column of x is constant.
        DimensionError: a shape doesn't fit, or there are too few rows.
        NonFiniteError: data are NaN or infinite.

    Example:
        >>> import torch, flowvi
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> fit = flowvi.fit_density(x, flow="planar", num_flows=4, num_steps=50, seed=0, progress=False)
        >>> fit.sample(10).shape, fit.log_prob(x).shape
        (torch.Size([10, 2]), torch.Size([500]))
    """
    positive_integers_or_none(num_steps=num_steps, num_epochs=num_epochs, batch_size=batch_size, patience=patience)
    positive_numbers_or_none(lr=lr)
    if num_steps is not None and num_epochs is not None:
        raise OptionError("give num_steps or num_epochs, not both.")
    seed = as_seed(seed)
    flags_or_none(progress=progress)
    float_or_double(dtype)
    device = as_device(device)
    if base is not None:
        one_of(AFFINE_KINDS, base=base)
    if num_flows is not None:
        whole_numbers(num_flows=num_flows)
    if not isinstance(flow, str) and not callable(flow):
        raise OptionError(f"flow must be a name or a factory(input_dim, **options), not {shown(flow)}.")
    seed = secrets.randbits(31) if seed is None else seed
    rows = as_rows("x", x, dtype, device)
    data = Rows(rows, None if context is None else as_rows("context", context, rows.dtype, rows.device, len(rows)))
    generator = torch.Generator().manual_seed(seed)
    train, held, held_out = split(data, validation, validation_context, generator)
    scaling = Scaling.of(train)

    dim, context_dim = data.x.shape[1], 0 if data.context is None else data.context.shape[1]
    entry, factory = (lookup(flow), None) if isinstance(flow, str) else (FlowEntry(flow), flow)
    if num_flows is None:
        num_flows = entry.num_flows
    label = flow if isinstance(flow, str) else getattr(flow, "__name__", type(flow).__name__)
    if isinstance(flow, str) and context is None:
        options = OPTIONS.get(flow, {}) | options
    spec = FlowSpec(label, dim, num_flows, base or default_base(dim), options)
    q = _start(spec, context_dim, factory, data.x, seed)

    batch_size = min(batch_size or BATCH_SIZE, len(train.x))
    per_epoch = len(train.x) // batch_size
    num_steps = num_steps or (num_epochs * per_epoch if num_epochs else NUM_STEPS)
    schedule = Schedule(num_steps, lr or (LR if _has_networks(q) else LR_SHALLOW))
    start = time.perf_counter()
    _whiten(q, scaling.apply(train), scaling)
    with one_thread_if_small(batch_size * dim * max(1, num_flows)), wanted(progress):
        record = _maximize(
            q,
            scaling.apply(train),
            None if held is None else scaling.apply(held),
            schedule,
            batch_size=batch_size,
            patience=patience or PATIENCE,
            generator=generator,
            progress=progress,
            offset=scaling.log_det,
        )
    timing = {"steps": time.perf_counter() - start}
    scaling.fold(q)
    config = {
        "flow": label,
        "num_flows": num_flows,
        "base": spec.base,
        "options": dict(options),
        "num_parameters": sum(p.numel() for p in _module(q).parameters()),
        "dim": dim,
        "context_dim": context_dim,
        "num_rows": len(train.x),
        "num_held_out": 0 if held is None else len(held.x),
        "num_steps": num_steps,
        "batch_size": batch_size,
        "lr": schedule.lr,
        "patience": patience or PATIENCE,
        "seed": seed,
        "dtype": str(data.x.dtype).removeprefix("torch."),
        "device": str(data.x.device),
        "stopped": record.stopped,
        "recorded": record.recorded and not record.changed_at,
        "validation_mean": None,
        "validation_se": None,
    }
    fit = DensityFit(q, config=config, timing=timing, history=record.history(), held_out=held_out, seed=seed)
    if held is not None and len(held.x) > 1:
        start = time.perf_counter()
        score: MeanLogProb = fit.log_likelihood(held.x, held.context)
        fit.timing["score"] = time.perf_counter() - start
        fit.config |= {"validation_mean": score.mean, "validation_se": score.standard_error}
    _report_trouble(record)
    return fit


def _start(spec: FlowSpec, context_dim: int, factory: Any, like: Tensor, seed: int) -> Flow | ConditionalFlow:
    """The flow near the identity, its random parts drawn from the seed."""
    with kept(seed):
        q: Flow | ConditionalFlow
        if context_dim:
            q = ConditionalFlow(spec, context_dim, dtype=like.dtype, device=like.device, factory=factory)
        else:
            q = Flow.from_spec(spec, dtype=like.dtype, device=like.device, factory=factory)
        # Off the identity, a saddle where data are symmetric; data keep a random start from running away.
        for network in _module(q).modules():
            if isinstance(network, ZeroStart):
                network.stir(STIR)
        return q


def _module(q: Flow | ConditionalFlow) -> nn.Module:
    return q if isinstance(q, ConditionalFlow) else q.module


def _has_networks(q: Flow | ConditionalFlow) -> bool:
    """Whether some layer computes its parameters by a network; the others take larger steps."""
    return isinstance(q, ConditionalFlow) or any(list(t.children()) for t in q.module)


@torch.no_grad()
def _whiten(q: Flow | ConditionalFlow, train: Rows, scaling: Scaling) -> None:
    """Start the affine layer at the covariance of the standardized data, and the contexts at their own scale."""
    if isinstance(q, ConditionalFlow):  # its covariance given the context is another than the data's
        assert scaling.context_loc is not None
        assert scaling.context_scale is not None
        q.context_loc.copy_(scaling.context_loc)
        q.context_scale.copy_(scaling.context_scale)
        return
    affine = q.transforms[-1]
    if affine.kind != "full" or len(train.x) <= 2 * q.dim:
        return
    factor, failed = torch.linalg.cholesky_ex(torch.cov(train.x.double().T).reshape(q.dim, q.dim))
    if not failed:
        affine.set_(affine.loc, factor.to(affine.loc))


# The loop.


@dataclass
class Record:
    """What the loop saw: grows while it runs."""

    checks: list[tuple[int, float, float, float]] = field(default_factory=list)  # step, train, validation, lr
    best: float = -math.inf
    best_step: int = 0
    steps: int = 0
    skipped_steps: int = 0
    stopped: str = "finished"
    recorded: bool = False
    """Whether the steps were those of a recording."""
    changed_at: int = 0
    """The step at which that was found to be one of something else, and left; 0 where it was not."""

    def history(self) -> DensityHistory:
        """The same, for the user."""
        step, train, validation, lr = torch.tensor(self.checks, dtype=torch.float64).reshape(-1, 4).unbind(-1)
        return DensityHistory(step.long(), train, validation, lr, self.best_step, self.skipped_steps)


def _maximize(
    q: Flow | ConditionalFlow,
    train: Rows,
    held: Rows | None,
    schedule: Schedule,
    *,
    batch_size: int,
    patience: int,
    generator: torch.Generator,
    progress: bool | None,
    offset: float,
) -> Record:
    """Adam on the mean log-likelihood, in place; keeps the parameters with the best held-out score.

    Args:
        q: the flow, for standardized data.
        train: what it learns from.
        held: what it is checked on, or None: then the last parameters are kept.
        schedule: number and size of steps.
        batch_size: rows per step.
        patience: checks without improvement that end it.
        generator: where the order of the rows comes from.
        progress: whether a bar is shown.
        offset: added to every score, so that it is in the units of the data.
    """
    flat = FlatParameters(_module(q))
    adam = FlatAdam(flat.vector, flat.grad)
    record, best = Record(), flat.vector.clone()
    held = None if held is None else held.at(slice(CHECKED_ROWS))
    every = max(1, schedule.num_steps // CHECKS)
    waited, looked, seen = 0, 0, []

    def loss(x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        at = flow_at(q, *context or (None,))
        at._validate_args = False  # the data are checked already, and a recording asks for no values
        log_q = at.log_prob(x).mean()
        return -log_q, log_q

    def inputs(rows: Rows) -> list[Tensor]:
        return [rows.x] if rows.context is None else [rows.x, rows.context]

    validated = getattr(q, "_validate_args", False)
    two = [inputs(train.at(slice(first, first + batch_size))) for first in (0, len(train.x) - batch_size)]
    gradient = make_gradient(loss, flat, *two, recorded=schedule.num_steps >= LEAST_STEPS)
    record.recorded = gradient.recorded
    bar = Bar(total=schedule.num_steps, desc="fit_density", disable=None if progress is None else not progress)
    try:
        for step, rows in zip(range(schedule.num_steps), _batches(train, batch_size, generator), strict=False):
            log_q = gradient(*inputs(rows))
            adam.step(schedule.lr_at(step), log_q.isfinite())
            record.steps = step + 1
            seen.append(log_q)
            if (step + 1) % every and step + 1 < schedule.num_steps:
                continue
            if step + 1 - looked >= LOOK_EVERY or step + 1 == schedule.num_steps:
                looked = step + 1
                if not gradient.holds(*inputs(rows)):
                    gradient, record.changed_at = Gradient(loss, flat), step + 1
            value = math.nan if held is None else _score(q, held)
            recent = torch.stack(seen)
            fresh = float(recent[recent.isfinite()].mean())
            record.checks.append((step + 1, fresh + offset, value + offset, schedule.lr_at(step)))
            seen.clear()
            bar.update(step + 1 - bar.n)
            _show(bar, record, (step + 1) * batch_size / len(train.x))
            waited += 1
            if held is None or value > record.best:
                waited, record.best, record.best_step = 0, value, step + 1
                best.copy_(flat.vector)
            if waited >= patience:
                record.stopped = "no improvement"
                break
    except KeyboardInterrupt:
        record.stopped = "interrupted"
    finally:
        bar.close()
        if isinstance(q, Flow):
            q._validate_args = validated
        with torch.no_grad():
            flat.vector.copy_(best)
        flat.release()
    record.skipped_steps = adam.skipped
    return record


def _batches(rows: Rows, size: int, generator: torch.Generator) -> Iterator[Rows]:
    """Minibatches without end, each row once in an epoch (the last, partial batch is left out)."""
    while True:
        order = torch.randperm(len(rows.x), generator=generator).to(rows.x.device)
        for start in range(0, len(order) - size + 1, size):
            yield rows.at(order[start : start + size])


@torch.no_grad()
def _score(q: Flow | ConditionalFlow, rows: Rows, size: int = 4096) -> float:
    """The mean log-likelihood; -inf where it is not finite."""
    total = 0.0
    for start in range(0, len(rows.x), size):
        part = rows.at(slice(start, start + size))
        total += float(flow_at(q, part.context).log_prob(part.x).sum())
    return total / len(rows.x) if math.isfinite(total) else -math.inf


def _show(bar: Any, record: Record, epoch: float) -> None:
    if not bar.disable:
        _, train, validation, _ = record.checks[-1]
        bar.set_postfix_str(f"epoch {epoch:.1f}, log q {train:.3f}, held out {validation:.3f} nats", refresh=False)


def _report_trouble(record: Record) -> None:
    if record.stopped == "interrupted":
        warnings.warn(
            InterruptedWarning(f"stopped by Ctrl-C after {record.steps} steps; this is the best so far."), stacklevel=3
        )
    if record.changed_at:
        warnings.warn(
            NumericalWarning(
                f"the flow computed something else in step {record.changed_at} than where the fit had recorded it, and "
                f"earlier steps may have been wrong: its Python code must not change in time."
            ),
            stacklevel=3,
        )
    if record.skipped_steps:
        warnings.warn(
            NumericalWarning(
                f"{record.skipped_steps} steps were skipped because log q or its gradient was not finite: look for "
                f"outliers in the data, or lower lr."
            ),
            stacklevel=3,
        )
