r"""Hamiltonian Monte Carlo in a flow's coordinates, many chains at once.

With z = T(e) a chain walks over e, where the target is

    log p(T(e)) + log|det dT/de|,

which is close to the flow's base N(0, I) where the flow is good: then a chain forgets its start in a step or two,
whatever the shape of p. Where the flow is poor the walk is slower and just as exact.

With momenta r ~ N(0, I) and a scale L (the mass matrix is (L L^T)^-1), one leapfrog step of size h is

    r += h/2 L^T g,    e += h L r,    r += h/2 L^T g,    g = the gradient of the target.

All chains share h, L and the length of the trajectory; `flowvi.hmc_tuning` finds them.

Sources: Neal (2011), "MCMC using Hamiltonian dynamics", arXiv:1206.1901; Hoffman et al. (2019), "NeuTra-lizing bad
geometry in Hamiltonian Monte Carlo using neural transport", arXiv:1903.03704.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowvi.flow import Flow, _forward
from flowvi.targets import LogDensity

__all__ = [
    "FlowCoordinates",
    "HMCInfo",
    "HMCState",
    "Tuning",
    "hmc_step",
]

DIVERGENT = 1000.0
"""An energy error, in nats, that no step of a sound size makes."""

MAX_LEAPFROG = 256


@dataclass(frozen=True)
class HMCState:
    """Where C chains are.

    Attributes:
        position: e (C, D).
        z: T(e) (C, D).
        log_p: log p(z) (C,).
        log_det: log|det dT/de| (C,).
        gradient: of log p(T(e)) + log|det dT/de| in e (C, D).
    """

    position: Tensor
    z: Tensor
    log_p: Tensor
    log_det: Tensor
    gradient: Tensor

    @property
    def log_density(self) -> Tensor:
        """The target of the walk, log p(T(e)) + log|det dT/de| (C,)."""
        return self.log_p + self.log_det

    @property
    def finite(self) -> Tensor:
        """Where density and gradient are finite (C,)."""
        return self.log_density.isfinite() & self.gradient.isfinite().all(1)

    def take(self, index: Tensor) -> HMCState:
        """The chains at `index`."""
        return HMCState(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def where(self, condition: Tensor, other: HMCState) -> HMCState:
        """This state where the condition (C,) holds, the other elsewhere."""
        parts = []
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            parts.append(torch.where(condition if mine.ndim == 1 else condition[:, None], mine, theirs))
        return HMCState(*parts)


@dataclass(frozen=True)
class HMCInfo:
    """What one step did.

    Attributes:
        acceptance: The probability min(1, exp(-energy error)) of each chain (C,); 0 where it is not finite.
        accepted: Which chains moved (C,).
        divergent: Where the energy error is not finite or above 1000 nats (C,).
        proposal: e at the trajectory's end (C, D).
        momentum: r at the trajectory's end (C, D).
        num_leapfrog: Leapfrog steps, the same for all chains.
    """

    acceptance: Tensor
    accepted: Tensor
    divergent: Tensor
    proposal: Tensor
    momentum: Tensor
    num_leapfrog: int


@dataclass(frozen=True)
class Tuning:
    """What all chains share.

    Attributes:
        step_size: h, in units of L.
        trajectory: The mean length of a trajectory, h times leapfrog steps.
        scale: L, lower triangular (D, D), or its diagonal (D,).
        max_leapfrog: The most leapfrog steps of one trajectory.
    """

    step_size: float
    trajectory: float
    scale: Tensor
    max_leapfrog: int = MAX_LEAPFROG

    def along(self, momentum: Tensor) -> Tensor:
        """L r for rows r (C, D)."""
        return momentum @ self.scale.mT if self.scale.ndim == 2 else momentum * self.scale

    def pull(self, gradient: Tensor) -> Tensor:
        """L^T g for rows g (C, D)."""
        return gradient @ self.scale if self.scale.ndim == 2 else gradient * self.scale

    def whiten(self, offset: Tensor) -> Tensor:
        """L^-1 x for rows x (C, D)."""
        if self.scale.ndim == 1:
            return offset / self.scale
        return torch.linalg.solve_triangular(self.scale, offset.mT, upper=False).mT


class FlowCoordinates:
    """A target p(z) seen through a flow z = T(e): callable e (C, D) -> `HMCState`.

    It computes in float64: the flow's maps are copied and widened, where they can be; a target in float32 stays so.
    All of the data is used where the model subsamples.

    Args:
        flow: The map T, and the base distribution of e.
        density: log p(z).
    """

    def __init__(self, flow: Flow, density: LogDensity) -> None:
        self.dim = flow.dim
        self.density = density.full
        self.device = flow.device
        self._flow = flow
        self._maps, self._dtype = _widened(flow)

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws e of the base (num, D), float64."""
        with torch.no_grad():
            return self._flow._base_rsample(torch.Size([num]), generator).double()

    def log_base(self, position: Tensor) -> Tensor:
        """The base's log density at e (C, D), so that log q(T(e)) = log_base - log|det dT/de|."""
        return self._flow.base_dist.log_prob(position)

    def log_weight(self, state: HMCState) -> Tensor:
        """The log weight log p(z) - log q(z) at a state (C,)."""
        return state.log_density - self.log_base(state.position)

    def values(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where e (C, D) leads: z (C, D), log p(z) and log q(z) (C,), without gradients."""
        with torch.no_grad():
            z, log_det = self._push(position)
            return z, self.density(z).double(), self.log_base(position) - log_det

    def log_density(self, position: Tensor) -> Tensor:
        """The target of the walk at e (S, D), without gradients (S,)."""
        _, log_p, log_q = self.values(position)
        return log_p - log_q + self.log_base(position)

    def __call__(self, position: Tensor) -> HMCState:
        """The state at e (C, D)."""
        with torch.enable_grad():
            e = position.detach().requires_grad_()
            z, log_det = self._push(e)
            log_p, gradient = self.density.value_and_grad(z)
            # one product with the Jacobian carries the gradient in z back to e
            pulled = (z * gradient.to(z)).sum() + log_det.sum()
            (total,) = torch.autograd.grad(pulled, e)
        return HMCState(position, z.detach(), log_p.double(), log_det.detach(), total)

    def _push(self, e: Tensor) -> tuple[Tensor, Tensor]:
        x, total = e.to(self._dtype), e.new_zeros(len(e))
        for t in self._maps:
            x, log_det = _forward(t, x)
            total = total + log_det
        return x.double(), total


def _widened(flow: Flow) -> tuple[list[torch.distributions.Transform], torch.dtype]:
    """Copies of the flow's maps in float64, or the maps themselves with their dtype where that can't be had."""
    try:
        maps = copy.deepcopy(list(flow.transforms))
        for t in maps:
            if isinstance(t, nn.Module):
                t.double().requires_grad_(False)
        probe = torch.zeros(2, flow.dim, dtype=torch.float64, device=flow.device)
        with torch.no_grad():
            for t in maps:
                probe, _ = _forward(t, probe)
        if probe.dtype == torch.float64:
            return maps, torch.float64
    except (RuntimeError, TypeError, ValueError):  # such as foreign maps that can't be copied
        pass
    return list(flow.transforms), flow.dtype


@torch.no_grad()
def hmc_step(
    state: HMCState,
    target: Callable[[Tensor], HMCState],
    tuning: Tuning,
    length: float,
    generator: torch.Generator,
) -> tuple[HMCState, HMCInfo]:
    """One trajectory of every chain, accepted with probability min(1, exp(-energy error)).

    A chain that meets a density or gradient that is not finite stays there for the rest of its trajectory, and is
    rejected.

    Args:
        state: Where the chains are; finite.
        target: e (C, D) -> state.
        tuning: Step size and scale.
        length: Of the trajectory, rounded up to whole steps.
        generator: Where momenta and acceptances come from.

    Returns:
        The new state, and what happened.
    """
    h = tuning.step_size
    num = max(1, min(tuning.max_leapfrog, math.ceil(length / h)))
    momentum = torch.empty_like(state.position).normal_(generator=generator)
    energy = state.log_density - 0.5 * momentum.square().sum(1)
    at, r, fine = state, momentum, torch.ones_like(state.log_p, dtype=torch.bool)
    for _ in range(num):
        r = r + 0.5 * h * tuning.pull(at.gradient)
        ahead = target(at.position + h * tuning.along(r))
        fine = fine & ahead.finite
        at = ahead if bool(fine.all()) else ahead.where(fine, at)
        r = r + 0.5 * h * tuning.pull(at.gradient)
    change = at.log_density - 0.5 * r.square().sum(1) - energy
    fine = fine & change.isfinite()
    acceptance = torch.where(fine, change.clamp(max=0.0).exp(), 0.0)
    accepted = torch.empty_like(acceptance).uniform_(generator=generator) < acceptance
    divergent = ~(fine & (change > -DIVERGENT))
    info = HMCInfo(acceptance, accepted, divergent, at.position, r, num)
    return at.where(accepted, state), info
