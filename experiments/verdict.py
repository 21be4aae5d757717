"""Is the verdict right? Fits of many targets with known moments, trusted or not, against what they really are.

A fit is right where no mean is off by more than .1 true sd and no sd by more than 10%, wrong where one is off by more
than .25, and between them neither. Means and sds are those of 200,000 draws of q against exact ones
(`experiments.known_targets`). About two fits of five are spoiled on purpose: cut short, with too few layers, only
affine, or without whitening; all others are `flowvi.fit(log_prob, dim=D)` with nothing set, or `flowvi.fit(model)` of
what is positive.

Every number that a rule could use is kept for each fit. `best_threshold` chooses on the odd-numbered fits and is
judged on the even-numbered ones.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import flowvi
from experiments.known_models import FAMILIES, NEEDLES, make
from experiments.known_targets import FEW, PLACES, KnownTarget, Random
from experiments.parallel import Case, Row, run_cases
from experiments.report import Report, require_matplotlib
from flowvi._version import __version__
from flowvi.errors import FlowVIError, FlowVIWarning
from flowvi.short_run import symmetric_kl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The verdict against the truth: fits of targets with known moments"

RIGHT, WRONG = 0.1, 0.25
SPOILED: tuple[Mapping[str, Any], ...] = (
    {"num_steps": 30},
    {"num_steps": 100},
    {"num_steps": 300},
    {"flow": "planar", "num_flows": 1},
    {"flow": "planar", "num_flows": 4, "num_steps": 300},
    {"flow": "planar", "num_flows": 0, "num_steps": 30},
    {"flow": "planar", "num_flows": 4, "base": "diag"},
    {"flow": "radial", "num_flows": 2},
    {"whiten": False, "num_steps": 300},
)
SPOILED_SHARE = 0.4

NUMBERS = (
    "khat",
    "ess_fraction",
    "gap",
    "j",
    "shift",
    "stretch",
    "missed",
    "hmc_j_upper",
    "hmc_mean_shift",
    "hmc_sd_shift",
    "resample_mean_shift",
    "resample_sd_shift",
)
"""What a rule could be made of: each grows where a fit is worse, but for `ess_fraction`."""


@dataclass(frozen=True)
class Config:
    """Everything the rows depend on, but for their number."""

    seed: int = 0
    num_targets: int = 220
    num_needles: int = 20
    """Targets beside them, with a mode that can't be found by who asks for log p a million times."""
    num_draws: int = 200_000
    """Draws of q behind its means and sds."""
    num_resampled: int = 20_000
    """Draws after importance resampling, and as many of q beside them."""
    num_steps: int | None = None
    """Most steps of every fit; None is flowvi's default."""
    time_limit: float | None = None
    """Seconds of each fit with nothing set; None is flowvi's default."""
    workers: int = 1

    @classmethod
    def quick(cls, seed: int = 0, workers: int = 1) -> Config:
        """Few and short fits, to see that it works: not the figures to quote."""
        return cls(
            seed, num_targets=11, num_needles=1, num_draws=20_000, num_resampled=5000, num_steps=100, workers=workers
        )


def options(index: int, seed: int) -> Mapping[str, Any]:
    """What is set in the fit of this number: nothing, or what spoils it."""
    random = Random(7_777_777 + 1_000_003 * seed + index)
    return random.choice(SPOILED) if random.uniform(0.0, 1.0) < SPOILED_SHARE else {}


def run(config: Config, out: Path, progress: bool = True) -> Report:
    """Fit everything that has no row yet, and make the table.

    Args:
        config: what to do.
        out: the folder whose rows.jsonl keeps each row as it comes; more targets, or other workers, go on with it.
        progress: whether a bar is shown.
    """
    require_matplotlib()
    settings = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("num_targets", "num_needles", "workers")
    }
    settings["flowvi"] = __version__
    numbers = [*range(config.num_targets), *range(NEEDLES, NEEDLES + config.num_needles)]
    cases = [{**settings, "index": index} for index in numbers]
    fits = run_cases(work, cases, out / "rows.jsonl", workers=config.workers, description="verdict", progress=progress)
    seconds = sum(row["seconds"] for row in fits)  # over all processes, and calls
    return Report("verdict", TITLE, config, fits, table(fits), _notes(config, fits), draw(fits), seconds)


def work(case: Case) -> Row:
    """The row of one case."""
    settings = {k: v for k, v in case.items() if k not in ("index", "flowvi")}
    return fit_one(Config(**settings), case["index"])


def fit_one(config: Config, index: int) -> dict[str, Any]:
    """One target, one fit, and all the numbers of it. A fit that raises is a row without numbers, not trusted."""
    target, chosen = make(index, config.seed), dict(options(index, config.seed))
    if config.num_steps is not None:
        chosen["num_steps"] = min(config.num_steps, chosen.get("num_steps", config.num_steps))
    if config.time_limit is not None and not options(index, config.seed):
        chosen["time_limit"] = config.time_limit
    row: dict[str, Any] = {
        "index": index,
        "family": target.family,
        "name": target.name,
        "dim": target.dim,
        "moments": target.source,
        "options": ", ".join(f"{key}={value!r}" for key, value in options(index, config.seed).items()),
        "error_mean": math.inf,
        "error_sd": math.inf,
        "truth": "wrong",
        "trusted": False,
        "verdict": "",
        "error": None,
    }
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlowVIWarning)  # the row says it
            posterior = flowvi.fit(**target.fitted, seed=index, progress=False, verify=False, **chosen)
            if posterior.config.get("stopped") == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
                raise KeyboardInterrupt
            row["seconds_fit"] = time.perf_counter() - start
            row |= measure(config, target, posterior)
    except (FlowVIError, RuntimeError, ValueError) as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = time.perf_counter() - start
    return row


def measure(config: Config, target: KnownTarget, posterior: flowvi.Posterior) -> dict[str, Any]:
    """Errors of q's moments, and every number of the diagnosis."""
    error_mean, error_sd = target.errors(target.seen(posterior.sample(config.num_draws, seed=1)))
    error = max(error_mean, error_sd)
    start = time.perf_counter()
    found = posterior.diagnose()
    row: dict[str, Any] = {
        "error_mean": error_mean,
        "error_sd": error_sd,
        "truth": "right" if error <= RIGHT else "wrong" if not error <= WRONG else "grey",
        **{key: value for key, value in dataclasses.asdict(found).items() if _plain(value)},
    }
    row["seconds_diagnose"] = time.perf_counter() - start
    row["log_z_error"] = found.log_evidence  # the targets are normalized: log Z = 0
    row["kl_true"] = -found.elbo
    row |= {f"config_{key}": str(posterior.config.get(key)) for key in ("flow", "num_flows", "num_steps", "stopped")}
    row["starts_agree"] = posterior.config.get("starts_agree")
    row |= _resampled(config, target, posterior)
    row |= _short_run(posterior)
    return row


def _resampled(config: Config, target: KnownTarget, posterior: flowvi.Posterior) -> dict[str, Any]:
    """What importance resampling makes of the judged quantities: errors, and how far it moves them."""
    before = target.seen(posterior.sample(config.num_resampled, seed=2))
    after = target.seen(posterior.resample(config.num_resampled, seed=2))
    error_mean, error_sd = target.errors(after)
    sd = after.std(0)
    return {
        "resample_error_mean": error_mean,
        "resample_error_sd": error_sd,
        "resample_mean_shift": ((after.mean(0) - before.mean(0)).abs() / sd).max().item(),
        "resample_sd_shift": (sd / before.std(0)).log().abs().max().item(),
    }


def _short_run(posterior: flowvi.Posterior) -> dict[str, Any]:
    """A short HMC of its own, unlike the diagnosis' one with all the numbers, for rules that are not made yet."""
    start = time.perf_counter()
    try:
        moved = symmetric_kl(posterior.flow, posterior.density, generator=torch.Generator().manual_seed(3))
    except (FlowVIError, RuntimeError) as error:
        return {"hmc_failed": f"{type(error).__name__}: {error}"}
    shift, ratio = moved.mean_shift.abs(), moved.sd_ratio.log().abs()
    at, wide = int(shift.argmax()), int(ratio.argmax())
    return {
        "hmc_j": moved.j,
        "hmc_j_se": moved.j_se,
        "hmc_j_upper": moved.j + 2 * moved.j_se,
        "hmc_mean_shift": shift[at].item(),
        "hmc_mean_shift_se": moved.mean_shift_se[at].item(),
        "hmc_sd_shift": ratio[wide].item(),
        "hmc_sd_shift_se": (moved.sd_ratio_se[wide] / moved.sd_ratio[wide]).item(),
        "hmc_mean_shift_z": (shift / moved.mean_shift_se).max().item(),
        "hmc_sd_shift_z": (ratio * moved.sd_ratio / moved.sd_ratio_se).max().item(),
        "hmc_acceptance": moved.acceptance,
        "hmc_r_hat": moved.r_hat.max().item(),
        "hmc_divergences": moved.divergences,
        "seconds_hmc": time.perf_counter() - start,
    }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


# What the rows say.


def confusion(rows: Sequence[Mapping[str, Any]], trusted: Callable[[Mapping[str, Any]], bool]) -> dict[str, int]:
    """Counts of "right trusted", "right not", "grey trusted", ... under a rule."""
    counts = {f"{truth} {word}": 0 for truth in ("right", "grey", "wrong") for word in ("trusted", "not")}
    for row in rows:
        counts[f"{row['truth']} {'trusted' if trusted(row) else 'not'}"] += 1
    return counts


def lacks_a_mode(row: Mapping[str, Any]) -> bool:
    """Whether q is right where it is and lacks mass elsewhere: log Z = 0 is known here, as it is not to a user."""
    j, evidence = row.get("hmc_j"), row.get("log_z_error")
    return row["truth"] == "wrong" and j is not None and evidence is not None and j < 0.05 and evidence < -0.05


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """All rows but the needles, the two halves, what was spoiled and what wasn't, the families, and the needles."""
    needles, rows = [r for r in rows if r["family"] == "needle"], [r for r in rows if r["family"] != "needle"]
    return {
        "all": list(rows),
        "odd numbers": [row for row in rows if row["index"] % 2],
        "even numbers": [row for row in rows if not row["index"] % 2],
        "nothing set": [row for row in rows if not row["options"]],
        "spoiled": [row for row in rows if row["options"]],
        "lacking a far mode": [row for row in rows if lacks_a_mode(row)],
        **{family: [row for row in rows if row["family"] == family] for family in FAMILIES},
        "needle, not among all": needles,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The confusion table, group by group."""
    lines = []
    for name, members in groups(rows).items():
        counts = confusion(members, lambda row: bool(row["trusted"]))
        lines.append({"fits": name, "number": str(len(members)), **{k: str(v) for k, v in counts.items()}})
    return lines


def best_threshold(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, dict[str, int], dict[str, int]] | None:
    """The threshold of one number that trusts most right fits and no wrong one, on the odd-numbered rows.

    Fits that lack a far mode are left out: but for `missed` no number here could tell them.

    Args:
        rows: of `run`.
        name: one of `NUMBERS`.

    Returns:
        The threshold, half-way to the best wrong fit, with the confusion on odd and on even numbers; None where no row
        has the number.
    """
    sign = -1.0 if name == "ess_fraction" else 1.0

    def value(row: Mapping[str, Any]) -> float:
        number = row.get(name)
        return math.inf if number is None or math.isnan(number) else sign * number

    if name != "missed":
        rows = [row for row in rows if not lacks_a_mode(row)]
    odd, even = groups(rows)["odd numbers"], groups(rows)["even numbers"]
    if all(math.isinf(value(row)) for row in rows):
        return None
    lowest = min((value(row) for row in odd if row["truth"] == "wrong"), default=math.inf)
    right = [value(row) for row in odd if row["truth"] == "right" and value(row) < lowest]
    if not right:
        return None
    limit = max(right) if math.isinf(lowest) else (max(right) + lowest) / 2
    rule = lambda row: value(row) <= limit  # noqa: E731
    return sign * limit, confusion(odd, rule), confusion(even, rule)


def _notes(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = groups(rows)["all"]
    spoiled = sum(bool(row["options"]) for row in rows)
    notes = [
        f"Right: every mean within {RIGHT} true sd and every sd within {RIGHT:.0%}; wrong: one off by more than "
        f"{WRONG}; grey: between. Means and sds of q are those of {config.num_draws:,} draws.",
        f"Moments: {sum(row['moments'] == 'formula' for row in rows)} by formula, "
        f"{sum(row['moments'] == 'quadrature' for row in rows)} by quadrature over one variable.",
        f"{spoiled} of {len(rows)} fits are spoiled on purpose; the others have nothing set.",
        f"A needle: a narrow mode that fewer than {FEW} of {PLACES:,} random directions from the wider one's centre "
        "lead to (`experiments.known_targets.directions_to`): nobody who asks for log p at so few places knows of it. "
        "Needles are counted in the last row alone.",
    ]
    failed = [row for row in rows if row["error"]]
    if failed:
        notes.append(f"{len(failed)} fits raised an error and count as wrong, not trusted.")
    notes += [
        f"Trusted though wrong: number {row['index']}, {row['name']}, D = {row['dim']}"
        f"{', ' + row['options'] if row['options'] else ''}: off by {row['error_mean']:.2f} / {row['error_sd']:.2f}."
        for row in rows
        if row["trusted"] and row["truth"] == "wrong"
    ]
    lacking = [row for row in rows if lacks_a_mode(row)]
    if lacking:
        notes.append(
            f"{len(lacking)} of the wrong fits lack a mode that is far away and are right where they are (J < .05); "
            f"{sum(bool(row['trusted']) for row in lacking)} of them are trusted. They are left out below, where only "
            "numbers from draws of q are used."
        )
    for name in NUMBERS:
        found = best_threshold(rows, name)
        if found is not None:
            limit, _, even = found
            right = even["right trusted"] + even["right not"]
            wrong = even["wrong trusted"] + even["wrong not"]
            notes.append(
                f"{name} alone, at the best threshold of the odd numbers ({limit:.3g}): on even numbers it trusts "
                f"{even['right trusted']} of {right} right and {even['wrong trusted']} of {wrong} wrong fits."
            )
    if config.num_steps is not None:
        notes.insert(0, f"Short fits of {config.num_steps} steps at most: these are not the figures to quote.")
    if config.time_limit is not None:
        notes.insert(0, f"A time limit of {config.time_limit:g} s for each fit with nothing set.")
    return notes


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Each fit's worst error against its k-hat and its gap, and J where there is one; filled where trusted.

    Needles, which the table has apart, are grey. A point beyond the edge is drawn on it.
    """
    from matplotlib.figure import Figure

    names = [("khat", "k-hat"), ("gap", "log evidence - ELBO, nats")]
    if any(row.get("j") is not None for row in rows):
        names.append(("j", "J, the symmetric KL by a short HMC, nats"))
    figure = Figure(figsize=(4.2 * len(names), 4), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, (name, label) in zip(grid, names, strict=True):
        needles = [row for row in rows if row["family"] == "needle"]
        kinds = {
            ("not trusted", "tab:orange", "none"): [r for r in groups(rows)["all"] if not r["trusted"]],
            ("trusted", "tab:blue", "tab:blue"): [r for r in groups(rows)["all"] if r["trusted"]],
            ("needles", "0.7", "0.7"): needles,
        }
        for (words, colour, face), members in kinds.items():
            mine = [row for row in members if row.get(name) is not None]
            x = np.array([max(row["error_mean"], row["error_sd"]) for row in mine])
            y = np.array([row[name] for row in mine], dtype=float)
            fine = np.isfinite(x) & np.isfinite(y)
            axes.scatter(
                x[fine].clip(1e-3, 3),
                y[fine].clip(*((-1, 3) if name == "khat" else (1e-4, 1e3))),
                18,
                label=words,
                facecolors=face,
                edgecolors=colour,
            )
        axes.set(xscale="log", xlabel="worst error of a mean (in sd) or an sd (relative)", ylabel=label)
        if name != "khat":
            axes.set_yscale("log")
        for limit in (RIGHT, WRONG):
            axes.axvline(limit, color="0.6", linewidth=0.8, linestyle=":")
        for place, words in ((RIGHT / 10, "right"), ((RIGHT * WRONG) ** 0.5, "between"), (WRONG * 4, "wrong")):
            axes.text(place, 1.01, words, ha="center", transform=axes.get_xaxis_transform(), fontsize="small")
    grid[0].legend(frameon=False)
    return figure
