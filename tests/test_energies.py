"""Energies: the formulas, log Z, exact draws, moments and the KL divergence on a grid."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from flowvi import errors, kernels
from flowvi.energies import (
    ENERGIES,
    U1,
    U2,
    U3,
    U4,
    Banana,
    CorrelatedGaussian,
    Energy,
    Funnel,
    Grid,
    RingOfGaussians,
    StudentT,
)

PAPER = [U1, U2, U3, U4]
KNOWN_5D = [
    Funnel(5, scale=1.5),
    Banana(5, scale=2.0, curvature=0.3),
    RingOfGaussians(dim=5),
    CorrelatedGaussian(5, rho=-0.7),
    StudentT(5, df=3.0),
]
ALL = [kind() for kind in ENERGIES.values()] + KNOWN_5D + [U1(wall=True), U3(wall=2.5), StudentT(1, df=2.5)]
names = repr


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The formulas ---------------------------------------------------------------------------------------------


def naive(kind, z1, z2):
    """Table 1 as printed, in numpy, with no care for overflow."""
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    if kind is U1:
        modes = np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2)
        return 0.5 * ((np.hypot(z1, z2) - 2) / 0.4) ** 2 - np.log(modes)
    if kind is U2:
        return 0.5 * ((z2 - w1) / 0.4) ** 2
    other, s = (w2, 0.35) if kind is U3 else (w3, 0.4)
    return -np.log(np.exp(-0.5 * ((z2 - w1) / s) ** 2) + np.exp(-0.5 * ((z2 - w1 + other) / 0.35) ** 2))


@pytest.mark.parametrize("kind", PAPER)
def test_table_1(kind):
    z = 6 * torch.rand(500, 2, generator=generator(), dtype=torch.float64) - 3
    expected = naive(kind, *z.numpy().T)
    np.testing.assert_allclose(kind()(z), expected, rtol=1e-12)
    np.testing.assert_allclose(kind(wall=False)(z), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", PAPER)
def test_wall(kind):
    z = torch.tensor([[3.99, 0.2], [-4.0, 0.1], [4.3, 0.0], [-5.0, 1.0]], dtype=torch.float64)
    extra = kind(wall=True)(z) - kind(wall=False)(z)
    np.testing.assert_allclose(extra, [0, 0, 4.5, 50], atol=1e-12)
    extra = kind(wall=3.0)(z) - kind(wall=False)(z)
    np.testing.assert_allclose(extra, 0.5 * (np.array([0.99, 1, 1.3, 2]) / 0.1) ** 2, rtol=1e-12)
    assert kind().wall is (kind is not U1)


def test_known_densities():
    """Against torch's own distributions, with log Z."""
    z = torch.randn(200, 5, generator=generator(), dtype=torch.float64) * 2
    funnel, banana, ring, gaussian, student = KNOWN_5D
    normal = torch.distributions.Normal
    expected = normal(0, 1.5).log_prob(z[:, 0])
    expected = expected + normal(0, (z[:, :1] / 2).exp()).log_prob(z[:, 1:]).sum(-1)
    torch.testing.assert_close(funnel.log_prob(z), expected)

    straight = z.clone()
    straight[:, 1] += 0.3 * (z[:, 0] ** 2 - 4)
    expected = normal(0, torch.tensor([2.0, 1, 1, 1, 1])).log_prob(straight).sum(-1)
    torch.testing.assert_close(banana.log_prob(z), expected)

    modes = [
        normal(torch.tensor([4 * math.cos(a), 4 * math.sin(a), 0, 0, 0], dtype=z.dtype), 0.5).log_prob(z).sum(-1)
        for a in np.arange(8) * math.pi / 4
    ]
    expected = torch.stack(modes).logsumexp(0) - math.log(8)
    torch.testing.assert_close(ring.log_prob(z), expected)

    covariance = torch.from_numpy((-0.7) ** np.abs(np.subtract.outer(np.arange(5), np.arange(5))))
    expected = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=z.dtype), covariance).log_prob(z)
    torch.testing.assert_close(gaussian.log_prob(z), expected)
    own = CorrelatedGaussian(5, covariance=2 * covariance)
    torch.testing.assert_close(own.std(), torch.full((5,), math.sqrt(2), dtype=z.dtype))

    expected = torch.distributions.StudentT(torch.tensor(3.0).double()).log_prob(z).sum(-1)
    torch.testing.assert_close(student.log_prob(z), expected)


# Shapes, dtypes, devices, numerics ------------------------------------------------------------------------


@pytest.mark.parametrize("energy", ALL, ids=names)
def test_shapes_and_dtypes(energy):
    z = torch.randn(3, 4, energy.dim, generator=generator(), dtype=torch.float64)
    value = energy(z)
    assert value.shape == (3, 4)
    assert value.dtype == torch.float64
    torch.testing.assert_close(energy.log_density(z), -value)
    torch.testing.assert_close(energy(z[1, 2]), value[1, 2])
    batched = torch.func.vmap(torch.func.vmap(energy.energy))(z)
    torch.testing.assert_close(batched, value)
    single = energy(z.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), value, rtol=1e-4, atol=1e-4)
    assert energy(z.to("meta")).shape == (3, 4)  # no constant stays behind on the CPU


@pytest.mark.parametrize("energy", ALL, ids=names)
def test_gradient(energy):
    z = torch.randn(5, energy.dim, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(energy, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", ALL, ids=names)
def test_finite_everywhere(energy, dtype):
    """At the cusp of |z|, far out in every direction, and where exp under- or overflows."""
    far = 1e8 if isinstance(energy, Banana) else 1e15  # z1^4 must fit float32
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 1.0, 40.0, 1e3, 1e8, far], dtype=dtype)
    directions = torch.randn(32, energy.dim, generator=generator(), dtype=dtype).sign()
    z = (sizes[:, None, None] * directions).reshape(-1, energy.dim)
    if isinstance(energy, Funnel):  # exp(-v) |x|^2 itself overflows: take each of v and x to the extreme
        z = z[z[:, 0].abs() <= 1.0]
        neck = torch.cat([torch.full((1, 1), -1e8), torch.ones(1, energy.dim - 1)], -1).to(dtype)
        z = torch.cat([z, neck, -neck])
    z.requires_grad_()
    value = energy(z)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


# log Z ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "exact", "paper"),
    [(U1, 1.87750, 1.8775), (U2, 2.08209, 2.0826), (U3, 2.64171, 2.6422), (U4, 2.68457, 2.6852)],
)
def test_log_mass_of_the_papers_box(kind, exact, paper):
    """Gauss-Legendre on [-4, 4]^2; the recorded figures are sums over 2001 x 2001 points, ends included."""
    energy = kind(wall=False)
    box = ((-4.0, 4.0), (-4.0, 4.0))
    assert energy.log_mass(box) == pytest.approx(exact, abs=1e-5)
    assert energy.log_mass(box, panels=17) == pytest.approx(energy.log_mass(box), abs=1e-9)
    axis = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    ends_included = energy.log_density(z).logsumexp(0).item() + 2 * math.log(8 / 2000)
    assert ends_included == pytest.approx(paper, abs=6e-5)


@pytest.mark.parametrize(
    "energy",
    [
        U1(),
        U1(wall=True),
        U2(),
        U2(wall=2.0),
        U3(),
        U4(),
        Banana(),
        RingOfGaussians(),
        CorrelatedGaussian(),
        CorrelatedGaussian(1),
        Funnel(1),
    ],
    ids=names,
)
def test_log_normalizer_by_quadrature(energy):
    (lo, hi), *rest = energy.box
    wider = ((lo - 1, hi + 1), *[(lo - 1, hi + 1) for lo, hi in rest])
    # The second derivative jumps at a wall: 1e-6 is what this quadrature holds where a panel straddles it.
    assert energy.log_normalizer == pytest.approx(energy.log_mass(wider, panels=80), abs=1e-6)


def test_log_normalizer_of_the_others_by_quadrature():
    assert StudentT(1, df=4.0).log_mass(((-4e3, 4e3),), panels=4000) == pytest.approx(
        StudentT(1, df=4.0).log_normalizer, abs=1e-8
    )
    # The funnel's x is scaled by exp(v / 2), so integrate over x / exp(v / 2).
    grid = Grid.gauss(((-27.0, 27.0), (-8.0, 8.0)))
    v, x = grid.z.unbind(-1)
    log_density = Funnel(2).log_density(torch.stack([v, x * (v / 2).exp()], -1)) + v / 2
    total = (log_density + grid.weights.log()).flatten().logsumexp(0).item()
    assert Funnel(2).log_normalizer == pytest.approx(total, abs=1e-8)


@pytest.mark.parametrize("energy", KNOWN_5D, ids=names)
def test_log_normalizer_in_five_dimensions(energy):
    """E_p[r / exp(-U)] = 1 / Z for any density r inside p: ties log Z to the draws."""
    z = energy.sample(400_000, generator=generator(1), dtype=torch.float64)
    centre = torch.zeros(5, dtype=torch.float64)
    if isinstance(energy, RingOfGaussians):
        centre[0] = energy.radius
    if isinstance(energy, Banana):
        centre[1] = energy.curvature * energy.scale**2
    log_r = torch.distributions.Normal(centre, 0.3).log_prob(z).sum(-1)
    weights = (log_r - energy.log_prob(z)).exp()
    error = weights.std().item() / math.sqrt(len(z))
    assert error < 0.05
    assert weights.mean().item() == pytest.approx(1, abs=4 * error)


@pytest.mark.parametrize("kind", [U2, U3, U4])
def test_no_normalizer_without_a_wall(kind):
    energy = kind(wall=False)
    with pytest.raises(errors.TargetError, match=r"wall=False\) has no finite normalizer.*use wall=True"):
        _ = energy.log_normalizer
    with pytest.raises(errors.TargetError, match="no exact samples"):
        energy.sample(3)
    assert not energy.has_exact_samples


# Draws and moments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", ALL, ids=names)
def test_moments_of_the_draws(energy):
    num = 100_000
    z = energy.sample(num, generator=generator(2), dtype=torch.float64)
    assert z.shape == (num, energy.dim)
    assert energy.mean().shape == energy.std().shape == (energy.dim,)
    if isinstance(energy, Funnel):
        z = z[:, :1]  # the variance of x's variance is out of any sample's reach
    std = energy.std()[: z.shape[1]]
    error = (z.mean(0) - energy.mean()[: z.shape[1]]).abs() / std
    assert (error < 4.5 / math.sqrt(num)).all()
    if isinstance(energy, StudentT):
        return  # no fourth moment
    kurtosis = ((z - z.mean(0)) / std).pow(4).mean(0)
    assert ((z.var(0) / std.square() - 1).abs() < 4.5 * ((kurtosis - 1) / num).sqrt()).all()


@pytest.mark.parametrize(
    "energy",
    [
        U1(),
        U1(wall=1.5),
        U2(),
        U3(),
        U4(),
        U4(wall=2.0),
        Banana(),
        RingOfGaussians(),
        CorrelatedGaussian(),
        StudentT(2, df=0.7),
        Funnel(2, scale=1.0),
    ],
    ids=names,
)
def test_draws_follow_the_density(energy):
    """A chi-square test of 12 x 12 cells against quadrature."""
    num, side, fine = 100_000, 12, 40
    box = ((-6.0, 6.0), (-6.0, 6.0)) if isinstance(energy, StudentT | Funnel) else energy.box
    grid, log_p = energy.grid_log_prob(side * fine, box)
    p = (log_p.exp() * grid.weights).reshape(side, fine, side, fine).sum((1, 3)).flatten()
    z = energy.sample(num, generator=generator(3), dtype=torch.float64)
    lo, hi = (torch.tensor(ends, dtype=torch.float64) for ends in zip(*box, strict=True))
    cell = ((z - lo) / (hi - lo) * side).floor().long()
    inside = ((cell >= 0) & (cell < side)).all(-1)
    counts = torch.bincount((cell[:, 0] * side + cell[:, 1])[inside], minlength=side * side)
    expected = torch.cat([num * p, num * (1 - p.sum()).clamp_min(0)[None]])
    counts = torch.cat([counts, (~inside).sum()[None]])
    used = expected > 8
    chi2 = ((counts - expected)[used].square() / expected[used]).sum().item()
    freedom = int(used.sum())
    assert freedom > 10
    assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom)


def test_draws_are_reproducible_and_leave_the_global_generator_alone():
    for energy in ALL:
        before = torch.get_rng_state()
        first, again = (energy.sample(7, generator=generator(4)) for _ in range(2))
        assert torch.equal(first, again)
        assert first.dtype == torch.float32
        assert torch.equal(before, torch.get_rng_state())
        assert energy.sample(0, generator=generator()).shape == (0, energy.dim)


def test_moments_that_do_not_exist():
    assert StudentT(2, df=1.0).mean().isnan().all()
    assert StudentT(2, df=1.0).std().isnan().all()
    assert StudentT(2, df=2.0).std().isinf().all()
    assert Funnel(3).std().tolist() == pytest.approx([3, math.exp(2.25), math.exp(2.25)])


# The grid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [U1(), U2(), U3(), U4(), RingOfGaussians(), StudentT(1, df=30.0)], ids=names)
def test_grid_log_prob_integrates_to_one(energy):
    grid, log_p = energy.grid_log_prob(300)
    assert log_p.shape == grid.weights.shape == (300,) * energy.dim
    assert (log_p.exp() * grid.weights).sum().item() == pytest.approx(1, abs=1e-6)


def test_kl_of_a_density_to_itself_is_zero():
    for kind in PAPER:
        kl, mass = kind().kl_divergence(kind().log_prob)
        assert kl == pytest.approx(0, abs=1e-12)
        assert mass == pytest.approx(1, abs=1e-6)


def test_kl_of_a_collapse_is_log_two():
    """Half of U1, the one mode, is q = 2 p there and 0 elsewhere."""
    energy = U1()

    def log_q(z):
        return torch.where(z[:, 0] > 0, energy.log_prob(z) + math.log(2), -math.inf)

    kl, mass = energy.kl_divergence(log_q)
    assert kl == pytest.approx(math.log(2), abs=1e-6)
    assert mass == pytest.approx(1, abs=1e-6)


def test_kl_between_gaussians():
    p = CorrelatedGaussian(2, rho=0.6)
    q = torch.distributions.MultivariateNormal(torch.tensor([0.3, -0.2]), torch.tensor([[1.5, 0.2], [0.2, 0.7]]))
    exact = torch.distributions.kl_divergence(
        q, torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.6], [0.6, 1]]))
    )
    assert p.kl_divergence(q.log_prob, dtype=torch.float32).kl == pytest.approx(exact.item(), abs=1e-5)


def test_kl_warns_where_the_grid_misses_q():
    wide = torch.distributions.MultivariateNormal(torch.zeros(2).double(), 100 * torch.eye(2).double())
    with pytest.warns(errors.NumericalWarning, match=r"mass of 0\.\d+ of q, not 1.*widen box"):
        U1().kl_divergence(wide.log_prob)


# Being a good object --------------------------------------------------------------------------------------


def test_copies_and_repr():
    z = torch.randn(4, 2)
    for energy in (U1(), U2(wall=3.0), RingOfGaussians(), CorrelatedGaussian(), StudentT()):
        _ = energy.log_normalizer
        for twin in (pickle.loads(pickle.dumps(energy)), copy.deepcopy(energy)):
            assert torch.equal(twin(z), energy(z))
            assert twin.log_normalizer == energy.log_normalizer
    assert repr(U2()) == "U2(wall=True)"
    assert repr(Funnel(3)) == "Funnel(dim=3, scale=3.0)"
    assert U2() == U2()
    assert U2() != U2(wall=False)


def test_an_energy_of_ones_own():
    class Quartic(Energy):
        dim = 1

        def _energy(self, z):
            return z[..., 0] ** 4

    quartic = Quartic()
    box = ((-5.0, 5.0),)
    assert quartic.log_mass(box) == pytest.approx(math.log(2 * math.gamma(1.25)), abs=1e-12)
    with pytest.raises(errors.TargetError, match=r"log normalizer of .* is not known"):
        quartic.log_prob(torch.zeros(3, 1))
    with pytest.raises(errors.TargetError, match="no exact samples"):
        quartic.sample(2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: U2(wall=-1.0), errors.OptionError, "U2 needs a finite wall > 0, got -1.0"),
        (lambda: Funnel(0), errors.OptionError, "Funnel needs dim >= 1, got 0"),
        (lambda: Funnel(3, scale=0.0), errors.OptionError, "Funnel needs a finite scale > 0"),
        (lambda: Banana(1), errors.OptionError, "Banana needs dim >= 2, got 1"),
        (lambda: Banana(curvature=math.nan), errors.OptionError, "finite curvature"),
        (lambda: RingOfGaussians(0), errors.OptionError, "num_modes >= 1"),
        (lambda: CorrelatedGaussian(3, rho=1.0), errors.OptionError, "-1 < rho < 1, got 1.0"),
        (
            lambda: CorrelatedGaussian(3, covariance=torch.eye(2)),
            errors.DimensionError,
            r"\(3, 3\), got \(2, 2\)",
        ),
        (lambda: CorrelatedGaussian(2, covariance=-torch.eye(2)), errors.OptionError, "positive definite"),
        (
            lambda: CorrelatedGaussian(2, covariance=torch.tensor([[1, 0.5], [0, 1]])),
            errors.OptionError,
            "symmetric",
        ),
        (lambda: StudentT(df=math.inf), errors.OptionError, "StudentT needs a finite df > 0"),
        (
            lambda: U1()(torch.zeros(4, 3)),
            errors.DimensionError,
            r"shape \(..., 2\), got \(4, 3\)",
        ),
        (lambda: U1()(torch.tensor(1.0)), errors.DimensionError, r"got \(\)"),
        (lambda: U1().sample(-1), errors.OptionError, "num_samples must be >= 0, got -1"),
        (lambda: Funnel(3).grid_log_prob(), errors.DimensionError, "D <= 2.*use samples instead"),
        (lambda: U1().log_mass(((0.0, 1.0),)), errors.OptionError, "2 finite pairs"),
        (lambda: U1().log_mass(((0.0, 1.0), (1.0, 0.0))), errors.OptionError, "low < high"),
        (lambda: U1().grid_log_prob(0), errors.OptionError, "num >= 1"),
        (lambda: U1().kl_divergence(lambda z: z), errors.DimensionError, r"log_q must map points \(N, 2\)"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "energy", [U1(), U1(wall=2.0), U2(), U2(wall=False), U3(), U4(), Funnel(2), Funnel(5, scale=1.5)], ids=repr
)
def test_gradients_by_hand_are_autograds(energy, backend):
    with kernels.use(backend):
        check_gradient(energy)


def check_gradient(energy):
    z = 3 * torch.randn(500, energy.dim, dtype=torch.float64)
    z[0] = 0.0
    value, grad = energy.log_density_and_grad(z)
    x = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy.log_density(x).sum(), x)
    assert torch.allclose(value, energy.log_density(z), rtol=1e-12, atol=1e-12)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-9)
