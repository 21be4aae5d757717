"""From a function to the graph of everything that it does to tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["Refused", "is_mutable", "is_random", "record"]

_UNSURE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


class Refused(Exception):
    """The function can't be recorded; it is as good as ever without."""


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of `function`, which takes `inputs` and finds the same tensors wherever else it holds them.

    Args:
        function: of the list of inputs; what it differentiates, it differentiates inside.
        inputs: tensors; parameters among them are read live, by whoever holds them.

    Raises:
        Refused: Python code asked for a value, or something that outlives the call is changed in place.
    """
    try:
        module = make_fx(function)(list(inputs))
    except Exception as error:  # whatever code raises that is run on tensors that are watched
        raise Refused(f"{type(error).__name__}: {error}") from error
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if set(_UNSURE) & set(node.target.tags):
            raise Refused(f"{node.target} depends on values")
        if is_mutable(node) and not all(_is_fresh(changed) for changed in _changed(node)):
            raise Refused(f"{node.target} changes what outlives the call")
    return module


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


def _is_fresh(node: Any) -> bool:
    """Whether a tensor was made in the graph, and is no view of one that was not."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):  # an item of several results
            node = node.args[0]
            continue
        if not any(result.alias_info is not None for result in target._schema.returns):
            return True
        node = node.args[0]
    return node is None
