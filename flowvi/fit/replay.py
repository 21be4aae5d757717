"""A training step on a GPU recorded once and replayed: one launch in place of hundreds (CUDA graphs).

A step's shapes don't change, nothing in it waits for a number, and its memory can be the same each time, so CUDA can
keep its kernels as a graph. What can't be recorded is not: a target that looks at its values, say. And a recording is
used only after it gave the step that it was made from, with new random numbers each time; a minibatch that is drawn on
the CPU would stay what it was, and is found out so. Without a GPU nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowvi.fit.adam import FlatAdam
from flowvi.fit.steps import Step

__all__ = ["Replay", "Update", "cuda_graph", "make_update"]

WARM_UP = 3
"""Steps before a recording, in which libraries make what they need."""

AGREE = 1e-3
"""Largest difference of a recorded step's mean gradient, relative to its largest component: sums may be reordered."""

_RELIABLE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Before, a recording that failed left the generators unusable."""

Seen = tuple[Tensor | float, Tensor | float]
RecordFunction = Callable[[Callable[[], Any], torch.Generator], Callable[[], Any]]


class Update:
    """A step's gradient and Adam's step along it.

    Args:
        step: leaves the gradient in the flat gradient.
        adam: goes along it.
        generator: where the randomness comes from.
    """

    recorded = False

    def __init__(self, step: Step, adam: FlatAdam, generator: torch.Generator) -> None:
        self.step, self.adam, self.generator = step, adam, generator

    def __call__(self, beta: float, lr: float | Tensor) -> Seen:
        """The number of finite particles, and their mean log p - log q."""
        num, elbo = self.step(beta, self.generator)
        self.adam.step(lr, num > 0)
        return num, elbo


class Replay(Update):
    """The same, recorded; where beta is not 1, as while it is annealed, the step is taken as it is.

    Args:
        update: what is recorded. Parameters, moments and generator are left as they are.
        record: makes a recording of a function that draws from a generator, without calling it otherwise.

    Raises:
        RuntimeError: it can't be recorded, or the recording does something else.
    """

    recorded = True

    def __init__(self, update: Update, record: RecordFunction) -> None:
        super().__init__(update.step, update.adam, update.generator)
        adam = self.adam
        place = adam.vector.device
        self._lr = torch.zeros((), dtype=adam.vector.dtype, device=place)
        # What is seen goes to memory of its own: a recording fills that, and runs no Python that could return anything.
        self._num, self._elbo = (torch.zeros((), dtype=torch.float64, device=place) for _ in range(2))
        memory = [adam.vector, adam.grad, adam.mean, adam.square, adam.state]
        before, draws = [a.clone() for a in memory], self.generator.get_state()
        others = getattr(getattr(self.step, "target", None), "generator", None)  # of a target that draws by itself
        drawn = None if others is None else others.get_state()

        def restore() -> None:
            for a, value in zip(memory, before, strict=True):
                a.copy_(value)
            if others is not None:
                others.set_state(drawn)

        try:
            for _ in range(WARM_UP):
                self._whole()
            self._replay = record(self._whole, self.generator)
            found = []
            for play, anew in ((self._whole, True), (self._replay, True), (self._replay, False)):
                restore()
                if anew:
                    self.generator.set_state(draws)
                play()
                found.append(adam.mean.clone())
            taken, replayed, other = found
            near = AGREE * taken.abs().max()
            if not bool((replayed - taken).abs().max() <= near):
                raise RuntimeError("the recorded step is not the step")
            if not bool((other - taken).abs().max() > 0):
                raise RuntimeError("the recorded step draws the same numbers again")
        finally:
            restore()
            self.generator.set_state(draws)

    def _whole(self) -> None:
        num, elbo = super().__call__(1.0, self._lr)
        self._num.copy_(torch.as_tensor(num))
        self._elbo.copy_(torch.as_tensor(elbo))

    def __call__(self, beta: float, lr: float | Tensor) -> Seen:
        """See `Update`; what is returned is overwritten by the next call."""
        if beta != 1:
            return super().__call__(beta, lr)
        self._lr.fill_(lr)
        self._replay()
        return self._num, self._elbo


def make_update(
    step: Step, adam: FlatAdam, generator: torch.Generator, *, record: RecordFunction | None = None
) -> Update:
    """The update, recorded where that can be done: on a GPU, alone, with a step that can be."""
    update = Update(step, adam, generator)
    if record is None:
        if adam.vector.device.type != "cuda" or not _RELIABLE:
            return update
        record = cuda_graph
    if getattr(step, "split", None) is not None:  # ranks would have to record the same, or none
        return update
    try:
        return Replay(update, record)
    except Exception:  # a target's own error, in other words than CUDA's, comes again at the first step
        return update


def cuda_graph(function: Callable[[], Any], generator: torch.Generator) -> Callable[[], None]:
    """Record a function on the present device; its random numbers go on with the generator at each replay."""
    present, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(present)
    with torch.cuda.stream(stream):  # once more where recording is done, or its first use would be recorded
        function()
    present.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            function()
    except BaseException:
        torch.cuda.set_stream(present)  # a recording that fails stays on its own
        raise
    return graph.replay
