"""Simulation-based calibration: does a fit find the posterior, over data sets that the model itself generates?

Parameters are drawn from the prior, data given them, and a posterior is fitted to each data set. See
`flowvi.calibration` for what follows from the ranks of the true values among the posterior's draws.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import secrets
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowvi.calibration import Calibration
from flowvi.checks import (
    as_device,
    as_seed,
    flags,
    flags_or_none,
    float_or_double,
    functions,
    is_number,
    keywords,
    lists_of_names,
    positive_integers,
    shown,
)
from flowvi.errors import (
    DimensionError,
    DiscreteLatentError,
    FlowVIError,
    InterruptedWarning,
    NoLatentError,
    NonFiniteError,
    OptionError,
    SubsampledLatentError,
    TargetError,
)
from flowvi.fit import fit as fit_flow
from flowvi.posterior import Posterior
from flowvi.progress import Bar, wanted
from flowvi.simulate import Simulator
from flowvi.targets import LogDensity
from flowvi.targets.isolation import private_rng

__all__ = ["sbc"]

_NOT_BY_CHANCE = (OptionError, DimensionError, NoLatentError, DiscreteLatentError, SubsampledLatentError)
"""Errors that every simulation would end in: they are raised, not counted."""

_SET_HERE = ("target", "args", "kwargs", "seed", "progress", "verify", "checkpoint", "checkpoint_every", "dim")
Fit = Callable[[dict[str, Tensor]], Posterior | Mapping[str, Any]]
Quantities = Callable[[dict[str, Tensor], dict[str, Tensor]], Mapping[str, Any]]


def sbc(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_simulations: int = 200,
    num_draws: int = 199,
    fit: Fit | None = None,
    observed: Sequence[str] | None = None,
    quantities: Quantities | None = None,
    log_likelihood: bool = True,
    resample: bool = False,
    hmc: bool = False,
    alpha: float = 0.01,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    workers: int = 1,
    progress: bool | None = None,
    **options: Any,
) -> Calibration:
    r"""Ranks of true values theta ~ p(theta) among draws of the posteriors of data y ~ p(y | theta), and their test.

    Each simulation draws latents from the prior and data of the given data's shape, fits a posterior to them, and
    counts how many of L draws are below the true value: uniform on 0, ..., L if the fits are right on average.
    Ranked are all elements of all sites, and the log-likelihood, which sees errors that marginals don't. Where a value
    ties with draws, its rank is drawn among the tied places.

    What passes is right on average, for data as the prior makes them: a wide prior makes strange data sets. Covariates
    among the arguments stay as they are. A fit that fails has no ranks; it is counted, and `passed` is then False.

    Source: Talts, Betancourt, Simpson, Vehtari & Gelman (2018), "Validating Bayesian inference algorithms with
    simulation-based calibration", arXiv:1804.06788, algorithm 1; the test: Säilynoja, Bürkner & Vehtari (2022),
    "Graphical test for discrete uniformity", arXiv:2103.10522; the log-likelihood as a quantity: Modrák et al. (2023),
    arXiv:2211.02383.

    Args:
        model: a Pyro model with proper priors.
        args: its arguments. The data among them give shapes; their values are replaced at the observed sites.
        kwargs: its keyword arguments.
        num_simulations: N; 200 see a shift of .3 sd, or a width off by a third, in nearly all cases.
        num_draws: L, draws of each posterior.
        fit: data (observed site -> value) -> a posterior, or draws, site -> (n, *shape), of which L are taken at even
            distances (n should be so large that these are nearly independent). None: `flowvi.fit` with the options.
        observed: the sites that are data; None takes those with obs= in the model. Named ones may be plain sample
            sites of a model that is written without data.
        quantities: further quantities to rank: (sites (n, *shape), data) -> name -> (n, ...).
        log_likelihood: whether the log-likelihood of all data is ranked too.
        resample: whether draws are corrected by importance resampling, `Posterior.resample`, before they are ranked.
        hmc: whether each fit's verdict includes the short HMC, a second for most models; else k-hat alone decides.
        alpha: the probability of a false alarm over all quantities.
        seed: makes the call reproducible, however many workers there are; drawn if None.
        dtype: of simulation and fits; float64 if an argument is, else torch's default.
        device: where to compute.
        workers: processes of one thread each. More than 1 needs what is given here to be picklable, and so functions of
            a module, not lambdas.
        progress: whether a bar is shown; None shows it in a terminal or notebook.
        **options: for `flowvi.fit`, such as flow=, num_flows= and num_steps=: one setting for all.

    Returns:
        The ranks and their test: print it, ask for `passed`, `plot()`, `to_arviz()`.

    Raises:
        OptionError: an argument can't be used.
        TargetError and its children: there is nothing observed; a site can't be simulated (an improper prior,
            `pyro.factor`); a plate subsamples; no fit succeeded.

    Warns:
        InterruptedWarning: Ctrl-C; the result is of the simulations so far.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, flowvi
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> found = flowvi.sbc(model, (torch.zeros(()),), num_simulations=10, num_flows=0, num_steps=5, seed=0)
        >>> found.names, found.ranks.shape
        (('mu', 'log_likelihood'), (10, 2))
    """
    positive_integers(num_simulations=num_simulations, num_draws=num_draws, workers=workers)
    if not (is_number(alpha) and 0 < alpha < 1):
        raise OptionError(f"alpha must be a probability between 0 and 1, not {shown(alpha)}.")
    flags(log_likelihood=log_likelihood, resample=resample, hmc=hmc)
    flags_or_none(progress=progress)
    seed = as_seed(seed)
    keywords(kwargs=kwargs)
    float_or_double(dtype)
    device = as_device(device)
    if quantities is not None:
        functions(quantities=quantities)
    if observed is not None and not isinstance(observed, str):  # which has a message of its own
        lists_of_names(observed=observed)
    wrong = sorted(set(options) & set(_SET_HERE))
    if wrong or (fit is not None and options):
        raise OptionError(
            f"{', '.join(wrong)}: sbc sets these itself for each of its fits."
            if wrong
            else f"{', '.join(options)} are options of flowvi.fit, but fit= is given: set them there."
        )
    if fit is not None and not callable(fit):
        raise OptionError(f"fit must be a function of the data, such as lambda data: ..., not {fit!r}.")
    if not callable(model) or isinstance(model, LogDensity) or hasattr(model, "log_density"):
        raise TargetError("sbc simulates data from a Pyro model; an energy or a log density has none.")
    start = time.perf_counter()
    seed = secrets.randbits(31) if seed is None else seed
    simulator = Simulator.of(model, args, kwargs, observed, dtype, device, seed)
    task = _Task(
        simulator, num_draws, fit, quantities, log_likelihood, resample, hmc, {"compile": False} | options, seed
    )
    found: dict[int, _Outcome] = {}
    bar = Bar(total=num_simulations, desc="sbc", unit="fit", disable=None if progress is None else not progress)
    with bar:
        try:
            for index, outcome in _outcomes(task, num_simulations, workers):
                found[index] = outcome
                bar.update()
        except KeyboardInterrupt:
            if not any(outcome.failure is None for outcome in found.values()):
                raise
            warnings.warn(
                InterruptedWarning(f"stopped by Ctrl-C after {len(found)} of {num_simulations} simulations."),
                stacklevel=2,
            )
    return _gather(found, task, simulator.name, alpha, time.perf_counter() - start)


class _Outcome(NamedTuple):
    """One simulation: ranks and whether all draws tied, by quantity; or why there are none."""

    names: tuple[str, ...] = ()
    ranks: np.ndarray = np.zeros(0, dtype=np.int64)
    tied: np.ndarray = np.zeros(0, dtype=bool)
    trusted: bool | None = None
    warnings: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class _Task:
    """What is done for each simulation."""

    simulator: Simulator
    num_draws: int
    fit: Fit | None
    quantities: Quantities | None
    log_likelihood: bool
    resample: bool
    hmc: bool
    options: dict[str, Any]
    seed: int

    def __call__(self, index: int) -> _Outcome:
        """Simulate, fit, rank."""
        own = np.random.SeedSequence([self.seed, index])
        at, fit_at, rank_at = (int(word) for word in own.generate_state(3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                values, data = self.simulator.draw(at)
                needed = self.fit is None or self.log_likelihood
                density = self.simulator.density(data) if needed else None
                draws, trusted = self._fitted(density, data, fit_at)
                names, ranks, tied = self._ranked(density, values, data, draws, np.random.default_rng(rank_at))
            except _NOT_BY_CHANCE:
                raise
            except (FlowVIError, ArithmeticError, RuntimeError, ValueError) as error:
                return _Outcome(failure=f"{type(error).__name__}: {error}")
        told = tuple(sorted({w.category.__name__ for w in caught if w.category is not DeprecationWarning}))
        return _Outcome(names, ranks, tied, trusted, told)

    def _fitted(
        self, density: LogDensity | None, data: dict[str, Tensor], seed: int
    ) -> tuple[dict[str, Tensor], bool | None]:
        """L draws of each site, and whether the fit is trusted."""
        if self.fit is None:
            posterior: Any = fit_flow(density, seed=seed, progress=False, verify=False, **self.options)
        else:
            with private_rng(self.simulator.device, seed):
                posterior = self.fit(dict(data))
        if isinstance(posterior, Posterior):
            take = posterior.resample if self.resample else posterior.sample
            with wanted(False):  # the bar that counts the fits is enough
                return take(self.num_draws, seed=seed), posterior.diagnose(hmc=self.hmc).trusted
        if not isinstance(posterior, Mapping):
            raise OptionError(
                f"fit must return a posterior, or draws, site -> (n, *shape), not a {type(posterior).__name__}."
            )
        draws = {name: torch.as_tensor(value) for name, value in posterior.items()}
        missing = [name for name in self.simulator.latent if name not in draws]
        few = [name for name, value in draws.items() if len(value) < self.num_draws]
        if missing or few:
            raise OptionError(
                f"the draws that fit returned lack {', '.join(missing)}."
                if missing
                else f"fit returned {len(draws[few[0]])} draws of {few[0]}: num_draws={self.num_draws} are needed."
            )
        at = {n: torch.linspace(0, n - 1, self.num_draws).round().long() for n in {len(v) for v in draws.values()}}
        return {name: value[at[len(value)].to(value.device)] for name, value in draws.items()}, None

    def _ranked(
        self,
        density: LogDensity | None,
        values: dict[str, Tensor],
        data: dict[str, Tensor],
        draws: dict[str, Tensor],
        random: np.random.Generator,
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Names, ranks and full ties of all scalar quantities."""
        truth = {name: value[None] for name, value in values.items() if name in draws}
        draws = {name: draws[name] for name in truth}
        more: dict[str, tuple[Tensor, Tensor]] = {}
        if self.log_likelihood and density is not None:
            more["log_likelihood"] = (_log_likelihood(density, truth), _log_likelihood(density, draws))
        if self.quantities is not None:
            own, others = self.quantities(truth, data), self.quantities(draws, data)
            if not isinstance(own, Mapping):
                raise OptionError(f"quantities must give a dict, name -> (n, ...), not {shown(own)}.")
            more |= {name: (torch.as_tensor(own[name]), torch.as_tensor(others[name])) for name in own}
        names, ranks, tied = [], [], []
        for name, (one, many) in ({name: (truth[name], draws[name]) for name in truth} | more).items():
            if one.shape[1:] != many.shape[1:] or one.isnan().any() or many.isnan().any():
                raise NonFiniteError(f"the draws of {name} are NaN, or not of the shape {tuple(one.shape[1:])}.")
            true, drawn = one.double().cpu(), many.double().cpu()
            below, equal = (drawn < true).sum(0).numpy(), (drawn == true).sum(0).numpy()
            shape = tuple(one.shape[1:])
            names += [name + (f"[{','.join(map(str, i))}]" if i else "") for i in np.ndindex(*shape)]
            ranks.append((below + random.integers(0, equal + 1)).ravel())
            tied.append((equal == self.num_draws).ravel())
        return tuple(names), np.concatenate(ranks), np.concatenate(tied)


def _log_likelihood(density: LogDensity, values: Mapping[str, Tensor]) -> Tensor:
    """The log-likelihood of all data at constrained values: (n,); -inf where it is not a number."""
    z, _ = density.unconstrain(values)
    parts = [part.reshape(len(part), -1).sum(1).double() for part in density.log_likelihood(z).values()]
    return torch.nan_to_num(torch.stack(parts).sum(0), nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _outcomes(task: _Task, num: int, workers: int) -> Iterator[tuple[int, _Outcome]]:
    """Every simulation's outcome, as it comes."""
    if workers == 1:
        for index in range(num):
            yield index, task(index)
        return
    try:
        pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"with workers={workers} the model and the functions given must be picklable ({error}): write them in a "
            "module, or take workers=1."
        ) from error
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(task, index): index for index in range(num)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise FlowVIError("a worker process died, perhaps for want of memory: try fewer workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one ends all


def _gather(found: Mapping[int, _Outcome], task: _Task, target: str, alpha: float, seconds: float) -> Calibration:
    """The outcomes in order; without quantities that can't differ from the truth (the zeros of a Cholesky factor)."""
    failures = {index: found[index].failure or "" for index in sorted(found) if found[index].failure is not None}
    good = [found[index] for index in sorted(found) if index not in failures]
    if not good:
        raise TargetError(f"none of {len(found)} simulations could be fitted; the first: {failures[min(failures)]}")
    names = good[0].names
    if any(outcome.names != names for outcome in good):
        raise OptionError("fit and quantities must give the same quantities for every data set.")
    kept = np.atleast_1d(~np.stack([outcome.tied for outcome in good]).all(0))
    return Calibration(
        names=tuple(name for name, keep in zip(names, kept, strict=True) if keep),
        ranks=np.stack([outcome.ranks for outcome in good])[:, kept],
        num_draws=task.num_draws,
        num_simulations=len(found),
        trusted=tuple(outcome.trusted for outcome in good),
        failures=failures,
        warnings=dict(Counter(name for outcome in good for name in outcome.warnings)),
        alpha=alpha,
        target=target,
        seed=task.seed,
        seconds=seconds,
    )
