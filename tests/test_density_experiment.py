"""The density experiment: its sets have the densities they say, and its files hold the right numbers."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")

from experiments import datasets, density, zuko_flows
from flowvi.errors import FlowVIError, UnknownFlowError
from flowvi.transforms.registry import build


@pytest.mark.parametrize("name", datasets.PLANE)
def test_the_density_of_a_plane_set_is_that_of_its_draws(name):
    data = datasets.load(name, 100, 5000, seed=1)
    side, cells = 2 * data.extent, 100
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) * side / cells - data.extent
    grid = torch.cartesian_prod(line, line)
    mass = data.log_density(grid).exp() * (side / cells) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    # Counts in a coarse grid of the plane against the integral of the density over the same cells.
    coarse = ((grid + data.extent) // (side / 5)).long()
    expected = torch.zeros(25, dtype=torch.float64).index_add_(0, coarse[:, 0] * 5 + coarse[:, 1], mass)
    where = ((data.test.double() + data.extent) // (side / 5)).long().clamp(0, 4)
    counted = torch.bincount(where[:, 0] * 5 + where[:, 1], minlength=25) / len(data.test)
    assert torch.allclose(counted.double(), expected, atol=5 * 0.5 / math.sqrt(len(data.test)))
    entropy = -(mass * torch.where(mass > 0, data.log_density(grid), 0.0)).sum()
    found = -data.log_density(data.test)
    assert found.mean().item() == pytest.approx(entropy.item(), abs=5 * found.std().item() / 70 + 0.01)


def test_the_worst_mode():
    data = datasets.load("eight_gaussians", 10, 8000, seed=0)
    assert datasets.worst_mode(data.test, *data.modes) < 0.15
    right = data.test[(data.test - data.modes[0][0]).norm(dim=-1) > 2]  # all modes but the first
    assert datasets.worst_mode(right, *data.modes) == pytest.approx(1)
    blurred = 4 * torch.randn(8000, 2, generator=torch.Generator().manual_seed(0))
    assert datasets.worst_mode(blurred, *data.modes) > 0.3


def test_sets_are_reproducible_and_apart():
    one, again = datasets.load("moons", 100, 50, 3), datasets.load("moons", 100, 50, 3)
    assert torch.equal(one.train, again.train)
    assert (one.train.shape, one.test.shape, one.train.dtype) == ((100, 2), (50, 2), torch.float32)
    assert not torch.equal(one.train[:50], datasets.load("moons", 100, 50, 4).train[:50])


def test_the_table_is_split_and_continuous():
    pytest.importorskip("sklearn")
    data = datasets.load("breast_cancer", 0, 0, seed=0)
    assert (data.train.shape, data.test.shape, data.log_density) == ((455, 10), (114, 10), None)
    x = torch.cat([data.train, data.test])
    assert x.isfinite().all()
    assert all(len(column.unique()) > 400 for column in x.T)


def test_a_missing_package_is_a_message(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(FlowVIError, match=r"pip install 'flowvi\[experiments\]'"):
        datasets.load("breast_cancer", 0, 0, seed=0)


def test_tiny_run(tmp_path):
    pytest.importorskip("sklearn")
    config = density.Config(
        seed=2,
        seeds=2,
        datasets=("checkerboard", "moons", "breast_cancer"),
        flows=("affine", "planar"),
        num_steps=40,
        num_train=500,
        num_test=400,
        pixels=30,
    )
    paths = density.run(config, progress=False).write(tmp_path)
    assert [path.name for path in paths] == ["results.json", "table.md", "density.png"]
    rows = json.loads(paths[0].read_text())["rows"]
    found = {(row["dataset"], row["flow"]): row for row in rows}
    assert len(found) == len(rows) == 3 * 2 + 2  # and the truth of the two sets of the plane
    for (name, flow), row in found.items():
        if name == "breast_cancer":
            assert row["gap"] is None
            continue
        truth = found[name, "truth"]
        if flow != "truth":
            assert row["gap"] == pytest.approx(truth["log_likelihood"] - row["log_likelihood"], abs=1e-6)
            assert row["gap"] > 0
            assert row["num_rows"] + row["num_held_out"] == 500
    assert found["checkerboard", "truth"]["log_likelihood"] == pytest.approx(-math.log(32))
    table = paths[1].read_text()
    assert "Short fits of 40 steps" in table
    assert "| planar | 32 |" in table
    planar = found["moons", "planar"]
    assert len(set(planar["log_likelihood_by_seed"])) == 2
    assert sum(planar["log_likelihood_by_seed"]) / 2 == pytest.approx(planar["log_likelihood"])


def test_zuko_stands_beside(tmp_path):
    pytest.importorskip("zuko")
    config = density.Config(datasets=("moons",), flows=("maf", "planar"), num_steps=30, num_train=500, num_test=400)
    paths = density.run(config, progress=False).write(tmp_path)
    rows = {row["flow"]: row for row in json.loads(paths[0].read_text())["rows"]}
    maf = rows["maf"]
    assert maf["ahead_of_zuko"] == pytest.approx(maf["log_likelihood"] - maf["zuko_log_likelihood"], abs=1e-6)
    by_seed = [a - b for a, b in zip(maf["log_likelihood_by_seed"], maf["zuko_log_likelihood_by_seed"], strict=True)]
    assert len(by_seed) == 3
    assert maf["ahead_of_zuko_se"] == pytest.approx(statistics.stdev(by_seed) / 3**0.5)
    assert maf["zuko_num_parameters"] == maf["num_parameters"]
    assert rows["planar"]["ahead_of_zuko"] is None
    assert "flowvi minus zuko" in paths[1].read_text()


@pytest.mark.parametrize("name", zuko_flows.FAMILIES)
def test_zukos_flows_have_the_size_of_ours(name):
    pytest.importorskip("zuko")
    theirs = zuko_flows.zuko_flow(name, 4, 3, hidden_dims=(32, 32), num_bins=8)
    ours = build(name, 4, 3, **({"num_bins": 8} if name == "neural_spline" else {}))
    count = [sum(p.numel() for layer in layers for p in layer.parameters()) for layers in (ours, [theirs])]
    assert count[0] == count[1]


def test_a_set_alone_without_a_picture(tmp_path):
    pytest.importorskip("sklearn")
    config = density.Config(datasets=("breast_cancer",), flows=("affine",), num_steps=5)
    density.run(config, progress=False).write(tmp_path)
    assert (tmp_path / "density.png").exists()


def test_an_unknown_flow_is_told_before_any_fit():
    with pytest.raises(UnknownFlowError, match="mafia"):
        density.run(density.Config(flows=("maf", "mafia")), progress=False)


def test_ctrl_c_ends_all_of_it(monkeypatch):
    fit = density.flowvi.fit_density

    def stopped(*args, **kwargs):
        q = fit(*args, **kwargs)
        q.config["stopped"] = "interrupted"
        return q

    monkeypatch.setattr("flowvi.fit_density", stopped)
    config = density.Config.quick()
    assert config.flows is None  # all of them
    with pytest.raises(KeyboardInterrupt):
        density.run(config, progress=False)
