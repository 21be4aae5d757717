"""Images for the deep latent Gaussian model: MNIST, binarized once for all or anew at every use, and CIFAR-10 patches.

Files come from a folder, or by pooch from the addresses of their authors, checked by their MD5.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.report import INSTALL
from flowvi.errors import FlowVIError

PIXELS = 784
LAROCHELLE = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
SOURCES = {
    "binarized_mnist_train.amat": (LAROCHELLE, "db28b1a6ae0fe70cbd3da91acf46e477"),
    "binarized_mnist_valid.amat": (LAROCHELLE, "bf37822a04e94123630de6a7dfd9c9ef"),
    "binarized_mnist_test.amat": (LAROCHELLE, "14e41ae11040adba6ab8cb291eda0dd8"),
    "train-images-idx3-ubyte.gz": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ),
    "t10k-images-idx3-ubyte.gz": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "9fb629c4189551a2d022fa330f9573f3",
    ),
    "train-labels-idx1-ubyte.gz": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "d53e105ee54ea40749a09fcbcd1e9432",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/", "c32a1d4ab5d03f1284b67883e8d87530"),
}
"""File -> where it is, and its MD5."""


@dataclass(frozen=True)
class Images:
    """Rows of pixels.

    Attributes:
        train: what a fit takes, tensor or Dataset, (N, P).
        held: rows to check on while it learns, (V, P).
        test: rows to report, (M, P).
        words: what they are, for the table.
    """

    train: Any
    held: Tensor
    test: Tensor
    words: str


class Rebinarized(Dataset[Tensor]):
    """Grey pixels (N, P) as probabilities, drawn anew at every use (by torch's global generator)."""

    def __init__(self, grey: Tensor) -> None:
        self.grey = grey

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, index: int) -> Tensor:
        return torch.bernoulli(self.grey[index])

    def __getitems__(self, index: Sequence[int]) -> list[Tensor]:
        return list(torch.bernoulli(self.grey[torch.as_tensor(index)]))


def static_mnist(folder: Path | None) -> Images:
    """Larochelle's fixed binarization: 50,000 to learn from, 10,000 to check on, 10,000 to report.

    Args:
        folder: has binarized_mnist_{train,valid,test}.amat, or mnist_static_binarized_packed.npz; None downloads.

    Raises:
        FlowVIError: a file is missing.
    """
    packed = None if folder is None else _find(folder, "mnist_static_binarized_packed.npz")
    if packed is not None:
        with np.load(packed) as file:
            parts = [np.unpackbits(file[k], axis=1)[:, :PIXELS] for k in ("train", "valid", "test")]
    else:
        parts = [_amat(fetch(folder, f"binarized_mnist_{k}.amat")) for k in ("train", "valid", "test")]
    train, held, test = (torch.from_numpy(p.astype(np.float32)) for p in parts)
    return Images(train, held, test, "MNIST, static binarization (Larochelle's split, 50,000 / 10,000 / 10,000)")


def dynamic_mnist(folder: Path | None, seed: int) -> Images:
    """Pixels drawn with their grey value as probability: anew at every use for learning, once by `seed` for the rest.

    Args:
        folder: has the two gz files; None downloads.
        seed: of the draw of held-out and test images.

    Raises:
        FlowVIError: a file is missing.
    """
    train, test = (_idx(fetch(folder, f"{k}-images-idx3-ubyte.gz")) for k in ("train", "t10k"))
    generator = torch.Generator().manual_seed(seed)
    held, test = (torch.bernoulli(x, generator=generator) for x in (train[50_000:], test))
    words = "MNIST, dynamic binarization (50,000 drawn anew at every use, 10,000 / 10,000 drawn once)"
    return Images(Rebinarized(train[:50_000]), held, test, words)


def grey_mnist(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images in [0, 1], (60000, 784), their labels (60000,), test images and theirs.

    Args:
        folder: has the four gz files; None downloads.

    Raises:
        FlowVIError: a file is missing.
    """
    found = []
    for k in ("train", "t10k"):
        grey, path = _idx(fetch(folder, f"{k}-images-idx3-ubyte.gz")), fetch(folder, f"{k}-labels-idx1-ubyte.gz")
        with gzip.open(path) as file:
            labels = torch.from_numpy(np.frombuffer(file.read(), dtype=np.uint8)[8:].astype(np.int64))
        if len(labels) != len(grey):
            raise FlowVIError(f"{path} holds {len(labels)} labels for {len(grey)} images.")
        found += [grey, labels]
    return found[0], found[1], found[2], found[3]


def cifar_patches(folder: Path | None, num_patches: int, seed: int) -> Images:
    """Random 3 x 8 x 8 patches of CIFAR-10 images, (v + u) / 256 with u uniform, so that they have a density on (0, 1).

    Of every image list the first 80% give the patches to learn from, the next 10% those to check on, the rest the test.

    Args:
        folder: has cifar-10-binary.tar.gz (its 50,000 training images are taken), or cifar10_first4000.npz.
        num_patches: to learn from; a tenth as many each to check on and to report.
        seed: of the places and of u.

    Raises:
        FlowVIError: a file is missing.
    """
    part = None if folder is None else _find(folder, "cifar10_first4000.npz")
    if part is not None and _find(part.parent, "cifar-10-binary.tar.gz") is None:
        with np.load(part) as file:
            images = file["x"].transpose(0, 3, 1, 2)
        which = "the first 4,000 training images of CIFAR-10, a part of the set"
    else:
        images = _cifar(fetch(folder, "cifar-10-binary.tar.gz"))
        which = "the 50,000 training images of CIFAR-10"
    rng = np.random.default_rng(seed)
    edges = np.array([0, 0.8, 0.9, 1]) * len(images)
    sets = []
    for low, high, num in zip(edges[:-1].astype(int), edges[1:].astype(int), (10, 1, 1), strict=True):
        count = num * num_patches // 10
        at = rng.integers(low, high, count), rng.integers(0, 25, count), rng.integers(0, 25, count)
        cut = np.stack([images[i, :, r : r + 8, c : c + 8] for i, r, c in zip(*at, strict=True)])
        x = (cut.reshape(count, -1) + rng.random((count, 192))) / 256
        sets.append(torch.from_numpy(x.clip(1e-4, 1 - 1e-4).astype(np.float32)))
    train, held, test = sets
    return Images(train, held, test, f"3 x 8 x 8 patches ({num_patches:,} to learn from) of {which}")


def fetch(folder: Path | None, name: str) -> Path:
    """A file of `SOURCES`, from the folder, or downloaded and checked.

    Raises:
        FlowVIError: it isn't in the folder; or there is no pooch, no network, or its checksum is another.
    """
    if folder is not None:
        found = _find(folder, name)
        if found is None:
            raise FlowVIError(f"{folder} has no {name}: put it there, or leave --data-dir out to download it.")
        return found
    try:
        import pooch
    except ImportError as error:
        raise FlowVIError(
            f"downloading {name} needs pooch, which is missing: {INSTALL}, or give --data-dir."
        ) from error
    address, md5 = SOURCES[name]
    try:
        return Path(pooch.retrieve(address + name, f"md5:{md5}", fname=name, path=pooch.os_cache("flowvi")))
    except Exception as error:  # whatever a network can do
        raise FlowVIError(
            f"{address}{name} could not be downloaded ({error}): give the files by --data-dir."
        ) from error


def _find(folder: Path, name: str) -> Path | None:
    """The file in the folder or in a folder right below it."""
    return next((p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()), None)


def _amat(path: Path) -> np.ndarray:
    """Lines of 784 digits with a space between them."""
    digits = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    digits = digits[(digits == 48) | (digits == 49)] - 48
    if digits.size == 0 or digits.size % PIXELS:
        raise FlowVIError(f"{path} doesn't hold rows of {PIXELS} zeros and ones.")
    return digits.reshape(-1, PIXELS)


def _idx(path: Path) -> Tensor:
    """Grey images in [0, 1], (N, 784)."""
    with gzip.open(path) as file:
        data = np.frombuffer(file.read(), dtype=np.uint8)
    if len(data) <= 16 or (len(data) - 16) % PIXELS:
        raise FlowVIError(f"{path} doesn't hold images of {PIXELS} pixels.")
    return torch.from_numpy(data[16:].reshape(-1, PIXELS).astype(np.float32) / 255)


def _cifar(path: Path) -> np.ndarray:
    """(50000, 3, 32, 32) uint8 from the official binary archive: no code in it, unlike the pickled one."""
    parts = []
    with tarfile.open(path) as archive:
        for k in range(1, 6):
            member = archive.extractfile(f"cifar-10-batches-bin/data_batch_{k}.bin")
            assert member is not None
            parts.append(np.frombuffer(member.read(), dtype=np.uint8).reshape(-1, 3073)[:, 1:])
    return np.concatenate(parts).reshape(-1, 3, 32, 32)
