"""Generated models and log densities: each fit ends in a right answer, a typed error, or "do not trust"."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import pytest
import torch
from fuzz_densities import Density, densities
from fuzz_models import Model, models
from hangs import time_limit
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pyro import poutine
from torch.distributions import biject_to

import flowvi
from flowvi.errors import FlowVIError
from flowvi.targets import as_density

F64 = torch.float64
SECONDS = 120  # that one example may take; most take one
SD, NATS = 0.25, 0.15  # what a trusted answer may be off by: each mean and sd in sds, the log evidence in nats


@dataclass(frozen=True)
class Setting:
    """How the target is fitted."""

    flow: str
    whiten: bool | None
    verify: bool

    def fit(self, case: Model | Density, density):
        options = {"flow": self.flow, "seed": 0, "progress": False, "verify": False}
        if density.path == "eager":  # run once for each particle
            return flowvi.fit(**case.target, **options, whiten=False, num_flows=1, num_steps=3, num_particles=4)
        steps = 300 if density.dim <= 2 and self.flow == "planar" else 20
        size = {"num_flows": 4, "num_steps": steps, "num_particles": 64, "compile": False}
        return flowvi.fit(**case.target, **options, **size, whiten=self.whiten)


SETTINGS = st.builds(
    Setting,
    st.sampled_from(["planar", "planar", "planar", "radial", "real_nvp"]),
    st.sampled_from([None, None, False]),
    st.booleans(),
)


# The density of a model is Pyro's.


@contextmanager
def float64_without_validation() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            yield
    finally:
        torch.set_default_dtype(before)


def pyro_log_density(model, density, z):
    """Log p(x(z)) + log|dx/dz| by Pyro's trace and torch's bijections; standard normal where nothing depends on z."""
    values = {name: value[0] for name, value in density.constrain(z[None]).items()}
    latent = {site.name: values[site.name] for site in density.sites}
    trace = poutine.trace(poutine.condition(model, data=latent)).get_trace(*density.args, **density.kwargs)
    total, start = trace.log_prob_sum(), 0
    for site in density.sites:
        transform = biject_to(trace.nodes[site.name]["fn"].support)
        u = z[start : start + math.prod(site.unconstrained_shape)].reshape(site.unconstrained_shape)
        start += u.numel()
        torch.testing.assert_close(transform(u), latent[site.name])
        log_det = transform.log_abs_det_jacobian(u, latent[site.name])
        if site.name in density._free:
            free = density._free[site.name]
            normal = -(u.square() + math.log(2 * math.pi)) / 2
            log_det = torch.where(free, *(t.reshape(*free.shape, -1).sum(-1) for t in (normal, log_det)))
        total = total + log_det.sum()
    assert start == density.dim
    return total.to(F64)


def check_density(model):
    """The log density is Pyro's own at random points."""
    density = as_density(**model.target | {"dtype": F64})
    if density.subsampled or density.discrete:
        return
    with float64_without_validation():
        for z in torch.randn(3, density.dim, generator=torch.Generator().manual_seed(2), dtype=F64):
            try:
                expected = pyro_log_density(model, density, z)
            except torch.linalg.LinAlgError:
                expected = torch.tensor(math.nan, dtype=F64)
            torch.testing.assert_close(density(z[None])[0], expected, rtol=1e-9, atol=1e-9, equal_nan=True)


# Draws are what they say.


def check_draws(posterior):
    """Draws have the names, shapes and supports of the sites, and log q is what it was when they were drawn.

    Where a flow ran off to where values overflow, as it does without a finite integral, the verdict says so.
    """
    draws = posterior.sample(30, seed=0)
    sites = (*posterior.density.sites, *posterior.density.deterministic)
    assert list(draws) == [site.name for site in sites]
    for site in sites:
        assert draws[site.name].shape == (30, *site.shape)
    if any(values.isnan().any() for values in draws.values()):
        assert not posterior.diagnose().trusted
        return
    assert not posterior.log_prob(draws).isnan().any()
    z, log_q = posterior.flow.rsample_and_log_prob(30, generator=torch.Generator().manual_seed(1))
    near = z.abs().amax(1) < 8  # further out a bijection's inverse is lost to rounding
    values = posterior.density.constrain(z)
    back, log_det = posterior.density.unconstrain(values)
    torch.testing.assert_close(back[near], z[near].to(back), rtol=0.1, atol=0.1)
    if z.dtype == F64:
        torch.testing.assert_close(posterior.log_prob(values)[near], (log_q + log_det)[near], rtol=1e-2, atol=1e-2)


# The right answer in one and two dimensions.


def quadrature(density, loc, scale, reach):
    """Log of the integral, means and sds on a grid loc + scale sinh(t), |t| < reach, in each coordinate."""
    points = 10_001 if density.dim == 1 else 401
    t = torch.linspace(-reach, reach, points, dtype=F64)
    axes = [c + s * t.sinh() for c, s in zip(loc, scale, strict=True)]
    weights = [(s * t.cosh() * (t[1] - t[0])).log() for s in scale]
    z = torch.cartesian_prod(*axes).reshape(-1, density.dim)
    log_w = torch.cartesian_prod(*weights).reshape(-1, density.dim).sum(1)
    with torch.no_grad():
        log_p = torch.cat([density(part).to(F64) for part in z.split(50_000)]) + log_w
    log_p = torch.where(log_p.isnan(), -math.inf, log_p)
    log_total = log_p.logsumexp(0)
    p = (log_p - log_total).exp()
    mean = p @ z
    return float(log_total), mean, (p @ (z - mean).square()).sqrt()


def tail(density):
    """How much smaller log p is far out than near the origin, at most; tails of less than e^-5 no draw can show."""
    axes = torch.cat([torch.eye(density.dim, dtype=F64), -torch.eye(density.dim, dtype=F64)])
    near = torch.randn(1000, density.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    with torch.no_grad():
        return float(density(1000 * axes).max() - density(near).nan_to_num(-math.inf).max())


def truth(density):
    """Log evidence, and mean and sd of z where these converge; None where nothing can be told."""
    loc, scale = torch.zeros(density.dim, dtype=F64), torch.ones(density.dim, dtype=F64)
    for reach in (9.0, 6.0, 5.0):
        _, loc, scale = quadrature(density, loc, scale, reach)
        if not (loc.isfinite().all() and (scale > 1e-6).all()):
            return None
    (less, mean, sd), (more, mean2, sd2) = (quadrature(density, loc, scale, reach) for reach in (4.0, 5.0))
    if abs(more - less) > 0.02:  # it grows with the box
        return (math.inf, None, None) if tail(density) > -5 else None
    same = torch.allclose(sd, sd2, rtol=0.02) and bool(((mean - mean2).abs() < 0.02 * sd2).all())
    return (more, mean2, sd2) if same else (more, None, None)


def check_answer(case, posterior):
    """A trusted answer in D <= 2 is quadrature's: see `SD` and `NATS`."""
    density = as_density(**case.target | {"dtype": F64})
    answer = None if density.subsampled else truth(density)
    if answer is None:
        return
    log_evidence, mean, sd = answer
    assert log_evidence < math.inf, "trusted, but the target has no finite integral"
    found = posterior.diagnose()
    limit = NATS + 4 * found.log_evidence_se
    assert abs(found.log_evidence - log_evidence) < limit, f"trusted, {found}, but log evidence is {log_evidence}"
    if mean is None:
        return
    with torch.no_grad():
        z, _ = posterior.flow.rsample_and_log_prob(20_000, generator=torch.Generator().manual_seed(0))
    off = torch.maximum((z.to(F64).mean(0) - mean).abs() / sd, (z.to(F64).std(0) / sd - 1).abs())
    assert float(off.max()) < SD, f"trusted, {found}, but off by {off.tolist()} sd"


def attempt(case, setting):
    """Fits and looks at everything; returns the typed error with which that ended, or None."""
    try:
        if isinstance(case, Model):
            check_density(case)
        density = as_density(**case.target)
        posterior = setting.fit(case, density)
        check_draws(posterior)
        judged = density.path != "eager" and (setting.verify or density.dim <= 2)
        known = density.dim <= 2 and not (case.far_apart and not posterior.config["whiten"])
        if judged and posterior.diagnose().trusted and known:
            check_answer(case, posterior)
    except FlowVIError as error:
        return error
    return None


def check(case, setting):
    """All that is asked of one generated target; what can't be done is a typed error, and what can be done is not."""
    pyro.clear_param_store()
    with time_limit(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = attempt(case, setting)
    assert error is None or len(str(error)) > 30, repr(error)
    assert error is None or not case.honest, f"refused: {error!r}"
    assert error is not None or not case.refused, "it was not refused"


def generated(num):
    return settings(
        max_examples=num,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )


@generated(4)
@given(models(), SETTINGS)
def test_some_models(case, setting):
    check(case, setting)


@generated(8)
@given(densities(), SETTINGS)
def test_some_densities(case, setting):
    check(case, setting)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("targets", [models, densities])
def test_a_thousand(targets, part):
    seed(part)(generated(25)(given(targets(), SETTINGS)(check)))()
