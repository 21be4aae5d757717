"""Steps along products that are made a part at a time are the steps along the whole gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowvi import kernels
from flowvi.fit import factored_descent
from flowvi.fit.adam import CLIP, FlatParameters
from flowvi.fit.descent import Descent
from flowvi.fit.distributed import ALONE
from flowvi.fit.factored_descent import FactoredDescent, make_descent
from flowvi.fit.gradient import Factors, make_gradient
from flowvi.kernels.linear import BY_COLUMNS

pytest.importorskip("numba", reason="products are left open where numba is installed")


SMALL = 400
"""Numbers of the products here."""


class Net(nn.Module):
    """Two layers on the same features, before and after them one each; the last is too small to be left open."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(12, dtype=dtype))
        self.body, self.one = nn.Linear(12, 40, dtype=dtype), nn.Linear(40, 30, dtype=dtype)
        self.two, self.end = nn.Linear(40, 30, bias=False, dtype=dtype), nn.Linear(30, 1, dtype=dtype)

    def loss(self, x, y):
        h = torch.tanh(self.body(x * self.scale))
        loss = (self.end(self.one(h) * torch.sigmoid(self.two(h))).squeeze(-1) - y).square().mean()
        return loss * y.abs().max().clamp_min(1.0) ** 4, -loss


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Products are left open that are as small as those here."""
    monkeypatch.setattr(factored_descent, "SMALLEST_ALONE", SMALL)


def batch(seed, dtype, num=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=dtype).clamp(-1, 1) for shape in ((num, 12), (num,))]


def recorded(dtype=torch.float64, by_columns=False):
    net = Net(dtype)
    if by_columns:
        setattr(net.body.weight, BY_COLUMNS, True)
    flat = FlatParameters(net)
    gradient = make_gradient(net.loss, flat, batch(0, dtype), batch(1, dtype))
    assert gradient.recorded
    return net, flat, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copied", [False, True])
def test_open_products_times_out_are_the_gradient(copied, dtype):
    net, flat, gradient = recorded(dtype)
    opened = gradient.openable(SMALL)
    names = [name for name, _ in net.named_parameters()]
    assert [names[product.output] for product in opened.products] == ["body.weight", "one.weight", "two.weight"]
    assert len(opened.shapes) == 5  # x, three cotangents, and h once
    assert opened.products[1].right == opened.products[2].right
    assert sorted([*opened.whole, *(product.output for product in opened.products)]) == list(range(len(names)))
    expected = gradient(*batch(2, dtype)), flat.grad.clone()
    factors = Factors([torch.full(shape, math.nan, dtype=dtype) for shape in opened.shapes] if copied else None)
    gradient.leave_open(factors, SMALL)
    flat.grad.fill_(math.nan)
    assert factors.found is None
    value = gradient(*batch(2, dtype))
    assert [tuple(f.shape) for f in factors.found] == list(opened.shapes)
    parts = flat.split(flat.grad)
    for number, left, right in opened.products:
        assert parts[number].isnan().all()  # not written
        parts[number].copy_(factors.found[left].t() @ factors.found[right])
    assert torch.equal(value, expected[0])
    torch.testing.assert_close(flat.grad, expected[1])
    assert gradient.holds(*batch(3, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize(("tile", "by_columns"), [(1, False), (100, False), (1 << 18, False), (100, True)])
def test_steps_are_those_along_the_whole_gradient(optimizer, dtype, tile, by_columns, monkeypatch):
    monkeypatch.setattr(factored_descent, "TILE", tile)
    plainly, step = [], Descent.step
    monkeypatch.setattr(Descent, "step", lambda self, lr, elbo: plainly.append(0) or step(self, lr, elbo))
    ends = []
    for is_open in (False, True):
        net, flat, gradient = recorded(dtype, by_columns)
        assert net.body.weight.is_contiguous() != by_columns
        descent = make_descent(flat, ALONE, optimizer, gradient if is_open else None)
        assert isinstance(descent, FactoredDescent) == is_open
        plainly.clear()
        for t in range(40):
            x, y = batch(t, dtype)
            if t == 20:
                y *= 30.0  # a gradient that is cut
            if t == 25:
                y[0] = math.nan  # a step that is left out
            elbo = gradient(x, y)
            if t == 27:
                elbo = elbo * math.inf  # and another
            found = descent.step(1e-3, elbo)
            assert torch.equal(found, elbo) or t == 25
            if t == 30:
                descent.forget()
        ends.append((flat.vector.clone(), *[a.clone() for a in descent.state]))
        assert descent.skipped == 2
        assert len(plainly) == (5 if is_open else 40)  # the first, the cut one, two left out, and the first again
    assert not torch.equal(ends[0][0], recorded(dtype, by_columns)[1].vector)
    for mine, whole in zip(ends[1], ends[0], strict=True):
        rtol, atol = (1e-3, 1e-4) if dtype == torch.float32 else (1e-9, 1e-9)
        torch.testing.assert_close(mine, whole, rtol=rtol, atol=atol)


def into_zeros(w, v, x):
    h = torch.zeros(len(x), 40, dtype=x.dtype)
    h[:, :12] = x
    return torch.tanh(h @ w) @ v


def written_over(w, v, x):
    h = x @ w[:12]
    h[:, :5] = h[:, :5] + x[:, :5]
    return h @ v


def of_parameters_alone(w, v, x):
    return x @ torch.softmax(w[:12] @ v, -1)


def by_way_of_a_copy(w, v, x):
    return torch.tanh(x @ w[:12].t().contiguous().t().tanh()) @ v


@pytest.mark.parametrize(
    ("network", "is_open"),
    [(into_zeros, False), (written_over, False), (of_parameters_alone, False), (by_way_of_a_copy, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_may_be_written_to_before_it_is_read_is_not_left_open(network, is_open, dtype):
    ends = []
    for factored in (False, True):
        torch.manual_seed(0)
        pair = [
            nn.Parameter(0.3 * torch.randn(40, 60, dtype=dtype)),
            nn.Parameter(0.3 * torch.randn(60, 50, dtype=dtype)),
        ]
        flat = FlatParameters(pair)

        def loss(x, y, pair=pair):
            value = (network(*pair, x).square().mean(-1) - y).square().mean()
            return value, -value

        gradient = make_gradient(loss, flat, batch(0, dtype), batch(1, dtype))
        assert gradient.recorded
        descent = make_descent(flat, ALONE, "adam", gradient if factored else None)
        assert isinstance(descent, FactoredDescent) == (factored and is_open)
        for t in range(10):
            descent.step(1e-2, gradient(*batch(t, dtype)))
        ends.append(flat.vector.clone())
    torch.testing.assert_close(*ends, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-5)


def test_a_large_product_that_is_turned_twice_is_left_open():
    torch.manual_seed(0)
    layer = nn.Linear(784, 40)
    flat = FlatParameters(layer)

    def loss(x):
        value = torch.tanh(x @ layer.weight.t().contiguous() + layer.bias).square().mean()
        return value, value

    x = [torch.randn(100, 784, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    gradient = make_gradient(loss, flat, x[:1], x[1:2])
    opened = gradient.openable(SMALL)
    factors = Factors()
    whole = gradient(x[2]), flat.grad.clone()
    gradient.leave_open(factors, SMALL)
    gradient(x[2])
    for number, left, right in opened.products:
        flat.split(flat.grad)[number].copy_(factors.found[left].t() @ factors.found[right])
    torch.testing.assert_close(flat.grad, whole[1])


def test_a_whole_gradient_is_followed_as_ever():
    _, flat, gradient = recorded()
    descent = make_descent(flat, ALONE, "adam", gradient)
    _, flat2, gradient2 = recorded()
    plain = make_descent(flat2, ALONE, "adam")
    for t in range(10):
        size = 5 if t % 3 == 2 else 6  # of another size than recorded: by autograd, and whole
        for along, follow in ((gradient, descent), (gradient2, plain)):
            follow.step(1e-2, along(*batch(t, torch.float64, size)))
    torch.testing.assert_close(flat.vector, flat2.vector, rtol=1e-12, atol=1e-12)


def test_what_has_no_products_or_no_kernels_goes_by_the_whole_gradient():
    _, flat, gradient = recorded()
    with kernels.use("torch"):
        assert type(make_descent(flat, ALONE, "adam", gradient)) is Descent
    small = nn.Linear(3, 2)
    flat = FlatParameters(small)
    gradient = make_gradient(lambda x: (small(x).square().sum(), x.sum()), flat, [torch.ones(9, 3)], [torch.rand(9, 3)])
    assert gradient.recorded
    assert type(make_descent(flat, ALONE, "adam", gradient)) is Descent


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40), st.integers(0, 9999), st.booleans()
)
def test_the_bound_is_one_and_exact_for_rows_taken_together(n, rows, columns, size, seed, alike):
    from flowvi.kernels.compiled.descent import make_bound

    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((n, rows)), rng.standard_normal((n, columns))
    if alike:
        left, right = left[:1] + 0.01 * left, right[:1] + 0.01 * right
    length = np.linalg.norm(left.T @ right)
    for dtype in (np.float32, np.float64):
        accuracy = 1e-4 if dtype == np.float32 else 1e-9
        bound = make_bound(dtype)(left.astype(dtype), right.astype(dtype), size)
        assert bound >= length * (1 - accuracy)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        accuracy *= 1 + size * lengths.sum()
        groups = -(-n // size)
        assert (
            bound
            <= (1 + accuracy)
            * sum(
                np.linalg.norm(left[i * size : (i + 1) * size].T @ right[i * size : (i + 1) * size])
                for i in range(groups)
            )
            + accuracy
        )
        for bad in (math.nan, math.inf):
            spoilt = left.astype(dtype)
            spoilt[-1, -1] = bad
            assert not math.isfinite(make_bound(dtype)(spoilt, right.astype(dtype), size))


def test_only_what_is_surely_not_cut_is_typical():
    _, flat, gradient = recorded()
    optimizer = make_descent(flat, ALONE, "adam", gradient).plain.optimizer
    assert not optimizer.is_typical(1.0)  # nothing is known yet
    optimizer.count(2.0)
    typical = float(optimizer.state[1])
    assert optimizer.is_typical(CLIP * typical)
    for length in (1.001 * CLIP * typical, math.inf, math.nan):
        assert not optimizer.is_typical(length)
