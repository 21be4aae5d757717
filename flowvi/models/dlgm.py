r"""The deep latent Gaussian model of Rezende & Mohamed 2015 (arXiv:1505.05770), section 6.2, and its encoder.

z_n ~ N(0, I), h = maxout(W z_n + b), and x_n from a likelihood whose parameters are affine in h: Bernoulli with logits
for binary pixels; for pixels in (0, 1) the logit-normal, logit(x) ~ N(mu, s^2), whose density of x itself is
N(logit x; mu, s^2) / (x (1 - x)).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import SigmoidTransform
from torch.nn import functional as F

from flowvi.checks import instances, one_of, positive_integers
from flowvi.errors import DimensionError, OptionError
from flowvi.models.networks import Maxout

__all__ = ["DLGM"]

LIKELIHOODS = {"bernoulli": 1, "logit_normal": 2}
"""How many parameters each has for a pixel."""

SMALLEST_SCALE = 1e-2
"""Of the logit-normal likelihood: without a floor its density has no upper bound."""


class DLGM(nn.Module):
    r"""P(x) = ∫ N(z; 0, I) p(x | z) dz with a generative network of one layer of maxout units.

    Source: Rezende & Mohamed 2015, arXiv:1505.05770, section 6.2: 40 latents, 400 maxout units with window 4.

    Args:
        data_dim: P, pixels of a data point.
        latent_dim: D.
        hidden: maxout units.
        window: of the maxout units.
        likelihood: "bernoulli", or "logit_normal" for pixels in (0, 1).
        name: under which the weights are in Pyro's parameter store.

    Raises:
        OptionError: an argument can't be used.

    Example:
        >>> import torch, flowvi
        >>> dlgm = flowvi.models.DLGM(data_dim=16, latent_dim=2, hidden=8)
        >>> x = torch.randint(2, (100, 16)).float()
        >>> fit = flowvi.fit(dlgm.model, x, encoder=dlgm.encoder(), num_flows=4, num_steps=20, seed=0, progress=False)
        >>> fit.posterior(x[:5]).sample().shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        data_dim: int = 784,
        latent_dim: int = 40,
        hidden: int = 400,
        window: int = 4,
        likelihood: str = "bernoulli",
        *,
        name: str = "dlgm",
    ) -> None:
        positive_integers(data_dim=data_dim, latent_dim=latent_dim, hidden=hidden, window=window)
        one_of(LIKELIHOODS, likelihood=likelihood)
        instances(str, name=name)
        super().__init__()
        self.data_dim, self.latent_dim, self.hidden, self.window = data_dim, latent_dim, hidden, window
        self.likelihood, self.name = likelihood, name
        self.decoder = nn.Sequential(
            Maxout(latent_dim, hidden, window), nn.Linear(hidden, LIKELIHOODS[likelihood] * data_dim)
        )

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """P(x | z).

        Args:
            z: (..., D).

        Returns:
            A distribution of batch shape (...) and event shape (P,).
        """
        out = self.decoder(z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=out, validate_args=False).to_event(1)
        loc, raw = out.chunk(2, -1)
        normal = dist.Normal(loc, F.softplus(raw) + SMALLEST_SCALE, validate_args=False)
        return dist.TransformedDistribution(normal, [SigmoidTransform()], validate_args=False).to_event(1)

    def model(self, x: Tensor, size: int | None = None) -> Tensor:
        """The Pyro model of a minibatch, latent site "z" and observed site "x" in the plate "data".

        Args:
            x: (n, P), binary for the Bernoulli likelihood, in (0, 1) for the logit-normal.
            size: N of all data, by which the plate scales; by default the minibatch counts as it is.

        Returns:
            The latents z, (n, D).

        Raises:
            DimensionError: x is not (n, P).
            OptionError: size is less than n.
        """
        if x.dim() != 2 or x.shape[1] != self.data_dim:
            raise DimensionError(f"this model's data has shape (n, {self.data_dim}), not {tuple(x.shape)}.")
        if size is not None and size < len(x):
            raise OptionError(f"size must be that of all data, at least the minibatch's {len(x)}, not {size!r}.")
        pyro.module(self.name, self)
        index = None if size is None else torch.arange(len(x), device=x.device)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0, validate_args=False).to_event(1))
            pyro.sample("x", self(z), obs=x)
        return z

    def encoder(self) -> nn.Module:
        """A new encoder of the same size: one layer of maxout units, (n, P) to (n, hidden)."""
        return Maxout(self.data_dim, self.hidden, self.window)
