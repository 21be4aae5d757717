"""A recorded graph with less to do, and the same values but for the rounding of large matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flowvi.graph.bound import Like
from flowvi.graph.join import join
from flowvi.graph.record import is_mutable, is_random
from flowvi.kernels.linear import TALL, linear, pays
from flowvi.targets.trace import NEUTRAL

__all__ = ["drop_unused", "is_pure", "keep", "tidy", "transposed"]

_ATEN = torch.ops.aten

_SAME_MEMORY = (_ATEN.detach.default, _ATEN.alias.default)
_LITERALS = (_ATEN.lift_fresh.default, _ATEN.lift_fresh_copy.default)
"""What a number written in the code becomes a tensor by."""
_SHAPES_ALONE = (
    _ATEN.zeros_like.default,
    _ATEN.ones_like.default,
    _ATEN.full_like.default,
    _ATEN.new_zeros.default,
    _ATEN.new_ones.default,
    _ATEN.new_full.default,
)
"""What reads of its argument is the same in every run."""
_ALL_OF_IT = (_ATEN.slice.Tensor, _ATEN.slice_backward.default, _ATEN.sum.dim_IntList, _ATEN.cat.default)
"""What gives its argument where that is as large as the result: all rows of it, or the sum of one."""
_SHAPED = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default, _ATEN.expand.default)


class _Run(fx.Interpreter):
    """Runs the graph, and notes what each value is like, and the values that no input has a part in."""

    def run_node(self, n: fx.Node) -> Any:
        """See `torch.fx.Interpreter`."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["like"] = Like.of(out)
        if _is_constant(n):
            n.meta["constant"] = out
        return out


def tidy(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Make the graph smaller, in place.

    Args:
        module: what `record` gave. Where it writes into tensors of its own, other than with random numbers, only the
            matrix products are seen to.
        inputs: what it will be called with, in these shapes. It is run once, and draws the random numbers of a run.
    """
    graph = module.graph
    pure = is_pure(graph)
    with torch.no_grad():
        _Run(module).run(*inputs)
    if pure:
        _shorten(module)
        join(graph)
    for node in list(graph.nodes):
        _multiply(graph, node)
    drop_unused(graph)


def _shorten(module: fx.GraphModule) -> None:
    """Leave out what is there already, and what is the same in every run; views take the place of copies."""
    done: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        same = _same(node) or _done(node, done)
        if same is not None:
            node.replace_all_uses_with(same)
        elif isinstance(node.meta.get("constant"), Tensor):
            _fold(module, node)
        else:
            _view(module.graph, node)
    drop_unused(module.graph)


def keep(module: fx.GraphModule, numbers: Sequence[int]) -> None:
    """Copy outputs, each as soon as it is there, to places that are further inputs; they are outputs no longer.

    A gradient is copied while it is in the processor's cache, and its own memory serves the next one.

    Args:
        module: a graph.
        numbers: of the outputs that are copied.
    """
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    outputs: Any = output.args[0]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for number in numbers:
        value = outputs[number]
        with graph.inserting_after(last):
            last = graph.placeholder(f"place_{number}")
        with graph.inserting_after(value if value.op == "call_function" else last):
            graph.call_function(_ATEN.copy_.default, (last, value))
    output.args = ([value for number, value in enumerate(outputs) if number not in numbers],)


def is_pure(graph: fx.Graph) -> bool:
    """Whether the graph writes into nothing, random numbers into new memory aside: a value that is there stays."""
    return all(_fills_new_memory(n) for n in graph.nodes if is_mutable(n))


def _fills_new_memory(node: fx.Node) -> bool:
    """Whether what the operation writes into is memory that nobody else has seen, as in torch.empty(3).normal_()."""
    into = node.args[0]
    return isinstance(into, fx.Node) and _is_new(into) and is_random(node) and len(into.users) == 1


def _is_new(node: fx.Node) -> bool:
    """Whether the value is memory with nothing in it yet, such as torch.empty(3)."""
    return "empty" in str(node.target)


def _is_constant(node: fx.Node) -> bool:
    """Whether the value is the same in every run: made of numbers in the code alone, by operations without chance."""
    if node.op != "call_function" or is_mutable(node) or is_random(node):
        return False
    if node.target in (*_LITERALS, *_SHAPES_ALONE):
        return True
    if _is_new(node):
        return False
    return all("constant" in n.meta for n in node.all_input_nodes)


def _fold(module: fx.GraphModule, node: fx.Node) -> None:
    name = f"folded_{node.name}"
    module.register_buffer(name, node.meta["constant"], persistent=False)
    with module.graph.inserting_before(node):
        value = module.graph.get_attr(name)
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)


def _same(node: fx.Node) -> fx.Node | None:
    """The argument that the node's value is equal to, in the same memory layout; None if there is none."""
    first = node.args[0] if node.args else None
    if node.target is _ATEN.cat.default and isinstance(first, (list, tuple)) and len(first) == 1:
        first = first[0]
    if not isinstance(first, fx.Node):
        return None
    if node.target in _SAME_MEMORY:
        return first
    if node.target is _ATEN.t.default and first.target is _ATEN.t.default:
        inner: Any = first.args[0]
        return inner
    if "like" not in first.meta or first.meta["like"] != node.meta.get("like"):
        return None
    if node.target in (*_SHAPED, *_ALL_OF_IT, _ATEN.clone.default, _ATEN._to_copy.default):
        return first
    if node.target is _ATEN.permute.default:
        dims: Any = node.args[1]
        return first if list(dims) == sorted(dims) else None
    if node.target in NEUTRAL and not node.kwargs and node.args[1] == NEUTRAL[node.target]:
        return first
    return None


def _view(graph: fx.Graph, node: fx.Node) -> None:
    """The gradient of the only row of something is the row itself, where it lies as the copy would."""
    if node.target is not _ATEN.select_backward.default:
        return
    arguments: Any = node.args
    row, shape, dim, _ = arguments
    like, given = node.meta["like"], row.meta["like"]
    if shape[dim] == 1 and Like.of(given.example().unsqueeze(dim)) == like:
        with graph.inserting_before(node):
            better = graph.call_function(_ATEN.unsqueeze.default, (row, dim))
        better.meta["like"] = like
        node.replace_all_uses_with(better)


def _done(node: fx.Node, done: dict[Any, fx.Node]) -> fx.Node | None:
    """The earlier node that does the same; None where there is none."""
    if is_random(node) or is_mutable(node) or _is_new(node):
        return None
    flat, spec = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    # repr tells 0.0 from -0.0, and 1 from True
    key = (node.target, str(spec), *(a if isinstance(a, fx.Node) else repr(a) for a in flat))
    first = done.setdefault(key, node)
    return None if first is node else first


def _multiply(graph: fx.Graph, node: fx.Node) -> None:
    """A large matrix product, by the library that does it sooner."""
    operands: tuple[Any, ...] = node.args
    if node.target is _ATEN.mm.default:
        operands = (None, *operands)
    elif node.target is not _ATEN.addmm.default or node.kwargs:
        return
    bias, x, right = operands
    if any(n is not None and "like" not in n.meta for n in operands):
        return
    given, size_out = x.meta["like"], right.meta["like"].shape[1]
    if bias is not None and (bias.meta["like"].shape, bias.meta["like"].stride) != ((size_out,), (1,)):
        return  # oneDNN takes it for contiguous
    if not pays(given.shape, size_out, given.dtype, given.device):
        return
    product: Callable[..., Any] = linear
    with graph.inserting_before(node):
        turned = transposed(graph, right)
        if bias is None and given.shape[0] >= TALL * size_out:  # (A B)' = B' A' is as much work, in longer rows
            inner = graph.call_function(product, (turned, x, None))
            inner.meta["like"] = node.meta["like"].transposed()
            better = graph.call_function(_ATEN.t.default, (inner,))
        else:
            better = graph.call_function(product, (x, turned, bias))
    better.meta["like"] = node.meta["like"]
    node.replace_all_uses_with(better)


def transposed(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """The transpose of a matrix: what it is the transpose of, or a new node where the graph inserts."""
    if value.target is _ATEN.t.default:
        first: Any = value.args[0]
        return first
    turned = graph.call_function(_ATEN.t.default, (value,))
    turned.meta["like"] = value.meta["like"].transposed()
    return turned


def drop_unused(graph: fx.Graph) -> None:
    """Leave out what nobody reads; random numbers are drawn all the same, so that later ones are not others."""
    for node in reversed(list(graph.nodes)):
        stays = node.op in ("placeholder", "output") or is_random(node) or is_mutable(node)
        if not stays and not node.users:
            graph.erase_node(node)
    graph.lint()
