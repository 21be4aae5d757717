r"""Autoregressive flows: y_i = tau(x_i; theta_i(x_<i)), one masked network for all i, a triangular Jacobian.

log|det| = sum_i log tau'(x_i). The map is fast one way, one pass of the network, and slow the other: coordinate by
coordinate, D small steps vectorized over the batch. Two flows:

- IAF (Kingma et al. 2016, arXiv:1606.04934, eq. 8 to 11): the fast way is forward, from the base. For variational
  inference: sampling, with log q of the samples, is fast; log q of other values is slow.
- MAF (Papamakarios et al. 2017, arXiv:1705.07057, eq. 3 to 5): the fast way is the inverse. For maximum likelihood:
  log q of data is fast; sampling is slow.

tau(x) = x exp(l) + t by default, with l soft-clipped to (-3, 3), which keeps the scale stable as IAF's gate does
(eq. 13 and 14) and is the identity at zero parameters, as the gate is not.

Path scores, s' = J^-T (s - d log|det J|/dx), with f the fast way. MAF's forward is f^-1, so s' is f's pullback,
d/dy [x(y) . s + log|det df/dy|] at fixed s: one backward pass. IAF's J is f's own, a triangular solve, last coordinate
first: with v = s',

    v_i = (s_i - d log tau'_i/dx_i - p_i) / tau'_i,
    p_i = sum_{j>i} (v_j dtau_j/dtheta_j + d log tau'_j/dtheta_j) . dtheta_j/dx_i,

D small steps again, which pays up to a D of about 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flowvi import kernels
from flowvi.checks import instances, layer_sizes, one_of, shown
from flowvi.errors import OptionError
from flowvi.transforms.elementwise import Elementwise, SoftClippedAffine
from flowvi.transforms.masked import MaskedNetwork
from flowvi.transforms.networked import ConditionalNetworkTransform, NetworkTransform, is_as_written
from flowvi.transforms.networks import DenseNetwork, dense, dense_backward

PATH_SCORE_LIMIT = 16
"""The largest D at which the fast way forward has a path score: its D steps then cost about what the rest does."""


class Autoregressive(NetworkTransform):
    r"""One layer, w_i = tau(v_i; theta_i(v_<i)), or its inverse; the identity at the start.

    Args:
        input_dim: D.
        elementwise: tau, a map of single numbers with its parameters.
        fast: the direction that takes one pass: "forward" (IAF) or "inverse" (MAF).
        hidden_dims: sizes of the network's hidden layers; by default two of max(32, 2 D), of no more than max(256, D)
            units. A layer of fewer than D - 1 units hides some coordinates from some of those after them.
        order: the ordering: a permutation of 0..D-1, "random" for one from torch's generator, or None for 0, 1, ....
        context_dim: C, or 0 for no context.
        activation: the network's, "relu", "tanh" or "elu".

    Raises:
        OptionError: an argument can't be used.
    """

    order: Tensor | None
    rank: Tensor | None

    def __init__(
        self,
        input_dim: int,
        elementwise: Elementwise,
        *,
        fast: str,
        hidden_dims: Sequence[int] | None = None,
        order: Sequence[int] | str | None = None,
        context_dim: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        one_of(("forward", "inverse"), fast=fast)
        instances(Elementwise, elementwise=elementwise)
        if hidden_dims is not None:
            layer_sizes(hidden_dims)
        if isinstance(order, str) and order == "random":
            order = torch.randperm(input_dim).tolist()
        if order is not None and not _is_permutation(order, input_dim):
            raise OptionError(
                f"order must be a permutation of 0..{input_dim - 1}, 'random' or None, not {shown(order)}."
            )
        indices = None if order is None else torch.tensor([int(i) for i in order])
        self.register_buffer("order", indices)
        self.register_buffer("rank", None if indices is None else torch.argsort(indices))
        self.elementwise, self.fast = elementwise, fast
        self.has_path_score = fast == "inverse" or input_dim <= PATH_SCORE_LIMIT  # type: ignore[misc]
        hidden = [max(32, min(2 * input_dim, 256), input_dim)] * 2 if hidden_dims is None else list(hidden_dims)
        self.network = (
            _FirstOnly(0, hidden, elementwise.num_params, context_dim, activation)
            if input_dim == 1
            else MaskedNetwork(
                input_dim,
                hidden,
                elementwise.num_params,
                context_dim=context_dim,
                activation=activation,
            )
        )

    def forward_given(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `NetworkTransform`."""
        return self._in_one_pass(x, context) if self.fast == "forward" else self._step_by_step(x, context)

    def inverse_given(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `NetworkTransform`."""
        return self._step_by_step(y, context) if self.fast == "forward" else self._in_one_pass(y, context)

    def score_given(self, x: Tensor, score: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `NetworkTransform`; the score comes without a graph, y and log|det| with theirs."""
        return (self._score_fast if self.fast == "forward" else self._score_slow)(x, score, context)

    def _sorted(self, x: Tensor) -> Tensor:
        """The coordinates in the ordering, as the network takes them."""
        return x if self.order is None else x.index_select(-1, self.order)

    def _unsorted(self, x: Tensor) -> Tensor:
        return x if self.rank is None else x.index_select(-1, self.rank)

    def _in_one_pass(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._sorted(x)
        y, log_slope = self.elementwise.forward(x, self.network(x, context))
        return self._unsorted(y), log_slope.sum(-1)

    def _step_by_step(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self.network, _FirstOnly):
            x, log_slope = self.elementwise.inverse(y, self.network(y, context))
            return x, log_slope.sum(-1)
        y, context, batch = _flat(self._sorted(y), context)
        columns = y.unbind(-1)
        x, log_slope = self.network.solve(lambda i, theta: self.elementwise.inverse(columns[i], theta), y, context)
        return self._unsorted(x).reshape(*batch, self.input_dim), log_slope.sum(-1).reshape(batch)

    def _score_slow(self, x: Tensor, score: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self._step_by_step(x, context)
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            back, back_det = self._in_one_pass(leaf, context)
            ones = torch.ones_like(back_det)
            new = torch.autograd.grad((back, back_det), leaf, (score.expand_as(back), ones))[0]
        return y, log_det, new

    def _score_fast(self, x: Tensor, score: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.network, _FirstOnly):
            theta = self.network(x, context)
            y, log_slope = self.elementwise.forward(x, theta)
            with torch.no_grad():
                new, _ = self.elementwise.score(self.elementwise.forward_with_tape(x, theta)[2], score)
            return y, log_slope.sum(-1), new
        x, context, batch = _flat(self._sorted(x), context)
        score = self._sorted(score).expand(*batch, -1).reshape(x.shape)
        weights, biases = self.network.flat_layers(context)
        y, log_det, new = _WithScore.apply(self, x, score, *weights, *biases)
        y, new = self._unsorted(y), self._unsorted(new)
        return y.reshape(*batch, self.input_dim), log_det.reshape(batch), new.reshape(*batch, self.input_dim)

    def bind(self, num_particles: int, with_score: bool) -> Any:
        """See `InvertibleMap`: the fast way forward, without a context, for layers that scale and shift."""
        network, tau = self.network, self.elementwise
        usual = type(tau) is SoftClippedAffine and self.fast == "forward" and not self.context_dim
        if not usual or type(network) is not MaskedNetwork or not is_as_written(self, Autoregressive):
            return None
        if (with_score and not self.has_path_score) or not network.layers[0].weight.is_cpu:
            return None
        return kernels.autoregressive_step(
            [(layer.weight, layer.bias) for layer in network.layers],
            [layer.mask for layer in network.layers],
            network._ends,
            torch.arange(self.input_dim).numpy() if self.order is None else self.order.numpy(),
            activation=network.activation,
            clip=tau.clip,  # type: ignore[attr-defined]
            num_particles=num_particles,
            with_score=with_score,
        )

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, {self.elementwise}"


def _is_permutation(order: Any, num: int) -> bool:
    try:
        return sorted(int(i) for i in order) == list(range(num))
    except (TypeError, ValueError):
        return False


class _FirstOnly(DenseNetwork):
    """The network at D = 1, where nothing comes before the only coordinate: theta (..., 1, P) of the context alone."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, context).unsqueeze(-2)


class _WithScore(torch.autograd.Function):
    """Value, log-determinant and path score the fast way, as one node with a backward pass written by hand."""

    @staticmethod
    def forward(
        ctx: Any, layer: Autoregressive, x: Tensor, score: Tensor, *weights_and_biases: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tau, network = layer.elementwise, cast(MaskedNetwork, layer.network)
        depth = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:depth], weights_and_biases[depth:]
        out, inputs = dense(x, weights, biases, network.activation)
        y, log_slope, tape = tau.forward_with_tape(x, out.unflatten(-1, (network.input_dim, network.num_params)))
        # The new score and theta's cotangent are affine in the score before: two values give all.
        new, to_theta = tau.score(tape, score)
        slope = tau.score(tape, score + 1)[1] - to_theta
        new = new - network.solve_transposed(weights, inputs, to_theta, slope) * torch.exp(-log_slope)
        ctx.tau, ctx.activation, ctx.tape = tau, network.activation, (weights, biases, inputs, tape)
        ctx.mark_non_differentiable(new)
        ctx.set_materialize_grads(False)
        return y, log_slope.sum(-1), new

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_y: Tensor | None, to_log_det: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        weights, biases, inputs, tape = ctx.tape
        if to_y is None:
            if to_log_det is None:
                return (None,) * len(ctx.needs_input_grad)
            to_y = torch.zeros_like(inputs[0])
        to_x, to_theta = ctx.tau.backward(tape, to_y, None if to_log_det is None else to_log_det.unsqueeze(-1))
        rows = [bias.dim() > 1 for bias in biases]
        through, to_weights, to_biases = dense_backward(to_theta.flatten(-2), weights, inputs, rows, ctx.activation)
        return None, to_x + through if ctx.needs_input_grad[1] else None, None, *to_weights, *to_biases


def _flat(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, torch.Size]:
    """X (N, D) and the context (N, C) in one batch dimension, and the batch shape they had together."""
    batch = x.shape[:-1]
    if context is not None:
        batch = torch.broadcast_shapes(batch, context.shape[:-1])
        context = context.expand(*batch, -1).reshape(batch.numel(), context.shape[-1])
    return x.expand(*batch, -1).reshape(batch.numel(), x.shape[-1]), context, batch


class IAF(Autoregressive):
    r"""An inverse autoregressive layer, y_i = x_i exp(l_i(x_<i)) + t_i(x_<i): fast forward, slow inverse.

    Source: Kingma et al. 2016, arXiv:1606.04934, eq. 8 to 11.

    Args:
        input_dim: D.
        clip: the bound of |l_i|.
        **options: of `Autoregressive` (hidden_dims, order, context_dim, activation).

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import IAF
        >>> layer = IAF(3)
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(layer.inv(layer(x) + 0), x, atol=1e-5))
        True
    """

    def __init__(self, input_dim: int, *, clip: float = 3.0, **options: Any) -> None:
        super().__init__(input_dim, SoftClippedAffine(clip), fast="forward", **options)


class MAF(Autoregressive):
    r"""A masked autoregressive layer, x_i = y_i exp(l_i(y_<i)) + t_i(y_<i): fast inverse (density), slow forward.

    Source: Papamakarios et al. 2017, arXiv:1705.07057, eq. 3 to 5, with (t, l) for (-mu exp(-alpha), -alpha).

    Args:
        input_dim: D.
        clip: the bound of |l_i|.
        **options: of `Autoregressive` (hidden_dims, order, context_dim, activation).

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import MAF
        >>> layer = MAF(3)
        >>> layer.invert(torch.randn(5, 3))[1].shape  # log|det dx/dy|, in one pass
        torch.Size([5])
    """

    def __init__(self, input_dim: int, *, clip: float = 3.0, **options: Any) -> None:
        super().__init__(input_dim, SoftClippedAffine(clip), fast="inverse", **options)


def iaf(input_dim: int, **options: Any) -> IAF:
    """An `IAF` layer; `options` are its keywords."""
    return IAF(input_dim, **options)


def maf(input_dim: int, **options: Any) -> MAF:
    """A `MAF` layer; `options` are its keywords."""
    return MAF(input_dim, **options)


def alternating(
    layer: Callable[..., Autoregressive], input_dim: int, num_flows: int, *, order: Any = None, **options: Any
) -> list[Any]:
    """K layers, every second with the reversed ordering (Papamakarios et al. 2017, section 4.3).

    Args:
        layer: layer(input_dim, order=..., **options) -> one layer.
        input_dim: D.
        num_flows: K.
        order: "random" for an own ordering in each layer; None to alternate.
        **options: of the layer.
    """
    backwards = list(range(input_dim - 1, -1, -1))
    orders = [order if order is not None or k % 2 == 0 else backwards for k in range(num_flows)]
    return [layer(input_dim, order=o, **options) for o in orders]


def iaf_stack(input_dim: int, num_flows: int = 4, **options: Any) -> list[Any]:
    """K `IAF` layers whose orderings alternate; see `alternating`."""
    return alternating(IAF, input_dim, num_flows, **options)


def maf_stack(input_dim: int, num_flows: int = 4, **options: Any) -> list[Any]:
    """K `MAF` layers whose orderings alternate; see `alternating`."""
    return alternating(MAF, input_dim, num_flows, **options)


def conditional_iaf(input_dim: int, context_dim: int, **options: Any) -> ConditionalNetworkTransform:
    """An `IAF` layer whose network takes a context (..., C) beside x; the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        **options: keywords of `IAF`.
    """
    return ConditionalNetworkTransform(IAF(input_dim, context_dim=context_dim, **options))


def conditional_maf(input_dim: int, context_dim: int, **options: Any) -> ConditionalNetworkTransform:
    """A `MAF` layer whose network takes a context (..., C) beside y; the identity at the start for every context.

    Args:
        input_dim: D.
        context_dim: C.
        **options: keywords of `MAF`.
    """
    return ConditionalNetworkTransform(MAF(input_dim, context_dim=context_dim, **options))
