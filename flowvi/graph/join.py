"""Products of one matrix with several small ones as one product, of the small ones side by side.

A network's heads are such: x W_i' + b_i of the same x. One product takes less time than several narrow ones, and so it
is with what comes back through them: sum_i G_i W_i is [G_1 ... G_m] [W_1; ...; W_m], and the G_i' x are the rows of
[G_1 ... G_m]' x.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from flowvi.graph.bound import Like

__all__ = ["join"]

_ATEN = torch.ops.aten

SMALL, MOST = 50_000, 100_000
"""Numbers that each of the matrices has at most, and all values together: to copy more costs more than calls."""


class _Head(NamedTuple):
    """A value x W' + b (or x W'), with W and b among the graph's inputs."""

    value: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def join(graph: fx.Graph) -> None:
    """Make such products one, in place.

    Args:
        graph: that writes into nothing; meta["like"] says what its values are.
    """
    groups: dict[Any, list[_Head]] = {}
    for node in graph.nodes:
        head = _head(node)
        if head is not None:
            groups.setdefault((head.x, head.bias is None), []).append(head)
    for heads in groups.values():
        size = sum(head.value.meta["like"].shape.numel() for head in heads)
        if len(heads) > 1 and len({head.weight for head in heads}) == len(heads) and size <= MOST:
            _join_backward(graph, heads, _join_forward(graph, heads))


def _head(node: fx.Node) -> _Head | None:
    """The value as a head; None where it is none, or somebody reads it who may ask how it lies in memory."""
    arguments: Any = node.args
    if node.target is _ATEN.mm.default:
        arguments = (None, *arguments)
    elif node.target is not _ATEN.addmm.default or node.kwargs:
        return None
    bias, x, right = arguments
    weight: Any = right.args[0] if right.target is _ATEN.t.default else None
    if weight is None or weight.op != "placeholder" or weight.meta["like"].shape.numel() > SMALL:
        return None
    if bias is not None and (bias.op != "placeholder" or bias.meta["like"].shape != weight.meta["like"].shape[:1]):
        return None
    return _Head(node, x, weight, bias) if all(map(_is_pointwise, node.users)) else None


def _is_pointwise(node: fx.Node) -> bool:
    """Whether it is the same function of every number."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _join_forward(graph: fx.Graph, heads: Sequence[_Head]) -> fx.Node:
    """All values as columns of one; [W_1; ...; W_m]."""
    with graph.inserting_before(heads[0].value):
        matrix = _cat(graph, [head.weight for head in heads], 0)
        right = _call(graph, _ATEN.t.default, (matrix,), matrix.meta["like"].transposed())
        operands: tuple[Any, ...] = (heads[0].x, right)
        biases = [head.bias for head in heads if head.bias is not None]
        if biases:
            operands = (_cat(graph, biases, 0), *operands)
        shape = (heads[0].x.meta["like"].shape[0], matrix.meta["like"].shape[0])
        target = _ATEN.addmm.default if biases else _ATEN.mm.default
        value = _call(graph, target, operands, _rows(heads[0].value.meta["like"], shape))
        _share_out(graph, value, [head.value for head in heads], 1)
    return matrix


def _join_backward(graph: fx.Graph, heads: Sequence[_Head], matrix: fx.Node) -> None:
    """What comes back through the heads, where it does through all of them, as what comes back through one."""
    pulls = [_only(head.weight, _ATEN.mm.default, 1) for head in heads]
    tops = {pull and _sum_over(pull) for pull in pulls}
    top = tops.pop()
    if tops or top is None or top in pulls:
        return
    given: list[Any] = [pull.args[0] for pull in pulls if pull is not None]
    place = {node: number for number, node in enumerate(graph.nodes)}
    if place[top] < place[matrix]:  # of other products with the same matrices, before
        return
    last = max(given, key=lambda node: place[node])
    with graph.inserting_before(last.next):
        side = _cat(graph, given, 1)
        back = _call(graph, _ATEN.t.default, (side,), side.meta["like"].transposed())
    like: Like = top.meta["like"]
    with graph.inserting_before(top):
        value = _call(graph, _ATEN.mm.default, (side, matrix), like)
        for other in _summands(top):
            if other not in pulls:
                value = _call(graph, _ATEN.add.Tensor, (value, other), like)
    top.replace_all_uses_with(value)
    # The gradients of the weights and of the biases.
    turned = [_only(g, _ATEN.t.default, 0) for g in given]
    of_weights = [t and _only(t, _ATEN.mm.default, 0, heads[0].x) for t in turned]
    of_biases = [_only(g, _ATEN.sum.dim_IntList, 0, [0], True) for g in given]
    for found, operands, dim in ((of_weights, (back, heads[0].x), 0), (of_biases, (side, [0], True), 1)):
        nodes = [node for node in found if node is not None]
        if len(nodes) == len(heads) and all(place[user] > place[last] for node in nodes for user in node.users):
            shape = list(nodes[0].meta["like"].shape)
            shape[dim] = side.meta["like"].shape[1]
            with graph.inserting_before(back.next):
                value = _call(graph, nodes[0].target, operands, _rows(nodes[0].meta["like"], shape))
                _share_out(graph, value, nodes, dim)


def _only(of: fx.Node, target: Any, place: int, *others: Any) -> fx.Node | None:
    """The one operation that reads the value as its argument there, with these others; None if there isn't one."""
    end = [of, *others]
    found = [n for n in of.users if n.target is target and not n.kwargs and list(n.args[place:]) == end]
    return found[0] if len(found) == 1 else None


def _sum_over(node: fx.Node) -> fx.Node:
    """The sum that the value goes into, and nowhere else."""
    while len(node.users) == 1:
        (user,) = node.users
        if list(user.args).count(node) > 1:  # twice itself
            break
        if user.target is not _ATEN.add.Tensor or user.kwargs or user.meta["like"] != node.meta["like"]:
            break
        node = user
    return node


def _summands(node: fx.Node) -> list[Any]:
    """What a sum that `_sum_over` found is of."""
    found: list[Any] = []
    operands: Any = node.args
    for a in operands:
        inner = isinstance(a, fx.Node) and _sum_over(a) is not a and a.target is _ATEN.add.Tensor and not a.kwargs
        found += _summands(a) if inner else [a]
    return found


def _cat(graph: fx.Graph, parts: Sequence[fx.Node], dim: int) -> fx.Node:
    like: Like = parts[0].meta["like"]
    shape = list(like.shape)
    shape[dim] = sum(part.meta["like"].shape[dim] for part in parts)
    return _call(graph, _ATEN.cat.default, (list(parts), dim), _rows(like, shape))


def _share_out(graph: fx.Graph, value: fx.Node, parts: Sequence[fx.Node], dim: int) -> None:
    """Give each of the parts' readers its slice of the value along a dimension."""
    sizes = [part.meta["like"].shape[dim] for part in parts]
    pieces = graph.call_function(_ATEN.split_with_sizes.default, (value, sizes, dim))
    for number, part in enumerate(parts):
        like = part.meta["like"]._replace(stride=value.meta["like"].stride)
        part.replace_all_uses_with(_call(graph, operator.getitem, (pieces, number), like))


def _rows(like: Like, shape: Sequence[int]) -> Like:
    """The same in another shape, row by row."""
    size = torch.Size(shape)
    return like._replace(shape=size, stride=torch.empty(size, device="meta").stride())


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], like: Like) -> fx.Node:
    node = graph.call_function(target, arguments)
    node.meta["like"] = like
    return node
