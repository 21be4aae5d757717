"""MNIST made small, with labels: grey images of 14 x 14 pixels in few levels, and a classifier whose features compare.

A pixel is the mean of 2 x 2 pixels of MNIST, v of 0 .. L - 1. Dequantized and on the whole line it is

    x = logit(M + (1 - 2 M) (v + u) / L),   u uniform on (0, 1), drawn once for all,

with M = .05 (Dinh et al. 2017, arXiv:1605.08803, section 4.1). A density of v + u bounds the probability of the image v
from below: E_u log q(v + u) <= log P(v) (Theis et al. 2016, arXiv:1511.01844, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.images import grey_mnist

SIDE = 14
LEVELS = 32
MARGIN = 0.05
NUM_FEATURES = 64


@dataclass(frozen=True)
class Digits:
    """Levels of pixels as integers, (N, 196), and labels, (N,)."""

    train: Tensor
    train_labels: Tensor
    held: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits(folder: Path | None, num_train: int = 50_000) -> Digits:
    """The first images to learn from, the last 10,000 of MNIST's training images to check on, its test images.

    Args:
        folder: of the four gz files of MNIST; None downloads.
        num_train: how many to learn from, 50,000 at most.

    Raises:
        FlowVIError: a file is missing.
    """
    grey, labels, test, test_labels = grey_mnist(folder)
    levels = [F.avg_pool2d(x.reshape(-1, 1, 2 * SIDE, 2 * SIDE), 2).reshape(-1, SIDE**2) for x in (grey, test)]
    train, test = ((x * 255 * LEVELS / 256).long() for x in levels)
    return Digits(train[:num_train][:50_000], labels[:num_train][:50_000], train[50_000:], test, test_labels)


def to_line(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantized pixels on the whole line, by u from the generator."""
    u = torch.rand(levels.shape, generator=generator).clamp(1e-4, 1 - 1e-4)  # rounding moves none to another level
    return torch.logit(MARGIN + (1 - 2 * MARGIN) * (levels + u) / LEVELS)


def from_line(x: Tensor) -> Tensor:
    """The levels of x; what is below the first or above the last level takes it."""
    return ((torch.sigmoid(x) - MARGIN) / (1 - 2 * MARGIN) * LEVELS).floor().clamp(0, LEVELS - 1).long()


def log_slope(x: Tensor) -> Tensor:
    """Log|det dx/d(v + u)| of rows x (N, P): added to log q(x) it gives the log density of v + u, (N,)."""
    one = math.log((1 - 2 * MARGIN) / LEVELS)
    return (one - F.logsigmoid(x) - F.logsigmoid(-x)).sum(-1)


class DigitClassifier(nn.Module):
    """Two convolutions, 64 features, 10 logits: of levels (N, 196)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, SIDE, SIDE)),
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, NUM_FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, levels: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.head(self.body(levels / (LEVELS - 1)))

    @torch.no_grad()
    def features(self, levels: Tensor) -> Tensor:
        """What the last layer sees, (N, 64)."""
        return torch.cat([self.body(part / (LEVELS - 1)) for part in levels.split(2000)])

    @torch.no_grad()
    def digits(self, levels: Tensor) -> Tensor:
        """The likeliest digit of each, (N,)."""
        return self.head(self.features(levels)).argmax(-1)


def train_classifier(levels: Tensor, labels: Tensor, num_steps: int = 1500, seed: int = 0) -> DigitClassifier:
    """A classifier of real images: Adam on batches of 128, a cosine to 0; the global random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitClassifier()
    adam = torch.optim.Adam(network.parameters(), lr=3e-3, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    for _ in range(num_steps):
        batch = torch.randint(len(levels), (128,), generator=generator)
        loss = F.cross_entropy(network(levels[batch]), labels[batch])
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    return network
