"""The experiments: what they write, and that the numbers in it are right."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from functools import partial

import numpy as np
import pyro
import pytest
import torch

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")
typer_testing = pytest.importorskip("typer.testing", reason="needs typer: pip install 'flowvi[experiments]'")

from experiments import fig1, fig3, flow_length, flow_length_report, parallel, report, speed, speed_peers  # noqa: E402
from experiments.__main__ import MAKES, app  # noqa: E402
from flowvi.errors import FlowVIError  # noqa: E402

VERSIONS = {"python", "torch", "pyro", "numpy", "flowvi"}


def invoke(*args):
    result = typer_testing.CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return result.output


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def check_files(out, name):
    """The three files, and what every results.json holds."""
    assert {path.name for path in out.iterdir()} == {"results.json", "table.md", f"{name}.png"}
    assert is_png(out / f"{name}.png")
    results = json.loads((out / "results.json").read_text())
    assert results["experiment"] == name
    assert set(results["versions"]) == VERSIONS
    assert results["config"]["seed"] == results["seed"]
    assert results["seconds"] > 0
    table = (out / "table.md").read_text()
    assert table.startswith(f"# {results['title']}\n")
    assert all(note in table for note in results["notes"])
    return results, table


def test_list():
    lines = invoke("list").splitlines()
    assert [line.split()[0] for line in lines] == list(MAKES)
    assert {"fig1", "fig3", "flow_length"} <= set(MAKES)
    assert "planar and radial flows" in lines[0]


def test_fig1_quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default folder is relative to where one stands
    output = invoke("fig1", "--quick", "--seed", "3")
    out = tmp_path / "experiments" / "results" / "quick" / "fig1"
    assert list((tmp_path / "experiments" / "results").iterdir()) == [out.parent]  # not among those to quote
    results, table = check_files(out, "fig1")
    assert "wrote " in output
    assert results["config"] == json.loads(json.dumps(dataclasses.asdict(fig1.Config.quick(3))))
    rows = results["rows"]
    cases = [(b, f, k) for b in ("unit Gaussian", "uniform") for f in ("planar", "radial") for k in (1, 2, 10)]
    assert [(row["base"], row["flow"], row["K"]) for row in rows] == cases
    for row in rows:  # the uniform's edges cost a part of a cell of this coarse grid
        assert row["integral"] == pytest.approx(1, abs=1e-3 if row["base"] == "unit Gaussian" else 0.04)
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + len(rows)


@pytest.mark.parametrize("flow", ["planar", "radial"])
def test_fig1_parameters(flow):
    """Fewer layers are the first of the same ten, and the first of all pushes apart."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ten = fig1.FLOWS[flow](10, normal)
    one = fig1.first(ten, 1)
    assert one.num_flows == 1
    for name, value in one.state_dict().items():
        assert torch.equal(value, ten.state_dict()[name][:1])
    where = -one.w * one.bias / one.w.square().sum() if flow == "planar" else one.z0
    with torch.no_grad():
        assert one.log_abs_det_jacobian(where, one(where)).item() > math.log(3)


def test_fig1_planar_takes_the_scales_of_its_docstring():
    stack = fig1.planar(2, partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    from flowvi.kernels.planar import constrain

    u_hat, one_plus_m = constrain(stack.w, stack.u, stack.constraint)
    assert stack.w.norm(dim=-1).tolist() == pytest.approx([4, 1.2])
    assert one_plus_m[1].item() == pytest.approx(0.4)
    torch.testing.assert_close((u_hat * stack.w).sum(-1), one_plus_m - 1)
    torch.testing.assert_close((u_hat[:, 0] * stack.w[:, 1]), u_hat[:, 1] * stack.w[:, 0])  # along w


TINY = fig3.Config(
    energies=("U1", "U3"), flows=("planar",), num_flows=(2,), num_steps=60, num=160, num_draws=4000, pixels=50
)


def test_fig3_tiny(tmp_path):
    config = dataclasses.replace(TINY, seed=1, seeds=2)
    fig3.run(config, progress=False).write(tmp_path)
    results, table = check_files(tmp_path, "fig3")
    rows = results["rows"]
    assert [(row["energy"], row["seed"]) for row in rows] == [("U1", 1), ("U3", 1), ("U1", 2), ("U3", 2)]
    for row in rows:
        assert row["kl"] > 0
        if row["mass_on_grid"] > 0.999:  # the two ways to the same number agree
            assert row["kl"] == pytest.approx(row["elbo_gap"], abs=6 * row["elbo_gap_se"] + 0.02)
        assert row["elbo_gap"] == pytest.approx(row["log_normalizer"] - row["elbo"])
        assert row["num_steps"] == 60
        assert row["num_particles"] >= 1
    assert 0 <= rows[0]["left_mode"] <= 1
    assert rows[1]["left_mode"] is None
    assert "worst seed" in table
    assert "soft-walled" in table
    assert "not recorded in any source at hand" in table
    assert "Short fits of 60 steps" in table


def test_fig3_ctrl_c_ends_all_of_it(monkeypatch):
    """A fit swallows Ctrl-C and returns what it has: the other fits must not go on."""
    stopped = types.SimpleNamespace(config={"stopped": "interrupted"})
    monkeypatch.setattr("flowvi.fit", lambda *args, **kwargs: stopped)
    with pytest.raises(KeyboardInterrupt):
        fig3.run(TINY, progress=False)


def test_fig3_quick_is_the_full_grid_of_cases():
    quick, full = fig3.Config.quick(5, 2), fig3.Config(seed=5, seeds=2)
    assert (quick.energies, quick.flows, quick.num_flows) == (full.energies, full.flows, full.num_flows)
    assert full.num_steps is None  # the engine's own default
    assert (quick.seed, quick.seeds) == (5, 2)


def test_fig3_fits_nice_with_its_mixing():
    """Each name gets its own registered flow and options, and the other's fit differs."""
    kls = set()
    for flow, mixing in (("NICE-perm", "perm"), ("NICE-orth", "orth")):
        row, q = fig3.fit_one(TINY, "U1", flow, 2, seed=0)
        assert (row["flow"], q.spec.name, q.spec.options) == (flow, "nice", {"mixing": mixing, "start": 1.0})
        assert math.isfinite(row["kl"])
        kls.add(row["kl"])
    assert len(kls) == 2


# How many layers ------------------------------------------------------------------------------------------

SHORT = flow_length.Config(
    seed=2,
    seeds=1,
    energies=("U1",),
    posteriors=("normal mean",),
    flows=("planar",),
    num_flows=(1, 2),
    deep_flows=("real_nvp",),
    deep_num_flows=(1,),
    num_steps=40,
    num_draws=2000,
)


def fit_of(elbo, *, target="A", flow="planar", k=1, seed=0, log_z=0.0, estimate=(0.0, 0.0, 1.0), seconds=1.0):
    """A row as `fit_one` makes it, as far as the report looks at it."""
    return {
        "target": target,
        "flow": flow,
        "K": k,
        "seed": seed,
        "num_steps": 10,
        "elbo": elbo,
        "elbo_se": 0.3,
        "log_normalizer": log_z,
        "log_z_estimate": estimate[0],
        "log_z_estimate_se": estimate[1],
        "ess_fraction": estimate[2],
        "khat": 0.1 * seed,
        "seconds_of_steps": seconds,
    }


def test_flow_length_tiny(tmp_path, monkeypatch):
    flow_length.run(SHORT, tmp_path, progress=False).write(tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # as if cut off in the middle of the last row
    fitted, fit_one = [], flow_length.fit_one
    monkeypatch.setattr(flow_length, "fit_one", lambda case, references: fitted.append(case) or fit_one(case))
    flow_length.run(SHORT, tmp_path, progress=False).write(tmp_path)
    assert len(fitted) == 1  # only the one that was cut off
    flow_length.run(SHORT, tmp_path, progress=False).write(tmp_path)
    assert len(fitted) == 1
    path.unlink()
    results, table = check_files(tmp_path, "flow_length")
    rows = results["rows"]
    cases = {(t, f, k) for t in ("U1", "normal mean") for f, k in (("planar", 1), ("planar", 2), ("real_nvp", 1))}
    assert {(row["target"], row["flow"], row["K"]) for row in rows} == cases
    for row in rows:
        assert row["error"] is None
        assert row["kl"] == pytest.approx(row["log_normalizer"] - row["elbo"])
        assert row["kl"] > -4 * row["kl_se"] - 1e-6
        if row["target"] == "normal mean":  # whitened, it is known already
            assert row["kl"] == pytest.approx(0, abs=1e-3)
            assert row["worst_mean_error"] < 0.2
    assert results["notes"][0].startswith("How many layers")
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + 3


def test_flow_length_estimates_log_z_from_the_best_fits():
    """The mean over the ten fits with the largest ESS, and the error of one; known where it is known."""
    good = [fit_of(0.0, seed=s, log_z=None, estimate=(1.0 + 0.02 * s, 0.1, 0.9)) for s in range(10)]
    bad = [fit_of(-9.0, seed=s, log_z=None, estimate=(-5.0, 0.0, 0.2)) for s in range(10, 20)]
    lost = [fit_of(math.nan, seed=20, log_z=None, estimate=(math.nan, math.nan, 1.0))]
    known = fit_of(1.5, target="B", log_z=2.0, estimate=(7.0, 0.0, 1.0))
    found = flow_length_report.log_normalizers([*bad, *good, *lost, known])
    assert found["A"] == pytest.approx((1.09, 0.1))
    assert found["B"] == (2.0, 0.0)
    assert flow_length_report.with_kl(known, *found["B"])["kl"] == 0.5
    assert flow_length_report.with_kl(good[0], *found["A"])["kl_se"] == pytest.approx(math.hypot(0.3, 0.1))


def test_flow_length_says_how_many_layers():
    """Planar gets there with 4 layers on one target of two, real_nvp with 2 on both, and later."""
    kls = {
        ("A", "planar"): {1: 1.0, 2: 0.2, 4: 0.01},
        ("B", "planar"): {1: 2.0, 2: 1.0, 4: 0.5},
        ("A", "real_nvp"): {1: 0.4, 2: 0.01},
        ("B", "real_nvp"): {1: 0.4, 2: 0.015},
    }
    config = dataclasses.replace(
        SHORT,
        energies=("A", "B"),
        posteriors=(),
        num_flows=(1, 2, 4),
        deep_num_flows=(1, 2),
        seeds=3,
    )
    rows = []
    for (target, flow), lengths in kls.items():
        for k, kl in lengths.items():
            seconds = k * (1.0 if flow == "planar" else 10.0)
            for seed, more in enumerate((0.0, -0.005, math.nan if (target, k) == ("B", 1) else 0.25)):
                rows.append(fit_of(-kl - more, target=target, flow=flow, k=k, seed=seed, seconds=seconds))
    cells = flow_length_report.summarize([flow_length_report.with_kl(row, 0.0, 0.0) for row in rows])
    cell = cells["A", "planar", 4]
    assert (cell.kl, cell.best, cell.worst) == pytest.approx((0.01, 0.005, 0.26))
    assert (cell.khat, cell.seconds, cell.step) == pytest.approx((0.1, 4.0, 0.4))
    assert cells["B", "planar", 1].worst == math.inf
    first, second, third = flow_length_report.conclude(config, cells)
    assert "planar K = 4 (1), real_nvp K = 2 (2). One choice for all: real_nvp K = 2." in first
    assert "A planar K = 4 (4.0 s), B real_nvp K = 2 (20.0 s)." in second
    assert "Not reached" not in second
    assert f"planar {(0.01 / 0.2 + 0.5) / 2:.2f} (K 2 to 4)" in third
    strict = dataclasses.replace(config, enough=0.001)
    first, second, _ = flow_length_report.conclude(strict, cells)
    assert "planar none, real_nvp none." in first
    assert "One choice" not in first
    assert "A (best: planar K = 4, 0.010), B (best: real_nvp K = 2, 0.015)." in second


def test_flow_length_says_who_finds_all_modes():
    config = dataclasses.replace(SHORT, energies=("R",), posteriors=(), seeds=2)
    worst = {("planar", 1): (0.1, 0.3), ("planar", 2): (0.1, 0.2), ("real_nvp", 1): (0.1, None)}
    rows = [
        fit_of(0.0, target="R", flow=flow, k=k, seed=seed) | {"worst_mode": value}
        for (flow, k), values in worst.items()
        for seed, value in enumerate(values)
    ]
    (said,) = flow_length_report.modes(config, rows)
    assert said.endswith("seeds 2 to 3: planar K = 2; real_nvp none.")
    assert flow_length_report.modes(config, [fit_of(0.0)]) == []


def test_flow_length_keeps_a_fit_that_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise FlowVIError("not today")

    monkeypatch.setattr("flowvi.fit", fail)
    row = flow_length.fit_one(SHORT.cases()[0])
    assert row["error"] == "not today"
    assert math.isnan(row["elbo"])
    assert flow_length_report.summarize([flow_length_report.with_kl(row, 0.0, 0.0)])[
        row["target"], row["flow"], row["K"]
    ].kl == (math.inf)


def test_flow_length_ctrl_c_ends_all_of_it(monkeypatch, tmp_path):
    stopped = types.SimpleNamespace(config={"stopped": "interrupted"})
    monkeypatch.setattr("flowvi.fit", lambda *args, **kwargs: stopped)
    with pytest.raises(KeyboardInterrupt):
        flow_length.run(SHORT, tmp_path, progress=False)


def test_flow_length_takes_the_references(references):
    config = flow_length.Config().changed(None, None, references=True)
    assert config.posteriors == flow_length.WITH_REFERENCES
    for name in config.posteriors:
        assert flow_length.find_target(name, references).name == name
    with pytest.raises(FlowVIError, match="no target named 'gp'"):
        flow_length.find_target("gp", references)


def test_cases_in_processes(tmp_path):
    """Rows come in the order of the cases, whatever the order of the workers; infinities come back."""
    cases = [{"case": i, "x": math.inf} for i in range(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"case": {"case": 3, "x": Infinity}, "row": {"kept": true}}\n')
    rows = parallel.run_cases(dict, cases, path, workers=2, progress=False)
    assert rows == [{"kept": True} if case["case"] == 3 else case for case in cases]
    assert len(path.read_text().splitlines()) == 5


# Speed ----------------------------------------------------------------------------------------------------

SMALL = speed.Config(
    threads=("one",),
    rounds=2,
    sweep_rounds=2,
    start_rounds=0,
    seconds=1e-4,
    stacks=(("planar", 2, 16, 2, 1), ("radial", 2, 16, 2, 1)),
    steps=((2, 16, 2, {"pyro": 1.0}),),
    networks=(("real_nvp", 4, 16, 2), ("iaf", 4, 16, 2)),
    schools=(16, 2, 1e9),
    amortized=(4, 2, 0.0),
    sweep_k=(1, 2, 4),
    sweep_d=(),
    sweep_s=(),
)


@pytest.fixture
def no_peers(monkeypatch):
    for name in ("normflows", "zuko", "flowjax", "optax", "numpyro"):
        monkeypatch.setitem(sys.modules, name, None)


def test_speed_small(tmp_path, no_peers):
    store = dict(pyro.get_param_store())
    speed.run(SMALL, progress=False, isolate=False).write(tmp_path)
    results, table = check_files(tmp_path, "speed")
    assert dict(pyro.get_param_store()) == store  # the benchmark's own guides leave nothing there
    rows = results["rows"]
    timed = [row for row in rows if row["group"] != "slope"]
    amortized = {f"amortized planar, with its networks; directions: {w}" for w in ("shared", "each datum's own")}
    assert {row["who"] for row in timed} == {"flowvi", "pyro", "flowvi, K 0"}
    assert {row["case"] for row in timed} == {"planar", "radial", "eight schools", *amortized, "K"}  # zuko's are out
    assert {row["who"] for row in timed if row["case"] in amortized} == {"flowvi", "flowvi, K 0"}
    for row in timed:
        assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
        assert (row["ratio"] is None) == (row["who"] == "flowvi")
        assert row["met"] == (None if row["aim"] is None else row["ratio"] >= row["aim"])
    schools = [row for row in timed if row["case"] == "eight schools" and row["who"] == "pyro"]
    assert [row["met"] for row in schools] == [False]
    assert [(row["case"], row["met"] is None) for row in rows if row["group"] == "slope"] == [("K", False)]
    assert "Not installed, so left out: normflows, zuko, flowjax, numpyro (pip install 'flowvi[peers]')" in table
    assert "at least 1e+09x | no" in table


def test_speed_slope_is_of_the_larger_half():
    def row(k, seconds):
        return {"group": "sweep", "case": "K", "threads": "one", "who": "flowvi", "K": k, "seconds": seconds}

    rows = [row(k, seconds) for k, seconds in ((8, 64.0), (2, 5.0), (1, 5.0), (4, 16.0))]
    (slope,) = speed.slopes(rows, "one")
    assert slope["slope"] == pytest.approx(2)
    assert slope["met"] is False


def test_speed_ratio_is_within_a_round():
    """A disturbance that meets both in one round doesn't move the ratio."""
    from experiments.speed_cases import Times

    ours = np.array([1.0, 10.0, 1.0])
    row = Times({"flowvi": ours, "pyro": 3 * ours}).row("pyro", aim=3.5)
    assert row["ratio_q1"] == row["ratio"] == row["ratio_q3"] == pytest.approx(3)
    assert row["met"] is False


def test_speed_peers_take_the_same_energies():
    """The jax energies are written again, so they are compared with ours where jax is there."""
    pytest.importorskip("flowjax")
    for dim in (2, 5):
        z = torch.randn(20, dim) * 3
        found = [float(speed_peers.jax_log_density(dim)(row.numpy())) for row in z]
        assert found == pytest.approx(speed_peers.energy(dim).log_density(z).tolist(), rel=1e-4, abs=1e-4)


# The report -----------------------------------------------------------------------------------------------


def test_markdown_table():
    rows = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    assert report.markdown_table(rows) == ["| a | b |", "|---|---|", "| 1 | x |", "| 2 | y |"]
    assert report.markdown_table([]) == []


def test_results_are_strict_json(tmp_path):
    from matplotlib.figure import Figure

    rows = [{"kl": math.nan, "khat": math.inf, "name": "U1", "seconds": 1.5, "none": None}]
    made = report.Report("x", "A title", fig1.Config(seed=7), rows, [{"kl": "nan"}], ["A note."], Figure(), 2.0)
    paths = made.write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "table.md", "x.png"]
    results = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    assert results["rows"] == [{"kl": None, "khat": None, "name": "U1", "seconds": 1.5, "none": None}]
    assert "Seed 7; 2 s in all; python " in paths[1].read_text()


def test_missing_matplotlib_is_a_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FlowVIError, match=r"matplotlib, which is missing: pip install 'flowvi\[experiments\]'"):
        fig1.run(fig1.Config.quick(), progress=False)
    result = typer_testing.CliRunner().invoke(app, ["fig1", "--quick"])
    assert result.exit_code == 1
    assert "error: the experiments draw with matplotlib" in result.output
    assert "Traceback" not in result.output
