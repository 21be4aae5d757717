"""Random Pyro models for the fuzz test: a description that prints as it is drawn, and the model that it stands for.

The parts of a model: latents with a prior over one of Pyro's supports, in or out of plates, whose scale may depend on
an earlier latent; data of any shape; and the twists that people write into models. A failing description can be pasted
into a test as it is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro.distributions import constraints, transforms
from torch import Tensor

__all__ = ["Data", "Latent", "Model", "models"]


def full(d: int, value: float = 0.0) -> Tensor:
    return torch.full((d,), value)


def improper(constraint, *event: int):
    return lambda t: dist.ImproperUniform(constraint, (), event)


# A prior of batch shape () by its name, given a positive number t.
SCALARS = {
    "normal": lambda t: dist.Normal(0.0, t),
    "student": lambda t: dist.StudentT(4.0, 0.0, t),
    "cauchy": lambda t: dist.Cauchy(0.0, t),
    "laplace": lambda t: dist.Laplace(0.5, t),
    "gamma": lambda t: dist.Gamma(2.0, t),
    "half_normal": lambda t: dist.HalfNormal(t),
    "half_cauchy": lambda t: dist.HalfCauchy(t),
    "log_normal": lambda t: dist.LogNormal(0.0, t),
    "inverse_gamma": lambda t: dist.InverseGamma(3.0, t),
    "beta": lambda t: dist.Beta(1.0 + t, 2.0),
    "uniform": lambda t: dist.Uniform(-1.0, t),
    "moving_uniform": lambda t: dist.Uniform(t, t + 2.0),
    "pareto": lambda t: dist.Pareto(t, 3.0),
    "weibull": lambda t: dist.Weibull(1.0, 1.0 + t),
    "kumaraswamy": lambda t: dist.Kumaraswamy(2.0, 1.0 + t),
    "sigmoid": lambda t: dist.TransformedDistribution(dist.Normal(0.0, t), [transforms.SigmoidTransform()]),
    "improper_real": improper(constraints.real),
    "improper_positive": improper(constraints.positive),
    "improper_interval": improper(constraints.interval(-1.0, 3.0)),
    "dirichlet_2": lambda t: dist.Dirichlet(full(2, 1.5)),
    "lkj_cholesky_2": lambda t: dist.LKJCholesky(2, 1.0 + t),
}
PRIORS = SCALARS | {
    "mvn": lambda t: dist.MultivariateNormal(full(3), t * torch.eye(3) + 0.3),
    "low_rank_mvn": lambda t: dist.LowRankMultivariateNormal(full(3), torch.ones(3, 1), full(3, 0.5) * t),
    "event": lambda t: dist.Normal(torch.zeros(2, 2), t).to_event(2),
    "dirichlet": lambda t: dist.Dirichlet(full(3, 1.0) + t),
    "ordered": lambda t: dist.TransformedDistribution(
        dist.Normal(full(3), t).to_event(1), [transforms.OrderedTransform()]
    ),
    "lkj_cholesky": lambda t: dist.LKJCholesky(3, 1.0 + t),
    "lkj": lambda t: dist.LKJ(2, 1.0 + t),
    "wishart": lambda t: dist.Wishart(torch.tensor(4.0), covariance_matrix=torch.eye(2)),
    "improper_above": improper(constraints.greater_than(-1.0)),
    "improper_below": improper(constraints.less_than(2.0)),
    "improper_vector": improper(constraints.real_vector, 2),
    "improper_ordered": improper(constraints.ordered_vector, 2),
    "improper_positive_ordered": improper(constraints.positive_ordered_vector, 2),
    "improper_simplex": improper(constraints.simplex, 3),
    "improper_corr": improper(constraints.corr_cholesky, 2, 2),
    "improper_lower_cholesky": improper(constraints.lower_cholesky, 2, 2),
    "improper_softplus_positive": improper(constraints.softplus_positive),
    "improper_positive_definite": improper(constraints.positive_definite, 2, 2),
    "improper_sphere": improper(constraints.sphere, 2),
    "von_mises": lambda t: dist.VonMises(0.0, t),
    "projected_normal": lambda t: dist.ProjectedNormal(full(2)),
    "delta": lambda t: dist.Delta(torch.zeros(())),
    "mixture": lambda t: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), t)
    ),
    "masked": lambda t: dist.Normal(0.0, t).mask(torch.tensor(True)),
    "bernoulli": lambda t: dist.Bernoulli(torch.tensor(0.3)),
    "categorical": lambda t: dist.Categorical(torch.ones(3)),
    "poisson": lambda t: dist.Poisson(t),
}

# The distribution of one datum given a real number m and a positive t, and data made of u in [0, 1).
LIKELIHOODS = {
    "normal": (lambda m, t: dist.Normal(m, t), lambda u: 3 * u - 1),
    "student": (lambda m, t: dist.StudentT(4.0, m, t), lambda u: 3 * u - 1),
    "bernoulli": (lambda m, t: dist.Bernoulli(logits=m), lambda u: (u > 0.4).to(u)),
    "binomial": (lambda m, t: dist.Binomial(5, logits=m), lambda u: (6 * u).floor()),
    "poisson": (lambda m, t: dist.Poisson(torch.nn.functional.softplus(m)), lambda u: (5 * u).floor()),
    "negative_binomial": (lambda m, t: dist.NegativeBinomial(t, logits=m), lambda u: (5 * u).floor()),
    "gamma": (lambda m, t: dist.Gamma(2.0, t), lambda u: 2 * u + 0.1),
    "beta": (lambda m, t: dist.Beta(t, 1.0 + t), lambda u: 0.1 + 0.8 * u),
    "log_normal": (lambda m, t: dist.LogNormal(m, t), lambda u: 2 * u + 0.1),
    "categorical": (
        lambda m, t: dist.Categorical(logits=torch.stack([m, torch.zeros_like(m), -m], -1)),
        lambda u: (3 * u).floor(),
    ),
    "uniform": (lambda m, t: dist.Uniform(0.0, 1.0 + t), lambda u: u),  # its support depends on a latent
}


@dataclass(frozen=True)
class Latent:
    """One latent site: its prior, where it stands, the earlier latent that it depends on, and what is done to it."""

    prior: str
    place: str = "plain"  # "plates", "sequential", "expand", "event" or "subsampled"
    sizes: tuple[int, ...] = ()
    parent: int | None = None
    wrap: str = ""  # "mask", "all_masked" or "scale"


@dataclass(frozen=True)
class Data:
    """The observed site."""

    likelihood: str
    shape: tuple[int, ...]
    place: str = "plates"  # "event", "bare" or "subsampled"
    dtype: str = "float32"
    flaw: str = ""  # "nan", "inf", "constant" or "outside"
    mask: str = ""  # "mask", "nan_mask" or "obs_mask"

    @property
    def honest(self) -> bool:
        plain = self.flaw in ("", "constant") and self.mask in ("", "mask") and self.dtype in ("float32", "float64")
        return plain and 0 not in self.shape

    def tensor(self) -> Tensor:
        u = torch.rand(self.shape, generator=torch.Generator().manual_seed(1))
        value = LIKELIHOODS[self.likelihood][1](torch.full_like(u, 0.5) if self.flaw == "constant" else u)
        bad = {"nan": math.nan, "inf": math.inf, "outside": -7.0}.get(self.flaw)
        if bad is not None and value.numel():
            value.view(-1)[0] = bad
        if self.mask == "nan_mask" and value.numel():
            value.view(-1)[-1] = math.nan
        return value.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Model:
    """A whole model; calling it runs it."""

    latents: tuple[Latent, ...]
    data: Data | None = None
    twists: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def target(self) -> dict:
        """The arguments of `fit` and `as_density`."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return {"target": self, "args": () if self.data is None else (self.data.tensor(),), "dtype": dtype}

    @property
    def honest(self) -> bool:
        """Whether there is nothing in it for which it may be refused."""
        return (
            all(x.prior in SCALARS and x.place != "subsampled" and 0 not in x.sizes for x in self.latents)
            and not any(x.wrap == "all_masked" for x in self.latents)
            and not set(self.twists) & {"changing_sites", "changing_shape", "noise", "cholesky", "no_grad", "typo"}
            and (not any("improper" in x.prior for x in self.latents) if self.data is None else self.data.honest)
        )

    refused = far_apart = False

    def __call__(self, y: Tensor | None = None) -> None:
        total, scales = torch.zeros(()), []
        t = torch.tensor(1.3)
        for i, latent in enumerate(self.latents):
            value = _sample(f"x{i}", latent, t if latent.parent is None else scales[latent.parent])
            total = total + value.sum()
            scales.append(torch.nn.functional.softplus(value.mean()) + 0.1)
        for twist in self.twists:
            total = TWISTS[twist](total, scales[-1])
        if self.data is not None:
            _observe(self.data, y, total, scales[-1])


def _sample(name: str, latent: Latent, t: Tensor) -> Tensor:
    fn, sizes = PRIORS[latent.prior](t), latent.sizes
    with _wrapped(latent.wrap):
        if latent.place == "plates":
            with _plates(name, sizes):
                value = pyro.sample(name, fn)
        elif latent.place == "sequential":
            parts = [pyro.sample(f"{name}_{i}", fn) for i in pyro.plate(f"{name}_plate", sizes[0])]
            value = torch.stack(parts) if parts else torch.zeros(1)
        elif latent.place == "subsampled":
            with pyro.plate(f"{name}_plate", 4, subsample_size=2):
                value = pyro.sample(name, fn)
        else:
            wide = fn.expand(sizes) if sizes else fn
            value = pyro.sample(name, wide.to_event(len(sizes)) if latent.place == "event" else wide)
    return value.to(t.dtype)


def _observe(data: Data, y: Tensor, total: Tensor, t: Tensor) -> None:
    fn = LIKELIHOODS[data.likelihood][0](total, t)
    keep = torch.ones(data.shape, dtype=torch.bool)
    if data.mask and keep.numel():
        keep.view(-1)[-1] = False
    options = {"obs_mask": keep} if data.mask == "obs_mask" else {}
    if data.place == "event":
        pyro.sample("y", fn.expand(data.shape).to_event(len(data.shape)), obs=y)
        return
    if data.place == "subsampled":
        with pyro.plate("rows", len(y), subsample_size=max(1, len(y) // 2)) as index:
            pyro.sample("y", fn, obs=y[index])
        return
    with ExitStack() as stack:
        if data.place == "plates":
            stack.enter_context(_plates("data", data.shape))
        else:
            fn = fn.expand(data.shape)
        if data.mask in ("mask", "nan_mask"):
            stack.enter_context(pyro.poutine.mask(mask=keep))
        pyro.sample("y", fn, obs=y, **options)


def _wrapped(wrap: str):
    if wrap in ("mask", "all_masked"):
        return pyro.poutine.mask(mask=torch.tensor(True) if wrap == "mask" else False)
    return pyro.poutine.scale(scale=0.5 if wrap == "scale" else 1.0)


@contextmanager
def _plates(name: str, sizes: tuple[int, ...]) -> Iterator[None]:
    """Nested plates of these sizes, the first the outermost."""
    with ExitStack() as stack:
        for i, n in enumerate(sizes):
            stack.enter_context(pyro.plate(f"{name}_dim{i}", n, dim=i - len(sizes)))
        yield


# What else people write. Each takes the latents' sum and a positive number, and returns a number that the data see.


def _factor(total: Tensor, t: Tensor) -> Tensor:
    pyro.factor("f", -0.1 * total.square())
    return total


def _deterministic_integer(total: Tensor, t: Tensor) -> Tensor:
    pyro.deterministic("di", (total > 0).long())
    return total


def _changing_sites(total: Tensor, t: Tensor) -> Tensor:
    return total + pyro.sample("sometimes", dist.Normal(0.0, 1.0)) if total > 0.3 else total


def _condition(total: Tensor, t: Tensor) -> Tensor:
    part = pyro.poutine.condition(lambda: pyro.sample("fixed", dist.Normal(0.0, t)), data={"fixed": torch.ones(())})
    return total + part()


def _latent_scale(total: Tensor, t: Tensor) -> Tensor:
    with pyro.poutine.scale(scale=t):
        pyro.sample("scaled", dist.Normal(total, 1.0), obs=torch.zeros(()))
    return total


def _plate_twice(total: Tensor, t: Tensor) -> Tensor:
    plate = pyro.plate("again", 2)
    with plate:
        a = pyro.sample("a", dist.Normal(total, 1.0))
    with plate:
        pyro.sample("b", dist.Normal(a, t), obs=torch.ones(2))
    return total


def _in_place(total: Tensor, t: Tensor) -> Tensor:
    parts = torch.zeros(2)
    parts[0] = total
    return parts.sum()


def _cholesky(total: Tensor, t: Tensor) -> Tensor:
    matrix = torch.stack([torch.stack([t, total]), torch.stack([total, t])])  # not always positive definite
    pyro.sample("m", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=matrix), obs=torch.zeros(2))
    return total


TWISTS = {
    "deterministic": lambda total, t: pyro.deterministic("d", total * t),
    "deterministic_vector": lambda total, t: pyro.deterministic("dv", torch.stack([total, t]), event_dim=1)[0],
    "deterministic_integer": _deterministic_integer,
    "factor": _factor,
    "param": lambda total, t: total + pyro.param("shift", lambda: torch.tensor(0.1)),
    "branch": lambda total, t: total if total > 0 else 0.5 * total,
    "item": lambda total, t: total + min(float(t), 2.0),
    "changing_sites": _changing_sites,
    "changing_shape": lambda total, t: (
        total + pyro.sample("varying", dist.Normal(torch.zeros(1 + int(t > 1)), 1.0).to_event(1)).sum()
    ),
    "noise": lambda total, t: total + torch.rand(()),
    "no_grad": lambda total, t: total.detach(),
    "typo": lambda total, t: total.no_such_method(),
    "in_place": _in_place,
    "blocked": lambda total, t: total + pyro.poutine.block(lambda: torch.ones(()))(),
    "condition": _condition,
    "latent_scale": _latent_scale,
    "plate_twice": _plate_twice,
    "cholesky": _cholesky,
    "python_loop": lambda total, t: torch.sin(torch.sin(total) + 0.5 * total),
}

SIZES = [(1,), (2,), (3,), (2, 1), (1, 2), (2, 2), (0,)]
SHAPES = [(), (1,), (4,), (10,), (0,), (3, 2), (1, 3), (2, 1, 3)]


def _mostly(common, *rare):
    return st.sampled_from([common] * 3 * len(rare) + list(rare))


@st.composite
def _latents(draw, small: bool) -> tuple[Latent, ...]:
    found = []
    for i in range(draw(st.integers(1, 2 if small else 3))):
        place, sizes = "plain", ()
        if not small:
            place = draw(_mostly("plain", "plates", "plates", "sequential", "expand", "event", "subsampled"))
        if place not in ("plain", "subsampled"):
            sizes = draw(st.sampled_from(SIZES))
        prior = draw(st.sampled_from(list(SCALARS if small else PRIORS)))
        parent = draw(st.none() | st.integers(0, i - 1)) if i else None
        found.append(Latent(prior, place, sizes, parent, draw(_mostly("", "mask", "all_masked", "scale"))))
    return tuple(found)


@st.composite
def _data(draw) -> Data:
    shape = draw(st.sampled_from(SHAPES))
    places = ["plates", "event", "bare"] + (["subsampled"] if len(shape) == 1 and shape[0] > 1 else [])
    return Data(
        draw(st.sampled_from(list(LIKELIHOODS))),
        shape,
        draw(st.sampled_from(places)),
        draw(_mostly("float32", "float64", "float16", "int64")),
        draw(_mostly("", "nan", "inf", "constant", "outside")),
        draw(_mostly("", "mask", "nan_mask", "obs_mask")),
    )


@st.composite
def models(draw) -> Model:
    """Half of them have one or two latent numbers, where quadrature knows the answer."""
    small = draw(st.booleans())
    plain = small and draw(st.booleans())
    twists = () if plain else tuple(draw(st.lists(st.sampled_from(list(TWISTS)), max_size=2, unique=True)))
    data = draw(st.none() | _data() | _data() | _data())
    return Model(draw(_latents(small)), data, twists, draw(_mostly(None, "float32", "float64")))
