r"""Three ways to learn to draw like the data, behind one face: a flow by maximum likelihood, a VAE, and a GAN.

- flow: x = f(z), z ~ N(0, I) of the data's own dimension; log q(x) is exact (`flowvi.fit_density`).
- VAE: z ~ N(0, I) of few dimensions, x | z ~ N(m(z), diag s(z)^2), and q(z | x) by an encoder, a diagonal Gaussian or
  K planar layers on it (`flowvi.fit(encoder=)`). The ELBO bounds log p(x); importance sampling from q comes nearer.
- GAN: see `experiments.gan`. It has no density and no posterior.

All networks have two hidden layers of one width, which is chosen so that each way learns about as many numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flowvi
from experiments.gan import GAN, SLOPE, Training, dense, fit_gan, standardize
from flowvi.amortized import AmortizedFlow
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.guides import default_base

LARGEST_WIDTH = 8192
SMALLEST_SCALE = 1e-3
"""Of the VAE's p(x | z), in standard deviations of the data: without a floor its density has no upper bound."""
NECK = 32
"""Hidden units between the encoder's features and the parameters of planar layers."""


@dataclass(frozen=True)
class LogProbs:
    """Log densities of rows, in nats.

    Attributes:
        values: (N,), exact, or by importance sampling.
        bounds: ELBOs, (N,), where the values are by importance sampling.
    """

    values: Tensor
    bounds: Tensor | None = None


@dataclass(frozen=True)
class Learnt:
    """What was learnt, whichever way.

    Attributes:
        num_parameters: how many numbers, of all networks that learning takes.
        sample: number and seed to draws (n, D).
        log_probs: rows (N, D) and a number of importance samples to log densities; None where there is no density.
    """

    num_parameters: int
    sample: Callable[[int, int], Tensor]
    log_probs: Callable[[Tensor, int], LogProbs] | None


def width_for(num_parameters: Callable[[int], int], budget: int) -> int:
    """The width whose number of parameters, which grows with it, is nearest to a budget."""
    low, high = 1, LARGEST_WIDTH
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_parameters(middle) <= budget else (low, middle)
    return min((low, high), key=lambda width: abs(num_parameters(width) - budget))


def flow_parameters(flow: str, dim: int, options: Mapping[str, Any]) -> int:
    """How many parameters a flow has that `learn_flow` makes with these options."""
    build = {k: v for k, v in options.items() if k not in ("num_steps", "batch_size", "lr", "num_flows")}
    made = Flow.from_spec(FlowSpec(flow, dim, options["num_flows"], default_base(dim), build))
    return sum(p.numel() for p in made.parameters())


def learn_flow(train: Tensor, held: Tensor, *, flow: str, seed: int, progress: bool = False, **options: Any) -> Learnt:
    """A flow by maximum likelihood.

    Args:
        train: rows to learn from, (N, D).
        held: rows to check on.
        flow: a registered name.
        seed: of everything random.
        progress: whether a bar is shown.
        **options: of `flowvi.fit_density`.
    """
    fit = flowvi.fit_density(train, flow, validation=held, seed=seed, progress=progress, **options)
    if fit.config["stopped"] == "interrupted":  # a fit returns at Ctrl-C; here it means: all of it
        raise KeyboardInterrupt
    return Learnt(
        fit.config["num_parameters"],
        lambda num, seed: fit.sample(num, seed=seed),
        lambda x, _: LogProbs(fit.log_prob(x).double()),
    )


class VAE(nn.Module):
    """z ~ N(0, I), x | z ~ N(m(z), diag s(z)^2), for standardized data.

    Args:
        dim: D.
        latent_dim: of z.
        width: units of both hidden layers.
    """

    def __init__(self, dim: int, latent_dim: int, width: int) -> None:
        super().__init__()
        self.dim, self.latent_dim, self.width = dim, latent_dim, width
        self.decoder = dense((latent_dim, width, width, 2 * dim))

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) of z (..., latent_dim): batch shape (...), event shape (D,)."""
        loc, raw = self.decoder(z).chunk(2, -1)
        return dist.Normal(loc, F.softplus(raw) + SMALLEST_SCALE, validate_args=False).to_event(1)

    def model(self, x: Tensor) -> None:
        """The Pyro model of rows (n, D)."""
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0, validate_args=False).to_event(1))
            pyro.sample("x", self(z), obs=x)

    def encoder(self) -> nn.Module:
        """A new encoder of the same width, (n, D) to features (n, width)."""
        return nn.Sequential(dense((self.dim, self.width, self.width)), nn.LeakyReLU(SLOPE))


def learn_vae(
    train: Tensor,
    held: Tensor,
    *,
    latent_dim: int,
    num_flows: int,
    budget: int,
    seed: int,
    progress: bool = False,
    **options: Any,
) -> Learnt:
    """A VAE of about `budget` parameters, its encoder's counted, whose posteriors have K planar layers.

    Args:
        train: rows to learn from, (N, D).
        held: rows to check on.
        latent_dim: of z.
        num_flows: K; 0 is the diagonal Gaussian.
        budget: the number of parameters.
        seed: of everything random.
        progress: whether a bar is shown.
        **options: of `flowvi.fit`.
    """
    dim = train.shape[1]
    layers: dict[str, Any] = {"hidden_dims": (NECK,)} if num_flows else {}

    def num_parameters(width: int) -> int:
        with torch.device("meta"):
            vae = VAE(dim, latent_dim, width)
            parts = vae, vae.encoder()
        q = AmortizedFlow(latent_dim, width, "planar", num_flows, **layers)
        return sum(p.numel() for part in (*parts, q) for p in part.parameters())

    loc, scale = standardize(train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(dim, latent_dim, width_for(num_parameters, budget))
        encoder = vae.encoder()
    fit = flowvi.fit(
        vae.model,
        ((train - loc) / scale,),
        encoder=encoder,
        flow="planar",
        num_flows=num_flows,
        validation=(held - loc) / scale,
        patience=100,
        seed=seed,
        progress=progress,
        **layers,
        **options,
    )
    if fit.config["stopped"] == "interrupted":
        raise KeyboardInterrupt

    @torch.no_grad()
    def sample(num: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        p = vae(torch.randn(num, latent_dim, generator=generator)).base_dist
        return loc + scale * (p.loc + p.scale * torch.randn(p.loc.shape, generator=generator))

    def log_probs(x: Tensor, num_samples: int) -> LogProbs:
        found = fit.log_likelihood((x - loc) / scale, num_importance_samples=num_samples, seed=seed)
        shift = dim * math.log(scale)
        return LogProbs(found.values - shift, found.elbos - shift)

    return Learnt(fit.config["num_parameters"], sample, log_probs)


def learn_gan(
    train: Tensor, *, latent_dim: int, budget: int, training: Training, seed: int, progress: bool = False
) -> Learnt:
    """A GAN of about `budget` parameters, its discriminator's counted.

    Args:
        train: rows to learn from, (N, D).
        latent_dim: of z.
        budget: the number of parameters.
        training: how it is learnt.
        seed: of everything random.
        progress: whether a bar is shown.
    """

    def num_parameters(width: int) -> int:
        with torch.device("meta"):
            return GAN(train.shape[1], latent_dim, width).num_parameters

    gan = fit_gan(train, latent_dim, width_for(num_parameters, budget), training, seed=seed, progress=progress)
    return Learnt(
        gan.num_parameters, lambda num, seed: gan.sample(num, torch.Generator().manual_seed(seed)), log_probs=None
    )
