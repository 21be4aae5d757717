"""A flow, a VAE and a GAN on the same data: what each scores, how good its draws are, what it costs and can answer.

The data: a grid of 25 narrow Gaussians and two spirals, whose densities are known, and MNIST at 14 x 14 pixels in 32
grey levels, dequantized once (`experiments.digits`), so that a continuous flow has a proper density of it. All learn
from the same rows with about the same number of parameters; see `experiments.generators` for the four.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments import datasets, digits, generators, sample_quality
from experiments.gan import Training
from experiments.generators import Learnt
from experiments.parallel import Case, Row, run_cases
from experiments.report import Report, require_matplotlib
from experiments.sample_quality import Measured
from flowvi._version import __version__
from flowvi.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "A flow, a VAE and a GAN on the same data: log-likelihood, quality of draws, cost, and what each can answer"

MNIST = "mnist_14"
SETS = (datasets.GRID, "spirals", MNIST)
DATA = "data"
"""Fresh rows of the data in place of draws: what a perfect model would score."""
MODELS = (DATA, "flow", "vae", "vae_planar", "gan")
WORDS = {
    DATA: "(other rows of the data)",
    "flow": "flow",
    "vae": "VAE, diagonal",
    "vae_planar": "VAE, planar",
    "gan": "GAN",
}
ANSWERS = {
    DATA: ("-", "-", "-"),
    "flow": ("exact", "no: one z for each x", "by MCMC on log q"),
    "vae": ("bound, sampled", "yes, by the encoder", "by weights over z"),
    "vae_planar": ("bound, sampled", "yes, by the encoder", "by weights over z"),
    "gan": ("none", "none", "no"),
}
"""Density, posterior, missing data."""

TIMED = 1000
DRAWN = {2: 2000, digits.SIDE**2: 24}
"""How many draws of D numbers the picture shows."""


@dataclass(frozen=True)
class Settings:
    """How the ways learn one kind of data.

    Attributes:
        flow: a registered name.
        flow_options: of `flowvi.fit_density`.
        vae_options: of `flowvi.fit`.
        vae_latents: of the VAE.
        num_flows: K of the VAE's planar posterior.
        gan: how the GAN learns.
        gan_latents: of the GAN.
        num_samples: importance samples for each row's log p by the VAE.
    """

    flow: str
    flow_options: Mapping[str, Any]
    vae_options: Mapping[str, Any]
    vae_latents: int
    num_flows: int
    gan: Training
    gan_latents: int
    num_samples: int


PLANE = Settings(
    "neural_spline",
    {"num_flows": 4, "num_steps": 3000},
    {"num_steps": 7000, "lr": 2e-3, "batch_size": 256},
    vae_latents=2,
    num_flows=16,
    gan=Training(9000, batch_size=512, gamma=1e-4),
    gan_latents=2,
    num_samples=500,
)
IMAGES = Settings(
    "real_nvp",
    {"num_flows": 8, "num_steps": 2000, "batch_size": 256, "lr": 2e-3, "hidden_dims": (128, 128)},
    {"num_steps": 7000, "lr": 1e-3, "batch_size": 128},
    vae_latents=32,
    num_flows=16,
    gan=Training(4000, batch_size=128, gamma=1.0),
    gan_latents=32,
    num_samples=200,
)


@dataclass(frozen=True)
class Config:
    """Everything this experiment depends on.

    Attributes:
        seed: of everything random.
        sets: some of `SETS`.
        models: some of `MODELS`.
        num_train: rows to learn from of a set of the plane, and at most so many images.
        num_scored: test rows whose log-likelihood is taken.
        num_drawn: draws that are judged; MMD and the two-sample test take the first 2,000.
        short: a divisor of all numbers of steps.
    """

    seed: int = 0
    sets: tuple[str, ...] = SETS
    models: tuple[str, ...] = MODELS
    num_train: int = 50_000
    num_scored: int = 1000
    num_drawn: int = 5000
    short: int = 1

    def __post_init__(self) -> None:
        for name, given, known in (("sets", self.sets, SETS), ("models", self.models, MODELS)):
            if not given or not set(given) <= set(known):
                raise OptionError(f"{name} must be some of {', '.join(known)}, not {given!r}.")

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """Short fits, to see that it works: their scores are not the ones to quote."""
        return cls(seed, num_train=5000, num_scored=100, num_drawn=1000, short=60)


@dataclass(frozen=True)
class Subject:
    """One set: rows on the line or plane, and how draws are judged.

    Attributes:
        train, held, test, other: rows (N, D); `other` stands in for a perfect model's draws.
        plane: what is known of a set of the plane.
        classifier: of digits, for images.
        accuracy: the classifier's, on test images.
    """

    train: Tensor
    held: Tensor
    test: Tensor
    other: Tensor
    plane: datasets.Dataset | None = None
    classifier: digits.DigitClassifier | None = None
    accuracy: float = math.nan


def run(config: Config, out: Path, folder: Path | None = None, *, workers: int = 1, progress: bool = True) -> Report:
    """Learn and judge all, each row kept as it comes.

    Args:
        config: what to do.
        out: the folder whose rows.jsonl keeps the rows.
        folder: of MNIST; None downloads.
        workers: processes of one thread each.
        progress: whether a bar is shown.

    Raises:
        FlowVIError: the images are missing.
    """
    require_matplotlib()
    if MNIST in config.sets:
        digits.load_digits(folder, 1)  # missing files are told before any work
    common = {k: v for k, v in asdict(config).items() if k not in ("sets", "models")} | {"flowvi": __version__}
    cases = [
        {**common, "set": name, "model": model, "settings": repr(_settings(name))}
        for name in config.sets
        for model in config.models
    ]
    found = run_cases(
        partial(work, folder),
        cases[::-1],  # the longest first
        out / "rows.jsonl",
        workers=workers,
        description="flows_vs_vae_vs_gan",
        progress=progress,
    )[::-1]
    rows = [{k: v for k, v in row.items() if k != "draws"} for row in found]
    seconds = sum(row["case_seconds"] for row in rows)
    return Report(
        "flows_vs_vae_vs_gan", TITLE, config, rows, _table(rows), _notes(config, rows), draw(config, found), seconds
    )


def work(folder: Path | None, case: Case) -> Row:
    """One model on one set: learnt, scored and judged. Seconds are CPU time of one thread."""
    start = time.process_time()
    subject = _subject(case["set"], case["num_train"], case["seed"], case["short"], folder)
    begin = time.process_time()
    learnt = None if case["model"] == DATA else _learn(case, subject)
    seconds = time.process_time() - begin
    row: Row = {"set": case["set"], "model": case["model"], "num_parameters": None, "seconds": None,
                "seconds_per_1000": None, **dict.fromkeys(f"{n}{s}" for n in ("log_p", "elbo", "below_truth")
                                                         for s in ("", "_se"))}  # fmt: skip
    if learnt is None:
        draws = subject.other[: case["num_drawn"]]
    else:
        begin = time.process_time()
        learnt.sample(TIMED, case["seed"])
        row |= {"seconds": seconds, "seconds_per_1000": time.process_time() - begin}
        row |= {"num_parameters": learnt.num_parameters}
        draws = learnt.sample(case["num_drawn"], case["seed"] + 1)
        row |= _scores(case, subject, learnt)
    row |= _quality(case, subject, draws)
    shown = draws[: DRAWN[draws.shape[1]]]
    row["draws"] = (
        digits.from_line(shown).tolist()
        if subject.plane is None
        else [[round(v, 3) for v in p] for p in shown.tolist()]
    )
    return row | {"case_seconds": time.process_time() - start}


def _settings(name: str) -> Settings:
    return IMAGES if name == MNIST else PLANE


@functools.lru_cache(maxsize=2)
def _subject(name: str, num_train: int, seed: int, short: int, folder: Path | None) -> Subject:
    if name != MNIST:
        data = datasets.load(name, 20_000, 20_000, seed)
        train, held = data.train[:-2000][:num_train], data.train[-2000:]
        return Subject(train, held, data.test[:10_000], data.test[10_000:], plane=data)
    found = digits.load_digits(folder, num_train)
    classifier = digits.train_classifier(found.train, found.train_labels, max(1, 1500 // short), seed)
    accuracy = float((classifier.digits(found.test) == found.test_labels).double().mean())
    generator = torch.Generator().manual_seed(seed)
    mixed = found.test[torch.randperm(len(found.test), generator=generator)]  # the first ones differ from the others
    train, held, test = (digits.to_line(x, generator) for x in (found.train, found.held, mixed))
    return Subject(train, held[:2000], test, held[2000:], classifier=classifier, accuracy=accuracy)


def _learn(case: Case, subject: Subject) -> Learnt:
    settings, seed, short = _settings(case["set"]), case["seed"], case["short"]

    def shorter(options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, "num_steps": max(1, options["num_steps"] // short)}

    if case["model"] == "flow":
        options = shorter(settings.flow_options)
        return generators.learn_flow(subject.train, subject.held, flow=settings.flow, seed=seed, **options)
    budget = _budget(case["set"], subject.train.shape[1])
    if case["model"] == "gan":
        training = replace(settings.gan, num_steps=max(1, settings.gan.num_steps // short))
        return generators.learn_gan(
            subject.train, latent_dim=settings.gan_latents, budget=budget, training=training, seed=seed
        )
    return generators.learn_vae(
        subject.train,
        subject.held,
        latent_dim=settings.vae_latents,
        num_flows=settings.num_flows if case["model"] == "vae_planar" else 0,
        budget=budget,
        seed=seed,
        **shorter(settings.vae_options),
    )


def _budget(name: str, dim: int) -> int:
    """How many parameters the set's flow has."""
    settings = _settings(name)
    return generators.flow_parameters(settings.flow, dim, settings.flow_options)


def _scores(case: Case, subject: Subject, learnt: Learnt) -> Row:
    """Mean log-likelihood of test rows, and by how much it is below the truth where that is known."""
    if learnt.log_probs is None:
        return {}
    x = subject.test[: case["num_scored"]]
    found = learnt.log_probs(x, _settings(case["set"]).num_samples)
    shift = digits.log_slope(x.double()) if subject.plane is None else torch.zeros(len(x), dtype=torch.float64)
    row = _mean("log_p", found.values + shift)
    if found.bounds is not None:
        row |= _mean("elbo", found.bounds + shift)
    if subject.plane is not None and subject.plane.log_density is not None:
        row |= _mean("below_truth", subject.plane.log_density(x) - found.values)
    return row


def _quality(case: Case, subject: Subject, draws: Tensor) -> Row:
    """All measures of draws against as many test rows."""
    real, seed = subject.test[: len(draws)], case["seed"]
    row: Row = dict.fromkeys(
        ("modes", "good_share", "frechet", "frechet_se", "digits_off", "digits_off_se", "accuracy",
         "told_apart_features", "told_apart_features_se")
    )  # fmt: skip
    classifier = subject.classifier
    if classifier is None:
        some = draws[:2000], real[:2000]
        row |= _measured("mmd", sample_quality.mmd(*some, sample_quality.median_distance(real)))
        row |= _measured(
            "told_apart", sample_quality.two_sample_accuracy(*some, sample_quality.by_neighbours, seed=seed)
        )
        if subject.plane is not None and subject.plane.modes is not None:
            modes = sample_quality.modes_covered(draws, *subject.plane.modes)
            row |= {"modes": modes.covered, "good_share": modes.good_share}
        return row
    levels = digits.from_line(draws), digits.from_line(real)
    features = [classifier.features(x) for x in levels]
    told = sample_quality.two_sample_accuracy
    pixels, few = [x[:2000].float() for x in levels], [x[:2000] for x in features]
    row |= _measured("mmd", sample_quality.mmd(few[0], few[1], sample_quality.median_distance(features[1])))
    row |= _measured("told_apart", told(pixels[0], pixels[1], sample_quality.by_network, seed=seed))
    row |= _measured("told_apart_features", told(few[0], few[1], sample_quality.by_network, seed=seed))
    row |= _measured("frechet", sample_quality.in_blocks(sample_quality.frechet_distance, features[0], features[1]))
    drawn, real = (classifier.digits(x) for x in levels)
    row |= _measured("digits_off", sample_quality.in_blocks(_digits_off, drawn, real))
    return row | {"accuracy": subject.accuracy}


def _digits_off(drawn: Tensor, real: Tensor) -> float:
    return sample_quality.total_variation(drawn, real, 10)


def _mean(name: str, values: Tensor) -> Row:
    return _measured(name, Measured(float(values.mean()), float(values.std()) / math.sqrt(len(values))))


def _measured(name: str, found: Measured) -> Row:
    return {name: found.value, f"{name}_se": found.standard_error}


def _table(rows: Sequence[Row]) -> list[dict[str, str]]:
    def number(row: Row, name: str, digits: int, factor: float = 1.0) -> str:
        if row[name] is None:
            return "-"
        text = f"{factor * row[name]:.{digits}f}"
        return f"{text} ± {factor * row[f'{name}_se']:.{digits}f}" if f"{name}_se" in row else text

    table = []
    for row in rows:
        few = 1 if row["set"] == MNIST else 3
        exact = "log_p" if row["model"] == "flow" else "-"
        density, posterior, missing = ANSWERS[row["model"]]
        table.append(
            {
                "set": row["set"],
                "model": WORDS[row["model"]],
                "parameters": "-" if row["num_parameters"] is None else f"{row['num_parameters']:,}",
                "log p, exact": number(row, "log_p", few) if exact == "log_p" else "-",
                "log p, sampled": "-" if exact == "log_p" else number(row, "log_p", few),
                "ELBO": number(row, "elbo", few),
                "below the truth": number(row, "below_truth", few),
                "1000 MMD²": number(row, "mmd", 2, 1000),
                "told apart": number(row, "told_apart", 3),
                "modes of 25": "-" if row["modes"] is None else str(row["modes"]),
                "good draws": "-" if row["good_share"] is None else f"{row['good_share']:.1%}",
                "told apart, features": number(row, "told_apart_features", 3),
                "Fréchet": number(row, "frechet", 2),
                "digits off": number(row, "digits_off", 3),
                "seconds to learn": number(row, "seconds", 1),
                "per 1,000 draws": number(row, "seconds_per_1000", 4),
                "density": density,
                "posterior": posterior,
                "missing data": missing,
            }
        )
    return table


def _notes(config: Config, rows: Sequence[Row]) -> list[str]:
    notes = [
        "log p and ELBO: nats, mean over test rows that nothing has seen, ± one standard error; higher is better. The "
        f"VAE's log p is by {PLANE.num_samples} importance samples a row ({IMAGES.num_samples} for images) and is "
        "itself a lower bound in expectation. Below the truth: the true density's log minus it, on the same rows.",
        "MMD²: unbiased, Gaussian kernel with the median distance of the data as its bandwidth; 0 is perfect, and "
        "chance may take it below 0. With that bandwidth it sees no fine shape in the plane.",
        "Told apart: the accuracy on unseen rows of a classifier of draws against data, 5 folds; .5 is perfect, 1 "
        "worst. The classifier is a vote of 25 neighbours in the plane, a small network for images. The first line of "
        "each set judges other rows of the data in place of draws: what is reachable.",
        "Modes: a draw is good within 3 standard deviations of a mode (98.9% of the data are); a mode is covered by at "
        "least a quarter of its share in good draws.",
        f"All learn from the same rows: {min(config.num_train, 18_000):,} of a set of the plane. Parameters count all "
        "that is learnt, the encoder and the discriminator too; widths are chosen to come near the flow's number.",
        "Seconds: CPU time of one thread.",
        "Settings are one set of choices for the plane and one for images. The GAN's for the plane were chosen in nine "
        "short trials on the grid; all others are first choices: a search would move every line.",
    ]
    accuracy = next((row["accuracy"] for row in rows if row["accuracy"] is not None), None)
    if accuracy is not None:
        notes.append(
            f"{MNIST}: MNIST as 14 x 14 means of 2 x 2 pixels in 32 grey levels, plus uniform noise drawn once, by a "
            f"logit on the whole line; not Larochelle's binarized images, of which a continuous flow has no density. "
            f"log p is that of levels plus noise, a lower bound of the discrete image's. Draws are rounded down to "
            f"levels before they are judged. Features, for MMD², Fréchet and the digits: the last layer of a "
            f"classifier trained on the same images, {accuracy:.1%} right on test images. Digits off: total variation "
            f"distance of the histograms of its digits. The VAE's draws are from p(x | z), not its mean."
        )
    if config.short != 1:
        notes.insert(0, f"Short fits, 1 / {config.short} of the steps: these are not the figures to quote.")
    return notes


def draw(config: Config, rows: Sequence[Row]) -> Figure:
    """Draws side by side: a row of panels for each set, a column for each model."""
    from matplotlib.figure import Figure

    size = len(config.sets), len(config.models)
    figure = Figure(figsize=(2.3 * size[1], 2.3 * size[0] + 0.3), layout="constrained")
    grid = figure.subplots(*size, squeeze=False)
    for axes, row in zip(grid.flat, rows, strict=True):
        shown = torch.tensor(row["draws"])
        axes.set(xticks=[], yticks=[], aspect="equal")
        if row["set"] == MNIST:
            tiles = shown.reshape(-1, 6, digits.SIDE, digits.SIDE).transpose(1, 2).flatten(0, 1).flatten(1)
            axes.imshow(tiles, cmap="gray", vmin=0, vmax=digits.LEVELS - 1)
        else:
            axes.plot(shown[:, 0], shown[:, 1], ".", markersize=1, alpha=0.5, color="black")
            axes.set(xlim=(-6, 6), ylim=(-6, 6))
    for axes, model in zip(grid[0], config.models, strict=True):
        axes.set_title(WORDS[model], fontsize="small")
    for axes, name in zip(grid[:, 0], config.sets, strict=True):
        axes.set_ylabel(name, fontsize="small")
    return figure
