r"""Coupling layers: one half of the coordinates moves the other half, b -> tau(b; theta(a)), a stays.

The Jacobian is triangular, so log|det| = sum log tau', and the inverse is tau^-1 with the same theta(a): both
directions cost one network pass. K layers come in pairs that swap halves, so that each pair moves every coordinate.
Between M and M^-1, a fixed mixing of the coordinates (`flowvi.transforms.mixing`), a pair is

    (a, b) = M x,   b' = tau(b; theta_1(a)),   a' = tau(a; theta_2(b')),   y = M^-1 (a', b').

- NICE: tau additive; volumes are kept (Dinh et al. 2015, arXiv:1410.8516; in Rezende & Mohamed 2015,
  arXiv:1505.05770, section 5, as NICE-perm and NICE-orth).
- RealNVP: tau affine, its log-scale softly clipped (Dinh et al. 2017, arXiv:1605.08803).

The path score (s before a layer, s' after it): s_b' = (s_b - d log tau'/db) / tau', and
s_a' = s_a - d/da [b' . s_b' + sum log tau'] with s_b' held fixed: one pullback through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowvi import kernels
from flowvi.checks import finite_numbers, instances, one_of, positive_integers
from flowvi.transforms.elementwise import Additive, Elementwise, InverseAffine, SoftClippedAffine
from flowvi.transforms.mixing import Mixing, Permutation, make_mixing
from flowvi.transforms.networked import ConditionalNetworkTransform, NetworkTransform, is_as_written
from flowvi.transforms.networks import DenseNetwork, dense, dense_backward, dense_pullback

HIDDEN_DIMS = (32, 32)


class Coupling(NetworkTransform):
    """K coupling layers in a row, each of which applies an elementwise tau to half of the coordinates.

    At D = 1 there is no other half: tau's parameters depend on the context alone, if there is one.

    Args:
        input_dim: D.
        elementwise: tau, the identity at zero parameters.
        num_flows: K.
        hidden_dims: sizes of each network's hidden layers.
        activation: between them: "relu", "tanh" or "elu".
        mixing: M, one for each pair of layers: "perm" for a random permutation (none at D = 2, where the two
            coordinates take turns), "orth" for a random orthogonal matrix, "none" for halves as they come.
        context_dim: C, the size of the context; 0 for none.
        start: 0 starts at the identity; above it each layer starts at a random map that moves coordinates by about as
            much. NICE with mixing="perm" needs 1 to leave the best Gaussian of a target that is symmetric about the
            axes, such as U1: there no layer gains anything on its own.

    Raises:
        OptionError: an argument can't be used.
    """

    has_path_score = True

    def __init__(
        self,
        input_dim: int,
        elementwise: Elementwise,
        num_flows: int = 1,
        *,
        hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: str = "relu",
        mixing: str = "perm",
        context_dim: int = 0,
        start: float = 0.0,
    ) -> None:
        super().__init__(input_dim, context_dim=context_dim)
        positive_integers(num_flows=num_flows)
        instances(Elementwise, elementwise=elementwise)
        finite_numbers(start=start)
        self.elementwise, self.num_flows = elementwise, num_flows
        self.activation = activation
        self._sizes = input_dim // 2, input_dim - input_dim // 2
        if input_dim == 2 and mixing == "perm":  # swapped, two layers in a row would move the same coordinate
            mixing = "none"
        self.mixings = nn.ModuleList(make_mixing(mixing, input_dim) for _ in range((num_flows + 1) // 2))
        self.networks = nn.ModuleList()
        for k in range(num_flows):
            stays, moves = self._sizes[::-1] if self._moves_first(k) else self._sizes
            num_out = moves * elementwise.num_params
            network = DenseNetwork(stays, hidden_dims, num_out, context_dim, activation)
            if start:
                network.stir(start)
            self.networks.append(network)

    # The walk through the layers, pair by pair. Each layer sees (a, b), the half that stays and the half that moves;
    # the second of a pair moves the first half, except at D = 1, where a is empty.

    def _pairs(self) -> list[tuple[Mixing, list[int]]]:
        """Each mixing with the numbers of its layers: two, or one at the end of an odd K."""
        numbers = [list(range(k, min(k + 2, self.num_flows))) for k in range(0, self.num_flows, 2)]
        return list(zip(self.mixings, numbers, strict=True))  # type: ignore[arg-type]

    def _moves_first(self, k: int) -> bool:
        """Whether layer k moves the first half."""
        return k % 2 == 1 and self.input_dim > 1

    def _by_coordinate(self, out: Tensor) -> Tensor:
        return out.unflatten(-1, (-1, self.elementwise.num_params))

    def _walk(
        self, x: Tensor, context: Tensor | None, tau: Callable[..., tuple[Tensor, Tensor]], step: int
    ) -> tuple[Tensor, Tensor]:
        """All layers with tau in the middle, in their order (step 1) or against it (step -1)."""
        if context is not None:
            x = _broadcast(x, context)
        log_det = torch.zeros((), dtype=x.dtype, device=x.device)
        for mixing, pair in self._pairs()[::step]:
            halves = mixing(x).split(self._sizes, -1)
            for k in pair[::step]:
                swap = self._moves_first(k)
                a, b = halves[::-1] if swap else halves
                b, log_slope = tau(b, self._by_coordinate(self.networks[k](a, context)))
                halves = (b, a) if swap else (a, b)
                log_det = log_det + log_slope.sum(-1)
            x = mixing.undo(torch.cat(halves, -1))
        return x, log_det

    def forward_given(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `NetworkTransform`."""
        return self._walk(x, context, self.elementwise.forward, 1)

    def inverse_given(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `NetworkTransform`."""
        return self._walk(y, context, self.elementwise.inverse, -1)

    def score_given(self, x: Tensor, score: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `NetworkTransform`; the score comes without a graph."""
        if context is not None:
            x, score = _broadcast(x, context), _broadcast(score, context)
        batch = x.shape[:-1]
        flat = [v.reshape(-1, self.input_dim) for v in (x, score)]
        layers = [cast(DenseNetwork, network).flat_layers(batch, context) for network in self.networks]
        y, log_det, new = _WithScore.apply(self, *flat, *(p for layer in layers for part in layer for p in part))
        return y.reshape(x.shape), log_det.reshape(batch), new.reshape(x.shape)

    def bind(self, num_particles: int, with_score: bool) -> Any:
        """See `InvertibleMap`: without a context, for maps that have a kernel, between permutations."""
        kernel = self.elementwise.kernel
        if kernel is None or self.input_dim == 1 or self.context_dim or not is_as_written(self, Coupling):
            return None
        usual = all(type(network) is DenseNetwork for network in self.networks)
        known = all(type(mixing) in (Mixing, Permutation) for mixing in self.mixings)
        if not (usual and known and next(self.parameters()).is_cpu):
            return None
        networks = [[(cast(Tensor, d.weight), cast(Tensor, d.bias)) for d in n.layers] for n in self.networks]  # type: ignore[union-attr]
        order, num_stay = [], []
        for mixing, pair in self._pairs():
            mixed = mixing(torch.arange(self.input_dim, dtype=torch.int64))
            halves = mixed.split(self._sizes)
            for k in pair:
                a, b = halves[::-1] if self._moves_first(k) else halves
                order.append(torch.cat([a, b]))
                num_stay.append(len(a))
        return kernels.coupling_step(
            networks,
            torch.stack(order).numpy(),
            num_stay,
            activation=self.activation,
            tau=kernel[0],
            fixed=kernel[1],
            num_particles=num_particles,
            with_score=with_score,
        )

    def extra_repr(self) -> str:
        """What print() shows between the brackets."""
        return f"D={self.input_dim}, K={self.num_flows}, {self.elementwise}"


def _broadcast(x: Tensor, context: Tensor) -> Tensor:
    """X with the batch shape that it has together with the context."""
    return x.expand(*torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]), -1)


class _WithScore(torch.autograd.Function):
    """Value, log-determinant and path score of all layers as one node, with a backward pass written by hand.

    Recording each operation, and calling autograd for each pullback, takes about twice as long.
    """

    @staticmethod
    def forward(
        ctx: Any, stack: Coupling, x: Tensor, score: Tensor, *weights_and_biases: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tau, activation = stack.elementwise, stack.activation
        depth = len(weights_and_biases) // (2 * stack.num_flows)
        parts = iter([weights_and_biases[i : i + depth] for i in range(0, len(weights_and_biases), depth)])
        log_det = x.new_zeros(x.shape[:-1])
        ctx.layers = []
        for mixing, pair in stack._pairs():
            halves, scores = mixing(x).split(stack._sizes, -1), mixing(score).split(stack._sizes, -1)
            for k in pair:
                weights, biases = next(parts), next(parts)
                swap = stack._moves_first(k)
                (a, b), (score_a, score_b) = (halves[::-1], scores[::-1]) if swap else (halves, scores)
                out, inputs = dense(a, weights, biases, activation)
                b, log_slope, tape = tau.forward_with_tape(b, stack._by_coordinate(out))
                score_b, to_params = tau.score(tape, score_b)
                score_a = score_a - dense_pullback(to_params.flatten(-2), weights, inputs, activation)
                halves, scores = ((b, a), (score_b, score_a)) if swap else ((a, b), (score_a, score_b))
                log_det += log_slope.sum(-1)
                ctx.layers.append((weights, [bias.dim() > 1 for bias in biases], inputs, tape))
            x, score = mixing.undo(torch.cat(halves, -1)), mixing.undo(torch.cat(scores, -1))
        ctx.stack = stack
        ctx.mark_non_differentiable(score)
        ctx.set_materialize_grads(False)
        return x, log_det, score

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_y: Tensor | None, to_log_det: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        stack: Coupling = ctx.stack
        if to_y is None:
            if to_log_det is None:
                return (None,) * len(ctx.needs_input_grad)
            to_y = to_log_det.new_zeros(*to_log_det.shape, stack.input_dim)
        to_log_slope = None if to_log_det is None else to_log_det.unsqueeze(-1)
        grads: list[Tensor] = []
        for mixing, pair in reversed(stack._pairs()):
            halves = mixing(to_y).split(stack._sizes, -1)  # M^-T = M
            for k in reversed(pair):
                weights, row_biases, inputs, tape = ctx.layers[k]
                swap = stack._moves_first(k)
                to_a, to_b = halves[::-1] if swap else halves
                to_b, to_params = stack.elementwise.backward(tape, to_b, to_log_slope)
                through, to_weights, to_biases = dense_backward(
                    to_params.flatten(-2), weights, inputs, row_biases, stack.activation
                )
                to_a = to_a + through
                halves = (to_b, to_a) if swap else (to_a, to_b)
                grads = [*to_weights, *to_biases, *grads]
            to_y = mixing.undo(torch.cat(halves, -1))
        return None, to_y if ctx.needs_input_grad[1] else None, None, *grads


class NICE(Coupling):
    """K additive coupling layers: y_b = b + t(a); log|det| = 0, so that only the shape of mass changes.

    Source: Dinh, Krueger, Bengio 2015, arXiv:1410.8516, section 3.2, without its last diagonal scaling, which is
    the affine layer of a flow here; mixing as in Rezende & Mohamed 2015, arXiv:1505.05770, section 5.

    Args:
        input_dim: D.
        num_flows: K.
        **options: hidden_dims, activation, mixing, context_dim, start, as for `Coupling`.

    Example:
        >>> import torch
        >>> from flowvi.transforms import NICE
        >>> flow = NICE(4, num_flows=8, mixing="orth")
        >>> x = torch.randn(5, 4)
        >>> flow.log_abs_det_jacobian(x, flow(x)).abs().max().item()
        0.0
    """

    def __init__(self, input_dim: int, num_flows: int = 1, **options: Any) -> None:
        super().__init__(input_dim, Additive(), num_flows, **options)


class RealNVP(Coupling):
    """K affine coupling layers: y_b = b exp(l(a)) + t(a), |l| < clip; log|det| = sum l(a).

    Source: Dinh, Sohl-Dickstein, Bengio 2017, arXiv:1605.08803, section 3.

    Args:
        input_dim: D.
        num_flows: K.
        clip: the bound of the log-scales of one layer: with 3 in place of 2 a deep stack's float32 round trip is a
            hundred times worse, and fits are no better.
        direction: which of the two is b exp(l) + t: "forward", for variational inference, or "inverse", as in the
            source, whose function goes from data to the base.
        **options: hidden_dims, activation, mixing, context_dim, start, as for `Coupling`.

    Example:
        >>> import torch
        >>> from flowvi.transforms import RealNVP
        >>> flow = RealNVP(4, num_flows=8)
        >>> x = torch.randn(5, 4)
        >>> bool(torch.allclose(flow(x), x))  # the identity at the start
        True
    """

    def __init__(
        self, input_dim: int, num_flows: int = 1, *, clip: float = 2.0, direction: str = "forward", **options: Any
    ) -> None:
        one_of(("forward", "inverse"), direction=direction)
        tau = SoftClippedAffine(clip) if direction == "forward" else InverseAffine(clip)
        super().__init__(input_dim, tau, num_flows, **options)


def nice(input_dim: int, num_flows: int = 1, **options: Any) -> NICE:
    """K additive coupling layers, one by default; `options` are keywords of `NICE`."""
    return NICE(input_dim, num_flows, **options)


def real_nvp(input_dim: int, num_flows: int = 1, **options: Any) -> RealNVP:
    """K affine coupling layers, one by default; `options` are keywords of `RealNVP`."""
    return RealNVP(input_dim, num_flows, **options)


def conditional_nice(
    input_dim: int, context_dim: int, num_flows: int = 2, **options: Any
) -> ConditionalNetworkTransform:
    """`nice` with a context (..., C), C = `context_dim`, as a further input of each network; a pair by default."""
    return ConditionalNetworkTransform(NICE(input_dim, num_flows, context_dim=context_dim, **options))


def conditional_real_nvp(
    input_dim: int, context_dim: int, num_flows: int = 2, **options: Any
) -> ConditionalNetworkTransform:
    """`real_nvp` with a context (..., C), C = `context_dim`, as a further input of each network; a pair by default."""
    return ConditionalNetworkTransform(RealNVP(input_dim, num_flows, context_dim=context_dim, **options))
