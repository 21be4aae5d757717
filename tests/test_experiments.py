"""The experiments: what they write, and that the numbers in it are right."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from functools import partial

import pytest
import torch

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")
typer_testing = pytest.importorskip("typer.testing", reason="needs typer: pip install 'flowvi[experiments]'")

from experiments import fig1, fig3, report  # noqa: E402
from experiments.__main__ import app  # noqa: E402
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
    assert [line.split()[0] for line in lines] == ["fig1", "fig3", "density"]
    assert "planar and radial flows" in lines[0]


def test_fig1_quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default folder is relative to where one stands
    output = invoke("fig1", "--quick", "--seed", "3")
    out = tmp_path / "experiments" / "results" / "fig1"
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
