r"""How near draws of a model are to draws of the data, measured from samples alone: no density is asked for.

- MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), k Gaussian (Gretton et al. 2012, JMLR 13, lemma 6): 0 where the two
  distributions are equal. The estimate has no bias, so it may be below 0.
- The classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv:1610.06545): the accuracy, on rows it has not seen, of
  a classifier that tells the two samples apart: .5 where it can't, 1 where it always can.
- Modes of a mixture of equal Gaussians: how many are covered, and the share of draws that belong to one.
- The Frechet distance of two samples of features, |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)): the squared
  2-Wasserstein distance of Gaussians with their means and covariances (Heusel et al. 2017, arXiv:1706.08500).
- The total variation distance of two histograms, half of the sum of absolute differences: 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvi.checks import positive_integers
from flowvi.errors import DimensionError, OptionError

MEDIAN_ROWS = 2000
"""Rows whose distances give the median heuristic."""

GOOD_WITHIN = 3.0
"""A draw is good within so many standard deviations of the nearest mode."""

COVERED_SHARE = 0.25
"""A mode is covered by good draws of at least this part of its share of all draws."""

BLOCKS = 5
"""Parts of a sample whose spread gives a standard error where there is no formula."""


class Measured(NamedTuple):
    """A measure and its standard error."""

    value: float
    standard_error: float


class Modes(NamedTuple):
    """How many modes are covered, and the share of good draws."""

    covered: int
    good_share: float


def median_distance(x: Tensor) -> float:
    """The median of the distances between rows, the usual bandwidth of the Gaussian kernel.

    Args:
        x: (N, D); of more than 2,000 rows the first ones are taken.
    """
    return float(torch.pdist(x[:MEDIAN_ROWS].double()).median())


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> Measured:
    r"""MMD^2 of two samples without bias, with k(a, b) = exp(-|a - b|^2 / (2 s^2)), and its standard error.

    With h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) the estimate is the mean of h_ij over i != j, a
    U-statistic whose variance is about 4 z_1 / n + 2 z_2 / n^2: z_1 the variance of E[h_ij | i], z_2 that of h_ij. The
    second term is all there is where the distributions are equal.

    Source: Gretton et al. 2012, JMLR 13, lemma 6; Serfling 1980, section 5.2, for the variance.

    Args:
        x: (n, D).
        y: (n, D).
        bandwidth: s.

    Raises:
        DimensionError: the shapes differ, or n is less than 3.
    """
    _same_shape(x, y, 3)
    x, y, n = x.double(), y.double(), len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.cdist(a, b).square_().mul_(-0.5 / bandwidth**2))

    cross = kernel(x, y)
    h = kernel(x, x) + kernel(y, y) - cross - cross.T
    h.fill_diagonal_(0.0)
    given = h.sum(1) / (n - 1)
    value = given.mean()
    spread = float((h - value).fill_diagonal_(0.0).square().sum()) / (n * (n - 1))
    between = max(float(given.var()) - spread / (n - 1), 0.0)  # a row's mean has the noise of its n - 1 entries, too
    return Measured(float(value), math.sqrt(4 * between / n + 2 * spread / n**2))


Classifier = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Training rows (N, D), their labels (N,) of 0 and 1, test rows (M, D) and a seed to labels (M,)."""


def two_sample_accuracy(x: Tensor, y: Tensor, classifier: Classifier, *, folds: int = 5, seed: int = 0) -> Measured:
    """The accuracy of a classifier of x against y on rows that it was not trained on, by cross-validation.

    Coordinates are standardized first, by the mean and standard deviation of x.

    Args:
        x: (n, D).
        y: (n, D).
        classifier: `by_network`, `by_neighbours`, or another.
        folds: every row is a test row once; the spread of the folds gives the standard error.
        seed: of the folds and the classifier.

    Raises:
        DimensionError: the shapes differ, or there are fewer rows than folds.
        OptionError: folds is less than 2.
    """
    if folds < 2:
        raise OptionError(f"folds must be 2 or more, not {folds}.")
    _same_shape(x, y, folds)
    loc, scale = x.mean(0), x.std(0)
    rows = (torch.cat([x, y]) - loc) / torch.where(scale > 0, scale, 1.0)
    labels = torch.arange(2).repeat_interleave(len(x))
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).remainder(folds).repeat(2)
    found = []
    for k in range(folds):
        test = fold == k
        guess = classifier(rows[~test], labels[~test], rows[test], seed + k)
        found.append(float((guess == labels[test]).double().mean()))
    accuracy = torch.tensor(found, dtype=torch.float64)
    return Measured(float(accuracy.mean()), float(accuracy.std()) / math.sqrt(folds))


def by_network(rows: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """Labels by a dense network of two layers of 64 units: 600 steps of Adam on batches of 256."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(rows.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        ).to(rows)
    steps = 600
    adam = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        batch = torch.randint(len(rows), (256,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(network(rows[batch])[:, 0], labels[batch].to(rows))
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    with torch.no_grad():
        return (network(test)[:, 0] > 0).long()


def by_neighbours(rows: Tensor, labels: Tensor, test: Tensor, seed: int) -> Tensor:
    """Labels by a vote of the 25 nearest rows, which follows a density however fine it is, in few dimensions."""
    votes = 25
    near = [torch.cdist(part, rows).topk(min(votes, len(rows)), largest=False).indices for part in test.split(1000)]
    return (labels[torch.cat(near)].double().mean(1) > 0.5).long()


def modes_covered(x: Tensor, centres: Tensor, scale: float) -> Modes:
    """How many of K equal Gaussian modes draws cover, and the share of good draws.

    A draw is good within three standard deviations of a mode. A mode is covered if at least a quarter of its share of
    all draws, N / K, are good and nearest to it.

    Args:
        x: draws, (N, D).
        centres: of the modes, (K, D).
        scale: their standard deviation.

    Raises:
        DimensionError: the draws have another D than the modes.
    """
    if x.dim() != 2 or x.shape[1] != centres.shape[1]:
        raise DimensionError(f"draws must have shape (N, {centres.shape[1]}), not {tuple(x.shape)}.")
    away, nearest = torch.cdist(x.double(), centres.double()).min(1)
    good = away < GOOD_WITHIN * scale
    counts = torch.bincount(nearest[good], minlength=len(centres))
    covered = int((counts >= COVERED_SHARE * len(x) / len(centres)).sum())
    return Modes(covered, float(good.double().mean()))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""The squared 2-Wasserstein distance of the Gaussians with the samples' means and covariances.

    tr (S_1 S_2)^(1/2) is the sum of the singular values of A_1^T A_2 with S_i = A_i A_i^T, which is exact for singular
    covariances too. The estimate is too high by what falls as 1 / N: compare samples of one size.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6.

    Args:
        x: features, (N, C).
        y: features, (M, C).

    Raises:
        DimensionError: there are two numbers of features, or fewer than 2 rows.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise DimensionError(f"two samples (N, C), N >= 2, are due, not {tuple(x.shape)} and {tuple(y.shape)}.")
    x, y = x.double(), y.double()
    one, two = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    # The singular values of one^T two's factors: |A_1^T A_2|_* with A_i^T = one, two up to rotations from the left.
    shared = torch.linalg.svdvals(torch.linalg.qr(one).R @ torch.linalg.qr(two).R.T).sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return float(mean + one.square().sum() + two.square().sum() - 2 * shared)


def total_variation(x: Tensor, y: Tensor, num: int) -> float:
    """Half of the sum of absolute differences of two histograms.

    Args:
        x: integers from 0 to num - 1, (N,).
        y: likewise, (M,).
        num: how many values there are.
    """
    one, two = (torch.bincount(z, minlength=num).double() / len(z) for z in (x, y))
    return float((one - two).abs().sum() / 2)


def in_blocks(measure: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, blocks: int = BLOCKS) -> Measured:
    """A measure of all rows, with a standard error from the spread of `blocks` parts of x and y.

    Args:
        measure: of rows of x and rows of y.
        x: (n, ...).
        y: (n, ...).
        blocks: parts.

    Raises:
        OptionError: blocks is no positive integer.
    """
    positive_integers(blocks=blocks)
    parts = [measure(a, b) for a, b in zip(x.chunk(blocks), y.chunk(blocks), strict=True)]
    return Measured(measure(x, y), float(torch.tensor(parts, dtype=torch.float64).std()) / math.sqrt(len(parts)))


def _same_shape(x: Tensor, y: Tensor, least: int) -> None:
    if x.dim() != 2 or x.shape != y.shape or len(x) < least:
        raise DimensionError(
            f"two samples of one shape (n, D), n >= {least}, are due, not {tuple(x.shape)} and {tuple(y.shape)}."
        )
