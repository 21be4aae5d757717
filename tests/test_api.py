"""What `flowvi.__all__` promises: documented names, examples that run, a light import and a complete package."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import flowvi
from flowvi.transforms import registry

ROOT = Path(__file__).parents[1]
MODULES = [flowvi, *(getattr(flowvi, name) for name in flowvi.__all__ if inspect.ismodule(getattr(flowvi, name)))]
NAMES = [f"{module.__name__}.{name}" for module in MODULES for name in module.__all__]
SOURCES = {
    name: path
    for _, name, _ in pkgutil.walk_packages(flowvi.__path__, "flowvi.")
    if (path := ROOT / (name.replace(".", "/") + ".py")).is_file()
}


def find(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def own_methods(cls):
    """The public methods of a class that flowvi wrote, inherited ones too."""
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, classmethod | staticmethod):
            method = method.__func__
        if not name.startswith("_") and inspect.isfunction(method) and by_flowvi(method):
            yield name, method


def parameters(function):
    """The names a caller can give, but for the `*args, **kwargs` that are handed on to somebody else."""
    found = inspect.signature(function).parameters.values()
    return [
        p.name
        for p in found
        if p.name not in ("self", "cls")
        and not p.name.startswith("_")
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def section(text, title):
    """What is indented below `title:` in a docstring."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", text + "\n", re.MULTILINE)
    return found.group(1) if found else ""


def by_flowvi(thing):
    return str(getattr(thing, "__module__", "")).startswith("flowvi")


def docstrings(thing, owner=None):
    """Its own docstring and those of what it overrides, where flowvi wrote them."""
    if inspect.isclass(thing):
        found = thing.__mro__
    elif owner is not None:
        found = [vars(base).get(thing.__name__) for base in owner.__mro__]
    else:
        found = [thing]
    return [inspect.getdoc(f) or "" for f in found if by_flowvi(f)]


def flaws(thing, owner=None, *, raises=False):
    """What the docstring of a class, function or method lacks."""
    texts = docstrings(thing, owner)
    if not texts or not texts[0]:
        return ["no docstring"]

    def told(title):
        return "".join(section(text, title) for text in texts)

    if owner is not None and any(thing.__name__ in vars(base) for base in owner.__mro__ if not by_flowvi(base)):
        return []  # what Pyro or torch asks for is told there in full
    arguments = told("Args") + (told("Attributes") if inspect.isclass(thing) else "")
    given = parameters(thing)
    found = [f"{name} is not told" for name in given if not re.search(rf"\b{name}\b", arguments)]
    if given and not inspect.isclass(thing):
        returns = inspect.signature(thing).return_annotation
        if returns not in (None, "None", inspect.Signature.empty) and not told("Returns"):
            found.append("no Returns")
        if raises and not told("Raises"):
            found.append("no Raises")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_is_the_api(module):
    names = module.__all__
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []
    assert set(names) <= set(dir(module))
    if module is flowvi:  # what it brings up without an underscore is for users
        things = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        own = {name for name, value in things.items() if by_flowvi(value)}
        assert own <= set(names)


@pytest.mark.parametrize("name", [name for name in NAMES if name.count(".") == 1])
def test_the_api_is_documented_in_one_form(name):
    thing = find(name)
    if isinstance(thing, str):
        return
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    wrong = {"itself": flaws(thing, raises=inspect.isfunction(thing))}
    if inspect.isclass(thing):
        wrong |= {method: flaws(function, thing) for method, function in own_methods(thing)}
    assert {where: found for where, found in wrong.items() if found} == {}


@pytest.mark.parametrize("name", [name for name in NAMES if name.count(".") > 1])
def test_what_its_modules_offer_is_documented(name):
    thing = find(name)
    assert not callable(thing) or docstrings(thing)[0]


@pytest.mark.parametrize("name", [n for n, path in SOURCES.items() if ">>>" in path.read_text(encoding="utf-8")])
def test_examples_run(name, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # an example may register a flow
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


def test_there_are_examples():
    assert sum(">>>" in path.read_text(encoding="utf-8") for path in SOURCES.values()) >= 15


def test_the_version_has_one_place():
    tree = ast.parse((ROOT / "flowvi" / "_version.py").read_text(encoding="utf-8"))
    values = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert values == [flowvi.__version__]
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'attr = "flowvi._version.__version__"' in settings
    elsewhere = [path for path in SOURCES.values() if path.name != "_version.py"]
    assert [p.name for p in elsewhere if f'"{flowvi.__version__}"' in p.read_text(encoding="utf-8")] == []


HEAVY = (
    "numba",
    "matplotlib",
    "arviz",
    "arviz_base",
    "arviz_stats",
    "arviz_plots",
    "pandas",
    "xarray",
    "scipy",
    "sklearn",
)


def test_the_import_is_light():
    code = f"import sys, flowvi; print([name for name in {HEAVY} if name in sys.modules])"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


# packaging


SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = {"matplotlib", "zuko"}  # asked for where they are used, with a message that says what to install
BY_NAME = {"arviz", "arviz_base", "arviz_stats", "pandas"}  # whichever ArviZ there is; pandas comes with it


def imports_of(path):
    """The packages that a file imports, by statement or by `import_module` with a name that is written out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in BY_NAME:
            yield node.value.split(".")[0]


def test_what_is_installed_is_what_is_used():
    used = {name for path in (ROOT / "flowvi").rglob("*.py") for name in imports_of(path)}
    used -= {"flowvi", *sys.stdlib_module_names}
    declared = {re.match(r"[\w-]+", line).group() for line in SETTINGS["project"]["dependencies"]}
    assert used - OPTIONAL - (BY_NAME - {"arviz"}) == {name.replace("pyro-ppl", "pyro") for name in declared}


def files_of_the_package():
    files = (p for p in (ROOT / "flowvi").rglob("*") if p.suffix == ".py" or p.name == "py.typed")
    return {p.relative_to(ROOT).as_posix() for p in files}


def run(*command, **options):
    found = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of a clean copy of the sources, and a wheel made from the sdist alone."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    shutil.copytree(ROOT / "flowvi", copy / "flowvi", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    venv.create(folder / "tools", with_pip=True)
    python = folder / "tools" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *SETTINGS["build-system"]["requires"])
    run(python, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=copy)
    (sdist,) = folder.glob("*.tar.gz")
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_sdist_and_wheel_are_complete(built):
    sdist, wheel = built
    top = f"flowvi-{flowvi.__version__}"
    assert (sdist.name, wheel.name) == (f"{top}.tar.gz", f"{top}-py3-none-any.whl")
    with tarfile.open(sdist) as archive:
        assert {f"{top}/{name}" for name in files_of_the_package()} <= set(archive.getnames())
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_of_the_package()
    assert any(name.startswith("flowvi/kernels/compiled/") for name in names)


SMOKE = """
import pathlib, sys
import pyro, pyro.distributions as dist, torch
import flowvi

assert pathlib.Path(flowvi.__file__).is_relative_to(sys.argv[1]), flowvi.__file__

def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

y = torch.tensor([1.0, 2.0, 3.0, 2.0])
posterior = flowvi.fit(model, (y,), flow="planar", num_flows=4, num_steps=300, seed=0, progress=False)
assert abs(float(posterior.mean()["mu"]) - 2) < 0.1
data = posterior.to_arviz(num_samples=50)
assert {"posterior", "posterior_predictive"} <= set(getattr(data, "children", None) or data.groups())
posterior.save("fit.flowvi")
assert flowvi.load("fit.flowvi", model, args=(y,)).flow.dim == 1
energy = flowvi.fit(flowvi.energies.U1(), num_flows=4, num_steps=20, seed=0, progress=False, verify=False)
import flowvi.kernels.compiled.planar_small
print(flowvi.__version__)
"""


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_clone(built, tmp_path):
    """In an environment of its own, which sees the packages of this one, but not flowvi's sources."""
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(python, "-m", "pip", "install", "-q", "--no-deps", built[1], cwd=tmp_path, env=env)
    (own,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (own / "others.pth").write_text("\n".join(others), encoding="utf-8")  # .pth files in there are not followed
    (tmp_path / "smoke.py").write_text(SMOKE, encoding="utf-8")
    told = run(python, "-W", "ignore", "smoke.py", own, cwd=tmp_path, env=env)
    assert told.strip().endswith(flowvi.__version__)
