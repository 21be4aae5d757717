"""The gradient of a minibatch's loss: by autograd, or by a recording of what autograd does, where that does the same.

A recording (`flowvi.graph`) has neither Python modules nor handlers nor a tape in it. It is of one run, so it is used
only where it gives what the function gives for other data, other parameters and other random numbers; and whoever
takes many steps asks again from time to time (`Gradient.holds`), for code that changes in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flowvi.fit.adam import FlatParameters
from flowvi.graph import Opened, emit, keep, open_products, record, tidy
from flowvi.random_state import kept

__all__ = ["LOOK_EVERY", "Factors", "Gradient", "RecordedGradient", "make_gradient"]

LOOK_EVERY = 500
"""Steps at least between two looks whether a recording still holds."""

AGREE = 1e-2
"""Largest difference of two gradients, relative to their length: sums may be in another order, and by the rounding of
that a rectifier or a maximum may choose the other side."""

ASIDE = 1e-2
"""How far, relatively, parameters are moved to see whether a recording reads them."""

Loss = Callable[..., tuple[Tensor, Tensor]]
"""Of tensors: what is to go down, and a number to report."""


class Factors:
    """What the products in a gradient that is left open are products of (`flowvi.graph.open_products`).

    Args:
        places: which they are copied to; None: they are given as they come.

    Attributes:
        found: by a call of the gradient that left it open, for whoever takes them to make None again.
    """

    def __init__(self, places: Sequence[Tensor] | None = None) -> None:
        self.places = places
        self.found: Sequence[Tensor] | None = None


class Gradient:
    """The gradient of a loss, by autograd.

    Args:
        loss: of some tensors.
        flat: its parameters, with the place of the gradient.
    """

    recorded = False

    def __init__(self, loss: Loss, flat: FlatParameters) -> None:
        self.loss, self.flat = loss, flat

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Leave the gradient in the flat gradient; what the loss reports, without a graph."""
        loss, seen = self.loss(*inputs)
        self.flat.backward(loss)
        return seen.detach()

    def holds(self, *inputs: Tensor) -> bool:
        """Whether this is the loss's gradient still. Random numbers and parameters are left as they are."""
        return True


class RecordedGradient(Gradient):
    """The same without Python and autograd, for inputs of the shapes recorded; others are taken by autograd.

    Args:
        loss: of some tensors, which are all that may change from step to step, with the parameters.
        flat: its parameters.
        inputs: such tensors; it is recorded at these.

    Raises:
        Refused: it can't be recorded (`flowvi.graph`).
    """

    recorded = True

    def __init__(self, loss: Loss, flat: FlatParameters, inputs: Sequence[Tensor]) -> None:
        super().__init__(loss, flat)
        parameters, num = flat.parameters, len(flat.parameters)

        def both(tensors: list[Tensor]) -> list[Tensor]:
            with torch.enable_grad():
                value, seen = loss(*tensors[num:])
                grads = torch.autograd.grad(value, parameters, allow_unused=True)
            found = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
            return [seen.detach(), *found]

        self._module = record(both, [*parameters, *inputs])
        tidy(self._module, [*parameters, *inputs])
        self._whole = self._emit(self._twin(), range(len(parameters)))
        self._open: tuple[Callable[..., Any], Opened, Factors] | None = None
        self._places: tuple[Tensor | None, list[Tensor]] = None, []
        self._kinds = [(t.shape, t.dtype, t.device) for t in inputs]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """See `Gradient`."""
        if self._open is None:
            return self._call_whole(*inputs)
        if not self._is_recorded(inputs):
            return super().__call__(*inputs)
        run, opened, factors = self._open
        parts = self._parts()
        with torch.no_grad():
            places = (*(parts[number] for number in opened.whole), *(factors.places or ()))
            seen, *found = run(*self.flat.parameters, *inputs, *places)
        factors.found = factors.places or found
        return seen

    def _call_whole(self, *inputs: Tensor) -> Tensor:
        if not self._is_recorded(inputs):
            return super().__call__(*inputs)
        with torch.no_grad():
            (seen,) = self._whole(*self.flat.parameters, *inputs, *self._parts())
        return seen

    def _is_recorded(self, inputs: Sequence[Tensor]) -> bool:
        return [(t.shape, t.dtype, t.device) for t in inputs] == self._kinds

    def _parts(self) -> list[Tensor]:
        """The parameters' parts of the flat gradient."""
        if self._places[0] is not self.flat.grad:
            self._places = self.flat.grad, self.flat.split(self.flat.grad)
        return self._places[1]

    def _twin(self) -> fx.GraphModule:
        """The recording again, to be changed."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self._module.graph, {}))
        return fx.GraphModule(self._module, graph)

    @staticmethod
    def _emit(module: fx.GraphModule, numbers: Sequence[int]) -> Callable[..., Any]:
        """The function; of the outputs after the first one, these are copied to further arguments."""
        keep(module, [1 + number for number in numbers])
        return emit(module)

    def holds(self, *inputs: Tensor) -> bool:
        """See `Gradient`."""
        found = []
        for take in (super().__call__, self._call_whole):
            with kept():
                seen = take(*inputs)
            found.append((seen.double(), self.flat.grad.clone()))
        (value, grad), (mine, my_grad) = found
        parts = zip(self.flat.split(grad), self.flat.split(my_grad), strict=True)
        return _close(mine, value) and _close(my_grad, grad) and all(_close(b, a, grad) for a, b in parts)

    def openable(self, smallest: int) -> Opened:
        """What `leave_open` leaves open."""
        return self._opened(smallest)[1]

    def leave_open(self, factors: Factors, smallest: int) -> None:
        """From here on, leave products of so many numbers open, and their parts of the flat gradient as they are."""
        module, opened = self._opened(smallest)
        copied = len(opened.whole) + (len(opened.shapes) if factors.places else 0)
        self._open = self._emit(module, range(copied)), opened, factors

    def _opened(self, smallest: int) -> tuple[fx.GraphModule, Opened]:
        module = self._twin()
        return module, open_products(module, 1, smallest, len(self.flat.parameters))


def make_gradient(
    loss: Loss, flat: FlatParameters, inputs: Sequence[Tensor], others: Sequence[Tensor], *, recorded: bool = True
) -> Gradient:
    """The gradient, recorded where it can be. Random numbers and parameters are left as they are.

    Args:
        loss: of some tensors.
        flat: its parameters.
        inputs: such tensors.
        others: such tensors again, with other numbers in them.
        recorded: False: by autograd. So it is on a GPU, whose random numbers `kept` doesn't keep.
    """
    plain = Gradient(loss, flat)
    if not recorded or flat.vector.device.type != "cpu":
        return plain
    before = flat.vector.clone()
    try:
        with kept():
            plain(*inputs)  # what is done once, at the first call, is not to be recorded
            found = RecordedGradient(loss, flat, inputs)
            with torch.no_grad():
                generator = torch.Generator(before.device).manual_seed(0)
                noise = torch.empty_like(before).normal_(generator=generator)
                flat.vector.add_(ASIDE * (before.abs() + ASIDE) * noise)
            torch.rand(1)  # so that a draw that was recorded as a number is another one
            return found if found.holds(*others) and found.holds(*inputs) else plain
    except Exception:  # an error of the loss's own, at parameters moved aside, says nothing; a lasting one comes again
        return plain
    finally:
        with torch.no_grad():
            flat.vector.copy_(before)


def _close(a: Tensor, b: Tensor, whole: Tensor | None = None) -> bool:
    """Equal but for rounding; of a part of a whole, also where both are next to nothing beside that."""
    fine = b.isfinite()
    if not torch.equal(a.isfinite(), fine):
        return False
    a, b = torch.where(fine, a, 0.0), torch.where(fine, b, 0.0)
    allowed = AGREE * torch.linalg.vector_norm(b)
    if whole is not None:
        allowed += 1e-2 * AGREE * torch.linalg.vector_norm(torch.where(whole.isfinite(), whole, 0.0))
    return bool(torch.linalg.vector_norm(a - b) <= allowed)
