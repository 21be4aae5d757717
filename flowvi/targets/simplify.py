"""A flat graph with less to do: nothing is computed a thousand times that is the same a thousand times.

A parameter that a plate's data share is expanded to the data's shape before anything is done with it: log(sigma) of a
thousand equal sigmas. Here what is elementwise is done first and expanded after; so are softmaxes over another
dimension. Copies to the dtype that a tensor has already are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["simplify"]

_ATEN = torch.ops.aten
_ALONG = (_ATEN._log_softmax.default, _ATEN._softmax.default, _ATEN.logsumexp.default)
"""Operations along dimensions, their second argument, that leave the others apart."""


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes each node's shape and dtype."""

    def run_node(self, n: fx.Node) -> Any:
        """See `torch.fx.Interpreter`."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["like"] = out.shape, out.dtype
        return out


def simplify(module: fx.GraphModule, *inputs: Tensor) -> None:
    """Make the graph smaller in place; its values are the same but for rounding.

    Args:
        module: a graph of functional aten operations.
        *inputs: what it will be called with, in these shapes.
    """
    with torch.no_grad():
        _Shapes(module).run(*inputs)
    graph, small = module.graph, dict[fx.Node, fx.Node]()  # an expanded node -> what it was expanded from
    for node in list(graph.nodes):
        if node.op != "call_function" or "like" not in node.meta:
            continue
        shape, dtype = node.meta["like"]
        if node.target is _ATEN._to_copy.default and node.kwargs == {"dtype": dtype}:
            if node.args[0].meta["like"][1] == dtype:
                node.replace_all_uses_with(node.args[0])
            continue
        if node.target is _ATEN.expand.default:
            source = node.args[0]
            if len(source.meta["like"][0]) == len(shape):
                small[node] = small.get(source, source)
            continue
        if not _commutes(node, small):
            continue
        with graph.inserting_before(node):
            less = graph.node_copy(node, lambda n: small.get(n, n))
            less.meta["like"] = _less(node, small), dtype
            more = graph.call_function(_ATEN.expand.default, (less, list(shape)))
        more.meta["like"] = shape, dtype
        small[more] = less
        node.replace_all_uses_with(more)
    graph.eliminate_dead_code()
    module.recompile()


def _commutes(node: fx.Node, small: dict[fx.Node, fx.Node]) -> bool:
    """Whether the operation can be done before its arguments are expanded, and has less to do then."""
    op, shape = node.target, node.meta["like"][0]
    if not any(n in small for n in node.all_input_nodes) or not isinstance(op, torch._ops.OpOverload):
        return False
    if not all("like" in n.meta for n in node.all_input_nodes):
        return False
    if op in _ALONG:
        first, along, *rest = node.args
        before, after = small[first].meta["like"][0], first.meta["like"][0]  # type: ignore[index,union-attr]
        keeps = op is not _ATEN.logsumexp.default or (bool(rest) and bool(rest[0]))
        dims = along if isinstance(along, Sequence) else [along]
        return keeps and bool(dims) and all(before[d] == after[d] for d in dims)
    if torch.Tag.pointwise not in op.tags or op._schema.is_mutable:
        return False
    return _less(node, small).numel() < shape.numel()


def _less(node: fx.Node, small: dict[fx.Node, fx.Node]) -> torch.Size:
    """The shape of the operation's result before its arguments are expanded."""
    if node.target in _ALONG:
        before, after = small[node.args[0]].meta["like"][0], node.meta["like"][0]  # type: ignore[index]
        return torch.Size(min(b, a) for b, a in zip(before, after, strict=True))
    return torch.broadcast_shapes(*(small.get(n, n).meta["like"][0] for n in node.all_input_nodes))
