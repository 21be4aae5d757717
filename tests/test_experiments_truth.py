"""The experiments truth and verdict: their targets' moments, their rows, and what they make of them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from scipy import stats

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")

import flowvi
from experiments import known_models, known_targets, peers, truth, verdict
from experiments.known_targets import Random
from experiments.posteriors import exact, load_references
from flowvi.errors import OptionError

# Targets with known moments --------------------------------------------------------------------------------


def grid_moments(target, move=lambda z: (z, 0.0), num=701, reach=7.5):
    """Mass, mean and sd of the judged quantities of a target on the plane, by quadrature.

    The grid is sinh-spaced, fine in the middle and wide enough for heavy tails. `move` takes it to where the target
    is smooth: grid -> z and the log Jacobian.
    """
    t = torch.linspace(-reach, reach, num, dtype=torch.float64)
    own = target.judged is known_targets.coordinates  # else z's own moments are not known, but it is near the origin
    loc, scale = (target.mean, target.std) if own else (torch.zeros(2).double(), torch.ones(2).double())
    points = torch.cartesian_prod(*(loc[i] + 0.3 * scale[i] * t.sinh() for i in range(2)))
    weight = torch.cartesian_prod(*(0.3 * scale[i] * t.cosh() * (t[1] - t[0]) for i in range(2))).prod(1)
    z, log_det = move(points)
    density = torch.nan_to_num((target.log_prob(z) + log_det).exp() * weight)
    judged = torch.nan_to_num(target.judged(z)).clamp(-1e100, 1e100)
    mass = density.sum()
    mean = density @ judged / mass
    return mass, mean, (density @ (judged - mean).square() / mass).sqrt()


def along_the_scale(points):
    """(x, u) -> (x exp(u), u): a funnel's neck made wide."""
    u = points[:, 1]
    return torch.stack([points[:, 0] * u.exp(), u], 1), u


def check_moments(target, mass, mean, std):
    assert mass.item() == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close((mean - target.mean) / target.std, torch.zeros(2).double(), atol=5e-3, rtol=0)
    torch.testing.assert_close(std / target.std, torch.ones(2).double(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("dim", "apart", "odds", "ratio"), [(4, 5.0, 1.0, 2.0), (6, 4.0, 0.25, 2.0), (5, 8.0, 3.0, 1.5)]
)
def test_the_share_of_directions_that_lead_to_a_narrow_mode(dim, apart, odds, ratio):
    random, num = Random(0), 200_000
    direction = torch.nn.functional.normalize(random.normal(num, dim), dim=1)
    higher = torch.zeros(num, dtype=torch.bool)
    for radius in torch.linspace(0.2, 4 * apart, 400).tolist():
        x = radius * direction
        away = x - apart * torch.eye(dim).double()[0]
        narrow = math.log(odds) + dim * math.log(ratio) - 0.5 * (ratio * away).square().sum(1)
        higher |= narrow > -0.5 * x.square().sum(1)
    hits = int(higher.sum())
    assert hits > 300
    assert known_targets.directions_to(dim, apart, odds, ratio) == pytest.approx(hits / num, abs=4 * hits**0.5 / num)


def test_needles_are_apart():
    found = [known_models.make(known_models.NEEDLES + i, 3) for i in range(20)]
    assert {target.family for target in found} == {"needle"}
    assert all("widths 1, 0.5" in target.name and target.dim >= 20 for target in found)
    others = [known_models.make(i, seed) for seed in range(10) for i in range(5, 220, 11)]
    assert {target.family for target in others} == {"two modes"}
    assert any("widths 1, 0.5" in target.name and target.dim > 10 for target in others)
    assert known_targets.is_needle(30, 0.5, 10.0, 0.5)
    assert not known_targets.is_needle(20, 0.5, 6.0, 0.5)  # what a scan of a million places finds
    assert not known_targets.is_needle(50, 0.5, 16.0, 1.0)


PLANE = ["funnel", "banana", "skewed", "heavy", "two modes", "eight modes", "positive", "horseshoe", "regression"]


@pytest.mark.parametrize("family", PLANE)
@pytest.mark.parametrize("seed", [0, 1])
def test_known_moments_by_quadrature(family, seed):
    target = known_models.FAMILIES[family](Random(seed), 2)
    assert target.family == family
    assert target.dim == 2
    if family == "horseshoe" and "non-centered" not in target.name:
        check_moments(target, *grid_moments(target, along_the_scale))
    else:
        check_moments(target, *grid_moments(target))


def test_known_moments_of_neals_funnel():
    found = (known_models.FAMILIES["funnel"](Random(seed), 2) for seed in range(30))
    neal = next(target for target in found if "Neal" in target.name)

    def move(points):  # v first, then x
        v = points[:, 0]
        return torch.stack([v, points[:, 1] * (v / 2).exp()], 1), v / 2

    check_moments(neal, *grid_moments(neal, move))


@pytest.mark.parametrize("seed", [0, 1])
def test_known_moments_of_a_gaussian_by_its_curvature(seed):
    target = known_models.FAMILIES["gaussian"](Random(seed), 5)
    curvature = torch.autograd.functional.hessian(lambda z: target.log_prob(z[None])[0], target.mean)
    torch.testing.assert_close(torch.linalg.inv(-curvature).diagonal().sqrt(), target.std, rtol=1e-6, atol=0)
    value = 0.5 * (torch.linalg.slogdet(-curvature).logabsdet - 5 * math.log(2 * math.pi))
    torch.testing.assert_close(target.log_prob(target.mean[None])[0], value)
    gradient = torch.autograd.functional.jacobian(lambda z: target.log_prob(z[None])[0], target.mean)
    torch.testing.assert_close(gradient, torch.zeros(5).double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_known_moments_of_hierarchical_means(seed):
    """By importance sampling: theta about mu where tau is small, about its own mean where tau is large."""
    target = known_models.FAMILIES["hierarchical"](Random(seed), 4)
    num = 2**17
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(num, dtype=torch.float64)
    t = torch.as_tensor(stats.t.ppf(points.clamp(1e-9, 1 - 1e-9).numpy(), 4.0))
    wide = torch.distributions.StudentT(torch.tensor(4.0).double())
    spread = 1.3 * target.std
    x = target.mean + spread * t
    mu, tau = x[:, :1], x[:, 1:2].exp()
    near = torch.rand(num, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    theta = torch.where(near, mu + tau * t[:, 2:], x[:, 2:])
    about_mu = (wide.log_prob((theta - mu) / tau) - tau.log()).sum(1)
    about_own = (wide.log_prob((theta - target.mean[2:]) / spread[2:]) - spread[2:].log()).sum(1)
    log_q = (wide.log_prob(t[:, :2]) - spread[:2].log()).sum(1) + torch.logaddexp(about_mu, about_own) - math.log(2)
    if "non-centered" in target.name:
        log_q = log_q + 2 * tau[:, 0].log()
        z = torch.cat([x[:, :2], (theta - mu) / tau], 1)
    else:
        z = torch.cat([x[:, :2], theta], 1)
    log_w = target.log_prob(z) - log_q
    weight = log_w.softmax(0)
    judged = target.judged(z)
    mean = weight @ judged
    std = (weight @ (judged - mean).square()).sqrt()
    assert (log_w.logsumexp(0) - math.log(num)).item() == pytest.approx(0, abs=0.01)
    torch.testing.assert_close((mean - target.mean) / target.std, torch.zeros(4).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(std / target.std, torch.ones(4).double(), atol=0.02, rtol=0)


def test_targets_by_number():
    """The same number is the same target; every family has odd and even numbers; values keep z's dtype."""
    targets = [known_models.make(index, seed=5) for index in range(22)]
    parities = {(target.family, index % 2) for index, target in enumerate(targets)}
    assert parities == {(family, parity) for family in known_models.FAMILIES for parity in (0, 1)}
    for index, target in enumerate(targets):
        assert known_models.make(index, seed=5).name == target.name
        z = torch.randn(3, target.dim)
        value = target.log_prob(z)
        assert value.dtype == torch.float32
        assert value.shape == (3,)
        torch.testing.assert_close(value.double(), target.log_prob(z.double()), rtol=1e-3, atol=1e-2)
        assert target.mean.shape == target.std.shape == target.judged(z.double()).shape[1:]
        assert (target.std > 0).all()


def test_what_is_positive_is_a_model_with_the_same_density():
    found = [known_models.FAMILIES["positive"](Random(seed), 3) for seed in range(12)]
    assert len({target.name.split(",")[0] for target in found}) == 3
    for target in found:
        density = flowvi.as_density(**{k: v for k, v in target.fitted.items() if k != "dim"})
        z = torch.randn(20, 3)
        torch.testing.assert_close(density(z).double(), target.log_prob(z.double()), rtol=1e-4, atol=1e-3)
        x = target.seen(density.constrain(z))
        torch.testing.assert_close(x, target.judged(z.double()), rtol=1e-4, atol=1e-5)


def test_errors_of_draws():
    target = known_models.FAMILIES["gaussian"](Random(0), 2)
    z = target.mean + target.std * torch.randn(200_000, 2, dtype=torch.float64)
    assert max(target.errors(z)) < 0.02
    moved = z + torch.tensor([0.0, 0.5]) * target.std
    assert target.errors(moved)[0] == pytest.approx(0.5, abs=0.02)
    assert target.errors(target.mean + 1.3 * (z - target.mean))[1] == pytest.approx(0.3, abs=0.02)


# The verdict -----------------------------------------------------------------------------------------------


def row(index, truth, khat, trusted=True, **more):
    base = {"index": index, "family": "funnel", "name": "a funnel", "dim": 2, "options": "", "error": None}
    return base | {"truth": truth, "khat": khat, "trusted": trusted, "error_mean": 0.1, "error_sd": 0.1} | more


def test_confusion_and_threshold():
    odd = [row(1, "right", 0.1), row(3, "right", 0.5), row(5, "wrong", 0.9), row(7, "grey", 0.2), row(9, "right", 1.0)]
    even = [row(2, "right", 0.6), row(4, "wrong", 0.65), row(6, "wrong", 0.8), row(8, "right", math.nan)]
    limit, on_odd, on_even = verdict.best_threshold([*odd, *even], "khat")
    assert limit == pytest.approx(0.7)  # half-way between the largest right one below the smallest wrong one, and that
    assert on_odd == {
        "right trusted": 2,
        "right not": 1,
        "grey trusted": 1,
        "grey not": 0,
        "wrong trusted": 0,
        "wrong not": 1,
    }
    assert (on_even["right trusted"], on_even["right not"]) == (1, 1)  # NaN is never trusted
    assert (on_even["wrong trusted"], on_even["wrong not"]) == (1, 1)
    assert verdict.best_threshold([*odd, *even], "missed") is None
    lines = {line["fits"]: line for line in verdict.table([*odd, *even])}
    assert lines["all"]["number"] == "9"
    assert lines["all"]["wrong trusted"] == "3"
    assert lines["odd numbers"]["number"] == "5"
    assert lines["gaussian"]["number"] == "0"


def test_ess_is_better_where_it_is_larger():
    rows = [row(1, "right", 0.1, ess_fraction=0.9), row(3, "wrong", 0.1, ess_fraction=0.5)]
    limit, on_odd, _ = verdict.best_threshold(rows, "ess_fraction")
    assert limit == pytest.approx(0.7)
    assert (on_odd["right trusted"], on_odd["wrong trusted"]) == (1, 0)


def test_a_far_mode_is_a_group_of_its_own():
    """Known log Z: q is e^-.7 of it and nothing moves. It must not spoil the thresholds of what can't see it."""
    far = row(1, "wrong", 0.0, hmc_j=0.0, log_z_error=-0.7)
    poor = row(3, "wrong", 0.9, hmc_j=2.0, log_z_error=-0.1)
    good = row(5, "right", 0.5, hmc_j=0.01, log_z_error=0.0)
    assert [verdict.lacks_a_mode(r) for r in (far, poor, good)] == [True, False, False]
    limit, _, _ = verdict.best_threshold([far, poor, good], "khat")
    assert limit == pytest.approx(0.7)
    lines = {line["fits"]: line for line in verdict.table([far, poor, good])}
    assert lines["lacking a far mode"]["wrong trusted"] == "1"


def test_about_two_fits_of_five_are_spoiled():
    spoiled = [verdict.options(index, 0) for index in range(500)]
    share = sum(bool(options) for options in spoiled) / len(spoiled)
    assert share == pytest.approx(verdict.SPOILED_SHARE, abs=0.07)
    assert {json.dumps(options) for options in spoiled if options} == {json.dumps(o) for o in verdict.SPOILED}


def test_verdict_runs_and_goes_on(tmp_path, monkeypatch):
    config = dataclasses.replace(verdict.Config.quick(1), num_targets=1, num_steps=30)
    first = verdict.run(config, tmp_path, progress=False)
    monkeypatch.setattr(verdict, "measure", lambda *_: pytest.fail("a row that was there is made again"))
    again = verdict.run(config, tmp_path, progress=False)
    assert again.rows == first.rows
    again.write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["index"] for r in results["rows"]] == [0, known_models.NEEDLES]
    table = (tmp_path / "table.md").read_text()
    assert "| all | 1 |" in table
    assert "| needle, not among all | 1 |" in table
    gaussian = results["rows"][0]
    assert gaussian["family"] == "gaussian"
    assert gaussian["truth"] in ("right", "grey", "wrong")
    assert gaussian["kl_true"] == pytest.approx(-gaussian["elbo"])
    assert {"khat", "ess_fraction", "gap", "resample_mean_shift", "seconds_fit"} <= set(gaussian)


def test_a_fit_that_raises_is_a_row(monkeypatch):
    def fail(*args, **kwargs):
        raise OptionError("no")

    monkeypatch.setattr("flowvi.fit", fail)
    found = verdict.fit_one(verdict.Config.quick(), 0)
    assert found["error"] == "OptionError: no"
    assert (found["truth"], found["trusted"]) == ("wrong", False)


def test_ctrl_c_ends_the_verdict(monkeypatch):
    stopped = dataclasses.make_dataclass("Stopped", ["config"])({"stopped": "interrupted"})
    monkeypatch.setattr("flowvi.fit", lambda *args, **kwargs: stopped)
    with pytest.raises(KeyboardInterrupt):
        verdict.fit_one(verdict.Config.quick(), 0)


# The truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(peers.GUIDES))
def test_guides_give_every_site(name):
    """One latent in a plate, one vector, two plates: draws have the sites' shapes, whatever the guide."""
    for known in exact()[:3]:
        draws = peers.pyro_guide(known, name, seed=0, num_steps=2, num_draws=7)
        for site, mean in known.mean.items():
            assert draws[site].shape == (7, *mean.shape)
            assert draws[site].isfinite().all()
    assert torch.get_default_dtype() == torch.float32


def test_a_guide_learns_what_it_can():
    """A Gaussian posterior of one parameter, near where the guide starts."""
    known = exact()[0]
    errors = [
        known.errors(peers.pyro_guide(known, "AutoNormal", seed=0, num_steps=num_steps, num_draws=2000))
        for num_steps in (2, 600)
    ]
    assert errors[1][0] < 0.3 * errors[0][0]
    assert errors[1][1] < 0.7 * errors[0][1]


def test_nuts_and_improper_priors(references):
    known = next(k for k in load_references(references) if k.name == "kidscore_momhsiq")
    draws = peers.pyro_nuts(known, seed=0, num_warmup=2, num_draws=3)
    assert draws["beta"].shape == (3, 3)
    guided = peers.pyro_guide(known, "AutoMultivariateNormal", seed=0, num_steps=2, num_draws=5)
    assert guided["beta"].shape == (5, 3)


def test_deterministic_sites_are_filled_in(references):
    known = next(k for k in load_references(references) if k.name == "eight_schools_noncentered")
    latent = {"mu": torch.randn(4).double(), "tau": torch.rand(4).double(), "theta_trans": torch.randn(4, 8).double()}
    theta = latent["mu"][:, None] + latent["tau"][:, None] * latent["theta_trans"]
    torch.testing.assert_close(peers.with_deterministic(known, latent)["theta"], theta)


def test_truth_runs_and_goes_on(tmp_path, monkeypatch):
    methods = ("flowvi", "flowvi, resample()", "AutoNormal")
    config = dataclasses.replace(truth.Config.quick(), methods=methods, num_steps=3, fit_steps=30, refine_seconds=0.2)
    monkeypatch.setattr(truth, "posteriors", lambda folder: exact()[2:3])
    first = truth.run(config, tmp_path, progress=False)
    assert [r["method"] for r in first.rows] == list(methods)
    ours = first.rows[0]
    assert ours["trusted"] in (True, False)
    assert ours["error"] == max(ours["error_mean"], ours["error_sd"])
    assert first.rows[1]["seconds"] > 0.5 * ours["seconds"]  # the fit's seconds are a part of both
    assert first.rows[2]["trusted"] is None
    monkeypatch.setattr(peers, "pyro_guide", lambda *a, **k: pytest.fail("a row that was there is made again"))
    again = truth.run(config, tmp_path, progress=False)
    assert again.rows == first.rows
    again.write(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| beta-binomial | AutoNormal |" in table
    assert "these are not the figures to quote" in table


def test_a_method_that_raises_is_a_row():
    def fail():
        raise RuntimeError("singular\nmore of it")

    known = exact()[0]
    found = truth._measured(known, "AutoNormal", 0, fail)
    assert found["failed"] == "RuntimeError: singular"
    assert math.isinf(found["error"])
    lines = truth.table([found])
    assert lines[0]["error of a mean, sd"] == "failed"


def test_unknown_method(tmp_path):
    with pytest.raises(OptionError, match="no method HMC"):
        truth.run(dataclasses.replace(truth.Config(), methods=("HMC",)), tmp_path, progress=False)
