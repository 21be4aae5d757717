"""Modes: what the starts found, the flows' weights by evidence, and copies of one mode by permuted labels."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.fit.labels import label_switching
from flowvi.fit.modes import Mode, distinct, fit_mixture, set_weights, starts_evidence
from flowvi.fit.paths import connected
from flowvi.fit.whiten import Start, whiten
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.mixture import MixtureFlow


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tril(dim, gen, scale=1.0):
    """The root of a covariance with random axes, sds from about scale / 2 to 2 scale."""
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=gen, dtype=torch.float64))[0]
    sds = scale * torch.exp(0.4 * torch.randn(dim, generator=gen, dtype=torch.float64))
    return torch.linalg.cholesky(axes @ torch.diag(sds**2) @ axes.mT)


def two_gaussians(dim, weight, apart, seed):
    """Two Gaussians with different full covariances, `apart` sds between their means; and their parameters."""
    gen = generator(seed)
    roots = torch.stack([tril(dim, gen), tril(dim, gen)])
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=gen, dtype=torch.float64), dim=0)
    sd = (roots.mT @ direction).norm(dim=1).mean()
    locs = torch.stack([apart * sd / 2 * direction, -apart * sd / 2 * direction])
    parts = torch.distributions.MultivariateNormal(locs, scale_tril=roots)
    log_weights = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()

    def log_p(z):
        return torch.logsumexp(parts.log_prob(z.unsqueeze(-2)) + log_weights, -1)

    return flowvi.as_density(log_p, dim=dim, dtype=torch.float64), locs, roots


def gaussian_flow(mode):
    """The Gaussian of a mode as a flow."""
    flow = Flow.from_spec(FlowSpec("planar", len(mode.loc), 0), dtype=torch.float64)
    flow.transforms[-1].set_(mode.loc, mode.scale_tril)
    return flow


def starts_at(locs, roots, elbos):
    return tuple(Start(m, root, elbo) for m, root, elbo in zip(locs, roots, elbos, strict=True))


@pytest.mark.parametrize(("dim", "weight", "apart"), [(5, 0.5, 10.0), (20, 0.8, 20.0)])
def test_two_far_modes_come_out_with_their_weights(dim, weight, apart):
    density, locs, _ = two_gaussians(dim, weight, apart, seed=1)
    gen = generator()
    gaussian = whiten(density, dim, full=True, generator=gen, dtype=torch.float64, progress=False)
    modes = distinct((gaussian, *gaussian.starts), density, gen)
    assert len(modes) == 2
    found = fit_mixture(density, modes, gaussian_flow, gen)
    z, log_q = found.flow.rsample_and_log_prob(8000, generator=gen)
    first = ((z - locs[0]).norm(dim=1) < (z - locs[1]).norm(dim=1)).double().mean().item()
    assert first == pytest.approx(weight, abs=0.01)
    log_w = (density(z) - log_q).detach()
    assert math.log(log_w.exp().mean()) == pytest.approx(0, abs=0.03)
    assert flowvi.diagnostics.psis(log_w.numpy())[1] < 0.7


def test_all_starts_come_back_with_the_gaussian():
    density, _, _ = two_gaussians(3, 0.5, 12.0, seed=0)
    found = whiten(density, 3, full=True, generator=generator(), dtype=torch.float64, num_starts=6, progress=False)
    assert 4 <= len(found.starts) <= 6
    best = max(found.starts, key=lambda s: s.elbo)
    assert torch.linalg.vector_norm(torch.linalg.solve(best.scale_tril, found.loc - best.loc)) < 1
    assert all(s.scale_tril.shape == (3, 3) for s in found.starts)
    diagonal = whiten(density, 3, full=False, generator=generator(), dtype=torch.float64, progress=False)
    assert all(s.scale_tril.shape == (3,) for s in diagonal.starts)
    one = whiten(density, 3, full=True, generator=generator(), dtype=torch.float64, num_starts=1, progress=False)
    assert len(one.starts) == 1


def test_duplicates_and_starts_that_arrived_nowhere_are_dropped():
    density, locs, roots = two_gaussians(4, 0.7, 12.0, seed=2)
    elbos = [math.log(0.7), math.log(0.3)]
    jitter = locs[:1] + 0.1 * roots[0].diagonal()
    lost = Start(locs.mean(0), 0.2 * torch.eye(4, dtype=torch.float64), -80.0)
    never = Start(locs[0] * math.nan, roots[0], math.nan)
    starts = (*starts_at(locs, roots, elbos), *starts_at(jitter, 0.9 * roots[:1], [elbos[0] - 0.1]), lost, never)
    modes = distinct(starts, density, generator())
    assert [round(m.share, 2) for m in modes] == [0.7, 0.3]
    assert torch.equal(modes[0].loc, locs[0])
    assert modes[0].starts == 2
    assert modes[1].log_evidence == pytest.approx(math.log(0.3), abs=0.02)


def test_a_mode_without_a_share_is_left_out_and_no_start_is_none():
    density, locs, roots = two_gaussians(3, 1 - 1e-4, 12.0, seed=3)
    starts = starts_at(locs, roots, [0.0, math.log(1e-4)])
    assert len(distinct(starts, density, generator())) == 1
    assert len(distinct(starts, density, generator(), min_share=1e-5)) == 2
    assert distinct((Start(locs[0], roots[0], math.nan),), density, generator()) == ()


def test_one_curved_posterior_is_one_fit():
    """Starts that settled in the two arms of a banana: the first flow covers both, so that no other is fitted."""

    def log_p(z):
        x, y = z[:, 0] / 2, z[:, 1] - 0.5 * z[:, 0] ** 2
        return -0.5 * (x.square() + (y / 0.3).square()) - math.log(2 * math.pi * 2 * 0.3)

    density = flowvi.as_density(log_p, dim=2, dtype=torch.float64)

    class Exact(torch.distributions.transforms.Transform):
        domain = codomain = torch.distributions.constraints.real_vector
        bijective = True

        def _call(self, e):
            return torch.stack([2 * e[..., 0], 0.3 * e[..., 1] + 2 * e[..., 0] ** 2], -1)

        def _inverse(self, z):
            return torch.stack([z[..., 0] / 2, (z[..., 1] - 0.5 * z[..., 0] ** 2) / 0.3], -1)

        def log_abs_det_jacobian(self, e, z):
            return torch.full_like(e[..., 0], math.log(0.6))

    locs = torch.tensor([[-2.0, 2.2], [2.0, 2.2]], dtype=torch.float64)
    slope = torch.tensor([[[0.4, 0.0], [-0.8, 0.3]], [[0.4, 0.0], [0.8, 0.3]]], dtype=torch.float64)
    modes = distinct(starts_at(locs, slope, [-1.5, -1.5]), density, generator())
    assert len(modes) == 2
    assert connected(modes, density) == [[0, 1]]
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2).double(), 1.0), 1)
    calls = []

    def fit_one(mode):
        calls.append(mode)
        return Flow(base, [Exact()])

    found = fit_mixture(density, modes, fit_one, generator())
    assert len(calls) == 1
    assert not isinstance(found.flow, MixtureFlow)
    assert found.skipped == modes[1:]
    assert found.weights.tolist() == [1.0]


def test_weights_are_the_forward_kl_optimum_for_flows_that_do_not_fit():
    """Against the minimum of -E_p[log q] over the weights, by quadrature on the line."""
    density = flowvi.as_density(
        lambda z: torch.logsumexp(
            torch.stack([-0.5 * (z[:, 0] - 2) ** 2 + math.log(0.3), -0.5 * (z[:, 0] + 2) ** 2 + math.log(0.7)]), 0
        ),
        dim=1,
        dtype=torch.float64,
    )
    modes = [
        Mode(torch.tensor([m]).double(), torch.tensor([[s]]).double(), 0.0, 0.0, 0.5, 1)
        for m, s in ((1.0, 1.5), (-2.5, 1.2))
    ]
    mixture = MixtureFlow([gaussian_flow(mode) for mode in modes], torch.zeros(2))
    weights = set_weights(mixture, density, generator(), num=40_000)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    p = density(grid).exp()
    each = mixture.component_log_probs(grid).detach().exp()
    candidates = torch.linspace(0.01, 0.99, 981, dtype=torch.float64)
    cross = [(p * (c * each[:, 0] + (1 - c) * each[:, 1]).log()).sum() for c in candidates]
    best = candidates[torch.stack(cross).argmax()]
    assert weights[0].item() == pytest.approx(best.item(), abs=0.015)


def test_separate_modes_are_not_connected():
    for apart in (6.0, 20.0):
        density, locs, roots = two_gaussians(5, 0.5, apart, seed=7)
        nearby = locs[:1] + 0.5 * roots[0][:, 0]
        starts = starts_at(torch.cat([locs, nearby]), roots[[0, 1, 0]], [0.0, 0.0, 0.0])
        assert connected(starts, density) == [[0, 2], [1]]
    assert connected((), density) == []


def test_a_component_without_weight_is_dropped():
    density, locs, roots = two_gaussians(3, 0.6, 12.0, seed=4)
    modes = [Mode(m, root, 0.0, 0.0, 0.3, 1) for m, root in zip(locs, roots, strict=True)]
    nowhere = Mode(locs[0] + 40, roots[0], 0.0, 0.0, 0.3, 1)

    def fit_one(mode):
        return gaussian_flow(mode)

    found = fit_mixture(density, [*modes, nowhere], fit_one, generator())
    assert len(found.modes) == 2
    assert found.skipped == (nowhere,)
    assert found.weights.tolist() == pytest.approx([0.6, 0.4], abs=0.01)


def test_the_evidence_of_all_starts_sees_what_one_misses():
    density, locs, roots = two_gaussians(4, 0.8, 15.0, seed=5)
    starts = starts_at(locs, 1.1 * roots, [-0.3, -1.7])
    both, se = starts_evidence(starts, density, generator())
    assert both == pytest.approx(0, abs=4 * se)
    assert 0 < se < 0.05
    one, _ = starts_evidence(starts[:1], density, generator())
    assert one == pytest.approx(math.log(0.8), abs=0.05)
    assert starts_evidence((Start(locs[0], roots[0], math.nan),), density, generator()) == (-math.inf, math.inf)


def test_the_standard_error_of_the_evidence_is_the_spread_over_seeds():
    density, locs, roots = two_gaussians(3, 0.5, 10.0, seed=6)
    starts = starts_at(locs, 1.4 * roots, [-1.0, -1.0])
    runs = [starts_evidence(starts, density, generator(s), num=1000) for s in range(40)]
    values = torch.tensor([v for v, _ in runs])
    ses = torch.tensor([se for _, se in runs])
    assert values.std().item() == pytest.approx(ses.mean().item(), rel=0.4)


def two_components(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(2.0, 2.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def test_label_switching_is_found_and_named():
    torch.manual_seed(0)
    y = torch.cat([0.5 * torch.randn(12) - 2, torch.randn(8) + 2]).double()
    density = flowvi.as_density(two_components, args=(y,))
    gen = generator()
    gaussian = whiten(density, density.dim, full=True, generator=gen, dtype=density.dtype, progress=False)
    modes = distinct((gaussian, *gaussian.starts), density, gen)
    assert [m.share for m in modes] == pytest.approx([0.5, 0.5], abs=0.05)
    words = label_switching(modes, density)
    assert words is not None
    assert "2 of 2 modes are copies of each other" in words
    assert "mu, sigma and theta" in words
    assert label_switching(modes[:1], density) is None


def three_rates(y):
    pyro.sample("rate", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    pyro.sample("slope", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ([1.0, 2.0, 3.0, 0.0], [3.0, 1.0, 2.0, 0.0], True),
        ([1.0, 2.0, 3.0, 0.0], [3.0, 1.0, 2.0, 4.0], False),  # another site differs
        ([1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 5.0, 0.0], False),  # no permutation
        ([1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 0.0], False),  # nothing moved
    ],
)
def test_only_a_permutation_of_all_that_differs_is_label_switching(first, second, found):
    density = flowvi.as_density(three_rates, args=(None,), dtype=torch.float64)
    root = 0.1 * torch.eye(4, dtype=torch.float64)
    modes = [Start(torch.tensor(m, dtype=torch.float64), root, 0.0) for m in (first, second)]
    words = label_switching(modes, density)
    assert (words is not None) == found
    if words:
        assert "rate" in words
        assert "slope" not in words
