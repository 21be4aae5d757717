"""The register machine: its functions, each operation, tiles, whole models; against torch and autograd."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch.func import grad_and_value, vmap

import flowvi
from flowvi import kernels
from flowvi.program.instruction import NotLowered
from flowvi.program.lowering import NUM_PARTICLES, lower
from flowvi.targets.batch import BatchedGraph
from flowvi.targets.trace import trace

pytest.importorskip("numba")
from flowvi.kernels.compiled import elementary
from flowvi.kernels.compiled.jit import kernel, stamp

F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan


def points(size, dim, dtype=F64, seed=0):
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_autograd(log_p, z):
    grad, value = vmap(grad_and_value(log_p))(z)
    return value, grad


def lowered(log_p, z):
    """The programs of log p, a function of one particle's z (D,), walked at other points than z."""
    return programs(log_p, points(NUM_PARTICLES, z.shape[1], z.dtype, 1).clamp(-1, 1))


def programs(log_p, walked):
    module = trace(lambda z: {"log_p": log_p(z)}, {"z": walked[0]}).module("log_p")
    return lower(BatchedGraph(module, 0)._flat_graph(walked).forward, walked)


def check(log_p, dim, dtype=F64, sizes=(1, 8, 21), scale=1.0):
    """The programs give what autograd gives, for any number of particles."""
    z = scale * points(max(sizes), dim, dtype)
    both, alone = lowered(log_p, z)
    tolerance = 1e-10 if dtype == F64 else 2e-4
    for size in sizes:
        value, grad = by_autograd(log_p, z[:size])
        close = {"rtol": tolerance, "atol": tolerance * (1 + grad.nan_to_num(0, 0, 0).abs().max().item())}
        found, found_grad = both(z[:size])
        torch.testing.assert_close(found, value, equal_nan=True, **close)
        torch.testing.assert_close(found_grad, grad, equal_nan=True, **close)
        only, nothing = alone(z[:size])
        torch.testing.assert_close(only, value, equal_nan=True, **close)
        assert nothing.shape == (0, dim)


# exp, log and log1p, to the last bits.


def _each(op):
    tag = stamp()

    @kernel
    def loop(x, out):
        for i in range(len(x)):
            out[i] = op(x[i])
        return tag

    def of(x):
        x = np.asarray(x, np.float64)
        out = np.empty_like(x)
        loop(x, out)
        return out

    return of


EXP, LOG, LOG1P = (_each(f) for f in (elementary.exp, elementary.log, elementary.log1p))


@settings(max_examples=300)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_elementary_functions_are_right_to_the_last_bits(numbers):
    x = np.array(numbers)
    with np.errstate(all="ignore"):
        for found, want, smallest in (
            (EXP(np.clip(x, -700, 700)), np.exp(np.clip(x, -700, 700)), 0.0),
            (LOG(np.abs(x)), np.log(np.abs(x)), 1e-16),
            (LOG1P(np.abs(x)), np.log1p(np.abs(x)), 0.0),
            (LOG1P(-np.abs(x) % 1), np.log1p(-np.abs(x) % 1), 0.0),
            (LOG(1 + np.tanh(x) * 1e-3), np.log(1 + np.tanh(x) * 1e-3), 0.0),
        ):
            same = np.isclose(found, want, rtol=8e-16, atol=smallest, equal_nan=True)
            assert same.all(), (x[~same], found[~same], want[~same])


def test_elementary_functions_at_the_edges():
    with np.errstate(all="ignore"):
        for x in (0.0, -0.0, INF, -INF, NAN, 709.7, 709.79, 720.0, -708.5, -745.1, -746.0, -1e9, 1e300, 5e-324, 1e-310):
            np.testing.assert_allclose(EXP([x]), np.exp([x]), rtol=1e-15, atol=5e-324)
        for x in (0.0, INF, NAN, 5e-324, 1e-310, 2.3e-308, 1.0, -1.0, -INF, 1.7e308, np.nextafter(1, 0), 2**0.5):
            np.testing.assert_allclose(LOG([x]), np.log([x]), rtol=4e-16)
        for x in (0.0, INF, NAN, -1.0, -2.0, 1e-300, -1e-17, 5e-324, 1e308, np.nextafter(-1, 0)):
            np.testing.assert_allclose(LOG1P([x]), np.log1p([x]), rtol=4e-16)


# Each operation: value and gradient are a test of it and of its derivative's operations.

M = torch.linspace(-1, 2, 12, dtype=F64).reshape(3, 4)
INDEX = torch.tensor([2, 0, 2, 1])


def _like(constant, z):
    return constant.to(z.dtype)


OPERATIONS = {
    "arithmetic": lambda z: ((2 * z - z / 3 + 1) * (-z) / (1 + z.square()) - (3 - z)).sum(),
    "alpha": lambda z: torch.sub(torch.add(z, z.flip(0), alpha=3), z.exp(), alpha=0.5).sum(),
    "powers": lambda z: (z**2 + z**3 + z.abs() ** 0.5 + (1 + z.abs()) ** 1.7 + (2 + z.abs()) ** -1 + z**4).sum(),
    "power of z": lambda z: (1.5**z + (1 + z.square()) ** z).sum(),
    "exponentials": lambda z: (z.exp() + z.expm1() + z.square().log1p() + (1 + z.square()).log()).sum(),
    "roots": lambda z: ((1 + z.square()).sqrt() + (1 + z.square()).rsqrt() + (2 + z.sin()).reciprocal()).sum(),
    "waves": lambda z: (z.sin() * z.cos() + z.tanh() + z.sigmoid()).sum(),
    "gamma": lambda z: (1 + z.square()).lgamma().sum() + torch.digamma(0.2 + z.abs()).detach().sum(),
    "errors": lambda z: (z.erf() + z.erfc()).sum(),
    "softplus": lambda z: (torch.nn.functional.softplus(z) + torch.nn.functional.logsigmoid(3 * z)).sum(),
    "softmax": lambda z: z.reshape(3, 4).log_softmax(-1)[:, 1].sum() + (z.reshape(3, 4).softmax(0) * _like(M, z)).sum(),
    "logsumexp": lambda z: z.reshape(3, 4).logsumexp(0).sum() + z.reshape(2, 3, 2).logsumexp((1, 2)).sum(),
    "clamps": lambda z: (z.clamp(-0.5, 0.7) + z.clamp(min=0.1) + z.relu() + z.clamp(max=z.flip(0))).square().sum(),
    "maxima": lambda z: (
        (torch.maximum(z, z.flip(0)) * torch.minimum(z, 0 * z)).sum() + z.amax() - z.reshape(3, 4).amin(1).sum()
    ),
    "signs": lambda z: (z.sign() * z.square() + z.abs() - z.neg()).sum(),
    "conditions": lambda z: torch.where((z > 0) & (z < 1) | (z <= -1) | ~(z >= -2), z.exp(), z.square()).sum(),
    "equalities": lambda z: (torch.where(z == z.flip(0), z, 2 * z) + torch.where(z != 0, z, 1.0)).square().sum(),
    "masks": lambda z: (z * (z > 0).to(z.dtype)).sum() + z.masked_fill(z < 0, 2.0).square().sum(),
    "nan and inf": lambda z: torch.where((z / 0).isinf() & ~(z.log()).isnan(), z.square(), z).sum(),
    "views": lambda z: (z.reshape(3, 4).T[1:3] * z.reshape(2, 6)[:, ::2].unsqueeze(0).expand(2, 2, 3).sum(1)).sum(),
    "selections": lambda z: (
        z[3] * z[-1] + z.reshape(3, 4)[1].prod() + z.reshape(2, 2, 3).diagonal(0, 0, 1).square().sum()
    ),
    "splits": lambda z: sum((p * i).exp().sum() for i, p in enumerate(z.split([2, 3, 7]))) + z.unbind()[5],
    "chunks": lambda z: torch.stack(z.reshape(3, 4).unbind(1), 0).square()[1].sum() * z.chunk(2)[0].sum(),
    "cat": lambda z: (torch.cat([z[:3], z.exp()[4:], z.new_ones(2)]).square() * torch.arange(13).to(z.dtype)).sum(),
    "padding": lambda z: (
        (torch.nn.functional.pad(z.reshape(3, 4), (1, 2, 0, 1), value=0.5).square()).cumsum(1)[:, 2].sum()
    ),
    "triangles": lambda z: (z.reshape(3, 4).tril(1).exp() - z.reshape(4, 3).triu(-1).square().T).sum(),
    "index": lambda z: (z[INDEX] * _like(M, z)[0]).sum() + z.reshape(3, 4)[:, INDEX].square()[1].sum(),
    "two indices": lambda z: z.reshape(3, 4)[INDEX.clamp(max=2), INDEX].exp().sum(),
    "matrix of indices": lambda z: (z[INDEX.reshape(2, 2)] ** 3).sum() + z.index_select(0, INDEX).prod(),
    "sums": lambda z: z.reshape(2, 3, 2).sum((0, 2)).exp().sum() + z.reshape(2, 3, 2).mean(1).square().sum(),
    "keepdim": lambda z: (z.reshape(3, 4) - z.reshape(3, 4).mean(1, keepdim=True)).square().sum().exp(),
    "cumulative": lambda z: z.cumsum(0).square().sum() + (1.1 + z.tanh()).reshape(3, 4).cumprod(1)[:, -1].sum(),
    "times a matrix": lambda z: (_like(M, z) @ z[:4]).square().sum() + (z[:3] @ _like(M, z)).exp().sum(),
    "matrix times matrix": lambda z: (z.reshape(3, 4) @ z.reshape(4, 3)).exp().diagonal().sum(),
    "constant products": lambda z: (
        (_like(M, z) @ z.reshape(4, 3)).square().sum() + (z.reshape(4, 3) @ _like(M, z)).sum()
    ),
    "batches of products": lambda z: (z.reshape(2, 2, 3) @ z.reshape(2, 3, 2)).square().sum(),
    "dot": lambda z: z[:6].dot(z[6:]) + torch.einsum("i,ij,j->", z[:3], _like(M, z), z[4:8]),
    "where a constant is broadcast": lambda z: (
        (z.reshape(3, 4) * _like(M, z)[:, :1] + _like(M, z)[None, 0]).square().sum()
    ),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_derivative(name, dtype):
    check(OPERATIONS[name], 12, dtype)


def positive(z, n):
    a = z[: n * n].reshape(n, n)
    return a @ a.T + torch.eye(n, dtype=z.dtype)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_factors_and_triangular_systems(n):
    b = torch.linspace(-1, 1, n, dtype=F64)

    def log_p(z):
        factor = torch.linalg.cholesky(positive(z, n))
        solved = torch.linalg.solve_triangular(factor, b[:, None], upper=False)
        from_right = torch.linalg.solve_triangular(factor, z[: 2 * n].reshape(2, n), upper=False, left=False)
        above = torch.linalg.solve_triangular(factor.mT, z[:n, None], upper=True)
        return factor.diagonal().log().sum() - solved.square().sum() + from_right.sin().sum() + above.cos().sum()

    check(log_p, max(n * n, 2 * n))


def test_where_there_is_no_factor_it_is_nan_for_that_particle_alone():
    def log_p(z):
        matrix = torch.stack([torch.stack([z[0], z[1]]), torch.stack([z[1], z[0]])])
        return torch.linalg.cholesky_ex(matrix).L.diagonal().log().sum()

    z = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-1.0, 0.0], [3.0, -1.0]], dtype=F64)
    walked = torch.tensor([[2.0, 1.0]], dtype=F64).expand(NUM_PARTICLES, 2).contiguous()
    value, grad = programs(log_p, walked)[0](z)
    want, want_grad = by_autograd(log_p, z[[0, 3]])
    torch.testing.assert_close(value[[0, 3]], want)
    torch.testing.assert_close(grad[[0, 3]], want_grad)
    assert value[1:3].isnan().all()


# What torch does at the edges.

EDGES = {
    "the sign of nan": lambda z: torch.where(z > 0, z.log().abs(), z).sum(),
    "zero to the power of a half": lambda z: (z.relu() ** 0.5).sum() + (z**-0.5).detach().nan_to_num(0.0).sum(),
    "digamma of zero": lambda z: z.relu().digamma().detach().clamp(min=-5).sum() + z.sum(),
    "digamma far below zero": lambda z: 1e-8 * (z * 1e5 - 1e6).lgamma().sum() + z.sum(),
    "a tiny divisor": lambda z: (z * 1e-300 / 1e-310).sum(),
    "a divisor of zero": lambda z: torch.where(z > 0, z, 0.0).sum() + (z / torch.zeros(4, dtype=z.dtype)).sign().sum(),
    "minus zero": lambda z: (torch.tensor([0.0, -0.0], dtype=z.dtype) * z[0].square()).reciprocal().clamp(-5, 5)[1],
    "truth as a number": lambda z: ((z > 0) * z).sum() + torch.where(z > 0, z > 1, z > -1).to(z.dtype).sum() * z[0],
    "a count": lambda z: (z > 0).sum() * z.sum() + (z.reshape(2, 2) > 0).sum(1).to(z.dtype).square().sum(),
    "clamps of nan": lambda z: torch.where(z > 0, z.log().clamp(-1, 1), z).sum(),
}


@pytest.mark.parametrize("name", EDGES)
def test_at_the_edges_it_is_as_torch(name):
    check(EDGES[name], 4)


# Along the data, tile by tile.


@pytest.mark.parametrize("n", [191, 192, 193, 384, 997])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_data_in_tiles(n, dtype):
    x = torch.linspace(-2, 2, n, dtype=dtype)
    group = torch.arange(n) % 3
    design = torch.stack([torch.ones_like(x), x, x.square()], 1)

    def log_p(z):
        mean = design @ z[:3] + z[3:6][group]
        noise = torch.nn.functional.softplus(z[6] + 0.1 * x)
        parts = torch.stack([mean, mean + z[7], -mean], 1).log_softmax(1)
        spread = torch.cat([mean[n // 2 :], mean[: n // 2]])
        total = -((x - mean) / noise).square().sum() - noise.log().sum() + parts[:, 1].sum() + parts.amax(0).sum()
        return total / n + (spread * mean).mean() + mean.flip(0)[: n // 3].square().mean() + mean.cumsum(0)[-1] / n

    check(log_p, 8, dtype, sizes=(1, 21), scale=0.5)


def test_two_kinds_of_data():
    y, x = torch.linspace(0, 1, 300, dtype=F64), torch.linspace(-1, 1, 450, dtype=F64)

    def log_p(z):
        first = (y * z[0]).exp().sum()  # the second kind waits for a sum over the first
        second = (x * first / 300 + z[1]).square().sum()
        table = (y[:, None] * z).sin()  # (300, D)
        return second - (y * z[2] + second / 450).cos().sum() - table.square().sum() + table.sum(0).prod() / 300**3

    check(log_p, 3, sizes=(1, 13))


# Programs of anything that these can make.

STEPS = {
    "flip": lambda a, k: a.flip(k % a.dim()),
    "transpose": lambda a, k: a.transpose(0, k % a.dim()),
    "slice": lambda a, k: a[:: 1 + k % 2] if a.shape[0] > 1 else a,
    "tail": lambda a, k: a[..., 1:] if a.shape[-1] > 1 else a,
    "select": lambda a, k: a[k % len(a)] if a.dim() > 1 else a,
    "sum": lambda a, k: a.sum(k % a.dim()) if a.dim() > 1 else a - a.sum() / (2 * a.numel()),
    "centre": lambda a, k: a - a.mean(k % a.dim(), keepdim=True),
    "softmax": lambda a, k: a.softmax(k % a.dim()),
    "amax": lambda a, k: a.amax(k % a.dim(), keepdim=True) * a.sin(),
    "cumsum": lambda a, k: a.cumsum(k % a.dim()) / a.shape[k % a.dim()],
    "sine": lambda a, k: a.sin(),
    "square": lambda a, k: 0.5 * a.square().sin(),
    "outer": lambda a, k: a[..., None] * torch.linspace(-1, 1, 2 + k % 3, dtype=a.dtype),
    "flatten": lambda a, k: a.reshape(-1),
    "fold": lambda a, k: a.reshape(-1, 2) if a.numel() % 2 == 0 else a,
    "index": lambda a, k: a[torch.tensor([0, -1, 0, k % len(a)])],
    "index last": lambda a, k: a[..., torch.arange(3 + k % 3) % a.shape[-1]],
    "cat": lambda a, k: torch.cat([a, 2 * a.flip(0), torch.ones_like(a[:1])], 0),
    "where": lambda a, k: torch.where(a > 0, a, a.flip(-1)),
    "gram": lambda a, k: (a.reshape(len(a), -1) @ a.reshape(len(a), -1).T).sin(),
    "matrix": lambda a, k: a @ torch.linspace(-1, 1, 3 * a.shape[-1], dtype=a.dtype).reshape(-1, 3),
    "many": lambda a, k: (a.reshape(-1)[:3, None] * torch.linspace(-1, 1, 200, dtype=a.dtype)).tanh(),
    "pad": lambda a, k: torch.nn.functional.pad(a, (k % 2, 1), value=0.3),
    "diagonal": lambda a, k: a.diagonal(k % 2, 0, 1).sin() if a.dim() > 1 and min(a.shape[:2]) > 1 else a,
}


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), min_size=1, max_size=7))
def test_chains_of_operations(steps):
    def log_p(z):
        a, total = z.reshape(2, 3), z.square().sum()
        for name, k in steps:
            if a.dim() < 4 and a.numel() < 3000:
                a = STEPS[name](a, k)
                total = total + a.reshape(-1)[:: max(1, a.numel() // 5)].sum()
        return total + a.mean()

    try:
        check(log_p, 6, sizes=(1, 11))
    except NotLowered:  # a few things are torch's
        event("not lowered")


REFUSED = {
    "numbers of two kinds": lambda z: (z.to(F32) * torch.ones(4)).sum().to(z.dtype),
    "an operation of another kind": lambda z: torch.special.i0(z).sum(),
    "truth values added": lambda z: (((z > 0) + (z > -0.5)) * z).sum(),
    "bits of a count": lambda z: (~(z > 0).sum() * z).sum(),
    "truth values times a number": lambda z: ((z > 0) * 0.1 * z).sum(),
    "a table read at a latent": lambda z: (z[0] * torch.arange(6.0, dtype=z.dtype).gather(0, z.argmax()[None])).sum(),
    "a diagonal outside": lambda z: z.reshape(2, 2).diagonal(4).cumsum(0).sum() + z.exp().sum(),
    "an order that depends on z": lambda z: z.sort().values[0],
    "an index that depends on z": lambda z: z.gather(0, z.argmax(keepdim=True))[0],
    "an empty tensor": lambda z: z[:0].sum() + z.sum(),
    "too much memory": lambda z: (z[:, None] * torch.ones(4000, dtype=z.dtype)).cumsum(1).flip(1).sin().mean(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_refused_and_torch_takes_it(name, monkeypatch):
    monkeypatch.setattr("flowvi.program.program.MAX_NUMBERS", 1 << 16)
    log_p = REFUSED[name]
    with pytest.raises(NotLowered):
        lowered(log_p, points(8, 4))

    def model():
        pyro.factor("f", log_p(pyro.sample("x", dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1))))

    density = flowvi.as_density(model, dtype=F64)
    z = points(8, 4)
    first = density.value_and_grad(z)
    for _ in range(12):
        found = density.value_and_grad(z)
    torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-9)


# In a density.

Y = torch.linspace(-1, 2, 210)


def model(y=Y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("parts", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    pyro.sample("at", dist.MultivariateNormal(torch.zeros(3), scale_tril=corr), obs=torch.ones(3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(loc, scale)), obs=y)


def used(density, z):
    """The density, after so many calls that it has its program."""
    for _ in range(10):
        density.value_and_grad(z)
    assert density._graph._programs is not None
    return density


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_model_by_its_program_and_by_torch(dtype):
    density = flowvi.as_density(model, dtype=dtype)
    z = points(100, density.dim, dtype)
    used(density, z)
    found = density.value_and_grad(z)
    with kernels.use("torch"):
        want = density.value_and_grad(z)
        value = density(z)
    tolerance = {"rtol": 1e-10, "atol": 1e-9} if dtype == F64 else {"rtol": 2e-4, "atol": 2e-3}
    torch.testing.assert_close(found, want, **tolerance)
    torch.testing.assert_close(density(z), value, **tolerance)
    with_grad = z.clone().requires_grad_()
    density(with_grad).sum().backward()
    torch.testing.assert_close(with_grad.grad, want[1], **tolerance)


def test_copies_threads_and_other_dtypes():
    density = flowvi.as_density(model, dtype=F64)
    z = points(64, density.dim)
    want = used(density, z).value_and_grad(z)
    for twin in (copy.deepcopy(density._graph), pickle.loads(pickle.dumps(density._graph))):
        for _ in range(10):
            found = twin.value_and_grad(z)
        assert torch.equal(found[0], want[0])
    found = [[] for _ in range(4)]

    def work(i):
        for _ in range(30):
            found[i].append(density.value_and_grad(z[i : i + 40]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answers in enumerate(found):
        assert all(torch.equal(v, want[0][i : i + 40]) and torch.equal(g, want[1][i : i + 40]) for v, g in answers)


def test_a_particles_numbers_do_not_depend_on_the_others():
    density = flowvi.as_density(model, dtype=F32)
    z = points(100, density.dim, F32)
    value, grad = used(density, z).value_and_grad(z)
    for size in (1, 3, 8, 50):
        part = density.value_and_grad(z[:size])
        assert torch.equal(part[0], value[:size])
        assert torch.equal(part[1], grad[:size])
    bad = z.clone()
    bad[4] = NAN
    found = density.value_and_grad(bad)
    assert found[0][4].isnan()
    keep = torch.arange(100) != 4
    assert torch.equal(found[0][keep], value[keep])


def test_forward_mode_and_other_dtypes_are_torchs():
    density = flowvi.as_density(model, dtype=F64)
    z = points(8, density.dim)
    graph = used(density, z)._graph
    _, tangent = torch.func.jvp(graph.value, (z,), (torch.ones_like(z),))
    torch.testing.assert_close(tangent, graph.value_and_grad(z)[1].sum(1))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = graph.value(torch.autograd.forward_ad.make_dual(z, torch.ones_like(z)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    assert graph._lowered(z.float()) is None


def test_a_parameter_that_changes_is_not_frozen():
    def with_param():
        shift = pyro.param("shift", lambda: torch.tensor(0.1))
        pyro.sample("x", dist.Normal(shift, 1.0))

    with pytest.warns(flowvi.errors.HeldFixedWarning):
        density = flowvi.as_density(with_param, dtype=F32)
    z = points(8, 1, F32)
    for _ in range(10):
        density.value_and_grad(z)
    pyro.get_param_store()["shift"] = torch.tensor(5.0)
    assert density._graph._programs is None
