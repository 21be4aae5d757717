"""An optimizer's steps along a gradient of matrix products that are made a part at a time, and never all of them.

A layer's weights (C', C) have the gradient G' X, of the layer's inputs X (n, C) and its outputs' cotangents G (n, C').
So where a gradient is recorded its products are left open (`flowvi.graph.open_products`), and each part of the weights
is moved as soon as its part of the product is there, in the nearest cache: the gradient is not written to memory, nor
read again. Ranks of one machine exchange G and X, of which each writes its own rows where all of them see them, and
each moves its share of the weights (Xie et al. 2015, arXiv:1511.08486, "sufficient factor broadcasting").

To cut a long gradient takes its length before the first part is moved. So a bound on that is taken, of the factors; and
where the bound is not below what is cut from, the whole gradient is made, and the step is taken as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.fit.adam import FlatParameters
from flowvi.fit.amortized_gradient import AmortizedGradient
from flowvi.fit.descent import OPTIMIZERS, Descent, SharedDescent
from flowvi.fit.distributed import Ranks
from flowvi.fit.gradient import Factors
from flowvi.graph import Opened, Product
from flowvi.kernels import dispatch
from flowvi.kernels.linear import crossprod

__all__ = ["FactoredDescent", "make_descent"]

ALIGNED = 16
"""Numbers that places in common memory begin at a multiple of: a cache line of float32."""

SMALLEST, SMALLEST_ALONE = 50_000, 300_000
"""Numbers of a product from which on it is left open, by several ranks and by one, which has nothing to exchange: that
gains where parameters and moments are more than a cache holds."""

TILE = 1 << 18
"""Numbers of a product that are made at a time: a megabyte of float32."""

CALL, PRODUCT, NARROW = 40_000, 0.025, 48
"""The work of a call, as a multiple of that of moving a parameter, and of a multiplication; and the columns for which
that is twice as much. They say how the work is split over ranks, and nothing else."""

GROUPS = 32
"""Parts of a minibatch whose gradients' lengths are added up for a bound. That is 6 times the length of their sum where
they have nothing in common, less where they are alike, more where they oppose each other. 2,000 steps on MNIST had
at most 2.1 times the gradient's running length."""


def make_descent(
    flat: FlatParameters, ranks: Ranks, optimizer: str, gradient: AmortizedGradient | None = None, **options: Any
) -> Descent | FactoredDescent:
    """The quickest way there is for these ranks.

    Args:
        flat: the parameters, which get the values of rank 0, and may get other memory.
        ranks: over which minibatches are split in equal shares.
        optimizer: one of `OPTIMIZERS`.
        gradient: what fills theirs; from here on it may be left open.
        **options: of the optimizer.
    """
    ranks.broadcast_(flat.vector)
    kind = OPTIMIZERS[optimizer]
    own = 3  # the parameters and two moments, beside a gradient of each rank
    shared = ranks.shared((own + ranks.world, flat.vector.numel()), flat.vector)
    plain = Descent(flat, ranks, kind, options) if shared is None else SharedDescent(flat, ranks, kind, options, shared)
    if gradient is None or dispatch.compiled("descent", flat.grad) is None:
        return plain
    smallest = SMALLEST if ranks.world > 1 else SMALLEST_ALONE
    opened = gradient.openable(smallest)
    if any(other != opened for other in ranks.gather(opened)) or opened is None or not opened.products:
        return plain
    stacks = None
    if ranks.world > 1:
        stacks = None if shared is None else _stacks(opened, ranks, flat.vector)
        if stacks is None:
            return plain
    factors = Factors(stacks and [stack[ranks.share(len(stack))] for stack in stacks])
    gradient.leave_open(factors, smallest)
    return FactoredDescent(plain, opened, factors, stacks)


def _stacks(opened: Opened, ranks: Ranks, like: Tensor) -> list[Tensor] | None:
    """Memory that ranks have in common for the factors of all, one rank's rows after the other's; None without room."""
    shapes = [(ranks.world * n, width) for n, width in opened.shapes]
    ends = list(accumulate(-(-rows * width // ALIGNED) * ALIGNED for rows, width in shapes))
    memory = ranks.shared((ends[-1],), like)
    if memory is None:
        return None
    starts = [0, *ends[:-1]]
    return [memory[at : at + r * w].view(r, w) for at, (r, w) in zip(starts, shapes, strict=True)]


class _Tile(NamedTuple):
    """Rows of a parameter that are moved at once, by this rank.

    Attributes:
        arrays: of the parameter and its two moments, (rows, C).
        product: that these are rows of; None: the gradient is in memory.
        rows: of the product; or the place in the flat gradient.
    """

    arrays: tuple[Any, ...]
    product: Product | None
    rows: slice


class FactoredDescent:
    """The steps of a plain descent, along a gradient that may be left open.

    Args:
        plain: which takes the steps that are not along products.
        opened: what of the gradient is a product of what.
        factors: of this rank's part of the minibatch.
        stacks: of all ranks; None of one rank.

    Attributes:
        state: see `flowvi.fit.descent.Descent`.
    """

    def __init__(self, plain: Descent, opened: Opened, factors: Factors, stacks: list[Tensor] | None) -> None:
        self.plain, self.ranks, self.flat, self.state = plain, plain.ranks, plain.flat, plain.state
        self._opened, self._factors, self._stacks = opened, factors, stacks
        self._parts = self.flat.split(self.flat.grad)
        self._tiles = list(self._tile())
        ends = ((start, start + columns) for start, _, columns, product in self._stretches() if product is None)
        self._others = [self.flat.grad[start:end].numpy() for start, end in ends]
        module = dispatch.compiled("descent", self.flat.grad)
        kind = self.flat.grad.numpy().dtype.type
        self._along = getattr(module, f"{self.plain.optimizer.maker}_rows")(kind)
        self._bound_of, self._square_of = module.make_bound(kind), module.make_square(kind)

    @property
    def skipped(self) -> int:
        """Steps that were not taken."""
        return self.plain.skipped

    def forget(self) -> None:
        """Start again from here."""
        self.plain.forget()

    def step(self, lr: float, elbo: Tensor) -> Tensor:
        """See `flowvi.fit.descent.Descent`."""
        found, self._factors.found = self._factors.found, None
        bound = math.inf if found is None else self._bound(found)
        seen = torch.tensor([float(elbo), bound], dtype=torch.float64)
        mean, bound = self.ranks.mean_(seen).tolist()  # after which all factors are there
        optimizer = self.plain.optimizer
        if not (math.isfinite(mean) and optimizer.is_typical(bound)):
            if found is not None:
                for number, left, right in self._opened.products:
                    self._parts[number].copy_(crossprod(found[left], found[right]))
            return self.plain.step(lr, elbo)
        assert found is not None
        rates, square, factors = optimizer.rates(lr), 0.0, self._stacks or found
        for (p, m, v), product, rows in self._tiles:
            if product is None:
                if isinstance(self.plain, SharedDescent):
                    self.plain.mean(rows)
                scale, along = 1.0, self.flat.grad[rows].view(1, -1)
            else:
                scale = 1 / self.ranks.world
                along = crossprod(factors[product.left][:, rows], factors[product.right])
            square += self._along(p, along.numpy(), m, v, scale, *rates)
        whole = self.ranks.sum_(torch.tensor(square, dtype=torch.float64))  # after which all parameters are there
        optimizer.count(math.sqrt(whole))
        return elbo.new_tensor(mean)

    def _bound(self, found: Sequence[Tensor]) -> float:
        """No less than the length of this rank's gradient, but for rounding."""
        square = sum(self._square_of(numbers) for numbers in self._others)
        for _, left, right in self._opened.products:
            size = -(-len(found[left]) * self.ranks.world // GROUPS)
            square += self._bound_of(found[left].numpy(), found[right].numpy(), size) ** 2
        return math.sqrt(square)

    def _stretches(self) -> Iterator[tuple[int, int, int, Product | None]]:
        """Products, and what lies between them, in the order of the flat vector: where it begins, rows and columns."""
        products = {product.output: product for product in self._opened.products}
        start = end = 0
        for number, part in enumerate(self._parts):
            if number in products:
                if end > start:
                    yield start, end - start, 1, None
                product = products[number]
                if not part.is_contiguous():  # it lies there column by column
                    part, product = part.t(), Product(number, product.right, product.left)
                yield end, *part.shape, product
                start = end + part.numel()
            end += part.numel()
        if end > start:
            yield start, end - start, 1, None

    def _tile(self) -> Iterator[_Tile]:
        """This rank's share of the parameters, a tile at a time; all ranks' shares are as much work."""
        num = self.ranks.world * self._opened.shapes[0][0]
        stretches = list(self._stretches())
        works = [
            CALL + rows * columns * (1 + (PRODUCT * num * (1 + NARROW / columns) if product else 0))
            for _, rows, columns, product in stretches
        ]
        begin, end = (sum(works) * (self.ranks.rank + more) / self.ranks.world for more in (0, 1))
        done = 0.0
        for (start, rows, columns, product), work in zip(stretches, works, strict=True):
            first, last = (round(rows * min(max((at - done) / work, 0), 1)) for at in (begin, end))
            height = max(1, TILE // columns)
            for row in range(first, last, height):
                below = min(row + height, last)
                place = slice(start + row * columns, start + below * columns)
                matrix = (below - row, columns) if product else (1, below - row)
                vectors = (self.flat.vector, *self.state[:2])
                arrays = tuple(vector[place].view(matrix).numpy() for vector in vectors)
                yield _Tile(arrays, product, slice(row, below) if product else place)
            done += work
