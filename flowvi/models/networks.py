r"""Maxout layers: h_j = max_{m < M} (W_m x + b_m)_j, a convex piecewise linear unit with M pieces (the window)."""

from __future__ import annotations

from torch import Tensor, nn

from flowvi.checks import positive_integers
from flowvi.kernels.linear import tall
from flowvi.kernels.maxout import largest_of_window

__all__ = ["Maxout"]


class Maxout(nn.Module):
    """H_j(x) = max over a window of M affine maps of x, (..., n) to (..., H).

    Source: Goodfellow et al. 2013, arXiv:1302.4389; with M = 4 the units of Rezende & Mohamed 2015, section 6.2.

    Args:
        input_dim: n.
        output_dim: H.
        window: M; 1 is an affine map.

    Raises:
        OptionError: a number is not a positive integer.

    Example:
        >>> import torch
        >>> from flowvi.models import Maxout
        >>> Maxout(3, 8, window=4)(torch.randn(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, input_dim: int, output_dim: int, window: int = 4) -> None:
        positive_integers(input_dim=input_dim, output_dim=output_dim, window=window)
        super().__init__()
        self.window = window
        self.linear = tall(nn.Linear(input_dim, output_dim * window))

    def forward(self, x: Tensor) -> Tensor:
        """The units at x."""
        # Over a dimension that isn't the last, so that whole rows are compared.
        return largest_of_window(self.linear(x).unflatten(-1, (self.window, -1)))
