"""The experiment large: its models, data and references, and its rows in a tiny setting."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyro
import pytest
import torch

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")

from experiments import large, large_models, peers, truth
from experiments.large_models import MODELS, Large, judged, load
from flowvi.errors import OptionError
from flowvi.targets import as_density


@pytest.fixture
def float64():
    """The models run by Pyro itself take torch's default dtype, and the data are in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


DIMENSIONS = {"hierarchical": 205, "horseshoe": 100, "volatility": 150}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_size_they_are_said_to_have(name):
    model = MODELS[name]
    data, again = model.make(), model.make()
    assert all(torch.equal(data[key], again[key]) for key in data)
    density = as_density(model.model, args=(data,))
    assert density.dim == DIMENSIONS[name]
    log_p, grad = density.value_and_grad(torch.zeros(2, density.dim, dtype=density.dtype))
    assert log_p.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.usefixtures("float64")
def test_references_are_of_these_models():
    for known in load():
        trace = pyro.poutine.trace(known.model).get_trace(known.data)
        sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not s.get("is_observed", False)}
        assert sites.keys() >= known.mean.keys() - {"beta"}
        for site, mean in known.mean.items():
            assert mean.shape == known.std[site].shape == trace.nodes[site]["value"].shape
            assert (known.std[site] > 0).all()


def test_the_references_own_chains_agree():
    for name, found in large_models.read_references().items():
        assert name in MODELS
        assert found["chains"] == [4, 2000, 5000]
        assert found["r_hat"] < 1.01
        assert found["ess"] > 4000
        assert max(found["error_mean"], found["error_sd"]) < 0.04


@pytest.mark.skipif(not peers.has_numpyro(), reason="NumPyro is not installed: pip install 'flowvi[peers]'")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_numpyro_twins_have_the_same_density(name):
    from numpyro.infer.util import log_density

    from experiments.large_numpyro import TWINS

    data = MODELS[name].make()
    pyro.set_rng_seed(3)
    trace = pyro.poutine.trace(MODELS[name].model).get_trace(data)
    latent = large_models.read_references()[name]["mean"].keys() - {"beta"}
    values = {site: trace.nodes[site]["value"] for site in latent}
    arrays = {key: np.asarray(x) for key, x in data.items()}
    twin, _ = log_density(TWINS[name], (arrays,), {}, {key: np.asarray(x) for key, x in values.items()})
    assert float(twin) == pytest.approx(float(trace.log_prob_sum()), rel=1e-9)


def test_scales_are_judged_by_their_logarithms():
    tau = torch.distributions.LogNormal(torch.tensor(1.0), torch.tensor(0.5)).sample((50_000,))
    beta = torch.randn(50_000) + 2
    draws = {"tau": tau, "beta": beta}
    assert torch.equal(judged(draws, ("tau",))["tau"], tau.log())
    one, half, two = torch.tensor(1.0).double(), torch.tensor(0.5).double(), torch.tensor(2.0).double()
    known = Large("x", lambda d: None, {}, {"tau": one, "beta": two}, {"tau": half, "beta": one}, scales=("tau",))
    assert max(known.errors(draws)) < 0.03
    assert max(dataclasses.replace(known, scales=()).errors(draws)) > 1


def test_a_tiny_run_and_that_it_goes_on(tmp_path, monkeypatch):
    config = dataclasses.replace(
        large.Config.quick(), models=("horseshoe",), fit_steps=20, num_draws=400, refine_share=1e-3
    )
    report = large.run(config, tmp_path, progress=False)
    assert [row["method"] for row in report.rows] == [*truth.OURS, large.NUTS]
    assert not any(row["trusted"] for row in report.rows)  # twenty steps and a second of HMC are not enough
    assert report.rows[0]["error"] > 0.1
    assert any("Not within them: horseshoe, flowvi;" in note for note in report.notes)
    paths = report.write(tmp_path)
    assert all(path.is_file() for path in paths)
    assert [json.loads(line)["case"]["posterior"] for line in (tmp_path / "rows.jsonl").open()] == ["horseshoe"]
    monkeypatch.setattr(truth, "flowvi_rows", None)  # nothing is worked on again
    assert large.run(config, tmp_path, progress=False).rows == report.rows


def test_wrong_arguments(tmp_path):
    with pytest.raises(OptionError, match="no model nobody: there are hierarchical"):
        large.run(large.Config(models=("nobody",)), tmp_path)
    with pytest.raises(OptionError, match="make-references"):
        load(tmp_path / "none.json")
