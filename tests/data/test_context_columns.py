"""Context columns: read, one-hot, matched by name, and kept with what a VAE was trained on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import pyro_vae as pv
from pyro_vae.data import Data, load
from pyro_vae.data.context import context_names
from pyro_vae.data.fingerprint import Trained
from pyro_vae.data.spread import context_units
from pyro_vae.data.values import matched
from pyro_vae.errors import DataError, ModelError, SettingsError

TABLE = pd.DataFrame(
    {"a": [1.0, 2.0, 3.5, 4.0], "age": [30, 40, 50, 60], "sex": list("fmmf"), "b": [0.5, 1.0, 2.0, 3.0]}
)
AGE_SEX = [[30.0, 1.0, 0.0], [40.0, 0.0, 1.0], [50.0, 0.0, 1.0], [60.0, 1.0, 0.0]]


def test_numbers_stay_as_they_are_and_categories_become_one_hot(tmp_path):
    TABLE.to_csv(tmp_path / "a.csv", index=False, sep=";")
    for source in (TABLE, tmp_path / "a.csv", TABLE.to_records(index=False)):
        data = load(source, context="age, sex")
        assert data.x.tolist() == [[1.0, 0.5], [2.0, 1.0], [3.5, 2.0], [4.0, 3.0]]
        assert data.context.tolist() == AGE_SEX
        assert (data.columns, data.context_columns) == (["a", "b"], ["age", "sex"])
        assert context_names(data.context_columns, data.categories) == ["age", "sex=f", "sex=m"]
        assert "context from columns 'age', 'sex' (one-hot: 2 categories)" in data.summary
    assert data.rows(torch.tensor([2])).context.tolist() == [AGE_SEX[2]]


def test_the_order_asked_for_is_that_of_the_context():
    assert load(TABLE, context=["sex", "age"]).context.tolist() == [[f, m, age] for age, f, m in AGE_SEX]


def test_a_label_and_a_dropped_column_may_be_the_context_too():
    data = load(TABLE, context="sex", label="sex", drop="age")
    assert (data.labels.tolist(), data.columns) == ([0, 1, 1, 0], ["a", "b"])
    assert data.context.tolist() == [row[1:] for row in AGE_SEX]
    assert load(TABLE, context="age", drop="age,sex").context.tolist() == [row[:1] for row in AGE_SEX]
    assert load(TABLE, context="sex", columns=["b", "sex"]).columns == ["b"]


def test_columns_of_an_array_may_be_the_context():
    data = load(np.arange(12.0).reshape(4, 3), context="f1")
    assert data.context.tolist() == [[1.0], [4.0], [7.0], [10.0]]
    assert data.x.tolist() == [[0.0, 2.0], [3.0, 5.0], [6.0, 8.0], [9.0, 11.0]]


class Annotated:
    """As much of an AnnData as is read."""

    obs_names, var_names = pd.Index(["c1", "c2"]), pd.Index(["g1", "g2"])
    X, layers = scipy.sparse.csr_array([[1.0, 2.0], [3.0, 4.0]]), {}
    obs = pd.DataFrame({"batch": pd.Categorical(["v", "u"]), "depth": [5.0, 6.0]}, index=obs_names)


def test_columns_of_obs_may_be_the_context_of_an_anndata():
    data = load(Annotated(), context="batch,depth", label="batch")
    assert data.context.tolist() == [[0.0, 1.0, 5.0], [1.0, 0.0, 6.0]]
    assert (data.columns, data.labels.tolist()) == (["g1", "g2"], [1, 0])
    with pytest.raises(DataError, match="obs has no column 'plate'; it has 'batch', 'depth'"):
        load(Annotated(), context="plate")
    twice = Annotated()
    twice.obs = Annotated.obs.assign(g1=[7.0, 8.0])
    with pytest.raises(DataError, match="both obs and the matrix have a column 'g1'; rename one"):
        load(twice, context="g1")


OLD = load(TABLE, context="age,sex")


def test_new_data_are_matched_by_the_names_of_context_columns_and_categories():
    new = TABLE[["sex", "b", "age", "a"]].assign(sex=["m", "m", "m", "m"])
    data = load(new, like=OLD)
    assert data.x.tolist() == OLD.x.tolist()
    assert data.context.tolist() == [[age, 0.0, 1.0] for age in TABLE.age]
    again = matched(load(new, context="sex,age"), OLD)
    assert again.context.tolist() == data.context.tolist()
    assert (again.context_columns, again.categories) == (OLD.context_columns, OLD.categories)
    reordered = TABLE.assign(sex=pd.Categorical(TABLE.sex, ["x", "m", "f"]))
    assert matched(load(reordered, context="sex,age"), OLD).context.tolist() == AGE_SEX, "'x' does not occur"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="sex"), "context column 'sex' of data is missing .there are 'a', 'age', 'b'"),
        (lambda t: t.assign(sex=["f", "m", "x", "x"]), "column 'sex'.* 'x', not one of"),
        (lambda t: t.assign(age=["f", "m", "m", "f"]), "column 'age' contains categories, but numbers in data"),
        (lambda t: t.assign(age=[1, 2, None, 4]), "row 2 has nan in context column 'age'"),
        (lambda t: t.assign(age=[1, 2, np.inf, 4]), "row 2 has inf in context column 'age'"),
        (lambda t: t.assign(sex=["f", None, "f", "m"]), "row 1 has .* in context column 'sex'"),
        (lambda t: t.assign(extra=1.5), "column 'extra' is not in data; drop it"),
    ],
)
def test_other_contexts_are_refused(change, message):
    new = change(TABLE)
    with pytest.raises(DataError, match=message):
        load(new, like=OLD, missing="nan")
    if "sex" in new and "extra" not in new:
        with pytest.raises(DataError, match=message):
            matched(load(new.astype({"sex": "category"}), context="age,sex", missing="nan"), OLD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load(TABLE, context="height"), "no column 'height'; the columns are 'a', 'age', 'sex', 'b'"),
        (lambda: load(TABLE[["a"]], context="a"), "4 rows and 0 columns"),
        (lambda: load(np.zeros((2, 3, 3)), context="f0"), "no named columns"),
        (lambda: load(OLD, context="a"), "context does not apply"),
    ],
)
def test_a_context_that_is_not_there_is_refused(make, message):
    with pytest.raises((DataError, SettingsError), match=message):
        make()


def conditional() -> pv.VAE:
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(1 + 3, [], 2)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(2 + 3, [], 2)),
    )


def test_a_vae_knows_its_context_columns(tmp_path):
    vae = conditional()
    pv.fit(vae, OLD, epochs=1, progress=False, engine="eager", device="cpu")
    assert vae.trained_on.context_columns == ["age", "sex"]
    pv.save(vae, tmp_path / "vae.safetensors")
    again = pv.load(tmp_path / "vae.safetensors")
    rows = pv.data.rows_for(again, TABLE[["sex", "b", "age", "a"]])
    assert rows.x.tolist() == OLD.x.tolist()
    assert rows.context.tolist() == AGE_SEX
    with pytest.raises(DataError, match="context column 'sex' of the training data is missing"):
        pv.data.rows_for(again, TABLE.drop(columns="sex"))


def test_context_columns_are_kept_as_text():
    known = Trained.on(np.arange(3, dtype=np.uint64), columns=["a"], context_columns=["age"])
    assert Trained.from_text(known.as_text()).context_columns == ["age"]
    assert Trained.on(np.arange(2, dtype=np.uint64), known).context_columns == ["age"]
    with pytest.raises(DataError, match="not text"):
        Trained.from_text(known.as_text().replace('["age"]', "[3]"))


def test_a_context_without_names_stays_as_it_is():
    given = torch.ones(4, 3)
    data = replace(OLD, context=given, context_columns=None)
    assert matched(data, OLD).context is given


def test_a_network_may_be_spared_the_context():
    torch.manual_seed(0)
    inner = torch.nn.Linear(2, 4)
    q = pv.posteriors.DiagNormal(pv.nn.WithoutContext(inner, 2))
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(q(x, context).mean, pv.posteriors.DiagNormal(inner)(x).mean)


def test_numbers_of_a_context_are_coded_by_name():
    known = load(TABLE.assign(sex=pd.Categorical([1, 2, 2, 1])), context="sex")
    assert load(TABLE.assign(sex=[1, 2, 2, 1]), context="sex", like=known).context.tolist() == known.context.tolist()


@pytest.mark.parametrize("features", [0, 2])
def test_a_network_may_see_the_context_in_its_units(features):
    torch.manual_seed(0)
    inner, numbers = torch.nn.Linear(features + 2, 4), torch.randn(7, 5, features + 2)
    units = pv.data.mean_and_sd(torch.tensor([[1.0, 6e4], [3.0, 8e4]]))
    net = pv.nn.StandardizedContext(inner, features, units)
    raw = torch.cat([numbers[..., :features], numbers[..., features:] * torch.tensor([1.0, 1e4])], -1)
    raw[..., features:] += torch.tensor([2.0, 7e4])
    torch.testing.assert_close(net(raw), inner(numbers), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=f"rows of {features} numbers and was built for .*a context of 2; pass"):
        net(raw[..., :features])


def test_a_constant_context_becomes_0_and_one_hot_columns_stay():
    context = torch.tensor([[6e4, 1.0, 1.0, 0.0], [6e4, 3.0, 1.0, 0.0]])
    columns = {"context_columns": ["income", "age", "sex"], "categories": {"sex": ["f", "m"]}}
    units = context_units(Data(torch.zeros(2, 1), context=context, **columns))
    assert units(context).tolist() == [[0.0, -1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    assert context_units(Data(torch.zeros(2, 1), context=context)).center.tolist() == [6e4, 2.0, 1.0, 0.0]
    only_sex = {"context_columns": ["sex"], "categories": {"sex": ["f", "m"]}}
    assert context_units(Data(torch.zeros(2, 1), context=context[:, 2:], **only_sex)) is None
    assert context_units(Data(torch.zeros(2, 1))) is None
