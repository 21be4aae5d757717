"""Discrete latents summed out: log p(z, x) = log sum_d p(z, d, x), by Pyro's parallel enumeration.

Each discrete site takes all of its values at once, along a dimension of its own left of the plates. A site's log
density then is a factor, a tensor over the discrete sites that it depends on. Factors that share a discrete site form
a component; each component is contracted by Pyro's message passing over plates (Obermeyer et al. 2019, "Tensor
variable elimination for plated factor graphs", arXiv:1902.03210). As in Pyro's `TraceEnum_ELBO`, masks act inside of
the sum, where a masked-out discrete site still sums to one, and scales outside of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor

from flowvi.errors import DiscreteLatentError, TargetError
from flowvi.targets.run import Run, unmasked_log_prob
from flowvi.targets.sites import is_discrete

__all__ = ["BROADCAST", "EnumeratedRun", "Enumeration", "enumerate_in_parallel", "some"]


class _StableLogRing(LogRing):
    _backend = "flowvi.targets.log_einsum"


def enumerate_in_parallel(msg: Mapping[str, Any]) -> dict[str, Any]:
    """What `infer=` says of a site: discrete latents take all their values in parallel, whatever the user wrote."""
    if msg["type"] != "sample":
        return {}
    discrete = not msg["is_observed"] and is_discrete(msg)
    return {"enumerate": "parallel" if discrete else None, "num_samples": None, "expand": False}


@dataclass(frozen=True)
class Enumeration:
    """How the discrete latents of a model are enumerated.

    Attributes:
        names: the discrete latent sites.
        max_plate_nesting: the number of dimensions, counted from the right, that are taken by plates.
        batch_shapes: the batch shape of each site in a run without enumeration.
    """

    names: tuple[str, ...]
    max_plate_nesting: int
    batch_shapes: Mapping[str, Size]

    @classmethod
    def of(cls, run: Run) -> Enumeration | None:
        """Read off a run in which each discrete latent had one value; None if there is none.

        Raises:
            DiscreteLatentError: a discrete latent has batch dimensions that no plate declares.
        """
        if not run.discrete:
            return None
        nodes = run.densities
        shapes = {n["name"]: run.pointwise(n["name"]).shape for n in nodes}
        nesting = max([*map(len, shapes.values()), *(-dim for n in nodes for dim in _plate_dims(n))])
        for node in run.discrete:
            shape = node["fn"].batch_shape
            if any(size > 1 and dim - len(shape) not in _plate_dims(node) for dim, size in enumerate(shape)):
                raise DiscreteLatentError(
                    f"the discrete latent site {node['name']!r} has the batch shape {tuple(shape)}, and not each of "
                    "these dimensions has a plate. Its elements can only be summed out one by one if they are "
                    "independent: put the site, and what depends on it, in `with pyro.plate(...)`"
                )
        return cls(tuple(n["name"] for n in run.discrete), nesting, shapes)

    @property
    def first_available_dim(self) -> int:
        """The first dimension, counted from the right, that no plate takes."""
        return -1 - self.max_plate_nesting

    def handlers(self) -> tuple[Messenger, ...]:
        """What makes a run of the model an enumerated one, outermost first."""
        enum = EnumMessenger(self.first_available_dim)
        return enum, InferConfigMessenger(enumerate_in_parallel)


class _Component(NamedTuple):
    """The sites that are summed together, and what their sum is."""

    names: list[str]
    total: Tensor
    """Log of the sum, packed: over the plates that all of them are in."""
    scale: Any


class EnumeratedRun(Run):
    """A run in which each discrete latent has all of its values.

    Args:
        trace: Pyro's trace.
        log_det: the sum of log|dx/dz| over the latent sites.
        enumeration: what was enumerated, and where.
    """

    def __init__(self, trace: poutine.Trace, log_det: Tensor | float, enumeration: Enumeration) -> None:
        super().__init__(trace.nodes, log_det)
        self._trace, self._enumeration = trace, enumeration
        self._names = [n["name"] for n in self.densities]
        trace.symbolize_dims()

    def pointwise(self, name: str) -> Tensor:
        """Log p of one site, of its batch shape: not scaled, 0 where masked out.

        What it depends on is summed out, log sum_d p(d) p(x_n | d), which is meant for the sites that are not
        `inseparable`.
        """
        if name not in self._factors:
            return super().pointwise(name)
        [component] = [c for c in self._components if name in c.names]
        total = packed.unpack(component.total, self._trace.symbol_to_dim)
        return total.reshape(self._enumeration.batch_shapes[name])

    @property
    def inseparable(self) -> tuple[str, ...]:
        """The sites that share a sum with other sites than one observed one, or a sum over more than one datum."""
        found: list[str] = []
        for component in self._components:
            others = [n for n in component.names if n not in self._enumeration.names]
            shape = self._enumeration.batch_shapes.get(others[0]) if len(others) == 1 else None
            separable = shape is not None and component.total.numel() == shape.numel()
            if not separable and any(self.nodes[n]["is_observed"] for n in others):
                found += component.names
        return tuple(found)

    def site_log_probs(self) -> dict[str, Tensor]:
        """Log p of each site, scaled and masked and summed; of the sites that share a sum together."""
        sums = {
            name: scale_and_mask(self._conditional(name), self.nodes[name]["scale"], None).sum()
            for name in self._names
            if name not in self._factors
        }
        for component in self._components:
            sums[", ".join(component.names)] = component.total.sum() * component.scale
        return sums

    def _conditional(self, name: str) -> Tensor:
        """Log p of a site given its parents, at all of their values; masked, unless it is summed over itself."""
        if name not in self._enumeration.names:
            return super().pointwise(name)
        return unmasked_log_prob(self.nodes[name])

    @cached_property
    def _factors(self) -> dict[str, Tensor]:
        """The packed log density of each site that depends on a discrete one."""
        found = {}
        nesting = self._enumeration.max_plate_nesting
        for name in self._names:
            node, log_prob = self.nodes[name], self._conditional(name)
            if log_prob.dim() <= nesting or log_prob.shape[: log_prob.dim() - nesting].numel() == 1:
                continue
            bare = [d for d in range(-nesting, 0) if log_prob.shape[d] > 1 and d not in _plate_dims(node)]
            if bare:  # no plate says that they are independent given other values than these
                log_prob = log_prob.sum(bare, keepdim=True)
            found[name] = packed.pack(log_prob, node["infer"]["_dim_to_symbol"])
        return found

    def _ordinal(self, name: str) -> frozenset[str]:
        """The plates that a site is in."""
        symbols = self._trace.plate_to_symbol
        return frozenset(symbols[f.name] for f in self.nodes[name]["cond_indep_stack"] if f.vectorized)

    @cached_property
    def _components(self) -> list[_Component]:
        plates = set(self._trace.plate_to_symbol.values())
        groups: list[tuple[list[str], set[str]]] = []  # sites, and the discrete dimensions that they share
        for name, factor in self._factors.items():
            names, symbols = [name], _symbols(factor) - plates
            for group in [g for g in groups if g[1] & symbols]:
                names, symbols = group[0] + names, group[1] | symbols
                groups.remove(group)
            groups.append((names, symbols))
        return [
            _Component(names, self._contract(names, symbols), self._common_scale(names)) for names, symbols in groups
        ]

    def _common_scale(self, names: list[str]) -> Any:
        scales = {name: self.nodes[name]["scale"] for name in names}
        if (
            any(isinstance(s, Tensor) and s.dim() for s in scales.values())
            or len({float(s) for s in scales.values()}) > 1
        ):
            discrete = [n for n in names if n in self._enumeration.names]
            raise DiscreteLatentError(
                f"the discrete latents {some(discrete)} can't be summed out, because they and what depends on them, "
                f"{some(names)}, have different scales. If that is a subsampled plate, a minibatch gives no estimate "
                "of a sum of products over all of the data: drop `subsample_size`, or move the discrete latents into "
                "the plate"
            )
        return scales[names[0]]

    def _contract(self, names: list[str], symbols: set[str]) -> Tensor:
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for name in names:
            tree.setdefault(self._ordinal(name), []).append(self._factors[name])
        try:
            [[total]] = contract_tensor_tree(tree, symbols, ring=_StableLogRing()).values()
        except NotImplementedError as error:
            raise DiscreteLatentError(
                f"the discrete latents among {some(names)} can't be summed out: {error}"
            ) from error
        return total

    def check(self, plain: Run) -> None:
        """Compares each factor, at the values that a plain run drew, with that run's own log density.

        Raises:
            TargetError: a site's differs: the model doesn't broadcast over its discrete latents.
        """
        index = {}
        for name in self._enumeration.names:
            node = self.nodes[name]
            if "_enumerate_symbol" not in node["infer"]:
                continue
            same = node["value"] == plain.nodes[name]["value"]
            for _ in range(node["fn"].event_dim):
                same = same.all(-1)
            place = same.long().argmax(node["infer"]["_enumerate_dim"], keepdim=True)
            index[node["infer"]["_enumerate_symbol"]] = packed.pack(place, node["infer"]["_dim_to_symbol"])
        for name in self._names:
            factor = self._factors.get(name, self._conditional(name))
            for symbol in _symbols(factor) & set(index):
                factor = packed.gather(factor, index[symbol], symbol)
            summed = name in self._enumeration.names
            expected = (unmasked_log_prob(plain.nodes[name]) if summed else plain.pointwise(name)).sum()
            if not torch.allclose(factor.sum(), expected, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise TargetError(
                    f"the log density of site {name!r} is {float(expected):.6g} when the discrete latents "
                    f"{some(self._enumeration.names)} have one value each, and {float(factor.sum()):.6g} at the same "
                    f"values when they have all at once{BROADCAST}"
                )


BROADCAST = (
    ". To be summed out they are given all their values along a new dimension on the left, and what is computed from "
    "them must broadcast over it: index by `table[d]`, or pyro.ops.indexing.Vindex, where other dimensions are indexed "
    "as well; torch.where instead of `if`; `with pyro.plate` for independent ones, pyro.markov for a chain"
)


def some(names: Sequence[str]) -> str:
    """A few of the names, for a message."""
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _symbols(factor: Tensor) -> set[str]:
    return set(getattr(factor, "_pyro_dims", ""))


def _plate_dims(node: Mapping[str, Any]) -> set[int]:
    return {f.dim for f in node["cond_indep_stack"] if f.vectorized}
