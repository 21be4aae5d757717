"""What simulation-based calibration found: ranks, a test of their uniformity, a table and pictures.

If draws come from the posterior of data that were simulated from the prior, then the rank of the true value among
L of them is uniform on 0, ..., L, whatever the model (Talts et al. 2018, theorem 1). The test compares the ranks'
empirical distribution function with that of the uniform at all L points where it can step. With N simulations the count
below point k is Binomial(N, z_k), z_k = k / (L + 1), so that

    gamma = 2 min_k min( P(B_k <= c_k), P(B_k >= c_k) )

is small where the counts c_k leave the simultaneous band (Säilynoja et al. 2022, section 2). Its distribution under
uniformity is simulated: that gives the p-value. Over several quantities p-values are corrected by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from flowvi._version import __version__
from flowvi.checks import lists_of_names, one_of
from flowvi.errors import OptionError
from flowvi.inference_data import find_arviz

__all__ = ["Calibration"]

_NULL_DRAWS, _MOST_NULL_DRAWS = 10_000, 200_000  # simulated statistics behind a p-value
_SHOWN = 20  # rows of the printed table


@dataclass(frozen=True)
class Calibration:
    """The ranks of true values among posterior draws, over N simulations that were fitted.

    Attributes:
        names: The Q scalar quantities: each element of each site, then `log_likelihood` and those of one's own.
        ranks: (N, Q), each in 0, ..., L.
        num_draws: L.
        num_simulations: How many were run: N and the failures.
        trusted: Whether each fit was trusted by its own verdict (N,); None where it has none.
        failures: Simulation number -> why it has no ranks.
        warnings: Name of a warning -> in how many simulations it was given.
        alpha: The probability that `passed` is False by chance, where everything is right.
        target: The model's name.
        seed: The seed.
        seconds: What it took.
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    num_draws: int
    num_simulations: int
    trusted: tuple[bool | None, ...]
    failures: Mapping[int, str]
    warnings: Mapping[str, int]
    alpha: float
    target: str
    seed: int
    seconds: float

    @cached_property
    def pit(self) -> np.ndarray:
        """Ranks as fractions of the way, (rank + 1/2) / (L + 1), (N, Q)."""
        fractions: np.ndarray = (self.ranks + 0.5) / (self.num_draws + 1)
        return fractions

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Quantity -> p-value of the ECDF test (see the module)."""
        num, null = len(self.ranks), self._null
        found = _statistic(self._counts, _coverage(num, self.num_draws))
        # among the simulated ones, so that p is never 0 and never too small
        ps = (1 + np.searchsorted(null, found * (1 + 1e-12), side="right")) / (1 + len(null))
        return dict(zip(self.names, ps.tolist(), strict=True))

    @cached_property
    def adjusted(self) -> dict[str, float]:
        """Quantity -> p-value corrected for the number of quantities.

        Source: Holm (1979), "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6.
        """
        order = sorted(self.names, key=lambda name: self.p_values[name])
        steps = [min(1.0, (len(order) - i) * self.p_values[name]) for i, name in enumerate(order)]
        found = dict(zip(order, np.maximum.accumulate(steps).tolist(), strict=True))
        return {name: found[name] for name in self.names}

    @cached_property
    def chi_square(self) -> dict[str, float]:
        """Quantity -> p-value of the chi-square test over `histogram`; told beside the test, no part of `passed`."""
        counts, expected = self.histogram
        squares = ((counts - expected[:, None]) ** 2 / expected[:, None]).sum(0)
        half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
        ps = torch.special.gammaincc(half, torch.as_tensor(squares / 2))
        return dict(zip(self.names, ps.tolist(), strict=True))

    @cached_property
    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of ranks in up to 20 bins with 10 or more expected, (B, Q), and the expected counts (B,)."""
        num, points = len(self.ranks), self.num_draws + 1
        bins = max(2, min(20, num // 10, points))
        expected = num * np.bincount(np.arange(points) * bins // points, minlength=bins) / points
        at = self.ranks * bins // points
        return np.stack([np.bincount(column, minlength=bins) for column in at.T], 1), expected

    @property
    def passed(self) -> bool:
        """No fit failed, and no quantity's ranks differ from uniform ones at the level alpha, all taken together."""
        return not self.failures and min(self.adjusted.values()) > self.alpha

    @property
    def num_untrusted(self) -> int:
        """Fits that their own verdict doesn't trust; their ranks are counted like all others."""
        return sum(found is False for found in self.trusted)

    @cached_property
    def verdict(self) -> str:
        """What was found, in plain words."""
        wrong = [name for name in self.names if self.adjusted[name] <= self.alpha]
        words = []
        if wrong:
            worst = sorted(wrong, key=lambda name: self.adjusted[name])[:4]
            told = ", ".join(f"{name} ({self._how(name)})" for name in worst)
            more = f", and {len(wrong) - len(worst)} more" if len(wrong) > len(worst) else ""
            words.append(f"Not calibrated: the ranks of {told}{more} are not uniform.")
        if self.failures:
            first, why = next(iter(self.failures.items()))
            words.append(
                f"{len(self.failures)} of {self.num_simulations} simulations have no ranks, so that calibration can't "
                f"be claimed; the first is number {first}: {why}"
            )
        if not words:
            words.append(
                f"Calibrated, as far as {len(self.ranks)} simulations can show: the ranks of all {len(self.names)} "
                f"quantities are uniform at the level {self.alpha:g}."
            )
        if self.num_untrusted:
            words.append(f"{self.num_untrusted} fits were not trusted by their own verdict; their ranks are counted.")
        return " ".join(words)

    def _how(self, name: str) -> str:
        """In which way the draws are off: the first two moments of the ranks tell most of it."""
        u = self.pit[:, self.names.index(name)] - 0.5
        shift = u.mean() * math.sqrt(12 * len(u))
        width = (u.var() * 12 - 1) * math.sqrt(len(u) / 0.8)  # var of 12 u^2 is 4/5
        if max(abs(shift), abs(width)) < 3:
            return "in another way than shift or width"
        if abs(shift) >= abs(width):
            return "draws too low" if shift > 0 else "draws too high"
        return "draws too narrow" if width > 0 else "draws too wide"

    def __str__(self) -> str:
        shown = sorted(self.names, key=lambda name: self.p_values[name])[:_SHOWN]
        chosen = [name for name in self.names if name in shown]
        size = max(len("quantity"), *(len(name) for name in chosen))
        lines = [
            f"Calibration of {self.target}: {len(self.ranks)} simulations of {self.num_simulations}, "
            f"{self.num_draws} draws each, {self.seconds:.0f} s",
            "",
            f"{'quantity':<{size}}  {'mean rank':>9}  {'spread':>6}  {'p (ECDF)':>8}  {'p (Holm)':>8}  {'p (chi2)':>8}",
        ]
        for name in chosen:
            u = self.pit[:, self.names.index(name)]
            lines.append(
                f"{name:<{size}}  {u.mean():>9.3f}  {u.std() * math.sqrt(12):>6.3f}  {self.p_values[name]:>8.2g}  "
                f"{self.adjusted[name]:>8.2g}  {self.chi_square[name]:>8.2g}"
            )
        if len(chosen) < len(self.names):
            lines.append(f"... and {len(self.names) - len(chosen)} more, with larger p")
        lines += ["", "If all is right, mean rank is .5 and spread 1, but for noise.", self.verdict]
        if self.warnings:
            told = ", ".join(f"{name} in {count}" for name, count in self.warnings.items())
            lines.append(f"Warnings by simulation: {told}.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Calibration of {self.target}: N = {len(self.ranks)}, Q = {len(self.names)}, passed={self.passed}>"

    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest ECDF, (L,) each, at 1/(L+1), ..., L/(L+1), that the test accepts.

        The ECDF of any of the Q quantities leaves the band with probability alpha at most.
        """
        num, null = len(self.ranks), self._null
        values = np.unique(null)
        small = (1 + np.searchsorted(null, values, side="right")) / (1 + len(null)) <= self.alpha / len(self.names)
        limit = values[small].max(initial=0.0)  # the largest statistic whose p-value is alpha / Q at most
        inside = _coverage(num, self.num_draws) > limit
        return inside.argmax(1) / num, (num - inside[:, ::-1].argmax(1)) / num

    def plot(self, kind: str = "ecdf", *, names: Sequence[str] | None = None, ax: Any = None) -> np.ndarray:
        """The ranks of each quantity: their ECDF minus the uniform one, or their histogram.

        ArviZ draws the same from `to_arviz("datatree")` by `arviz_plots.plot_ecdf_pit`.

        Args:
            kind: "ecdf", with the simultaneous band of the test; or "hist", with the range of 99% of each bin.
            names: Which quantities; None takes the 12 with the smallest p-values.
            ax: As many axes as there are quantities.

        Returns:
            The axes used, one for each quantity.

        Raises:
            OptionError: An unknown kind or quantity, or too few axes.
        """
        from flowvi.plotting.axes import SKY, VERMILION, ink, panels
        from flowvi.plotting.marginals import MAX_MARGINALS

        one_of(("ecdf", "hist"), kind=kind)
        if names is not None:
            lists_of_names(names=names)
        unknown = [name for name in names or () if name not in self.names]
        if unknown:
            raise OptionError(f"no quantity is named {', '.join(unknown)}: there are {', '.join(self.names)}.")
        if names is None:
            worst = set(sorted(self.names, key=lambda name: self.p_values[name])[:MAX_MARGINALS])
            names = [name for name in self.names if name in worst]
        axes = panels(ax, len(names), size=(2.6, 2.2), columns=4)[: len(names)]
        steps = np.arange(1, self.num_draws + 1) / (self.num_draws + 1)
        low, high = self.band()
        counts, expected = self.histogram
        middle = (np.arange(len(expected)) + 0.5) / len(expected)
        spread = 2.576 * np.sqrt(expected * (1 - expected / len(self.ranks)))
        for axis, name in zip(axes, names, strict=True):
            column = self.names.index(name)
            colour = VERMILION if self.adjusted[name] <= self.alpha else SKY
            if kind == "ecdf":
                axis.fill_between(steps, low - steps, high - steps, color=ink(), alpha=0.15, lw=0)
                axis.plot(steps, self._counts[:, column] / len(self.ranks) - steps, color=colour, lw=1.5)
                axis.axhline(0, color=ink(), lw=0.6, alpha=0.6)
            else:
                axis.fill_between(middle, expected - spread, expected + spread, color=ink(), alpha=0.15, lw=0)
                axis.bar(middle, counts[:, column], 0.9 / len(expected), color=colour)
            axis.set_title(f"{name} (p {self.adjusted[name]:.2g})", fontsize="medium")
            axis.set(xlim=(0, 1), xlabel="rank / L")
        axes[0].set_ylabel("ECDF - uniform" if kind == "ecdf" else "simulations")
        return axes

    def to_arviz(self, kind: str | None = None) -> Any:
        """The ranks as fractions, in ArviZ's group for it, `prior_sbc`, a variable for each quantity.

        Args:
            kind: "inference_data" (ArviZ 0.x), "datatree" (1.x, or its part arviz-base: what
                `arviz_plots.plot_ecdf_pit` takes), or None for what the installed ArviZ uses.

        Returns:
            An `arviz.InferenceData` or an `xarray.DataTree`: one chain, a draw for each simulation.

        Raises:
            OptionError: An unknown kind, or one that the installed packages don't have.
        """
        if kind is not None:
            one_of(("inference_data", "datatree"), kind=kind)
        kind, module = find_arviz(kind)
        values = {name: self.pit[None, :, i] for i, name in enumerate(self.names)}
        attrs = {
            "inference_library": "flowvi",
            "inference_library_version": __version__,
            "num_draws": self.num_draws,
            "num_failures": len(self.failures),
            "passed": int(self.passed),
            "verdict": self.verdict,
        }
        if kind == "datatree":
            return module.from_dict({"prior_sbc": values}, attrs={"/": attrs, "prior_sbc": attrs})
        data = module.InferenceData(prior_sbc=module.dict_to_dataset(values), warn_on_custom_groups=False)
        data.attrs.update(attrs)
        data.prior_sbc.attrs.update(attrs)
        return data

    @cached_property
    def _counts(self) -> np.ndarray:
        """How many ranks are below k, for k = 1, ..., L, (L, Q)."""
        each = np.stack([np.bincount(column, minlength=self.num_draws + 1) for column in self.ranks.T], 1)
        below: np.ndarray = each.cumsum(0)[:-1]
        return below

    @property
    def _null(self) -> np.ndarray:
        """Enough simulated statistics to see a p-value of alpha / Q."""
        wanted = min(_MOST_NULL_DRAWS, max(_NULL_DRAWS, math.ceil(20 * len(self.names) / self.alpha)))
        return _null(len(self.ranks), self.num_draws, wanted)


def _coverage(num: int, num_draws: int) -> np.ndarray:
    """2 min(P(B <= c), P(B >= c)) for B ~ Binomial(N, k / (L + 1)): (L, N + 1), for each k = 1, ..., L and c."""
    c = torch.arange(num + 1, dtype=torch.float64)
    z = (torch.arange(1, num_draws + 1, dtype=torch.float64) / (num_draws + 1))[:, None]
    choose = math.lgamma(num + 1) - torch.lgamma(c + 1) - torch.lgamma(num - c + 1)
    mass = (choose + c * z.log() + (num - c) * (1 - z).log()).exp()
    at_most = mass.cumsum(1)
    at_least = mass.flip(1).cumsum(1).flip(1)
    return (2 * torch.minimum(at_most, at_least)).numpy()


def _statistic(counts: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Gamma of each column of counts (L, n): (n,)."""
    least: np.ndarray = coverage[np.arange(len(counts))[:, None], counts].min(0)
    return least


@lru_cache(maxsize=8)
def _null(num: int, num_draws: int, size: int) -> np.ndarray:
    """Sorted statistics of so many sets of N uniform ranks, always the same ones."""
    random = np.random.default_rng(0)
    coverage = _coverage(num, num_draws)
    uniform = np.full(num_draws + 1, 1 / (num_draws + 1))
    found = []
    for start in range(0, size, 2000):
        counts = random.multinomial(num, uniform, size=min(2000, size - start)).cumsum(1)[:, :-1]
        found.append(_statistic(counts.T, coverage))
    return np.sort(np.concatenate(found))
