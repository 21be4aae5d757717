"""From a function to the graph of everything that it does to tensors."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from flowvi.targets.trace import READS_MEMORY

__all__ = ["Refused", "is_fresh", "is_mutable", "is_random", "memory_of", "record"]

_UNSURE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)

_VIEWS = (
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
)
"""Views that don't say that they are."""


class Refused(Exception):
    """The function can't be recorded; it is as good as ever without."""


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of `function`, which takes `inputs` and finds the same tensors wherever else it holds them.

    It is run twice, and must do the same both times.

    Args:
        function: of the list of inputs; what it differentiates, it differentiates inside.
        inputs: tensors; parameters among them are read live, by whoever holds them.

    Raises:
        Refused: Python code asked for a value or changes from call to call, or something that outlives the call is
            changed in place.
    """
    try:
        with _NoMemory():
            module, again = (make_fx(function)(list(inputs)) for _ in range(2))
    except Exception as error:  # whatever code raises that is run on tensors that are watched
        raise Refused(f"{type(error).__name__}: {error}") from error
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if set(_UNSURE) & set(node.target.tags):
            raise Refused(f"{node.target} depends on values")
        if is_mutable(node) and not all(is_fresh(changed) for changed in _changed(node)):
            raise Refused(f"{node.target} changes what outlives the call")
    if not _alike(module, again):
        raise Refused("the second run did something else than the first")
    return module


class _NoMemory(TorchFunctionMode):
    """Under it, Python code that takes a tensor's numbers out of torch is an error; only kernels may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS_MEMORY:
            who = sys._getframe(1).f_globals.get("__name__", "")
            if not who.startswith("flowvi.kernels"):
                raise Refused(f"{who} reads a tensor's memory (Tensor.{name})")
        return func(*args, **(kwargs or {}))


def _alike(one: fx.GraphModule, two: fx.GraphModule) -> bool:
    """Whether two recordings are the same, to every number in them: a counter or a clock in the code shows."""
    if len(one.graph.nodes) != len(two.graph.nodes):
        return False
    for a, b in zip(one.graph.nodes, two.graph.nodes, strict=True):
        if (a.op, a.name, str(a.target), repr((a.args, a.kwargs))) != (
            b.op,
            b.name,
            str(b.target),
            repr((b.args, b.kwargs)),
        ):
            return False
        if a.op == "get_attr":
            x, y = getattr(one, str(a.target)), getattr(two, str(b.target))
            same = x is y or (isinstance(x, Tensor) and x.shape == y.shape and _equal(x, y))
            if not same:
                return False
    return True


def _equal(x: Tensor, y: Tensor) -> bool:
    """Equal numbers, NaN being equal to NaN."""
    return x.dtype == y.dtype and bool(((x == y) | ((x != x) & (y != y))).all())


def is_mutable(node: fx.Node) -> bool:
    """Whether the operation writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether the operation draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _changed(node: fx.Node) -> list[Any]:
    """The arguments that an operation writes into."""
    target: Any = node.target
    found = []
    for place, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            found += list(value) if isinstance(value, (list, tuple)) else [value]
    return found


def is_fresh(node: Any) -> bool:
    """Whether a tensor was made in the graph, and is no view of one that was not; None counts as one."""
    memory = memory_of(node)
    return memory is None or (isinstance(memory, fx.Node) and memory.op == "call_function")


def memory_of(node: Any) -> Any:
    """The node whose memory a value is in: itself, or what it is a view of."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            if not (target in _VIEWS or any(result.alias_info is not None for result in target._schema.returns)):
                break
        elif target is not operator.getitem:  # which is an item of several results
            break
        node = node.args[0]
    return node
