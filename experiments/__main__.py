"""The command line: `python -m experiments list | fig1 | fig3 | density`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from experiments import density, fig1, fig3
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
    typer.Option(help="The folder to write to, made where missing.", show_default="experiments/results/NAME"),
]

MAKES = {"fig1": fig1.TITLE, "fig3": fig3.TITLE, "density": density.TITLE}


@app.command("list")
def list_experiments() -> None:
    """Show each experiment and what it makes."""
    for name, title in MAKES.items():
        typer.echo(f"{name}  {title}")


@app.command("fig1", help=fig1.TITLE)
def run_fig1(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:  # noqa: D103 (its help is above)
    config = fig1.Config.quick(seed) if quick else fig1.Config(seed=seed)
    _finish(lambda: fig1.run(config), out)


@app.command("fig3", help=fig3.TITLE)
def run_fig3(  # noqa: D103 (its help is above)
    quick: Quick = False,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    out: Out = None,
) -> None:
    config = fig3.Config.quick(seed, seeds) if quick else fig3.Config(seed=seed, seeds=seeds)
    _finish(lambda: fig3.run(config), out)


@app.command("density", help=density.TITLE)
def run_density(quick: Quick = False, seed: Seed = 0, out: Out = None) -> None:  # noqa: D103 (its help is above)
    config = density.Config.quick(seed) if quick else density.Config(seed=seed)
    _finish(lambda: density.run(config), out)


def _finish(run: Callable[[], Report], out: Path | None) -> None:
    """Run, write, and say where; an error of flowvi's is a message here, not a traceback."""
    try:
        report = run()
    except FlowVIError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    paths = report.write(out or Path("experiments", "results", report.name))
    typer.echo(paths[1].read_text(encoding="utf-8"))
    for path in paths:
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app(prog_name="python -m experiments")
