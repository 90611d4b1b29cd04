"""The benchmarks race like with like: the same bound by every contestant, and a peer that is not here is left out."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import train  # noqa: E402
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
