"""The notebooks: text in the repository, run from top to bottom in the fast setting.

Here every cell runs in the test's own process; each in a kernel of its own is a slow test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.md"))
MISSING = [name for name in ("jupytext", "nbmake", "ipykernel", "matplotlib") if importlib.util.find_spec(name) is None]


needs_all = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'flowvi[notebooks]'")


@needs_all
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    import jupytext
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWVI_FAST", "1")
    plt.switch_backend("Agg")
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrusted fit is one of the things that are shown
        for cell in jupytext.read(notebook).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
    assert plt.get_fignums()
    plt.close("all")


@pytest.mark.slow
@needs_all
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_in_a_kernel(notebook, tmp_path):
    import jupytext

    book = jupytext.read(notebook)
    copy = tmp_path / f"{notebook.stem}.ipynb"
    jupytext.write(book, copy)
    # The tests' own settings (strict markers, warnings as errors) are not for the runner of notebooks.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), "-q", "--nbmake"]
    command += ["--nbmake-kernel=python3", "--nbmake-timeout=240", "--overwrite", "-p", "no:cacheprovider", str(copy)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"FLOWVI_FAST": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    cells = [cell for cell in json.loads(copy.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["execution_count"] for cell in cells)  # none was left out
    pictures = [out for cell in cells for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert pictures


def test_there_are_some():
    assert len(NOTEBOOKS) >= 7


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_asks_one_question_and_says_what_to_read_next(notebook):
    text = notebook.read_text(encoding="utf-8")
    cells = re.split(r"```python\n.*?```", text, flags=re.DOTALL)
    assert "\n# " in cells[0]
    assert cells[0].count("**The question:") == 1
    assert text.count("**The question:") == 1
    assert "**Read next:**" in cells[-1]


@pytest.mark.parametrize("notebook", [*NOTEBOOKS, *(ROOT / "notebooks").glob("README.md")], ids=lambda path: path.stem)
def test_links_lead_somewhere(notebook):
    prose = re.sub(r"```python\n.*?```", "", notebook.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        assert link.startswith("https://") or (notebook.parent / link).exists(), link


def test_only_text_is_committed():
    assert not list((ROOT / "notebooks").glob("*.ipynb"))
