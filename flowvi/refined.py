"""A posterior whose draws come from Markov chains, with a verdict of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowvi.chains import Agreement, Chains, agreement, describe_separation
from flowvi.checks import as_seed
from flowvi.diagnostics import Diagnostics
from flowvi.errors import FileFormatError
from flowvi.posterior import _SUMMARY_ELEMENTS, Posterior

__all__ = ["DIVERGENCE_LIMIT", "RefinedDiagnostics", "RefinedPosterior"]

DIVERGENCE_LIMIT = 1e-3  # of the steps
EVIDENCE_LIMIT = 0.1  # nats from a known normalizer, three standard errors apart
LONG_ENOUGH = 100  # draws of a chain, to say of a place that it doesn't leave it


@dataclass(frozen=True)
class RefinedDiagnostics(Diagnostics):
    """What the chains say, beside the numbers of the flow that they started from.

    `elbo` and `khat` are the flow's. `log_evidence` is found by bridge sampling from the chains' draws; its standard
    error is infinite where that can't be relied on. `gap` is the difference to the flow's ELBO. `ess` is the smaller
    one of the smallest bulk and tail ESS, `num_samples` the number of draws that are kept; `trusted` and `verdict`
    are about the chains. `kl` is None.

    Attributes:
        r_hat: The largest R-hat of the unconstrained coordinates (split, rank-normalized).
        worst: The site it belongs to, with its element.
        ess_bulk: The smallest bulk ESS.
        ess_tail: The smallest tail ESS.
        num_chains: C.
        divergences: Steps with an energy error above 1000 nats.
        transitions: Steps that made the draws, over all chains.
        acceptance: The mean acceptance probability.
        stopped: Why the run ended.
    """

    r_hat: float = math.inf
    worst: str = ""
    ess_bulk: float = 0.0
    ess_tail: float = 0.0
    num_chains: int = 0
    divergences: int = 0
    transitions: int = 0
    acceptance: float = 0.0
    stopped: str = ""

    def numbers(self) -> str:
        """The numbers on one line, without the verdict."""
        parts = [
            f"R-hat {self.r_hat:.4g}",
            f"ESS {self.ess_bulk:.0f} bulk, {self.ess_tail:.0f} tail of {self.num_samples}",
            f"{self.num_chains} chains",
            f"{self.divergences} of {self.transitions} steps divergent",
            f"log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.2g}",
        ]
        return ", ".join(parts)


class RefinedPosterior(Posterior):
    """A posterior by HMC in a flow's coordinates: its draws are the chains' draws.

    `sample`, `resample`, `mean`, `std`, `quantiles` and `to_arviz` use the kept draws; asked for more than there
    are, `sample` gives some of them twice. `log_prob` and `guide` are still the flow's: chains have no density.

    Args:
        unrefined: The posterior that was refined.
        chains: Its draws.
        goal_r_hat: The R-hat that was asked.
        goal_ess: The ESS that was asked, bulk and tail.
        timing: Seconds by phase; the unrefined posterior's if None.
        config: What was decided; the unrefined posterior's if None.

    Attributes:
        unrefined: As above.
        chains: As above.
        goal_r_hat: As above.
        goal_ess: As above.
    """

    def __init__(
        self,
        unrefined: Posterior,
        chains: Chains,
        *,
        goal_r_hat: float = 1.01,
        goal_ess: float = 4000.0,
        timing: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            unrefined.flow,
            unrefined.density,
            config=unrefined.config if config is None else config,
            timing=unrefined.timing if timing is None else timing,
            history=unrefined.history,
            seed=unrefined.seed,
        )
        self.unrefined = unrefined
        self.chains = chains
        self.goal_r_hat = goal_r_hat
        self.goal_ess = goal_ess

    # the verdict

    @cached_property
    def agreement(self) -> Agreement:
        """R-hat and ESS of the unconstrained coordinates, at their worst."""
        return agreement(self.chains.z)

    def diagnose(
        self, num_samples: int | None = None, *, seed: int | None = None, hmc: bool = False
    ) -> RefinedDiagnostics:
        """R-hat, ESS and divergences of the chains, the evidence by bridge sampling, and a verdict in words.

        Args:
            num_samples: Draws of the flow for ELBO and k-hat, as for `Posterior.diagnose`.
            seed: As for `Posterior.diagnose`.
            hmc: Not used: the chains are an HMC.

        Returns:
            The diagnostics. Trusted only if R-hat is below the limit, bulk and tail ESS reach what was asked, at
            most 0.1% of the steps diverged and, where the target's log Z is known, the evidence agrees with it.
        """
        seed = as_seed(seed)
        key = (num_samples, seed, False)
        if key not in self._diagnoses:
            of_flow = self.unrefined.diagnose(num_samples, seed=seed, hmc=False)
            found, chains = self.agreement, self.chains
            evidence, evidence_se = chains.log_evidence, chains.log_evidence_se
            ess = min(found.ess_bulk, found.ess_tail)
            base = {f.name: getattr(of_flow, f.name) for f in fields(Diagnostics)}
            known = self.density.log_normalizer
            missing = known is not None and not abs(known - evidence) < EVIDENCE_LIMIT + 3 * evidence_se
            trusted, verdict = self._verdict(found, missing)
            self._diagnoses[key] = RefinedDiagnostics(
                **base
                | {
                    "log_evidence": evidence,
                    "log_evidence_se": evidence_se,
                    "gap": evidence - of_flow.elbo,
                    "gap_se": math.hypot(evidence_se, of_flow.elbo_se),
                    "ess": ess,
                    "ess_fraction": ess / chains.num_draws,
                    "num_samples": chains.num_draws,
                    "trusted": trusted,
                    "verdict": verdict,
                    "kl": None,
                    "kl_se": None,
                },
                r_hat=found.r_hat,
                worst=self.density.coordinate_name(found.worst),
                ess_bulk=found.ess_bulk,
                ess_tail=found.ess_tail,
                num_chains=chains.num_chains,
                divergences=chains.divergences,
                transitions=chains.transitions,
                acceptance=chains.acceptance,
                stopped=chains.stopped,
            )
        diagnosis = self._diagnoses[key]
        assert isinstance(diagnosis, RefinedDiagnostics)
        return diagnosis

    def _verdict(self, found: Agreement, missing: bool) -> tuple[bool, str]:
        """Whether the chains can be trusted, and the sentences."""
        chains, bad = self.chains, []
        share = chains.divergences / max(chains.transitions, 1)
        agree = found.r_hat < self.goal_r_hat
        go_on = "Call refine() on this result to go on from here, with a larger time_limit"
        if not agree:
            words = (
                f"The chains disagree (R-hat {found.r_hat:.4g} at {self.density.coordinate_name(found.worst)}, limit "
            )
            words += f"{self.goal_r_hat:.4g})"
            long = chains.z.shape[1] >= LONG_ENOUGH
            apart = describe_separation(chains.z[:, :, found.worst]) if long and found.r_hat > 1.1 else None
            if apart is not None:
                bad.append(
                    f"{words}: chains sit in separate places ({apart}, on the unconstrained scale), between which "
                    "they don't travel, so how much each place weighs is unknown. Fit again with anneal=True or "
                    "more restarts; if the places are the same up to a renaming, order the parameters in the model."
                )
            else:
                slow = "they move too slowly" if long and found.r_hat > 1.05 else "they need longer"
                bad.append(f"{words}: {slow}. {go_on}, or use more flows, so that they move faster.")
        elif not min(found.ess_bulk, found.ess_tail) >= self.goal_ess:
            bad.append(
                f"The draws are worth {found.ess_bulk:.0f} (bulk) and {found.ess_tail:.0f} (tail) independent ones, "
                f"fewer than the {self.goal_ess:.0f} that were asked. {go_on}, or ask for fewer (ess=)."
            )
        if not share <= DIVERGENCE_LIMIT:
            bad.append(
                f"{chains.divergences} of {chains.transitions} steps diverged: somewhere the posterior is too sharp "
                "for any common step size, as in the neck of a funnel, and the draws avoid that place. "
                "Reparametrize (such as non-centered), or use more flows."
            )
        if missing:
            bad.append(
                "The evidence is not the known normalizer: the chains miss part of the mass, such as a mode. Fit "
                "again with anneal=True or more restarts."
            )
        if bad:
            return False, "Do not trust this yet. " + " ".join(bad)
        return True, (
            f"Trusted: {chains.num_chains} chains agree (R-hat {found.r_hat:.4f}, limit {self.goal_r_hat:.4g}), "
            f"and their {chains.num_draws} draws are worth {found.ess_bulk:.0f} (bulk) and {found.ess_tail:.0f} "
            "(tail) independent ones"
            + (f"; {chains.divergences} of {chains.transitions} steps diverged. " if chains.divergences else ". ")
            + (
                "The known normalizer confirms it."
                if self.density.log_normalizer is not None
                else "A mode where no chain started can't show here: if there may be several, fit again with "
                "another seed."
            )
        )

    # the draws

    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """All draws, chain after chain: z (C n, D), log p and log q (C n,)."""
        return self.chains.z.flatten(0, 1), self.chains.log_p.flatten(), self.chains.log_q.flatten()

    def _pick(self, num: int, generator: torch.Generator) -> Tensor:
        """Indices of draws in random order: none twice before all were taken once."""
        total = self.chains.num_draws
        rounds = [torch.randperm(total, generator=generator, device=generator.device) for _ in range(-(-num // total))]
        return torch.cat(rounds)[:num].to(self.chains.z.device) if rounds else torch.zeros(0, dtype=torch.long)

    def _draw(self, num: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        z, _, log_q = self._flat()
        for index in self._pick(num, generator).split(self._rows):
            yield z[index], log_q[index]

    def _weigh(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        z, log_p, log_q = self._flat()
        index = self._pick(num, generator)
        return z[index], log_p[index], log_q[index]

    def _resample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return self._weigh(num, generator)  # the draws are the target's already

    def _in_chains(self, num: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """About `num` draws evenly thinned, chain after chain: sites, z, log p and log q."""
        kept = self.chains.z.shape[1]
        length = max(1, min(kept, -(-num // self.chains.num_chains)))
        at = torch.linspace(0, kept - 1, length).round().long().to(self.chains.z.device)
        z = self.chains.z[:, at].flatten(0, 1)
        log_p, log_q = (part[:, at].flatten() for part in (self.chains.log_p, self.chains.log_q))
        return self._constrain(z.split(self._rows), len(z)), z, log_p, log_q

    @cached_property
    def _summary(self) -> dict[str, Tensor]:
        """The draws behind mean, std and quantiles: all that are kept, or evenly thinned to what memory holds."""
        sites = (*self.density.sites, *self.density.deterministic)
        elements = sum(math.prod(site.shape) for site in sites)
        num = max(1000, min(self.chains.num_draws, _SUMMARY_ELEMENTS // max(elements, 1)))
        at_sites = self._in_chains(num)[0]
        return {name: x if x.is_floating_point() else x.to(self.density.dtype) for name, x in at_sites.items()}

    # elsewhere

    @property
    def _num_chains(self) -> int:  # type: ignore[override]
        return self.chains.num_chains

    def _draws_with_densities(
        self, num: int, *, resample: bool, seed: int | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        return self._in_chains(num)

    def to_arviz(
        self,
        kind: str | None = None,
        *,
        num_samples: int | None = None,
        resample: bool = False,
        predictive: bool | None = None,
        seed: int | None = None,
    ) -> Any:
        """The chains for ArviZ, with their own dimensions; see `flowvi.inference_data.to_arviz`.

        Args:
            kind: As for `Posterior.to_arviz`.
            num_samples: About how many draws, all chains together, evenly thinned; all that are kept if None.
            resample: No difference here.
            predictive: As for `Posterior.to_arviz`.
            seed: Of the simulated data; no difference to the draws.

        Returns:
            An `arviz.InferenceData` or an `xarray.DataTree`.
        """
        num = self.chains.num_draws if num_samples is None else num_samples
        return super().to_arviz(kind, num_samples=num, resample=False, predictive=predictive, seed=seed)

    def _stored_chains(self) -> dict[str, Any]:
        parts = {f.name: getattr(self.chains, f.name) for f in fields(Chains)}
        return {"chains": parts, "goal_r_hat": self.goal_r_hat, "goal_ess": self.goal_ess}

    @classmethod
    def restored(cls, posterior: Posterior, stored: Mapping[str, Any]) -> RefinedPosterior:
        """What a file held, on top of the posterior that it held.

        Raises:
            FileFormatError: The parts don't fit together.
        """
        timing, config = dict(posterior.timing), dict(posterior.config)
        posterior.timing.pop("refine", None)
        posterior.config.pop("refine", None)
        try:
            chains = Chains(**stored["chains"])
            goals = {"goal_r_hat": float(stored["goal_r_hat"]), "goal_ess": float(stored["goal_ess"])}
        except (KeyError, TypeError) as error:
            raise FileFormatError(
                f"the file's chains don't fit together ({error}): save the posterior anew."
            ) from error
        return cls(posterior, chains, timing=timing, config=config, **goals)

    # in words

    def _made_by(self, short: bool = False) -> str:
        refined = f"refined by {self.chains.num_chains} chains of {self.chains.z.shape[1]} draws"
        made = super()._made_by(short)
        return f"{made}, {refined}" if short else f"{made}; {refined} ({self.chains.stopped})"
