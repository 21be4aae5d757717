"""What a trace leaves behind: one graph with several named outputs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

__all__ = ["Recording"]


class Recording:
    """What a trace recorded; any subset of its named outputs can be had as a graph module."""

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, outputs: dict[str, fx.Node]) -> None:
        self._root, self._graph, self._outputs = root, graph, outputs

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the outputs, in the order in which the traced function gave them."""
        return tuple(self._outputs)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The live parameters in the graph, by their attribute's name."""
        return {n: t for n, t in vars(self._root)["_buffers"].items() if n.startswith("parameter")} | dict(
            self._root.named_parameters()
        )

    def module(self, *names: str) -> fx.GraphModule:
        """The graph that computes the named outputs and nothing else; it returns their tuple."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self._graph, copies)
        graph.output(tuple(copies[self._outputs[name]] for name in names))
        graph.eliminate_dead_code()
        return fx.GraphModule(self._root, graph)
