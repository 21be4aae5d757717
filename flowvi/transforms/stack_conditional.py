"""Stacks of planar or radial layers whose parameters come from a context: K layers of each datum's own, fused.

A context c_n gives datum n the parameters of all its K layers at once, and the whole minibatch goes through one
kernel call. The mathematics is that of `PlanarStack` and `RadialStack`; only the parameters have dimensions in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from flowvi import kernels
from flowvi.checks import flags, positive_integers
from flowvi.kernels.linear import tall
from flowvi.transforms.base import Conditioned, check_context
from flowvi.transforms.planar import _check_constraint, hidden_sizes


class _Rows:
    """Points (..., D) as the kernels want them, (*front, S, D), where `front` is the parameters' batch shape.

    What stands left of `front` in the points' batch shape (particles, say) becomes S.

    Args:
        x: points, (..., D).
        front: the parameters' batch shape, broadcast against that of the points.
    """

    def __init__(self, x: Tensor, front: torch.Size) -> None:
        lead = x.shape[:-1]
        same = lead[len(lead) - len(front) :] == front  # as in a fit, where torch's own function would take its time
        self.full = lead if same else torch.broadcast_shapes(lead, front)
        while len(front) and front[0] == 1:
            front = front[1:]
        self.front = self.full[len(self.full) - len(front) :]
        self.num_ones = len(front)

    def stack(self, x: Tensor) -> Tensor:
        """(*front, S, D) of points (..., D)."""
        x = x.expand(*self.full, x.shape[-1])
        return x.reshape(-1, *self.front, x.shape[-1]).movedim(0, -2)

    def parameters(self, params: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        """The parameters with `front` in front; `dims` says how many dimensions each has of its own."""
        each = []
        for p, own in zip(params, dims, strict=True):
            tail = p.shape[p.dim() - own :]
            lead = p.shape[p.dim() - own - self.num_ones : p.dim() - own]
            each.append(p.reshape(*lead, *tail).expand(*self.front, *tail))
        return each

    def points(self, y: Tensor) -> Tensor:
        """(..., D) of (*front, S, D)."""
        return y.movedim(-2, 0).reshape(*self.full, y.shape[-1])

    def numbers(self, v: Tensor) -> Tensor:
        """(...) of (*front, S)."""
        return v.movedim(-1, 0).reshape(self.full)


class _PlanarLayers:
    """K planar layers at parameters w, u (..., K, D) and b (..., K), for `ConditionedStack`; w may be (K, D)."""

    has_path_score: ClassVar[bool] = True

    @staticmethod
    def _arranged(x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[_Rows, list[Tensor]]:
        rows = _Rows(x, u.shape[:-2])
        if w.dim() == 2:  # shared by all data
            return rows, [w, *rows.parameters((u, b), (2, 1))]
        return rows, rows.parameters((w, u, b), (2, 2, 1))

    @staticmethod
    def _forward(x: Tensor, *params: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
        rows, at = _PlanarLayers._arranged(x, *params)
        y, log_det, _ = kernels.planar_stack(rows.stack(x), at[0], at[1], at[2], constraint)
        return rows.points(y), rows.numbers(log_det)

    @staticmethod
    def _inverse(y: Tensor, *params: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
        rows, at = _PlanarLayers._arranged(y, *params)
        x, log_det = kernels.planar_stack_inverse(rows.stack(y), at[0], at[1], at[2], constraint)
        return rows.points(x), rows.numbers(log_det)

    @staticmethod
    def _score(x: Tensor, score: Tensor, *params: Tensor, constraint: str) -> tuple[Tensor, Tensor, Tensor]:
        rows, at = _PlanarLayers._arranged(x, *params)
        out = kernels.planar_stack_score(rows.stack(x), rows.stack(score), at[0], at[1], at[2], constraint)
        return rows.points(out[0]), rows.numbers(out[1]), rows.points(out[3])


class _RadialLayers:
    """K radial layers at parameters z0 (..., K, D), raw_alpha and raw_s (..., K), for `ConditionedStack`."""

    has_path_score: ClassVar[bool] = True

    @staticmethod
    def _arranged(x: Tensor, *params: Tensor) -> tuple[_Rows, list[Tensor]]:
        rows = _Rows(x, params[0].shape[:-2])
        return rows, rows.parameters(params, (2, 1, 1))

    @staticmethod
    def _forward(x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        rows, at = _RadialLayers._arranged(x, *params)
        y, log_det, _ = kernels.radial_stack(rows.stack(x), at[0], at[1], at[2])
        return rows.points(y), rows.numbers(log_det)

    @staticmethod
    def _inverse(y: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        rows, at = _RadialLayers._arranged(y, *params)
        x, log_det = kernels.radial_stack_inverse(rows.stack(y), at[0], at[1], at[2])
        return rows.points(x), rows.numbers(log_det)

    @staticmethod
    def _score(x: Tensor, score: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, at = _RadialLayers._arranged(x, *params)
        out = kernels.radial_stack_score(rows.stack(x), rows.stack(score), at[0], at[1], at[2])
        return rows.points(out[0]), rows.numbers(out[1]), rows.points(out[3])


class ConditionedStack(Conditioned):
    """All K layers at parameters that came from a context, whose inverse comes with its log-determinant."""

    def inverse(self, y: Tensor) -> Tensor:
        """See `InvertibleMap`."""
        return self.inverse_and_log_det(y)[0]

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `InvertibleMap`."""
        return self.family._inverse(y, *self.params, **self.options)


class ParameterNetwork(nn.Module):
    """A dense network from a context (..., C) to named shapes, which starts at `starts` for every context.

    Args:
        context_dim: C.
        hidden_dims: sizes of the hidden layers; () is linear; two of max(16, 10 C) by default.
        starts: the first value of each parameter.
        shared: how many of them, counted from the first, are learnt once for all contexts.
        gain: of the last layer's inputs. Adam moves every weight as far in a step, and so an output the farther the
            more weights it has; a gain below 1 makes up for that.
    """

    gain: Tensor | None

    def __init__(
        self,
        context_dim: int,
        hidden_dims: Sequence[int] | None,
        starts: Sequence[Tensor],
        *,
        shared: int = 0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        # A buffer, so that weights learnt with another gain are not taken for those of this one.
        self.register_buffer("gain", None if gain == 1 else torch.tensor(gain))
        hidden = hidden_sizes(context_dim, hidden_dims)
        self.context_dim = context_dim
        body: list[nn.Module] = []
        for size_in, size_out in pairwise([context_dim, *hidden]):
            body += [nn.Linear(size_in, size_out), nn.ReLU()]
        self.body = nn.Sequential(*body)
        self.shared = nn.ParameterList(starts[:shared])
        starts = starts[shared:]
        self.shapes = [s.shape for s in starts]
        # A last layer for each parameter: one for all would have its output, and its gradient, cut and copied.
        heads = [tall(nn.Linear([context_dim, *hidden][-1], s.numel())) for s in starts]
        self.heads = nn.ModuleList(heads)
        with torch.no_grad():
            for head, start in zip(heads, starts, strict=True):
                head.weight.zero_()
                head.bias.copy_(start.reshape(-1))

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        """Each parameter at the context, (..., *shape); those that don't depend on it (*shape)."""
        check_context(context, self.context_dim, next(self.heads.parameters()))
        features = self.body(context)
        if self.gain is not None:
            features = self.gain * features
        each = (head(features).unflatten(-1, s) for head, s in zip(self.heads, self.shapes, strict=True))
        return (*self.shared, *each)


class ConditionalStack(ConditionalTransformModule):
    """K layers in one kernel call, their parameters from a context through a hypernetwork.

    Args:
        nn: maps a context (..., C) to the parameters of all K layers.
        layers: the family's mathematics.
        **options: what the mathematics takes beside the parameters.

    Example:
        >>> import torch
        >>> from flowvi.transforms import conditional_planar_stack
        >>> stack = conditional_planar_stack(2, context_dim=3, num_flows=8)
        >>> stack.condition(torch.randn(5, 3))(torch.randn(100, 5, 2)).shape
        torch.Size([100, 5, 2])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, nn: nn.Module, layers: type[Any], **options: Any) -> None:
        super().__init__()
        self.nn, self.layers, self.options = nn, layers, options

    def condition(self, context: Tensor) -> ConditionedStack:
        """The stack at a context of shape (..., C), acting on points (..., D)."""
        return ConditionedStack(self.layers, self.nn(context), **self.options)


_GAIN = 0.25
"""Of the network that gives planar layers their parameters: with 1, and with .1, the fits measured came out worse."""


def _short_bases(num_flows: int, input_dim: int) -> Tensor:
    """(K, D): one random orthogonal basis after the other, so short that a layer begins as nearly linear."""
    bases = [torch.linalg.qr(torch.randn(input_dim, input_dim))[0] for _ in range(-(-num_flows // input_dim))]
    return torch.cat(bases)[:num_flows] / 4


def conditional_planar_stack(
    input_dim: int,
    context_dim: int,
    num_flows: int = 16,
    *,
    hidden_dims: Sequence[int] | None = None,
    constraint: str = "squareplus",
    shared_directions: bool = False,
) -> ConditionalStack:
    """K planar layers with a dense hypernetwork, the identity at the start for every context.

    Source: Rezende & Mohamed 2015, arXiv:1505.05770, section 4 (an inference network gives the flow's parameters).

    Args:
        input_dim: D.
        context_dim: C.
        num_flows: K, at least 1.
        hidden_dims: sizes of the hypernetwork's hidden layers; () makes the parameters linear in the context.
        constraint: "squareplus" or "softplus" (not the identity at the start), as for `Planar`.
        shared_directions: whether the layers' directions w are learnt once for all contexts, so that the context says
            only how far each layer moves what (u and b): half the outputs of the network, and the better fit where K is
            well above D.

    Raises:
        OptionError: an argument can't be used.
    """
    positive_integers(input_dim=input_dim, num_flows=num_flows)
    flags(shared_directions=shared_directions)
    options = {"constraint": _check_constraint(constraint)}
    starts = [_short_bases(num_flows, input_dim), torch.zeros(num_flows, input_dim), torch.randn(num_flows)]
    network = ParameterNetwork(context_dim, hidden_dims, starts, shared=int(shared_directions), gain=_GAIN)
    return ConditionalStack(network, _PlanarLayers, **options)


def conditional_radial_stack(
    input_dim: int, context_dim: int, num_flows: int = 16, *, hidden_dims: Sequence[int] | None = None
) -> ConditionalStack:
    """K radial layers with a dense hypernetwork, the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        num_flows: K, at least 1.
        hidden_dims: as for `conditional_planar_stack`.

    Raises:
        OptionError: an argument can't be used.
    """
    positive_integers(input_dim=input_dim, num_flows=num_flows)
    starts = [torch.randn(num_flows, input_dim), torch.zeros(num_flows), torch.zeros(num_flows)]
    return ConditionalStack(ParameterNetwork(context_dim, hidden_dims, starts), _RadialLayers)
