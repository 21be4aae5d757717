"""A Pyro guide that draws from a fitted mixture of flows."""

from __future__ import annotations

from typing import Any, cast

from pyro.distributions.transforms import ComposeTransformModule
from torch import Tensor, nn
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.describe import layer_lines
from flowvi.errors import OptionError
from flowvi.flow import Flow
from flowvi.guides import AutoFlow
from flowvi.mixture import MixtureFlow

__all__ = ["AutoMixture"]


class AutoMixture(AutoFlow):
    """The guide that continues a fitted mixture: same distribution, sharing its components' parameters.

    The weights stay as they were fitted. `SVI` trains the components with the standard gradient (``flowvi.ELBO``).

    Args:
        model: the Pyro model.
        flow: the fitted mixture over its unconstrained space.
    """

    def __init__(self, model: Any, flow: MixtureFlow) -> None:
        super().__init__(model, num_flows=0)
        self.components = nn.ModuleList([ComposeTransformModule(list(part.transforms)) for part in flow.flows])
        self.log_weights: Tensor
        self.register_buffer("log_weights", flow.log_weights)
        self._prebuilt = []  # no map of its own

    def set_up(self, *args: Any, **kwargs: Any) -> AutoMixture:
        """Run the model once, so that the guide knows its sites."""
        self._setup_prototype(*args, **kwargs)
        return self

    def get_transform(self, *args: Any, **kwargs: Any) -> TorchTransform:
        """None: a mixture is no map of a base.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "a mixture of flows has no transform, as NeuTraReparam needs one: use posterior.refine(), or the flow "
            "of one component, posterior.flow.flows[m]."
        )

    def _flow_lines(self) -> list[str]:
        lines = []
        for weight, part in zip(self.log_weights.exp().tolist(), self._modules["components"], strict=True):
            lines += [f"  {weight:.3f}", *("  " + line for line in layer_lines("Normal", part.parts))]
        return lines

    def get_posterior(self, *args: Any, **kwargs: Any) -> MixtureFlow:
        """Q over the unconstrained latents, (D,)."""
        # The transforms are read through the module, so that pyro registers their parameters.
        flows = [
            Flow(self.get_base_dist(), list(cast(Any, part).parts), validate_args=False) for part in self.components
        ]
        return MixtureFlow(flows, self.log_weights, validate_args=False)
