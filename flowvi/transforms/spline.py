r"""Neural splines: monotone rational-quadratic functions of each coordinate, with parameters that a network gives.

On [-B, B] the function y = tau(x) passes through K + 1 knots (x_k, y_k) with slopes d_k > 0; outside it is y = x.
Within bin k, with w = x_{k+1} - x_k, h = y_{k+1} - y_k, s = h / w, xi = (x - x_k) / w, t = xi (1 - xi), it is
(Durkan et al. 2019, arXiv:1906.04032, section 3.1; Gregory & Delbourgo 1982)

    y = y_k + h r,   r = xi (s xi + d_k (1 - xi)) / E,     E = s (1 - 2 t) + (d_k + d_{k+1}) t,
    dy/dx = s^2 (d_{k+1} xi^2 + 2 s t + d_k (1 - xi)^2) / E^2.

Every sum here is one of positive terms, so nothing cancels. Nearly the same holds for the inverse in this form (ours;
the paper solves the same quadratic equation with a discriminant b^2 - 4 a c): with r = (y - y_k) / h,
e = d_k (1 - r) - d_{k+1} r and R = sqrt(e^2 + 4 s^2 r (1 - r)) + |e|,

    xi = 2 s r / (2 s r + R) where e >= 0,     1 - xi = 2 s (1 - r) / (2 s (1 - r) + R) elsewhere.

Parameters, 3 K - 1 for each coordinate, all of them first multiplied by `DAMPING`: K and K numbers whose softmax gives
the bins' shares of 2 B in x and in y, each at least min_share / K; and K - 1 numbers a that give the inner slopes,
the squareplus (a + sqrt(a^2 + 4)) / 2 above min_slope. At zero all bins are equal and all slopes 1: the identity.
The outer slopes are 1, so that y and dy/dx are continuous.

The derivatives are written by hand: the forward pass keeps the Jacobian of (y, log dy/dx) in x and the bin's four
numbers w, h, d_k, d_{k+1}. All gradients, the inverse's too, and the path score follow from it in a few operations.
Inside, parameters come first and coordinates last: a softmax over 8 numbers that lie side by side takes twenty times
as long as one over 8 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flowvi.checks import one_of, positive_numbers, whole_numbers
from flowvi.errors import OptionError
from flowvi.kernels.tiles import DAMPING
from flowvi.transforms.autoregressive import Autoregressive, alternating
from flowvi.transforms.coupling import Coupling
from flowvi.transforms.elementwise import Elementwise
from flowvi.transforms.networked import ConditionalNetworkTransform

NUM_BINS, BOUND = 16, 5.0

MIN_SHARE = 0.25
"""The least width and height of a bin, in parts of 2 B / K. Narrow bins and flat slopes make spikes of the gradient."""

MIN_SLOPE = 0.05
"""The least slope at a knot."""


@dataclass(frozen=True)
class Box:
    """What is fixed of a spline: see `RationalQuadratic`."""

    num_bins: int
    bound: float
    min_share: float
    min_slope: float


class Tape(NamedTuple):
    """What the derivatives at one point of each spline are made of; `inside` is 1 in the box and 0 outside it."""

    by_y: Tensor
    """dy/d(x, w, h, d_k, d_{k+1}) inside, 0 outside, (5, ...)."""
    by_log: Tensor
    """The same of log dy/dx."""
    inside: Tensor
    """(...)."""
    shares: Tensor
    """The softmax of the bins' parameters, (2, K, ...): in x and in y."""
    slope_by_raw: Tensor
    """Of the inner slopes, (K - 1, ...)."""
    before: Tensor
    """1 for each bin that ends at or left of the point, (K, ...)."""
    here: Tensor
    """1 for the bin of the point, (K, ...)."""


class RationalQuadratic(Elementwise):
    """A monotone rational-quadratic spline on [-B, B] and y = x outside; the identity at zero. P = 3 K - 1.

    Source: Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032, section 3.1.

    Args:
        num_bins: K, at least 2.
        bound: B.
        min_share: the least width and height of a bin, in parts of 2 B / K, between 0 and 1.
        min_slope: the least slope at a knot, between 0 and 1.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms.spline import RationalQuadratic
        >>> spline = RationalQuadratic(num_bins=8)
        >>> x, params = torch.randn(5, 2), torch.randn(5, 2, spline.num_params)
        >>> y, log_slope = spline.forward(x, params)
        >>> bool(torch.allclose(spline.inverse(y, params)[0], x, atol=1e-4))
        True
    """

    def __init__(
        self,
        num_bins: int = NUM_BINS,
        bound: float = BOUND,
        min_share: float = MIN_SHARE,
        min_slope: float = MIN_SLOPE,
    ) -> None:
        whole_numbers(2, num_bins=num_bins)
        positive_numbers(bound=bound, min_share=min_share, min_slope=min_slope)
        if max(min_share, min_slope) >= 1:
            raise OptionError(f"min_share and min_slope must be below 1, not {min_share!r} and {min_slope!r}.")
        self.box = Box(num_bins, float(bound), float(min_share), float(min_slope))
        self.num_params = 3 * num_bins - 1

    @property
    def kernel(self) -> tuple[str, tuple[float, ...]] | None:
        """See `Elementwise`; a class of its own may be another map."""
        box = self.box
        mine = type(self) is RationalQuadratic
        return ("spline", (box.num_bins, box.bound, box.min_share, box.min_slope)) if mine else None

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        y, log_slope, *_ = _apply(self, x, params, inverse=False)
        return y, log_slope

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        x, log_slope, *_ = _apply(self, y, params, inverse=True)
        return x, log_slope

    def forward_with_tape(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tape]:
        """See `Elementwise`."""
        y, log_slope, *rest = _evaluate(x, params, self.box, inverse=False)
        return y, log_slope, Tape(*rest)

    def score(self, tape: Tape, score: Tensor) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        new = (score - tape.by_log[0]) / (tape.by_y[0] + (1 - tape.inside))
        return new, _to_params(tape, new, tape.by_y * new + tape.by_log, self.box)

    def backward(self, tape: Tape, to_y: Tensor, to_log_slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Elementwise`."""
        return _pullback(tape, to_y, to_log_slope, self.box)

    def forward_with_score(self, x: Tensor, params: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Elementwise`."""
        with torch.enable_grad():
            y, log_slope, *rest = _apply(self, x, params, inverse=False)
        with torch.no_grad():
            return y, log_slope, *self.score(Tape(*rest), score)

    def __repr__(self) -> str:
        return f"RationalQuadratic(num_bins={self.box.num_bins}, bound={self.box.bound:g})"


def _apply(spline: RationalQuadratic, x: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, ...]:
    """`_evaluate` with a graph, where gradients are on."""
    if params.shape[:-1] != x.shape:
        shape = torch.broadcast_shapes(x.shape, params.shape[:-1])
        x, params = x.expand(shape), params.expand(*shape, params.shape[-1])
    if torch.is_grad_enabled():
        return _Spline.apply(x, params, spline.box, inverse)
    return _evaluate(x, params, spline.box, inverse, with_tape=False)


def _evaluate(x: Tensor, params: Tensor, box: Box, inverse: bool, with_tape: bool = True) -> tuple[Tensor, ...]:
    """The image of x (...) at params (..., P), its log-slope, and the fields of `Tape`."""
    ends = (0, 0) * x.dim()
    num_bins, bound, width = box.num_bins, box.bound, 2 * box.bound
    rows = params.movedim(-1, 0).contiguous() * DAMPING
    raw = rows[2 * num_bins :]
    root = torch.sqrt(raw * raw + 4)
    rising = (raw + root) * (0.5 - 0.5 * box.min_slope)  # the squareplus
    knots = F.pad(rising + box.min_slope, (*ends, 1, 1), value=1.0)
    shares = torch.softmax(rows[: 2 * num_bins].unflatten(0, (2, num_bins)), 1)
    size = shares * (width * (1 - box.min_share)) + width * box.min_share / num_bins
    left = size.cumsum(1) - size - bound
    within = x.clamp(-bound, bound)
    past = within >= left[1 if inverse else 0, 1:]
    table = torch.cat((left, size, knots[None, :-1], knots[None, 1:]))
    x0, y0, w, h, d0, d1 = table.gather(1, past.sum(0).expand(6, 1, *x.shape)).squeeze(1).unbind()
    s = h / w
    if inverse:
        xi, co = _solve((within - y0) / h, s, d0, d1)
    else:
        xi = (within - x0) / w
        co = 1 - xi
    # Sums of positive terms give all: p and q, and E = xi p + co q, M = xi q + co p; co = 1 - xi.
    p, q = torch.addcmul(d0 * co, s, xi), torch.addcmul(d1 * xi, s, co)
    xp = xi * p
    e, m = torch.addcmul(xp, co, q), torch.addcmul(xi * q, co, p)
    r = xp / e
    ratio = s / e
    slope = ratio * ratio * m
    in_box = within == x
    inside = in_box.to(x.dtype)
    image = torch.where(in_box, torch.addcmul(x0, w, xi) if inverse else torch.addcmul(y0, h, r), x)
    log_slope = torch.log(slope) * (-inside if inverse else inside)
    if not with_tape:
        return image, log_slope
    # The derivatives of y and log(dy/dx) by xi, s and the slopes, and from them by x, w, h and the slopes.
    t, xx, cc = xi * co, xi * xi, co * co
    even = xx + cc  # 1 - 2 t
    te = t / e
    log_by_xi = 2 * torch.addcmul((q - p) / m, (d0 + d1 - 2 * s) / e, xi - co)
    log_by_s = 2 * (torch.reciprocal(s) + t / m - even / e)
    a = s / e * torch.addcmul(xx, r, even, value=-1)  # s dr/ds
    hte = h * te
    hter = hte * r
    by_both = torch.stack(
        (
            slope,
            -torch.addcmul(s * a, slope, xi),
            r + a,
            hte - hter,
            -hter,
            log_by_xi / w,
            torch.addcmul(s * log_by_s, xi, log_by_xi) / -w,
            log_by_s / w,
            torch.sub(cc / m, te, alpha=2),
            torch.sub(xx / m, te, alpha=2),
        )
    )
    by_y, by_log = (by_both * inside).split(5)
    passed = past.to(x.dtype)
    before, until = F.pad(passed, (*ends, 0, 1)), F.pad(passed, (*ends, 1, 0), value=1.0)
    return image, log_slope, by_y, by_log, inside, shares, rising * DAMPING / root, before, until - before


def _solve(r: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """Xi and 1 - xi of the inverse, by sums of positive terms alone (top of this file)."""
    r = r.clamp(0, 1)
    rest = 1 - r
    e = d0 * rest - d1 * r
    size = torch.sqrt(e * e + 4 * s * s * r * rest) + e.abs()
    low = e >= 0
    near = 2 * s * torch.where(low, r, rest)
    total = near + size
    near, far = near / total, size / total
    return torch.where(low, near, far), torch.where(low, far, near)


def _pullback(tape: Tape, to_y: Tensor | None, to_log: Tensor | None, box: Box) -> tuple[Tensor, Tensor]:
    """The gradients of sum(y to_y) + sum(log(dy/dx) to_log) by x (...) and by the parameters (..., P); None is 0."""
    parts = [by * to for by, to in ((tape.by_y, to_y), (tape.by_log, to_log)) if to is not None]
    five = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    to_x = five[0] if to_y is None else five[0] + (1 - tape.inside) * to_y
    return to_x, _to_params(tape, to_y, five, box)


def _to_params(tape: Tape, to_y: Tensor | None, five: Tensor, box: Box) -> Tensor:
    """The gradient by the parameters (..., P) from those by y_k (to_y) and by x, w, h, d_k, d_{k+1}."""
    shares, here = tape.shares, tape.here
    by_x, _, _, by_d0, by_d1 = five.unbind()
    # x_k is the sum of the sizes before bin k: they get its gradient, and bin k that of its own size.
    lefts = torch.stack((-by_x, torch.zeros_like(by_x) if to_y is None else to_y * tape.inside)).unsqueeze(1)
    weighted = torch.addcmul(lefts * tape.before, five[1:3].unsqueeze(1), here) * shares
    total = weighted.sum(1, keepdim=True)
    to_shares = (weighted - shares * total) * (2 * box.bound * DAMPING * (1 - box.min_share))
    to_slopes = torch.addcmul(by_d0 * here[1:], by_d1, here[:-1]) * tape.slope_by_raw
    return torch.cat((to_shares.flatten(0, 1), to_slopes)).movedim(0, -1)


class _Spline(Function):
    """`_evaluate`, with its derivatives by hand; once differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, params: Tensor, box: Box, inverse: bool) -> tuple[Tensor, ...]:
        return _evaluate(x, params, box, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, ctx.box, ctx.inverse = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_image: Tensor | None, to_log: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if to_image is None and to_log is None:
            return (None,) * 4
        tape = Tape(*ctx.saved_tensors)
        if not ctx.inverse:
            return *_pullback(tape, to_image, to_log, ctx.box), None, None
        # x = f^-1(y; p) and -log f'(x; p): by x, g = to_x - to_log d log f'/dx; by y, g / f'; by p, -(g / f') df/dp
        # - to_log d log f'/dp.
        to_log = None if to_log is None else -to_log
        g = 0.0 if to_image is None else to_image
        if to_log is not None:
            g = g + to_log * tape.by_log[0]
        to_y = g / (tape.by_y[0] + (1 - tape.inside))
        return to_y, _pullback(tape, -to_y, to_log, ctx.box)[1], None, None


class NeuralSpline(Coupling):
    """K coupling layers that move half of the coordinates by splines, y_b = tau(b; theta(a)).

    Each coordinate's map can have many bends, so few layers do; outside the box [-B, B] a layer is the identity.

    Source: Durkan et al. 2019, arXiv:1906.04032 (RQ-NSF (C)).

    Args:
        input_dim: D.
        num_flows: K.
        num_bins: bins of each spline.
        bound: B.
        min_share: as for `RationalQuadratic`.
        min_slope: likewise.
        **options: hidden_dims, activation, mixing, context_dim, start, as for `Coupling`.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch
        >>> from flowvi.transforms import NeuralSpline
        >>> flow = NeuralSpline(4, num_flows=2)
        >>> x = torch.randn(5, 4)
        >>> bool(torch.allclose(flow(x), x, atol=1e-5))  # the identity at the start
        True
    """

    def __init__(
        self,
        input_dim: int,
        num_flows: int = 1,
        *,
        num_bins: int = NUM_BINS,
        bound: float = BOUND,
        min_share: float = MIN_SHARE,
        min_slope: float = MIN_SLOPE,
        **options: Any,
    ) -> None:
        spline = RationalQuadratic(num_bins, bound, min_share, min_slope)
        super().__init__(input_dim, spline, num_flows, **options)


class AutoregressiveSpline(Autoregressive):
    """One autoregressive layer of splines, y_i = tau(x_i; theta_i(x_<i)), or its inverse.

    Source: Durkan et al. 2019, arXiv:1906.04032 (RQ-NSF (AR)).

    Args:
        input_dim: D.
        num_bins: bins of each spline.
        bound: B.
        min_share: as for `RationalQuadratic`.
        min_slope: likewise.
        fast: the direction that takes one pass: "forward" for variational inference, "inverse" for densities of data.
        **options: hidden_dims, order, context_dim, activation, as for `Autoregressive`.

    Raises:
        OptionError: an argument can't be used.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_bins: int = NUM_BINS,
        bound: float = BOUND,
        min_share: float = MIN_SHARE,
        min_slope: float = MIN_SLOPE,
        fast: str = "forward",
        **options: Any,
    ) -> None:
        super().__init__(input_dim, RationalQuadratic(num_bins, bound, min_share, min_slope), fast=fast, **options)


def neural_spline(input_dim: int, *, kind: str = "coupling", **options: Any) -> NeuralSpline | AutoregressiveSpline:
    """One layer of splines, or K in one transform for the coupling.

    Args:
        input_dim: D.
        kind: "coupling", a `NeuralSpline`, or "autoregressive", an `AutoregressiveSpline`.
        **options: keywords of the class.

    Raises:
        OptionError: an argument can't be used.
    """
    return _by_kind(kind)(input_dim, **options)


def neural_spline_stack(
    input_dim: int, num_flows: int = 4, *, kind: str = "coupling", **options: Any
) -> NeuralSpline | list[Any]:
    """K layers of splines: one `NeuralSpline`, or K `AutoregressiveSpline`s whose orderings alternate."""
    layer = _by_kind(kind)
    if layer is NeuralSpline:
        return NeuralSpline(input_dim, num_flows, **options)
    return alternating(layer, input_dim, num_flows, **options)


def conditional_neural_spline(
    input_dim: int, context_dim: int, *, kind: str = "coupling", **options: Any
) -> ConditionalNetworkTransform:
    """`neural_spline` with a context (..., C), C = `context_dim`, as a further input of each network."""
    return ConditionalNetworkTransform(_by_kind(kind)(input_dim, context_dim=context_dim, **options))


def _by_kind(kind: str) -> Any:
    one_of(("coupling", "autoregressive"), kind=kind)
    return NeuralSpline if kind == "coupling" else AutoregressiveSpline
