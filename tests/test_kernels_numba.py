"""The compiled kernels against plain torch: values, gradients, extremes, NaN, threads, forks, and their absence."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from flowvi import kernels
from flowvi.errors import OptionError
from flowvi.kernels import dispatch, planar, radial
from flowvi.transforms import PlanarStack, RadialStack

pytest.importorskip("numba")

from flowvi.kernels.compiled import planar_each, threads

F32, F64 = torch.float32, torch.float64
OPS = torch.ops.flowvi
# D 2: a kernel of its own; D 12: the Gram recurrence (planar) and the same tiles (radial).
SHAPES = [(2, 300, 5), (12, 70, 70)]


def planar_case(dim, size, layers, dtype, *, front=(), wild=False):
    w, u = torch.randn(2, *front, layers, dim, dtype=dtype)
    if wild:  # 1e-12 to 300
        w, u = (a * 10 ** (torch.rand(*front, layers, 1, dtype=dtype) * 14.47 - 12) for a in (w, u))
    else:  # of the size that a learnt flow has: many layers of size 1 would magnify rounding without bound
        w, u = w / dim**0.5, 2 * u / (dim * layers) ** 0.5
    return torch.randn(*front, size, dim, dtype=dtype), w, u, torch.randn(*front, layers, dtype=dtype)


def radial_case(dim, size, layers, dtype, *, front=(), wild=False):
    scale = 10 ** (torch.rand(*front, layers, dtype=dtype) * 14.47 - 12) if wild else 1.0
    x, z0 = (torch.randn(*front, n, dim, dtype=dtype) for n in (size, layers))
    raw_alpha, raw_s = torch.randn(2, *front, layers, dtype=dtype)
    return x, z0, raw_alpha * scale, raw_s * scale


def results(family, case, *, constraint="squareplus", paths=(True, False)):
    """Everything the operators compute from a case, by name."""
    options = (constraint,) if family == "planar" else ()
    x, *params = case
    generator = torch.Generator().manual_seed(1)  # of its own: threads share the global one
    score, g_y = torch.randn(2, *x.shape, dtype=x.dtype, generator=generator)
    g_log_det = torch.randn(x.shape[:-1], dtype=x.dtype, generator=generator)
    out = {}
    y, log_det, kept, new_score = getattr(OPS, f"{family}_stack_score")(x, score, *params, *options)
    out |= {"y": y, "log_det": log_det, "kept": kept, "score": new_score}
    plain = getattr(OPS, f"{family}_stack")(x, *params, *options)
    out |= {f"{name}, no score": v for name, v in zip(("y", "log_det", "kept"), plain, strict=True)}
    for with_log_det in paths:
        g = g_log_det if with_log_det else None
        grads = getattr(OPS, f"{family}_stack_backward")(g_y, g, x, *params, kept, *options)
        out |= {f"gradient {i}, log-det {with_log_det}": v for i, v in enumerate(grads)}
    back, back_log_det, kept_back = getattr(OPS, f"{family}_stack_inverse")(y, *params, *options)
    out |= {"x of y": back, "log_det of the inverse": back_log_det, "kept by the inverse": kept_back}
    for given in ((g_y, g_log_det), (g_y, None), (None, g_log_det)):
        grads = getattr(OPS, f"{family}_stack_inverse_backward")(*given, x, *params, kept, *options)
        names = [name for name, g in zip(("x", "log-det"), given, strict=True) if g is not None]
        out |= {f"gradient {i} of the inverse, {' and '.join(names)}": v for i, v in enumerate(grads)}
    return out


def agree(found, expected, tolerance):
    for name, value in expected.items():
        size = value.abs().amax().clamp_min(1)
        assert torch.isfinite(found[name]).all(), name
        assert ((found[name] - value).abs().amax() / size).item() < tolerance, name


def stays_finite(family, case):
    """All results of extreme parameters are finite, and in double precision the values are torch's."""
    found = results(family, case)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
    if case[0].dtype == F64:
        with kernels.use("torch"):
            expected = results(family, case)
        agree({n: found[n] for n in ("y", "log_det")}, {n: expected[n] for n in ("y", "log_det")}, 1e-9)


CASES = {"planar": planar_case, "radial": radial_case}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize(("dim", "size", "layers"), SHAPES)
def test_kernels_agree_with_torch_in_double_precision(family, dim, size, layers):
    case = CASES[family](dim, size, layers, F64)
    for constraint in planar.CONSTRAINTS if family == "planar" else ("",):
        found = results(family, case, constraint=constraint)
        with kernels.use("torch"):
            expected = results(family, case, constraint=constraint)
        agree(found, expected, 1e-9)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize(("dim", "size", "layers"), SHAPES)
def test_single_precision_kernels_are_as_near_the_truth_as_torch(family, dim, size, layers):
    case = CASES[family](dim, size, layers, F32)
    found = results(family, case)
    with kernels.use("torch"):
        plain = results(family, case)
        truth = results(family, tuple(a.double() for a in case))
    for name, value in truth.items():
        size_ = value.abs().amax().clamp_min(1)
        error, by_torch = ((v[name].double() - value).abs().amax() / size_ for v in (found, plain))
        assert error < 4 * by_torch + 2e-6, name


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dim", [2, 12])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_extreme_parameters_stay_finite(family, dim, dtype):
    # One layer at a time: a stack of such layers overflows in any arithmetic.
    for _ in range(60):
        stays_finite(family, CASES[family](dim, 40, 1, dtype, wild=True))


@pytest.mark.parametrize("dim", [2, 12])
def test_log_determinants_of_many_strong_layers_do_not_overflow(dim):
    # The product of determinants leaves the range of float32 long before its logarithm does.
    x, w, u, b = planar_case(dim, 50, 60, F32)
    w, b = w / w.norm(dim=-1, keepdim=True), b * 0
    for size in (-30.0, 30.0):
        u = size * w
        x_ = x * 0
        found = kernels.planar_stack(x_, w, u, b, "squareplus")[1]
        with kernels.use("torch"):
            expected = kernels.planar_stack(x_.double(), w.double(), u.double(), b.double(), "squareplus")[1]
        assert abs(expected[0].item()) > 100
        assert torch.allclose(found.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dim", [2, 12])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_particle_that_is_nan_stays_nan_and_spoils_no_other(family, dim, dtype):
    case = CASES[family](dim, 300, 5, dtype)
    clean = results(family, case)
    case[0][7] = torch.nan
    found = results(family, case)
    for name in ("y", "log_det", "score", "x of y"):
        assert found[name][7].isnan().all(), name
        others = [i for i in range(300) if i != 7]
        assert torch.allclose(found[name][others], clean[name][others], rtol=1e-4, atol=1e-4), name
    assert found["kept"][:, 7].isnan().all()
    assert found["gradient 1, log-det True"].isnan().any()  # what depends on it says so


OWN = [1, 3, 40]
"""Particles of each datum: one, a few, and so many that each datum's stack goes through the kernels of a shared one."""


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("size", OWN)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_layers_of_each_datums_own(family, size, dtype):
    case = CASES[family](3, size, 4, dtype, front=(37,))
    tolerance = 1e-9 if dtype == F64 else 1e-4
    for constraint in planar.CONSTRAINTS if family == "planar" else ("",):
        found = results(family, case, constraint=constraint)
        with kernels.use("torch"):
            expected = results(family, case, constraint=constraint)
            one = results(family, tuple(a[20] for a in case), constraint=constraint)
        agree(found, expected, tolerance)
        agree({"y": found["y"][20], "log_det": found["log_det"][20]}, {n: one[n] for n in ("y", "log_det")}, tolerance)


def test_so_many_layers_of_each_datums_own_that_few_data_fit_the_cache():
    case = planar_case(120, 1, 70, F64, front=(18,))
    assert case[1][0].numel() > planar_each.SMALL
    found = results("planar", case)
    with kernels.use("torch"):
        agree(found, results("planar", case), 1e-9)


@pytest.mark.parametrize("size", OWN)
@pytest.mark.parametrize("dim", [2, 12])
def test_log_determinants_of_each_datums_own_layers_do_not_overflow(size, dim):
    # Strong layers beside weak ones: only some of the particles that go together leave the range of float32.
    x, w, _, b = planar_case(dim, size, 60, F32, front=(21,))
    w, b, x = w / w.norm(dim=-1, keepdim=True), b * 0, x * 0
    strength = torch.linspace(-30, 30, 21).reshape(-1, 1, 1)
    found = kernels.planar_stack(x, w, strength * w, b, "squareplus")[1]
    with kernels.use("torch"):
        expected = kernels.planar_stack(x.double(), w.double(), (strength * w).double(), b.double(), "squareplus")[1]
    assert expected.min() < -100
    assert expected.max() > 100
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("size", OWN)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_extreme_layers_of_each_datums_own_stay_finite(family, size, dtype):
    for _ in range(20):
        stays_finite(family, CASES[family](5, size, 1, dtype, wild=True, front=(20,)))


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("size", OWN)
def test_a_datum_that_is_nan_spoils_no_other(family, size):
    case = CASES[family](5, size, 4, F32, front=(20,))
    clean = results(family, case)
    case[0][7] = torch.nan
    found = results(family, case)
    others = [i for i in range(20) if i != 7]
    for name, value in clean.items():
        assert torch.allclose(found[name][others], value[others], rtol=1e-4, atol=1e-4), name
    for name in ("y", "log_det", "score", "x of y", "kept", "gradient 1, log-det True"):
        assert found[name][7].isnan().any(), name


def one_direction(front, size, layers, dim, dtype):
    """A planar case whose directions w all data share, and the same with a copy of them for each datum."""
    x, w, u, b = planar_case(dim, size, layers, dtype, front=front)
    w = w[(0,) * len(front)]
    return (x, w.reshape(*(1,) * len(front), layers, dim), u, b), (x, w.expand(*front, layers, dim), u, b)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("front", [(6,), (2, 3)])
def test_directions_that_all_data_share(backend, size, front):
    shared, each = one_direction(front, size, 4, 3, F64)
    with kernels.use(backend):
        found, expected = results("planar", shared), results("planar", each)
    for name in [name for name in expected if name.startswith("gradient 1")]:
        expected[name] = expected[name].sum_to_size(shared[1].shape)
    agree(found, expected, 1e-10)
    assert [found[name].shape for name in found] == [expected[name].shape for name in expected]


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_shared_directions_by_autograd_and_vmap(backend):
    (x, w, u, b), _ = one_direction((6,), 2, 3, 3, F64)
    with kernels.use(backend):
        y, log_det, t = OPS.planar_stack(x, w, u, b, "squareplus")
        torch.library.opcheck(OPS.planar_stack_score.default, (x, -x, w, u, b, "squareplus"))
        torch.library.opcheck(OPS.planar_stack_backward.default, (y, log_det, x, w, u, b, t, "squareplus"))
        args = [a.requires_grad_() for a in (x, w[0].clone(), u, b)]
        assert torch.autograd.gradcheck(lambda *a: kernels.planar_stack(*a, "squareplus")[:2], args)
        assert torch.autograd.gradcheck(lambda *a: kernels.planar_stack_inverse(*a, "squareplus"), args)

        def loss(x, w, u, b):
            y, log_det, _ = kernels.planar_stack(x, w, u, b, "squareplus")
            return y.square().sum() + log_det.sum()

        grad = torch.func.grad(loss, argnums=(1, 2))
        many = torch.stack([u, 2 * u, -u]).detach()
        found = torch.func.vmap(grad, in_dims=(None, None, 0, None))(x, args[1], many, b)
        for i, one in enumerate(many):
            for a, wanted in zip(found, grad(x, args[1], one, b), strict=True):
                torch.testing.assert_close(a[i], wanted)


def test_radial_stacks_of_large_dimension_go_particle_by_particle():
    case = radial_case(300, 9, 4, F64)
    found = results("radial", case)
    with kernels.use("torch"):
        agree(found, results("radial", case), 1e-10)


@pytest.mark.parametrize("family", CASES)
def test_scores_are_those_of_autograd(family):
    x, *params = CASES[family](2, 20, 6, F64)
    options = ("squareplus",) if family == "planar" else ()
    stack, inverse = getattr(kernels, f"{family}_stack"), getattr(kernels, f"{family}_stack_inverse")
    y, _, _, score = getattr(kernels, f"{family}_stack_score")(x, -x, *params, *options)
    y = y.detach().requires_grad_()
    back, back_log_det = inverse(y, *params, *options)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(back_log_det, -stack(x, *params, *options)[1], atol=1e-9)
    log_q = -0.5 * back.square().sum(-1) + back_log_det
    assert torch.allclose(torch.autograd.grad(log_q.sum(), y)[0], score, atol=1e-7)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dim", [2, 12])
def test_gradcheck(family, dim):
    options = ("squareplus",) if family == "planar" else ()
    args = [a.requires_grad_() for a in CASES[family](dim, 3, 3, F64)]
    assert torch.autograd.gradcheck(lambda *a: getattr(kernels, f"{family}_stack")(*a, *options)[:2], args)
    assert torch.autograd.gradcheck(lambda *a: getattr(kernels, f"{family}_stack_inverse")(*a, *options), args)

    def with_score(x, *params):
        return getattr(kernels, f"{family}_stack_score")(x, torch.ones_like(x), *params, *options)[:2]

    assert torch.autograd.gradcheck(with_score, args)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_operators_pass_opcheck(backend):
    with kernels.use(backend):
        for front in ((), (2,)) if backend == "numba" else ((2,),):
            x, *params = planar_case(2, 3, 4, F64, front=front)
            y, g, t = OPS.planar_stack(x, *params, "squareplus")
            for name, args in {
                "planar_stack": (x, *params),
                "planar_stack_score": (x, -x, *params),
                "planar_stack_backward": (y, g, x, *params, t),
                "planar_stack_inverse": (y, *params),
                "planar_stack_inverse_backward": (y, g, x, *params, t),
            }.items():
                torch.library.opcheck(getattr(OPS, name).default, (*args, "squareplus"))
            x, *params = radial_case(2, 3, 4, F64, front=front)
            y, g, r = OPS.radial_stack(x, *params)
            for name, args in {
                "radial_stack": (x, *params),
                "radial_stack_score": (x, -x, *params),
                "radial_stack_backward": (y, g, x, *params, r),
                "radial_stack_inverse": (y, *params),
                "radial_stack_inverse_backward": (y, g, x, *params, r),
            }.items():
                torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("family", CASES)
def test_vmap_over_parameters_is_one_call(family):
    x, *params = CASES[family](3, 5, 4, F64, front=(6,))
    options = ("squareplus",) if family == "planar" else ()

    def loss(x, *params):
        y, log_det, _ = getattr(kernels, f"{family}_stack")(x, *params, *options)
        return y.square().sum() + log_det.sum()

    argnums = tuple(range(len(params) + 1))
    grad = torch.func.grad(loss, argnums=argnums)
    found = torch.func.vmap(grad)(x, *params)
    for i in range(6):
        for a, b in zip(found, grad(x[i], *(p[i] for p in params)), strict=True):
            assert torch.allclose(a[i], b)
    # A batch over some of the arguments, and points alone.
    some = torch.func.vmap(grad, in_dims=(None, 0, *[None] * (len(params) - 1)))(
        x[0], *[params[0]], *(p[0] for p in params[1:])
    )
    assert torch.allclose(some[1][3], grad(x[0], params[0][3], *(p[0] for p in params[1:]))[1])
    points = torch.func.vmap(grad, in_dims=(0, *[None] * len(params)))(x, *(p[0] for p in params))
    assert torch.allclose(points[1][4], grad(x[4], *(p[0] for p in params))[1])
    calls = []
    with _Count(calls):
        torch.func.vmap(loss)(x, *params)
    assert sum(name == f"flowvi.{family}_stack.default" for name in calls) == 1


class _Count(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stack", [PlanarStack, RadialStack])
def test_transforms_compile_in_one_graph(stack):
    flow = stack(2, num_flows=3).double()
    x = torch.randn(5, 2, dtype=F64)

    def loss(x):
        y, log_det, score = flow.forward_with_score(x, -x)
        return y.square().sum() + log_det.sum() + flow.inverse(y.detach()).sum(), score

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, found = loss(x), compiled(x)
    assert torch.allclose(found[0], expected[0])
    assert torch.allclose(found[1], expected[1])
    for a, b in zip(*(torch.autograd.grad(v[0], list(flow.parameters())) for v in (found, expected)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_step_is_the_operators_without_a_tape(family, dtype):
    x, *params = CASES[family](2, 300, 5, dtype)
    flat = torch.cat([p.reshape(-1) for p in params])
    grad = torch.full_like(flat, torch.nan)  # overwritten, not added to

    def views(vector):
        parts = vector.split([p.numel() for p in params])
        return tuple(part.view(p.shape) for part, p in zip(parts, params, strict=True))

    options = ("squareplus",) if family == "planar" else ()
    make = getattr(kernels, f"{family}_step")
    g_z, g_log_det = torch.randn_like(x), torch.randn(300, dtype=dtype)
    tolerance = 1e-9 if dtype == F64 else 1e-4
    for backend in ("numba", "torch"):
        with kernels.use(backend):
            step = make(*views(flat), *options, grads=views(grad), num_particles=300)
            bare = make(*views(flat), *options, grads=views(grad), num_particles=300, with_score=False)
        for _ in range(2):
            z, log_det, score = step.forward(x)
            leaves = [a.detach().clone().requires_grad_() for a in (x, *views(flat))]
            expected = getattr(kernels, f"{family}_stack_score")(leaves[0], -x, *leaves[1:], *options)
            for a, b in zip((z, log_det, score), (*expected[:2], expected[3]), strict=True):
                assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)
            for cotangent in (g_log_det, None):
                g_x = step.backward(g_z, cotangent)
                wanted = torch.autograd.grad(
                    expected[:2],
                    leaves,
                    (g_z, torch.zeros_like(g_log_det) if cotangent is None else cotangent),
                    retain_graph=True,
                )
                for a, b in zip((g_x, *views(grad)), wanted, strict=True):
                    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max())
            assert bare.forward(x, x)[2] is None
            flat.mul_(0.9)  # new values in the same memory


def test_threads_share_out_the_particles():
    cases = {
        "planar": [
            planar_case(2, 20_000, 40, F64),
            planar_case(12, 9_000, 40, F64),
            planar_case(3, 2, 40, F64, front=(9_000,)),
            one_direction((9_000,), 2, 40, 3, F64)[0],
        ],
        "radial": [radial_case(2, 20_000, 40, F64), radial_case(3, 2, 40, F64, front=(9_000,))],
    }
    for family, many in cases.items():
        for case in many:
            one = results(family, case)
            torch.set_num_threads(3)
            try:
                agree(results(family, case), one, 1e-8)
            finally:
                torch.set_num_threads(1)


def test_two_python_threads_at_once():
    torch.set_num_threads(2)  # each of them would split its work as well
    case = planar_case(2, 20_000, 40, F32)
    expected = results("planar", case, paths=(False,))
    found, errors = [], []

    def work():
        try:
            found.extend(results("planar", case, paths=(False,)) for _ in range(3))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    for each in found:
        for name, value in expected.items():
            assert torch.equal(each[name], value), name


def _in_a_child(case, queue):
    queue.put(kernels.planar_stack(*case, "squareplus")[1].double().sum().item())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_use_works():
    # D 2: torch's own matrix products are no part of it; their threads don't survive a fork.
    case = planar_case(2, 20_000, 40, F32)
    torch.set_num_threads(2)
    here = kernels.planar_stack(*case, "squareplus")[1].double().sum().item()  # the pool exists now
    assert threads._pools
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(case, queue))
    child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0
    assert queue.get() == pytest.approx(here, rel=1e-6)


def test_the_choice_of_kernels():
    assert kernels.in_use() == "auto"
    with kernels.use("torch"):
        assert kernels.in_use() == "torch"
        assert dispatch.compiled("planar", torch.zeros(1)) is None
        with kernels.use("numba"):
            assert dispatch.compiled("planar", torch.zeros(1)) is not None
        assert kernels.in_use() == "torch"
    assert kernels.in_use() == "auto"
    for served in (torch.zeros(2, dtype=torch.float16), torch.zeros(0), torch.zeros(2, device="meta")):
        assert dispatch.compiled("planar", served) is None
    with pytest.raises(OptionError, match="auto, torch, numba, not 'cuda'"):
        kernels.use("cuda")


def test_without_numba_torch_does_it_all(monkeypatch):
    for cached in (dispatch.has_numba, dispatch._module):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [n for n in sys.modules if n.startswith("flowvi.kernels.compiled")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        with pytest.raises(OptionError, match="pip install numba"):
            kernels.use("numba")
        assert dispatch.compiled("planar", torch.zeros(1)) is None
        case = planar_case(2, 10, 3, F64)
        found = results("planar", case)
        with kernels.use("torch"):
            agree(found, results("planar", case), 1e-15)
        stack = PlanarStack(2, num_flows=3)
        x = torch.randn(5, 2)
        assert torch.allclose(stack.inv(stack(x) + 0), x, atol=1e-5)
    finally:
        for cached in (dispatch.has_numba, dispatch._module):
            cached.cache_clear()


def test_importing_flowvi_does_not_import_numba():
    code = "import sys, flowvi; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tanh_of_the_kernels():
    import numba
    import numpy as np

    from flowvi.kernels.compiled.tanh import tanh

    @numba.njit(error_model="numpy")
    def each(x, out):
        for i in range(len(x)):
            out[i] = tanh(x[i])

    grid = np.concatenate([np.linspace(-25, 25, 100_001), 10.0 ** np.linspace(-30, 1, 10_001)])
    for dtype, absolute, relative in ((np.float32, 2e-7, 8e-7), (np.float64, 5e-16, 1e-15)):
        x = grid.astype(dtype)
        out = np.empty_like(x)
        each(x, out)
        truth = np.tanh(x.astype(np.longdouble))
        assert np.abs(out - truth).max() < absolute
        assert (np.abs(out - truth) / np.maximum(np.abs(truth), 1e-35)).max() < relative
        assert np.abs(out).max() <= 1
        special = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
        out = np.empty_like(special)
        each(special, out)
        np.testing.assert_array_equal(out, [np.nan, 1, -1, 0])


def test_reference_functions_take_dimensions_in_front():
    x, w, u, b = planar_case(3, 4, 5, F64, front=(2, 3))
    y, log_det, t = planar.stack_forward(x, w, u, b, "squareplus")
    one = planar.stack_forward(x[1, 2], w[1, 2], u[1, 2], b[1, 2], "squareplus")
    for many, single in zip((y, log_det, t), one, strict=True):
        assert torch.allclose(many[1, 2], single)
    x, z0, raw_alpha, raw_s = radial_case(3, 4, 5, F64, front=(2, 3))
    one = radial.stack_forward(x[1, 2], z0[1, 2], raw_alpha[1, 2], raw_s[1, 2])
    for many, single in zip(radial.stack_forward(x, z0, raw_alpha, raw_s), one, strict=True):
        assert torch.allclose(many[1, 2], single)
