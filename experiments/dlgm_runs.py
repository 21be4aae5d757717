"""Fits of the deep latent Gaussian model with flows of several lengths, each result kept in a file as it comes.

A fit has a name, such as planar_K40: its row is rows/NAME.json, and while it learns its state is in checkpoints/NAME.
Processes can work on different lengths at the same time; the table is made of the rows that are there. Started by
torchrun, they share each minibatch instead: all of them learn and score, and rank 0 keeps what comes of it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import flowvi
from experiments.images import Images
from flowvi.errors import FlowVIError
from flowvi.fit.distributed import ALONE, Ranks
from flowvi.models import DLGM

Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """How a model is learnt; all lengths of flows get the same.

    Attributes:
        updates: steps.
        lr: of the optimizer.
        optimizer: "adam" or "rmsprop" (momentum .9).
        lr_schedule: "cosine" or "constant".
        anneal: whether by the paper's eq. 20, beta_t = min(1, .01 + t / 10000).
        path: the path gradient, or the standard one.
        neck: hidden units between the encoder's features and the layers' parameters; 0 is linear.
        shared_directions: whether planar layers have directions that all images share.
        batch_size: images of a step.
    """

    updates: int
    lr: float
    optimizer: str
    lr_schedule: str
    anneal: bool
    path: bool
    neck: int
    shared_directions: bool
    batch_size: int = 100


PAPER = Training(500_000, 1e-5, "rmsprop", "constant", True, False, 0, False)
TUNED = Training(128_000, 2e-3, "adam", "cosine", False, True, 64, True)
CONFIGS = {"paper": PAPER, "tuned": TUNED}


@dataclass(frozen=True)
class Case:
    """All that a row depends on.

    Attributes:
        data: what the images are.
        flow: "planar" or "nice".
        K: layers.
        training: see `Training`.
        likelihood: of `DLGM`.
        data_dim: pixels.
        latent_dim: latents.
        hidden: maxout units.
        window: of the maxout units.
        num_test: images that are scored.
        num_samples: importance samples of each.
        seed: of everything random.
    """

    data: str
    flow: str
    K: int
    training: Training
    likelihood: str
    data_dim: int
    latent_dim: int
    hidden: int
    window: int
    num_test: int
    num_samples: int
    seed: int

    @property
    def name(self) -> str:
        """Of the row's file."""
        return f"{self.flow}_K{self.K}"


def joined() -> Ranks:
    """The ranks of this job; this process alone where it is not one of several."""
    return Ranks.join() if Ranks.launched() else ALONE


def on_each(load: Callable[[], Images]) -> Images:
    """The images on every rank, loaded by rank 0 first, which may have to download them."""
    ranks = joined()
    mine = load() if ranks.is_first else None
    ranks.same(None, patient=True)
    return load() if mine is None else mine


def run_case(case: Case, images: Images, out: Path, *, resume: bool, progress: bool | None = None) -> Row:
    """Learn and score one model, and keep its row; with `resume` a row that is there is taken, a fit gone on with.

    Raises:
        KeyboardInterrupt: the fit was stopped; its checkpoint is kept.
    """
    path, folder = out / "rows" / f"{case.name}.json", out / "checkpoints" / case.name
    ranks = joined()
    there = ranks.first(lambda: read_row(path))
    if resume and there is not None and there["case"] == asdict(case):
        return there
    if not resume and ranks.is_first and folder.exists():
        shutil.rmtree(folder)
    training = case.training
    anneal = flowvi.LinearAnneal() if training.anneal else None
    objective = (flowvi.PathELBO if training.path else flowvi.ELBO)(1, anneal=anneal)
    options: dict[str, Any] = {}
    if case.flow == "planar" and case.K:
        options["hidden_dims"] = (training.neck,) if training.neck else ()
        options["shared_directions"] = training.shared_directions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        dlgm = DLGM(case.data_dim, case.latent_dim, case.hidden, case.window, case.likelihood)
        encoder = dlgm.encoder()
    fit = flowvi.fit(
        dlgm.model,
        (images.train,),
        encoder=encoder,
        flow=case.flow,
        num_flows=case.K,
        num_steps=training.updates,
        batch_size=training.batch_size,
        lr=training.lr,
        lr_schedule=training.lr_schedule,
        optimizer=training.optimizer,
        objective=objective,
        validation=images.held,
        patience=100,
        seed=case.seed,
        checkpoint=folder,
        checkpoint_every=120.0,
        progress=progress,
        distributed=ranks.world > 1,
        **options,
    )
    if fit.config["stopped"] == "interrupted":
        raise KeyboardInterrupt
    start = time.perf_counter()
    order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(case.seed))
    x = images.test[order[: case.num_test]]
    found = fit.log_likelihood(x, num_importance_samples=case.num_samples, seed=case.seed)
    row = {
        "case": asdict(case),
        **_mean("F", -found.elbos),
        **_mean("nll", -found.values),
        **_mean("KL", found.values - found.elbos),
        "nll_monte_carlo_error": found.monte_carlo_error,
        "num_parameters": fit.config["num_parameters"],
        "best_step": fit.history.best_step,
        "skipped_steps": fit.history.skipped_steps,
        "seconds": fit.timing["steps"],
        "updates_per_second": training.updates / fit.timing["steps"],
        "score_seconds": time.perf_counter() - start,
        "peak_memory_mb": fit.config["peak_memory_mb"],
        "ranks": ranks.world,
        "history": [[round(v, 4) for v in line] for line in zip(*_curve(fit), strict=True)],
        "F_each": [round(v, 4) for v in (-found.elbos).tolist()],
        "nll_each": [round(v, 4) for v in (-found.values).tolist()],
    }
    if not ranks.is_first:
        return row
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(row) + "\n", encoding="utf-8")
    beside.replace(path)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    """Mean and standard error over the images."""
    return {name: float(values.mean()), f"{name}_se": float(values.std()) / math.sqrt(len(values))}


def _curve(fit: flowvi.AmortizedFit) -> list[list[float]]:
    return [fit.history.step.tolist(), fit.history.train.tolist(), fit.history.validation.tolist()]


def read_row(path: Path) -> Row | None:
    """A row's file; None where there is none.

    Raises:
        FlowVIError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        row["case"]["flow"], row["F"], row["F_each"]
    except (ValueError, KeyError, TypeError) as error:
        raise FlowVIError(f"{path} is not a row of this experiment: delete it, and run that length again.") from error
    return row


def all_rows(out: Path, like: Case) -> list[Row]:
    """The rows in rank 0's folder that differ from `like` in flow and length alone: planar first, then by K."""
    paths = sorted((out / "rows").glob("*.json"))
    found = joined().first(lambda: [row for path in paths if (row := read_row(path)) is not None])
    same = [row for row in found if row["case"] | {"flow": "", "K": 0} == asdict(like) | {"flow": "", "K": 0}]
    return sorted(same, key=lambda row: (row["case"]["flow"] != "planar", row["case"]["K"]))


def gain(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> tuple[float, float]:
    """How much lower a row's F or nll is than another's on the same images, and the standard error of that."""
    drop = torch.tensor(base[f"{name}_each"], dtype=torch.float64) - torch.tensor(
        row[f"{name}_each"], dtype=torch.float64
    )
    return float(drop.mean()), float(drop.std()) / math.sqrt(len(drop))


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line for each row."""
    base = next((row for row in rows if row["case"]["K"] == 0), None)
    lines = []
    for row in rows:
        line = {"flow": row["case"]["flow"] if row["case"]["K"] else "none (diagonal)", "K": str(row["case"]["K"])}
        for name, title in (("F", "F"), ("KL", "KL(q, posterior)"), ("nll", "-log p")):
            line[title] = f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}"
        for name, title in (("F", "F below K = 0"), ("nll", "-log p below K = 0")):
            if base is None or row is base:
                line[title] = "-"
            else:
                line[title] = "{:.2f} ± {:.2f}".format(*gain(row, base, name))
        line["parameters"] = f"{row['num_parameters']:,}"
        line["updates/s"] = f"{row['updates_per_second']:.0f}"
        lines.append(line)
    return lines


def given_by(training: Training) -> str:
    """Where the layers' parameters come from, in words."""
    whence = f"given by {training.neck} hidden units" if training.neck else "linear in the encoder's units"
    return whence + (", but for their directions, which all images share" if training.shared_directions else "")


def seconds(rows: Sequence[Row]) -> float:
    """What all rows took, whenever they were made."""
    return sum(row["seconds"] + row["score_seconds"] for row in rows)


def result(row: Row) -> Row:
    """The row as results.json has it: without each image's values, and flat."""
    case = row["case"]
    long = ("case", "F_each", "nll_each", "history")
    return {"flow": case["flow"], "K": case["K"], **{k: v for k, v in row.items() if k not in long}}
