"""Flow, VAE and GAN side by side: the measures of draws against known answers, and a tiny run of all of it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")

from experiments import datasets, digits, flows_vs_vae_vs_gan, gan, generators, sample_quality
from flowvi.errors import DimensionError, FlowVIError, OptionError


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mmd_is_zero_in_expectation_and_its_error_is_right():
    found = [sample_quality.mmd(normal(2 * i, 60, 2), normal(2 * i + 1, 60, 2), 1.0) for i in range(300)]
    values = torch.tensor([f.value for f in found])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(300)
    assert (values < 0).any()  # no bias, so not bounded by 0
    assert sum(f.standard_error for f in found) / 300 == pytest.approx(values.std().item(), rel=0.2)


def test_mmd_of_two_gaussians():
    # E exp(-(a - b)^2 / 2) for a - b ~ N(m, 2) is exp(-m^2 / 6) / sqrt(3).
    found = [sample_quality.mmd(normal(i, 200, 1), 1 + normal(1000 + i, 200, 1), 1.0) for i in range(100)]
    values = torch.tensor([f.value for f in found])
    exact = 2 * (1 - math.exp(-1 / 6)) / math.sqrt(3)
    assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / 10)
    assert sum(f.standard_error for f in found) / 100 == pytest.approx(values.std().item(), rel=0.25)


@pytest.mark.parametrize("classifier", [sample_quality.by_network, sample_quality.by_neighbours])
def test_two_sample_accuracy(classifier):
    x, y = normal(0, 600, 2), normal(1, 600, 2)
    same = sample_quality.two_sample_accuracy(x, y, classifier, folds=2)
    assert same.value == pytest.approx(0.5, abs=0.06)
    far = sample_quality.two_sample_accuracy(x, y + 10, classifier, folds=2)
    assert far.value == pytest.approx(1, abs=1e-3)
    # The best classifier of N(0, I) against N((2, 0), I) is right with probability Phi(1) = .841.
    near = sample_quality.two_sample_accuracy(x, y + torch.tensor([2.0, 0.0]), classifier, folds=2)
    assert near.value == pytest.approx(0.841, abs=0.04)


def test_frechet_distance():
    x = normal(0, 500, 3)
    a = torch.tensor([[2.0, 0.3, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.1]], dtype=torch.float64)
    assert sample_quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert sample_quality.frechet_distance(x, x + 2) == pytest.approx(12)
    y = normal(1, 400, 3) @ a + 1
    one, two = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(one @ two).real.clamp_min(0).sqrt().sum()
    exact = (x.mean(0) - y.mean(0)).square().sum() + one.trace() + two.trace() - 2 * root
    assert sample_quality.frechet_distance(x, y) == pytest.approx(exact.item())
    dead = torch.cat([x, torch.zeros(500, 2, dtype=torch.float64)], 1)  # features that never fire
    assert sample_quality.frechet_distance(dead, dead + 1) == pytest.approx(5)


def test_modes_and_histograms():
    data = datasets.load(datasets.GRID, 10, 20_000, seed=0)
    centres, scale = data.modes
    full = sample_quality.modes_covered(data.test, centres, scale)
    assert full.covered == 25
    assert full.good_share == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    some = data.test[data.test[:, 0] > -3]
    assert sample_quality.modes_covered(some, centres, scale).covered == 20
    between = sample_quality.modes_covered(data.test + 1, centres, scale)
    assert between == (0, 0.0)
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2])
    assert sample_quality.total_variation(first, second, 3) == pytest.approx(0.5)


def test_the_density_of_the_grid():
    data = datasets.load(datasets.GRID, 10, 20_000, seed=0)
    line = (torch.arange(120, dtype=torch.float64) + 0.5) / 120 - 0.5  # a square around one mode
    mass = data.log_density(torch.cartesian_prod(line, line)).exp().sum() / 120**2
    assert mass.item() == pytest.approx(1 / 25, rel=1e-6)
    entropy = math.log(25) + 1 + math.log(2 * math.pi * 0.05**2)
    assert -data.log_density(data.test).mean().item() == pytest.approx(entropy, abs=0.03)


def test_pixels_on_the_line_and_back():
    levels = torch.arange(digits.LEVELS).repeat(50, 1)
    x = digits.to_line(levels, torch.Generator().manual_seed(0))
    assert (digits.from_line(x) == levels).all()
    assert (digits.from_line(torch.tensor([-50.0, 50.0])) == torch.tensor([0, digits.LEVELS - 1])).all()
    # By autograd: v + u as a function of x.
    x = x[:3].double().requires_grad_()
    v = (torch.sigmoid(x) - digits.MARGIN) / (1 - 2 * digits.MARGIN) * digits.LEVELS
    slope = torch.autograd.grad(v.sum(), x)[0]
    assert torch.allclose(digits.log_slope(x), -slope.log().sum(-1))


def test_the_r1_penalty_of_a_linear_discriminator():
    line = torch.nn.Linear(3, 1).double()
    real, fake = normal(0, 20, 3).requires_grad_(), normal(1, 20, 3)
    loss = [gan._discriminator_loss(line, real, fake, gamma) for gamma in (0.0, 4.0)]
    assert (loss[1] - loss[0]).item() == pytest.approx(2 * line.weight.square().sum().item())


def test_a_gan_learns_a_gaussian():
    x = (torch.tensor([3.0, -2.0]) + normal(0, 4000, 2) * torch.tensor([2.0, 0.5])).float()
    state = torch.random.get_rng_state()
    found = [gan.fit_gan(x, 2, 24, gan.Training(500, batch_size=128, averaging=0.98), seed=3) for _ in "ab"]
    assert torch.equal(state, torch.random.get_rng_state())
    draws = [g.sample(4000, torch.Generator().manual_seed(0)) for g in found]
    assert torch.equal(*draws)
    assert torch.allclose(draws[0].mean(0), x.mean(0), atol=0.4)
    assert torch.allclose(draws[0].std(0) / x.std(0), torch.ones(2), atol=0.4)


def test_the_vae_knows_its_own_density():
    # Gaussian data: the linear-Gaussian answer is within reach, so log p of the VAE is near the truth, ELBO below it.
    x = (normal(0, 3000, 2) @ torch.tensor([[5.0, 3.0], [0.0, 1.0]], dtype=torch.float64)).float() + 7
    learnt = generators.learn_vae(
        x[:2000], x[2000:2500], latent_dim=2, num_flows=0, budget=2000, seed=0, num_steps=500, lr=5e-3
    )
    found = learnt.log_probs(x[2500:], 200)
    truth = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(x[2500:])
    assert (truth - found.values).mean().item() == pytest.approx(0, abs=0.15)
    assert (found.bounds <= found.values + 1e-9).all()
    assert torch.allclose(torch.cov(learnt.sample(4000, 0).T), torch.cov(x.T), rtol=0.3, atol=1)


def test_widths_come_near_the_budget():
    assert generators.width_for(lambda w: 3 * w * w, 1000) == 18  # 972; 19 is 1083
    config = flows_vs_vae_vs_gan.Config(seed=0, short=4000, num_train=500)
    rows = {}
    for model in ("flow", "vae", "vae_planar", "gan"):
        case = {"set": "spirals", "model": model, "seed": 0, "short": config.short}
        subject = flows_vs_vae_vs_gan._subject("spirals", 500, 0, config.short, None)
        rows[model] = flows_vs_vae_vs_gan._learn(case, subject).num_parameters
    assert flows_vs_vae_vs_gan._budget("spirals", 2) == rows["flow"]
    for count in rows.values():
        assert count == pytest.approx(rows["flow"], rel=0.02)


def test_tiny_run(tmp_path):
    config = flows_vs_vae_vs_gan.Config(
        sets=(datasets.GRID,), models=("data", "flow", "vae", "gan"), num_train=500, num_scored=20, num_drawn=200,
        short=2000,
    )  # fmt: skip
    report = flows_vs_vae_vs_gan.run(config, tmp_path, progress=False)
    assert [path.name for path in report.write(tmp_path)][2] == "flows_vs_vae_vs_gan.png"
    rows = {row["model"]: row for row in report.rows}
    assert rows["data"]["modes"] >= 20
    assert rows["flow"]["elbo"] is None
    assert rows["vae"]["elbo"] <= rows["vae"]["log_p"] + 1e-9
    assert rows["gan"]["log_p"] is None
    again = flows_vs_vae_vs_gan.run(config, tmp_path, progress=False)  # rows that are there are taken
    assert again.rows == report.rows


def test_bad_input(tmp_path):
    with pytest.raises(OptionError, match="sets"):
        flows_vs_vae_vs_gan.Config(sets=("moon",))
    with pytest.raises(DimensionError, match="one shape"):
        sample_quality.mmd(normal(0, 5, 2), normal(0, 5, 3), 1.0)
    with pytest.raises(OptionError, match="folds"):
        sample_quality.two_sample_accuracy(normal(0, 5, 2), normal(0, 5, 2), sample_quality.by_neighbours, folds=1)
    with pytest.raises(FlowVIError, match="has no train-images"):
        flows_vs_vae_vs_gan.run(flows_vs_vae_vs_gan.Config(), tmp_path, tmp_path, progress=False)
