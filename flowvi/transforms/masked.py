r"""The masked network behind an autoregressive flow: parameters theta_i that see only the coordinates before i.

MADE (Germain et al. 2015, arXiv:1502.03509, section 4). A hidden unit of degree d sees the first d coordinates (eq. 12:
what units of a lower degree get from it is masked out), and the outputs of coordinate i, counted from 0, see the units
of degree i and less (eq. 13). Degrees are spread evenly over 1..D-1, from 0 if there is a context, which every unit
sees. Where a layer has D - 1 units or more (D with a context), each degree occurs, and every output depends on all the
coordinates before it.

Units are sorted by degree. So the units that come to know one more coordinate are one slice of each layer, and the two
triangular problems of an autoregressive flow, solving for x coordinate by coordinate and solving with the transposed
Jacobian, evaluate each unit once: D small steps, but the arithmetic of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.checks import layer_sizes, one_of
from flowvi.errors import OptionError
from flowvi.transforms.networks import ACTIVATIONS, ZeroStart


class MaskedLinear(nn.Linear):
    """A linear layer, weight * mask; the mask, (out, in), follows from the sizes and is not saved."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer(
            "mask", mask.to(self.weight.dtype), persistent=False
        )  # a boolean is converted at each call

    def masked(self) -> Tensor:
        """The weight that is used, (out, in)."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.masked(), self.bias)


class MaskedNetwork(ZeroStart):
    r"""theta_i(x_<i, context): P parameters for each of D coordinates, from those before it; zero at the start.

    Source: Germain et al. 2015, arXiv:1502.03509, section 4.

    Args:
        input_dim: D, at least 2 (at D = 1 there is nothing before the only coordinate).
        hidden_dims: sizes of the hidden layers; D - 1 units or more let every output see all before it.
        num_params: P.
        context_dim: C, or 0 for no context.
        activation: "relu", "tanh" or "elu".

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> MaskedNetwork(3, (32, 32), num_params=2)(torch.randn(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    layers: Sequence[MaskedLinear]

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        num_params: int,
        *,
        context_dim: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        one_of(ACTIVATIONS, activation=activation)
        layer_sizes(hidden_dims)
        self.input_dim, self.num_params, self.context_dim, self.activation = (
            input_dim,
            num_params,
            context_dim,
            activation,
        )
        lowest = 0 if context_dim else 1
        degrees = [_spread(h, lowest, input_dim - 1) for h in hidden_dims]
        masks, seen = [], torch.arange(1, input_dim + 1)  # coordinate i is there for the units of degree > i
        for degree in degrees:
            masks.append(degree.unsqueeze(-1) >= seen)
            seen = degree
        masks.append((torch.arange(input_dim).unsqueeze(-1) >= seen).repeat_interleave(num_params, 0))
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks)  # type: ignore[assignment]
        # Of hidden layer j: how many units have degree d (see the first d coordinates), and how many at most d.
        self._added = [torch.bincount(degree, minlength=input_dim).tolist() for degree in degrees]
        self._ends = [list(accumulate(added)) for added in self._added]
        zero = [self.layers[-1].weight, self.layers[-1].bias]
        if context_dim:
            self.context_layer = nn.Linear(context_dim, masks[0].shape[0], bias=False)
            if not degrees:
                zero.append(self.context_layer.weight)
        for p in zero:
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Theta (..., D, P) of x (..., D) and the context (..., C), whose batch shapes broadcast."""
        function = ACTIVATIONS[self.activation][0]
        shift = self._from_context(context)
        for j, layer in enumerate(self.layers):
            x = layer(x if j == 0 else function(x))
            if j == 0 and shift is not None:
                x = x + shift
        return x.unflatten(-1, (self.input_dim, self.num_params))

    def flat_layers(self, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Masked weights, and biases with the context (N, C) in the first, as `networks.dense` takes them."""
        weights: list[Tensor] = [x.masked() for x in self.layers]
        biases: list[Tensor] = [x.bias for x in self.layers]
        shift = self._from_context(context)
        if shift is not None:
            biases[0] = biases[0] + shift
        return weights, biases

    def _from_context(self, context: Tensor | None) -> Tensor | None:
        if not self.context_dim:
            return None
        if context is None:
            raise OptionError(
                f"this transform has context_dim = {self.context_dim}: use its conditional twin's "
                f"condition(context), not the transform alone."
            )
        return self.context_layer(context)

    def solve(
        self, step: Callable[[int, Tensor], tuple[Tensor, Tensor]], like: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """X found coordinate by coordinate, each from its theta(x_<i).

        Differentiable, to any order, by autograd: every unit is evaluated once.

        Args:
            step: (i, theta_i (N, P)) -> x_i (N,) and a number to be kept beside it, (N,).
            like: (N, D), for N, dtype and device.
            context: (N, C), or None.

        Returns:
            X (N, D) and the numbers that were kept, (N, D).
        """
        function = ACTIVATIONS[self.activation][0]
        weights, flat_biases = self.flat_layers(context)
        biases = [b.unsqueeze(-1) if b.dim() == 1 else b.t() for b in flat_biases]
        # Everything is (features, N) here, so that what a step adds are rows; blocks[j][i] are those of layer j.
        blocks = [[m.split(sizes) for m in (weights[j], biases[j])] for j, sizes in enumerate(self._added)]
        out = [m.split(self.num_params) for m in (weights[-1], biases[-1])]
        empty = like.new_empty((0, like.shape[0]))
        x, hidden = empty, [empty] * len(blocks)
        kept = []
        for i in range(self.input_dim):
            inputs = x
            for j, (w, bias) in enumerate(blocks):
                if self._added[j][i]:
                    new = torch.addmm(bias[i], w[i][:, : inputs.shape[0]], inputs)
                    hidden[j] = torch.cat((hidden[j], function(new)))
                inputs = hidden[j]
            theta = torch.addmm(out[1][i], out[0][i][:, : inputs.shape[0]], inputs)
            x_i, kept_i = step(i, theta.t())
            x = torch.cat((x, x_i.unsqueeze(0)))
            kept.append(kept_i)
        return x.t(), torch.stack(kept, -1)

    @torch.no_grad()
    def solve_transposed(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], offset: Tensor, slope: Tensor
    ) -> Tensor:
        """What a triangular solve with the transposed Jacobian needs, last coordinate first; without a graph.

        With c_i = offset_i - slope_i p_i (P numbers), the cotangent of theta_i, and p_i = sum_j c_j . d theta_j/dx_i,
        the pullback of the coordinates after i: each p_i is found from the c_j that come after it.

        Args:
            weights: of `flat_layers`.
            inputs: of each layer, from `flowvi.transforms.networks.dense` at x (N, D).
            offset: (N, D, P).
            slope: (N, D, P).

        Returns:
            p (N, D).
        """
        function_slope = ACTIVATIONS[self.activation][2]
        num, dim, per = offset.shape
        offsets, slopes = (m.permute(1, 2, 0).unbind() for m in (offset, slope))  # (P, N) each
        hidden = inputs[1:]
        first, *others = [w.t() for w in weights]
        into = first.unbind()
        blocks = [[m.split(sizes) for m in (w, h.t())] for w, h, sizes in zip(others, hidden, self._added, strict=True)]
        g = [offset.new_empty(h.shape[::-1]) for h in hidden]
        g_blocks = [m.split(sizes) for m, sizes in zip(g, self._added, strict=True)]
        c = offset.new_empty(dim * per, num)
        c_blocks = c.split(per)
        p = offset.new_zeros(dim, num)
        p_rows = p.unbind()
        for i in range(dim - 1, -1, -1):
            if i < dim - 1:
                start = (i + 1) * per
                above = c[start:]
                for j in range(len(g) - 1, -1, -1):
                    if self._added[j][i + 1]:
                        w, h = blocks[j]
                        g_blocks[j][i + 1].copy_(function_slope(w[i + 1][:, start:] @ above, h[i + 1]))
                    start = self._ends[j][i]
                    above = g[j][start:]
                torch.mv(above.t(), into[i][start:], out=p_rows[i])
            torch.addcmul(offsets[i], slopes[i], p_rows[i], value=-1, out=c_blocks[i])
        return p.t()


def _spread(num: int, lowest: int, highest: int) -> Tensor:
    """`num` degrees from lowest to highest, as even as can be, sorted; the highest is always there."""
    count = highest - lowest + 1
    return torch.tensor([lowest - 1 - (-(j + 1) * count // num) for j in range(num)])
