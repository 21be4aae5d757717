r"""A small generative adversarial network of dense layers, to hold the flow and the VAE against.

x = G(z), z ~ N(0, I). The discriminator D learns to tell rows of data from draws, the generator to be taken for data:

    loss_D = E softplus(D(G(z))) + E softplus(-D(x)) + gamma / 2 E |dD/dx|^2,     loss_G = E softplus(-D(G(z))),

the non-saturating losses of Goodfellow et al. 2014 (arXiv:1406.2661, section 3), with the R1 penalty of Mescheder et
al. 2018 (arXiv:1801.04406, eq. 9), without which the two need not converge. Draws come from an exponential average of
the generator's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from flowvi.checks import positive_integers, positive_numbers_or_none

SLOPE = 0.2
"""Of the leaky ReLU below 0."""


@dataclass(frozen=True)
class Training:
    """How a GAN is learnt.

    Attributes:
        num_steps: steps of each of the two networks.
        batch_size: rows, and draws, of a step.
        lr: of Adam; falls to 0 by a cosine.
        betas: of Adam.
        gamma: the weight of the R1 penalty.
        averaging: of the generator's weights: what is kept of the average at each step.
    """

    num_steps: int
    batch_size: int = 256
    lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    gamma: float = 1.0
    averaging: float = 0.999


def dense(sizes: Sequence[int]) -> nn.Sequential:
    """A dense network with leaky ReLUs between its layers, (..., sizes[0]) to (..., sizes[-1])."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers[:-1])


class GAN(nn.Module):
    """A generator and a discriminator, each with two hidden layers, and the generator's average.

    Args:
        dim: D.
        latent_dim: of z.
        width: units of every hidden layer.

    Raises:
        OptionError: a number is not a positive integer.
    """

    def __init__(self, dim: int, latent_dim: int, width: int) -> None:
        positive_integers(dim=dim, latent_dim=latent_dim, width=width)
        super().__init__()
        self.latent_dim = latent_dim
        self.generator = dense((latent_dim, width, width, dim))
        self.discriminator = dense((dim, width, width, 1))
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    @property
    def num_parameters(self) -> int:
        """All that is learnt: of the generator and the discriminator."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @torch.no_grad()
    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws (num, D)."""
        return self.loc + self.scale * self.average(torch.randn(num, self.latent_dim, generator=generator))


def standardize(x: Tensor) -> tuple[Tensor, float]:
    """The mean (D,) and one standard deviation for all coordinates: shapes and noise keep their proportions."""
    loc = x.mean(0)
    return loc, float((x - loc).square().mean().sqrt())


def fit_gan(
    x: Tensor, latent_dim: int, width: int, training: Training, *, seed: int = 0, progress: bool = False
) -> GAN:
    """Learn a GAN from rows of data; the global random state is left alone.

    Args:
        x: (N, D).
        latent_dim: of z.
        width: units of every hidden layer.
        training: how.
        seed: makes it reproducible.
        progress: whether a bar is shown.

    Returns:
        The GAN, for data as they are: the networks see them centred and divided by one number.

    Raises:
        OptionError: a number can't be used.
    """
    positive_integers(num_steps=training.num_steps, batch_size=training.batch_size)
    positive_numbers_or_none(lr=training.lr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gan = GAN(x.shape[1], latent_dim, width)
    loc, scale = standardize(x)
    gan.loc, gan.scale = loc, torch.as_tensor(scale)
    x = (x - gan.loc) / gan.scale
    generator = torch.Generator().manual_seed(seed)
    parts = gan.generator, gan.discriminator
    adams = [torch.optim.Adam(p.parameters(), lr=training.lr, betas=training.betas, fused=True) for p in parts]
    cosines = [torch.optim.lr_scheduler.CosineAnnealingLR(adam, training.num_steps) for adam in adams]
    for _ in tqdm(range(training.num_steps), desc="fit_gan", disable=not progress):
        real = x[torch.randint(len(x), (training.batch_size,), generator=generator)].requires_grad_()
        for part, adam in zip(reversed(parts), reversed(adams), strict=True):
            fake = gan.generator(torch.randn(training.batch_size, latent_dim, generator=generator))
            if part is gan.discriminator:
                loss = _discriminator_loss(gan.discriminator, real, fake.detach(), training.gamma)
            else:
                loss = F.softplus(-gan.discriminator(fake)).mean()
            found = torch.autograd.grad(loss, list(part.parameters()))
            for p, g in zip(part.parameters(), found, strict=True):
                p.grad = g
            adam.step()
        for cosine in cosines:
            cosine.step()
        _average(gan, training.averaging)
    return gan


def _discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor, gamma: float) -> Tensor:
    on_real = discriminator(real)
    (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
    penalty = slope.square().sum(1).mean()
    return F.softplus(discriminator(fake)).mean() + F.softplus(-on_real).mean() + gamma / 2 * penalty


@torch.no_grad()
def _average(gan: GAN, keep: float) -> None:
    for mine, theirs in zip(gan.average.parameters(), gan.generator.parameters(), strict=True):
        mine.lerp_(theirs, 1 - keep)
