"""The numbers of a diagnosis against known answers, and the verdict against fits spoiled on purpose."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from flowvi.columns import columns
from flowvi.diagnostics import Diagnostics, gap_limit, judge
from flowvi.errors import DimensionError, NonFiniteError, OptionError
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.psis import khat_limit, psis
from flowvi.short_run import ShortRun, symmetric_kl
from flowvi.targets import as_density
from flowvi.verdict import decide

BACKENDS = ["arviz_stats", "arviz"]


def need(backend: str) -> str:
    """Skip where the backend can't be imported (ArviZ 0.23 fails beside some versions of its own parts)."""
    try:
        __import__(backend)
    except Exception as error:
        pytest.skip(f"{backend} can't be imported here: {error!r}")
    return backend


def normal(x, mean=0.0, sd=1.0):
    return -0.5 * ((x - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)


def draws(num=20_000, dim=2, seed=0):
    return np.random.default_rng(seed).standard_normal((num, dim))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_is_the_pareto_shape(backend, shape):
    # weights u^-k are exactly Pareto with shape k
    log_w = -shape * np.log(np.random.default_rng(1).random(50_000))
    smoothed, khat = psis(log_w, backend=need(backend))
    assert khat == pytest.approx(shape, abs=0.2)  # 3 standard errors of the estimate at 0.9
    assert np.exp(smoothed).sum() == pytest.approx(1.0, abs=1e-10)


def test_the_two_versions_of_arviz_agree():
    for backend in BACKENDS:
        need(backend)
    log_w = 0.8 * draws(5000, 1)[:, 0]
    log_w[:40] = -np.inf
    (a, ka), (b, kb) = (psis(log_w, backend=backend) for backend in BACKENDS)
    assert ka == pytest.approx(kb, abs=0.02)  # the parts of 1.x round the length of the tail in another way
    np.testing.assert_allclose(np.exp(a), np.exp(b), atol=1e-4)
    assert (np.exp(a[:40]) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_psis_of_degenerate_weights(backend):
    need(backend)
    equal, khat = psis(np.zeros(1000), backend=backend)
    assert khat == 0.0
    np.testing.assert_allclose(np.exp(equal), 1e-3)
    few = np.full(1000, -np.inf)
    few[:3] = 0.0
    weights, khat = psis(few, backend=backend)
    assert khat == math.inf
    np.testing.assert_allclose(np.exp(weights[:3]), 1 / 3)
    # so far apart that all but a few exponentials are zero, as for a fit that failed
    weights, khat = psis(1e5 * draws(1000, 1)[:, 0], backend=backend)
    assert khat == math.inf
    assert np.exp(weights).sum() == pytest.approx(1.0)


def test_psis_does_not_change_its_argument():
    log_w = draws(1000, 1)[:, 0]
    before = log_w.copy()
    psis(log_w)
    assert (log_w == before).all()


def test_bad_input_is_a_typed_error():
    with pytest.raises(OptionError, match="arviz_stats, arviz"):
        psis(np.zeros(1000), backend="numpyro")
    with pytest.raises(DimensionError, match=r"S >= 100, got \(5,\): draw more"):
        psis(np.zeros(5))
    for bad in (np.full(1000, -np.inf), np.full(1000, np.nan), np.full(1000, np.inf)):
        with pytest.raises(OptionError, match="finite or -inf"):
            psis(bad)
    with pytest.raises(DimensionError, match="log_p and log_q"):
        judge(np.zeros(200), np.zeros(300), dim=1)


def test_a_perfect_fit_is_trusted():
    z = draws()
    log_q = normal(z).sum(-1)
    d = judge(log_q + 3.0, log_q, dim=2)
    assert d.trusted
    assert d.verdict.startswith("Trusted")
    assert d.elbo == pytest.approx(3.0)
    assert d.log_evidence == pytest.approx(3.0)
    assert d.ess_fraction == pytest.approx(1.0)
    assert d.khat == 0.0
    assert d.kl is None
    assert "never visits" in d.verdict  # says what it can't see


def test_gaussians_match_the_closed_forms():
    # q = N(0, 1)^2, p = e^1.5 N(m, s)^2: ELBO = 1.5 - KL, log Z = 1.5
    mean, sd, dim = 0.2, 0.9, 2
    kl = dim * (math.log(sd) + (1 + mean**2) / (2 * sd**2) - 0.5)
    z = draws(50_000)
    d = judge(normal(z, mean, sd).sum(-1) + 1.5, normal(z).sum(-1), dim=dim, log_normalizer=1.5)
    assert abs(d.elbo - (1.5 - kl)) < 4 * d.elbo_se
    assert abs(d.log_evidence - 1.5) < 4 * d.log_evidence_se
    assert abs(d.gap - kl) < 4 * d.gap_se
    assert abs(d.kl - kl) < 4 * d.kl_se
    # Kish ESS: 1 / E_q[(p / q)^2] = 1 / integral p^2 / q
    grid = np.linspace(-8, 8, 4001)
    second = np.trapezoid(np.exp(2 * normal(grid, mean, sd) - normal(grid)), grid) ** dim
    assert d.ess_fraction == pytest.approx(1 / second, rel=0.02)
    assert d.ess == pytest.approx(d.ess_fraction * 50_000)


def test_standard_errors_match_the_spread_over_repetitions():
    reports = []
    for seed in range(200):
        z = draws(1000, 1, seed)[:, 0]
        reports.append(judge(normal(z, 0.3, 0.9), normal(z), dim=1))
    for name in ("elbo", "log_evidence", "gap"):
        spread = np.std([getattr(d, name) for d in reports])
        assert np.mean([getattr(d, name + "_se") for d in reports]) == pytest.approx(spread, rel=0.2)


def student(x):
    return np.log(1 / np.pi) - np.log1p(x**2)


CASES = {
    "heavy tails": (lambda z: student(z).sum(-1), "heavy tail"),
    "mean off": (lambda z: normal(z, 0.5).sum(-1), "below the log evidence"),
    "far away": (lambda z: normal(z, 4.0).sum(-1), "k-hat"),
    "non-finite": (lambda z: np.where(z[:, 0] > 2.0, np.nan, normal(z).sum(-1)), "no finite log density"),
    "all zero": (lambda z: np.full(len(z), -np.inf), "no draw of the flow"),
    "all nan": (lambda z: np.full(len(z), np.nan), "no draw of the flow"),
    "infinite": (lambda z: np.where(z[:, 0] > 1.0, np.inf, normal(z).sum(-1)), "no finite log density"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_spoiled_fit_is_not_trusted_and_the_words_say_why(name):
    log_p, words = CASES[name]
    z = draws()
    d = judge(log_p(z), normal(z).sum(-1), dim=2)
    assert not d.trusted
    assert words in d.verdict
    assert "Do not trust" in d.verdict
    assert words in str(d)


def test_heavy_tails_have_a_large_khat():
    z = draws()
    assert judge(student(z).sum(-1), normal(z).sum(-1), dim=2).khat > 0.7
    assert judge(normal(z).sum(-1), student(z).sum(-1), dim=2).khat < 0.5


def test_heavy_tails_of_a_good_bulk_say_so():
    z = draws()
    log_q = normal(z).sum(-1)
    log_p = np.logaddexp(log_q, np.log(1e-4) + student(z / 3).sum(-1))  # a ten-thousandth of the mass in tails
    d = judge(log_p, log_q, dim=2)
    assert d.khat > 0.7
    assert not d.trusted
    assert "The bulk agrees" in d.verdict


def test_a_missed_mode_shows_only_where_the_normalizer_is_known():
    z = draws()
    log_q = normal(z).sum(-1)
    log_p = np.logaddexp(log_q, normal(z, 30.0).sum(-1))  # Z = 2, of which q sees 1
    assert judge(log_p, log_q, dim=2).trusted  # as the docstring says
    d = judge(log_p, log_q, dim=2, log_normalizer=math.log(2))
    assert not d.trusted
    assert d.kl == pytest.approx(math.log(2), abs=1e-6)
    assert "misses part of its mass" in d.verdict


def test_a_few_non_finite_draws_are_counted_and_forgiven():
    z = draws()
    log_q = normal(z).sum(-1)
    log_p = log_q.copy()
    log_p[:20] = -np.inf
    d = judge(log_p, log_q, dim=2)
    assert d.trusted
    assert d.nonfinite_fraction == pytest.approx(1e-3)
    assert d.elbo == pytest.approx(0.0)
    assert d.log_evidence == pytest.approx(math.log1p(-1e-3))
    assert "0.1% of the draws not finite" in d.numbers()


def test_too_few_draws_for_a_borderline_gap_ask_for_more():
    z = draws(200, 1, seed=4)
    d = judge(normal(z, 0.34).sum(-1), normal(z).sum(-1), dim=1)  # KL .058, limit .06
    assert not d.trusted
    assert "more draws" in d.verdict


@pytest.mark.parametrize("field", ["khat", "gap", "gap_se", "ess_fraction", "nonfinite_fraction"])
def test_nan_is_never_trusted(field):

    good = {
        "elbo": 0.0,
        "elbo_se": 0.01,
        "log_evidence": 0.0,
        "log_evidence_se": 0.01,
        "gap": 0.0,
        "gap_se": 0.0,
    }
    good |= {"khat": 0.1, "ess": 900.0, "ess_fraction": 0.9, "nonfinite_fraction": 0.0, "num_samples": 1000}
    assert decide(Diagnostics(**good, trusted=False, verdict=""), 5, flat=False, settled=False)[0]
    heavy = Diagnostics(**(good | {"khat": 0.99}), trusted=False, verdict="")
    assert not decide(heavy, 5, flat=False, settled=False)[0]
    trusted, words, _ = decide(heavy, 5, flat=True, settled=False)  # a tail of weights that are all alike
    assert trusted
    assert "none is above three times their mean" in words
    assert "k-hat" not in words
    assert not decide(
        Diagnostics(**(good | {field: math.nan}), trusted=False, verdict=""), 5, flat=False, settled=False
    )[0]


def test_limits():
    assert khat_limit(100) == pytest.approx(0.5)
    assert khat_limit(100_000) == 0.7
    assert gap_limit(1) < gap_limit(26) < gap_limit(1000) == 0.7


def test_numbers_are_printed_to_their_precision():
    z = draws()
    text = judge(normal(z, 0.1).sum(-1), normal(z).sum(-1), dim=2, log_normalizer=0.0).numbers()
    assert "ELBO -0.00955 ± 0.00100" in text
    assert "KL 0.00955" in text
    assert "k-hat" in text
    assert "of 20000" in text


def moves(**changes):
    still = {
        "j": 0.02,
        "j_se": 0.01,
        "mean_shift": torch.zeros(3),
        "mean_shift_se": torch.full((3,), 0.02),
        "sd_ratio": torch.ones(3),
        "sd_ratio_se": torch.full((3,), 0.02),
        "acceptance": 0.8,
        "r_hat": torch.full((3,), 1.01),
        "divergences": 0.0,
    }
    return ShortRun(**(still | changes))


def test_what_a_short_hmc_moves_is_not_trusted():
    generator = np.random.default_rng(0)
    log_q = generator.normal(size=5000)
    log_p = log_q + 0.01 * generator.normal(size=5000)
    good = judge(log_p, log_q, dim=3, moved=moves())
    assert good.trusted
    assert (good.j, good.shift, good.stretch) == (0.02, 0.0, 0.0)
    assert "J 0.020 ± 0.010" in good.numbers()
    shifted = judge(log_p, log_q, dim=3, moved=moves(mean_shift=torch.tensor([0.0, -0.3, 0.0])), name="site {}".format)
    assert not shifted.trusted
    assert shifted.shift == pytest.approx(0.26)
    assert "moves the mean of site 1 by more than 0.26 sd" in shifted.verdict
    stretched = judge(log_p, log_q, dim=3, moved=moves(sd_ratio=torch.tensor([1.0, 1.0, 1.5])))
    assert not stretched.trusted
    assert "changes the sd of z[2] by more than 45%" in stretched.verdict
    assert not judge(log_p, log_q, dim=3, moved=moves(j=2.0)).trusted
    assert not judge(log_p, log_q, dim=3, moved=moves(mean_shift=torch.full((3,), math.nan))).trusted


def test_weights_that_move_a_mean_are_heard():
    # q holds .6 / .4 of two modes that are .5 / .5: KL is .02 nats, and chains don't cross from one to the other.
    x = draws(10_000, 2)
    right = np.random.default_rng(1).random(len(x)) < 0.6
    x[:, 1] += np.where(right, 4.0, -4.0)
    first = normal(x[:, 0])
    log_q = first + np.logaddexp(math.log(0.6) + normal(x[:, 1], 4.0), math.log(0.4) + normal(x[:, 1], -4.0))
    log_p = first + math.log(0.5) + np.logaddexp(normal(x[:, 1], 4.0), normal(x[:, 1], -4.0))
    assert judge(log_p, log_q, dim=2).trusted
    heard = judge(log_p, log_q, dim=2, z=x)
    assert not heard.trusted
    assert heard.reweighted_site == "z[1]"
    assert heard.reweighted == pytest.approx(0.8 / math.sqrt(1 + 16 * 0.96), abs=0.03)
    assert "weights move the mean of z[1]" in heard.verdict
    same = judge(log_q, log_q, dim=2, z=x)
    assert same.trusted
    assert same.reweighted < 1e-12


def test_a_scale_is_judged_on_its_own_scale_too():
    # q has 1% of its draws near log tau = 3.5, where p has next to nothing: log tau hardly moves, tau does.
    def model():
        pyro.sample("tau", dist.LogNormal(0.0, 0.8))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x = draws(20_000, 3)
    x[:, 0] *= 0.8
    far = np.random.default_rng(1).random(len(x)) < 0.01
    x[far, 0] = 3.5 + 0.3 * draws(len(x), 1, seed=2)[far, 0]
    rest = normal(x[:, 1:]).sum(1)
    log_p = normal(x[:, 0], 0.0, 0.8) + rest
    log_q = np.logaddexp(math.log(0.99) + normal(x[:, 0], 0.0, 0.8), math.log(0.01) + normal(x[:, 0], 3.5, 0.3)) + rest
    assert judge(log_p, log_q, dim=3, z=x).trusted
    seen, name = columns(as_density(model), torch.as_tensor(x).float())
    assert [name(i) for i in range(seen.shape[1])] == ["tau", "x[0]", "x[1]", "tau"]
    assert seen[:, 3] == pytest.approx(seen[:, 0].exp(), rel=1e-5)
    found = judge(log_p, log_q, dim=3, z=seen.numpy(), name=name)
    assert not found.trusted
    assert found.reweighted_site == "tau"


def test_columns_of_a_simplex_have_their_own_names():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("s", dist.HalfNormal(torch.ones(2, 2)).to_event(2))

    seen, name = columns(as_density(model), torch.randn(10, 6))
    names = [name(i) for i in range(seen.shape[1])]
    assert names[6:] == ["p[0]", "p[1]", "p[2]", "s[0,0]", "s[0,1]", "s[1,0]", "s[1,1]"]
    assert seen[:, 6:9].sum(1) == pytest.approx(torch.ones(10).double(), abs=1e-6)
    assert (seen[:, 9:] > 0).all()


def test_a_constant_column_is_no_evidence():
    def model():
        pyro.sample("L", dist.LKJCholesky(3, 2.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    seen, name = columns(as_density(model), torch.randn(2000, 4))
    assert name(4) == "L[0,0]"
    assert (seen[:, 4] == 1).all()
    log_q = normal(draws(2000, 2)).sum(1)
    found = judge(log_q + 0.01 * draws(2000, 1, seed=3)[:, 0], log_q, dim=4, z=seen.numpy(), name=name)
    assert found.reweighted < 0.05
    lost = judge(log_q, log_q, dim=4, z=np.full((2000, 1), np.inf))
    assert not lost.trusted
    with pytest.raises(DimensionError, match="2000 draws"):
        judge(log_q, log_q, dim=4, z=seen[:10].numpy())


def test_draws_and_weights_of_far_values_or_none_are_no_accident():
    x = draws(2000, 2)
    log_q = normal(x).sum(1)
    log_p = log_q.copy()
    log_p[:5] = -np.inf
    x[:5] = np.inf
    assert judge(log_p, log_q, dim=2, z=x).trusted


def test_khat_alone_is_overruled_by_a_settled_hmc_that_moves_nothing():
    generator = np.random.default_rng(0)
    log_q = generator.normal(size=5000)
    log_p = log_q + 0.01 * generator.normal(size=5000)
    log_p[:5] += [1.0, 1.5, 2.0, 2.8, 4.0]  # a few heavy weights: k-hat is large, the bulk is right
    alone = judge(log_p, log_q, dim=3)
    assert alone.khat > 0.7
    assert not alone.trusted
    still = judge(log_p, log_q, dim=3, moved=moves())
    assert still.trusted
    assert "the tails are in doubt" in still.verdict
    assert not judge(log_p, log_q, dim=3, moved=moves(r_hat=torch.full((3,), 1.5))).trusted


def test_khat_is_not_overruled_where_the_weights_may_ask_for_a_larger_sd():
    good = {"elbo": 0.0, "elbo_se": 0.01, "log_evidence": 0.03, "log_evidence_se": 0.01, "gap": 0.03, "gap_se": 0.01}
    good |= {
        "ess": 7850.0,
        "ess_fraction": 0.785,
        "nonfinite_fraction": 0.0,
        "num_samples": 10_000,
        "j": 0.1,
        "j_se": 0.01,
    }

    def found(khat, unsettled, **more):
        numbers = Diagnostics(**(good | more), khat=khat, unsettled=unsettled, trusted=False, verdict="")
        return decide(numbers, 5, flat=False, settled=True)

    assert found(0.8, 0.05)[::2] == (True, False)
    trusted, words, undecided = found(0.8, 0.13)  # more draws would tell
    assert (trusted, undecided) == (False, True)
    assert "off by 13%, within their noise" in words
    assert found(0.3, 0.13)[::2] == (True, True)
    assert found(0.8, 0.13, gap=0.5)[::2] == (False, False)  # nothing to decide
    assert found(0.8, 0.13, ess_fraction=0.1)[::2] == (False, True)


def test_a_site_that_draws_decide_slowly_is_undecided():
    z = draws(1000, 3)
    log_q = normal(z).sum(1)
    # the sd of z[1] is some 10% larger, as far as one sees
    log_p = log_q + 1.5 * np.maximum(np.abs(z[:, 1]) - 2.2, 0.0)
    found = judge(log_p, log_q, dim=3, z=z, moved=moves())
    assert found.reweighted < 0.1 < found.unsettled
    assert found.undecided


def test_evidence_that_only_the_starts_saw_is_not_trusted():
    generator = np.random.default_rng(0)
    log_q = generator.normal(size=5000)
    log_p = log_q + 0.01 * generator.normal(size=5000)
    good = judge(log_p, log_q, dim=3, starts_evidence=(0.01, 0.02))
    assert good.trusted
    assert good.missed == pytest.approx(0.01, abs=1e-3)
    missed = judge(log_p, log_q, dim=3, starts_evidence=(math.log(2), 0.02))
    assert not missed.trusted
    assert "a mode, or a part of one, is missing" in missed.verdict
    assert judge(log_p, log_q, dim=3, starts_evidence=(0.2, 0.1)).trusted  # noise
    assert not judge(log_p, log_q, dim=3, starts_evidence=(math.nan, 0.1)).trusted


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_short_run_needs_two_finite_draws(monkeypatch):
    density = as_density(lambda z: -0.5 * z.square().sum(-1), dim=2)
    seen = iter([0.0])
    monkeypatch.setattr(density, "_log_prob", lambda z: torch.cat([torch.tensor([next(seen)]), z[1:, 0] * math.nan]))
    with pytest.raises(NonFiniteError, match="fewer than two"):
        symmetric_kl(Flow.from_spec(FlowSpec("planar", 2, 1)), density, generator=torch.Generator())
