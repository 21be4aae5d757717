"""The right posterior, with nothing set: flowvi beside Pyro's guides and NUTS, by error and by time.

Every posterior has trusted means and sds (`experiments.posteriors`). flowvi is `flowvi.fit(model, args)` with nothing
set, then its `resample()` and its `refine()`, each with the seconds of the fit before it. What the others do is in
`experiments.peers`. An error is the worst one of any mean, in reference sds, and of any sd, relative.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

import flowvi
from experiments import peers
from experiments.parallel import Case, Row, run_cases
from experiments.posteriors import Known, posteriors
from experiments.report import Report, require_matplotlib
from flowvi._version import __version__
from flowvi.errors import FlowVIError, FlowVIWarning, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Truth: flowvi with nothing set beside Pyro's guides and NUTS, by error and by time"

OURS = ("flowvi", "flowvi, resample()", "flowvi, refine()")
NUTS = ("Pyro NUTS", "NumPyro NUTS")
METHODS = (*OURS, *peers.GUIDES, *NUTS)

GOOD = 0.1
"""The error from which on the picture calls an answer wrong."""


@dataclass(frozen=True)
class Config:
    """Everything the rows depend on, but for the number of seeds."""

    seed: int = 0
    seeds: int = 1
    references: str | None = None
    """The name of the folder of references; None is the four exact posteriors."""
    methods: tuple[str, ...] = METHODS
    num_steps: int = 5000
    """Steps of Adam of Pyro's guides."""
    fit_steps: int | None = None
    """Steps of flowvi's fits; None is its default."""
    num_warmup: int = 1000
    num_kept: int = 1000
    """Warm-up steps and draws of NUTS."""
    num_draws: int = 50_000
    """Draws of each fitted q, ours and theirs, behind its means and sds."""
    refine_seconds: float = 120.0

    @classmethod
    def quick(cls, seed: int = 0, seeds: int = 1, references: str | None = None) -> Config:
        """Short fits and chains, to see that it works: not the figures to quote."""
        return cls(
            seed,
            seeds,
            references,
            num_steps=100,
            fit_steps=200,
            num_warmup=50,
            num_kept=50,
            num_draws=5000,
            refine_seconds=2.0,
        )


def run(config: Config, out: Path, references: Path | None = None, progress: bool = True) -> Report:
    """Run every method on every posterior that has no row yet.

    Args:
        config: what to do.
        out: the folder whose rows.jsonl keeps each row as it comes; more seeds or methods go on with it.
        references: the folder of reference posteriors; without one the four exact ones.
        progress: whether a bar is shown.

    Raises:
        OptionError: a method that there isn't, or no references in the folder.
    """
    require_matplotlib()
    unknown = [method for method in config.methods if method not in METHODS]
    if unknown:
        raise OptionError(f"no method {', '.join(unknown)}: there are {'; '.join(METHODS)}.")
    methods = [m for m in config.methods if m != "NumPyro NUTS" or peers.has_numpyro()]
    targets = {known.name: known for known in posteriors(references)}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("seed", "seeds", "methods")}
    settings["flowvi"] = __version__
    # flowvi's three share one fit, and so one case
    groups = list(dict.fromkeys("flowvi" if method in OURS else method for method in methods))
    cases = [
        {**settings, "posterior": name, "method": group, "seed": seed}
        for seed in range(config.seed, config.seed + config.seeds)
        for name in targets
        for group in groups
    ]
    warm_up()
    found = run_cases(partial(work, targets), cases, out / "rows.jsonl", description="truth", progress=progress)
    rows = [row for case in found for row in case["rows"] if row["method"] in methods]
    seconds = sum(case["seconds"] for case in found)
    notes = _notes(config, list(targets), methods, rows)
    return Report("truth", TITLE, config, rows, table(rows), notes, draw(rows), seconds)


def work(targets: Mapping[str, Known], case: Case) -> Row:
    """The rows of one method on one posterior, and the seconds of all of it."""
    own = ("posterior", "method", "seed", "flowvi")
    config = Config(**{key: value for key, value in case.items() if key not in own})
    known, method, seed = targets[case["posterior"]], case["method"], case["seed"]
    start = time.perf_counter()
    if method == "flowvi":
        rows = list(flowvi_rows(config, known, seed))
    else:
        rows = [_measured(known, method, seed, lambda: _peer(config, known, method, seed))]
    return {"rows": rows, "seconds": time.perf_counter() - start}


def _peer(config: Config, known: Known, method: str, seed: int) -> dict[str, Tensor]:
    """Draws by one of the others."""
    if method in peers.GUIDES:
        return peers.pyro_guide(known, method, seed=seed, num_steps=config.num_steps, num_draws=config.num_draws)
    nuts = peers.pyro_nuts if method == "Pyro NUTS" else peers.numpyro_nuts
    return nuts(known, seed=seed, num_warmup=config.num_warmup, num_draws=config.num_kept)


def flowvi_rows(config: Config, known: Known, seed: int) -> Iterator[Row]:
    """The fit, diagnosis included, and what may follow it."""
    settings: dict[str, Any] = {} if config.fit_steps is None else {"num_steps": config.fit_steps}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlowVIWarning)  # the row has the verdict
        try:
            posterior = flowvi.fit(known.model, (known.data,), seed=seed, progress=False, **settings)
        except FlowVIError as error:
            for method in OURS:
                yield _failed(known, method, seed, time.perf_counter() - start, error)
            return
        if posterior.config.get("stopped") == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
            raise KeyboardInterrupt
        fitted = time.perf_counter() - start
        found = posterior.diagnose()
        verdict = {"trusted": found.trusted, "verdict": found.verdict, "khat": found.khat, "ess": found.ess_fraction}
        verdict |= {"log_evidence": found.log_evidence, "gap": found.gap}
        verdict |= {key: posterior.config.get(key) for key in ("num_flows", "num_steps", "stopped")}
        yield _measured(known, OURS[0], seed, lambda: posterior.sample(config.num_draws, seed=1), fitted) | verdict
        num_resampled = config.num_draws // 4  # of a pool of as many as the fit is judged by
        yield _measured(known, OURS[1], seed, lambda: posterior.resample(num_resampled, seed=1), fitted) | verdict
        yield _refined(config, known, posterior, seed, fitted)


def _refined(config: Config, known: Known, posterior: flowvi.Posterior, seed: int, fitted: float) -> dict[str, Any]:
    kept: list[Any] = []

    def go() -> dict[str, Tensor]:
        refined = posterior.refine(time_limit=config.refine_seconds, seed=1, progress=False)
        kept.append(refined)
        return refined.sample(refined.chains.num_draws, seed=1)

    row = _measured(known, OURS[2], seed, go, fitted)
    if kept:
        found = kept[0].diagnose()
        row |= {"trusted": found.trusted, "verdict": found.verdict, "log_evidence": found.log_evidence}
    return row


def _measured(
    known: Known, method: str, seed: int, call: Callable[[], Mapping[str, Tensor]], before: float = 0.0
) -> dict[str, Any]:
    """A row: the errors of the draws that `call` gives and its seconds, after those of what came before."""
    start = time.perf_counter()
    try:
        draws = call()
        seconds = before + time.perf_counter() - start
        error_mean, error_sd = known.errors(draws)
    except (FlowVIError, RuntimeError, ValueError, NotImplementedError, ArithmeticError) as error:
        return _failed(known, method, seed, before + time.perf_counter() - start, error)
    row = _row(known, method, seed, seconds)
    return row | {"error_mean": error_mean, "error_sd": error_sd, "error": _worst(error_mean, error_sd)}


def _failed(known: Known, method: str, seed: int, seconds: float, error: Exception) -> dict[str, Any]:
    """A row for what raised an error: that is its result."""
    return _row(known, method, seed, seconds) | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def _row(known: Known, method: str, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "posterior": known.name,
        "method": method,
        "seed": seed,
        "error_mean": math.inf,
        "error_sd": math.inf,
        "error": math.inf,
        "seconds": seconds,
        "failed": None,
        "trusted": None,
        "verdict": None,
    }


def _worst(*errors: float) -> float:
    """The largest; infinite where one is not a number."""
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def warm_up() -> None:
    """Loads compiled kernels and ArviZ, which the first fit of a process would pay for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlowVIWarning)
        flowvi.fit(lambda z: -z.square().sum(-1) - z.exp().sum(-1), dim=2, num_steps=20, seed=0, progress=False)


# What the rows say.


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One line for each posterior and method: medians over seeds, and the worst where there are several."""
    several = len({row["seed"] for row in rows}) > 1
    lines = []
    for posterior in dict.fromkeys(row["posterior"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if (row["posterior"], row["method"]) == (posterior, method)]
            line = {"posterior": posterior, "method": method}
            for key, title in (("error_mean", "error of a mean, sd"), ("error_sd", "error of an sd")):
                line[title] = _number(median(row[key] for row in mine))
                if several:
                    line[title] += f" (worst {_number(max(row[key] for row in mine))})"
            line["seconds"] = f"{median(row['seconds'] for row in mine):.1f}"
            said = [row["trusted"] for row in mine if row["trusted"] is not None]
            yes = f"{sum(said)} of {len(said)}" if several else "yes" if all(said) else "no"
            line["trusted"] = yes if said else "-"
            lines.append(line)
    return lines


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "failed"
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def _notes(
    config: Config, targets: Sequence[str], methods: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    notes = [
        "Errors: the worst of any mean, in reference sds, and of any sd, relative. Reference draws themselves differ "
        "by up to .04 and .06 between their halves."
        if config.references is not None
        else "Errors: the worst of any mean, in true sds, and of any sd, relative. Moments are exact.",
        "flowvi: flowvi.fit(model, (data,)) with nothing set, tracing and diagnosis included; resample() and refine() "
        "count the fit's seconds too.",
        f"Pyro's guides: Trace_ELBO with one particle (the models are not vectorized), {config.num_steps:,} steps of "
        f"ClippedAdam, lr {peers.LR:g} falling to {peers.LR_END:g}, Pyro's initialization; q, ours and theirs, is "
        f"judged by {config.num_draws:,} draws.",
        f"NUTS: one chain, {config.num_warmup:,} + {config.num_kept:,} steps, defaults, judged by its draws"
        + (", JAX's compiling included." if "NumPyro NUTS" in methods else "; NumPyro is not installed."),
        "One thread for all; what a process loads once (compiled kernels, ArviZ) is not counted.",
    ]
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        good = sum(row["error"] <= GOOD for row in mine)
        notes.append(
            f"{method}: {good} of {len(mine)} answers within {GOOD}, median {median(r['seconds'] for r in mine):.1f} s."
        )
    reasons = {(row["method"], row["posterior"], row["failed"]) for row in rows if row["failed"]}
    notes += [f"Failed: {method} on {posterior}: {why}" for method, posterior, why in sorted(reasons)]
    if config.fit_steps is not None:
        notes.insert(0, f"Short fits of {config.fit_steps} steps and short chains: these are not the figures to quote.")
    if config.seeds > 1:
        notes.append(
            f"Medians over seeds {config.seed} to {config.seed + config.seeds - 1} of {len(targets)} posteriors."
        )
    return notes


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Worst error against seconds, both logarithmic: a colour for each method; hollow where our verdict was no."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    finite = [row["error"] for row in rows if math.isfinite(row["error"])]
    top = 3 * max(finite, default=1.0)  # where the failures are drawn
    for i, method in enumerate(methods):
        colour = colormaps["tab10"](i % 10)
        mine = [row for row in rows if row["method"] == method]
        marker = "o" if method in OURS else "s" if method in NUTS else "^"
        axes.scatter(
            [row["seconds"] for row in mine],
            [row["error"] if math.isfinite(row["error"]) else top for row in mine],
            34,
            marker=marker,
            facecolors=["none" if row["trusted"] is False or row["failed"] else colour for row in mine],
            edgecolors=[colour],
        )
        axes.scatter([], [], 34, marker=marker, color=[colour], label=method)
    axes.axhline(GOOD, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="worst error of a mean (sd) or an sd (relative)")
    axes.set_title("each posterior a point; hollow: not trusted, or failed (at the top)", fontsize="small")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure
