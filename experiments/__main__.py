"""The command line: `python -m experiments list | fig1 | fig3 | density | speed | truth | large | verdict | ...`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from experiments import (
    calibration,
    cifar,
    density,
    dlgm_runs,
    fig1,
    fig3,
    flow_length,
    flows_vs_vae_vs_gan,
    gallery,
    large,
    mnist,
    speed,
    truth,
    verdict,
)
from experiments.report import INSTALL, Report
from flowvi.errors import FlowVIError

try:
    import typer
except ImportError:
    sys.exit(f"the experiments' command line needs typer, which is missing: {INSTALL}")

app = typer.Typer(
    help="The figures of Rezende & Mohamed 2015, made again. Each writes results.json, table.md and a PNG.",
    no_args_is_help=True,
    add_completion=False,
)

Quick = Annotated[bool, typer.Option("--quick", help="Coarse and short, to see that it works.")]
Seed = Annotated[int, typer.Option(help="The seed of everything random.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The folder to write to, made where missing.",
        show_default="experiments/results/NAME, or results/quick/NAME",
    ),
]

MAKES = {
    "fig1": fig1.TITLE,
    "fig3": fig3.TITLE,
    "density": density.TITLE,
    "speed": speed.TITLE,
    "flow_length": flow_length.TITLE,
    "mnist": mnist.TITLE,
    "cifar": cifar.TITLE,
    "flows_vs_vae_vs_gan": flows_vs_vae_vs_gan.TITLE,
    "truth": truth.TITLE,
    "large": large.TITLE,
    "verdict": verdict.TITLE,
    "calibration": calibration.TITLE,
    "gallery": gallery.TITLE,
}


SHARED = ("mnist", "cifar")
"""Whose minibatches are split over the ranks of torchrun."""


@app.callback()
def one_process(context: typer.Context) -> None:
    """The figures of Rezende & Mohamed 2015, made again. Each writes results.json, table.md and a PNG."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in SHARED:
        # each rank would run everything and write over the others
        typer.echo(
            f"error: {context.invoked_subcommand} runs in one process; --workers gives some experiments more. "
            f"torchrun is for {' and '.join(SHARED)}.",
            err=True,
        )
        raise typer.Exit(2)


@app.command("list")
def list_experiments() -> None:
    """Show each experiment and what it makes."""
    for name, title in MAKES.items():
        typer.echo(f"{name}  {title}")


@app.command("fig1", help=fig1.TITLE)
def run_fig1(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:  # noqa: D103 (its help is above)
    config = fig1.Config.quick(seed) if quick else fig1.Config(seed=seed)
    _finish(lambda: fig1.run(config), out, quick)


@app.command("fig3", help=fig3.TITLE)
def run_fig3(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    out: Out = None,
) -> None:
    config = fig3.Config.quick(seed, seeds) if quick else fig3.Config(seed=seed, seeds=seeds)
    _finish(lambda: fig3.run(config), out, quick)


@app.command("density", help=density.TITLE)
def run_density(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    flow: Annotated[list[str] | None, typer.Option(help="A flow to fit; once for each.", show_default="all")] = None,
    out: Out = None,
) -> None:
    config = density.Config.quick(seed) if quick else density.Config(seed=seed)
    config = dataclasses.replace(config, flows=tuple(flow) if flow else None)
    _finish(lambda: density.run(config), out, quick)


@app.command("speed", help=speed.TITLE)
def run_speed(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="By CPU time, on one core: for a busy machine.")] = False,
    out: Out = None,
) -> None:
    if quick:
        config = speed.Config.quick(seed, cpu_time)
    else:
        config = speed.Config(seed, threads=("one",), cpu_time=True) if cpu_time else speed.Config(seed)
    _finish(lambda: speed.run(config), out, quick)


@app.command("truth", help=truth.TITLE)
def run_truth(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    references: Annotated[
        Path | None,
        typer.Option(help="The folder of reference posteriors.", show_default="four posteriors with exact answers"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="One of them, again for more: " + "; ".join(truth.METHODS) + ".", show_default="all"),
    ] = None,
    out: Out = None,
) -> None:
    name = None if references is None else references.name
    config = truth.Config.quick(seed, seeds, name) if quick else truth.Config(seed, seeds, name)
    if method:
        config = dataclasses.replace(config, methods=tuple(method))
    folder = _folder("truth", out, quick)
    _finish(lambda: truth.run(config, folder, references), folder, quick)


@app.command("large", help=large.TITLE)
def run_large(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(large.MODELS)}; again for more.", show_default="all"),
    ] = None,
    make_references: Annotated[
        bool, typer.Option("--make-references", help="Only run long NUTS anew (needs NumPyro), for minutes.")
    ] = False,
    out: Out = None,
) -> None:
    if make_references:
        try:
            typer.echo(f"wrote {large.make_references()}")
        except FlowVIError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        return
    config = large.Config.quick(seed) if quick else large.Config(seed)
    if model:
        config = dataclasses.replace(config, models=tuple(model))
    folder = _folder("large", out, quick)
    _finish(lambda: large.run(config, folder), folder, quick)


@app.command("verdict", help=verdict.TITLE)
def run_verdict(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    num_targets: Annotated[
        int | None, typer.Option(min=1, help="How many, beside 20 needles.", show_default="220")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds of each fit with nothing set.", show_default="flowvi's")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    out: Out = None,
) -> None:
    config = verdict.Config.quick(seed, workers) if quick else verdict.Config(seed=seed, workers=workers)
    config = dataclasses.replace(config, time_limit=time_limit, num_targets=num_targets or config.num_targets)
    folder = _folder("verdict", out, quick)
    _finish(lambda: verdict.run(config, folder), folder, quick)


@app.command("mnist", help=mnist.TITLE)
def run_mnist(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    data_dir: Annotated[Path | None, typer.Option(help="The folder of the data.", show_default="download")] = None,
    config: Annotated[str, typer.Option(help="How to learn: 'tuned', or 'paper'.")] = "tuned",
    updates: Annotated[
        int | None, typer.Option(min=1, help="Of each fit.", show_default="128,000 (tuned), 500,000 (paper)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step; ranks share them.")] = 100,
    num_flows: Annotated[
        list[int] | None, typer.Option(help="A length K, again for more.", show_default="0, 10, 20, 40, 80")
    ] = None,
    nice: Annotated[bool, typer.Option("--nice", help="NICE flows of these lengths in place of planar ones.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Binarize anew at every use, not once.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Take rows that are there, go on with fits.")] = False,
    out: Out = None,
) -> None:
    chosen = mnist.Config.quick(seed) if quick else mnist.Config(seed=seed)
    lengths = tuple(num_flows) if num_flows else chosen.lengths
    folder = _folder("mnist", out, quick)

    def work() -> Report:
        changed = dataclasses.replace(
            chosen,
            config=config,
            updates=updates or chosen.updates,
            batch_size=batch_size,
            lengths=() if nice else lengths,
            nice=tuple(k for k in lengths if k) if nice else (),
            binarization="dynamic" if dynamic else "static",
        )
        return mnist.run(changed, folder, data_dir, resume=resume)

    _finish(work, folder, quick)


@app.command("cifar", help=cifar.TITLE)
def run_cifar(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    data_dir: Annotated[Path | None, typer.Option(help="The folder of the data.", show_default="download")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help="Of each fit.", show_default="128,000")] = None,
    num_flows: Annotated[
        list[int] | None, typer.Option(help="A length K, again for more.", show_default="0, 2, 5, 10")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take rows that are there, go on with fits.")] = False,
    out: Out = None,
) -> None:
    chosen = cifar.Config.quick(seed) if quick else cifar.Config(seed=seed)
    folder = _folder("cifar", out, quick)

    def work() -> Report:
        lengths = tuple(num_flows) if num_flows else chosen.lengths
        changed = dataclasses.replace(chosen, updates=updates or chosen.updates, lengths=lengths)
        return cifar.run(changed, folder, data_dir, resume=resume)

    _finish(work, folder, quick)


@app.command("flows_vs_vae_vs_gan", help=flows_vs_vae_vs_gan.TITLE)
def run_flows_vs_vae_vs_gan(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    data_dir: Annotated[Path | None, typer.Option(help="The folder of the data.", show_default="download")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
    out: Out = None,
) -> None:
    config = flows_vs_vae_vs_gan.Config.quick(seed) if quick else flows_vs_vae_vs_gan.Config(seed=seed)
    folder = _folder("flows_vs_vae_vs_gan", out, quick)
    _finish(lambda: flows_vs_vae_vs_gan.run(config, folder, data_dir, workers=workers), folder, quick)


@app.command("flow_length", help=flow_length.TITLE)
def run_flow_length(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, from --seed on [5; quick: 1].")] = None,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Steps of each fit [1500; quick: 100].")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    references: Annotated[
        Path | None,
        typer.Option(help="The folder of reference posteriors.", show_default="two with exact answers"),
    ] = None,
    out: Out = None,
) -> None:
    config = flow_length.Config.quick(seed) if quick else flow_length.Config(seed=seed)
    config = config.changed(seeds, num_steps, references is not None)
    folder = _folder("flow_length", out, quick)
    _finish(lambda: flow_length.run(config, folder, references, workers), folder, quick)


@app.command("calibration", help=calibration.TITLE)
def run_calibration(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:  # noqa: D103 (its help is above)
    config = calibration.Config.quick(seed) if quick else calibration.Config(seed=seed)
    _finish(lambda: calibration.run(config), out, quick)


@app.command("gallery", help=gallery.TITLE)
def run_gallery(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:  # noqa: D103 (its help is above)
    config = gallery.Config.quick(seed) if quick else gallery.Config(seed=seed)
    for path in gallery.run(config, _folder("gallery", out, quick)):
        typer.echo(f"wrote {path}")


def _folder(name: str, out: Path | None, quick: bool) -> Path:
    """Where results go. Quick ones have a place of their own: they never replace those to quote."""
    return out or Path("experiments", "results", *(["quick"] if quick else []), name)


def _finish(run: Callable[[], Report], out: Path | None, quick: bool) -> None:
    """Run, write, and say where; an error of flowvi's is a message here, not a traceback."""
    try:
        report = run()
    except FlowVIError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if not dlgm_runs.joined().is_first:
        return
    paths = report.write(_folder(report.name, out, quick))
    typer.echo(paths[1].read_text(encoding="utf-8"))
    for path in paths:
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app(prog_name="python -m experiments")
