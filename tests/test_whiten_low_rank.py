"""Whitening of low rank plus diagonal: against Gaussians that are known, and on its way into a fit."""

from __future__ import annotations

import math

import pytest
import torch

import flowvi
from flowvi.errors import NonFiniteError, OptionError
from flowvi.fit.whiten import whiten
from flowvi.fit.whiten_low_rank import LowRank, polish
from flowvi.transforms import Affine

F64 = torch.float64


class LowRankGaussian:
    """N(mean, diag + U U^T), and how many gradients were asked for."""

    def __init__(self, dim, rank, seed=0):
        generator = torch.Generator().manual_seed(seed)
        diagonal = torch.exp(3 * torch.rand(dim, generator=generator, dtype=F64) - 1.5)
        strength = torch.linspace(0.3, 2.0, rank, dtype=F64)
        u = torch.randn(dim, rank, generator=generator, dtype=F64) * diagonal.sqrt()[:, None] * strength
        self.mean = torch.randn(dim, generator=generator, dtype=F64)
        self.covariance = torch.diag(diagonal) + u @ u.mT
        self.precision = torch.linalg.inv(self.covariance)
        self.sd = self.covariance.diagonal().sqrt()
        self.log_z = 0.5 * (torch.linalg.slogdet(self.covariance)[1] + dim * math.log(2 * math.pi))

    def value_and_grad(self, z):
        pull = (z - self.mean) @ self.precision
        return -0.5 * (pull * (z - self.mean)).sum(-1), -pull


def covariance_of(found):
    root = found.scale[:, None] * (torch.eye(len(found.loc), dtype=F64) + found.factor @ found.factor.mT)
    return root @ root.mT


def polished(target, dim, rank, seed=0, num_steps=150):
    start = torch.zeros(dim, dtype=F64), torch.full((dim,), 0.5, dtype=F64)
    generator = torch.Generator().manual_seed(seed)
    return polish(target, *start, rank=rank, num_steps=num_steps, num_particles=64, generator=generator)


@pytest.mark.parametrize("rank", [3, 17])
def test_a_gaussian_of_rank_three_is_found_exactly(rank):
    target = LowRankGaussian(300, 3)
    found = polished(target, 300, rank)
    assert found.factor.shape == (300, 3)  # no more than there is
    assert ((found.loc - target.mean) / target.sd).abs().max() < 1e-4
    scaled = covariance_of(found) / target.sd / target.sd[:, None]
    true = target.covariance / target.sd / target.sd[:, None]
    assert (scaled - true).abs().max() < 5e-3
    assert abs(found.elbo - float(target.log_z)) < 0.02


def test_too_low_a_rank_takes_the_widest_directions():
    target = LowRankGaussian(300, 3)
    elbos = [polished(target, 300, rank, num_steps=100).elbo for rank in (1, 2, 3)]
    assert elbos[0] < elbos[1] - 0.05
    assert elbos[1] < elbos[2] - 0.05
    assert elbos[2] == pytest.approx(float(target.log_z), abs=0.02)


def test_a_precise_direction_does_no_harm():
    """A precision of rank one plus diagonal is not of the family: the answer is near the best diagonal one."""
    target = LowRankGaussian(100, 1)
    u = torch.linspace(0.5, 1.5, 100, dtype=F64)
    target.precision = torch.eye(100, dtype=F64) + 50 * torch.outer(u, u) / u.square().sum()
    found = polished(target, 100, 10)
    assert (found.loc - target.mean).abs().max() < 1e-3
    diagonal = -0.5 * target.precision.diagonal().log().sum() + 50 * math.log(2 * math.pi)
    log_z = -0.5 * torch.linalg.slogdet(target.precision)[1] + 50 * math.log(2 * math.pi)
    assert diagonal - 0.5 < found.elbo < log_z


def test_where_the_target_ends_the_gaussian_shrinks():
    class HalfSpace:
        def value_and_grad(self, z):
            fine = (z > 0).all(-1, keepdim=True)
            return torch.where(fine[:, 0], z.log().sum(-1) - z.sum(-1), math.nan), torch.where(
                fine, 1 / z - 1, math.nan
            )

    start = torch.full((250,), 2.0, dtype=F64), torch.full((250,), 1.0, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    found = polish(HalfSpace(), *start, rank=5, num_steps=60, num_particles=32, generator=generator)
    for x in (found.loc, found.scale, found.factor):
        assert x.isfinite().all()
    assert found.scale.max() < 1.0


def test_whiten_hands_it_to_the_affine_layer():
    target = LowRankGaussian(220, 2)
    generator = torch.Generator().manual_seed(0)
    found = whiten(target, 220, full=False, rank=15, generator=generator, dtype=F64, num_steps=90, progress=False)
    layer = Affine(220, "low_rank").double()
    layer.set_(found.loc, found.scale_tril, found.factor)
    with torch.no_grad():
        root = layer(torch.eye(220, dtype=F64)) - layer.loc
    # its other columns start at .01 times a standard normal
    scaled = (root.mT @ root) / target.sd / target.sd[:, None]
    assert (scaled - target.covariance / target.sd / target.sd[:, None]).abs().max() < 0.05
    assert found.elbo > max(start.elbo for start in found.starts) + 0.5
    assert found.agree  # though the diagonal starts ended all along the widest direction
    assert len(found.starts) == 1
    e = torch.randn(5, 220, dtype=F64, generator=generator)
    root = torch.eye(220, dtype=F64) + found.factor @ found.factor.mT
    low_rank = LowRank(found.loc, found.scale_tril, found.factor, found.elbo)
    torch.testing.assert_close(low_rank.distance(found.loc + found.scale_tril * (e @ root)), e.norm(dim=-1))
    with pytest.raises(OptionError, match="factor of 15 columns"):
        Affine(220, "low_rank", rank=3).set_(torch.zeros(220), torch.ones(220), torch.ones(220, 15))
    with pytest.raises(OptionError, match="factor of 1 columns"):
        Affine(3).set_(torch.zeros(3), torch.ones(3), torch.ones(3, 1))


def test_no_finite_point_is_an_error():
    class Nowhere:
        def value_and_grad(self, z):
            return z.sum(-1) * math.nan, z * math.nan

    with pytest.raises(NonFiniteError):
        whiten(Nowhere(), 250, full=False, rank=5, generator=torch.Generator(), dtype=F64, progress=False)


def test_fit_above_the_limit_of_a_full_matrix():
    """The flow without layers starts at the whitening's answer, correlations included."""
    target = LowRankGaussian(220, 2)
    posterior = flowvi.fit(
        lambda z: target.value_and_grad(z)[0],
        dim=220,
        num_flows=0,
        num_steps=1,
        dtype=F64,
        seed=0,
        progress=False,
        verify=False,
    )
    assert (posterior.config["base"], posterior.config["modes"]) == ("low_rank", 1)
    z = posterior.sample(20_000, seed=1)["z"]
    assert ((z.mean(0) - target.mean) / target.sd).abs().max() < 0.06
    assert (z.std(0) / target.sd - 1).abs().max() < 0.06
    correlation = z.T.corrcoef() - target.covariance / target.sd / target.sd[:, None]
    assert correlation.abs().max() < 0.05
