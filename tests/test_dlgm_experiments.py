"""The experiments with the deep latent Gaussian model: their data, rows and tables, on small synthetic images."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib: pip install 'flowvi[experiments]'")

import flowvi
from experiments import cifar, dlgm_runs, images, mnist
from flowvi.errors import FlowVIError, OptionError

CONFIG = mnist.Config(updates=30, lengths=(0, 2), nice=(2,), num_test=40, num_samples=5, hidden=6, latent_dim=3)


def synthetic(config, folder):
    g = torch.Generator().manual_seed(0)
    return images.Images(*((torch.rand(n, 20, generator=g) < 0.3).float() for n in (300, 50, 60)), "synthetic")


def test_rows_tables_and_resuming(tmp_path):
    report = mnist.run(CONFIG, tmp_path, progress=False, images=synthetic)
    report.write(tmp_path)
    assert {p.stem for p in (tmp_path / "rows").iterdir()} == {"planar_K0", "planar_K2", "nice_K2"}
    assert not list((tmp_path / "checkpoints").iterdir())
    assert [(r["flow"], r["K"]) for r in report.rows] == [("planar", 0), ("planar", 2), ("nice", 2)]
    for row in report.rows:
        assert row["KL"] == pytest.approx(row["F"] - row["nll"], abs=1e-9)
        assert row["KL"] >= 0
    drop, error = dlgm_runs.gain(*(json.loads((tmp_path / f"rows/planar_K{k}.json").read_text()) for k in (2, 0)), "F")
    assert drop == pytest.approx(report.rows[0]["F"] - report.rows[1]["F"], abs=1e-3)
    assert report.table[1]["F below K = 0"] == f"{drop:.2f} ± {error:.2f}"
    before = (tmp_path / "rows" / "planar_K2.json").read_bytes()
    again = mnist.run(CONFIG, tmp_path, resume=True, progress=False, images=synthetic)
    assert (tmp_path / "rows" / "planar_K2.json").read_bytes() == before
    assert again.rows == report.rows
    # rows of another number of updates are no part of a table
    other = mnist.Config(**{**vars(CONFIG), "updates": 20, "lengths": (0,), "nice": ()})
    assert len(mnist.run(other, tmp_path, progress=False, images=synthetic).rows) == 1


def test_the_batch_size_is_that_of_the_fit_and_of_the_row(tmp_path, monkeypatch):
    fit, sizes = flowvi.fit, []

    def watched(*args, **kwargs):
        sizes.append(kwargs["batch_size"])
        return fit(*args, **kwargs)

    monkeypatch.setattr(flowvi, "fit", watched)
    for size in (100, 50):
        config = dataclasses.replace(CONFIG, lengths=(0,), nice=(), batch_size=size)
        report = mnist.run(config, tmp_path, resume=True, progress=False, images=synthetic)
        assert any(f"batches of {size}," in note for note in report.notes)
    assert sizes == [100, 50]  # a row with another size is not taken for this one


def test_the_same_seed_gives_the_same_row(tmp_path):
    data = synthetic(CONFIG, None)
    rows = [
        dlgm_runs.run_case(CONFIG.case(data, "planar", 2), data, tmp_path, resume=False, progress=False) for _ in "ab"
    ]
    assert rows[0]["F_each"] == rows[1]["F_each"]


def test_mnist_files(tmp_path):
    rng = np.random.default_rng(0)
    rows = {k: rng.integers(0, 2, (n, 784), dtype=np.uint8) for k, n in (("train", 7), ("valid", 3), ("test", 4))}
    packed = tmp_path / "a" / "mnist"
    packed.mkdir(parents=True)
    np.savez(packed / "mnist_static_binarized_packed.npz", **{k: np.packbits(x, axis=1) for k, x in rows.items()})
    plain = tmp_path / "b"
    plain.mkdir()
    for k, x in rows.items():
        np.savetxt(plain / f"binarized_mnist_{k}.amat", x, fmt="%d")
    for folder in (packed.parent, plain):
        found = images.static_mnist(folder)
        assert (found.train.numpy() == rows["train"]).all()
        assert (found.held.numpy() == rows["valid"]).all()
        assert (found.test.numpy() == rows["test"]).all()
    with pytest.raises(FlowVIError, match="has no train-images"):
        images.dynamic_mnist(plain, 0)
    for k, n in (("train", 50_002), ("t10k", 5)):
        grey = np.full(n * 784, 255 // 5, np.uint8)
        with gzip.open(plain / f"{k}-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(bytes(16) + grey.tobytes())
    found = images.dynamic_mnist(plain, 0)
    batch = torch.stack(found.train.__getitems__([0, 1, 2]))
    assert set(batch.unique().tolist()) == {0.0, 1.0}
    assert batch.mean().item() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / batch.numel()))
    assert (len(found.train), len(found.held), len(found.test)) == (50_000, 2, 5)


def test_cifar(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_first4000.npz", x=x)
    found = images.cifar_patches(tmp_path, 200, seed=0)
    assert [tuple(p.shape) for p in (found.train, found.held, found.test)] == [(200, 192), (20, 192), (20, 192)]
    patch = (found.train[0].double() * 256).floor().reshape(3, 8, 8).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(x[:24].transpose(0, 3, 1, 2), (8, 8), axis=(2, 3))
    distance = np.abs(windows - patch[None, :, None, None]).max(axis=(1, 4, 5))
    assert (distance <= 1).any()  # a patch of a training image, but for the clipping and rounding of pixels
    config = cifar.Config(0, 20, (0, 2), num_patches=200, num_test=20, num_samples=5, hidden=6, latent_dim=3)
    report = cifar.run(config, tmp_path / "out", tmp_path, progress=False)
    report.write(tmp_path / "out")
    assert [row["K"] for row in report.rows] == [0, 2]
    assert "a part of the set" in report.notes[0]
    assert report.table[1]["paper's -log p"] == "-308.6"


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="config"):
        mnist.Config(config="quick")
    with pytest.raises(OptionError, match="binarization"):
        mnist.Config(binarization="none")
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(FlowVIError, match="needs pooch"):
        images.static_mnist(None)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "planar_K0.json").write_text("{}")
    with pytest.raises(FlowVIError, match="delete it"):
        mnist.run(mnist.Config(lengths=()), tmp_path, images=synthetic)
