"""Checks of arguments that many share, each with one message: what is wrong, what was given, what it takes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowvi.errors import OptionError

MOST = 2**63 - 1
"""The largest integer that torch takes."""


def shown(value: Any) -> str:
    """A value in a message: a tensor or an array by its shape, and nothing longer than half a line."""
    if isinstance(value, Tensor | np.ndarray) and value.shape:
        return f"{value.dtype} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# Numbers


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def is_number(value: Any) -> bool:
    """Whether it is a finite real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _refuse(wrong: Callable[[Any], bool], what: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if wrong(value):
            limit = f" of at most {MOST}" if isinstance(value, int) and value > MOST else ""
            raise OptionError(f"{name} must be {what}{limit}, not {shown(value)}.")


def positive_integers(**values: Any) -> None:
    """Each argument is an integer of at least 1.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: not is_count(v), "a positive integer", values)


def positive_integers_or_none(**values: Any) -> None:
    """Each argument is an integer of at least 1, or None.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: v is not None and not is_count(v), "a positive integer or None", values)


def whole_numbers(least: int = 0, **values: Any) -> None:
    """Each argument is an integer of at least `least`.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: not is_count(v, least), f"a whole number of at least {least}", values)


def as_seed(seed: Any) -> int | None:
    """A seed that every generator takes, an integer of Python's or numpy's; None stays None.

    Raises:
        OptionError: it is something else.
    """
    found = int(seed) if isinstance(seed, np.integer) else seed
    if found is not None and not is_count(found, 0):
        raise OptionError(f"seed must be a whole number from 0 to {MOST} or None, not {shown(seed)}.")
    return found


def finite_numbers(**values: Any) -> None:
    """Each argument is a finite real number.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: not is_number(v), "a finite number", values)


def positive_numbers(**values: Any) -> None:
    """Each argument is a finite number above 0.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: not (is_number(v) and v > 0), "a positive number", values)


def positive_numbers_or_none(**values: Any) -> None:
    """Each argument is a finite number above 0, or None.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: v is not None and not (is_number(v) and v > 0), "a positive number or None", values)


def layer_sizes(hidden_dims: Any) -> None:
    """Sizes of hidden layers are a list or tuple of integers of at least 1, such as (32, 32).

    Raises:
        OptionError: they are not.
    """
    if not isinstance(hidden_dims, list | tuple) or not all(is_count(h) for h in hidden_dims):
        raise OptionError(f"hidden_dims must be positive integers, such as (32, 32), not {shown(hidden_dims)}.")


# Words and things


def one_of(options: Collection[str], **values: Any) -> None:
    """Each argument is one of the words.

    Raises:
        OptionError: one is not; the message names it, and the words.
    """
    what = f"one of {', '.join(options)}"
    _refuse(lambda v: not (isinstance(v, str) and v in options), what, values)


def flags(**values: Any) -> None:
    """Each argument is True or False.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: not isinstance(v, bool), "True or False", values)


def flags_or_none(**values: Any) -> None:
    """Each argument is True, False or None.

    Raises:
        OptionError: one is not; the message names it.
    """
    _refuse(lambda v: v is not None and not isinstance(v, bool), "True, False or None", values)


def lists_of_names(**values: Any) -> None:
    """Each argument is a list or tuple of names.

    Raises:
        OptionError: one is not; the message names it.
    """

    def wrong(value: Any) -> bool:
        return not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value)

    _refuse(wrong, "a list of names", values)


def keywords(**values: Any) -> None:
    """Each argument is a dict of keyword arguments, or None.

    Raises:
        OptionError: one is not; the message names it.
    """

    def wrong(value: Any) -> bool:
        return not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value)

    _refuse(lambda v: v is not None and wrong(v), "a dict of keyword arguments", values)


def functions(**values: Any) -> None:
    """Each argument can be called.

    Raises:
        OptionError: one can't; the message names it.
    """
    _refuse(lambda v: not callable(v), "callable", values)


def instances(*kinds: type, **values: Any) -> None:
    """Each argument is an object of one of these types.

    Raises:
        OptionError: one is not; the message names it.
    """
    what = " or ".join("None" if kind is type(None) else f"a {kind.__name__}" for kind in kinds)
    _refuse(lambda v: not isinstance(v, kinds), what, values)


def as_path(name: str, value: Any) -> Path:
    """A path of a file or folder.

    Raises:
        OptionError: it is neither text nor a path, or has a zero character.
    """
    if not isinstance(value, str | os.PathLike) or "\0" in os.fsdecode(value):
        raise OptionError(f"{name} must be the path of a file, as text or a pathlib.Path, not {shown(value)}.")
    return Path(os.fsdecode(value))


# Tensors


def as_tensor(
    name: str, value: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """A tensor of real numbers of what a user gave: a tensor, an array, a number or nested lists of them.

    Args:
        name: the argument's.
        value: what was given.
        dtype: the tensor's; None keeps that of the value.
        device: the tensor's.

    Raises:
        OptionError: it is none of these.
    """
    try:
        typed = isinstance(value, Tensor | np.ndarray)  # others would lose digits on their way through float32
        found = torch.as_tensor(value, dtype=None if typed else dtype, device=device)
        if not found.is_complex():
            return found if dtype is None else found.to(dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise OptionError(f"{name} must be a tensor of numbers, or what makes one, not {shown(value)}.") from error
    raise OptionError(f"{name} must be real, not {shown(value)}.")


def as_array(name: str, value: Any) -> np.ndarray:
    """A float64 array of real numbers, as `as_tensor`.

    Raises:
        OptionError: it is no such thing.
    """
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if not np.iscomplexobj(value):
            return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise OptionError(f"{name} must be an array of numbers, or what makes one, not {shown(value)}.") from error
    raise OptionError(f"{name} must be real, not {shown(value)}.")


def as_shape(name: str, value: Any) -> torch.Size:
    """A tensor's shape.

    Raises:
        OptionError: it is not a sequence of integers of at least 0.
    """
    if isinstance(value, torch.Size):  # its numbers are symbols while torch traces
        return value
    if isinstance(value, tuple | list) and all(is_count(n, 0) for n in value):
        return torch.Size(value)
    raise OptionError(f"{name} must be a shape, such as (100,), not {shown(value)}.")


def as_device(device: Any) -> torch.device | None:
    """A device that can hold values and is there; None stays None.

    Raises:
        OptionError: it is no such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        if found.type != "meta":  # which holds shapes alone
            torch.empty(0, device=found)
            return found
    except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {shown(device)} can't be used here: {error}".splitlines()[0]) from error
    raise OptionError("device 'meta' holds no values: choose 'cpu' or another one.")


def floating(dtype: Any) -> None:
    """A dtype of floating-point numbers, or None for the default.

    Raises:
        OptionError: it is another one.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype must be a floating-point dtype, such as torch.float64, not {shown(dtype)}.")


def float_or_double(dtype: Any) -> None:
    """The dtype of a computation is torch.float32, torch.float64, or None for the default.

    Raises:
        OptionError: it is another one.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in (torch.float32, torch.float64)):
        raise OptionError(f"dtype must be torch.float32 or torch.float64, not {shown(dtype)}.")
