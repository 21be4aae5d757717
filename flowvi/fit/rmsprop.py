"""RMSprop with momentum on one flat parameter vector: the paper's optimizer (Rezende & Mohamed 2015, section 6.2).

Tieleman & Hinton 2012, lecture 6.5: v <- a v + (1 - a) g^2, m <- mu m + g / (sqrt(v) + eps), p <- p - lr m. Gradients
are cut and left out as in `flowvi.fit.adam`.
"""

from __future__ import annotations

from torch import Tensor

from flowvi.fit.adam import CLIP, KEEP, FlatMoments

MOMENTUM, DECAY, EPS = 0.9, 0.99, 1e-8


class FlatRMSprop(FlatMoments):
    """RMSprop on one vector; the first moment is the running step m, the second the running square v."""

    maker = "make_rmsprop"

    def rates(self, lr: float) -> tuple[float, ...]:
        """See `FlatMoments`."""
        return lr, MOMENTUM, DECAY, EPS

    def step(self, lr: float | Tensor, usable: Tensor | bool = True, length: float = -1.0) -> None:
        """One step, as of `flowvi.fit.adam.FlatAdam`."""
        if self._kernel is not None:
            self._kernel(lr, CLIP, KEEP, MOMENTUM, DECAY, EPS, bool(usable), length)
            return
        g, taking = self._cut(length, usable)
        self.square.mul_(1 - (1 - DECAY) * taking).add_((1 - DECAY) * g * g)
        self.mean.mul_(1 - (1 - MOMENTUM) * taking).addcdiv_(g, self.square.sqrt().add_(EPS))
        self.vector.sub_(taking * lr * self.mean)
