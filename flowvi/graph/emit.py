"""A graph as one Python function: a line for each operation, and each value let go where it was read last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flowvi.graph.bound import bound
from flowvi.graph.record import is_fresh, memory_of
from flowvi.kernels import implementations

__all__ = ["emit"]

_ATEN = torch.ops.aten

# torch's own Python functions read their arguments in half a microsecond less than an operator that is called by name.
_QUICK: dict[Any, Callable[..., Any]] = {
    _ATEN.add.Tensor: torch.add,
    _ATEN.sub.Tensor: torch.sub,
    _ATEN.mul.Tensor: torch.mul,
    _ATEN.div.Tensor: torch.div,
    _ATEN.neg.default: torch.neg,
    _ATEN.exp.default: torch.exp,
    _ATEN.log.default: torch.log,
    _ATEN.tanh.default: torch.tanh,
    _ATEN.sigmoid.default: torch.sigmoid,
    _ATEN.relu.default: torch.relu,
    _ATEN.sum.default: torch.sum,
    _ATEN.sum.dim_IntList: torch.sum,
    _ATEN.amax.default: torch.amax,
    _ATEN.eq.Tensor: torch.eq,
    _ATEN.mm.default: torch.mm,
    _ATEN.addmm.default: torch.addmm,
    _ATEN.t.default: torch.t,
    _ATEN.permute.default: torch.permute,
    _ATEN.unsqueeze.default: torch.unsqueeze,
    _ATEN.select.int: torch.select,
    _ATEN.view.default: Tensor.view,
    _ATEN.expand.default: Tensor.expand,
    _ATEN.cat.default: torch.cat,
    _ATEN.split_with_sizes.default: torch.split_with_sizes,
}


def emit(module: fx.GraphModule) -> Callable[..., tuple[Tensor | None, ...]]:
    """The function that does what the graph does; its inputs by position, its outputs in a tuple.

    Not for several threads at once: some calls have memory of their own that they write to each time.

    Args:
        module: a graph of operations on tensors. What it holds is read live.
    """
    graph = module.graph
    known: dict[str, Any] = {}
    inputs: list[str] = []
    lines: list[str] = []
    last: dict[fx.Node, fx.Node] = {}
    reads: dict[Any, fx.Node] = {}  # the last that reads of a memory
    for node in graph.nodes:
        for read in node.all_input_nodes:
            last[read] = reads[memory_of(read)] = node
    outputs: Sequence[Any] = ()
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.name)
        elif node.op == "get_attr":
            known[node.name] = _attribute(module, str(node.target))
        elif node.op == "output":
            outputs = node.args[0]
        else:
            name = f"_flowvi_f{len(lines)}"
            leaves = node in reads and reads[node].op == "output"
            known[name] = _function(node, _spent(node, reads), leaves)
            words = [_word(a, known) for a in node.args]
            words += [f"{key}={_word(value, known)}" for key, value in node.kwargs.items()]
            lines.append(f"{node.name} = {name}({', '.join(words)})")
            done = [n.name for n in node.all_input_nodes if last[n] is node and n.op == "call_function"]
            if node not in last:
                done.append(node.name)
            if done:
                lines[-1] += f"; del {', '.join(dict.fromkeys(done))}"
    told = ", ".join(_word(o, known) for o in outputs)
    body = "\n    ".join([*lines, f"return ({told},)" if told else "return ()"])
    exec(f"def run({', '.join(inputs)}):\n    {body}", known)
    return known["run"]


def _spent(node: fx.Node, reads: dict[Any, fx.Node]) -> list[bool]:
    """Whether an argument's memory was made by the graph, and nobody reads it but the node, nor the node but once."""
    memories = [memory_of(a) for a in node.all_input_nodes]

    def alone(a: Any) -> bool:
        memory = memory_of(a)
        return reads[memory] is node and memories.count(memory) == list(node.args).count(a) == 1 and is_fresh(a)

    return [isinstance(a, fx.Node) and alone(a) for a in node.args]


def _function(node: fx.Node, spent: Sequence[bool], leaves: bool) -> Any:
    """What is called.

    Args:
        node: the call.
        spent: which arguments' memory may be written to.
        leaves: whether what it gives is given to whoever calls the graph.
    """
    target: Any = node.target
    if target in _QUICK:
        return _QUICK[target]
    arguments = [a.meta.get("like") if isinstance(a, fx.Node) else a for a in node.args]
    alike = all(a is not None for a, given in zip(arguments, node.args, strict=True) if isinstance(given, fx.Node))
    if alike and not leaves and not node.kwargs:
        quicker = bound(target, arguments, spent)
        if quicker is not None:
            return quicker
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "flowvi":
        return getattr(implementations, target._opname)
    return target._op if isinstance(target, torch._ops.OpOverload) else target


def _word(value: Any, known: dict[str, Any]) -> str:
    """An argument as it is written; what can't be written gets a name."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_word(v, known) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    name = f"_flowvi_c{len(known)}"
    known[name] = value
    return name


def _attribute(module: fx.GraphModule, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
