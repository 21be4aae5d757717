r"""Stacks bound to memory: what a training loop calls, with no tape, no operator and next to no overhead.

A step is made once for a stack's parameters, the memory of their gradients and S particles, and then called
for every iteration:

    step = planar_step(w, u, b, "squareplus", grads=(g_w, g_u, g_b), num_particles=256)
    z, log_det, score = step.forward(eps)     # z (S, D), log|det| (S,), d log q(z)/dz (S, D)
    g_eps = step.backward(g_z, g_log_det)     # fills g_w, g_u, g_b

The contract:

- Parameters and gradients are views of one's own memory (a flat vector, say): a step keeps pointers to it. New
  values are seen, new storage (``p.data = ...``) is not: make the step after the storage is final.
- `backward` overwrites the gradients; it doesn't add to them. It belongs to the last `forward`, and the
  parameters and that forward's x must be unchanged since.
- The tensors that `forward` and `backward` return are the step's own and are overwritten by its next call.
- x, score, g_z and g_log_det are read where they lie; a tensor that comes again is not asked where that is, so it must
  keep its storage.
- x, score, g_z are (S, D), S being `num_particles`; others than contiguous ones are copied. `score` is the
  score at x, d log q(x)/dx; None means x ~ N(0, I), whose score is -x. Steps chain: z and score of one are x
  and score of the next, and g_x of the next is g_z of this one.
- Nothing is checked, nothing is differentiable, and a step must not be used by two threads at once.
- It is the same for every device and dtype: where compiled kernels don't serve, plain torch does the work. The
  choice is made when the step is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.kernels import dispatch, planar, radial


def _array(a: Tensor | None) -> Any:
    return None if a is None else a.detach().contiguous().numpy()


class Arrays:
    """Tensors' memory as numpy arrays, each made once for a tensor that comes again, as in a training loop.

    To make one costs as much as most of what a step does for a few hundred particles.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Any]] = {}

    def __call__(self, role: str, a: Tensor | None) -> Any:
        """The array of a tensor that is always given in this role."""
        kept = self._kept.get(role)
        if kept is not None and kept[0] is a:
            return kept[1]
        array = _array(a)
        if a is not None and a.is_contiguous():  # else the array is a copy
            self._kept[role] = a, array
        return array


class _Step:
    """What both families share: memory for the results, and the hand-over to compiled kernels.

    Args:
        family: "planar" or "radial".
        params: parameters as the kernels take them, the first of them (K, D).
        options: what the kernels take after the parameters.
        grads: memory of the parameters' gradients.
        num_particles: S.
        with_score: whether `forward` carries the score; if not, it returns None for it.
    """

    def __init__(
        self,
        family: str,
        params: tuple[Tensor, ...],
        options: tuple[Any, ...],
        *,
        grads: tuple[Tensor, ...],
        num_particles: int,
        with_score: bool,
    ) -> None:
        self.params = tuple(p.detach() for p in params)
        self.grads = tuple(g.detach() for g in grads)
        self.num_particles = num_particles
        self.with_score = with_score
        first = self.params[0]
        layers, dim = first.shape
        self._z, self._g_x = first.new_empty(num_particles, dim), first.new_empty(num_particles, dim)
        self._log_det = first.new_empty(num_particles)
        self._kept = first.new_empty(layers, num_particles)  # t or r
        self._score = torch.empty_like(self._z) if with_score else None
        self._x: Any = None
        self._impl, self._arrays = None, Arrays()
        if all(a.is_contiguous() for a in (*self.params, *self.grads)):
            self._impl = dispatch.compiled(family, *self.params, self._z)
        if self._impl is not None:
            self._shared = (*map(_array, self.params), *options)
            self._out = tuple(map(_array, (self._z, self._log_det, self._score, self._kept)))
            self._back = (self._out[3], _array(self._g_x), *map(_array, self.grads))

    def forward(self, x: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z (S, D), log|det dz/dx| (S,) and the score at z (S, D) from x (S, D) and the score at x.

        Args:
            x: the particles, (S, D).
            score: d log q(x)/dx, (S, D); None means that x is standard normal.
        """
        if self._impl is not None:
            self._x = self._arrays("x", x)
            start, sign = (self._x, -1.0) if score is None else (self._arrays("score", score), 1.0)
            self._impl.forward(self._x, start, sign, *self._shared, *self._out)
            return self._z, self._log_det, self._score
        with torch.no_grad():
            self._x = x.detach()
            z, log_det, self._kept = self._torch_forward(self._x)
            if not self.with_score:
                return z, log_det, None
            return z, log_det, self._torch_score(-self._x if score is None else score)

    def backward(self, g_z: Tensor, g_log_det: Tensor | None = None) -> Tensor:
        """The cotangent of x (S, D); fills the parameters' gradients.

        Args:
            g_z: the cotangent of z, (S, D).
            g_log_det: that of log|det|, (S,); None, as for the path gradient, counts as zero and costs less.
        """
        if self._impl is not None:
            pull = self._arrays("g_z", g_z), self._arrays("g_log_det", g_log_det)
            self._impl.backward(*pull, self._x, *self._shared, *self._back)
            return self._g_x
        with torch.no_grad():
            g_x, *grads = self._torch_backward(g_z, g_log_det)
            for memory, value in zip(self.grads, grads, strict=True):
                memory.copy_(value)
            return g_x

    def _torch_forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def _torch_score(self, score: Tensor) -> Tensor:
        raise NotImplementedError

    def _torch_backward(self, g_z: Tensor, g_log_det: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError


class PlanarStep(_Step):
    """K planar layers bound to their parameters' and gradients' memory; see the module's docstring.

    Args:
        w: directions, (K, D).
        u: raw displacements, (K, D).
        b: offsets, (K,).
        constraint: one of `planar.CONSTRAINTS`.
        grads: memory of the gradients of w, u and b.
        num_particles: S.
        with_score: whether `forward` carries the score; if not, it returns None for it.
    """

    def __init__(
        self,
        w: Tensor,
        u: Tensor,
        b: Tensor,
        constraint: str,
        *,
        grads: tuple[Tensor, ...],
        num_particles: int,
        with_score: bool = True,
    ) -> None:
        self.constraint = constraint
        options = (constraint == "softplus",)
        super().__init__("planar", (w, u, b), options, grads=grads, num_particles=num_particles, with_score=with_score)

    def _torch_forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, u, b = self.params
        return planar.stack_forward(x, w, u, b, self.constraint)

    def _torch_score(self, score: Tensor) -> Tensor:
        w, u, _ = self.params
        return planar.stack_score(score, w, u, self._kept, self.constraint)

    def _torch_backward(self, g_z: Tensor, g_log_det: Tensor | None) -> tuple[Tensor, ...]:
        w, u, b = self.params
        return planar.stack_backward(g_z, g_log_det, self._x, w, u, b, self._kept, self.constraint)


class RadialStep(_Step):
    """K radial layers bound to their parameters' and gradients' memory; see the module's docstring.

    Args:
        z0: centres, (K, D).
        raw_alpha: raw alpha, (K,).
        raw_s: raw s, (K,).
        grads: memory of the gradients of z0, raw_alpha and raw_s.
        num_particles: S.
        with_score: whether `forward` carries the score; if not, it returns None for it.
    """

    def __init__(
        self,
        z0: Tensor,
        raw_alpha: Tensor,
        raw_s: Tensor,
        *,
        grads: tuple[Tensor, ...],
        num_particles: int,
        with_score: bool = True,
    ) -> None:
        super().__init__(
            "radial",
            (z0, raw_alpha, raw_s),
            (),
            grads=grads,
            num_particles=num_particles,
            with_score=with_score,
        )

    def _torch_forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return radial.stack_forward(x, *self.params)

    def _torch_score(self, score: Tensor) -> Tensor:
        z0, raw_alpha, raw_s = self.params
        return radial.stack_score(self._x, score, z0, raw_alpha, raw_s, self._kept)

    def _torch_backward(self, g_z: Tensor, g_log_det: Tensor | None) -> tuple[Tensor, ...]:
        z0, raw_alpha, raw_s = self.params
        return radial.stack_backward(g_z, g_log_det, self._x, z0, raw_alpha, raw_s, self._kept)


planar_step = PlanarStep
radial_step = RadialStep
