"""The pictures: what they show is right, on axes of one's own or of theirs; how they look is for eyes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi import plotting
from flowvi.errors import DimensionError, OptionError
from flowvi.mixture import MixtureFlow
from flowvi.plotting import plane
from flowvi.plotting.marginals import MAX_MARGINALS

matplotlib = pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

QUIET = {"progress": False, "verify": False, "seed": 0, "compile": False}


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


@pytest.fixture(scope="module")
def posterior():
    """A model's, fitted in rounds."""
    y = torch.tensor([0.3, -0.4, 1.1, 0.8], dtype=torch.float64)
    return flowvi.fit(model, (y,), time_limit=1.0, **QUIET)


@pytest.fixture(scope="module")
def annealed():
    """An energy's, annealed."""
    return flowvi.fit(flowvi.energies.U1(), num_flows=4, num_steps=100, **QUIET)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def random_flow(name="planar", num_flows=5):
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, 2, num_flows), dtype=torch.float64)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return flow


def text_of(axis):
    """Everything written on axes."""
    legend = axis.get_legend()
    words = [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(t.get_text() for t in axis.texts)]
    return " ".join(words + ([t.get_text() for t in legend.get_texts()] if legend else []))


# The plane


@pytest.mark.parametrize("name", ["planar", "radial", "real_nvp", "neural_spline"])
def test_first_layers_are_the_flow_cut(name):
    flow = random_flow(name)
    total = plane.num_layers(flow)
    z = torch.randn(20, 2, dtype=torch.float64)
    whole = plane.first_layers(flow, total)
    assert torch.allclose(whole.log_prob(z), flow.log_prob(z), atol=1e-12)
    none = plane.first_layers(flow, 0)  # a Gaussian, through the affine layer
    affine = flow.transforms[-1]
    x = affine.inv(z)
    exact = -0.5 * x.square().sum(-1) - math.log(2 * math.pi) - affine.log_abs_det_jacobian(x, z)
    assert torch.allclose(none.log_prob(z), exact, atol=1e-12)


@pytest.mark.parametrize("name", ["planar", "radial"])
def test_a_cut_stack_and_the_rest_are_the_stack(name):
    flow = random_flow(name)
    x = torch.randn(20, 2, dtype=torch.float64)
    start = plane.first_layers(flow, 3).transforms[0]
    rest = copy.deepcopy(flow.transforms[0])
    rest.num_flows = 2
    for key, value in flow.transforms[0].named_parameters():
        setattr(rest, key, torch.nn.Parameter(value.detach()[3:]))
    assert torch.allclose(rest(start(x)), flow.transforms[0](x), atol=1e-12)


def test_first_layers_are_a_copy_and_k_is_checked():
    flow = random_flow()
    part = plane.first_layers(flow, 2)
    with torch.no_grad():
        part.transforms[0].w.zero_()
    assert flow.transforms[0].w.abs().min() > 0
    with pytest.raises(OptionError, match="k must be from 0 to 5"):
        plane.first_layers(flow, 6)


def test_a_mixture_of_flows_is_shown_whole_and_has_no_layers():
    parts = [flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 4), loc=m) for m in (-4.0, 4.0)]
    mixture = MixtureFlow(parts, torch.tensor([0.5, 0.5]).log())
    axis = plotting.plot_density(mixture, num=60)[0]
    image = axis.images[0].get_array()
    left, right, bottom, top = axis.images[0].get_extent()
    assert image.sum() * (right - left) * (top - bottom) / 60**2 == pytest.approx(1, abs=0.03)
    assert left < -4
    assert right > 4
    with pytest.raises(OptionError, match=r"flow.flows\[0\]"):
        plotting.plot_layers(mixture)


def test_another_base_than_the_normal():
    uniform = torch.distributions.Uniform(-torch.ones(2), torch.ones(2), validate_args=False)
    flow = flowvi.Flow(uniform, [flowvi.transforms.Affine(2, "diag", scale=torch.tensor(2.0))], validate_args=False)
    image = plotting.plot_density(flow, num=50, box=((-3.0, 3.0), (-3.0, 3.0)))[0].images[0].get_array()
    assert set(np.unique(image.round(5))) == {0.0, 0.0625}


def test_target_is_normalized():
    box = ((-8.0, 8.0), (-8.0, 8.0))

    def values(function):
        image = plane.on_grid(function, box, 200)
        return image, image.sum() * (16 / 200) ** 2

    exact, mass = values(plane.target_function(flowvi.energies.U1(), box))
    assert mass == pytest.approx(1, abs=1e-4)
    own, mass = values(plane.target_function(lambda z: 7 - flowvi.energies.U1()(z), box))  # its constant is lost
    assert mass == pytest.approx(1, abs=1e-6)
    assert np.allclose(own, exact, atol=1e-5)


def test_window_shows_modes_that_the_flow_misses():
    far = flowvi.Flow(2, [flowvi.transforms.Affine(2, "diag", loc=torch.tensor([2.0, 0.0]), scale=torch.tensor(0.1))])
    target = flowvi.energies.U1()
    wide = plane.wide_box(far, target)
    box = plane.window([plane.exact(far), plane.target_function(target, wide)], wide)
    assert box[0][0] < -2
    assert box[0][1] > 2
    assert all(-6 < low < high < 6 for low, high in box)  # no more than is needed


# The pictures


def test_density_is_the_flows(annealed):
    axes = plotting.plot_density(annealed, num=60)
    assert len(axes) == 2
    flow_image, target_image = (axis.images[0] for axis in axes)
    assert flow_image.get_clim() == target_image.get_clim()
    left, right, bottom, top = flow_image.get_extent()
    grid = plane.Grid.midpoints(((left, right), (bottom, top)), 60)
    with torch.no_grad():
        q = annealed.flow.log_prob(grid.z.reshape(-1, 2).float()).exp().reshape(60, 60)
    assert np.allclose(flow_image.get_array(), q.T, atol=2e-3)
    assert np.allclose(target_image.get_array(), flowvi.energies.U1().log_prob(grid.z).exp().T, atol=1e-9)
    assert "KL" in axes[0].get_title()
    assert "nats" in axes[0].get_title()
    assert "U1" in axes[1].get_title()


def test_density_of_a_flow_alone_on_given_axes():
    _, mine = plt.subplots()
    axes = plotting.plot_density(random_flow(), num=40, ax=mine)
    assert axes[0] is mine
    assert len(axes) == 1


def test_density_names_a_models_coordinates(posterior):
    axes = plotting.plot_density(posterior, num=40)
    assert axes[0].get_xlabel() == "mu"
    assert axes[0].get_ylabel() == "sigma (unconstrained)"
    q, p = (axis.images[0].get_array() for axis in axes)
    assert abs(q - p).max() < 0.1 * p.max()


def test_layers(annealed):
    axes = plotting.plot_layers(annealed, num=40)
    assert [axis.get_title() for axis in axes] == ["no layer", "1 layer", "2 layers", "3 layers", "all 4 layers"]
    limits = {axis.get_xlim() for axis in axes}
    assert len(limits) == 1


def test_layers_of_a_model_have_room_for_the_names_of_its_sites(posterior):
    axis = plotting.plot_layers(posterior, [0, 2], box=((-4, 4), (-1.6, 1.6)), num=10)[0]
    axis.figure.canvas.draw()
    for words in (axis.title, axis.xaxis.label, axis.yaxis.label):
        where = words.get_window_extent()
        assert 0 <= where.y0 < where.y1 <= axis.figure.bbox.height


def test_elbo_marks_its_phases(posterior, annealed):
    axis = plotting.plot_elbo(posterior)
    words = text_of(axis)
    for word in ("K = 32", "fresh draws", "log evidence", "after whitening", "nats"):
        assert word in words
    assert "annealed" not in words
    low, high = axis.get_ylim()
    assert low < posterior.diagnose().log_evidence < high
    axis = plotting.plot_elbo(annealed)
    assert "annealed" in text_of(axis)
    assert "fresh draws" not in text_of(axis)
    assert axis.patches[0].get_width() == pytest.approx(30)  # the first 30% of 100 steps


def test_elbo_where_the_gaussian_was_the_answer():
    fit = flowvi.fit(lambda z: -0.5 * z.square().sum(-1), dim=2, **QUIET)
    assert len(fit.history.step) == 0
    assert "fresh draws" in text_of(plotting.plot_elbo(fit))


def test_khat_shows_the_weights(annealed):
    axis = plotting.plot_khat(annealed, num_samples=1000)
    found = annealed.diagnose(1000)
    assert f"k-hat {found.khat:.2f}" in axis.get_title()
    weights = next(line for line in axis.lines if line.get_label() == "weights").get_ydata()
    assert len(weights) == 1000
    assert np.mean(weights) == pytest.approx(1)
    assert (np.diff(weights) <= 0).all()
    tail = next(line for line in axis.lines if line.get_label() == "Pareto tail")
    assert len(tail.get_xdata()) == math.floor(3 * math.sqrt(1000))  # what PSIS smooths


def test_marginals(posterior):
    reference = {"mu": torch.randn(500), "sigma": torch.rand(500)}
    axes = plotting.plot_marginals(posterior, reference, num_samples=2000)
    assert [axis.get_xlabel() for axis in axes] == ["mu", "sigma"]
    assert {t.get_text() for t in axes[0].get_legend().get_texts()} == {"reference", "q", "q, resampled"}
    for line in axes[1].lines:
        x, height = line.get_data()
        assert x.min() > 0  # no density where sigma can't be
        assert height.sum() * (x[1] - x[0]) <= 1 + 1e-9
    axes = plotting.plot_marginals(posterior, posterior, sites=["sigma"], corrected=False, num_samples=2000)
    assert len(axes) == 1
    assert {t.get_text() for t in axes[0].get_legend().get_texts()} == {"reference", "q"}
    with pytest.raises(OptionError, match="no site is named nu: there are mu, sigma"):
        plotting.plot_marginals(posterior, sites=["nu"])


def test_marginals_of_elements():
    fit = flowvi.fit(lambda z: -0.5 * z.square().sum(-1), dim=20, **QUIET)
    axes = plotting.plot_marginals(fit, num_samples=500)
    assert [axis.get_xlabel() for axis in axes] == [f"z[{i}]" for i in range(MAX_MARGINALS)]


ROWS = [
    {"target": target, "flow": flow, "K": k, "seed": seed, "kl": scale / k * (1 + seed)}
    for target in ("A", "B")
    for flow, scale in (("planar", 1.0), ("radial", 2.0))
    for k in (2, 8, 32)
    for seed in (0, 1, 2)
]


def test_error_against_k():
    axes = plotting.plot_error_against_k([*ROWS, {**ROWS[0], "kl": None}])
    assert [axis.get_title() for axis in axes] == ["A", "B"]
    planar = axes[0].containers[0]
    x, y = planar.lines[0].get_data()
    assert list(x) == [2, 8, 32]
    assert np.allclose(y, [2 / 2, 2 / 8, 2 / 32])  # the median of the seeds
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["planar", "radial"]
    assert "nats" in axes[0].get_ylabel()


def test_flows_with_the_same_errors_are_both_seen():
    rows = [{"flow": flow, "K": k, "kl": 1 / k} for flow in ("first", "second") for k in (2, 8)]
    (axis,) = plotting.plot_error_against_k(rows)
    first, second = axis.containers
    assert first[0].get_linewidth() > second[0].get_linewidth()
    assert first[0].get_markersize() > second[0].get_markersize()


def test_error_against_k_says_what_it_lacks():
    with pytest.raises(OptionError, match="rows is empty"):
        plotting.plot_error_against_k([])
    with pytest.raises(OptionError, match="the rows lack K; they have flow, kl"):
        plotting.plot_error_against_k([{"flow": "planar", "kl": 1.0}])


@pytest.mark.parametrize("draw", [plotting.plot_density, plotting.plot_layers])
def test_only_the_plane_has_pictures_of_densities(draw):
    with pytest.raises(DimensionError, match="plot_marginals"):
        draw(flowvi.Flow(3, [flowvi.transforms.Affine(3)]))


def test_too_few_axes(annealed, posterior):
    _, axis = plt.subplots()
    for draw in (
        partial(plotting.plot_density, annealed, num=20),
        partial(plotting.plot_layers, annealed, num=20),
        partial(plotting.plot_marginals, posterior, num_samples=500),
        partial(plotting.plot_error_against_k, ROWS),
    ):
        with pytest.raises(OptionError, match="give an array of axes"):
            draw(ax=axis)


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_ink_follows_the_style(annealed, style):
    with plt.style.context(style):
        axis = plotting.plot_elbo(annealed)
        line = next(line for line in axis.lines if line.get_label() == "log evidence")
        assert line.get_color() == plt.rcParams["text.color"]
        assert line.get_color() != plt.rcParams["axes.facecolor"]


def test_importing_flowvi_does_not_import_matplotlib():
    code = "import flowvi, sys; flowvi.plotting.plot_elbo; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gallery(tmp_path, monkeypatch):
    gallery = pytest.importorskip("experiments.gallery", reason="needs a clone")
    paths = gallery.run(gallery.Config.quick(), tmp_path, style="dark_background", progress=False)
    assert {path.stem for path in paths} == {
        "density",
        "layers",
        "elbo",
        "elbo_annealed",
        "khat",
        "marginals",
        "error_against_k",
    }
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000
