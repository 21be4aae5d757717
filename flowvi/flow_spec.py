"""How a flow was built, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flowvi.checks import instances, one_of, positive_integers, shown, whole_numbers
from flowvi.errors import OptionError
from flowvi.transforms.affine import AFFINE_KINDS

__all__ = ["FULL_BASE_LIMIT", "FlowSpec"]

FULL_BASE_LIMIT = 200
"""The largest D at which the affine layer is full by default (D^2 parameters); above it is low rank."""


@dataclass(frozen=True)
class FlowSpec:
    """All that is needed to build a flow's structure again; plain data, so that it can be saved.

    Attributes:
        name: a registered flow.
        dim: D.
        num_flows: K, the number of layers; 0 leaves the affine layer alone.
        base: the affine layer after the K layers: "diag", "low_rank" or "full".
        options: what the flow's factory takes.
        funnels: the number of `funnel` layers between the K layers, where there are any, and the affine one.

    Raises:
        OptionError: an attribute can't be used.
    """

    name: str
    dim: int
    num_flows: int
    base: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    funnels: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise OptionError(f"name must be that of a registered flow, not {shown(self.name)}.")
        positive_integers(dim=self.dim)
        whole_numbers(num_flows=self.num_flows, funnels=self.funnels)
        one_of(AFFINE_KINDS, base=self.base)
        instances(Mapping, options=self.options)

    def to_dict(self) -> dict[str, Any]:
        """The spec as a dictionary of plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FlowSpec:
        """The spec that `to_dict` wrote.

        Args:
            data: what `to_dict` gave.

        Returns:
            An equal spec.

        Raises:
            OptionError: it is not what `to_dict` gave.
        """
        try:
            return cls(**data)
        except TypeError as e:
            raise OptionError(f"data must be what FlowSpec.to_dict() gave, not {shown(data)}.") from e
