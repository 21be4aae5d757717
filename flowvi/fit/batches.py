"""Minibatches of a model's arguments, from tensors or from a torch Dataset, each row once in an epoch.

The order of an epoch depends on the seed and the epoch alone, so a fit that is cut off needs to remember only its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from flowvi.errors import DimensionError, NonFiniteError, OptionError

__all__ = ["Batches", "Call", "split_rows"]

MIN_ROWS = 2

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called with."""


@dataclass(frozen=True)
class Batches:
    """Rows of data as a model's arguments.

    Attributes:
        num: N.
        fetch: index (n,) -> the model's arguments for these rows, on the data's own device.
        rows: which of them are meant, in an order of their own (M,).
        device: where a batch goes; None leaves it where it is.
    """

    num: int
    fetch: Callable[[Tensor], Call]
    rows: Tensor
    device: torch.device | None = None

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device | None = None) -> Batches:
        """Those of a call's arguments: a Dataset first among them, or every tensor as long as the first.

        Raises:
            OptionError: there is no data among them.
            DimensionError: there are too few rows.
            NonFiniteError: a tensor of data holds NaN or infinities.
        """
        args = tuple(args)
        if args and isinstance(args[0], Dataset):
            return cls._of_dataset(args[0], args[1:], dict(kwargs), device)
        data = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        if data is None:
            raise OptionError(
                "with encoder= the arguments must hold the data: a tensor with one row per data point, or a torch "
                "Dataset as the first."
            )
        num = _enough(len(data))
        for a in (*args, *kwargs.values()):
            if _is_data(a, num) and a.is_floating_point() and not bool(a.isfinite().all()):
                raise NonFiniteError("the data holds NaN or infinite values: leave those rows out, or mask them.")

        def fetch(index: Tensor) -> Call:
            cut = [a[index.to(a.device)] if _is_data(a, num) else a for a in args]
            named = {k: a[index.to(a.device)] if _is_data(a, num) else a for k, a in kwargs.items()}
            return tuple(cut), named

        return cls(num, fetch, torch.arange(num), device)

    @classmethod
    def _of_dataset(
        cls, data: Dataset[Any], rest: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None
    ) -> Batches:
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise OptionError("the Dataset must know its length and give any row by its index: not an IterableDataset.")
        num = _enough(len(data))

        def fetch(index: Tensor) -> Call:
            which = index.tolist()
            many = getattr(data, "__getitems__", None)
            items = many(which) if many is not None else [data[i] for i in which]
            batch = default_collate(items)
            return (*(batch if isinstance(batch, (list, tuple)) else (batch,)), *rest), kwargs

        return cls(num, fetch, torch.arange(num), device)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: Tensor) -> Batches:
        """Some of the rows, by their places in `rows`."""
        return Batches(self.num, self.fetch, self.rows[rows], self.device)

    def get(self, where: Tensor | slice) -> Call:
        """The arguments of some rows."""
        args, kwargs = self.fetch(self.rows[where])
        if self.device is None:
            return args, kwargs
        return tuple(self._move(a) for a in args), {k: self._move(a) for k, a in kwargs.items()}

    def _move(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def minibatch(self, step: int, size: int, seed: int, part: slice = slice(None)) -> Call:
        """The batch of a step, counted from 0, or a part of it; the last, partial one of an epoch is left out."""
        epoch, place = divmod(step, len(self.rows) // size)
        return self.get(_order(len(self.rows), seed, epoch)[place * size : (place + 1) * size][part])


@lru_cache(maxsize=2)
def _order(num: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in an epoch."""
    return torch.randperm(num, generator=torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch))


def _enough(num: int) -> int:
    if num < MIN_ROWS:
        raise DimensionError(f"the data has {num} rows: an encoder can't be learnt from fewer than {MIN_ROWS}.")
    return num


def _is_data(value: Any, num: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == num


def split_rows(data: Batches, validation: Any, seed: int) -> tuple[Batches, Batches | None]:
    """Training and held-out rows.

    Args:
        data: all rows.
        validation: a fraction of them, drawn by the seed; or the held-out arguments: a tensor, a Dataset, or a tuple
            of what the model takes.
        seed: of the draw.

    Raises:
        OptionError: a fraction out of [0, 1).
    """
    if isinstance(validation, (int, float)):
        if isinstance(validation, bool) or not 0 <= validation < 1:
            raise OptionError(f"validation must be a fraction in [0, 1) or held-out data, not {validation!r}.")
        if validation == 0:
            return data, None
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        count = min(max(1, round(validation * len(data))), len(data) - 1)
        return data.at(order[count:].sort()[0]), data.at(order[:count])
    held = Batches.of(validation if isinstance(validation, (tuple, list)) else (validation,), {}, data.device)
    return data, held.at(torch.randperm(len(held), generator=torch.Generator().manual_seed(seed)))
