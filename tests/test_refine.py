"""Refined posteriors against known answers: right where the flow is poor, or they say that they are not."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi.refine as refine_module
from flowvi.bridge import bridge, log_evidence
from flowvi.chains import agreement, describe_separation, split_rhat
from flowvi.errors import FileFormatError, InterruptedWarning, NonFiniteError, OptionError
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.history import History
from flowvi.posterior import Posterior
from flowvi.refine import RefinedDiagnostics, RefinedPosterior, refine, symmetric_kl
from flowvi.short_run import ShortRun
from flowvi.storage import load
from flowvi.targets import as_density

F64 = torch.float64
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=F64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=F64)
HISTORY = History(torch.arange(0), torch.zeros(0), torch.zeros(0))
QUICK = {"num_chains": 64, "ess": 500.0, "progress": False}


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def make(target, *, args=(), dim=None, loc=0.0, scale=1.0, seed=0, name="planar", num_flows=0):
    """A posterior whose flow is a Gaussian that nobody fitted."""
    density = as_density(target, args=args, dim=dim, dtype=F64)
    flow = Flow.from_spec(FlowSpec(name, density.dim, num_flows, "diag"), loc=loc, scale=scale, dtype=F64)
    return Posterior(flow, density, config={"flow": name}, timing={"fit": 1.0}, history=HISTORY, seed=seed)


def gaussian(mean, sd, *, dim=2, **options):
    """Target N(mean, sd^2 I), normalized, against q = N(0, I)."""
    mean, sd = (torch.as_tensor(x, dtype=F64).expand(dim) for x in (mean, sd))

    def log_density(z):
        return (-0.5 * ((z - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    return make(log_density, dim=dim, **options)


def two_modes(z):
    """N(6, I) with weight .8 and N(-6, I) with .2, in 2 dimensions, normalized."""
    up, down = (-0.5 * ((z - m) ** 2).sum(-1) - math.log(2 * math.pi) + math.log(w) for m, w in ((6, 0.8), (-6, 0.2)))
    return torch.logaddexp(up, down)


def error(chains, expected):
    """How many standard errors the mean over chains (C, n) is off, by the spread between chains."""
    each = chains.mean(1)
    return abs(float(each.mean()) - expected) / (float(each.std()) / len(each) ** 0.5)


@pytest.fixture(scope="module")
def refined_schools():
    return make(schools, args=(Y, SIGMA), loc=0.5, scale=0.5).refine(**QUICK, seed=1)


@pytest.fixture(scope="module")
def refined_gaussian():
    return gaussian([1.0, -2.0], [0.5, 3.0]).refine(**QUICK, seed=1)


def schools_by_quadrature():
    """Mean and sd of mu and tau, and log Z: theta is integrated out exactly, mu and log tau on a grid."""
    mu = torch.linspace(-25, 30, 701, dtype=F64)[:, None]
    log_tau = torch.linspace(-9, 6, 701, dtype=F64)
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(torch.tensor(5.0, dtype=F64)).log_prob(tau) + log_tau
    for y, s in zip(Y, SIGMA, strict=True):
        log_p = log_p + dist.Normal(mu, (s**2 + tau**2).sqrt()).log_prob(y)
    log_z = log_p.flatten().logsumexp(0) + math.log(55 / 700 * 15 / 700)
    p = (log_p - log_p.flatten().logsumexp(0)).exp()

    def moments(x):
        mean = (p * x).sum()
        return float(mean), float((p * (x - mean) ** 2).sum().sqrt())

    return moments(mu), moments(tau), float(log_z)


# a poor flow, the right answer


def test_a_poor_flow_becomes_the_exact_posterior_of_eight_schools(refined_schools):
    (mu, mu_sd), (tau, tau_sd), log_z = schools_by_quadrature()
    before = refined_schools.unrefined
    assert abs(float(before.mean()["mu"]) - mu) > mu_sd  # q is far off
    found = refined_schools.diagnose()
    assert found.trusted, found.verdict
    assert not before.diagnose().trusted
    mean, std = refined_schools.mean(), refined_schools.std()
    assert float(mean["mu"]) == pytest.approx(mu, abs=0.08 * mu_sd)
    assert float(mean["tau"]) == pytest.approx(tau, abs=0.08 * tau_sd)
    assert float(std["mu"]) == pytest.approx(mu_sd, rel=0.06)
    assert float(std["tau"]) == pytest.approx(tau_sd, rel=0.15)  # a heavy tail
    assert abs(found.log_evidence - log_z) < 4 * found.log_evidence_se


def test_means_sds_and_evidence_of_a_gaussian(refined_gaussian):
    z = refined_gaussian.chains.z
    for i, (mean, sd) in enumerate(((1.0, 0.5), (-2.0, 3.0))):
        assert error(z[:, :, i], mean) < 4.5
        assert error((z[:, :, i] - mean) ** 2, sd**2) < 4.5
    found = refined_gaussian.diagnose()
    assert isinstance(found, RefinedDiagnostics)
    assert found.trusted
    assert 1 <= found.r_hat < 1.01
    assert min(found.ess_bulk, found.ess_tail) == found.ess >= 500
    assert abs(found.log_evidence) < 4 * found.log_evidence_se < 0.2
    assert "64 chains agree" in found.verdict
    assert "R-hat" in str(found)


def test_through_a_nonlinear_flow_of_another_family():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        posterior = gaussian([1.0, 0.0, 0.0], [1.0, 2.0, 0.2], dim=3, name="radial", num_flows=4)
        with torch.no_grad():
            for p in posterior.flow.parameters():
                p += 0.5 * torch.randn_like(p)
    refined = posterior.refine(**QUICK, seed=0)
    assert refined.diagnose().trusted
    for i, (mean, sd) in enumerate(((1.0, 1.0), (0.0, 2.0), (0.0, 0.2))):
        assert error(refined.chains.z[:, :, i], mean) < 4.5
        assert error((refined.chains.z[:, :, i] - mean) ** 2, sd**2) < 4.5
    torch.testing.assert_close(refined.chains.log_q.flatten()[:9], posterior.flow.log_prob(refined._flat()[0][:9]))


# it says no


def test_two_far_modes_are_refused_and_named():
    refined = make(two_modes, dim=2, scale=4.0).refine(**QUICK, seed=0)
    found = refined.diagnose()
    assert not found.trusted
    assert found.r_hat > 1.2
    assert refined.chains.stopped == "stuck"
    assert "separate places" in found.verdict
    assert "near -6" in found.verdict
    assert refined.config["refine"]["stopped"] == "stuck"


def test_a_mode_that_no_chain_saw_shows_in_a_known_normalizer():
    class Modes:
        dim = 2
        log_normalizer = 0.0

        def log_density(self, z):
            return two_modes(z)

    refined = make(Modes(), loc=6.0).refine(**QUICK, seed=0)
    found = refined.diagnose()
    assert found.r_hat < 1.01
    assert found.log_evidence == pytest.approx(math.log(0.8), abs=0.02)
    assert not found.trusted
    assert "miss part of the mass" in found.verdict


def test_out_of_time_it_says_so_and_can_go_on():
    posterior = gaussian(0.0, 1.0, dim=3)
    short = posterior.refine(num_chains=16, time_limit=1e-3, seed=0)
    found = short.diagnose()
    assert not found.trusted
    assert (short.chains.stopped, short.config["refine"]["stopped"]) == ("time limit", "time limit")
    assert "refine() on this result" in found.verdict
    longer = short.refine(ess=500.0, seed=0)
    assert longer.unrefined is posterior
    assert longer.chains.num_chains == 16
    assert longer.diagnose().trusted
    assert longer.timing["refine"] > short.timing["refine"]


def test_too_few_effective_draws_are_told(refined_gaussian):
    more = RefinedPosterior(refined_gaussian.unrefined, refined_gaussian.chains, goal_ess=1e6)
    assert not more.diagnose().trusted
    assert "fewer than the 1000000" in more.diagnose().verdict


def test_divergences_are_told(refined_gaussian):
    from dataclasses import replace

    chains = refined_gaussian.chains
    some = RefinedPosterior(refined_gaussian.unrefined, replace(chains, divergences=chains.transitions // 100))
    assert not some.diagnose().trusted
    assert "diverged" in some.diagnose().verdict


def test_ctrl_c_returns_what_there_is(monkeypatch):
    step, count = refine_module.hmc_step, [0]

    def interrupted(*args):
        count[0] += 1
        if count[0] == 30:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(refine_module, "hmc_step", interrupted)
    with pytest.warns(InterruptedWarning):
        refined = gaussian(0.0, 1.0).refine(num_chains=8, seed=0)
    assert refined.chains.z.shape == (8, 29, 2)
    assert not refined.diagnose().trusted


# the draws


def test_it_answers_like_any_posterior(refined_schools):
    refined = refined_schools
    draws = refined.sample(300, seed=0)
    assert draws["theta"].shape == (300, 8)
    assert all(torch.equal(a, refined.sample(300, seed=0)[name]) for name, a in draws.items())
    assert not torch.equal(draws["mu"], refined.sample(300, seed=1)["mu"])
    assert len(refined._pick(300, torch.Generator().manual_seed(0)).unique()) == 300
    total = refined.chains.num_draws
    every = refined.sample(2 * total, seed=0)["mu"]
    assert torch.equal(every[:total].sort()[0], every[total:].sort()[0])  # all of them once, then again
    assert refined.resample(7, seed=0)["mu"].shape == (7,)
    assert refined.sample(0)["theta"].shape == (0, 8)
    z = refined.chains.z
    torch.testing.assert_close(refined.mean()["mu"], z[:, :, 0].mean())
    torch.testing.assert_close(refined.quantiles(0.25)["mu"], z[:, :, 0].flatten().quantile(0.25))
    values = refined.sample(5, seed=0)
    torch.testing.assert_close(refined.log_prob(values), refined.unrefined.log_prob(values))
    text = str(refined)
    assert "theta[7]" in text
    assert "refined by 64 chains" in text
    assert "Trusted" in text


def test_stored_densities_are_those_of_the_draws(refined_schools):
    z, log_p, log_q = refined_schools._flat()
    torch.testing.assert_close(refined_schools.density(z[:20]), log_p[:20])
    torch.testing.assert_close(refined_schools.flow.log_prob(z[:20]).detach(), log_q[:20])


def test_arviz_sees_the_real_chains(refined_schools):
    data = refined_schools.to_arviz()
    n = refined_schools.chains.z.shape[1]
    assert dict(data.posterior.sizes) == {"chain": 64, "draw": n, "school": 8}
    np.testing.assert_array_equal(data.posterior["mu"].values, refined_schools.chains.z[:, :, 0].numpy())
    assert data.posterior.attrs["r_hat"] == pytest.approx(refined_schools.diagnose().r_hat)
    assert dict(refined_schools.to_arviz(num_samples=640).posterior.sizes)["draw"] == 10
    assert data.log_likelihood["y"].shape == (64, n, 8)


def test_a_file_gives_the_chains_back(refined_schools, tmp_path):
    refined_schools.save(tmp_path / "refined.pt")
    back = load(tmp_path / "refined.pt", schools)
    assert isinstance(back, RefinedPosterior)
    assert torch.equal(back.chains.z, refined_schools.chains.z)
    assert back.diagnose() == refined_schools.diagnose()
    assert back.config == refined_schools.config
    assert "refine" not in back.unrefined.config
    with pytest.raises(FileFormatError, match="fit together"):
        RefinedPosterior.restored(back.unrefined, {"chains": {"z": None}, "goal_r_hat": 1.0, "goal_ess": 1.0})


def test_seeds_reproduce_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    options = {"num_chains": 8, "ess": 50.0, "rhat": 1.1}
    a, b, c = (gaussian(0.0, 2.0).refine(**options, seed=s).chains.z for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not (a.shape == c.shape and torch.equal(a, c))
    first, again = (gaussian(0.0, 2.0, seed=5).refine(**options).chains.z for _ in range(2))
    assert torch.equal(first, again)  # the posterior's own sequence starts anew
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_bounded_by_thinning(monkeypatch):
    monkeypatch.setattr(refine_module, "MAX_ELEMENTS", 8 * 2 * 40)
    refined = gaussian(0.0, 1.0).refine(num_chains=8, ess=100.0, seed=0)
    assert refined.chains.z.shape[1] <= 40
    assert refined.chains.transitions > refined.chains.num_draws


@pytest.mark.parametrize(
    "options", [{"num_chains": 2}, {"num_chains": 8.0}, {"ess": 0}, {"rhat": 1.0}, {"time_limit": -1}, {"ess": "many"}]
)
def test_bad_options_are_named(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        refine(gaussian(0.0, 1.0), **options)


def test_a_target_that_is_finite_nowhere_is_refused():
    posterior = make(lambda z: torch.where(z[:, 0] < 50, -(z**2).sum(-1), math.nan), dim=2, loc=100.0)
    with pytest.raises(NonFiniteError):
        posterior.refine(seed=0)
    with pytest.raises(NonFiniteError):
        symmetric_kl(posterior.flow, posterior.density, generator=torch.Generator().manual_seed(0))


# the short run


@pytest.mark.parametrize(("mean", "sd", "dim"), [(0.2, 1.1, 2), (0.1, 0.8, 10), (0.5, 2.0, 10), (0.0, 1.0, 3)])
def test_j_is_the_symmetric_kl_of_gaussians(mean, sd, dim):
    posterior = gaussian(mean, sd, dim=dim)
    before = torch.get_rng_state()
    found = symmetric_kl(posterior.flow, posterior.density, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(found, ShortRun)
    expected = 0.5 * dim * (sd**2 + mean**2 - 1 + (1 + mean**2) / sd**2 - 1)
    assert abs(found.j - expected) < 4 * found.j_se + 1e-9
    assert found.j_se < 0.1 * expected + 1e-9
    assert ((found.mean_shift - mean / sd).abs() < 4.5 * found.mean_shift_se).all()
    assert ((found.sd_ratio - sd).abs() < 4.5 * found.sd_ratio_se).all()
    assert (found.mean_shift_se < 0.05).all()
    assert (found.sd_ratio_se < 0.05 * sd).all()
    assert found.acceptance > 0.6
    assert found.divergences == 0


def test_j_finds_the_one_wrong_coordinate():
    posterior = gaussian([0.0] * 19 + [0.3], [1.0] * 18 + [1.3, 1.0], dim=20)
    found = symmetric_kl(posterior.flow, posterior.density, generator=torch.Generator().manual_seed(0))
    wrong_mean = (found.mean_shift.abs() > 4.5 * found.mean_shift_se).nonzero().flatten().tolist()
    wrong_sd = ((found.sd_ratio - 1).abs() > 4.5 * found.sd_ratio_se).nonzero().flatten().tolist()
    assert (wrong_mean, wrong_sd) == ([19], [18])


# the parts


def test_agreement_is_arviz_at_the_worst_coordinate():
    stats = pytest.importorskip("arviz_stats.base").array_stats
    z = torch.randn(6, 100, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    z[0, :, 21] += 2.0
    found = agreement(z)
    r_hats = [stats.rhat(z[:, :, k].numpy()) for k in range(30)]
    assert found.worst == int(np.argmax(r_hats)) == 21
    assert found.r_hat == pytest.approx(max(r_hats))
    assert found.ess_bulk == pytest.approx(min(stats.ess(z[:, :, k].numpy(), method="bulk") for k in range(30)))
    assert agreement(z, limit=1.01).r_hat == found.r_hat
    assert int(split_rhat(z).argmax()) == 21
    stuck = z.clone()
    stuck[:, :, 3] = 1.0
    assert agreement(stuck).r_hat == math.inf
    assert agreement(z[:, :5]).r_hat == math.inf


def test_separation_is_not_slowness():
    noise = torch.randn(20, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    apart = noise.clone()
    apart[:5] -= 10
    words = describe_separation(apart)
    assert words is not None
    assert words.startswith("5 of 20")
    assert describe_separation(noise) is None
    assert describe_separation(noise + torch.linspace(-3, 3, 20, dtype=F64)[:, None]) is None


def test_starts_are_tempered_only_as_far_as_many_are_left():
    log_w = torch.randn(4000, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(refine_module._tempered(log_w, 500.0), log_w.softmax(0))
    steep = 40 * log_w
    steep[7] = -math.inf
    weights = refine_module._tempered(steep, 500.0)
    assert float(1 / weights.square().sum()) == pytest.approx(500, rel=1e-3)
    assert weights[7] == 0
    assert weights.argmax() == log_w.argmax()


def test_bridge_sampling_knows_z_where_q_is_too_narrow():
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=20_000), rng.normal(size=(64, 300)) * 3.0

    def log_w(x):  # p = 5 N(0, 3^2), q = N(0, 1): the weights have infinite variance
        return math.log(5 / 3) - 0.5 * (x / 3) ** 2 + 0.5 * x**2

    log_z, se = bridge(log_w(q), log_w(p), p.size)
    assert abs(log_z - math.log(5)) < 4 * se < 0.1
    assert math.isnan(bridge(np.full(10, -np.inf), log_w(p), 100.0)[0])
    far = p[:, :10] + 60.0  # hardly an overlap: it must not claim to know
    assert bridge(log_w(q) + 20 * q - 200, log_w(far), far.size)[1] == math.inf


def test_evidence_of_a_curved_density():
    # z1 | z0 ~ N(z0^2, .25^2) with z0 ~ N(0, 1), times e^3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 64, 2, dtype=F64, generator=generator)
    e = torch.stack([noise[..., 0], noise[..., 0] ** 2 + 0.25 * noise[..., 1]], -1)

    def log_density(e):
        log_p = -0.5 * e[..., 0] ** 2 - 8 * (e[..., 1] - e[..., 0] ** 2) ** 2
        return log_p - math.log(2 * math.pi * 0.25) + 3

    found, se = log_evidence(log_density, e, log_density(e), 6400.0, generator)
    assert abs(found - 3) < 4 * se < 0.2
