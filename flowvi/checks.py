"""Checks of arguments that many share, each with one message."""

from __future__ import annotations

import math
from typing import Any

from flowvi.errors import OptionError


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def positive_integers(**values: Any) -> None:
    """Each argument is an integer of at least 1.

    Raises:
        OptionError: one is not; the message names it.
    """
    for name, value in values.items():
        if not _is_count(value):
            raise OptionError(f"{name} must be a positive integer, not {value!r}.")


def positive_integers_or_none(**values: Any) -> None:
    """Each argument is an integer of at least 1, or None.

    Raises:
        OptionError: one is not; the message names it.
    """
    for name, value in values.items():
        if value is not None and not _is_count(value):
            raise OptionError(f"{name} must be a positive integer or None, not {value!r}.")


def positive_numbers_or_none(**values: Any) -> None:
    """Each argument is a finite number above 0, or None.

    Raises:
        OptionError: one is not; the message names it.
    """
    for name, value in values.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise OptionError(f"{name} must be a positive number or None, not {value!r}.")


def layer_sizes(hidden_dims: Any) -> None:
    """Sizes of hidden layers are integers of at least 1.

    Raises:
        OptionError: one is not.
    """
    if not all(_is_count(h) for h in hidden_dims):
        raise OptionError(f"hidden_dims must be positive integers, not {tuple(hidden_dims)!r}.")
