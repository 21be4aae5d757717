"""How many layers does one need? The error of each family of flows against its length K, and against seconds.

Every fit is `flowvi.fit` with its defaults but for the number of steps, which is the same for all, and
compile=False, so that no fit waits for a compiler. The error is KL(q || p) = log Z - ELBO, from fresh draws.
log Z is known for the energies and the conjugate posteriors; for a reference posterior it is estimated by
importance sampling from the fits that serve best (`experiments.flow_length_report`).
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
import warnings
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import flowvi
from experiments import flow_length_report as words
from experiments.datasets import worst_mode
from experiments.parallel import Case, Row, run_cases
from experiments.posteriors import Known, posteriors
from experiments.report import Report, require_matplotlib
from flowvi._version import __version__
from flowvi.energies import ENERGIES, RingOfGaussians
from flowvi.errors import FlowVIError, NumericalWarning, OptionError

TITLE = "How many layers: the error of six families of flows against K and against seconds"

OPTIONS: dict[str, dict[str, Any]] = {"nice": {"start": 1.0}}
"""What is not a flow's default: from the identity, NICE stays at the best Gaussian of a symmetric target."""

WITH_REFERENCES = ("eight_schools_noncentered", "logmesquite_logvash")
WITHOUT_REFERENCES = ("linear regression", "gamma-Poisson")


@dataclass(frozen=True)
class Config:
    """Everything the experiment depends on, but for the folder of references and the number of workers."""

    seed: int = 0
    seeds: int = 5
    """How many seeds, from `seed` on."""
    energies: tuple[str, ...] = ("U1", "U2", "U3", "U4", "Funnel", "RingOfGaussians")
    posteriors: tuple[str, ...] = WITHOUT_REFERENCES
    flows: tuple[str, ...] = ("planar", "radial")
    num_flows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    deep_flows: tuple[str, ...] = ("nice", "real_nvp", "iaf", "neural_spline")
    """Flows whose layers hold networks."""
    deep_num_flows: tuple[int, ...] = (1, 2, 4, 8)
    num_steps: int = 1500
    """Steps of each fit: half of flowvi's default after whitening, so that all of it takes about half an hour."""
    num_draws: int = 25_000
    enough: float = 0.02
    """The KL, in nats, that the conclusion calls enough: one mean off by .2 standard deviations has this much."""

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """A few short fits, to see that it works: their KLs are not the ones to quote."""
        few = cls(seed, 1, ("U1", "Funnel"), WITHOUT_REFERENCES[:1], num_flows=(2, 8), deep_num_flows=(2,))
        return dataclasses.replace(few, num_steps=100, num_draws=5000)

    def changed(self, seeds: int | None, num_steps: int | None, references: bool) -> Config:
        """With other seeds and steps, where given, and the reference posteriors in place of the conjugate ones."""
        return dataclasses.replace(
            self,
            seeds=seeds or self.seeds,
            num_steps=num_steps or self.num_steps,
            posteriors=WITH_REFERENCES[: len(self.posteriors)] if references else self.posteriors,
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of all targets."""
        return self.energies + self.posteriors

    @property
    def lengths(self) -> list[tuple[str, int]]:
        """Every flow with every K of its."""
        return [*product(self.flows, self.num_flows), *product(self.deep_flows, self.deep_num_flows)]

    def cases(self) -> list[Case]:
        """Every fit; seed by seed, so that a part of them is a picture already; shuffled, for an honest ETA."""
        cases: list[Case] = []
        settings = {"num_steps": self.num_steps, "num_draws": self.num_draws, "flowvi": __version__}
        for seed in range(self.seed, self.seed + self.seeds):
            fits = list(product(self.targets, self.lengths))
            random.Random(seed).shuffle(fits)
            cases += [{"target": target, "flow": flow, "K": k, "seed": seed, **settings} for target, (flow, k) in fits]
        return cases


def run(config: Config, out: Path, references: Path | None = None, workers: int = 1, progress: bool = True) -> Report:
    """Fit what the rows in `out` lack, and report on all.

    Args:
        config: what to fit.
        out: the folder whose rows.jsonl keeps each row as it comes; more seeds, targets or lengths go on with it.
        references: the folder of the reference posteriors, where `config` names some.
        workers: processes, of one thread each.
        progress: whether a bar is shown.

    Raises:
        OptionError: a target that there isn't, no references in the folder, or no workers.
    """
    require_matplotlib()
    for name in config.targets:
        find_target(name, references)  # a wrong name or folder is told now, not by a worker
    work, path = partial(fit_one, references=references), out / "rows.jsonl"
    rows = run_cases(work, config.cases(), path, workers=workers, description="flow_length", progress=progress)
    log_z = words.log_normalizers(rows)
    rows = [words.with_kl(row, *log_z[row["target"]]) for row in rows]
    cells = words.summarize(rows)
    notes = [*words.conclude(config, cells), *words.modes(config, rows), *words.notes(config, rows, log_z)]
    table, figure = words.table(config, cells, rows), words.draw(config, cells)
    return Report("flow_length", TITLE, config, rows, table, notes, figure, sum(row["seconds"] for row in rows))


# One fit --------------------------------------------------------------------------------------------------


def find_target(name: str, references: Path | None) -> flowvi.energies.Energy | Known:
    """An energy or a posterior by its name.

    Raises:
        OptionError: there is none of this name.
    """
    if name in ENERGIES:
        return ENERGIES[name]()
    known = _posteriors(references)
    if name not in known:
        raise OptionError(f"no target named {name!r}: {', '.join([*ENERGIES, *known])}.")
    return known[name]


@cache
def _posteriors(references: Path | None) -> dict[str, Known]:
    return {known.name: known for known in posteriors(references)}


@cache
def _warm_up(name: str, flow: str, references: Path | None) -> None:
    """One step, not timed: each process loads or compiles its kernels once."""
    target = find_target(name, references)
    what = (target.model, (target.data,)) if isinstance(target, Known) else (target, ())
    flowvi.fit(
        *what, flow=flow, num_flows=1, num_steps=1, seed=0, whiten=False, compile=False, progress=False, verify=False
    )


def fit_one(case: Case, references: Path | None = None) -> Row:
    """One fit, measured; one that fails has its error in its row, and no ELBO."""
    target = find_target(case["target"], references)
    known = target if isinstance(target, Known) else None
    row: Row = {
        **case,
        "elbo": math.nan,
        "elbo_se": math.nan,
        "log_normalizer": target.log_evidence if isinstance(target, Known) else target.log_normalizer,
        **dict.fromkeys(("log_z_estimate", "log_z_estimate_se", "khat", "ess_fraction"), math.nan),
        **dict.fromkeys(("worst_mean_error", "worst_sd_error", "dim", "num_parameters", "lr", "gradient")),
        "skipped_steps": None,
        "worst_mode": None,
        "seconds_of_steps": math.nan,
        "error": None,
    }
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)  # skipped steps have their own column
            _warm_up(case["target"], case["flow"], references)
            start = time.perf_counter()
            posterior = flowvi.fit(
                target if known is None else known.model,
                () if known is None else (known.data,),
                flow=case["flow"],
                num_flows=case["K"],
                num_steps=case["num_steps"],
                seed=case["seed"],
                compile=False,
                progress=False,
                verify=False,  # measured below, from more draws
                **OPTIONS.get(case["flow"], {}),
            )
        row["seconds"] = time.perf_counter() - start
        if posterior.config["stopped"] == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
            raise KeyboardInterrupt
        found = posterior.diagnose(case["num_draws"], hmc=False)  # numbers, not a verdict
        if known is not None:
            errors = known.errors(posterior.sample(min(10_000, case["num_draws"]), seed=case["seed"]))
            row["worst_mean_error"], row["worst_sd_error"] = errors
        if isinstance(target, RingOfGaussians):
            z = posterior.sample(case["num_draws"], seed=case["seed"])["z"]
            row["worst_mode"] = worst_mode(z, target.centres(), target.scale)
    except FlowVIError as error:  # one bad fit is a result; it must not end the run
        return row | {"seconds": time.perf_counter() - start, "error": str(error)}
    return row | {
        "elbo": found.elbo,
        "elbo_se": found.elbo_se,
        "log_z_estimate": found.log_evidence,
        "log_z_estimate_se": found.log_evidence_se,
        "khat": found.khat,
        "ess_fraction": found.ess_fraction,
        "dim": posterior.density.dim,
        "skipped_steps": posterior.history.skipped_steps,
        "seconds_of_steps": posterior.timing["steps"],
        **{key: posterior.config[key] for key in ("num_parameters", "lr", "gradient")},
    }
