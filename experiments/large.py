"""Hundreds of latents, with nothing set: flowvi beside long NUTS, by error and by time.

The posteriors and their references are in `experiments.large_models`. flowvi is `flowvi.fit(model, (data,))` with
nothing set, then its `resample()` and its `refine()`, as in `experiments.truth`; errors are those of the logarithms
where a site is a scale.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import truth
from experiments.large_models import MODELS, REFERENCES, Large, load, read_references
from experiments.parallel import Case, Row, run_cases
from experiments.peers import has_numpyro
from experiments.report import Report, require_matplotlib
from flowvi._version import __version__
from flowvi.errors import FlowVIError, OptionError

TITLE = "Large: posteriors of 100 to 205 latents, flowvi with nothing set beside long NUTS"

NUTS = "NumPyro NUTS, long"
GOAL_MEAN, GOAL_SD = 0.15, 0.2
"""The worst error of a mean, in sds, and of an sd, relative, that the fit itself is to keep to."""

CORRECTED = 0.1
"""The same, for both, of what was resampled or refined."""


@dataclass(frozen=True)
class Config:
    """Everything the rows depend on."""

    seed: int = 0
    models: tuple[str, ...] = tuple(MODELS)
    num_draws: int = 50_000
    """Draws of q behind its means and sds."""
    fit_steps: int | None = None
    """Steps of the fits; None is flowvi's default."""
    refine_share: float = 0.5
    """Of the seconds that an answer may take, what `refine()` may use."""

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short fits, to see that it works: not the figures to quote."""
        return cls(seed, num_draws=4000, fit_steps=50, refine_share=0.01)


def run(config: Config, out: Path, progress: bool = True, references: Path = REFERENCES) -> Report:
    """Fit every model that has no rows yet.

    Args:
        config: what to do.
        out: the folder whose rows.jsonl keeps the rows of each model as they come.
        progress: whether a bar is shown.
        references: the file of NUTS' answers.

    Raises:
        OptionError: a model that there isn't, or no references.
    """
    require_matplotlib()
    unknown = [name for name in config.models if name not in MODELS]
    if unknown:
        raise OptionError(f"no model {', '.join(unknown)}: there are {', '.join(MODELS)}.")
    known, found = {k.name: k for k in load(references)}, read_references(references)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "models"} | {"flowvi": __version__}
    truth.warm_up()
    cases = [{**settings, "posterior": name} for name in config.models]
    done = run_cases(partial(work, known), cases, out / "rows.jsonl", description="large", progress=progress)
    rows: list[dict[str, Any]] = []
    for name, case in zip(config.models, done, strict=True):
        rows += [*case["rows"], _nuts_row(name, found[name], config.seed)]
    seconds = sum(case["seconds"] for case in done)
    return Report(
        "large", TITLE, config, rows, truth.table(rows), _notes(config, found, rows), truth.draw(rows), seconds
    )


def work(known: Mapping[str, Large], case: Case) -> Row:
    """The rows of flowvi on one model, and the seconds of all of it."""
    target = known[case["posterior"]]
    refine_seconds = case["refine_share"] * target.seconds
    config = truth.Config(
        num_draws=case["num_draws"], fit_steps=case["fit_steps"], refine_seconds=refine_seconds, methods=truth.OURS
    )
    rows = list(truth.flowvi_rows(config, target, case["seed"]))
    return {"rows": rows, "seconds": max(row["seconds"] for row in rows)}


def _nuts_row(name: str, found: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The reference beside the rest: its seconds, and by how much its own halves say that it is off."""
    return {
        "posterior": name,
        "method": NUTS,
        "seed": seed,
        "error_mean": found["error_mean"],
        "error_sd": found["error_sd"],
        "error": max(found["error_mean"], found["error_sd"]),
        "seconds": found["seconds"],
        "failed": None,
        "trusted": None,
        "verdict": None,
    }


def _within(row: Mapping[str, Any]) -> bool:
    """Whether a row keeps to its goal."""
    if row["method"] == truth.OURS[0]:
        return row["error_mean"] <= GOAL_MEAN and row["error_sd"] <= GOAL_SD
    return row["error"] <= CORRECTED


def _notes(config: Config, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    ours = [row for row in rows if row["method"] in truth.OURS]
    notes = [
        "Errors: the worst of any mean, in sds of the reference, and of any sd, relative, over all sites; scales by "
        "their logarithms. Seconds of resample() and refine() count the fit's.",
        f"{NUTS}: 4 chains of 2,000 + 5,000 steps, the reference itself, with half of the difference between its "
        "halves for its errors, and JAX's compiling in its seconds: "
        + "; ".join(
            f"{name} R-hat {found[name]['r_hat']}, least ESS {found[name]['ess']:,}, "
            f"{found[name]['divergences']} divergences"
            for name in config.models
        )
        + ".",
        f"Goals: a mean within {GOAL_MEAN}, an sd within {GOAL_SD}; resampled or refined, both within {CORRECTED}. "
        "Not within them: "
        + ("; ".join(f"{r['posterior']}, {r['method']}" for r in ours if not _within(r)) or "none")
        + ".",
        "Trusted though not within the fit's goals: "
        + (
            "; ".join(
                f"{r['posterior']}, {r['method']}"
                for r in ours
                if r["trusted"] and not (r["error_mean"] <= GOAL_MEAN and r["error_sd"] <= GOAL_SD)
            )
            or "none"
        )
        + ".",
    ]
    notes += [f"{r['posterior']}, {r['method']}: {r['verdict']}" for r in ours if r["verdict"]]
    notes += [f"Failed: {r['method']} on {r['posterior']}: {r['failed']}" for r in ours if r["failed"]]
    if config.fit_steps is not None:
        notes.insert(0, f"Short fits of {config.fit_steps} steps: these are not the figures to quote.")
    return notes


def make_references(path: Path = REFERENCES, **settings: Any) -> Path:
    """Run long NUTS on every model, some minutes each, and write its means and sds to `path`.

    Args:
        path: the file, written anew.
        **settings: what `large_numpyro.references` takes besides the name.

    Raises:
        FlowVIError: NumPyro is not installed.
    """
    if not has_numpyro():
        raise FlowVIError("the references are NumPyro's, which is missing: pip install 'flowvi[peers]'")
    twins = importlib.import_module("experiments.large_numpyro")
    found = {name: twins.references(name, **settings) for name in MODELS}
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    return path
