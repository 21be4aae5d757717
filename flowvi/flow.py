r"""Flow: a distribution made of a base and a chain of invertible maps.

log q_K(z_K) = log q_0(z_0) - sum_k log|det df_k/dz_{k-1}| (Rezende & Mohamed 2015, arXiv:1505.05770, eq. 7).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.torch import TransformedDistribution
from torch import Tensor, nn
from torch.distributions.transforms import Transform as TorchTransform

from flowvi import base_distribution
from flowvi.checks import (
    as_device,
    as_shape,
    as_tensor,
    flags_or_none,
    floating,
    instances,
    shown,
    whole_numbers,
)
from flowvi.describe import layer_lines, num_parameters
from flowvi.errors import DimensionError, NonFiniteError, OptionError
from flowvi.flow_spec import FlowSpec
from flowvi.transforms.affine import Affine
from flowvi.transforms.base import InvertibleMap
from flowvi.transforms.funnel import funnel_stack
from flowvi.transforms.registry import build

__all__ = ["Flow"]


class Flow(TransformedDistribution):
    """q(z): a base distribution of R^D pushed through transforms, with everything that inference asks of it.

    Args:
        base: a reparameterized distribution over R^D (event shape (D,), or batch shape (D,) of scalars), or D
            itself for the standard normal.
        transforms: the maps, from the base outwards; each acts on R^D.
        validate_args: as for torch's distributions.
        spec: how the flow was built, so that it can be saved; `from_spec` gives it.

    Raises:
        OptionError: an argument can't be used.
        DimensionError: base and transforms don't agree on D.

    Example:
        >>> import torch, flowvi
        >>> from flowvi.transforms import Affine, PlanarStack
        >>> flow = flowvi.Flow(2, [PlanarStack(2, num_flows=8), Affine(2, kind="full")])
        >>> z = flow.sample((100,))
        >>> flow.log_prob(z).shape
        torch.Size([100])
    """

    _drawn: tuple[Callable[[], Any], Any, Any] = (lambda: None, None, None)  # weak z, x, version: the last draw

    def __init__(
        self,
        base: torch.distributions.Distribution | int,
        transforms: Sequence[TorchTransform] | TorchTransform,
        *,
        validate_args: bool | None = None,
        spec: FlowSpec | None = None,
    ) -> None:
        flags_or_none(validate_args=validate_args)
        instances(FlowSpec, type(None), spec=spec)
        if isinstance(transforms, TorchTransform):
            transforms = [transforms]
        elif not isinstance(transforms, Sequence) or not all(isinstance(t, TorchTransform) for t in transforms):
            raise OptionError(f"transforms must be transforms of R^D, or a list of them, not {shown(transforms)}.")
        transforms = list(transforms)
        self.module = nn.ModuleList([t for t in transforms if isinstance(t, nn.Module)])
        self.spec = spec
        super().__init__(base_distribution.as_base(base, self.module), transforms, validate_args=validate_args)

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
    ) -> Flow:
        """A flow at its start: K layers and the funnels at the identity, then the affine layer at (loc, scale).

        Args:
            spec: its structure.
            loc: where the affine layer starts, (D,) or a number.
            scale: the scales it starts at, (D,) or a number.
            dtype: of the parameters; torch's default if None.
            device: of the parameters.
            factory: builds a layer in place of the registered ``spec.name``.

        Returns:
            The flow, over R^D.

        Raises:
            UnknownFlowError: ``spec.name`` is not registered.
            OptionError: an argument can't be used.
            DimensionError: loc or scale has another shape.
        """
        instances(FlowSpec, spec=spec)
        floating(dtype)
        layers = build(spec.name if factory is None else factory, spec.dim, spec.num_flows, **dict(spec.options))
        if spec.num_flows:
            layers += funnel_stack(spec.dim, spec.funnels)
        dtype = dtype or torch.get_default_dtype()
        loc = as_tensor("loc", loc, dtype)
        layers.append(Affine(spec.dim, spec.base, loc=loc, scale=as_tensor("scale", scale, dtype)))
        device = as_device(device)
        for layer in layers:
            if isinstance(layer, nn.Module):
                layer.to(device=device, dtype=dtype)
        return cls(spec.dim, layers, spec=spec)

    # Sampling.

    @property
    def dim(self) -> int:
        """D."""
        return self.event_shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.module.parameters(), self.base_dist.mean).dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return next(self.module.parameters(), self.base_dist.mean).device

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """Z of shape (*sample_shape, *batch_shape, D), with its graph."""
        x = z = self.base_dist.rsample(as_shape("sample_shape", sample_shape))
        for t in self.transforms:
            z = t(z)
        self._drawn = weakref.ref(z), x.detach(), self._version()
        return z

    def _version(self) -> tuple[int, ...]:
        return tuple(n for p in self.parameters() for n in (id(p), 0 if p.is_inference() else p._version))

    def _base_point(self, value: Tensor) -> Tensor:
        """The x that `value` came from: remembered, if it was just drawn, and else by the inverses."""
        drawn, x, version = self._drawn
        if drawn() is value and version == self._version():
            return x
        x = value
        for t in reversed(self.transforms):
            x = t.inv(x)
        return x.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_drawn"}

    def _base_rsample(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return base_distribution.rsample(self.base_dist, shape, generator)

    def _base_rows(self, num_samples: int, generator: torch.Generator | None, rows: slice) -> Tensor:
        whole_numbers(num_samples=num_samples)
        if not isinstance(rows, slice):
            raise OptionError(f"rows must be a slice of the draws, not {shown(rows)}.")
        return self._base_rsample(torch.Size([num_samples]), generator)[rows]

    def rsample_and_log_prob(
        self, num_samples: int, *, generator: torch.Generator | None = None, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log density in one pass.

        Args:
            num_samples: S.
            generator: where the randomness comes from; torch's global generator if None.
            rows: which of the S draws are computed; the randomness of all is used up.

        Returns:
            z (S, D) and log q(z) (S,), both with their graph.

        Raises:
            OptionError: an argument can't be used.
        """
        x = self._base_rows(num_samples, generator, rows)
        log_q = base_distribution.log_prob(self.base_dist, x)
        for t in self.transforms:
            x, log_det = _forward(t, x)
            log_q = log_q - log_det
        return x, log_q

    def rsample_with_score(
        self, num_samples: int, *, generator: torch.Generator | None = None, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws, their log density and its score in one pass.

        The score is carried forward through the layers; no inverse is computed (Vaitl et al. 2024,
        arXiv:2403.15881).

        Args:
            num_samples: S.
            generator: where the randomness comes from; torch's global generator if None.
            rows: which of the S draws are computed; the randomness of all is used up.

        Returns:
            z (S, D), log q(z) (S,), both with their graph, and d log q(z)/dz (S, D) without one.

        Raises:
            OptionError: a transform has no path score; `has_path_score` tells beforehand. Or an argument can't be used.
        """
        self._require_path_score()
        x = self._base_rows(num_samples, generator, rows)
        log_q, score = base_distribution.log_prob(self.base_dist, x), base_distribution.score(self.base_dist, x)
        for t in self.transforms:
            x, log_det, score = t.forward_with_score(x, score)
            log_q = log_q - log_det
        return x, log_q, score.detach()

    @property
    def has_standard_base(self) -> bool:
        """Whether the base is N(0, I)."""
        return base_distribution.is_standard(self.base_dist)

    @property
    def has_path_score(self) -> bool:
        """Whether every transform carries the score forward, so that path gradients are cheap."""
        return all(getattr(t, "has_path_score", False) for t in self.transforms)

    def _require_path_score(self) -> None:
        for t in self.transforms:
            if not getattr(t, "has_path_score", False):
                raise OptionError(
                    f"{type(t).__name__} has no path score: use the standard ELBO (flowvi.ELBO), whose gradient "
                    f"needs none."
                )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(value), exact for any value, by the inverses and their log-determinants.

        A value that was just sampled is not inverted: its transforms remember where it came from.

        Args:
            value: (..., D).

        Returns:
            (...).

        Raises:
            OptionError: it is not a tensor.
            DimensionError: the last dimension is not D.
            NonFiniteError: it is not finite, with validate_args.
        """
        self._check_value(value)
        if self._validate_args and not value.isfinite().all():
            raise NonFiniteError("the value has NaN or infinities, and this flow checks its values (validate_args).")
        log_q: Tensor | float = 0.0
        for t in reversed(self.transforms):
            value, log_det = _inverse(t, value)
            log_q = log_q + log_det
        return base_distribution.log_prob(self.base_dist, value) + log_q

    def _check_value(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise OptionError(f"a flow takes values as a tensor of shape (..., {self.dim}), not {shown(value)}.")
        if value.dim() == 0 or value.shape[-1] != self.dim:
            raise DimensionError(
                f"this flow lives on R^D with D = {self.dim}, but the value has shape {tuple(value.shape)}: "
                f"its last dimension must be {self.dim}."
            )

    def _log_prob_by_inverses(self, value: Tensor) -> Tensor:
        try:
            return self.log_prob(value)
        except (KeyError, NotImplementedError) as e:  # how Pyro's and torch's transforms say that they have none
            names = ", ".join(type(t).__name__ for t in self.transforms if not getattr(t, "has_path_score", False))
            raise OptionError(
                f"{names} has no inverse, and so no path gradient: use the standard ELBO (flowvi.ELBO)."
            ) from e

    def score(self, value: Tensor) -> Tensor:
        """D log q(value)/d value.

        By the forward recurrence from the base point that gave `value` (remembered, if `rsample` has just drawn it),
        or by autograd where a transform has no path score.

        Args:
            value: (..., D).

        Returns:
            (..., D), without a graph.

        Raises:
            OptionError: a transform has neither a path score nor an inverse, or the value is not a tensor.
            DimensionError: the last dimension is not D.
        """
        self._check_value(value)
        if not self.has_path_score:
            with torch.enable_grad():
                value = value.detach().requires_grad_()
                return torch.autograd.grad(self._log_prob_by_inverses(value).sum(), value)[0]
        with torch.no_grad():
            x = self._base_point(value)
            score = base_distribution.score(self.base_dist, x)
            for t in self.transforms:
                x, _, score = t.forward_with_score(x, score)
        return score

    def expand(self, batch_shape: torch.Size | Sequence[int], _instance: Any = None) -> Flow:
        """The same flow with another batch shape, sharing its transforms.

        Args:
            batch_shape: the new one.

        Returns:
            Another flow.
        """
        shape = as_shape("batch_shape", batch_shape)
        return Flow(self.base_dist.expand(shape), self.transforms, validate_args=False, spec=self.spec)

    # What torch users expect of something that has parameters.

    def parameters(self) -> Iterator[nn.Parameter]:
        """The learnable parameters of all transforms."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters that `state_dict` gave.

        Args:
            state: name -> value, every name that `state_dict` has.

        Raises:
            OptionError: they are another flow's.
        """
        instances(Mapping, state=state)
        try:
            self.module.load_state_dict(dict(state))
        except (RuntimeError, AttributeError, TypeError) as e:
            raise OptionError(f"these are not the parameters of this flow, {self}: {e}") from e

    def __repr__(self) -> str:
        lines = [f"Flow on R^{self.dim}, {num_parameters(self.module)}"]
        return "\n".join(
            lines + layer_lines(type(base_distribution.innermost(self.base_dist)).__name__, self.transforms)
        )


def _forward(t: TorchTransform, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(t, InvertibleMap):
        return t.forward_and_log_det(x)
    y = t(x)
    return y, _log_det(t, x, y)


def _inverse(t: TorchTransform, y: Tensor) -> tuple[Tensor, Tensor]:
    """X with t(x) = y, and log|det dx/dy|."""
    if isinstance(t, InvertibleMap):
        return t.invert(y)
    x = t.inv(y)
    return x, -_log_det(t, x, y)


def _log_det(t: TorchTransform, x: Tensor, y: Tensor) -> Tensor:
    log_det = t.log_abs_det_jacobian(x, y)
    return log_det.sum(-1) if log_det.dim() == x.dim() else log_det  # an elementwise transform of torch's
