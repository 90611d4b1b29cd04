"""What is proposed for each column, and by which figure."""

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import torch

import pyro_vae as pv
from pyro_vae.data import Data, suggest

N = 400
RANDOM = np.random.default_rng(0)
COLUMNS = {
    "normal": (RANDOM.normal(size=N), "Normal", "excess kurtosis 0.31"),
    "uniform": (RANDOM.uniform(size=N), "Normal", "excess kurtosis -1."),
    "t": (RANDOM.standard_t(2, N), "StudentT(df=4)", "excess kurtosis "),
    "poisson": (RANDOM.poisson(3, N), "Poisson", "times the mean"),
    "large poisson": (RANDOM.poisson(100, N), "Poisson", "times the mean"),
    "negative binomial": (RANDOM.negative_binomial(1, 0.2, N), "NegativeBinomial", "variance "),
    "levels": (np.arange(N) % 4, "Categorical(levels=4)", "variance 0.84 times the mean: levels 0 to 3"),
    "levels from 1 on": (np.arange(N) % 5 + 1, "Categorical(levels=6)", "variance 0.67 times the mean: levels 0 to 5"),
    "years": (2000 + np.arange(N) % 20, "Normal", "whole numbers from 2000 on, excess kurtosis -1.2"),
    "grams": (500 * (1 + np.arange(N) % 7), "Normal", "whole numbers from 500 on, excess kurtosis -1.3"),
    "below 0": (np.arange(N) % 5 - 1, "Normal", "excess kurtosis -1.3"),
    "too large": (np.where(np.arange(N) % 2, 0, 2.0**29 + np.arange(N)), "Normal", "excess kurtosis -2.0"),
    "bits": (np.arange(N) % 2, "Bernoulli", "only 0 and 1"),
    "no bits": (np.zeros(N), "Bernoulli", "always 0: drop it"),
    "two values": (np.arange(N) % 2 - 0.5, "Normal", "only 2 values: recode them as 0 and 1"),
    "a constant": (np.full(N, 7.5), "Normal", "always 7.5, so its scale is fixed: drop it"),
    "names": (np.array(["u", "v", "w", "w"] * (N // 4)), "Categorical(levels=3)", "3 names"),
    "two names": (np.array(["u", "v"] * (N // 2)), "Categorical(levels=2)", "2 names"),
    "a name": (np.array(["u"] * N), "Categorical(levels=2)", "1 name"),
}


@pytest.mark.parametrize("title", COLUMNS)
def test_each_kind_of_column_has_its_likelihood_and_its_reason(title):
    values, likelihood, reason = COLUMNS[title]
    [proposal] = suggest(pd.DataFrame({"a": values})).proposals
    assert str(proposal) == likelihood
    assert reason in proposal.reason, proposal.reason


@pytest.mark.parametrize(
    ("d", "n", "likelihood"),
    [(4, 8, "Poisson"), (4, 10, "NegativeBinomial"), (2, 28, "Poisson"), (2, 30, "Categorical(levels=12)")],
)
def test_counts_are_poisson_within_two_standard_errors_of_their_dispersion(d, n, likelihood):
    dispersion = n * d**2 / ((n - 1) * 9)  # of as many 9 - d as 9 + d
    assert (abs(dispersion - 1) <= 2 * np.sqrt(2 / (n - 1))) == (likelihood == "Poisson")
    [proposal] = suggest(pd.DataFrame({"a": np.tile([9 - d, 9 + d], n // 2)})).proposals
    assert str(proposal) == likelihood
    assert float(proposal.reason.split()[1]) == pytest.approx(dispersion, abs=0.05)


def test_missing_values_are_left_out():
    table = pd.DataFrame({"a": [0.0, 1.0, np.nan, 1.0], "b": [np.nan, 0.5, 1.5, 4.0], "c": ["u", None, "u", "v"]})
    assert [str(p) for p in suggest(table.assign(c=table.c.astype("category"))).proposals] == [
        "Bernoulli", "Normal", "Categorical(levels=2)",
    ]  # fmt: skip
    nothing = Data(torch.zeros(3, 1), mask=torch.zeros(3, 1, dtype=torch.bool))
    assert suggest(nothing).proposals[0].reason == "no value is observed: drop it"


def test_columns_are_grouped_in_their_order_and_make_a_likelihood_that_takes_the_data():
    names = [
        "normal",
        "uniform",
        "poisson",
        "names",
        "levels",
        "levels from 1 on",
        "bits",
        "no bits",
        "t",
        "a constant",
    ]
    data = pv.data.load(pd.DataFrame({name: COLUMNS[name][0] for name in names}))
    found = suggest(data)
    kinds = [(str(kind), len(kind.columns)) for kind in found.kinds]
    assert kinds == [
        ("Normal", 2), ("Poisson", 1), ("Categorical(levels=3)", 1), ("Categorical(levels=4)", 1),
        ("Categorical(levels=6)", 1), ("Bernoulli", 2), ("StudentT(df=4)", 1), ("Normal", 1),
    ]  # fmt: skip
    assert [name for kind in found.kinds for name in kind.columns] == names
    assert found.outputs == 2 + 1 + 3 + 4 + 6 + 2 + 1 + 1
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Blocks(pv.nn.mlp(2, [], found.outputs), found.blocks)
    likelihood.refuse(data.x)
    assert likelihood(torch.zeros(N, 2)).log_prob(data.x).isfinite().all()
    scales = [block.scale.shape for block in likelihood.blocks if hasattr(block, "scale")]
    assert scales == [(2,), (1,), ()], "a scale for each column, and none to learn for a constant"
    assert not likelihood.blocks[-1].learn_scale


def kinds_of(name: str) -> dict[str, int]:
    frame = getattr(sklearn.datasets, f"load_{name}")(as_frame=True).frame.drop(columns="target")
    found = [str(proposal) for proposal in suggest(frame).proposals]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("wine", {"Normal": 13}),
        ("iris", {"Normal": 4}),
        ("diabetes", {"Normal": 10}),
        ("breast_cancer", {"Normal": 15, "StudentT(df=4)": 15}),
        ("digits", {"Bernoulli": 6, "NegativeBinomial": 58}),
    ],
)
def test_what_is_proposed_for_the_tables_of_scikit_learn(name, kinds):
    assert kinds_of(name) == kinds


def test_images_have_one_likelihood():
    digits = pv.data.digits()
    assert [(str(p), len(p.columns), p.reason) for p in suggest(digits).proposals] == [
        ("ContinuousBernoulli", 64, "grey levels from 0 to 1")
    ]
    ink = Data((digits.x > 0.5).float(), image_shape=(8, 8))
    assert str(suggest(ink).proposals[0]) == "Bernoulli"
    assert str(suggest(np.uint8(16 * digits.x.reshape(-1, 8, 8).numpy())).proposals[0]) == "Normal"


def test_the_table_fits_into_80_columns():
    values = {title: values for title, (values, _, _) in COLUMNS.items()} | {"a long name " * 9: np.arange(N) % 19}
    lines = str(suggest(pd.DataFrame(values))).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["column", "likelihood", "reason"]
    assert any(line.split() == ["bits", "Bernoulli", "only", "0", "and", "1"] for line in lines)
