"""A good call of everything public, and what `test_fuzz_api` puts in the place of one of its arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import flowvi
from flowvi import diagnostics, energies, models, plotting, transforms

__all__ = ["CALLS", "EXCUSED", "FLAWS", "is_dear", "is_sensible", "names"]

# What the calls are about.

TINY = {"num_flows": 2, "num_steps": 3, "num_particles": 8, "seed": 0, "progress": False, "verify": False}
FAST = {"num_flows": 1, "num_steps": 2, "seed": 0, "progress": False}
Y = torch.linspace(-1.0, 1.0, 8)
Z, ROWS, CONTEXT = (torch.randn(60, n, generator=torch.Generator().manual_seed(n)) for n in (2, 2, 1))
SITES = {"mu": torch.zeros(3), "tau": torch.ones(3)}


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau), obs=y)


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))


def gaussian(z):
    return -0.5 * z.square().sum(-1)


def draws(data):
    """What `sbc` takes as a fit: draws of some posterior."""
    return {"mu": torch.randn(50), "tau": torch.rand(50)}


encoder = torch.nn.Linear(1, 2)


@cache
def posterior():
    return flowvi.fit(model, (Y,), whiten=False, **TINY)


@cache
def plain():
    return flowvi.fit(gaussian, dim=2, whiten=False, **TINY)


@cache
def fitted():
    return flowvi.fit_density(ROWS, "planar", **FAST)


@cache
def conditional():
    return flowvi.fit_density(ROWS, "maf", CONTEXT, **FAST)


@cache
def amortized():
    return flowvi.fit(local_model, (CONTEXT,), encoder=encoder, batch_size=20, **FAST)


@cache
def calibration():
    return flowvi.sbc(model, (Y,), num_simulations=20, num_draws=9, fit=draws, seed=0, progress=False)


@cache
def guide():
    made = flowvi.AutoFlow(model, "planar", 2)
    made(Y)
    return made


@cache
def density():
    return flowvi.as_density(model, args=(Y,))


@cache
def made(name, *dims):
    return getattr(transforms, name)(2, *dims)


def of(owner: Callable[[], Any], method: str, **good: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """A call of a method of what `owner` makes."""
    return lambda: (getattr(owner(), method), good)


def plain_call(function: Callable[..., Any], **good: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """A call of a function."""
    return lambda: (function, good)


MAPS = [
    n
    for n in transforms.__all__
    if "input_dim" in inspect.signature(getattr(transforms, n)).parameters and not n.startswith("from_")
]
FAMILIES = [n for n in MAPS if n.islower() and not n.startswith("conditional_")]
TWINS = [n for n in MAPS if n.startswith("conditional_")]
COUPLING = {"hidden_dims": (4,), "activation": "relu", "mixing": "perm", "start": 0.0, "context_dim": 0}
AUTOREGRESSIVE = {"hidden_dims": (4,), "activation": "relu", "order": (2, 0, 1), "context_dim": 0}
OF_MAP = {
    **dict.fromkeys(("NICE", "RealNVP", "NeuralSpline"), COUPLING),
    **dict.fromkeys(("IAF", "MAF", "AutoregressiveSpline"), AUTOREGRESSIVE),
    **{n: {"context_dim": 2} for n in MAPS if "conditional" in n.lower()},
    "Coupling": {"elementwise": transforms.RationalQuadratic(4)},
    "ConditionalSylvester": {"nn": encoder},
}
"""Further good arguments of a map, which its signature does not name."""

CALLS: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    # fits
    "fit": plain_call(flowvi.fit, target=gaussian, dim=2, whiten=False, **TINY),
    "fit, whitened": plain_call(flowvi.fit, target=gaussian, dim=1, **TINY),
    "fit, verified": plain_call(flowvi.fit, target=gaussian, dim=1, whiten=False, **(TINY | {"verify": True})),
    "fit, a model": plain_call(flowvi.fit, target=model, args=(Y,), whiten=False, **TINY),
    "fit, an energy": plain_call(flowvi.fit, target=energies.U1(), **TINY),
    "fit, a coupling": plain_call(flowvi.fit, target=gaussian, dim=3, flow="real_nvp", whiten=False, **TINY),
    "fit, an encoder": plain_call(
        flowvi.fit, target=local_model, args=(CONTEXT,), encoder=encoder, batch_size=20, **FAST
    ),
    "fit_density": plain_call(flowvi.fit_density, x=ROWS, **FAST),
    "fit_density, conditional": plain_call(flowvi.fit_density, x=ROWS, context=CONTEXT, **FAST),
    "sbc": plain_call(
        flowvi.sbc, model=model, args=(Y,), num_simulations=3, num_draws=9, fit=draws, seed=0, progress=False
    ),
    # what they give
    "Posterior": lambda: (
        flowvi.Posterior,
        {"flow": plain().flow, "density": plain().density, "config": {}, "timing": {}, "history": plain().history},
    ),
    "posterior.sample": of(posterior, "sample", num_samples=3),
    "posterior.stream": lambda: (lambda **how: list(posterior().stream(**how)), {"num_samples": 3, "chunk_size": 2}),
    "posterior.resample": of(posterior, "resample", num_samples=3),
    "posterior.log_prob": of(posterior, "log_prob", values=SITES),
    "posterior.log_prob, z": of(plain, "log_prob", values=Z),
    "posterior.quantiles": of(posterior, "quantiles", q=[0.1, 0.9]),
    "posterior.diagnose": of(posterior, "diagnose", num_samples=100, hmc=False),
    "posterior.refine": of(plain, "refine", time_limit=0.3, num_chains=4, seed=0, progress=False),
    "posterior.to_arviz": of(posterior, "to_arviz", num_samples=5),
    "posterior.save": of(posterior, "save", path="posterior.pt"),
    "load": lambda: (saved(posterior(), flowvi.load), {"path": "fit.pt", "target": model}),
    "compare": lambda: (
        flowvi.compare,
        {"posteriors": {"a": posterior(), "b": posterior()}, "num_samples": 100, "loo": False},
    ),
    "fitted.sample": of(fitted, "sample", num_samples=3),
    "fitted.log_prob": of(fitted, "log_prob", x=ROWS),
    "fitted.log_likelihood": of(fitted, "log_likelihood", x=ROWS),
    "fitted.save": of(fitted, "save", path="density.pt"),
    "load_density": lambda: (saved(fitted(), flowvi.load_density), {"path": "fit.pt"}),
    "conditional.sample": of(conditional, "sample", num_samples=3, context=CONTEXT[:1]),
    "conditional.log_prob": of(conditional, "log_prob", x=ROWS, context=CONTEXT),
    "amortized.elbo": lambda: (partial(amortized().elbo, CONTEXT), {"num_samples": 2}),
    "amortized.log_likelihood": lambda: (partial(amortized().log_likelihood, CONTEXT), {"num_importance_samples": 2}),
    "amortized.sample": lambda: (partial(amortized().sample, CONTEXT), {"num_samples": 2}),
    "amortized.save": of(amortized, "save", path="amortized.pt"),
    "AmortizedFit.load": lambda: (
        saved(amortized(), flowvi.AmortizedFit.load),
        {"path": "fit.pt", "model": local_model, "encoder": encoder},
    ),
    "calibration.plot": of(calibration, "plot"),
    "calibration.to_arviz": of(calibration, "to_arviz"),
    # targets
    "as_density": plain_call(flowvi.as_density, target=model, args=(Y,)),
    "as_density, a function": plain_call(flowvi.as_density, target=gaussian, dim=2),
    "density": lambda: (density(), {"z": Z}),
    **{f"density.{n}": of(density, n, z=Z) for n in ("value_and_grad", "constrain", "log_likelihood")},
    "density.unconstrain": of(density, "unconstrain", values=SITES),
    "density.coordinate_name": of(density, "coordinate_name", index=1),
    "density.compile": of(density, "compile", num_particles=2, num_calls=1),
    **{f"energies.{n}": plain_call(getattr(energies, n)) for n in energies.ENERGIES},
    **{f"energy.{n}": of(energies.U1, n, z=Z) for n in ("energy", "__call__", "log_density", "log_prob")},
    "energy.sample": of(energies.Funnel, "sample", num_samples=3),
    "energy.log_mass": of(energies.U1, "log_mass", panels=3),
    "energy.grid_log_prob": of(energies.U1, "grid_log_prob", num=9),
    "energy.kl_divergence": of(energies.U1, "kl_divergence", log_q=gaussian, num=9),
    "Grid.midpoints": plain_call(energies.Grid.midpoints, box=((-1.0, 1.0),), num=3),
    "Grid.gauss": plain_call(energies.Grid.gauss, box=((-1.0, 1.0),), panels=3, order=3),
    "DLGM": plain_call(models.DLGM, data_dim=4, latent_dim=2, hidden=3, window=2),
    "DLGM.encoder": of(partial(models.DLGM, 4, 2, 3, 2), "encoder"),
    # guides and objectives
    "AutoFlow": plain_call(flowvi.AutoFlow, model=model, num_flows=2),
    "AutoPlanar": plain_call(flowvi.AutoPlanar, model=model, num_flows=2),
    "AutoRadial": plain_call(flowvi.AutoRadial, model=model, num_flows=2),
    "AmortizedGuide": plain_call(flowvi.AmortizedGuide, model=local_model, encoder=encoder, num_flows=1),
    "guide.quantiles": of(guide, "quantiles", quantiles=[0.5]),
    "guide.log_prob": of(guide, "log_prob", values={"mu": torch.zeros(()), "tau": torch.ones(())}),
    "guide.from_posterior": lambda: (
        flowvi.AutoFlow.from_posterior,
        {"density": posterior().density, "flow": posterior().flow},
    ),
    **{
        n: plain_call(getattr(flowvi, n))
        for n in ("ELBO", "PathELBO", "BalancedELBO", "CoveringELBO", "AnnealedELBO", "IWELBO")
    },
    "objective.beta": of(flowvi.AnnealedELBO, "beta", step=3),
    "objective.backward": lambda: (flowvi.ELBO(4).backward, {"flow": plain().flow, "target": plain().density}),
    "LinearAnneal": plain_call(flowvi.LinearAnneal),
    "schedule": lambda: (flowvi.LinearAnneal(), {"step": 3}),
    "log_likelihood": lambda: (
        partial(flowvi.log_likelihood, local_model, local_guide, CONTEXT),
        {"num_importance_samples": 2},
    ),
    # flows and transforms
    "FlowSpec": plain_call(flowvi.FlowSpec, name="planar", dim=2, num_flows=2),
    "FlowSpec.from_dict": plain_call(flowvi.FlowSpec.from_dict, data=flowvi.FlowSpec("planar", 2, 2).to_dict()),
    "Flow": plain_call(flowvi.Flow, base=2, transforms=[transforms.planar(2)]),
    "Flow.from_spec": plain_call(flowvi.Flow.from_spec, spec=flowvi.FlowSpec("planar", 2, 2)),
    "flow.log_prob": lambda: (plain().flow.log_prob, {"value": Z}),
    "flow.score": lambda: (plain().flow.score, {"value": Z}),
    "flow.rsample": lambda: (plain().flow.rsample, {"sample_shape": (3,)}),
    "flow.rsample_and_log_prob": lambda: (plain().flow.rsample_and_log_prob, {"num_samples": 3}),
    "flow.rsample_with_score": lambda: (plain().flow.rsample_with_score, {"num_samples": 3}),
    "flow.expand": lambda: (plain().flow.expand, {"batch_shape": (3,)}),
    "flow.load_state_dict": lambda: (plain().flow.load_state_dict, {"state": plain().flow.state_dict()}),
    "register": plain_call(transforms.register, name="fuzzed", factory=transforms.planar),
    "from_pyro": plain_call(transforms.from_pyro, transform=pyro.distributions.transforms.Planar(2), input_dim=2),
    "from_zuko": plain_call(transforms.from_zuko, flow=transforms.planar),
    **{f"transforms.{n}": plain_call(getattr(transforms, n), input_dim=3, **OF_MAP.get(n, {})) for n in MAPS},
    "transforms.RationalQuadratic": plain_call(transforms.RationalQuadratic),
    **{f"{n}()": partial(lambda n: (made(n), {"x": Z}), n) for n in FAMILIES},
    **{f"{n}.invert": partial(lambda n: (made(n).invert, {"y": Z}), n) for n in FAMILIES},
    **{f"{n}.log_det": partial(lambda n: (made(n).log_abs_det_jacobian, {"x": Z, "y": Z}), n) for n in FAMILIES},
    **{f"{n}.condition": partial(lambda n: (made(n, 1).condition, {"context": CONTEXT}), n) for n in TWINS},
    **{f"{n}, given": partial(lambda n: (made(n, 1).condition(CONTEXT[0]), {"x": Z}), n) for n in TWINS},
    "transform.with_cache": lambda: (made("planar").with_cache, {"cache_size": 0}),
    "transform.forward_shape": lambda: (made("planar").forward_shape, {"shape": torch.Size([3, 2])}),
    # judging and showing
    "judge": plain_call(diagnostics.judge, log_p=np.zeros(200), log_q=np.linspace(0.0, 0.1, 200), dim=2),
    "psis": plain_call(diagnostics.psis, log_weights=np.linspace(0.0, 3.0, 200)),
    **{n: plain_call(getattr(diagnostics, n), dim=2) for n in ("gap_limit", "j_limit")},
    "khat_limit": plain_call(diagnostics.khat_limit, num_samples=100),
    "plot_density": lambda: (plotting.plot_density, {"q": plain(), "num": 9}),
    "plot_elbo": lambda: (plotting.plot_elbo, {"posterior": plain()}),
    "plot_khat": lambda: (plotting.plot_khat, {"posterior": plain(), "num_samples": 100}),
    "plot_layers": lambda: (plotting.plot_layers, {"q": plain(), "num": 9}),
    "plot_marginals": lambda: (plotting.plot_marginals, {"posterior": plain(), "num_samples": 100}),
    "plot_error_against_k": plain_call(plotting.plot_error_against_k, rows=[{"flow": "planar", "K": 2, "kl": 0.1}]),
}
"""Name -> a function and good keyword arguments of it."""


def saved(fit: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """`load`, with the fit in the file that it is to read."""
    fit.save("fit.pt")
    return load


EXCUSED = {
    *("Diagnostics", "History", "LogLikelihood", "Calibration", "DensityFit", "AmortizedFit", "GridKL"),  # results
    *("LogDensity", "Energy", "Transform", "Grid"),  # bases, whose children are called
    *("ConditionalPlanar", "ConditionalRadial", "ConditionalStack", "ConditionalTails"),  # of a network of one's own
    "available",  # takes nothing
}
"""Public, without a call of their own."""


def is_dear(name: str) -> bool:
    """Whether a call takes more than some ten milliseconds."""
    return name.startswith(
        ("fit", "sbc", "posterior", "amortized", "compare", "plot", "calibration", "energy.", "load")
    )


@cache
def names(name: str) -> tuple[str, ...]:
    """The keywords that a call takes."""
    function, good = CALLS[name]()
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return tuple(sorted(good))
    named = {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return tuple(sorted(named | good.keys()))


# What is put in the place of a good argument.

FLAWS: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "minus one": -1,
    "zero": 0,
    "one": 1,
    "seven": 7,
    "huge": 2**70,
    "minus huge": -(2**70),
    "half": 0.5,
    "float 2": 2.0,
    "minus a half": -0.5,
    "tiny": 1e-300,
    "1e300": 1e300,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "complex": 1j,
    "empty text": "",
    "text": "no such thing",
    "number in a text": "1",
    "a flow's name": "planar",
    "text with a zero": "\0",
    "no such path": "nowhere/at/all",
    "bytes": b"bytes",
    "empty list": [],
    "list": [1],
    "mixed list": [0.5, "a"],
    "ragged list": [[1.0, 2.0], [3.0]],
    "tuple": (1, 2, 3),
    "empty dict": {},
    "dict": {"mu": 1.0},
    "dict of text": {"z": "a", "mu": "a", "tau": "a"},
    "dict of none": {"z": None, "mu": None, "tau": None},
    "odd keys": {1: 2, None: 3},
    "set": {1.0},
    "range": range(3),
    "slice": slice(None),
    "type": float,
    "function": math.sqrt,
    "lambda": lambda *args, **kwargs: None,
    "failing lambda": lambda *args, **kwargs: 1 // 0,
    "object": object(),
    "module": torch.nn.Linear(2, 2),
    "dtype": torch.float32,
    "float16": torch.float16,
    "meta": torch.device("meta"),
    "scalar tensor": torch.zeros(()),
    "empty tensor": torch.zeros(0),
    "vector": torch.zeros(3),
    "two": torch.zeros(2),
    "matrix": torch.zeros(2, 2),
    "wide matrix": torch.zeros(4, 3),
    "no rows": torch.zeros(0, 2),
    "no columns": torch.zeros(2, 0),
    "three dimensions": torch.zeros(2, 3, 2),
    "nan tensor": torch.full((4, 2), math.nan),
    "inf tensor": torch.full((4, 2), math.inf),
    "int tensor": torch.ones(4, 2, dtype=torch.int64),
    "bool tensor": torch.ones(4, 2, dtype=torch.bool),
    "complex tensor": torch.ones(4, 2, dtype=torch.complex64),
    "half tensor": torch.ones(4, 2, dtype=torch.float16),
    "double tensor": torch.ones(4, 2, dtype=torch.float64),
    "array": np.zeros((4, 2)),
    "numpy float": np.float64(0.5),
    "numpy int": np.int64(3),
    "array of text": np.array(["a", "b"]),
    "array of objects": np.array([None, "a"], dtype=object),
}


def is_sensible(argument: str | None, flaw: str) -> bool:
    """Whether a replacement is worth a call: some are good calls that take minutes, or start other programs."""
    slow = {
        ("compile", "true"),  # a C++ compiler
        ("workers", "seven"),  # processes
        ("num_steps", "none"),  # all the steps of a fit: 20,000 with an encoder
        ("num_steps", "missing"),
    }
    return (argument, flaw) not in slow
