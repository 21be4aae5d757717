"""The table that a posterior prints: one row for each element of each site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

PERCENTS = (5, 50, 95)
_MAX_ROWS = 30


def table(mean: Mapping[str, Tensor], std: Mapping[str, Tensor], quantiles: Mapping[str, Tensor]) -> list[str]:
    """The lines of the table: mean, sd and quantiles.

    Args:
        mean: site -> (*shape).
        std: site -> (*shape).
        quantiles: site -> those of `PERCENTS`, (3, *shape).
    """
    rows = [["site", "mean", "sd", *(f"{p}%" for p in PERCENTS)]]
    total = sum(value.numel() for value in mean.values())
    for name, value in mean.items():
        columns = torch.stack([value, std[name], *quantiles[name]], -1)
        columns = columns.reshape(value.numel(), 2 + len(PERCENTS))
        for i in range(min(len(columns), _MAX_ROWS + 1 - len(rows))):
            label = ",".join(str(int(k)) for k in np.unravel_index(i, tuple(value.shape)))
            rows.append([f"{name}[{label}]" if label else name, *_numbers(columns[i].tolist())])
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in range(1, len(row)))]) for row in rows
    ]
    return lines + ([f"... {total - len(rows) + 1} more"] if total >= len(rows) else [])


def _numbers(values: Sequence[float]) -> list[str]:
    """Mean, sd and quantiles as text, to three digits of the sd."""
    sd = values[1]
    if not 1e-5 <= sd < 1e7:
        return [f"{value:.4g}" for value in values]
    digits = max(0, 2 - math.floor(math.log10(sd)))
    return [f"{value:.{digits}f}" for value in values]
