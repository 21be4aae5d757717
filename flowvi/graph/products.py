"""A recorded gradient with its matrix products left open: what it would multiply comes out in place of the product.

The gradient of a layer's weights (C', C) is G' X, of the layer's inputs X (n, C) and its outputs' cotangents G (n, C').
Where n is small the two are far smaller than it is, and the gradient of all ranks' rows is the product of their factors
stacked: so ranks exchange factors (Xie et al. 2015, arXiv:1511.08486).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from flowvi.graph.record import memory_of
from flowvi.graph.tidy import drop_unused, is_pure, transposed
from flowvi.kernels.linear import linear

__all__ = ["Opened", "Product", "open_products"]

_ATEN = torch.ops.aten

LARGEST = 2
"""Times the numbers of a product that its factors have at most."""


class Product(NamedTuple):
    """An output (C', C) that is L' R, and which of the factors are L (n, C') and R (n, C)."""

    output: int
    left: int
    right: int


class Opened(NamedTuple):
    """What the outputs of a graph are now, after those that stay as they are.

    Attributes:
        whole: numbers of the outputs that are no products, or too small ones: they come next.
        products: the others.
        shapes: of the factors (n, width), which come last, each of them once.
    """

    whole: tuple[int, ...]
    products: tuple[Product, ...]
    shapes: tuple[tuple[int, ...], ...]


def open_products(module: fx.GraphModule, first: int, smallest: int, parameters: int) -> Opened:
    """Leave products open, in place.

    Nothing is left open in a graph that writes into its values, nor what would be read of a parameter: factors are read
    after the run, while parameters move.

    Args:
        module: a graph that `tidy` has seen.
        first: the number of the first output that may be left open; outputs are numbered from there.
        smallest: numbers that a product has at least.
        parameters: how many of the first inputs are parameters.
    """
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    outputs: Sequence[Any] = output.args[0]
    changing = [n for n in graph.nodes if n.op == "placeholder"][:parameters]
    pure = is_pure(graph)
    whole, products, factors = [], [], dict[fx.Node, int]()
    for number, value in enumerate(outputs[first:]):
        pair = _factors(graph, value) if pure and _size(value) >= smallest else None
        if pair is None or sum(map(_size, pair)) > LARGEST * _size(value) or any(_outlives(f, changing) for f in pair):
            whole.append(number)
            continue
        left, right = (factors.setdefault(factor, len(factors)) for factor in pair)
        products.append(Product(number, left, right))
    output.args = ([*outputs[:first], *(outputs[first + number] for number in whole), *factors],)
    drop_unused(graph)
    return Opened(tuple(whole), tuple(products), tuple(tuple(factor.meta["like"].shape) for factor in factors))


def _outlives(factor: fx.Node, changing: Sequence[fx.Node]) -> bool:
    """Whether the factor is in memory that may be written to before it is read."""
    memory = memory_of(factor)
    return memory in changing or memory.op == "get_attr"


def _factors(graph: fx.Graph, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """L (n, C') and R (n, C), of which the value is L' R; None where it is no product."""
    arguments: tuple[Any, ...] = value.args
    if value.target is _ATEN.t.default:
        pair = _factors(graph, arguments[0])
        return None if pair is None else (pair[1], pair[0])
    with graph.inserting_before(value):
        if value.target is linear and arguments[2] is None:
            return transposed(graph, arguments[0]), transposed(graph, arguments[1])
        if value.target is _ATEN.mm.default:
            return transposed(graph, arguments[0]), arguments[1]
    return None


def _size(node: fx.Node) -> int:
    """How many numbers the value has; 0 where nobody knows."""
    like = node.meta.get("like")
    return 0 if like is None else like.shape.numel()
