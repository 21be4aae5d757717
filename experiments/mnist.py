"""Figure 4 and table 2 of Rezende & Mohamed 2015: the deep latent Gaussian model on MNIST, flows of several lengths.

F is the negative ELBO, -log p is by importance sampling from the guide, and KL(q || posterior) is their difference, all
of the same samples. Absolute values move by nats with the binarization, so what compares is how much they fall with K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import dlgm_runs
from experiments.dlgm_runs import CONFIGS, Case, Row
from experiments.images import Images, dynamic_mnist, static_mnist
from experiments.report import Report, require_matplotlib
from flowvi.errors import FlowVIError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "MNIST by a deep latent Gaussian model: F, KL(q, posterior) and -log p against the length of the flow"

LENGTHS = (0, 10, 20, 40, 80)
PAPER: dict[str, dict[str, dict[int, float]]] = {
    "planar": {
        "F": {0: 96.76, 10: 93.57, 20: 91.96, 40: 90.62, 80: 89.58},
        "KL": {0: 6.83, 10: 6.03, 20: 5.42, 40: 4.86, 80: 4.43},
        "nll": {0: 89.92, 10: 87.53, 20: 86.53, 40: 85.76, 80: 85.15},
    },
    "nice": {
        "F": {10: 94.87, 20: 93.93, 40: 93.02, 80: 92.83},
        "nll": {10: 88.62, 20: 87.92, 40: 87.32, 80: 87.26},
    },
}
"""Read off the paper's figure 4, to about .03 nats."""

REPRODUCTIONS = {
    "another's, static binarization, annealed": {
        "F": {0: 98.14, 10: 93.48, 20: 92.28, 40: 91.34, 80: 90.86},
        "nll": {0: 92.58, 10: 88.95, 20: 88.09, 40: 87.45, 80: 87.09},
    },
    "another's, static binarization, not annealed": {
        "F": {0: 97.45, 10: 94.26, 20: 92.45, 40: 91.45, 80: 90.80},
        "nll": {0: 91.94, 10: 89.43, 20: 88.15, 40: 87.45, 80: 87.06},
    },
    "another's, dynamic binarization": {
        "F": {0: 96.99, 10: 93.97, 20: 93.02, 40: 92.47, 80: 92.21},
        "nll": {0: 92.39, 10: 89.95, 20: 89.32, 40: 88.92, 80: 88.74},
    },
}
"""Planar, by others: F and -log p."""

PANELS = (("F", "F = -ELBO"), ("KL", "KL(q, posterior)"), ("nll", "-log p"))


@dataclass(frozen=True)
class Config:
    """The run.

    Attributes:
        seed: of everything random.
        config: "paper" or "tuned"; see `dlgm_runs.CONFIGS`.
        updates: in place of the configuration's.
        batch_size: images of a step.
        lengths: of planar flows, to run now.
        nice: of NICE flows, to run now.
        binarization: "static" or "dynamic".
        num_test: test images that are scored.
        num_samples: importance samples of each.
        hidden: maxout units.
        latent_dim: latents.
    """

    seed: int = 0
    config: str = "tuned"
    updates: int | None = None
    batch_size: int = 100
    lengths: tuple[int, ...] = LENGTHS
    nice: tuple[int, ...] = ()
    binarization: str = "static"
    num_test: int = 1000
    num_samples: int = 200
    hidden: int = 400
    latent_dim: int = 40

    def __post_init__(self) -> None:
        if self.config not in CONFIGS:
            raise OptionError(f"config must be one of {sorted(CONFIGS)}, not {self.config!r}.")
        if self.binarization not in ("static", "dynamic"):
            raise OptionError(f"binarization must be 'static' or 'dynamic', not {self.binarization!r}.")
        if any(k < 0 for k in self.lengths) or any(k < 1 for k in self.nice):
            raise OptionError("a flow's length must be 0 or more, and that of NICE 1 or more.")

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short and small, to see that it works."""
        return cls(seed=seed, updates=200, lengths=(0, 10), num_test=100, num_samples=20, hidden=50, latent_dim=10)

    def case(self, images: Images, flow: str, length: int) -> Case:
        """A row's."""
        chosen = CONFIGS[self.config]
        training = replace(chosen, updates=self.updates or chosen.updates, batch_size=self.batch_size)
        return Case(
            data=images.words,
            flow=flow,
            K=length,
            training=training,
            likelihood="bernoulli",
            data_dim=images.test.shape[1],
            latent_dim=self.latent_dim,
            hidden=self.hidden,
            window=4,
            num_test=self.num_test,
            num_samples=self.num_samples,
            seed=self.seed,
        )


def load(config: Config, folder: Path | None) -> Images:
    """The images of the configuration."""
    return static_mnist(folder) if config.binarization == "static" else dynamic_mnist(folder, config.seed)


def run(
    config: Config,
    out: Path,
    folder: Path | None = None,
    *,
    resume: bool = False,
    progress: bool | None = None,
    images: Callable[[Config, Path | None], Images] = load,
) -> Report:
    """Fit what is asked for, and report all rows in the folder that go with it.

    Args:
        config: what to run.
        out: where rows and checkpoints are.
        folder: of the data; None downloads.
        resume: whether rows that are there are taken, and fits gone on with.
        progress: whether a bar is shown.
        images: the data.
    """
    require_matplotlib()
    data = dlgm_runs.on_each(lambda: images(config, folder))
    for flow, lengths in (("planar", config.lengths), ("nice", config.nice)):
        for length in lengths:
            dlgm_runs.run_case(config.case(data, flow, length), data, out, resume=resume, progress=progress)
    like = config.case(data, "planar", 0)
    rows = dlgm_runs.all_rows(out, like)
    if not rows:
        raise FlowVIError(f"there are no rows in {out} yet: say by --num-flows which lengths to run.")
    lines = dlgm_runs.table(rows) + (_others() if config.latent_dim == 40 else [])
    return Report(
        "mnist",
        TITLE,
        config,
        [dlgm_runs.result(row) for row in rows],
        lines,
        _notes(like),
        draw(rows),
        dlgm_runs.seconds(rows),
    )


def _others() -> list[dict[str, str]]:
    """The lines of the paper and of those who made it again."""
    lines = []
    named = {"paper (read off figure 4), planar": PAPER["planar"], "paper, NICE": PAPER["nice"], **REPRODUCTIONS}
    for words, values in named.items():
        flow_base = values["F"].get(0, PAPER["planar"]["F"][0]), values["nll"].get(0, PAPER["planar"]["nll"][0])
        for length, bound in values["F"].items():
            kl = values["KL"][length] if "KL" in values else bound - values["nll"][length]
            lines.append(
                {
                    "flow": words,
                    "K": str(length),
                    "F": f"{bound:.2f}",
                    "KL(q, posterior)": f"{kl:.2f}",
                    "-log p": f"{values['nll'][length]:.2f}",
                    "F below K = 0": f"{flow_base[0] - bound:.2f}" if length else "-",
                    "-log p below K = 0": f"{flow_base[1] - values['nll'][length]:.2f}" if length else "-",
                    "parameters": "-",
                    "updates/s": "-",
                }
            )
    return lines


def _notes(like: Case) -> list[str]:
    training = like.training
    how = "path gradient" if training.path else "standard gradient"
    return [
        f"{like.data}. Never compare absolute values across binarizations.",
        f"{like.latent_dim} latents, {like.hidden} maxout units with window {like.window} in the generative network "
        f"and in the encoder; the layers' parameters are {dlgm_runs.given_by(training)}.",
        f"{training.updates:,} updates with batches of {training.batch_size}, {training.optimizer} {training.lr:g} "
        f"({training.lr_schedule}), {how}, {'annealed by eq. 20' if training.anneal else 'not annealed'}; the same for "
        f"every K. The parameters with the best ELBO on held-out images are kept.",
        f"F = -ELBO, and -log p by {like.num_samples} importance samples, on {like.num_test:,} shuffled test images; "
        f"nats, ± one standard error over the images. Differences to K = 0 are on the same images.",
        "The paper: 500,000 updates of RMSprop; its table 2 has -log p <= 89.9 (diagonal), 85.1 (planar, K = 80) and "
        "87.2 (NICE, K = 80). The figures of others are from public reproductions, 5,000 importance samples (static) "
        "and 200 (dynamic).",
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """Three panels against K: ours with error bars, the paper's dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for flow, colour in (("planar", "tab:blue"), ("nice", "tab:orange")):
            mine = [row for row in rows if row["case"]["flow"] == flow]
            if mine:
                lengths: list[Any] = [row["case"]["K"] for row in mine]
                errors = [row[f"{name}_se"] for row in mine]
                axes.errorbar(
                    lengths, [row[name] for row in mine], errors, fmt="o-", color=colour, capsize=3, label=f"{flow}"
                )
            theirs = PAPER[flow].get(name)
            if theirs:
                axes.plot(*zip(*theirs.items(), strict=True), "s--", color=colour, alpha=0.5, label=f"{flow}, paper")
        axes.set(xlabel="K", ylabel="nats", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure
