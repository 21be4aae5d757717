"""An optimizer's steps on a loss whose minibatch may be split over ranks.

Ranks of one machine have the parameters, their gradients and the optimizer's memory in common: each sums up a part of
the gradient and moves that part of the parameters, for all of them (the sharded data parallelism of Rajbhandari et al.
2020, arXiv:1910.02054, where nothing needs to be sent). Other ranks exchange the gradient, and each moves them all.
Where a recorded gradient is mostly products of matrices, they are left open; see `flowvi.fit.factored_descent`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.distributed import Ranks
from flowvi.fit.rmsprop import FlatRMSprop
from flowvi.kernels import dispatch

__all__ = ["OPTIMIZERS", "Descent", "SharedDescent"]

OPTIMIZERS: dict[str, type[FlatAdam] | type[FlatRMSprop]] = {"adam": FlatAdam, "rmsprop": FlatRMSprop}


class Descent:
    """Every rank has the whole gradient, and takes the whole step.

    Args:
        flat: the parameters, and this rank's gradient of its share.
        ranks: the ranks.
        kind: of the optimizer.
        options: of the optimizer.

    Attributes:
        optimizer: of the parameters, or of this rank's part of them.
        state: what the optimizer remembers, of all parameters: the two moments, and its `state`.
    """

    def __init__(
        self, flat: FlatParameters, ranks: Ranks, kind: type[FlatAdam] | type[FlatRMSprop], options: dict[str, Any]
    ) -> None:
        self.flat, self.ranks = flat, ranks
        self.optimizer = kind(flat.vector, flat.grad, **options)
        self.state = [self.optimizer.mean, self.optimizer.square, self.optimizer.state]

    def step(self, lr: float, elbo: Tensor) -> Tensor:
        """One step of size `lr`, of which the gradient is in `flat`; a scalar like `elbo`, its mean over ranks.

        No step is taken where that mean, or the gradient's, is not finite.
        """
        elbo = self.ranks.mean_(elbo.clone())
        self.ranks.mean_(self.flat.grad)
        self.optimizer.step(lr, elbo.isfinite())
        return elbo

    def forget(self) -> None:
        """Start again from here."""
        self.optimizer.forget()

    @property
    def skipped(self) -> int:
        """Steps that were not taken."""
        return self.optimizer.skipped


class SharedDescent(Descent):
    """Each rank takes the step of its part of the parameters, in memory that all of them have in common.

    Args:
        flat: the parameters; they move to that memory.
        ranks: the ranks.
        kind: of the optimizer.
        options: of the optimizer.
        shared: the memory (3 + world, P): parameters, two moments, and each rank's gradient.
    """

    def __init__(
        self,
        flat: FlatParameters,
        ranks: Ranks,
        kind: type[FlatAdam] | type[FlatRMSprop],
        options: dict[str, Any],
        shared: Tensor,
    ) -> None:
        vector, mean, square, *grads = shared
        flat.move(vector, grads[ranks.rank])
        self.flat, self.ranks = flat, ranks
        mine = ranks.share(len(vector))
        # The mean takes the place of this rank's own: nobody else reads that part of it.
        self._grads, self._mine = shared[3:], mine
        self.optimizer = kind(vector[mine], flat.grad[mine], moments=(mean[mine], square[mine]), **options)
        self.state = [mean, square, self.optimizer.state]
        module = dispatch.compiled("descent", flat.grad)
        self._kernel = None
        if module is not None:
            self._arguments = shared[3:].reshape(-1).numpy(), len(vector), ranks.world, ranks.rank
            self._kernel = module.make_mean(self._arguments[0].dtype.type)
        ranks.barrier()  # after which nobody writes the first values any more

    def step(self, lr: float, elbo: Tensor) -> Tensor:
        """See `Descent`."""
        elbo = self.ranks.mean_(elbo.clone())  # after which all gradients are there
        square = torch.tensor(self.mean(self._mine), dtype=torch.float64)
        length = self.ranks.sum_(square)  # after which all have been read
        self.optimizer.step(lr, elbo.isfinite(), math.sqrt(length))
        self.ranks.barrier()  # after which all parameters are there
        return elbo

    def forget(self) -> None:
        """See `Descent`."""
        super().forget()
        self.ranks.barrier()  # after which all moments are forgotten

    def mean(self, part: slice) -> float:
        """Fill a part of this rank's gradient with the mean over ranks; its squared length."""
        if self._kernel is not None:
            vector, *places = self._arguments
            return self._kernel(vector, part.start, part.stop - part.start, *places)
        into = self.flat.grad[part]
        into.copy_(self._grads[:, part].mean(0))
        return float(torch.linalg.vector_norm(into, dtype=torch.float64).square())
