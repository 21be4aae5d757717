r"""The dense network behind a coupling: some coordinates, and perhaps a context, to the parameters of the others.

h_1 = act(W_1 x + V c + b_1), h_j = act(W_j h_{j-1} + b_j), out = W_L h_{L-1} + b_L. The last layer starts at zero,
so a flow whose map is the identity at zero parameters starts as the identity.

A layer's path score needs, beside the network's value, one pullback g -> (d out/dx)^T g. `dense`, `dense_pullback` and
`dense_backward` are the network with its derivatives written by hand: at a few hundred particles and a few dozen units
a step costs what its number of torch calls costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.checks import layer_sizes, one_of
from flowvi.errors import OptionError

# name -> (the function, in-place form, g * act'(.) from g and the output h): a tape of outputs is enough for all three
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (torch.relu, torch.relu_, lambda g, h: torch.ops.aten.threshold_backward(g, h, 0)),
    "tanh": (torch.tanh, torch.tanh_, torch.ops.aten.tanh_backward),
    "elu": (F.elu, lambda a: F.elu(a, inplace=True), lambda g, h: torch.ops.aten.elu_backward(g, 1, 1, 1, True, h)),
}


class ZeroStart(nn.Module):
    """A network whose last layer starts at zero, so that the flow starts as the identity."""

    layers: Sequence[nn.Linear]

    @torch.no_grad()
    def stir(self, size: float) -> None:
        """Draw the last layer's weights at random instead, N(0, size^2 / inputs): outputs of the order of `size`.

        Where a target or data are symmetric about the axes, the identity is a saddle of a coupling flow: no layer
        gains anything on its own.
        """
        if "layers" in self._modules:
            weight = self.layers[-1].weight
            weight.copy_(size / max(1, weight.shape[1]) ** 0.5 * torch.randn(weight.shape))


class DenseNetwork(ZeroStart):
    """A dense network of x (..., n) and, if context_dim > 0, a context (..., C); it is zero at its start.

    Args:
        input_dim: n; 0 leaves the context alone, and with no context either, a bias: parameters without inputs.
        hidden_dims: sizes of the hidden layers.
        output_dim: m.
        context_dim: C, or 0 for no context.
        activation: "relu", "tanh" or "elu".

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> DenseNetwork(3, (32, 32), 4)(torch.randn(5, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        context_dim: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        one_of(ACTIVATIONS, activation=activation)
        layer_sizes(hidden_dims)
        self.input_dim, self.output_dim, self.context_dim = input_dim, output_dim, context_dim
        self.activation = activation
        if input_dim + context_dim == 0:
            self.bias = nn.Parameter(torch.zeros(output_dim))
            return
        sizes = [input_dim or context_dim, *hidden_dims, output_dim]
        linears = [nn.Linear(i, o) for i, o in pairwise(sizes)]
        self.layers = nn.ModuleList(linears)  # type: ignore[assignment]
        last = [linears[-1].weight, linears[-1].bias]
        if input_dim and context_dim:
            self.context_layer = nn.Linear(context_dim, sizes[1], bias=False)
            if not hidden_dims:
                last.append(self.context_layer.weight)
        for p in last:
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Out (..., m) of x (..., n) and the context (..., C), whose batch shapes broadcast."""
        if self.input_dim + self.context_dim == 0:
            return self.bias.expand(*x.shape[:-1], -1)
        if self.input_dim == 0:
            context = self._from_context(context)
            h = self.layers[0](context.expand(*torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]), -1))
        else:
            h = self.layers[0](x)
            if self.context_dim:
                h = h + self._from_context(context)
        function = ACTIVATIONS[self.activation][0]
        for layer in self.layers[1:]:
            h = layer(function(h))
        return h

    def flat_layers(self, batch: torch.Size, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and biases of all layers, as `dense` takes them: the context's part is in the first bias.

        With n = 0 all that does not depend on x is one bias, after a weight of shape (m, 0).

        Args:
            batch: the batch shape of x, which `dense` takes as rows.
            context: (..., C), broadcast against x.
        """
        if self.input_dim == 0:
            like = next(self.parameters())
            out = self.bias if self.context_dim == 0 else self(like.new_empty(*batch, 0), context)
            return [like.new_empty(self.output_dim, 0)], [out.reshape(-1, self.output_dim) if out.dim() > 1 else out]
        linears = cast("list[nn.Linear]", list(self.layers))
        weights: list[Tensor] = [layer.weight for layer in linears]
        biases: list[Tensor] = [layer.bias for layer in linears]
        if self.context_dim:
            first = biases[0] + self._from_context(context)
            biases[0] = first if first.dim() == 1 else first.expand(*batch, -1).reshape(-1, first.shape[-1])
        return weights, biases

    def _from_context(self, context: Tensor | None) -> Tensor:
        """The context's part of the first layer, or, with n = 0, the context itself."""
        if context is None:
            raise OptionError(
                f"this network takes a context of size C = {self.context_dim}: use the conditional transform's "
                f"condition(context)."
            )
        return context if self.input_dim == 0 else self.context_layer(context)


# The same network without a tape, for those who write a layer's backward pass by hand. Rows are (N, n); `layers` are
# weights, one matrix (out, in) each, and biases, one (out,) each, or (N, out) where a context shifts each row.


def dense(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str
) -> tuple[Tensor, list[Tensor]]:
    """The network's value (N, m) at x (N, n), and the input of each of its layers; call it with gradients off."""
    in_place = ACTIVATIONS[activation][1]
    inputs = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        inputs.append(in_place(torch.addmm(bias, inputs[-1], weight.t())))
    return torch.addmm(biases[-1], inputs[-1], weights[-1].t()), inputs


def dense_pullback(g: Tensor, weights: Sequence[Tensor], inputs: Sequence[Tensor], activation: str) -> Tensor:
    """(d out/dx)^T g, (N, n), of g (N, m); `inputs` are those of the layers, from `dense`."""
    slope = ACTIVATIONS[activation][2]
    for j in range(len(weights) - 1, 0, -1):
        g = slope(g @ weights[j], inputs[j])
    return g @ weights[0]


def dense_backward(
    g: Tensor, weights: Sequence[Tensor], inputs: Sequence[Tensor], row_biases: Sequence[bool], activation: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of sum(out g) by x, by the weights and by the biases.

    Args:
        g: (N, m).
        weights: of all layers.
        inputs: of the layers, from `dense`.
        row_biases: whether a layer's bias was (N, out).
        activation: a name in `ACTIVATIONS`.
    """
    slope = ACTIVATIONS[activation][2]
    to_weights, to_biases = [], []
    for j in range(len(weights) - 1, -1, -1):
        to_weights.append(g.t() @ inputs[j])
        to_biases.append(g if row_biases[j] else g.sum(0))
        g = g @ weights[j]
        if j > 0:
            g = slope(g, inputs[j])
    return g, to_weights[::-1], to_biases[::-1]
