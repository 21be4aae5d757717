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

    def step(self, lr: float, usable: Tensor | bool = True, length: float = -1.0) -> None:
        """One step, as of `flowvi.fit.adam.FlatAdam`."""
        norm = float(self._length(length))
        if not (bool(usable) and norm < float("inf")):
            self.state[2] += 1
            return
        typical = float(self.state[1]) if self.state[0] else norm
        cut = min(norm, CLIP * typical)
        g = self.grad * (cut / norm if norm else 1.0)
        self.state[0] += 1
        self.state[1] = KEEP * typical + (1 - KEEP) * cut
        self.square.mul_(DECAY).addcmul_(g, g, value=1 - DECAY)
        self.mean.mul_(MOMENTUM).addcdiv_(g, self.square.sqrt().add_(EPS))
        self.vector.sub_(self.mean, alpha=lr)
