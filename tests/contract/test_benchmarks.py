"""The benchmarks race like with like: the same bound by every contestant, and a peer that is not here is left out."""

import functools
import sys
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import burda, train  # noqa: E402
from benchmarks.cases import BATCHES, SIZES, Case, bits  # noqa: E402
from benchmarks.contestants import CONTESTANTS  # noqa: E402
from benchmarks.report import machine  # noqa: E402

TINY = Case(64, (32,), 4, batch=64, steps=16)
HERE = ["ours, eager", "pyro.infer.SVI", "torch by hand"]


@pytest.mark.parametrize("estimator", ["trace", "analytic"])
def test_contestants_reach_the_same_bound(estimator):
    case = Case(**{**TINY.settings(), "estimator": estimator})
    x, bounds = bits(case), {}
    for name in HERE:
        one_pass = CONTESTANTS[name](case, x)
        bounds[name] = [one_pass() for _ in range(12)][-1]
    assert max(bounds.values()) - min(bounds.values()) < 0.02 * abs(bounds[HERE[0]]), bounds
    assert CONTESTANTS[HERE[0]](case, x)() < 1.1 * bounds[HERE[0]], "power: one that trains less is seen"


def test_a_race_takes_turns_and_leaves_out_what_is_not_here(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = ["torch by hand", "a contestant of the future"]
    result = train.race(TINY, train.entered(TINY, names, 1), repeats=2, threads=1)["contestants"]
    assert len(result["torch by hand"]["all_milliseconds"]) == 2
    assert "left_out" in result["a contestant of the future"]


def test_the_cases_are_those_of_the_plan():
    assert set(SIZES) == {"64-128-8", "784-400-20", "784-200-200-50", "conv"}
    assert (min(BATCHES), max(BATCHES)) == (20, 8192)
    assert set(train.NAMES) == set(CONTESTANTS)
    assert {c.estimator for c in train.cases("estimators")} == {"trace", "analytic", "iwae50"}
    assert "processor" in machine()


def test_each_pass_of_burda_s_model_sees_new_bits_and_a_resumed_training_is_the_same(tmp_path, monkeypatch):
    grey = torch.rand(60, 784, generator=torch.Generator().manual_seed(0))
    bits = burda.NewBits(grey, seed=1)
    seen = []
    for _ in range(3):
        seen.append(bits.bits.clone())
        bits.epoch(None)
    assert not torch.equal(seen[0], seen[1])
    assert abs(float(torch.stack(seen).mean() - grey.mean())) < 5 * 0.5 / (3 * 60 * 784) ** 0.5
    bits.load({"passes": 1})
    assert torch.equal(bits.bits, seen[1])

    def trained(passes, folder):
        rate = functools.partial(burda.our_rate, passes=2, first=1e-2)
        settings = {"batch": 20, "precision": "float32", "seed": 1, "engine": "eager"}
        return burda.train(pv.elbo.ELBO(), grey, rate, passes=passes, folder=tmp_path / folder, **settings)[0]

    whole = trained(2, "whole")
    trained(1, "resumed")
    resumed = trained(2, "resumed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    monkeypatch.setattr(burda.NewBits, "epoch", lambda self, run: None)
    frozen = trained(2, "frozen")
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), frozen.parameters(), strict=True)), (
        "power: fit sees what is drawn in place"
    )


def test_the_rates_of_burda_s_schedule_are_theirs():
    rates = [burda.their_rate(done) for done in range(burda.THEIR_PASSES + 1)]
    assert [rates.count(rate) for rate in sorted(set(rates), reverse=True)][:7] == [3**i for i in range(7)]
    assert rates[0] == 1e-3
    assert rates[-1] == pytest.approx(1e-4)
