"""Rounds: which one follows; those that make it worse are made again or undone, and never returned."""

from __future__ import annotations

import math

import pytest
import torch

import flowvi
from flowvi.fit import rounds

pytestmark = pytest.mark.filterwarnings("ignore::flowvi.errors.FlowVIWarning")


def skewed(z):
    return (z - z.exp()).sum(-1)


def fit(lr):
    return flowvi.fit(skewed, dim=5, lr=lr, seed=0, time_limit=30, verify=False, progress=False)


def test_a_round_that_makes_it_worse_is_made_again_with_smaller_steps(monkeypatch):
    monkeypatch.setattr(rounds, "ROUND_STEPS", 300)
    checks = fit(lr=3.0).config["rounds"]
    gaussian, first = checks[0], checks[1]
    assert not first["elbo"] > gaussian["elbo"] - rounds.WORSE  # the steps were too large
    assert checks[2]["num_flows"] == first["num_flows"]
    later = [c["elbo"] for c in checks[2:]]
    assert max(x for x in later if math.isfinite(x)) > gaussian["elbo"]


def test_the_gaussian_stays_where_every_round_is_worse(monkeypatch):
    seen = iter(range(100))
    true = rounds.check

    def check(flow, density, generator, **facts):
        found = true(flow, density, generator, **facts)
        return found if next(seen) == 0 else rounds.replace(found, elbo=math.nan)

    monkeypatch.setattr(rounds, "check", check)
    monkeypatch.setattr(rounds, "ROUND_STEPS", 60)
    monkeypatch.setattr(rounds, "MIN_STEPS", 60)
    posterior = fit(lr=1e-2)
    assert posterior.config["stopped"] == "the steps that were tried make it worse"
    assert posterior.config["num_flows"] == 0
    assert len(posterior.config["rounds"]) == 2 + rounds.MAX_WORSE
    assert torch.isfinite(posterior.sample(100)["z"]).all()


def test_a_covering_round_that_loses_what_was_there_is_undone(monkeypatch):
    true, seen = rounds.check, []

    def check(flow, density, generator, **facts):
        found = true(flow, density, generator, **facts)
        seen.append(flow)
        return rounds.replace(found, gap=math.nan) if facts.get("covering") else rounds.replace(found, khat=0.9)

    monkeypatch.setattr(rounds, "check", check)
    monkeypatch.setattr(rounds, "TAIL", 0.0)
    posterior = fit(lr=1e-2)
    kinds = [c["covering"] for c in posterior.config["rounds"]]
    assert kinds[1:3] == [False, True]
    assert not any(kinds[3:])  # no second try
    assert posterior.flow is not seen[2]


GOAL = 0.015


@pytest.mark.parametrize(
    ("this", "gap", "khat", "learning", "covers", "expected"),
    [
        ((32, 1000, 0.04, 0), 0.01, 0.5, False, True, "small enough"),
        ((32, 1000, 0.04, 0), 0.01, 0.9, False, True, (32, 500, 0.01, 1)),  # the tail is not
        ((32, 1000, 0.04, 0), 0.01, 0.9, False, False, "small enough"),  # and can't be mended
        ((32, 1000, 0.04, 0), 0.001, 0.9, False, True, "small enough"),  # or is nothing
        ((32, 1000, 0.04, 0), 0.2, 0.5, True, True, (32, 500, 0.01, 1)),
        ((32, 1000, 0.04, 0), 0.2, 0.5, True, False, (32, 2000, 0.04 * rounds.LR_FALL, 0)),
        ((32, 1000, 0.04, 0), 0.7, 0.5, False, True, (128, 2000, 0.02, 0)),  # too far for weights
        ((32, 500, 0.02, 1), 0.02, 0.5, False, True, "small enough"),
        ((32, 500, 0.02, 1), 0.02, 0.9, False, True, (32, 1000, 0.02, 2)),
        ((32, 1000, 0.02, 2), 0.02, 0.9, False, True, "small enough"),
        ((32, 500, 0.02, 1), 0.2, 0.9, True, True, (128, 2000, 0.02, 0)),
        ((512, 2000, 0.02, 1), 0.2, 0.9, False, True, "the most there may be"),
    ],
)
def test_which_round_follows(this, gap, khat, learning, covers, expected):
    last = rounds.Check(this[0], this[1], -5.0, 0.01, gap, 0.0, khat, 0.0, covering=this[3] > 0)
    found = rounds.following(rounds.Round(*this), last, learning=learning, covers=covers, goal=GOAL, lr=0.04)
    if isinstance(expected, str):
        assert expected in found
    else:
        assert found == rounds.Round(*expected)


def test_a_few_draws_that_lose_everything_are_no_noise():
    start = rounds.Check(0, 0, -5.0, 0.01, 0.5, 0.01, 0.6, 0.0)
    wild = rounds.replace(start, num_flows=32, elbo=-2e7, elbo_se=1e7)
    assert rounds.is_worse(wild, start)
    assert not rounds.is_worse(rounds.replace(start, elbo=-5.4), start)
    assert not rounds.is_worse(start, wild)
