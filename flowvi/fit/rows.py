"""Data for maximum likelihood: rows that are checked, split into training and held-out ones, and standardized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.conditional_flow import ConditionalFlow
from flowvi.errors import DimensionError, NonFiniteError, OptionError
from flowvi.flow import Flow

__all__ = ["Rows", "Scaling", "as_rows", "split"]

MIN_ROWS = 10


class Rows(NamedTuple):
    """Data (N, D) and, for a conditional density, a context (N, C) for each row."""

    x: Tensor
    context: Tensor | None

    def at(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.x[index], None if self.context is None else self.context[index])


@dataclass(frozen=True)
class Scaling:
    """Means and standard deviations of the training rows: the fit works on (x - mean) / sd."""

    loc: Tensor
    scale: Tensor
    context_loc: Tensor | None
    context_scale: Tensor | None

    @classmethod
    def of(cls, rows: Rows) -> Scaling:
        """Those of the rows.

        Raises:
            OptionError: a column of x is constant.
        """
        loc, scale = _moments(rows.x)
        eps = torch.finfo(rows.x.dtype).eps
        constant = (scale <= 8 * eps * rows.x.abs().amax(0)).nonzero().flatten().tolist()
        if constant:
            raise OptionError(
                f"columns {constant} of x are constant (to the rounding of {rows.x.dtype}), so their density is "
                f"infinite: leave them out, or pass float64 data."
            )
        if rows.context is None:
            return cls(loc, scale, None, None)
        context_loc, context_scale = _moments(rows.context)
        return cls(loc, scale, context_loc, torch.where(context_scale > 0, context_scale, 1.0))

    @property
    def log_det(self) -> float:
        """What the density of x has over that of (x - mean) / sd, in nats."""
        return -float(self.scale.double().log().sum())

    def apply(self, rows: Rows) -> Rows:
        """The rows with x standardized; a conditional flow standardizes the contexts itself."""
        return Rows((rows.x - self.loc) / self.scale, rows.context)

    @torch.no_grad()
    def fold(self, q: Flow | ConditionalFlow) -> None:
        """Take q from standardized data to the data's units: A = diag(e^l)(I + N) is scaled by its diagonal."""
        affine = q.affine if isinstance(q, ConditionalFlow) else q.transforms[-1]
        affine.loc.copy_(self.loc + self.scale * affine.loc)
        affine.log_scale.add_(self.scale.log())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns, by float64 and in the dtype of x."""
    wide = x.double()
    return wide.mean(0).to(x.dtype), wide.std(0).to(x.dtype)


def as_rows(
    name: str,
    value: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    num: int | None = None,
    dim: int | None = None,
) -> Tensor:
    """A finite matrix, or an error that says what is wrong with it."""
    try:
        rows = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise OptionError(f"{name} must be a matrix of numbers, not {type(value).__name__}: {error}") from error
    if rows.dim() != 2 or rows.shape[1] == 0:
        hint = f" For one variable pass {name}[:, None]." if rows.dim() == 1 else ""
        raise DimensionError(f"{name} must have shape (rows, columns), not {tuple(rows.shape)}.{hint}")
    if rows.is_complex():
        raise OptionError(f"{name} is complex: pass real and imaginary parts as columns.")
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise OptionError(f"dtype must be torch.float32 or torch.float64, not {dtype}.")
    if dtype is None:
        dtype = rows.dtype if rows.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
    rows = rows.to(dtype=dtype, device=device)
    if num is not None and len(rows) != num:
        raise DimensionError(f"{name} has {len(rows)} rows, and must have {num}, one for each row of the data.")
    if dim is not None and rows.shape[1] != dim:
        raise DimensionError(f"{name} has {rows.shape[1]} columns, and must have {dim}, as the data.")
    bad = (~rows.isfinite()).any(-1)
    if bad.any():
        raise NonFiniteError(
            f"{name} is NaN or infinite in {int(bad.sum())} of {len(rows)} rows (the first is row "
            f"{int(bad.nonzero()[0])}): leave them out or fill them in."
        )
    return rows


def split(
    data: Rows, validation: Any, validation_context: Any, generator: torch.Generator
) -> tuple[Rows, Rows | None, Tensor | None]:
    """Training rows, held-out rows, and the indices of the latter where they were drawn here."""
    num = len(data.x)
    if num < MIN_ROWS:
        raise DimensionError(f"x has {num} rows: a density can't be learnt from fewer than {MIN_ROWS}.")
    if not isinstance(validation, int | float):
        dtype, device = data.x.dtype, data.x.device
        x = as_rows("validation", validation, dtype, device, dim=data.x.shape[1])
        if not len(x):
            raise DimensionError("validation has no rows: give a fraction of the data, or 0 for none.")
        if (data.context is None) != (validation_context is None):
            raise OptionError("validation_context goes with validation data and a context: give all of them.")
        context = None
        if data.context is not None:
            context = as_rows("validation_context", validation_context, dtype, device, len(x), data.context.shape[1])
        return data, Rows(x, context).at(torch.randperm(len(x), generator=generator).to(x.device)), None
    if validation_context is not None:
        raise OptionError("validation_context goes with validation data of your own: pass validation=data too.")
    if isinstance(validation, bool) or not 0 <= validation < 1:
        raise OptionError(f"validation must be a fraction in [0, 1) or held-out data (V, D), not {validation!r}.")
    order = torch.randperm(num, generator=generator)
    if validation == 0:
        return data, None, None
    count = min(max(2, round(validation * num)), num - 2)
    held_out, kept = order[:count].sort()[0], order[count:].sort()[0]
    device = data.x.device
    return data.at(kept.to(device)), data.at(order[:count].to(device)), held_out
