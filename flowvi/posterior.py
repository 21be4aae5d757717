"""What a user holds after a fit: draws, densities, summaries and a verdict.

A `Posterior` joins a flow q(z) on unconstrained z in R^D with the `LogDensity` that knows the target and the
map z -> x to the model's sites. Densities of sites follow by the change of variables

    log q(x) = log q(z(x)) + log |det dz/dx|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowvi.checks import as_array, as_seed, flags, instances, shown, whole_numbers
from flowvi.describe import fit_words, flow_words
from flowvi.diagnostics import Diagnostics
from flowvi.errors import DimensionError, NonFiniteError, OptionError
from flowvi.examine import examine
from flowvi.flow import Flow
from flowvi.history import History
from flowvi.psis import psis, systematic
from flowvi.random_state import own_generator
from flowvi.site_values import flatten, log_prob_at
from flowvi.table import PERCENTS, table
from flowvi.targets.density import LogDensity

if TYPE_CHECKING:
    from flowvi.refined import RefinedPosterior

__all__ = ["Posterior"]

_CHUNK_ELEMENTS = 2**21  # of z at a time, however many draws are asked for
_SUMMARY_ELEMENTS = 2**23  # of the draws behind mean, std and quantiles
_POOL = 10_000  # at least so many draws to resample from


class Posterior:
    """An approximation q of a posterior, with everything a user asks of it.

    Draws come from the posterior's own generators; torch's global one is neither read nor changed. A call
    without a seed gives fresh draws: with a `seed` of the fit the sequence of calls is reproducible, and a
    loaded posterior starts the sequence anew.

    Args:
        flow: q on unconstrained z, event shape (D,).
        density: The target on the same z, with its sites.
        config: What the engine decided, plain data.
        timing: Seconds by phase.
        history: The trace of the fit.
        seed: The fit's seed, or None.

    Attributes:
        flow: As above.
        density: As above.
        config: As above, a dict.
        timing: As above, a dict.
        history: As above.
        seed: As above.

    Raises:
        OptionError: An argument is of another type.
        DimensionError: Flow and target differ in D.
    """

    def __init__(
        self,
        flow: Flow,
        density: LogDensity,
        *,
        config: Mapping[str, Any],
        timing: Mapping[str, float],
        history: History,
        seed: int | None = None,
    ) -> None:
        instances(Flow, flow=flow)
        instances(LogDensity, density=density)
        instances(Mapping, config=config, timing=timing)
        instances(History, history=history)
        seed = as_seed(seed)
        if flow.dim != density.dim:
            raise DimensionError(f"the flow has D = {flow.dim}, the target {density.dim}: they must agree.")
        density.prepare()
        self.flow = flow
        self.density = density
        self.config = dict(config)
        self.timing = dict(timing)
        self.history = history
        self.seed = seed
        self._stream = own_generator(seed, "stream", density.device)
        self._diagnoses: dict[tuple[int | None, int | None, bool], Diagnostics] = {}

    # draws

    def sample(self, num_samples: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws x ~ q of every site, deterministic sites included.

        Worked off in chunks: memory beyond the result itself doesn't grow with `num_samples`.

        Args:
            num_samples: n.
            seed: Makes the call reproducible by itself; None continues the posterior's own sequence.

        Returns:
            Site name -> draws (n, *shape) in the constrained space, latent sites first.
        """
        whole_numbers(num_samples=num_samples)
        draws = self._draw(num_samples, self._generator(seed, "sample"))
        return self._constrain((z for z, _ in draws), num_samples)

    def stream(
        self, num_samples: int, *, chunk_size: int = 16_384, seed: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The draws of `sample` piece by piece, for more of them than memory holds.

        Args:
            num_samples: n, over all pieces.
            chunk_size: Draws in a piece, at most; fewer where D is large.
            seed: As for `sample`: the pieces joined are what it gives for the same seed.

        Returns:
            An iterator over pieces, each site name -> draws (s, *shape).
        """
        whole_numbers(num_samples=num_samples)
        whole_numbers(1, chunk_size=chunk_size)
        draws = self._draw(num_samples, self._generator(seed, "sample"))
        return (self._constrain([piece], len(piece)) for z, _ in draws for piece in z.split(chunk_size))

    def resample(self, num_samples: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws corrected towards the target by Pareto-smoothed importance resampling.

        A pool of max(4 n, 10,000) draws of q gets weights p / q, the largest of them are smoothed (PSIS), and n
        are taken by systematic resampling, with repetition. This repairs what the weights can tell: a wrong
        mean or scale, not a mode that q never visits. Look at `diagnose().khat`: above 0.7 the result is
        no better than its few largest weights.

        Source: Vehtari, Simpson, Gelman, Yao, Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72).

        Args:
            num_samples: n.
            seed: As for `sample`.

        Returns:
            Site name -> draws (n, *shape), in random order.

        Raises:
            NonFiniteError: No draw has a finite log density.
        """
        whole_numbers(1, num_samples=num_samples)
        z, _, _ = self._resample(num_samples, self._generator(seed, "resample"))
        return self._constrain(z.split(self._rows), num_samples)

    def log_prob(self, values: Mapping[str, Any] | Any) -> Tensor:
        """The density log q(x) = log q(z(x)) + log |det dz/dx|, exact for any x.

        A point outside of a site's support, or on the edge of it, has log q = -inf; NaN gives NaN.

        Args:
            values: Latent site name -> value of shape (*batch, *shape), with the same batch for all, such as
                () or (S,). Other names, such as those of deterministic sites, are ignored. Where the target
                has one latent site (energies and callables: "z"), its value alone will do.

        Returns:
            log q (*batch).

        Raises:
            OptionError: A latent site is missing, or a value isn't a tensor of numbers.
            DimensionError: A value's shape doesn't fit its site, or two batches differ.
        """
        flat, batch = flatten(values, self.density)
        grad = torch.is_grad_enabled() and any(value.requires_grad for value in flat.values())
        num = math.prod(batch)
        with torch.set_grad_enabled(grad):
            parts = [
                log_prob_at(
                    {name: value[start : start + self._rows] for name, value in flat.items()}, self.flow, self.density
                )
                for start in range(0, num, self._rows)
            ]
        return torch.cat(parts).reshape(batch) if parts else torch.zeros(batch, dtype=self.density.dtype)

    # summaries

    def quantiles(self, q: Sequence[float] | Tensor | float) -> dict[str, Tensor]:
        """Quantiles of each element of each site, from the same draws at every call.

        Args:
            q: Probabilities in [0, 1].

        Returns:
            Site name -> quantiles (len(q), *shape); without the leading dimension where q is one number.

        Raises:
            OptionError: A probability outside of [0, 1], or no number.
        """
        probs = as_array("q", q)
        if probs.ndim > 1 or not ((probs >= 0) & (probs <= 1)).all():
            raise OptionError(f"q must be one probability in [0, 1] or a sequence of them, got {shown(q)}.")
        return {
            name: torch.as_tensor(np.quantile(draws.cpu().numpy(), probs, axis=0)).to(draws)
            for name, draws in self._summary.items()
        }

    def median(self) -> dict[str, Tensor]:
        """The median of each element of each site: name -> (*shape)."""
        return self.quantiles(0.5)

    def mean(self) -> dict[str, Tensor]:
        """The mean of each element of each site: name -> (*shape)."""
        return {name: draws.mean(0) for name, draws in self._summary.items()}

    def std(self) -> dict[str, Tensor]:
        """The standard deviation of each element of each site: name -> (*shape)."""
        return {name: draws.std(0) for name, draws in self._summary.items()}

    def diagnose(self, num_samples: int | None = None, *, seed: int | None = None, hmc: bool = True) -> Diagnostics:
        """ELBO, log evidence, k-hat and ESS from fresh draws, what a short HMC moves, and a verdict in words.

        The draws are independent of the fit's. The same call again is answered from memory. What the numbers
        can't show: a mode that q never visits (see `flowvi.diagnostics`).

        Args:
            num_samples: S, at least 100. The largest weights decide, so few draws are optimistic. None: 10,000, and
                up to 16 times as many where so many leave it undecided whether a mean or sd is right
                (`Diagnostics.undecided`).
            seed: Other draws; None stands for one fixed choice.
            hmc: Whether the short HMC is run (`flowvi.short_run`): about a thousand gradients of 128
                particles, a second for most models; and, for a fit that was not whitened, the search for modes
                elsewhere (`flowvi.fit.search`). Both are left out where the model can't be traced, and above D = 2000.

        Returns:
            The diagnostics.
        """
        if num_samples is not None:
            whole_numbers(100, num_samples=num_samples)
        seed = as_seed(seed)
        flags(hmc=hmc)
        key = (num_samples, seed, hmc)
        if key not in self._diagnoses:
            generator = own_generator(self.seed or 0 if seed is None else seed, "diagnose", self.density.device)
            found = examine(self, num_samples, generator, hmc=hmc)
            words = self.config.get("label_switching")
            self._diagnoses[key] = replace(found, verdict=f"{found.verdict} {words}") if words else found
        return self._diagnoses[key]

    def refine(
        self,
        *,
        num_chains: int | None = None,
        ess: float = 4000.0,
        rhat: float = 1.01,
        time_limit: float | None = None,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> RefinedPosterior:
        """Exact draws by HMC in the flow's coordinates; see `flowvi.refine.refine`.

        Args:
            num_chains: C, at least 4; 128 if None.
            ess: The bulk and tail ESS to reach in every coordinate.
            rhat: The R-hat to reach.
            time_limit: Seconds; None runs until the chains agree, or 20,000 steps of each.
            seed: As for `sample`.
            progress: Whether a bar is shown; None shows it in a terminal or notebook.

        Returns:
            A posterior whose draws are the chains', with a verdict of its own.
        """
        from flowvi.refine import refine

        return refine(
            self,
            num_chains=num_chains,
            ess=ess,
            rhat=rhat,
            time_limit=time_limit,
            seed=seed,
            progress=progress,
        )

    # elsewhere

    @cached_property
    def guide(self) -> Any:
        """A Pyro guide that draws from q: for SVI, `Predictive`, or whatever takes a guide."""
        from flowvi.guides import AutoFlow

        return AutoFlow.from_posterior(self.density, self.flow)

    def to_arviz(
        self,
        kind: str | None = None,
        *,
        num_samples: int = 4000,
        resample: bool = False,
        predictive: bool | None = None,
        seed: int | None = None,
    ) -> Any:
        """The posterior for ArviZ; see `flowvi.inference_data.to_arviz`.

        Args:
            kind: "inference_data" (ArviZ 0.x), "datatree" (1.x), or None for what the installed ArviZ uses.
            num_samples: Draws, in one chain.
            resample: Draws corrected by importance resampling instead of draws of q.
            predictive: Whether a data set is simulated at each draw; None does so where the model can be simulated.
            seed: As for `sample`.

        Returns:
            An `arviz.InferenceData` or an `xarray.DataTree`.
        """
        from flowvi.inference_data import to_arviz

        return to_arviz(self, kind, num_samples=num_samples, resample=resample, predictive=predictive, seed=seed)

    def save(self, path: str | Path) -> None:
        """Writes the posterior to a file that `flowvi.load(path, model)` reads.

        The file holds plain data: tensors, numbers and words. A model's arguments go with it where they are
        plain data too (numbers, strings, tensors, arrays, and dicts, lists and tuples of these).

        Args:
            path: The file; an older one is replaced, and only when the new one is complete.

        Raises:
            OptionError: The flow can't be built again from its name: it was composed by hand, or its factory isn't
                registered.
        """
        from flowvi.storage import save

        save(self, path)

    # in words

    def __repr__(self) -> str:
        names = [site.name for site in self.density.sites]
        shown = ", ".join(names[:4]) + (f", ... {len(names) - 4} more" if len(names) > 4 else "")
        made = self._made_by(short=True)
        return f"<Posterior of {self.density.name}: D = {self.density.dim}, {shown}; {made}>"

    def __str__(self) -> str:
        diagnosis = self.diagnose()
        return "\n".join(
            [
                f"Posterior of {self.density.name}, D = {self.density.dim}",
                "",
                *table(self.mean(), self.std(), self.quantiles([p / 100 for p in PERCENTS])),
                "",
                diagnosis.numbers(),
                diagnosis.verdict,
                self._made_by() + ".",
            ]
        )

    def _made_by(self, short: bool = False) -> str:
        """The flow and, unless short, steps, particles, annealing and seconds, as far as they are known."""
        words = flow_words(self.flow, self.config)
        return words if short else f"Made by {words}{fit_words(self.config, self.history, self.timing)}"

    # the machinery

    _num_chains = 1  # that the draws form, for ArviZ

    def _stored_chains(self) -> dict[str, Any] | None:
        """What a file keeps beside the flow: nothing, but for a refined posterior."""
        return None

    @property
    def _rows(self) -> int:
        """How many z to hold at once."""
        return max(64, min(16_384, _CHUNK_ELEMENTS // max(self.density.dim, 1)))

    def _draw(self, num: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of z (s, D) and log q (s,), num rows altogether, in the target's dtype."""
        for start in range(0, num, self._rows):
            with torch.no_grad():
                z, log_q = self.flow.rsample_and_log_prob(min(self._rows, num - start), generator=generator)
            yield z.to(self.density.dtype), log_q

    def _weigh(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws z (num, D) with log p and log q in float64 (num,)."""
        zs, ps, qs = [], [], []
        for z, log_q in self._draw(num, generator):
            with torch.no_grad():
                ps.append(self.density.full(z).double())
            zs.append(z)
            qs.append(log_q.double())
        return torch.cat(zs), torch.cat(ps), torch.cat(qs)

    def _resample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Importance-resampled draws z (num, D) with their log p and log q."""
        z, log_p, log_q = self._weigh(max(4 * num, _POOL), generator)
        log_w = (log_p - log_q).cpu()
        log_w[~(log_p.isfinite() & log_q.isfinite()).cpu()] = -math.inf
        if not log_w.isfinite().any():
            raise NonFiniteError("no draw of the flow has a finite log density: see posterior.diagnose().")
        weights = torch.as_tensor(psis(log_w.numpy())[0]).exp()
        index = systematic(weights, num, generator).to(z.device)
        return z[index], log_p[index], log_q[index]

    def _draws_with_densities(
        self, num: int, *, resample: bool, seed: int | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Draws of all sites, the same as z (num, D), and their log p and log q (num,)."""
        whole_numbers(1, num_samples=num)
        generator = self._generator(seed, "resample" if resample else "sample")
        z, log_p, log_q = (self._resample if resample else self._weigh)(num, generator)
        return self._constrain(z.split(self._rows), num), z, log_p, log_q

    def _generator(self, seed: int | None, purpose: str) -> torch.Generator:
        """The posterior's own sequence, or one of its own for a seed."""
        seed = as_seed(seed)
        return self._stream if seed is None else own_generator(seed, purpose, self.density.device)

    def _constrain(self, chunks: Iterator[Tensor] | Sequence[Tensor], num: int) -> dict[str, Tensor]:
        """All sites at chunks of z, collected without a second copy: name -> (num, *shape)."""
        out: dict[str, Tensor] = {}
        start = 0
        with torch.no_grad():
            for z in chunks:
                for name, value in self.density.constrain(z).items():
                    if name not in out:
                        out[name] = value.new_empty((num, *value.shape[1:]))
                    out[name][start : start + len(z)] = value
                start += len(z)
        if not out:
            sites = (*self.density.sites, *self.density.deterministic)
            out = {
                s.name: torch.empty((num, *s.shape), dtype=self.density.dtype, device=self.density.device)
                for s in sites
            }
        return out

    @cached_property
    def _summary(self) -> dict[str, Tensor]:
        """The draws behind mean, std and quantiles, floating point, from a fixed seed."""
        sites = (*self.density.sites, *self.density.deterministic)
        elements = sum(math.prod(site.shape) for site in sites)
        num = max(1000, min(20_000, _SUMMARY_ELEMENTS // max(elements, 1)))
        draws = self._draw(num, own_generator(self.seed or 0, "summary", self.density.device))
        sites_at = self._constrain((z for z, _ in draws), num)
        return {name: x if x.is_floating_point() else x.to(self.density.dtype) for name, x in sites_at.items()}
