"""Table 3 of Rezende & Mohamed 2015: patches of CIFAR-10 by a deep latent Gaussian model with flows of several lengths.

3 x 8 x 8 patches, 30 latents, the logit-normal likelihood; what is reported are densities of pixels in (0, 1), so F and
-log p are negative. The paper's figures are for the whole set; what is at hand may be a part of it, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import dlgm_runs
from experiments.dlgm_runs import TUNED, Case, Row
from experiments.images import Images, cifar_patches
from experiments.report import Report, require_matplotlib
from flowvi.errors import FlowVIError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "CIFAR-10 patches by a deep latent Gaussian model: -log p against the length of the flow"

PAPER = {0: -293.7, 2: -308.6, 5: -317.9, 10: -320.7}
"""-log p of the paper's table 3, as it is remembered and not checked against a second source."""


@dataclass(frozen=True)
class Config:
    """The run.

    Attributes:
        seed: of everything random.
        updates: in place of `dlgm_runs.TUNED`'s.
        lengths: of planar flows, to run now.
        num_patches: to learn from.
        num_test: test patches that are scored.
        num_samples: importance samples of each.
        hidden: maxout units.
        latent_dim: latents.
    """

    seed: int = 0
    updates: int | None = None
    lengths: tuple[int, ...] = (0, 2, 5, 10)
    num_patches: int = 50_000
    num_test: int = 1000
    num_samples: int = 200
    hidden: int = 400
    latent_dim: int = 30

    def __post_init__(self) -> None:
        if any(k < 0 for k in self.lengths):
            raise OptionError("a flow's length must be 0 or more.")

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short and small, to see that it works."""
        return cls(seed, 200, (0, 2), num_patches=2000, num_test=100, num_samples=20, hidden=50)

    def case(self, images: Images, length: int) -> Case:
        """A row's."""
        training = replace(TUNED, updates=self.updates or TUNED.updates)
        return Case(
            data=images.words,
            flow="planar",
            K=length,
            training=training,
            likelihood="logit_normal",
            data_dim=images.test.shape[1],
            latent_dim=self.latent_dim,
            hidden=self.hidden,
            window=4,
            num_test=self.num_test,
            num_samples=self.num_samples,
            seed=self.seed,
        )


def load(config: Config, folder: Path | None) -> Images:
    """The patches of the configuration."""
    return cifar_patches(folder, config.num_patches, config.seed)


def run(
    config: Config,
    out: Path,
    folder: Path | None = None,
    *,
    resume: bool = False,
    progress: bool | None = None,
    images: Callable[[Config, Path | None], Images] = load,
) -> Report:
    """Fit what is asked for, and report all rows in the folder that go with it; the arguments are those of `mnist.run`.

    Raises:
        FlowVIError: the data is missing, or there is no row yet.
    """
    require_matplotlib()
    data = dlgm_runs.on_each(lambda: images(config, folder))
    for length in config.lengths:
        dlgm_runs.run_case(config.case(data, length), data, out, resume=resume, progress=progress)
    like = config.case(data, 0)
    rows = dlgm_runs.all_rows(out, like)
    if not rows:
        raise FlowVIError(f"there are no rows in {out} yet: say by --num-flows which lengths to run.")
    training = like.training
    lines = [
        line | {"paper's -log p": f"{PAPER[row['case']['K']]:.1f}" if row["case"]["K"] in PAPER else "-"}
        for line, row in zip(dlgm_runs.table(rows), rows, strict=True)
    ]
    notes = [
        f"{like.data}; other images give the test patches. Pixels are (v + u) / 256 with u uniform on (0, 1).",
        f"{like.latent_dim} latents, {like.hidden} maxout units with window 4, logit-normal likelihood; "
        f"the layers' parameters are {dlgm_runs.given_by(training)}; "
        f"{training.updates:,} updates with batches of {training.batch_size}, {training.optimizer} {training.lr:g} "
        f"({training.lr_schedule}), the same for every K.",
        f"F = -ELBO, and -log p by {like.num_samples} importance samples, on {like.num_test:,} patches: of the density "
        f"of the pixels on (0, 1), nats, ± one standard error over the patches. Lower is better. Differences to K = 0 "
        f"are on the same patches.",
        "The paper's column is from memory, for the whole of CIFAR-10 and its own treatment of pixels, which it "
        "doesn't give in full: only how much it falls with K compares.",
    ]
    results = [dlgm_runs.result(row) for row in rows]
    return Report("cifar", TITLE, config, results, lines, notes, draw(rows), dlgm_runs.seconds(rows))


def draw(rows: Sequence[Row]) -> Figure:
    """F and -log p against K, each with error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, title in (("F", "F = -ELBO"), ("nll", "-log p")):
        values, errors = [row[name] for row in rows], [row[f"{name}_se"] for row in rows]
        axes.errorbar([row["case"]["K"] for row in rows], values, errors, fmt="o-", capsize=3, label=title)
    axes.set(xlabel="K", ylabel="nats", title="planar flows")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
