r"""Several flows as one distribution: q(z) = sum_m pi_m q_m(z), for posteriors with separate modes.

Draws come from all components in proportion to pi, by systematic sampling: the number of draws of component m is
n pi_m up to one draw, so that the share of a mode has next to no Monte Carlo noise. log q of any point is exact,
by the inverses of all components.

The weights are constants: no gradient reaches them (`flowvi.fit.modes.fit_mixture` sets them by evidence). With that,
`rsample` differentiates rightly with respect to the components' parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.describe import num_parameters
from flowvi.errors import DimensionError, OptionError
from flowvi.flow import Flow
from flowvi.flow_spec import FULL_BASE_LIMIT, FlowSpec

__all__ = ["MIXTURE", "MixtureFlow", "flow_from_spec"]

MIXTURE = "mixture"
"""The name in the spec of a `MixtureFlow`."""

_FRAME_DRAWS = 1000


class MixtureFlow(Flow):
    """q(z) = sum_m pi_m q_m(z), with all that `Flow` offers; see the module's words.

    It has no map from N(0, I), and so no path score. Where one is asked for, as by HMC in the flow's coordinates,
    it offers z = mu + L e with L L^T the mean covariance of the components, and the base that goes with it.

    Args:
        flows: the components q_m, at least one, over the same R^D.
        log_weights: log pi, (M,) up to a constant.

    Attributes:
        flows: as above.

    Raises:
        OptionError: there is no component, or not one finite weight for each.
        DimensionError: the components differ in D.

    Example:
        >>> import torch, flowvi
        >>> from flowvi.mixture import MixtureFlow
        >>> parts = [flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 4), loc=m) for m in (-5.0, 5.0)]
        >>> MixtureFlow(parts, torch.tensor([0.2, 0.8]).log()).sample((10,))[:, 0].gt(0).sum()
        tensor(8)
    """

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor, *, validate_args: bool | None = None) -> None:
        self.flows = tuple(flows)
        log_weights = torch.as_tensor(log_weights).detach().double()
        if not self.flows or log_weights.shape != (len(self.flows),) or not bool(log_weights.isfinite().all()):
            raise OptionError(
                f"a mixture takes one finite log weight for each of its flows, not {tuple(log_weights.shape)} for "
                f"{len(self.flows)} flows."
            )
        if len({flow.dim for flow in self.flows}) > 1:
            raise DimensionError(f"the flows of a mixture differ in D: {[flow.dim for flow in self.flows]}.")
        parts = _Parts(self.flows, log_weights)
        frame = _Frame(self)
        super().__init__(_Pulled(self, frame), [frame], validate_args=validate_args, spec=_spec_of(self.flows))
        self.module: nn.ModuleList | _Parts = parts  # type: ignore[assignment]

    @classmethod
    def from_spec(
        cls,
        spec: FlowSpec,
        *,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        factory: Callable[..., TorchTransform] | None = None,
    ) -> MixtureFlow:
        """The mixture that a spec describes, at its start and with equal weights; arguments as for `Flow`."""
        flows = [
            Flow.from_spec(FlowSpec.from_dict(part), loc=loc, scale=scale, dtype=dtype, device=device, factory=factory)
            for part in spec.options["components"]
        ]
        return cls(flows, torch.zeros(len(flows)))

    # the weights

    @property
    def _parts(self) -> _Parts:
        return self.module  # type: ignore[return-value]

    @property
    def log_weights(self) -> Tensor:
        """Log pi (M,), float64; they sum to one."""
        return self._parts.log_weights

    @property
    def weights(self) -> Tensor:
        """Pi (M,), float64."""
        return self.log_weights.exp()

    def set_weights_(self, log_weights: Tensor) -> None:
        """Take other weights.

        Args:
            log_weights: log pi (M,), up to a constant.
        """
        self.log_weights.copy_(torch.log_softmax(log_weights.detach().double(), 0))

    # draws

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.flows[0].dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.flows[0].device

    @property
    def has_path_score(self) -> bool:
        """No: there is no one map to carry a score through."""
        return False

    @property
    def has_standard_base(self) -> bool:
        """No."""
        return False

    def _counts(self, num: int, generator: torch.Generator | None) -> list[int]:
        """How many of `num` draws each component gives: systematic, one uniform number in all."""
        offset = torch.rand((), generator=generator, device=self.device, dtype=torch.float64)
        ends = (num * self.weights.cumsum(0) - offset).ceil().clamp(0, num).long()
        ends[-1] = num
        return ends.diff(prepend=ends.new_zeros(1)).tolist()

    def _draw_parts(self, num: int, generator: torch.Generator | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Draws of each component in turn and their own log density there; and a random order of all."""
        zs, logs = [], []
        for flow, count in zip(self.flows, self._counts(num, generator), strict=True):
            empty = torch.empty(0, self.dim, dtype=self.dtype, device=self.device)
            z, log_q = flow.rsample_and_log_prob(count, generator=generator) if count else (empty, empty[:, 0])
            zs.append(z)
            logs.append(log_q)
        return zs, logs, torch.randperm(num, generator=generator, device=self.device)

    def rsample_and_log_prob(
        self, num_samples: int, *, generator: torch.Generator | None = None, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Z (S, D), in random order, and log q(z) (S,), both with their graph.

        Args:
            num_samples: S.
            generator: where the randomness comes from; torch's global generator if None.
            rows: which of the S draws are returned.
        """
        zs, own, order = self._draw_parts(num_samples, generator)
        columns = []
        for m, flow in enumerate(self.flows):  # where a draw came from it need not be inverted
            others = torch.cat(zs[:m] + zs[m + 1 :])
            elsewhere = flow.log_prob(others) if len(others) else others.sum(-1)
            start = sum(len(z) for z in zs[:m])
            columns.append(torch.cat([elsewhere[:start], own[m], elsewhere[start:]]))
        order = order[rows]
        return torch.cat(zs)[order], self._mix(torch.stack(columns, -1))[order]

    def component_log_probs(self, value: Tensor) -> Tensor:
        """Log q_m(value) of each component, (..., M) for a value (..., D)."""
        return torch.stack([flow.log_prob(value) for flow in self.flows], -1)

    def _mix(self, each: Tensor) -> Tensor:
        """Log sum of pi_m q_m over the last dimension; a component that can't be evaluated there counts as zero."""
        lost = each.isnan()
        each = torch.where(lost & ~lost.all(-1, keepdim=True), -math.inf, each)
        return torch.logsumexp(each + self.log_weights.to(each), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(value), exact for any value of shape (..., D).

        Raises:
            DimensionError: the last dimension is not D.
        """
        return self._mix(self.component_log_probs(value))

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """Draws with their graph, (*sample_shape, *batch_shape, D)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        zs, _, order = self._draw_parts(shape.numel(), None)
        return torch.cat(zs)[order].reshape(shape + self.event_shape)

    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """Draws (*sample_shape, *batch_shape, D)."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def expand(self, batch_shape: torch.Size | Sequence[int], _instance: Any = None) -> MixtureFlow:
        """The same mixture with another batch shape, sharing its components."""
        new = MixtureFlow(self.flows, self.log_weights, validate_args=False)
        new._batch_shape = torch.Size(batch_shape)
        return new

    # coordinates

    def _base_rsample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        """Draws e with mu + L e from q."""
        with torch.no_grad():
            zs, _, order = self._draw_parts(shape.numel(), generator)
            e: Tensor = self.transforms[0].inv(torch.cat(zs)[order].double())
        return e.reshape(shape + self.event_shape)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters and weights that `state_dict` gave."""
        super().load_state_dict(state)
        self.transforms[0].forget()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The learnable parameters of all components."""
        return self.module.parameters()

    def __repr__(self) -> str:
        lines = [f"Mixture of {len(self.flows)} flows on R^{self.dim}, {num_parameters(self.module)}"]
        lines += [
            f"  {weight:.3f}  {repr(flow).replace(chr(10), chr(10) + 9 * ' ')}"
            for weight, flow in zip(self.weights.tolist(), self.flows, strict=True)
        ]
        return "\n".join(lines)


def flow_from_spec(
    spec: FlowSpec, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Flow:
    """A flow or a mixture of flows, whichever the spec describes."""
    return (MixtureFlow if spec.name == MIXTURE else Flow).from_spec(spec, dtype=dtype, device=device)


class _Parts(nn.Module):
    """The components' parameters and the weights, under names that can be saved."""

    log_weights: Tensor

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor) -> None:
        super().__init__()
        self.flows = nn.ModuleList([flow.module for flow in flows])
        self.register_buffer("log_weights", torch.log_softmax(log_weights, 0).to(flows[0].device))


class _Frame(TorchTransform):
    """e -> mu + L e in float64, with the components' mean covariance L L^T; found when it is first needed.

    Any mu and L are right: they only decide how fast a walk in these coordinates is. The covariance within the
    components, and not that of the whole, has the scale on which the density changes.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, mixture: MixtureFlow) -> None:
        super().__init__()
        self._mixture = mixture
        self._map: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Find it anew when it is next needed."""
        self._map = None

    def _found(self) -> tuple[Tensor, Tensor]:
        if self._map is None:
            q = self._mixture
            generator = torch.Generator(q.device).manual_seed(0)
            weights, dim = q.weights, q.dim
            loc = torch.zeros(dim, dtype=torch.float64, device=q.device)
            covariance = torch.zeros(dim, dim, dtype=torch.float64, device=q.device)
            with torch.no_grad():
                for weight, flow in zip(weights, q.flows, strict=True):
                    z, _ = flow.rsample_and_log_prob(max(_FRAME_DRAWS, 4 * dim), generator=generator)
                    loc = loc + weight * z.double().mean(0)
                    covariance = covariance + weight * z.double().mT.cov()
            tril, failed = torch.linalg.cholesky_ex(covariance)
            if dim > FULL_BASE_LIMIT or bool(failed) or not bool(tril.isfinite().all()):
                tril = torch.nan_to_num(covariance.diagonal(), 1.0, 1.0).clamp_min(1e-20).sqrt().diag()
            self._map = loc, tril
        return self._map

    def _call(self, x: Tensor) -> Tensor:
        loc, tril = self._found()
        return loc + x.double() @ tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        loc, tril = self._found()
        rows = (y.double() - loc).reshape(-1, len(loc))
        return torch.linalg.solve_triangular(tril, rows.mT, upper=False).mT.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log|det L|, the same everywhere."""
        return self._found()[1].diagonal().log().sum().expand(x.shape[:-1])


class _Pulled(torch.distributions.Distribution):
    """The distribution of e, where mu + L e has that of the mixture."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: MixtureFlow, frame: _Frame) -> None:
        self._mixture, self._frame = mixture, frame
        super().__init__(event_shape=torch.Size([mixture.flows[0].dim]), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws e, without a graph."""
        return self._mixture._base_rsample(torch.Size(sample_shape), None)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(mu + L e) + log|det L|."""
        z = self._frame(value)
        return self._mixture.log_prob(z.to(self._mixture.dtype)).double() + self._frame.log_abs_det_jacobian(value, z)


def _spec_of(flows: Sequence[Flow]) -> FlowSpec | None:
    """What is needed to build the components again, if they can be; the weights are part of the state."""
    specs = [flow.spec for flow in flows if flow.spec is not None]
    if len(specs) < len(flows):
        return None
    return FlowSpec(MIXTURE, flows[0].dim, len(flows), specs[0].base, {"components": [s.to_dict() for s in specs]})
