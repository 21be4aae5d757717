"""Models by evidence and by LOO, where both are known."""

from __future__ import annotations

import importlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import DimensionError, OptionError, UntrustedWarning
from flowvi.flow import Flow
from flowvi.flow_spec import FlowSpec
from flowvi.history import History
from flowvi.posterior import Posterior
from flowvi.targets import as_density

F64 = torch.float64
DATA = torch.tensor([0.3, 1.9, 1.1, 0.2, 1.4], dtype=F64)


def normal_mean(sd):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), sd))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    return model


def plated_mean(sd, site="y"):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), sd))
        with pyro.plate("data", len(y)):
            pyro.sample(site, dist.Normal(mu, 1.0), obs=y)

    return model


def exact_loo(sd, data=DATA):
    """The log density of each datum given all the others (N,)."""
    others = len(data) - 1 + 1 / sd**2
    mean = (data.sum() - data) / others
    return dist.Normal(mean, (1 + 1 / others) ** 0.5).log_prob(data)


def exact(sd, data=DATA):
    """Mean and sd of mu given the data, and the log evidence."""
    n = len(data)
    precision = n + 1 / sd**2
    covariance = torch.eye(n, dtype=F64) + sd**2 * torch.ones(n, n, dtype=F64)
    evidence = dist.MultivariateNormal(torch.zeros(n, dtype=F64), covariance).log_prob(data)
    return float(data.sum()) / precision, precision**-0.5, float(evidence)


def posterior(sd, data=DATA, *, off=0.0, wide=1.1, model=normal_mean):
    """A Gaussian q beside the exact posterior."""
    loc, scale, _ = exact(sd, data)
    density = as_density(model(sd), args=(data,))
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
    poor = posterior(1.0, off=0.5, wide=0.5, model=plated_mean)
    refined = poor.refine(num_chains=32, ess=500.0, seed=0)
    table = flowvi.compare({"refined": refined, "wide": posterior(30.0)})
    assert table["trusted"].all()
    row = table.loc["refined"]
    assert row["log_evidence"] == pytest.approx(exact(1.0)[2], abs=4 * row["se"])
    assert row["se"] < 0.05
    assert row["elpd_loo"] == pytest.approx(float(exact_loo(1.0).sum()), abs=0.1)  # by draws in chains


# LOO


@pytest.mark.parametrize("kind", ["inference_data", "datatree"])
def test_loo_is_right(kind, monkeypatch):
    module = importlib.import_module("flowvi.compare")
    try:
        found = flowvi.inference_data.find_arviz(kind)
    except OptionError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(module, "find_arviz", lambda: found)
    sds = {"narrow": 0.1, "wide": 30.0}
    table = flowvi.compare({name: posterior(sd, model=plated_mean) for name, sd in sds.items()})
    true = {name: exact_loo(sd) for name, sd in sds.items()}
    best = max(true, key=lambda name: true[name].sum())
    assert best != table.index[0]  # what evidence and LOO say differs here: a wide prior costs the evidence alone
    for name, row in table.iterrows():
        loc, scale, _ = exact(sds[name])
        mean_likelihood = (dist.Normal(loc, (1 + scale**2) ** 0.5)).log_prob(DATA)  # the same, having seen the datum
        each = true[best] - true[name]
        assert row["elpd_loo"] == pytest.approx(float(true[name].sum()), abs=0.1)
        assert row["elpd_se"] == pytest.approx(float((5 * true[name].var(correction=0)) ** 0.5), abs=0.1)
        assert row["p_loo"] == pytest.approx(float((mean_likelihood - true[name]).sum()), abs=0.1)
        assert row["elpd_diff"] == pytest.approx(float(each.sum()), abs=0.15)
        assert row["elpd_dse"] == pytest.approx(float((5 * each.var(correction=0)) ** 0.5), abs=0.1)
        assert row["bad_pareto_k"] == 0
        assert row["loo_warning"] == ""
    assert table["elpd_diff"][best] == table["elpd_dse"][best] == 0


LOO_NUMBERS = ["elpd_loo", "elpd_se", "p_loo", "elpd_diff", "elpd_dse", "bad_pareto_k"]


def test_without_pointwise_likelihood_there_is_no_loo_and_why():
    energy = flowvi.as_density(lambda z: dist.Normal(0.0, 1.0).log_prob(z).sum(-1), dim=1, dtype=F64)
    flow = Flow.from_spec(FlowSpec("planar", 1, 0, "diag"), scale=1.1, dtype=F64)
    empty = History(torch.arange(0), torch.zeros(0), torch.zeros(0))
    callable_ = Posterior(flow, energy, config={}, timing={}, history=empty, seed=0)
    models = {"event": posterior(1.0), "plate": posterior(1.0, model=plated_mean), "callable": callable_}
    table = flowvi.compare(models)
    assert table.loc[["event", "callable"], LOO_NUMBERS].isna().all(axis=None)
    assert table.loc["plate", LOO_NUMBERS].notna().all()
    assert "a plate instead of to_event" in table["loo_warning"]["event"]
    assert "no observed sites" in table["loo_warning"]["callable"]
    table = flowvi.compare({"event": models["event"], "plate": models["plate"]}, loo=False)
    assert table[LOO_NUMBERS].isna().all(axis=None)
    assert table["log_evidence"].notna().all()


def test_an_influential_datum_is_told():
    data = torch.cat([DATA, DATA.new_tensor([15.0])])
    table = flowvi.compare({str(sd): posterior(sd, data, model=plated_mean) for sd in (1.0, 30.0)})
    assert table["bad_pareto_k"]["30.0"] >= 1
    assert table["loo_warning"]["30.0"].startswith(f"{table['bad_pareto_k']['30.0']} of 6 data have a Pareto k above")


def test_other_data_give_no_difference():
    other = posterior(1.0, DATA[:3], model=lambda sd: plated_mean(sd, "x"))
    table = flowvi.compare({"x": other, "y": posterior(1.0, model=plated_mean)})
    assert table["elpd_diff"]["x"] == 0  # the larger elpd, of fewer data
    assert math.isnan(table["elpd_diff"]["y"])
    assert "number of data" in table["loo_warning"]["y"]


@pytest.mark.parametrize("wrong", [{}, {"one": posterior(1.0)}, [posterior(1.0), posterior(2.0)], {"a": 1, "b": 2}])
def test_bad_input_is_named(wrong):
    with pytest.raises(OptionError, match="compare takes"):
        flowvi.compare(wrong)


def test_different_data_cannot_be_compared():
    with pytest.raises(DimensionError, match="different data"):
        flowvi.compare({"a": posterior(1.0), "b": posterior(1.0, DATA[:3])})
    with pytest.raises(DimensionError, match="different data"):
        flowvi.compare({"a": posterior(1.0), "b": posterior(1.0, DATA + 1)})
