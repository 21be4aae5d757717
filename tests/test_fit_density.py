"""Maximum likelihood: known entropies, held-out rows, early stopping, contexts, files, and bad input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import flowvi
from flowvi.conditional_flow import ConditionalFlow, conditional_factory, flow_at
from flowvi.errors import (
    DimensionError,
    FileFormatError,
    InterruptedWarning,
    NonFiniteError,
    NumericalWarning,
    OptionError,
    UnknownFlowError,
)
from flowvi.fit import density
from flowvi.fit.adam import FlatAdam
from flowvi.fit.density import _start
from flowvi.transforms import Planar, available, conditional_planar, register

FLOWS = [name for name in available() if not name.startswith("test")]
TRIANGLE = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
CENTRE = torch.tensor([10.0, -3.0], dtype=torch.float64)


def gaussian(num: int = 3000, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Rows of a correlated Gaussian far from 0, whose mean log density is -1 - log(2 pi) - log|L|, |L| = 1."""
    eps = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (eps @ TRIANGLE.T + CENTRE).to(dtype)


def true_log_prob(x: torch.Tensor) -> torch.Tensor:
    z = torch.linalg.solve(TRIANGLE, (x.double() - CENTRE).T).T
    return -0.5 * z.square().sum(-1) - math.log(2 * math.pi) - TRIANGLE.diagonal().log().sum()


def ring(num: int = 4000, seed: int = 0) -> torch.Tensor:
    """A ring of radius 3 around (1, 2): what no affine map of a Gaussian can be."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(num, generator=generator)
    radius = 3 + 0.3 * torch.randn(num, generator=generator)
    return torch.stack([1 + radius * angle.cos(), 2 + radius * angle.sin()], -1)


def fit(x, flow="planar", context=None, **options):
    options = {"num_flows": 4, "num_steps": 150, "seed": 0, "progress": False} | options
    return flowvi.fit_density(x, flow, context, **options)


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_learns_a_gaussian_to_its_entropy(flow):
    q = fit(gaussian(dtype=torch.float32), flow, num_flows=None)
    test = gaussian(4000, seed=1, dtype=torch.float32)
    gap = true_log_prob(test) - q.log_prob(test).double()  # paired: much less noise than the two means
    assert gap.mean().item() == pytest.approx(0, abs=4 * gap.std().item() / 4000**0.5 + 0.02)


@pytest.mark.parametrize(("flow", "gain"), [("planar", 0.4), ("radial", 0.3)])
def test_planar_and_radial_learn_by_their_inverses(flow, gain):
    q = fit(ring(), flow, num_flows=8, num_steps=250)
    alone = fit(ring(), "affine", num_flows=0)
    test = ring(seed=1)
    assert q.log_likelihood(test).mean > alone.log_likelihood(test).mean + gain
    line = torch.linspace(-9, 9, 361)
    grid = torch.cartesian_prod(line + 1, line + 2)
    assert q.log_prob(grid).exp().sum().item() * 0.05**2 == pytest.approx(1, abs=5e-3)


def test_gradients_through_the_inverse_are_the_implicit_ones():
    """The gradient of log q by the parameters by fit_density's route, against finite differences in float64."""
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 3), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = ring(50).double()
    flow.log_prob(x).mean().backward()
    for p in flow.parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * 1e-6 * direction)
                values.append(flow.log_prob(x.clone()).mean().item())
                p.sub_(sign * 1e-6 * direction)
        expected = (values[0] - values[1]) / 2e-6
        assert (p.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_units_of_the_data_only_shift_the_score(scale):
    """Standardization: the same fit in every unit, and nats are those of the data."""
    x = ring(1500).double()
    plain, scaled = fit(x, num_steps=60), fit(x * scale + scale, num_steps=60)
    expected = plain.log_prob(x) - 2 * math.log(scale)
    assert torch.allclose(scaled.log_prob(x * scale + scale), expected, atol=1e-4)
    scores = [q.history.validation[-1].item() for q in (plain, scaled)]
    assert scores[1] == pytest.approx(scores[0] - 2 * math.log(scale), abs=1e-3)


def test_config_history_and_words():
    x = ring(1000)
    q = fit(x, "planar")
    config, history = q.config, q.history
    assert config["num_rows"] == 900
    assert config["num_held_out"] == 100
    assert config["num_parameters"] == sum(p.numel() for p in q.flow.parameters())
    assert config["dtype"] == "float32"
    assert history.step[-1] == 150
    assert len(history.step) == len(history.train) == len(history.validation) == len(history.lr)
    assert history.best_step == history.step[history.validation.argmax()]
    held = q.log_likelihood(x[q.held_out])
    assert held.mean == pytest.approx(config["validation_mean"], abs=1e-5)
    assert held.mean == pytest.approx(history.validation.max().item(), abs=1e-4)  # the best parameters were kept
    assert held.standard_error == pytest.approx(q.log_prob(x[q.held_out]).std().item() / 10, rel=1e-4)
    assert "DensityFit of D = 2: planar K = 4" in repr(q)
    assert f"{held.mean:.3f} ± " in repr(q)
    assert str(held).endswith("nats")


def test_held_out_rows_are_disjoint_and_reproducible():
    x = ring(500)
    one, two, other = fit(x, num_steps=20), fit(x, num_steps=20), fit(x, num_steps=20, seed=1)
    assert torch.equal(one.held_out, two.held_out)
    assert torch.equal(one.log_prob(x), two.log_prob(x))
    assert not torch.equal(one.held_out, other.held_out)
    assert len(one.held_out) == len(one.held_out.unique()) == 50
    # No held-out row is trained on: the fit doesn't change when they do (but for where it is best).
    spoiled = x.clone()
    spoiled[one.held_out] = spoiled[one.held_out].flip(0) * 0.5
    again = fit(spoiled, num_steps=20)
    assert torch.equal(one.history.train, again.history.train)
    assert not torch.equal(one.history.validation, again.history.validation)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    q = fit(ring(200), num_steps=5, seed=None)
    q.sample(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(q.seed, int)


def test_early_stopping_keeps_the_best_parameters():
    """Few rows and many parameters: the held-out score falls after a while."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    q = fit(x, "planar", num_flows=16, num_steps=1000, validation=0.3, patience=5)
    assert q.config["stopped"] == "no improvement"
    last, best = q.history.step[-1].item(), q.history.best_step
    assert best < last < 1000
    assert last - best == 5 * 10  # five checks, one every 10 steps
    assert q.log_likelihood(x[q.held_out]).mean == pytest.approx(q.history.validation.max().item(), abs=1e-4)


def test_held_out_data_of_ones_own_and_none():
    x, mine = ring(500), ring(300, seed=1)
    q = fit(x, num_steps=30, validation=mine)
    assert q.held_out is None
    assert q.config["num_rows"] == 500
    assert q.config["num_held_out"] == 300
    assert q.config["validation_mean"] == pytest.approx(q.log_likelihood(mine).mean, abs=1e-5)
    none = fit(x, num_steps=30, validation=0)
    assert none.config["validation_mean"] is None
    assert none.history.validation.isnan().all()
    assert none.history.best_step == 30
    assert "held out" not in repr(none)


def test_epochs_and_batches():
    q = fit(ring(1000), num_steps=None, num_epochs=3, batch_size=100)
    assert q.config["num_steps"] == 27  # 900 rows
    assert fit(ring(20), num_steps=5).config["batch_size"] == 18


@pytest.mark.parametrize("make", [np.asarray, lambda x: x.tolist(), lambda x: x.long()], ids=["array", "list", "int"])
def test_what_numpy_makes_a_matrix_of_is_data(make):
    q = fit(make(10 * ring(100)), num_steps=5)
    assert q.dim == 2
    assert q.sample(4).shape == (4, 2)


def test_one_dimension_and_double_precision():
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    q = fit(x, "radial", num_steps=100)
    assert q.log_prob(x).dtype == torch.float64
    line = torch.linspace(-20, 60, 80001, dtype=torch.float64)[:, None]
    assert q.log_prob(line).exp().sum().item() * 1e-3 == pytest.approx(1, abs=1e-3)
    assert fit(x, num_steps=5, dtype=torch.float32).sample(2).dtype == torch.float32


def test_samples_have_the_density_that_log_prob_says():
    q = fit(ring(), num_flows=8, num_steps=200)
    x = q.sample(20_000, seed=4)
    assert torch.equal(x, q.sample(20_000, seed=4))
    assert not torch.equal(q.sample(5), q.sample(5))
    line = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(line + 1, line + 2)
    mass = q.log_prob(grid).exp().double() * 0.05**2
    for axis, sharp in ((0, 1.0), (1, 2.0)):
        inside = (grid[:, axis] > sharp).double()
        assert (x[:, axis] > sharp).double().mean().item() == pytest.approx((mass * inside).sum().item(), abs=0.02)
    assert q.sample(0).shape == (0, 2)


def test_log_prob_of_any_shape_and_of_what_is_not_finite():
    q = fit(ring(200), num_steps=5)
    x = ring(12).reshape(3, 4, 2)
    assert q.log_prob(x).shape == (3, 4)
    assert torch.allclose(q.log_prob(x)[1, 2], q.log_prob(x[1, 2]))
    odd = torch.tensor([[0.0, math.nan], [math.inf, 0.0], [0.0, 0.0]])
    out = q.log_prob(odd)
    assert out[0].isnan()
    assert out[1] == -math.inf
    assert out[2].isfinite()
    assert not out.requires_grad
    assert q.flow.log_prob(x.requires_grad_()).requires_grad


# Contexts.


NOISE = torch.tensor([[0.5, 0.3], [1.0, 0.3]])
"""Standard deviations for c1 <= 0 and for c1 > 0."""


def regression(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y1 = 5 + 3 c1 - 6 c2 + noise, y2 = c1 + noise, with contexts in other units."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(num, 2, generator=generator)
    mean = torch.stack([5 + 3 * c[:, 0] - 6 * c[:, 1], c[:, 0]], -1)
    return mean + NOISE[(c[:, 0] > 0).long()] * torch.randn(num, 2, generator=generator), 100 * c + 7


def has_twin(name: str) -> bool:
    try:
        conditional_factory(name)
    except OptionError:
        return False
    return True


IN_A_HURRY = ("planar", "real_nvp", "maf", "neural_spline")  # one of a kind; the others are slow tests


@pytest.mark.parametrize(
    "flow",
    [pytest.param(f, marks=() if f in IN_A_HURRY else pytest.mark.slow) for f in FLOWS if has_twin(f)],
)
def test_every_conditional_flow_learns_a_regression(flow):
    y, c = regression(3000, 0)
    q = fit(y, flow, c, num_flows=2, num_steps=600, lr=1e-2, batch_size=256)
    assert q.context_dim == 2
    at = torch.tensor([[-1.0, 0.5], [1.0, 0.0]])
    draws = q.sample(4000, 100 * at + 7, seed=0)
    assert draws.shape == (2, 4000, 2)
    assert torch.allclose(draws.mean(1), torch.tensor([[-1.0, -1.0], [8.0, 1.0]]), atol=0.3)
    assert torch.allclose(draws.std(1), NOISE, rtol=0.3)
    test, context = regression(4000, 1)
    best = -math.log(2 * math.pi * math.e) - NOISE.log().sum(1).mean().item()  # minus the noise's mean entropy
    assert q.log_likelihood(test, context).mean > best - 0.15
    assert "given C = 2" in repr(q)


def test_a_conditional_density_integrates_to_one_at_every_context():
    x = ring(1500)
    c = x.sum(-1, keepdim=True) + 0.1 * torch.randn(1500, 1, generator=torch.Generator().manual_seed(0))
    q = fit(x, "planar", c, num_flows=2, num_steps=100)
    line = torch.linspace(-12, 12, 481)
    grid = torch.cartesian_prod(line + 1, line + 2)
    for value in (0.0, 4.0):
        density = q.log_prob(grid, torch.tensor([value])).exp()  # one context broadcasts over all points
        assert density.sum().item() * 0.05**2 == pytest.approx(1, abs=5e-3)
    flow = q.flow.condition(torch.tensor([4.0]))
    assert torch.allclose(flow.log_prob(grid[:5]), q.log_prob(grid[:5], torch.tensor([4.0])))
    assert q.sample(7, torch.zeros(3, 5, 1)).shape == (3, 5, 7, 2)
    assert q.log_prob(x[:6], c[:6]).shape == (6,)


def test_contexts_are_asked_for_and_refused():
    x, c = ring(200), torch.randn(200, 3)
    with_context, without = fit(x, "planar", c, num_steps=3), fit(x, num_steps=3)
    with pytest.raises(OptionError, match=r"needs a context \(\.\.\., C\)"):
        with_context.log_prob(x)
    with pytest.raises(OptionError, match="without a context"):
        without.sample(3, c)
    with pytest.raises(DimensionError, match="C = 3"):
        with_context.sample(3, torch.zeros(2))
    with pytest.raises(DimensionError, match="broadcast"):
        with_context.log_prob(x[:4], c[:3])
    with pytest.raises(DimensionError, match="C = 3"):
        with_context.flow.condition(torch.zeros(2))
    own = fit(x, "planar", c, num_steps=3, validation=x[:30], validation_context=c[:30])
    assert own.config["num_held_out"] == 30


@pytest.mark.parametrize(("flow", "context_dim"), [("nice", 0), ("maf", 0), ("neural_spline", 0), ("maf", 3)])
def test_networks_start_away_from_the_identity_and_from_the_seed(flow, context_dim):
    x, context = ring(50), torch.randn(50, 3)

    def start(seed):
        q = _start(flowvi.FlowSpec(flow, 2, 2), context_dim, None, x, seed)
        return flow_at(q, context if context_dim else None).log_prob(x)

    standard = -0.5 * x.square().sum(-1) - math.log(2 * math.pi)
    assert (start(0) - standard).abs().max() > 0.05
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_factories_in_place_of_names():
    x, c = ring(200), torch.randn(200, 3)
    assert fit(x, Planar, num_steps=3).config["flow"] == "Planar"
    assert fit(x, conditional_planar, c, num_steps=3).config["flow"] == "conditional_planar"
    with pytest.raises(OptionError, match="has no condition"):
        fit(x, lambda input_dim, context_dim: Planar(input_dim), c)


def test_a_flow_without_a_conditional_form():
    register("test plain", Planar, overwrite=True)
    with pytest.raises(OptionError, match=r"has no conditional form; these have: .*planar"):
        fit(ring(100), "test plain", torch.zeros(100, 1))


# Files.


@pytest.mark.parametrize("context", [None, torch.randn(300, 2)], ids=["plain", "conditional"])
def test_save_and_load(tmp_path, context):
    x = ring(300)
    q = fit(x, "planar", context, num_steps=30)
    q.save(tmp_path / "q.pt")
    back = flowvi.load_density(tmp_path / "q.pt")
    assert torch.equal(back.log_prob(x, context), q.log_prob(x, context))
    at = None if context is None else context[0]
    assert torch.equal(back.sample(5, at, seed=1), q.sample(5, at, seed=1))
    assert back.config == q.config
    assert back.timing == q.timing
    assert torch.equal(back.history.validation, q.history.validation)
    assert torch.equal(back.held_out, q.held_out)
    assert repr(back) == repr(q)


def test_files_of_another_kind(tmp_path):
    fit(ring(100), num_steps=3).save(tmp_path / "density.pt")
    posterior = flowvi.fit(flowvi.energies.U2(), num_flows=1, num_steps=20, verify=False, progress=False, seed=0)
    posterior.save(tmp_path / "posterior.pt")
    with pytest.raises(FileFormatError, match=r"holds a flowvi posterior, not a density: use flowvi\.load"):
        flowvi.load_density(tmp_path / "posterior.pt")
    with pytest.raises(FileFormatError, match=r"holds a flowvi density, not a posterior: use flowvi\.load_density"):
        flowvi.load(tmp_path / "density.pt", flowvi.energies.U2())
    torch.save({"format": "other"}, tmp_path / "other.pt")
    with pytest.raises(FileFormatError, match="not a flowvi density"):
        flowvi.load_density(tmp_path / "other.pt")
    with pytest.raises(OptionError, match=r"Add your own with flowvi\.transforms\.register"):
        fit(ring(100), lambda input_dim: Planar(input_dim), num_steps=3).save(tmp_path / "mine.pt")


# What can go wrong.


def spoiled(row: int, column: int, value: float) -> torch.Tensor:
    x = ring(100)
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (
            NonFiniteError,
            r"1 of 100 rows \(the first is row 7\)",
            lambda: fit(spoiled(7, 1, math.nan)),
        ),
        (NonFiniteError, "x is NaN or infinite", lambda: fit(spoiled(0, 0, -math.inf))),
        (NonFiniteError, "context is NaN", lambda: fit(ring(100), context=torch.full((100, 1), math.nan))),
        (DimensionError, r"pass x\[:, None\]", lambda: fit(torch.randn(100))),
        (DimensionError, r"must have shape \(rows, columns\)", lambda: fit(torch.randn(4, 5, 2))),
        (DimensionError, "x has 9 rows", lambda: fit(ring(9))),
        (DimensionError, "context has 50 rows, and must have 100", lambda: fit(ring(100), context=torch.randn(50, 1))),
        (
            DimensionError,
            "validation has 3 columns",
            lambda: fit(ring(100), validation=torch.randn(9, 3)),
        ),
        (OptionError, r"columns \[1\] of x are constant", lambda: fit(ring(100) * torch.tensor([1.0, 0.0]) + 3)),
        (OptionError, r"columns \[0\] of x are constant", lambda: fit(ring(100) * torch.tensor([1e-6, 1.0]) + 100)),
        (OptionError, "must be a matrix of numbers", lambda: fit([["a", "b"]] * 20)),
        (OptionError, "is complex", lambda: fit(torch.randn(100, 2, dtype=torch.complex64))),
        (OptionError, "validation must be a fraction", lambda: fit(ring(100), validation=1.5)),
        (OptionError, "validation_context goes with", lambda: fit(ring(100), validation_context=ring(9))),
        (
            OptionError,
            "validation_context goes with",
            lambda: fit(ring(50), validation=ring(9), validation_context=3),
        ),
        (OptionError, "num_steps must be a positive integer", lambda: fit(ring(100), num_steps=0)),
        (OptionError, "patience must be a positive integer", lambda: fit(ring(100), patience=2.5)),
        (OptionError, "num_steps or num_epochs, not both", lambda: fit(ring(100), num_epochs=3)),
        (OptionError, "lr must be a positive number", lambda: fit(ring(100), lr=-1.0)),
        (OptionError, "dtype must be", lambda: fit(ring(100), dtype=torch.float16)),
        (OptionError, "could not be built with options", lambda: fit(ring(100), colour="red")),
        (OptionError, "can't be built with options", lambda: fit(ring(100), context=ring(100), colour="red")),
        (UnknownFlowError, "Did you mean 'planar'", lambda: fit(ring(100), "planr")),
        (OptionError, "num_samples must be a whole number", lambda: fit(ring(100), num_steps=2).sample(-1)),
        (
            DimensionError,
            "must be the data's, D = 2",
            lambda: fit(ring(100), num_steps=2).log_prob(0.0),
        ),
        (DimensionError, "at least 2 rows", lambda: fit(ring(100), num_steps=2).log_likelihood(ring(1))),
    ],
)
def test_bad_input_says_what_is_wrong(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    class Rough(Planar):
        """NaN at every third density with a gradient."""

        calls = 0

        def inverse_and_log_det(self, y):
            x, log_det = super().inverse_and_log_det(y)
            if torch.is_grad_enabled():
                Rough.calls += 1
                log_det = log_det * (math.nan if Rough.calls % 3 == 0 else 1.0)
            return x, log_det

    with pytest.warns(NumericalWarning, match="10 steps were skipped"):
        q = fit(ring(300), Rough, num_flows=1, num_steps=30)
    assert q.history.skipped_steps == 10
    assert q.log_prob(ring(5)).isfinite().all()


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    step = FlatAdam.step

    def interrupt(self, *args):
        if self.state[0] == 11:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(FlatAdam, "step", interrupt)
    with pytest.warns(InterruptedWarning, match="after 11 steps"):
        q = fit(ring(300), num_steps=100)
    assert q.config["stopped"] == "interrupted"
    assert q.history.best_step == q.history.step[q.history.validation.argmax()]
    assert q.log_prob(ring(5)).isfinite().all()


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(ring(200), num_steps=5)


@pytest.mark.parametrize("name", ["maf", "real_nvp"])
def test_conditional_layers_reach_every_coordinate(name):
    """A layer that treats coordinates unequally alternates: with two layers no coordinate is left as it is."""
    torch.manual_seed(0)
    q = ConditionalFlow(flowvi.FlowSpec(name, 2, 2), context_dim=1, dtype=torch.float64)
    with torch.no_grad():
        for p in q.layers.parameters():
            p.add_(0.3 * torch.randn_like(p))
    at = q.condition(torch.zeros(1, dtype=torch.float64))
    x = torch.randn(2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: _through(at, v), x)
    assert (jacobian.abs() > 1e-4).all()


def _through(flow, x):
    for t in flow.transforms:
        x = t(x)
    return x


def test_conditional_flow_starts_as_a_standard_normal():
    q = ConditionalFlow(flowvi.FlowSpec("planar", 3, 4), context_dim=2, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    assert torch.allclose(q.condition(torch.randn(5, 2, dtype=torch.float64)).log_prob(x), expected)
    assert q.condition(torch.randn(4, 5, 2, dtype=torch.float64)).batch_shape == (4, 5)
    assert (q.dim, q.dtype, q.device.type) == (3, torch.float64, "cpu")


RECORDED = [("maf", 0), ("real_nvp", 0), ("neural_spline", 0), ("planar", 0), ("iaf", 0), ("maf", 2), ("radial", 2)]


@pytest.mark.parametrize(("flow", "context_dim"), RECORDED)
def test_a_recorded_fit_is_the_fit(flow, context_dim, monkeypatch):
    monkeypatch.setattr(density, "LOOK_EVERY", 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator).cumsum(1)
    context = torch.randn(300, context_dim, generator=generator) if context_dim else None
    fits = []
    for least in (10, 1000):
        monkeypatch.setattr(density, "LEAST_STEPS", least)
        options = {"num_flows": 2, "num_steps": 20, "batch_size": 64, "seed": 1, "progress": False}
        fits.append(flowvi.fit_density(x, flow, context, **options))
    assert [f.config["recorded"] for f in fits] == [True, False]
    torch.testing.assert_close(fits[0].history.validation, fits[1].history.validation, rtol=1e-4, atol=1e-4)
    if not context_dim:
        with pytest.raises(NonFiniteError):  # the fitted flow checks its values again
            fits[0].flow.log_prob(torch.full((1, 3), math.nan))


class Drifts(flowvi.transforms.Affine):
    """A layer that becomes another one after so many calls."""

    calls, after = 0, 40

    def inverse_and_log_det(self, y):
        self.calls += 1
        x, log_det = super().inverse_and_log_det(y)
        return (x, log_det) if self.calls < self.after else (2 * x, log_det + 3 * math.log(2))


def test_a_flow_that_changes_in_time_is_told_of(monkeypatch):
    monkeypatch.setattr(density, "LOOK_EVERY", 1)
    monkeypatch.setattr(density, "LEAST_STEPS", 10)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(NumericalWarning, match="change in time"):
        found = flowvi.fit_density(x, lambda dim: Drifts(dim), num_flows=1, num_steps=100, batch_size=64, seed=1)
    assert not found.config["recorded"]
