"""What one run of a Pyro model left behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from flowvi.targets.sites import is_discrete, without_validation

__all__ = ["Run", "unmasked_log_prob"]


class Run:
    """What one run of a model left: its sites, with their values and log-probabilities.

    Args:
        nodes: Pyro's messages by site, in model order.
        log_det: the sum of log|dx/dz| over the latent sites.
    """

    def __init__(self, nodes: Mapping[str, Any], log_det: Tensor | float) -> None:
        self.nodes = nodes
        self._log_det = log_det
        self._pointwise: dict[str, Tensor] = {}
        self.samples = [n for n in nodes.values() if n["type"] == "sample" and not isinstance(n["fn"], _Subsample)]

    @property
    def latent(self) -> list[Any]:
        """The continuous latent sites' messages."""
        return [n for n in self.samples if not n["is_observed"] and not is_discrete(n)]

    @property
    def discrete(self) -> list[Any]:
        """The discrete latent sites' messages."""
        return [n for n in self.samples if not n["is_observed"] and is_discrete(n)]

    @property
    def densities(self) -> list[Any]:
        """The messages of all sites that have a log density."""
        return [n for n in self.samples if not n["infer"].get("_deterministic")]

    def pointwise(self, name: str) -> Tensor:
        """Log p of one site, of its batch shape: not scaled, 0 where masked out."""
        if name not in self._pointwise:
            self._pointwise[name] = scale_and_mask(unmasked_log_prob(self.nodes[name]), 1.0, self.nodes[name]["mask"])
        return self._pointwise[name]

    @property
    def inseparable(self) -> tuple[str, ...]:
        """The sites without a pointwise log density of their own; see `EnumeratedRun`."""
        return ()

    def site_log_probs(self) -> dict[str, Tensor]:
        """Log p of each site, scaled and masked and summed, in model order."""
        sums = {}
        for node in self.densities:
            sums[node["name"]] = scale_and_mask(self.pointwise(node["name"]), node["scale"], None).sum()
        return sums

    def log_prob(self, dtype: torch.dtype) -> Tensor:
        """Log p(x) + log|dx/dz|."""
        total: Any = self._log_det
        for value in self.site_log_probs().values():
            total = total + value
        return torch.as_tensor(total).to(dtype)

    def magnitude(self) -> float:
        """The sum of the absolute values of the parts of log p, against which its rounding is to be seen."""
        return sum(abs(float(v)) for v in self.site_log_probs().values())


def unmasked_log_prob(node: Mapping[str, Any]) -> Tensor:
    """Log p of one site, of its batch shape, as its distribution gives it."""
    fn = without_validation(node["fn"])
    return torch.as_tensor(fn.log_prob(node["value"], *node["args"], **node["kwargs"]))
