"""The recurrences: gradients, extremes of the parameters, and every tracer that must go through them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flowvi import kernels
from flowvi.kernels import planar, planar_root, planar_stack, radial, radial_stack
from flowvi.kernels.maxout import largest_of_window

F64 = torch.float64


def planar_parameters(layers: int, dim: int, dtype=F64):
    return (
        torch.randn(layers, dim, dtype=dtype),
        torch.randn(layers, dim, dtype=dtype),
        torch.randn(layers, dtype=dtype),
    )


@pytest.mark.parametrize("constraint", planar.CONSTRAINTS)
def test_planar_constraint_keeps_its_promises(constraint):
    torch.manual_seed(0)
    w, u = torch.randn(2, 1000, 5, dtype=F64)
    u_hat, one_plus_m = planar.constrain(w, u, constraint)
    s = (w * u).sum(-1)
    expected = (s + (s * s + 4).sqrt()) / 2 if constraint == "squareplus" else torch.log1p(s.exp())
    assert torch.allclose((w * u_hat).sum(-1), expected - 1, atol=1e-10)
    assert torch.allclose(one_plus_m, expected, atol=1e-10)
    # û differs from u along w alone.
    across = (u_hat - u) - ((u_hat - u) * w).sum(-1, keepdim=True) * w / (w * w).sum(-1, keepdim=True)
    assert across.abs().max() < 1e-10


@pytest.mark.parametrize("constraint", planar.CONSTRAINTS)
@pytest.mark.parametrize("size", [1.0, 1e-5])  # above and below where a layer fades
def test_planar_constraint_backward_is_autograds(constraint, size):
    torch.manual_seed(0)
    w = (size * torch.randn(6, 3, dtype=F64)).requires_grad_()
    u = torch.randn(6, 3, dtype=F64, requires_grad=True)
    g_u_hat, g_m = torch.randn(6, 3, dtype=F64), torch.randn(6, dtype=F64)
    u_hat, one_plus_m = planar.constrain(w, u, constraint)
    expected = torch.autograd.grad((u_hat * g_u_hat).sum() + (one_plus_m * g_m).sum(), (w, u))
    with torch.no_grad():
        found = planar.constrain_backward(g_u_hat, g_m, w, u, constraint)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constraint", planar.CONSTRAINTS)
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_extreme_planar_layers_in_float32_stay_finite_and_invertible(constraint, dim):
    torch.manual_seed(0)
    n = 20_000

    def wild(*shape: int) -> torch.Tensor:
        size = 10 ** (torch.rand(n, *[1] * (len(shape) - 1)) * (12 + 2.4771) - 12)  # 1e-12 to 300
        return torch.randn(shape) * size

    w, u, b = wild(n, dim).requires_grad_(), wild(n, dim).requires_grad_(), wild(n).requires_grad_()
    x = torch.randn(n, dim).requires_grad_()
    _, one_plus_m = planar.constrain(w, u, constraint)
    assert (one_plus_m > 0).all()  # w.û > -1
    y, log_det = planar.layer(x, w, u, b, constraint)
    grads = torch.autograd.grad(y.sum() + log_det.sum(), (x, w, u, b))
    for value in (y, log_det, *grads):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_extreme_radial_layers_in_float32_stay_finite(dim):
    torch.manual_seed(0)
    n = 20_000

    def wild(*shape: int) -> torch.Tensor:
        size = 10 ** (torch.rand(n, *[1] * (len(shape) - 1)) * (12 + 2.4771) - 12)
        return (torch.randn(shape) * size).requires_grad_()

    z0, raw_alpha, raw_s = wild(n, dim), wild(n), wild(n)
    x = torch.randn(n, dim).requires_grad_()
    assert (radial.positive(raw_alpha) > 0).all()
    y, log_det = radial.layer(x, z0, raw_alpha, raw_s)
    back = radial.layer_inverse(y, z0, raw_alpha, raw_s)
    grads = torch.autograd.grad(y.sum() + log_det.sum() + back.sum(), (x, z0, raw_alpha, raw_s))
    for value in (y, log_det, back, *grads):
        assert torch.isfinite(value).all()


def test_special_points():
    # w = 0, u = 0, x at a radial centre: each gave NaN or a jump in naive code.
    zero = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    y, log_det = planar.layer(torch.ones(1, 3, dtype=F64), zero, torch.ones(1, 3, dtype=F64), zero[:, 0], "squareplus")
    assert torch.equal(y, torch.ones(1, 3, dtype=F64))
    assert torch.isfinite(torch.autograd.grad(y.sum() + log_det.sum(), zero)[0]).all()
    y, log_det = planar.layer(torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(()), "squareplus")
    assert torch.equal(y, torch.ones(3))
    assert log_det.item() == 0
    _, log_det = planar.layer(
        torch.zeros(1), torch.full((1,), 5.0), torch.full((1,), -3.0), torch.zeros(()), "softplus"
    )
    assert torch.isfinite(log_det)
    centre = torch.ones(1, 2, dtype=F64, requires_grad=True)
    raw = torch.tensor([0.7], dtype=F64)
    y, log_det = radial.layer(centre, torch.ones(1, 2, dtype=F64), raw, -raw)
    assert torch.equal(y, torch.ones(1, 2, dtype=F64))
    assert torch.isfinite(torch.autograd.grad(y.sum() + log_det.sum(), centre)[0]).all()
    assert torch.equal(radial.layer_inverse(y, torch.ones(1, 2, dtype=F64), raw, -raw), y)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_root_solves_its_equation_to_rounding(dtype):
    torch.manual_seed(0)
    smallest = -6 if dtype == torch.float32 else -12  # below that, m = (1 + m) - 1 is rounding here
    one_plus_m = 10 ** (torch.rand(100_000, dtype=dtype) * (5 - smallest) + smallest)
    p = torch.randn(100_000, dtype=dtype) * 10 ** (torch.rand(100_000, dtype=dtype) * 6 - 4)
    c = p + (one_plus_m - 1) * torch.tanh(p)
    found = planar_root(c, one_plus_m)
    residual = (found + (one_plus_m - 1) * torch.tanh(found) - c).abs()
    size = c.abs() + found.abs() + (one_plus_m - 1).abs() * torch.tanh(found).abs()
    assert (residual <= 8 * torch.finfo(dtype).eps * size).all()
    assert planar_root(torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)).item() == 0


def test_root_gradients_are_implicit():
    c = torch.linspace(-4, 4, 9, dtype=F64, requires_grad=True)
    one_plus_m = torch.linspace(0.1, 5, 9, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(planar_root, (c, one_plus_m))
    assert torch.autograd.gradgradcheck(planar_root, (c, one_plus_m))


def test_stacks_pass_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(3, 2, dtype=F64)
    for constraint in planar.CONSTRAINTS:
        args = [a.requires_grad_() for a in (x.clone(), *planar_parameters(4, 2))]
        assert torch.autograd.gradcheck(lambda *a, c=constraint: planar_stack(*a, c)[:2], args)
    args = [a.requires_grad_() for a in (x.clone(), torch.randn(4, 2, dtype=F64), *torch.randn(2, 4, dtype=F64))]
    assert torch.autograd.gradcheck(lambda *a: radial_stack(*a)[:2], args)


def test_operators_pass_opcheck():
    torch.manual_seed(0)
    x = torch.randn(3, 2, dtype=F64)
    torch.library.opcheck(torch.ops.flowvi.planar_stack.default, (x, *planar_parameters(4, 2), "squareplus"))
    torch.library.opcheck(
        torch.ops.flowvi.radial_stack.default, (x, torch.randn(4, 2, dtype=F64), *torch.randn(2, 4, dtype=F64))
    )
    torch.library.opcheck(torch.ops.flowvi.planar_root.default, (x[:, 0], x[:, 1].exp()))


def test_tracers_go_through():
    torch.manual_seed(0)
    x, params = torch.randn(5, 2, dtype=F64), planar_parameters(3, 2)

    def loss(x, w, u, b):
        y, log_det, _ = planar_stack(x, w, u, b, "squareplus")
        return y.square().sum() + log_det.sum()

    expected = torch.func.grad(loss, argnums=(0, 1, 2, 3))(x, *params)
    traced = make_fx(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(x, *params)
    assert "flowvi.planar_stack_backward" in traced.code
    for a, b in zip(traced(x, *params), expected, strict=True):
        assert torch.allclose(a, b)
    leaves = [p.clone().requires_grad_() for p in params]
    scripted = torch.jit.trace(loss, (x, *leaves))
    for a, b in zip(torch.autograd.grad(scripted(x, *leaves), leaves), expected[1:], strict=True):
        assert torch.allclose(a, b)
    many = torch.randn(6, 3, 2, dtype=F64)  # six sets of directions at once
    found = torch.func.vmap(lambda w: planar_stack(x, w, *params[1:], "squareplus")[0])(many)
    assert torch.allclose(found[4], planar_stack(x, many[4], *params[1:], "squareplus")[0])


def test_layers_of_each_datums_own_are_traced_with_symbolic_sizes():
    x, w, u, b = (torch.randn(*size, dtype=F64) for size in ((4, 6, 2), (3, 2), (4, 3, 2), (4, 3)))

    def loss(x, w, u, b):
        y, log_det, _ = planar_stack(x, w, u, b, "squareplus")
        return y.square().sum() + log_det.sum()

    traced = make_fx(loss, tracing_mode="symbolic")(x, w, u, b)
    assert torch.allclose(traced(x, w, u, b), loss(x, w, u, b))


def test_a_second_derivative_raises_instead_of_being_wrong():
    x, params = torch.randn(5, 2, dtype=F64, requires_grad=True), planar_parameters(3, 2)
    y, _, _ = planar_stack(x, *params, "squareplus")
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# The largest of a window.


@pytest.mark.parametrize("shape", [(7, 4, 5), (3, 1, 2), (2, 3, 4, 17)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_largest_of_a_window_is_torchs(shape, backend):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with kernels.use(backend):
        assert torch.equal(largest_of_window(x), x.amax(-2))
        assert torch.autograd.gradcheck(largest_of_window, x)
        assert torch.autograd.gradgradcheck(largest_of_window, x)
        torch.testing.assert_close(
            torch.vmap(largest_of_window, in_dims=-1)(x.unsqueeze(-1).expand(*shape, 2)),
            x.amax(-2).expand(2, *shape[:-2], shape[-1]),
        )
        bad = x.detach().clone()
        bad[0, ..., 0, 0] = math.nan
        assert torch.equal(largest_of_window(bad).isnan(), bad.amax(-2).isnan())
        ops, g = torch.ops.flowvi, torch.randn_like(x[..., 0, :])
        _, which = ops.largest(x.detach())
        torch.library.opcheck(ops.largest.default, (x.detach(),))
        torch.library.opcheck(ops.largest_backward.default, (g.detach(), which, shape[-2]))
        per_row = torch.vmap(lambda a, b: ops.largest_backward(a, b, shape[-2]))(g.detach(), which)
        assert torch.equal(per_row, ops.largest_backward(g.detach(), which, shape[-2]))


def test_of_equal_ones_the_first_is_taken():
    x = torch.ones(2, 3, 4, requires_grad=True)
    largest_of_window(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1).expand(2, 3, 4))
