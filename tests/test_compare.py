"""Models by evidence, where the evidence is known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import DimensionError, OptionError, UntrustedWarning
from flowvi.flow import Flow, FlowSpec
from flowvi.posterior import History, Posterior
from flowvi.targets import as_density

F64 = torch.float64
DATA = torch.tensor([0.3, 1.9, 1.1, 0.2, 1.4], dtype=F64)


def normal_mean(sd):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), sd))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    return model


def exact(sd, data=DATA):
    """Mean and sd of mu given the data, and the log evidence."""
    n = len(data)
    precision = n + 1 / sd**2
    covariance = torch.eye(n, dtype=F64) + sd**2 * torch.ones(n, n, dtype=F64)
    evidence = dist.MultivariateNormal(torch.zeros(n, dtype=F64), covariance).log_prob(data)
    return float(data.sum()) / precision, precision**-0.5, float(evidence)


def posterior(sd, data=DATA, *, off=0.0, wide=1.1):
    """A Gaussian q beside the exact posterior."""
    loc, scale, _ = exact(sd, data)
    density = as_density(normal_mean(sd), args=(data,))
    flow = Flow.from_spec(FlowSpec("planar", 1, 0, "diag"), loc=loc + off, scale=wide * scale, dtype=F64)
    return Posterior(
        flow, density, config={}, timing={}, history=History(torch.arange(0), torch.zeros(0), torch.zeros(0)), seed=0
    )


def test_evidences_and_probabilities_are_right():
    sds = {"narrow": 0.1, "good": 1.0, "wide": 30.0}
    table = flowvi.compare({name: posterior(sd) for name, sd in sds.items()})
    true = {name: exact(sd)[2] for name, sd in sds.items()}
    assert list(table.index) == sorted(true, key=true.get, reverse=True)
    assert list(table["rank"]) == [0, 1, 2]
    total = sum(math.exp(value) for value in true.values())
    for name, row in table.iterrows():
        assert row["log_evidence"] == pytest.approx(true[name], abs=5 * row["se"])
        assert row["se"] < 0.01
        assert row["probability"] == pytest.approx(math.exp(true[name]) / total, abs=0.01)
        assert row["log_evidence_diff"] == pytest.approx(max(true.values()) - true[name], abs=5 * row["dse"] + 1e-12)
        assert row["elbo"] <= row["log_evidence"]
    assert table["log_evidence_diff"].iloc[0] == table["dse"].iloc[0] == 0
    assert table["probability"].sum() == pytest.approx(1)
    assert table["trusted"].all()
    assert set(table["warning"]) == {""}


def test_what_cannot_be_trusted_is_told():
    with pytest.warns(UntrustedWarning, match="bad"):
        table = flowvi.compare({"bad": posterior(1.0, wide=0.2), "good": posterior(1.0)})
    assert list(table["trusted"][["bad", "good"]]) == [False, True]
    assert "Do not trust" in table["warning"]["bad"]


def test_a_refined_posterior_brings_its_own_evidence():
    poor = posterior(1.0, off=0.5, wide=0.5)
    refined = poor.refine(num_chains=32, ess=500.0, seed=0)
    table = flowvi.compare({"refined": refined, "wide": posterior(30.0)})
    assert table["trusted"].all()
    row = table.loc["refined"]
    assert row["log_evidence"] == pytest.approx(exact(1.0)[2], abs=4 * row["se"])
    assert row["se"] < 0.05


@pytest.mark.parametrize("wrong", [{}, {"one": posterior(1.0)}, [posterior(1.0), posterior(2.0)], {"a": 1, "b": 2}])
def test_bad_input_is_named(wrong):
    with pytest.raises(OptionError, match="compare takes"):
        flowvi.compare(wrong)


def test_different_data_cannot_be_compared():
    with pytest.raises(DimensionError, match="different data"):
        flowvi.compare({"a": posterior(1.0), "b": posterior(1.0, DATA[:3])})
    with pytest.raises(DimensionError, match="different data"):
        flowvi.compare({"a": posterior(1.0), "b": posterior(1.0, DATA + 1)})
