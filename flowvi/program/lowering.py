r"""From a flat graph of value and gradient to a program of the register machine.

The graph is of S particles at once; `walk` takes their dimension out. Views (select, expand, transpose, ...) cost
nothing: they are registers with an offset and strides.

What can't be written so raises `NotLowered`, and torch walks the graph as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from flowvi.errors import TraceError
from flowvi.program import along, elementwise, matrices, pieces, views
from flowvi.program.instruction import NotLowered
from flowvi.program.program import Program
from flowvi.program.walk import Handler, Walk
from flowvi.targets.trace import trace

__all__ = ["NUM_PARTICLES", "lower"]

aten = torch.ops.aten

NUM_PARTICLES = 13
"""S of the graph that is lowered: any number would do, and this one is no tensor's size by chance."""

_HANDLERS: dict[Any, Handler] = {
    operation: handler
    for module in (elementwise, views, pieces, along, matrices)
    for operation, handler in module.HANDLERS.items()
}


def lower(function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor) -> tuple[Program, Program]:
    """The programs of a graph: that of value and gradient, and that of the value alone.

    Args:
        function: z (S, D) -> log p (S,) and its gradient (S, D), in tensor operations.
        z: (13, D), where the graph is walked.

    Raises:
        NotLowered: there is something that the machine hasn't.
    """

    def both(z: Tensor) -> dict[str, Tensor]:
        value, grad = function(z)
        return {"value": value, "grad": grad}

    try:
        graph = trace(both, {"z": z}, _decompositions()).module("value", "grad")
    except TraceError as error:
        raise NotLowered(str(error)) from error
    return Walk(graph, z, _HANDLERS).programs()


@cache
def _decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    table.update(get_decompositions([aten._log_softmax, aten._softmax, aten.addmm, aten.softplus, aten.logsumexp]))
    for op in (aten.select_scatter.default, aten.diagonal_scatter.default):
        table.pop(op, None)
    return table
