"""The gradient of a minibatch's loss: an `AmortizedStep` as a function of tensors, recorded where that can be."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowvi.fit.adam import FlatParameters
from flowvi.fit.amortized_step import AmortizedStep, Loss
from flowvi.fit.batches import Call
from flowvi.fit.gradient import Factors, RecordedGradient, make_gradient
from flowvi.graph import Opened

__all__ = ["AmortizedGradient"]


class _TensorLoss:
    """A step's loss as a function of tensors: beta and those of a minibatch.

    Args:
        step: the loss of a minibatch.
        first: a minibatch; what is no tensor in it stays as it is.
    """

    def __init__(self, step: AmortizedStep, first: Call) -> None:
        self.step = step
        leaves, self._spec = tree_flatten(first)
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def tensors(self, call: Call) -> list[Tensor] | None:
        """Those of a minibatch; None where what else it holds is not what the first one held."""
        leaves, spec = tree_flatten(call)
        if [isinstance(leaf, Tensor) for leaf in leaves] != self._is_tensor or spec != self._spec:
            return None
        same = all(there or a is b or a == b for there, a, b in zip(self._is_tensor, leaves, self._rest, strict=True))
        return [leaf for leaf, there in zip(leaves, self._is_tensor, strict=True) if there] if same else None

    def __call__(self, beta: Tensor, *tensors: Tensor) -> Loss:
        """The loss of a minibatch of these tensors."""
        given = iter(tensors)
        leaves = [next(given) if there else leaf for there, leaf in zip(self._is_tensor, self._rest, strict=True)]
        return self.step(tree_unflatten(leaves, self._spec), beta)


class AmortizedGradient:
    """The gradient of a minibatch's loss, left in the flat gradient.

    Args:
        step: the loss of a minibatch.
        flat: its parameters.
        calls: two minibatches of the size that is to come.
        record: whether it is recorded, where it can be.
    """

    def __init__(self, step: AmortizedStep, flat: FlatParameters, calls: tuple[Call, Call], record: bool) -> None:
        self.step, self.flat = step, flat
        self._loss = _TensorLoss(step, calls[0])
        self._beta = torch.ones((), dtype=flat.vector.dtype, device=flat.vector.device)
        self._recorded: RecordedGradient | None = None
        others = self._loss.tensors(calls[1])
        if record and others is not None:
            with pyro.validation_enabled(False):
                inputs = self._loss.tensors(calls[0])
                assert inputs is not None
                found = make_gradient(self._loss, flat, [self._beta, *inputs], [self._beta * 0.5, *others])
            self._recorded = found if isinstance(found, RecordedGradient) else None

    @property
    def recorded(self) -> bool:
        """Whether it is that of a recording."""
        return self._recorded is not None

    def __call__(self, call: Call, beta: float) -> Tensor:
        """The ELBO estimate per data point, a scalar without a graph; the gradient is of the loss at beta."""
        if self._recorded is not None:
            tensors = self._loss.tensors(call)
            if tensors is not None:
                return self._recorded(self._beta.fill_(beta), *tensors)
        loss = self.step(call, beta)
        self.flat.backward(loss.surrogate)
        return loss.elbo

    def openable(self, smallest: int) -> Opened | None:
        """What `leave_open` leaves open; None where there is no recording."""
        return None if self._recorded is None else self._recorded.openable(smallest)

    def leave_open(self, factors: Factors, smallest: int) -> None:
        """See `flowvi.fit.gradient.RecordedGradient`."""
        assert self._recorded is not None
        self._recorded.leave_open(factors, smallest)

    def holds(self, call: Call, beta: float) -> bool:
        """Whether the recording, where there is one, gives what the step gives."""
        tensors = None if self._recorded is None else self._loss.tensors(call)
        return self._recorded is None or tensors is None or self._recorded.holds(self._beta.fill_(beta), *tensors)

    def leave(self) -> None:
        """Take the steps as they are written from here on."""
        self._recorded = None
