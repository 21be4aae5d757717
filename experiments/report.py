"""What every experiment leaves behind: results.json, table.md and a picture, in one folder.

results.json holds everything: the configuration with its seed, versions, seconds and one row per result.
table.md is for people. Nothing in either depends on the machine but the seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch

from flowvi._version import __version__
from flowvi.errors import FlowVIError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = "pip install 'flowvi[experiments]'"

# Dark to light, even steps of lightness, safe for colour-blind readers and in print.
COLOURS = "viridis"


def require_matplotlib() -> None:
    """Say what to install where matplotlib is missing: before the work, not after it.

    Raises:
        FlowVIError: matplotlib can't be imported.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise FlowVIError(f"the experiments draw with matplotlib, which is missing: {INSTALL}") from error
    matplotlib.use("Agg")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "flowvi": __version__,
    }


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one experiment, before it is written."""

    name: str
    """The experiment's name, and the picture's."""
    title: str
    """What it shows, one line."""
    config: Any
    """The experiment's frozen dataclass, with its seed."""
    rows: Sequence[Mapping[str, Any]]
    """One mapping per result, with the same keys; strings, numbers, booleans or None."""
    table: Sequence[Mapping[str, str]]
    """What table.md shows: rows of column title -> text."""
    notes: Sequence[str]
    """Sentences a reader needs to read the table rightly."""
    figure: Figure
    seconds: float

    def write(self, out: Path) -> list[Path]:
        """Write results.json, table.md and the PNG into the folder out, made where missing.

        Returns:
            The three paths.
        """
        out.mkdir(parents=True, exist_ok=True)
        results = {
            "experiment": self.name,
            "title": self.title,
            "seed": self.config.seed,
            "config": dataclasses.asdict(self.config),
            "versions": versions(),
            "seconds": round(self.seconds, 1),
            "notes": list(self.notes),
            "rows": [_finite(row) for row in self.rows],
        }
        paths = [out / "results.json", out / "table.md", out / f"{self.name}.png"]
        paths[0].write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        paths[1].write_text(self._markdown(), encoding="utf-8")
        # No software's name in it: versions stand in results.json.
        self.figure.savefig(paths[2], dpi=110, metadata={"Software": None})
        return paths

    def _markdown(self) -> str:
        lines = [f"# {self.title}", "", *markdown_table(self.table), ""]
        lines += [f"- {note}" for note in self.notes]
        made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
        lines += ["", f"Seed {self.config.seed}; {self.seconds:.0f} s in all; {made_with}."]
        return "\n".join(lines) + "\n"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a markdown table; the first row's keys are the columns."""
    if not rows:
        return []
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with NaN and infinities as None: JSON has no word for them."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def show_density(axes: Any, log_density: torch.Tensor, extent: float, top: float) -> Any:
    """Draw a density on the square [-extent, extent]^2 as an image.

    Args:
        axes: matplotlib's axes.
        log_density: (n, n), axis 0 is z1 and axis 1 is z2.
        extent: Half the side of the square.
        top: The density that gets the brightest colour; the same in a row, so that its panels compare.

    Returns:
        matplotlib's image, for a colour bar.
    """
    image = axes.imshow(
        log_density.exp().T.numpy(),
        origin="lower",
        extent=(-extent, extent, -extent, extent),
        cmap=COLOURS,
        vmin=0,
        vmax=top,
        interpolation="bilinear",
    )
    axes.set(aspect="equal", xticks=[], yticks=[])
    return image
