"""Adam (Kingma & Ba 2015, arXiv:1412.6980) on one flat parameter vector, with clipping and steps that can be skipped.

A gradient longer than `CLIP` times its running length is cut to that; one that is not finite is not followed, and
counted. Nothing leaves the device: no step waits for a number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.kernels import dispatch
from flowvi.kernels.linear import BY_COLUMNS

CLIP = 10.0
"""A gradient longer than this many times its running length is cut to it: rare, and a sign of a bad particle."""

KEEP = 0.98
"""The running length of the gradient is this much of the old one and the rest of the new."""

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class FlatParameters:
    """The parameters of a module as one vector; the module's own become views of it while this is in use.

    One vector means one optimizer step and one norm, however many parameters there are. Matrices of which it is noted
    that they may (`flowvi.kernels.linear.tall`) lie there column by column.

    Args:
        module: the module, or its parameters.
    """

    def __init__(self, module: nn.Module | Iterable[Tensor]) -> None:
        each = module.parameters() if isinstance(module, nn.Module) else module
        self.parameters = [p for p in each if p.requires_grad]
        self._by_columns = [getattr(p, BY_COLUMNS, False) for p in self.parameters]
        with torch.no_grad():
            self.vector = torch.cat(self._rows(self.parameters))
            self.grad = torch.zeros_like(self.vector)
            self._saved_grads = [p.grad for p in self.parameters]
            for p, value, grad in zip(self.parameters, *map(self.split, (self.vector, self.grad)), strict=True):
                p.data, p.grad = value, grad
        self.vector.grad = self.grad

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector of as many numbers (P,) as the parts that belong to each parameter, views in its shape."""
        parts = zip(vector.split([p.numel() for p in self.parameters]), self.parameters, self._by_columns, strict=True)
        return [part.view(p.shape[::-1]).t() if turned else part.view(p.shape) for part, p, turned in parts]

    def _rows(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """What belongs to each parameter, as its numbers lie in the vector."""
        each = zip(parts, self._by_columns, strict=True)
        return [(part.t() if turned else part).reshape(-1) for part, turned in each]

    def ordered(self, vector: Tensor) -> Tensor:
        """A vector of as many numbers (P,) in the order of the parameters, each row by row, wherever they lie."""
        return torch.cat([part.reshape(-1) for part in self.split(vector)])

    def fill(self, vector: Tensor, ordered: Tensor) -> None:
        """Fill a vector of as many numbers with what `ordered` gave of it."""
        parts = ordered.split([p.numel() for p in self.parameters])
        for place, part in zip(self.split(vector), parts, strict=True):
            place.copy_(part.view(place.shape))

    def backward(self, loss: Tensor) -> None:
        """Fill `grad` with the gradient of a loss.

        Each parameter's gradient comes in memory of its own and is copied: to add it to what is there would be to
        clear it, read it and write it again, several times the traffic where there are millions of parameters. So the
        parameters' own gradients are no longer views of `grad` after this, but None.
        """
        for p in self.parameters:
            p.grad = None
        loss.backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.parameters]
        torch.cat(self._rows(parts), out=self.grad)
        for p in self.parameters:
            p.grad = None

    def move(self, vector: Tensor, grad: Tensor) -> None:
        """Live in other memory from here on, with the present values."""
        with torch.no_grad():
            vector.copy_(self.vector)
            self.vector, self.grad = vector, grad
            for p, value, part in zip(self.parameters, *map(self.split, (vector, grad)), strict=True):
                p.data, p.grad = value, part
        self.vector.grad = grad

    def release(self) -> None:
        """Give every parameter its own storage again, with its present value."""
        with torch.no_grad():
            for p, grad in zip(self.parameters, self._saved_grads, strict=True):
                p.data, p.grad = p.data.clone(memory_format=torch.contiguous_format), grad
                p.copy_(p)  # a new version, so that no transform's cache is taken for fresh


class FlatMoments(ABC):
    """What an optimizer of one vector remembers.

    Args:
        vector: the parameters, changed in place.
        grad: their gradient, read at each step.
        moments: memory for the two moments, all 0; None makes it.

    Attributes:
        mean: the first moment, of the vector's shape.
        square: the second moment.
        state: float64 (3,): steps taken, running length of the gradient, steps skipped.
    """

    maker: str
    """Of the kernel of a step, in `flowvi.kernels.compiled.descent`; that of a step along rows is beside it."""

    def __init__(self, vector: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> None:
        self.vector, self.grad = vector.detach(), grad
        self.mean, self.square = moments or (torch.zeros_like(self.vector), torch.zeros_like(self.vector))
        self.state = torch.zeros(3, dtype=torch.float64, device=vector.device)
        module = dispatch.compiled("descent", self.vector, grad)
        self._kernel: Callable[..., Any] | None = None
        if module is not None:
            arrays = [a.numpy() for a in (self.vector, grad, self.mean, self.square, self.state)]
            self._kernel = partial(getattr(module, self.maker)(arrays[0].dtype.type), *arrays)

    @property
    def skipped(self) -> int:
        """Steps that were not taken."""
        return int(self.state[2])

    def _cut(self, length: float, usable: Tensor | bool) -> tuple[Tensor, Tensor]:
        """The gradient, cut, and 1 where a step is to be taken; else 0 and 0. Counts, without waiting for a number."""
        taken, typical, skipped = self.state.unbind()
        whole = length < 0
        norm = torch.linalg.vector_norm(self.grad, dtype=torch.float64) if whole else self.state.new_tensor(length)
        ok = torch.isfinite(norm) & usable
        typical_ = torch.where(taken > 0, typical, norm)
        cut = torch.minimum(norm, CLIP * typical_)
        factor = torch.where(norm > 0, cut / norm, 1.0)
        g = torch.where(ok, self.grad * factor.to(self.grad), 0.0)
        skipped += ~ok
        taken += ok
        typical.copy_(torch.where(ok, KEEP * typical_ + (1 - KEEP) * cut, typical))
        return g, ok.to(g)

    def is_typical(self, length: float) -> bool:
        """Whether a gradient that is not longer than this is one to be followed, uncut."""
        taken, typical, _ = self.state.tolist()
        return taken > 0 and length <= CLIP * typical  # NaN is not

    @abstractmethod
    def rates(self, lr: float) -> tuple[float, ...]:
        """What the kernel along rows is told of the next step, of size `lr`; `count` the step after its last part."""

    def count(self, length: float) -> None:
        """Remember that a step was taken along a gradient of this length, not cut."""
        taken, typical, skipped = self.state.tolist()
        self.state.copy_(torch.tensor([taken + 1, KEEP * typical + (1 - KEEP) * length, skipped], dtype=torch.float64))

    def forget(self) -> None:
        """Start again from here: without moments, but with the number of steps skipped."""
        self.mean.zero_()
        self.square.zero_()
        self.state[:2] = 0


class FlatAdam(FlatMoments):
    """Adam on one vector.

    Args:
        vector: the parameters, changed in place.
        grad: their gradient, read at each step.
        beta2: how much of the second moment a step keeps.
        moments: see `FlatMoments`.
    """

    maker = "make_adam"

    def __init__(
        self, vector: Tensor, grad: Tensor, beta2: float = BETA2, moments: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__(vector, grad, moments)
        self.beta2 = beta2

    def rates(self, lr: float) -> tuple[float, ...]:
        """See `FlatMoments`."""
        taken = float(self.state[0]) + 1
        return lr / (1 - BETA1**taken), math.sqrt(1 - self.beta2**taken), BETA1, self.beta2, EPS

    def step(self, lr: float | Tensor, usable: Tensor | bool = True, length: float = -1.0) -> None:
        """One step of size `lr`, unless the gradient is not finite or `usable` is false.

        Args:
            lr: the size.
            usable: whether the step is to be taken.
            length: of the gradient that this one is a part of; below 0 this one is all of it.
        """
        if self._kernel is not None:
            self._kernel(lr, CLIP, KEEP, BETA1, self.beta2, EPS, bool(usable), length)
            return
        g, taking = self._cut(length, usable)
        taken = self.state[0]
        # A step that is not taken leaves the moments as they are: the weights of old and new become 1 and 0.
        self.mean.lerp_(g, (1 - BETA1) * taking)
        self.square.mul_(1 - (1 - self.beta2) * taking).add_((1 - self.beta2) * g * g)
        size = taking * (lr / (1 - BETA1 ** taken.clamp_min(1))).to(g)
        root = torch.sqrt(1 - self.beta2 ** taken.clamp_min(1)).to(g)
        self.vector.sub_(size * self.mean / (self.square.sqrt() / root + EPS))
