"""Flat graphs with less to do: the same values, fewer operations of the data's size."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.targets import batch
from flowvi.targets.simplify import _Shapes

Y = torch.linspace(-1.0, 2.0, 300)


def regression():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(a, sigma), obs=Y)


def mixture():
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(Y)):
        parts = dist.Categorical(torch.stack([share, 1 - share]))
        pyro.sample("y", dist.MixtureSameFamily(parts, dist.Normal(loc, scale)), obs=Y)


def student():
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("groups", 3):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.StudentT(nu, m[torch.arange(len(Y)) % 3], 0.5), obs=Y)


def large(module, size):
    """How many operations have a result of that many elements or more, views aside."""
    views = ("expand", "reshape", "unsqueeze", "slice", "permute", "get_attr")
    count = 0
    for node in module.graph.nodes:
        shape = node.meta["like"][0] if "like" in node.meta else ()
        count += math.prod(shape) >= size and not any(v in str(node.target) for v in views)
    return count


@pytest.mark.parametrize(("model", "fewer"), [(regression, 3), (mixture, 5), (student, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_values_are_the_same_and_less_is_of_the_datas_size(model, fewer, dtype, monkeypatch):
    found = []
    for simplify in (lambda module, *inputs: _Shapes(module).run(*inputs), batch.simplify):
        monkeypatch.setattr(batch, "simplify", simplify)
        density = flowvi.as_density(model, dtype=dtype)
        z = 0.5 * torch.randn(8, density.dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
        flat = density._graph.flatten(z)
        found.append((*flat(z), large(flat, 8 * len(Y))))
    (value, grad, before), (same_value, same_grad, after) = found
    tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(value, same_value, **tight)
    torch.testing.assert_close(grad, same_grad, **tight)
    assert after <= before - fewer


def test_what_is_along_the_expanded_dimension_stays():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    aten = torch.ops.aten
    wide = graph.call_function(aten.expand.default, (x, [4, 5, 3]))
    along = graph.call_function(aten._log_softmax.default, (wide, 1, False))
    other = graph.call_function(aten._log_softmax.default, (wide, 2, False))
    double = graph.call_function(aten._to_copy.default, (other,), {"dtype": torch.float64})
    copy = graph.call_function(aten._to_copy.default, (along,), {"dtype": torch.float32})
    graph.output((along, other, double, copy))
    module = torch.fx.GraphModule({}, graph)
    value = torch.randn(4, 1, 3)
    before = module(value)
    batch.simplify(module, value)
    after = module(value)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    names = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    assert names.count("aten._to_copy.default") == 1
    sizes = {str(n.args[1]): n.meta["like"][0] for n in module.graph.nodes if "softmax" in str(n.target)}
    assert sizes == {"1": torch.Size([4, 5, 3]), "2": torch.Size([4, 1, 3])}
