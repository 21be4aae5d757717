"""A recorded function is the function: values, gradients, random numbers; and what can't be recorded is refused."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from flowvi import kernels
from flowvi.fit.adam import FlatParameters
from flowvi.fit.gradient import Gradient, make_gradient
from flowvi.graph import Refused, emit, keep, record, tidy
from flowvi.graph import join as joined
from flowvi.graph.bound import bound
from flowvi.kernels import linear as products


def flat(function, inputs):
    """The recorded, tidied function, and its graph."""
    module = record(function, inputs)
    state = torch.get_rng_state()
    tidy(module, inputs)
    torch.set_rng_state(state)
    return emit(module), module.graph


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def network(given):
    """Everything a step has: layers, draws that are used and one that is not, shapes, constants, a gradient."""
    w, v, x = given
    with torch.enable_grad():
        noise = torch.randn(x.shape[0], 4)
        torch.rand(3)
        h = torch.nn.functional.linear(x, w).detach() + torch.nn.functional.linear(x, w)
        h = torch.relu(h.view(h.shape).expand(h.shape)) * 1 + torch.zeros(()).add(1).log()
        z = torch.nn.functional.dropout(h, 0.5) + noise.t().t() * torch.tensor(2.0)
        loss = (z @ v).square().mean() + torch.ones_like(z).sum() / 2
        return [loss, *torch.autograd.grad(loss, [w, v])]


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    w, v = torch.randn(4, 3, dtype=dtype, requires_grad=True), torch.randn(4, 2, dtype=dtype, requires_grad=True)
    return w, v, torch.randn(5, 3, dtype=dtype)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_recording_is_the_function_at_other_values(dropout, monkeypatch):
    if not dropout:  # which writes into its own mask: then the graph is left as it is
        monkeypatch.setattr(torch.nn.functional, "dropout", lambda h, p: h)
    given = parameters()
    run, graph = flat(network, given)
    other = parameters(seed=1)
    with torch.no_grad():
        for mine, new in zip(given, other, strict=True):
            mine.copy_(new)
    torch.manual_seed(3)
    expected, after = network(given), torch.rand(2)
    torch.manual_seed(3)
    with torch.no_grad():
        found = run(*given)
    assert same(found, expected)
    assert torch.equal(torch.rand(2), after)  # the unused draw as well
    torch.manual_seed(4)
    assert not same(network(given), expected)
    if not dropout:
        whole = record(network, given).graph
        assert len(graph.nodes) < len(whole.nodes)
        named = {str(n.target) for n in graph.nodes}
        assert not named & {"aten.detach.default", "aten.expand.default", "aten.log.default", "aten.ones_like.default"}


def test_a_parameter_that_is_found_elsewhere_is_read_live():
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    own = list(layer.parameters())
    run, _ = flat(lambda given: [layer(given[-1])], [*own, x])
    with torch.no_grad():
        layer.weight.mul_(2)
        (found,) = run(*own, x)
    assert torch.equal(found, layer(x))


def test_a_buffer_is_read_live():
    layer = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3)
    run, _ = flat(lambda given: [layer(given[0])], [x])
    layer.running_mean.fill_(5.0)
    assert torch.equal(run(x)[0], layer(x))


def value(given):
    return [given[0] * 2 if given[0].sum() > 0 else given[0]]


def chosen(given):
    return [given[0][given[0] > 0]]


def changes_its_input(given):
    given[0][0].mul_(2)
    return [given[0] + 1]


NORM = nn.BatchNorm1d(3)


def changes_a_buffer(given):
    return [NORM(given[0])]


def fails(given):
    raise ValueError("no")


def lists(given):
    return [given[0] * max(given[0].tolist()[0])]


def arrays(given):
    return [given[0] * float(np.asarray(given[0].detach()).sum())]


CALLS = []


def counts(given):
    CALLS.append(1)
    return [given[0] * (1 + 1e-9 * len(CALLS))]


@pytest.mark.parametrize("function", [value, chosen, changes_its_input, changes_a_buffer, fails, lists, arrays, counts])
def test_what_is_no_list_of_operations_is_refused(function):
    with pytest.raises(Refused):
        record(function, [torch.randn(4, 3)])


def test_writing_into_own_memory_is_recorded():
    def function(given):
        out = torch.zeros(3, 2)
        out[1] = given[0]
        view = out[0]
        view.add_(given[0] * 2)
        return [out * 2, out.sum()]

    run, _ = flat(function, [torch.randn(2)])
    x = torch.randn(2)
    for _ in range(2):  # and made anew each time
        assert same(run(x), function([x]))


def test_draws_into_the_same_memory_stay_apart():
    def function(given):
        z = torch.ones(3)
        before = z.clone()
        z.uniform_()
        first = z.clone()
        z.normal_()
        return [before, first, z * given[0], z[:2] + first[:2]]

    x = torch.randn(3)
    run, _ = flat(function, [x])
    torch.manual_seed(0)
    expected = function([x])
    torch.manual_seed(0)
    assert same(run(x), expected)


def test_a_bias_that_is_not_contiguous_stays_with_torch(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda: pytest.fail)
    x, w = torch.randn(200, 100), torch.randn(100, 200)
    for bias in (torch.randn(1).expand(200), torch.randn(400)[::2]):
        run, _ = flat(lambda given: [torch.addmm(given[2], given[0], given[1])], [x, w, bias])
        assert torch.equal(run(x, w, bias)[0], torch.addmm(bias, x, w))


def test_the_large_products_are_the_same_by_either_library(monkeypatch):
    torch.manual_seed(0)
    x, w, b = torch.randn(128, 200), torch.randn(150, 200, requires_grad=True), torch.randn(150, requires_grad=True)

    def function(given):
        x, w, b = given
        with torch.enable_grad():
            y = torch.nn.functional.linear(x, w, b)
            z = torch.nn.functional.linear(y, w.t(), torch.ones(1))
            grads = torch.autograd.grad(z.square().mean(), [w, b])
        return [y, z, *grads]

    kinds = []

    def stand_in(x, weight, bias, *rest):
        kinds.append(bias is None)
        return x @ weight.t() + (0 if bias is None else bias)

    monkeypatch.setattr(products, "_onednn", lambda: stand_in)
    run, graph = flat(function, [x, w, b])
    assert sum(n.target is products.linear for n in graph.nodes) >= 4
    with torch.no_grad():
        found = run(x, w, b)
    assert {True, False} == set(kinds)
    monkeypatch.setattr(products, "_onednn", lambda: None)
    run, graph = flat(function, [x, w, b])
    assert not any(n.target is products.linear for n in graph.nodes)
    with torch.no_grad():
        plain = run(x, w, b)
    assert same(plain, function([x, w, b]))
    for a, c in zip(found, plain, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


def test_onednn_multiplies_as_torch_does():
    if products._onednn() is None:
        pytest.skip("torch's own product is as quick on this machine")
    torch.manual_seed(0)
    for x, w in (
        (torch.randn(300, 200), torch.randn(100, 200)),
        (torch.randn(200, 300).t(), torch.randn(200, 100).t()),
        (torch.randn(400, 200)[::2][:150], torch.randn(100, 500)[:, 100:300]),  # parts of larger ones
        (torch.randn(200, 900)[:, 300:600].t(), torch.randn(200, 300)[:, 50:150].t()),
    ):
        for bias in (None, torch.randn(100)):
            exact = x.double() @ w.double().t() + (0 if bias is None else bias.double())
            torch.testing.assert_close(products.linear(x, w, bias), exact.float(), rtol=1e-5, atol=1e-4)
    shape = torch.Size((1000, 1000))
    assert products.pays(shape, 100, torch.float32, torch.device("cpu"))
    assert not products.pays(shape, 100, torch.float64, torch.device("cpu"))
    assert not products.pays(torch.Size((10, 10)), 10, torch.float32, torch.device("cpu"))


class Heads(nn.Module):
    """Layers that read the same features, some of which also something else does."""

    def __init__(self, dtype, sizes=(3, 3, 5), bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 7).to(dtype)
        self.heads = nn.ModuleList(nn.Linear(7, size, bias=bias) for size in sizes).to(dtype)

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        h = self.features(x)
        a, b, c = (head(h) for head in self.heads)
        return a.exp().sum() + (torch.relu(b) * a).square().sum() + c.sigmoid().log().sum() + h.cos().sum()


class SharedHeads(Heads):
    """Heads of one and the same weights."""

    def forward(self, x):
        h = self.features(x)
        return self.heads[0](h).exp().sum() + (self.heads[0](h) + 1).square().sum() + self.heads[1](h).sin().sum()


class ReadOtherwise(Heads):
    """A head whose rows are read, one whose gradient comes from nowhere, and one of a single use."""

    def forward(self, x):
        h = self.features(x)
        a, b, c = (head(h) for head in self.heads)
        return a.flatten()[::2].sum() + b.detach().exp().sum() + c.square().sum()


class OneInAnother(Heads):
    """What comes back through one head is known only after what goes through the other."""

    def forward(self, x):
        h = self.features(x)
        a = self.heads[0](h).exp()
        return (self.heads[1](h) * a).sum() + self.heads[2](h + a.sum()).square().sum()


def gradients(net):
    own = list(net.parameters())

    def function(given):
        with torch.enable_grad():
            value = net(given[-1])
            grads = torch.autograd.grad(value, own, allow_unused=True)
        return [value, *(torch.zeros_like(p) if g is None else g for p, g in zip(own, grads, strict=True))]

    return function, own


def twice_the_same(a, w, v, x):
    h = torch.tanh(x @ a.t())
    return (linear(h, w) + (linear(h, v) + linear(h, v))).exp().sum()


def used_before(a, w, v, x):
    z = torch.tanh(a @ w + a.sin() @ v).detach()
    return linear(z, w).exp().sum() + linear(z, v).sin().sum() + x.sum() * a.sum()


def a_row_of_a_transposed_gradient(a, w, v, x):
    y = (w.view(49) * 2).view(1, 7, 7)[0].sum(0)
    return (x * y).square().sum() + (a @ v).sum()


@pytest.mark.parametrize(
    "loss", [twice_the_same, used_before, a_row_of_a_transposed_gradient], ids=lambda f: f.__name__
)
def test_products_that_are_not_quite_heads(loss):
    torch.manual_seed(0)
    own = [torch.randn(7, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(given):
        with torch.enable_grad():
            value = loss(*given)
            return [value, *torch.autograd.grad(value, given[:3])]

    x = torch.randn(6, 7, dtype=torch.float64)
    run, _ = flat(function, [*own, x])
    with torch.no_grad():
        found = run(*own, x)
    for a, b in zip(found, function([*own, x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_bias_that_is_broadcast_is_not_put_beside_others():
    torch.manual_seed(0)
    given = [torch.randn(s) for s in ((6, 7), (3, 7), (4, 7), (1,), (1,))]

    def function(given):
        x, w, v, b, c = given
        return [torch.addmm(b, x, w.t()).exp(), torch.addmm(c, x, v.t()).sin()]

    run, _ = flat(function, given)
    for a, b in zip(run(*given), function(given), strict=True):
        torch.testing.assert_close(a, b)


def products_of(graph):
    return sum(n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for n in graph.nodes)


@pytest.mark.parametrize("kind", [Heads, SharedHeads, ReadOtherwise, OneInAnother])
@pytest.mark.parametrize("bias", [True, False])
def test_heads_side_by_side_are_the_heads(kind, bias):
    net = kind(torch.float64, bias=bias)
    function, own = gradients(net)
    x = torch.randn(6, 4, dtype=torch.float64)
    before = products_of(record(function, [*own, x]).graph)
    run, graph = flat(function, [*own, x])
    assert products_of(graph) == (5 if kind is Heads else products_of(graph)) <= before
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in own:
                p.normal_()
            found = run(*own, torch.randn(6, 4, dtype=torch.float64, out=x))
        for a, b in zip(found, function([*own, x]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_heads_with_much_to_copy_stay_apart(monkeypatch):
    net = Heads(torch.float64)
    function, own = gradients(net)
    x = torch.randn(6, 4, dtype=torch.float64)
    monkeypatch.setattr(joined, "SMALL", 7 * 5 - 1)  # the third
    assert products_of(flat(function, [*own, x])[1]) == 8
    monkeypatch.setattr(joined, "SMALL", 0)
    assert products_of(flat(function, [*own, x])[1]) == products_of(record(function, [*own, x]).graph) == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "read_again"), [(1, False), (1, True), (3, False)])
def test_the_stack_bound_to_shapes_is_the_stack(dtype, size, read_again):
    num, layers, dim = 20, 3, 4
    torch.manual_seed(0)
    given = [torch.randn(s, dtype=dtype) for s in ((num, size, dim), (layers, dim), (num, layers, dim), (num, layers))]
    w = given[1].requires_grad_()

    def function(given):
        x, w, u, b = given
        with torch.enable_grad():
            v = u * 2  # in memory of its own
            y, log_det, _, score = torch.ops.flowvi.planar_stack_score(x, -x, w[None], v, b, "squareplus")
            back = torch.ops.flowvi.planar_stack_backward
            grads = back(
                y * 2,
                log_det * 3,
                x,
                w[None],
                v,
                b,
                torch.ops.flowvi.planar_stack(x, w[None], v, b, "squareplus")[2],
                "squareplus",
            )
            rest = v.sin() if read_again else x * 2
        return [y + 1, log_det + 1, score + 1, *(g + 1 for g in grads), rest]

    run, graph = flat(function, given)
    for seed in range(2):
        torch.manual_seed(seed + 1)
        others = [torch.randn_like(a) for a in given]
        with torch.no_grad():
            found = run(*others[:1], w, *others[2:])
        expected = function([others[0], w, *others[2:]])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    if importlib.util.find_spec("numba") is None:
        return
    calls = [n for n in graph.nodes if "planar_stack_" in str(n.target)]
    likes = [[a.meta["like"] if isinstance(a, torch.fx.Node) else a for a in n.args] for n in calls]
    forward, backward = (bound(n.target, like, [True] * 8) for n, like in zip(calls, likes, strict=True))
    assert forward is not None
    ins = [a.example().normal_() if hasattr(a, "example") else a for a in likes[1]]
    assert (backward(*ins)[2] is ins[4]) == (size == 1)


def u_is_w(x, w, u, b, stack):
    v = torch.tanh(u) * 2
    return stack(x, v, v, b)


def u_holds_w(x, w, u, b, stack):
    v = torch.tanh(u) * 2
    return stack(x, v[:1], v, b)


def u_is_half_of_it(x, w, u, b, stack):
    v, rest = torch.unsafe_chunk(torch.tanh(torch.cat([u, u.sin()])), 2, 0)
    return stack(x, w, v, b) + rest.square().sum()


def u_is_its_own(x, w, u, b, stack):
    return stack(x, w, torch.tanh(u) * 2, b)


@pytest.mark.parametrize("loss", [u_is_w, u_holds_w, u_is_half_of_it, u_is_its_own], ids=lambda f: f.__name__)
def test_the_gradient_of_u_takes_no_memory_that_is_read(loss):
    num, layers, dim = 6, 3, 4
    torch.manual_seed(0)
    shapes = (num, 1, dim), (1, layers, dim), (num, layers, dim), (num, layers)
    own = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def stack(x, w, u, b):
        y, log_det, _, score = kernels.planar_stack_score(1.5 * x, -x.detach(), w, u, b, "squareplus")
        return (y * score.detach()).sum() + log_det.sum()

    def function(given):
        with torch.enable_grad():
            value = loss(*given[:4], stack)
            grads = torch.autograd.grad(value, given[:4], allow_unused=True)
        return [value, *(torch.zeros_like(p) if g is None else g for p, g in zip(given[:4], grads, strict=True))]

    module = record(function, own)
    tidy(module, own)
    keep(module, range(1, 5))
    places = [torch.empty_like(p) for p in own]
    run = emit(module)
    for _ in range(2):
        with torch.no_grad():
            for p in own:
                p.normal_()
            (value,) = run(*own, *places)
        for a, b in zip([value, *places], function(own), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_a_graph_gives_stays_as_it_is_after_other_runs():
    num, layers, dim = 6, 2, 3
    torch.manual_seed(0)
    given = [torch.randn(s) for s in ((num, 1, dim), (1, layers, dim), (num, layers, dim), (num, layers))]

    def function(given):
        return torch.ops.flowvi.planar_stack_score(given[0], -given[0], *given[1:], "squareplus")[:2]

    run, _ = flat(function, given)
    first = run(*given)
    kept = [a.clone() for a in first]
    run(given[0] + 1, *given[1:])
    assert same(first, kept)


def test_views_take_the_place_of_copies():
    def function(given):
        (x,) = given
        with torch.enable_grad():
            one = torch.cat([x.expand(1, *x.shape)[0]], -1).sin()
            (back,) = torch.autograd.grad(
                (one * x[:]).sum((1,), keepdim=True).sum((1,), keepdim=True).square().sum(), x
            )
        return [one, back]

    x = torch.randn(4, 3, requires_grad=True)
    run, graph = flat(function, [x])
    with torch.no_grad():
        assert same(run(x), function([x]))
    names = [str(n.target) for n in graph.nodes]
    left = {"aten.select_backward.default", "aten.slice.Tensor", "aten.slice_backward.default", "aten.cat.default"}
    assert not left & set(names)
    assert names.count("aten.sum.dim_IntList") == 1


# Gradients.


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.calls, self.factor = 0, lambda calls: 1.0

    def loss(self, x, y):
        self.calls += 1
        noise = 0.1 * torch.randn_like(x)
        loss = self.factor(self.calls) * (self.body(x + noise).squeeze(-1) - y).square().mean()
        return loss, loss.sqrt()


def batch(seed, num=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((num, 3), (num,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recorded_gradient_is_that_of_autograd(dtype):
    net = Net(dtype)
    flat = FlatParameters(net)
    before = flat.vector.clone()
    torch.manual_seed(5)
    found = make_gradient(net.loss, flat, batch(0, dtype=dtype), batch(1, dtype=dtype))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(flat.vector, before)
    assert found.recorded
    plain = Gradient(net.loss, flat)
    for seed in range(3):
        for num in (20, 7):  # of another size by autograd
            results = []
            for gradient in (found, plain):
                torch.manual_seed(seed)
                results.append((gradient(*batch(seed, num, dtype)), flat.grad.clone()))
            assert not results[0][0].requires_grad
            assert same(*results)
        flat.vector.sub_(0.1 * flat.grad)
    assert flat.grad[: flat.parameters[0].numel()].abs().max() == 0  # the unused one, by name the first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda net, x: x * (1 + 0.1 * net.calls),  # changes from call to call
        lambda net, x: x * float(net.body[0].weight.detach().numpy().sum()),  # reads a parameter past torch
        lambda net, x: x + torch.from_numpy(x.numpy() * 2),  # reads the data past torch
        lambda net, x: x * torch.rand(1).item(),  # a draw as a number
        lambda net, x: x if net.calls < 2 else 1 / 0,  # fails the third time
    ],
)
def test_a_recording_that_would_be_something_else_is_not_used(spoil):
    net = Net()
    flat, loss = FlatParameters(net), net.loss
    before = flat.vector.clone()
    net.loss = lambda x, y: loss(spoil(net, x), y)
    assert not make_gradient(net.loss, flat, batch(0), batch(1)).recorded
    assert torch.equal(flat.vector, before)


def test_a_change_in_time_is_seen():
    net = Net()
    flat = FlatParameters(net)
    found = make_gradient(net.loss, flat, batch(0), batch(1))
    state = torch.get_rng_state()
    assert found.holds(*batch(2))
    assert torch.equal(torch.get_rng_state(), state)
    net.factor = lambda calls: 1.1
    assert not found.holds(*batch(2))
    assert Gradient(net.loss, flat).holds(*batch(2))


def test_only_the_recording_is_refused_where_that_is_asked():
    net = Net()
    flat = FlatParameters(net)
    assert not make_gradient(net.loss, flat, batch(0), batch(1), recorded=False).recorded
    assert net.calls == 0
