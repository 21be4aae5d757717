"""A tracer that records only what depends on its inputs: from Python code to a flat graph of tensor operations.

A function of tensors is run once, at one point. Whatever comes from its inputs is a `Traced` tensor, and each
operation on it is written into a `torch.fx.Graph`. Whatever depends on data alone runs as plain torch and enters
the graph as a constant, so it may use `.item()`, `int(index.max())` and `if`. Python code that reads the value
of a traced tensor would bake that one point into the graph, so it raises `TraceError` instead.

- In-place operations become functional ones (`torch.func.functionalize`), so `x[i] = ...` is right. The graph is
  pure: copies and repeated operations are left out, and it can go through `vmap` and `grad`.
- A parameter (an `nn.Parameter`, or a leaf that requires gradients) is read live: the graph holds the tensor
  itself, so that a later in-place change is seen. No gradient flows into it.
- `detach` stays in the graph: the graph's gradient is that of the code.
- A factorization that fails gives NaN for that particle, not an exception for all of them.
"""

from __future__ import annotations

import operator
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from flowvi.errors import TraceError
from flowvi.targets.recording import Recording

__all__ = ["trace"]

aten = torch.ops.aten

# The result depends on the shape of a traced tensor, not on its value.
_FACTORIES = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.is_same_size.default,
}
# In a pure graph these do nothing, unless the result's shape or dtype is another.
_COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.sum.default,
    aten._to_copy.default,
}
# Nor do these with this second argument.
NEUTRAL = {
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
}
# `view` asks for a memory layout that batching may change; `reshape` means the same and never fails.
_REPLACED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
# The last result says whether the factorization failed.
_FALLIBLE = {
    aten.linalg_cholesky_ex.default,
    aten.linalg_inv_ex.default,
    aten.linalg_lu_factor_ex.default,
    aten.linalg_ldl_factor_ex.default,
    aten._linalg_solve_ex.default,
}


# They read memory that a traced tensor doesn't have.
READS_MEMORY = ("numpy", "__array__", "tolist", "data_ptr", "storage", "untyped_storage")


class Traced(torch.Tensor):
    """A tensor that depends on the inputs of a trace: its value at the traced point, and its node."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    elem: Tensor
    node: fx.Node

    @staticmethod
    def __new__(cls: type[Traced], elem: Tensor, node: fx.Node) -> Traced:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=elem.device,
        )
        out.elem, out.node = elem, node
        return out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Traced({self.node.name}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return Traced(self.elem, self.node)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TraceError(f"a traced tensor was kept and used after the trace ({func})")


def _refuse(name: str) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(f"Python code reads the memory of a latent (Tensor.{name})")

    return method


for _name in READS_MEMORY:
    setattr(Traced, _name, _refuse(_name))


class _Tracer(TorchDispatchMode):
    """Sees every operation, and records those that depend on an input or on a live parameter."""

    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.decompositions = decompositions
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.refusal: str | None = None
        self.in_place = False
        self._constants: dict[int, tuple[fx.Node, Tensor, int]] = {}
        self._live: dict[int, tuple[Traced, Tensor]] = {}
        self._done: dict[Any, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it would import all of dynamo, a second or more

    def refuse(self, reason: str, *, in_place: bool = False) -> TraceError:
        """The error to raise; the reason is kept, because the code in between may wrap the error."""
        self.refusal, self.in_place = reason, in_place
        return TraceError(reason)

    def placeholder(self, name: str, value: Tensor) -> Traced:
        return Traced(value, self.graph.placeholder(name))

    def node(self, value: Any) -> Any:
        """The node of a tensor, where a plain one becomes a constant; anything else as it is."""
        if isinstance(value, Traced):
            return value.node
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._constants:
            node = self._attribute("constant", value.detach())
            self._constants[id(value)] = (node, value, _version(value))
        return self._constants[id(value)][0]

    def check_constants(self) -> None:
        """Raises `TraceError` if a tensor was changed in place after it had entered the graph."""
        if any(_version(value) != version for _, value, version in self._constants.values()):
            raise self.refuse("a tensor is changed in place after it was combined with a latent", in_place=True)

    def _attribute(self, kind: str, value: Tensor) -> fx.Node:
        name = f"{kind}_{len(self._constants) + len(self._live)}"
        if isinstance(value, torch.nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def lift(self, value: Any) -> Any:
        """A live parameter as a traced tensor; anything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, Traced):
            return value
        if not (isinstance(value, torch.nn.Parameter) or (value.requires_grad and value.is_leaf)):
            return value
        if id(value) not in self._live:
            node = self.graph.call_function(aten.detach.default, (self._attribute("parameter", value),))
            self._live[id(value)] = (Traced(value.detach(), node), value)
        return self._live[id(value)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        flat = [self.lift(a) for a in flat]
        if not any(isinstance(a, Traced) for a in flat):
            return func(*args, **(kwargs or {}))
        if func in _FACTORIES:
            args, kwargs = tree_unflatten([a.elem if isinstance(a, Traced) else a for a in flat], spec)
            return func(*args, **kwargs)
        if func is aten._linalg_check_errors.default:
            return None
        if self.decompositions:
            args, kwargs = tree_unflatten(flat, spec)
            with self:
                out = self.decompositions.get(func, func.decompose)(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten.cholesky.default:
            upper = args[1] if len(args) > 1 else False
            return self.__torch_dispatch__(aten.linalg_cholesky_ex.default, types, (args[0],), {"upper": upper})[0]
        if func is aten.select_scatter.default:
            return self._select_scatter(*args)
        if func is aten.slice_scatter.default:
            return self._slice_scatter(*args, **(kwargs or {}))
        if func in (aten.index.Tensor, aten.index_put.default):
            func, flat, spec = self._integer_indices(func, flat, spec)
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise self.refuse(f"Python code reads the value of a latent ({func})")
        if func is aten.as_strided.default:
            raise self.refuse(f"the result depends on a latent's memory layout ({func})")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refuse(f"the model draws random numbers that depend on a latent ({func})")
        if func._schema.is_mutable:
            raise self.refuse(f"a tensor is changed in place where that can't be followed ({func})", in_place=True)
        out = self._record(_REPLACED.get(func, func), flat, spec)
        if func in _FALLIBLE:
            out = self._nan_where_failed(out)
        return out

    def _record(self, func: Any, flat: list[Any], spec: Any) -> Any:
        """Runs one operation at the traced point and writes it into the graph, once."""
        nodes = [self.node(a) for a in flat]
        # Equal operations on equal nodes are one operation. (repr tells 0.0 from -0.0, and 1 from True.)
        key = (func, str(spec), *(a if isinstance(a, fx.Node) else repr(a) for a in nodes))
        if key in self._done:
            # A fresh wrapper each time, because autograd keeps state on the tensors that an operation returns.
            return tree_map_only(Traced, lambda t: Traced(t.elem, t.node), self._done[key])
        args, kwargs = tree_unflatten([a.elem if isinstance(a, Traced) else a for a in flat], spec)
        out = func(*args, **kwargs)
        same = _same_as(func, args, out)
        if same is not None:
            result: Any = Traced(out, nodes[same])
        else:
            args, kwargs = tree_unflatten(nodes, spec)
            result = self._wrap(out, self.graph.call_function(func, args, kwargs), func)
        self._done[key] = result
        return result

    def _wrap(self, out: Any, node: fx.Node, func: Any) -> Any:
        if isinstance(out, Tensor):
            return Traced(out, node)
        if isinstance(out, (tuple, list)):
            items = (
                self._wrap(o, self.graph.call_function(operator.getitem, (node, i)), func) for i, o in enumerate(out)
            )
            return list(items) if isinstance(out, list) else tuple(items)
        if out is None:
            return None
        raise self.refuse(f"Python code reads the value of a latent ({func})")

    def _call(self, func: Any, *args: Any) -> Any:
        return self._record(func, *tree_flatten((args, {})))

    def _nan_where_failed(self, out: tuple[Traced, ...]) -> tuple[Any, ...]:
        ok = self._call(aten.eq.Scalar, out[-1], 0)
        nan = torch.tensor(float("nan"), dtype=out[0].dtype, device=out[0].device)
        masked = []
        for o in out[:-1]:
            if o.dtype.is_floating_point:
                shape = [*ok.shape, *([1] * (o.ndim - ok.ndim))]
                o = self._call(aten.where.self, self._call(aten.reshape.default, ok, shape), o, nan)
            masked.append(o)
        return (*masked, out[-1])

    def _select_scatter(self, x: Tensor, source: Tensor, dim: int, index: int) -> Any:
        """As a slice of length one: the gradient of a batched select_scatter is wrong in torch 2.13."""
        index %= x.shape[dim]
        row = self._call(aten.unsqueeze.default, source, dim)
        return self._call(aten.slice_scatter.default, x, row, dim, index, index + 1)

    def _slice_scatter(
        self, x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> Any:
        """With places counted from the front: batched, torch 2.13 fails at those counted from the end."""
        start, end, step = slice(start, end, step).indices(x.shape[dim])
        return self._record(aten.slice_scatter.default, *tree_flatten(((x, source, dim, start, end, step), {})))

    def _integer_indices(self, func: Any, flat: list[Any], spec: Any) -> tuple[Any, list[Any], Any]:
        """Masks made of data become integer indices, which can be batched; traced masks have no fixed shape."""
        (x, indices, *rest), kwargs = tree_unflatten(flat, spec)
        new: list[Any] = []
        for index in indices:
            if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
                new.append(index)
            elif not isinstance(index, Traced):
                new.extend(index.nonzero(as_tuple=True))
            elif len(indices) == 1 and len(rest) == 1 and rest[0].numel() == 1:  # x[mask] = one value
                mask = self._call(aten.reshape.default, index, [*index.shape, *[1] * (x.ndim - index.ndim)])
                return aten.where.self, *tree_flatten(((mask, rest[0], x), {}))
            else:
                raise self.refuse(f"a latent decides which elements are selected ({func})")
        return func, *tree_flatten(((x, new, *rest), kwargs))


def trace(
    function: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> Recording:
    """Runs `function` once on traced inputs and returns the graph of what depends on them.

    Args:
        function: takes the inputs by position, in order; returns tensors by name.
        inputs: the graph's inputs by name, at the point where it is traced.
        decompositions: operations that are to be written as simpler ones, and how.

    Returns:
        The recording of all outputs.

    Raises:
        TraceError: if Python code reads the value of a traced tensor, or an operation can't be recorded. The
            message says what was met and, where it can be found, the line of the user's code.
    """
    tracer = _Tracer(decompositions)
    try:
        return _run(tracer, function, inputs)
    except Exception as error:
        if not tracer.in_place:
            raise _as_trace_error(error, tracer) from error
    tracer = _Tracer(decompositions)
    try:
        with _NoMemory():
            return _run(tracer, function, inputs, functionalize=True)
    except Exception as error:
        raise _as_trace_error(error, tracer) from error


def _run(
    tracer: _Tracer,
    function: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    *,
    functionalize: bool = False,
) -> Recording:
    names: list[str] = []

    def flat(*args: Tensor) -> list[Tensor]:
        outputs = function(*args)
        names.extend(outputs)
        return list(outputs.values())

    run = torch.func.functionalize(flat) if functionalize else flat
    traced = [tracer.placeholder(name, value) for name, value in inputs.items()]
    with torch.no_grad(), tracer, _NoSqueezeInPlace():
        values = run(*traced)
        outputs = {name: tracer.node(tracer.lift(value)) for name, value in zip(names, values, strict=True)}
    tracer.check_constants()
    return Recording(tracer.root, tracer.graph, outputs)


def _as_trace_error(error: Exception, tracer: _Tracer) -> TraceError:
    if tracer.refusal is not None:
        reason = tracer.refusal
    elif isinstance(error, TraceError):
        reason = str(error)
    elif "data is not allocated" in str(error):
        reason = "Python code reads the memory of a latent (torch.tensor of latents? torch.stack keeps them)"
    else:
        reason = f"{type(error).__name__} while tracing: {str(error).strip()}"
    return TraceError(reason + _users_line(error))


_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


class _NoSqueezeInPlace(TorchFunctionMode):
    """A vector times a matrix without the `squeeze_` by which torch computes it, which no trace can follow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MATMUL and len(args) == 2 and args[0].ndim == 1 and args[1].ndim > 1:
            return func(args[0].unsqueeze(0), args[1]).squeeze(-2)
        return func(*args, **(kwargs or {}))


class _NoMemory(TorchFunctionMode):
    """Under `functionalize`, reading a tensor's memory raises instead of returning what happens to lie there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS_MEMORY and torch._is_functional_tensor(args[0]):
            raise TraceError(f"Python code reads the memory of a tensor (Tensor.{name})")
        return func(*args, **(kwargs or {}))


def _same_as(func: Any, args: tuple[Any, ...], out: Any) -> int | None:
    """Which argument the result is a mere copy of, if any."""
    if func in _COPIES or (func in NEUTRAL and isinstance(args[1], (int, float)) and args[1] == NEUTRAL[func]):
        which = 0
    elif func is aten.copy.default:
        which = 1
    else:
        return None
    like = args[which]
    same = out.shape == like.shape and out.dtype == like.dtype and out.device == like.device
    return which if same else None


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


_LIBRARIES = tuple(
    str(Path(p).resolve())
    for p in (*torch.__path__, *pyro.__path__, Path(__file__).parents[1], sysconfig.get_path("stdlib"))
)


def _users_line(error: BaseException) -> str:
    """The deepest line of the traceback that belongs to no library, as words."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not str(Path(frame.filename).resolve()).startswith(_LIBRARIES):
            return f", at {Path(frame.filename).name}:{frame.lineno}: `{(frame.line or '').strip()}`"
    return ""
