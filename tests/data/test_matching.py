"""Contexts, masks and streams are matched to the data by the names of columns and rows, or refused in a sentence."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyro_vae as pv
from pyro_vae.data import Data, load, stream
from pyro_vae.data.fingerprint import Trained
from pyro_vae.data.rows import rows_of
from pyro_vae.data.spread import mean_and_sd
from pyro_vae.data.streams.tables import describe_array
from pyro_vae.diagnose.calibration import sbc
from pyro_vae.errors import DataError
from pyro_vae.use.sklearn import VAETransformer

N = 12
ROWS = [f"r{i}" for i in range(N)]
DRAWN = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32) * [1, 2, 3, 0.1] + [0, 0, 50, 1]
TABLE = pd.DataFrame(DRAWN.astype(np.float32), columns=["a", "b", "age", "dose"])
X, CONTEXT = TABLE[["a", "b"]], TABLE[["age", "dose"]]
OTHER_ORDER = CONTEXT[["dose", "age"]]


def conditional(features=2, contexts=2):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(1 + contexts, [], features)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(features + contexts, [], 2)),
    )


def trained(data, vae=None, **given):
    vae = vae or conditional()
    pv.fit(vae, data, epochs=1, progress=False, engine="eager", device="cpu", **given)
    return vae


def plain(*names):
    """A VAE without a context, trained on a table of these columns."""
    vae = pv.exact.LinearGaussian(torch.tensor([[1.0], [3.0]]), torch.zeros(2), 0.5).as_vae()
    return trained(pd.DataFrame(DRAWN[:, :2], columns=[*names]), vae)


def parquet(folder, name="x.parquet", table=TABLE):
    table.to_parquet(folder / name)
    return folder / name


WAYS = {
    "a context of its own": lambda folder: trained(X, context=CONTEXT),
    "an array and a table": lambda folder: trained(X.to_numpy(), context=CONTEXT),
    "context columns": lambda folder: trained(load(TABLE, context="age,dose")),
    "a stream": lambda folder: trained(stream(parquet(folder), context=["age", "dose"])),
    "a stream beside": lambda folder: trained(
        stream(parquet(folder, table=X), context=parquet(folder, "c.parquet", CONTEXT))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_context_is_matched_by_name_however_the_vae_was_trained(way, tmp_path):
    vae = WAYS[way](tmp_path)
    assert [*vae.trained_on.context_columns] == ["age", "dose"]
    known = pv.encode(vae, X.to_numpy(), context=CONTEXT.to_numpy()).z.values
    tables = [CONTEXT, OTHER_ORDER, TABLE, dict(OTHER_ORDER), load(OTHER_ORDER), OTHER_ORDER.to_records(index=False)]
    for context in tables:
        for data in (X, X.to_numpy(), TABLE if way != "an array and a table" else X):
            np.testing.assert_array_equal(pv.encode(vae, data, context=context).z, known)
    with pytest.raises(DataError, match="context of data: column 'dose' of the training data is missing"):
        pv.encode(vae, X, context=CONTEXT.rename(columns={"dose": "height"}))
    other = stream(parquet(tmp_path), columns=["a", "b"], context=["dose", "age"])
    message = r"context columns of the stream differ .* give them as \['age', 'dose'\]"
    for use in (lambda: pv.encode(vae, other), lambda: trained(other, vae)):
        with pytest.raises(DataError, match=message):
            use()
    streamed = stream(parquet(tmp_path), columns=["a", "b"], context=["age", "dose"])
    np.testing.assert_array_equal(pv.encode(vae, streamed).z, known)


def test_a_table_that_holds_the_context_needs_no_other():
    vae = trained(X, context=CONTEXT)
    found = pv.score(vae, TABLE[["dose", "b", "age", "a"]], draws=20).log_px
    np.testing.assert_array_equal(found, pv.score(vae, X, context=OTHER_ORDER, draws=20).log_px)
    with pytest.raises(DataError, match="context column 'age' of the training data is missing"):
        pv.score(vae, X, draws=20)
    pv.fit(vae, X, context=OTHER_ORDER, epochs=1, progress=False, engine="eager", device="cpu")
    assert vae.trained_on.context_columns == ["age", "dose"], "a second training matches the context, too"


def test_a_sample_and_a_prediction_know_the_context_of_a_plain_table():
    vae = trained(X, context=CONTEXT)
    known = pv.sample(vae, N, context=CONTEXT.to_numpy())
    np.testing.assert_array_equal(pv.sample(vae, N, context=OTHER_ORDER).x, known.x)
    settings = {"draws": 10, "own_context": OTHER_ORDER}
    known = pv.predict(vae, X, context=CONTEXT.to_numpy() + 1, **settings)
    np.testing.assert_array_equal(pv.predict(vae, X, context=OTHER_ORDER + 1, **settings).x, known.x)
    labelled = X.set_axis(ROWS), CONTEXT.set_axis(ROWS)
    with pytest.raises(DataError, match="the rows of the context are labelled differently from the data"):
        pv.predict(vae, labelled[0], own_context=labelled[1], context=labelled[1][::-1], draws=10)
    assert len(pv.predict(vae, labelled[0], own_context=labelled[1], context=labelled[1][-1:], draws=10).x) == N


def test_the_ends_of_a_walk_share_a_context_that_is_matched_by_name():
    vae = trained(X, context=CONTEXT)
    one, other = (X.set_axis(ROWS).iloc[[i]] for i in (0, 1))
    known = pv.interpolate(vae, one, other, context=CONTEXT.to_numpy()[0])
    found = pv.interpolate(vae, one, other, context=OTHER_ORDER.set_axis(ROWS).iloc[[0]])
    np.testing.assert_array_equal(found.x, known.x)


def test_data_are_a_context_like_their_table():
    vae = trained(X, context=CONTEXT)
    known = pv.sample(vae, N, context=CONTEXT)
    assert pv.sample(vae, N, context=load(OTHER_ORDER)).equals(known)
    with pytest.raises(DataError, match="the context has missing values; fill them, or drop their rows"):
        rows_of(X, context=replace(load(CONTEXT), mask=torch.zeros(N, 2, dtype=torch.bool)))
    sex = load({"sex": ["f", "m"] * (N // 2)})
    with pytest.raises(DataError, match="column 'sex' has categories; encode them as numbers"):
        pv.encode(conditional(), X, context=sex)


def test_a_calibration_matches_the_context_by_name():
    vae = trained(X, context=CONTEXT)
    known, found = (sbc(vae, context=context, simulations=20, draws=9) for context in (CONTEXT, OTHER_ORDER))
    assert found.equals(known)


def test_images_with_a_table_of_contexts_are_matched_by_name():
    images = torch.rand(N, 4)
    data = Data(images, context=torch.tensor(CONTEXT.to_numpy()), context_columns=["age", "dose"])
    vae = trained(data, conditional(4))
    other = replace(data, context=data.context[:, [1, 0]], context_columns=["dose", "age"])
    np.testing.assert_array_equal(pv.encode(vae, other).z, pv.encode(vae, data).z)
    with pytest.raises(DataError, match="context column 'dose' of the training data is missing"):
        pv.encode(vae, replace(other, context_columns=["height", "age"]))


def test_categories_of_a_context_are_those_of_the_training():
    table = TABLE.assign(sex=["f", "m"] * (N // 2))
    vae = trained(load(table.drop(columns="dose"), context="age,sex"), conditional(contexts=3))
    known = pv.encode(vae, load(table.drop(columns="dose"), context="age,sex")).z
    assert pv.encode(vae, X, context=table[["sex", "age"]]).z.equals(known)
    men = pv.encode(vae, X, context=table[["sex", "age"]].assign(sex="m")).z
    assert men[1::2].equals(known[1::2])
    assert not men[0].equals(known[0])
    with pytest.raises(DataError, match="column 'sex' is 'x', not one of its categories 'f', 'm'"):
        pv.encode(vae, X, context=table[["sex", "age"]].assign(sex="x"))
    with pytest.raises(DataError, match=r"column 'sex' has categories; encode them as numbers, or name the context"):
        trained(X, conditional(), context=table[["age", "sex"]])
    with pytest.raises(DataError, match="context of data: column 'sex' is a column of the data too; rename one"):
        trained(table[["a", "sex"]], conditional(), context=CONTEXT.set_axis(["sex", "age"], axis=1))


def test_a_second_training_keeps_the_names_that_its_data_lack():
    hashes = np.arange(3, dtype=np.uint64)
    first = Trained.on(hashes, columns=["a"], categories={"sex": ["f", "m"]}, context_columns=["sex"])
    again = Trained.on(hashes, first, columns=["a"], categories={})
    assert (again.context_columns, again.categories) == (["sex"], {"sex": ["f", "m"]})
    again = Trained.on(hashes, first, context_columns=["age"])
    assert (again.columns, again.context_columns) == (["a"], ["age"])


def test_other_labels_of_the_rows_of_a_context_or_a_mask_are_refused():
    data, context, mask = (table.set_axis(ROWS) for table in (X, CONTEXT, X > -9))
    for part, given in (("context", context), ("mask", mask)):
        assert len(rows_of(data, **{part: given})) == N
        assert len(rows_of(data, **{part: given.reset_index(drop=True)})) == N, "no labels to compare"
        assert len(rows_of(data.reset_index(drop=True), **{part: given[::-1]})) == N
        message = (
            f"the rows of the {part} are labelled differently from the data .row 0 is 'r11' in the {part} and 'r0' in "
            "the data.; give both the same labels in the same order"
        )
        for read in (rows_of, lambda data, **given: rows_of(load(data), **given)):
            with pytest.raises(DataError, match=message):
                read(data, **{part: given[::-1]})


def test_a_mask_is_matched_by_name():
    data = pd.DataFrame({"a": [1.0, np.nan, 2.0], "b": [3.0, 4.0, 5.0]})
    seen = data.notna()
    for mask in (seen, seen[["b", "a"]], dict(seen[["b", "a"]]), seen.to_numpy(), pd.DataFrame(seen.to_numpy())):
        for given in (data, load(data, missing="nan")):
            rows = rows_of(given, mask=mask)
            assert rows.x.tolist() == [[1.0, 3.0], [0.0, 4.0], [2.0, 5.0]]
            assert rows.mask.tolist() == seen.to_numpy().tolist()
    assert mean_and_sd(data, mask=seen[["b", "a"]]).center.tolist() == [1.5, 4.0]
    assert rows_of(data.to_numpy(), mask=seen[["a", "b"]]).x.tolist() == [[1.0, 3.0], [0.0, 4.0], [2.0, 5.0]]
    vae = plain("b", "a")
    known = pv.encode(vae, data[["b", "a"]], mask=seen[["b", "a"]]).z
    assert pv.encode(vae, data, mask=seen[["b", "a"]]).z.equals(known)
    assert pv.impute(vae, data, mask=seen[["b", "a"]], draws=25).x.sel(feature="b").values.tolist() == [3.0, 4.0, 5.0]
    for given in (data, load(data, missing="nan")):
        with pytest.raises(
            DataError, match="the columns of the mask are 'a', 'c', but those of the data are 'a', 'b'; give"
        ):
            rows_of(given, mask=seen.set_axis(["a", "c"], axis=1))


LOADERS = {
    "shuffled": {"shuffle": True},
    "weighted": {"sampler": WeightedRandomSampler(torch.ones(N), N)},
    "shortened": {"drop_last": True},
    "in part": {"sampler": SequentialSampler(range(5))},
    "with shuffled batches": {"batch_sampler": BatchSampler(RandomSampler(range(N)), 5, False)},
    "with other batches": {"batch_sampler": [[3, 4], [*range(3), *range(5, N)]]},
}


def loader(dataset=None, **settings):
    batch = {} if "batch_sampler" in settings else {"batch_size": 5}
    return DataLoader(dataset or TensorDataset(torch.tensor(X.to_numpy())), **batch, **settings)


@pytest.mark.parametrize("kind", LOADERS)
def test_results_per_row_need_a_loader_in_order(kind):
    vae = plain("a", "b")
    shuffled = loader(**LOADERS[kind])
    size = None if kind != "with other batches" else N
    streamed = stream(shuffled, size=size)
    message = "DataLoader: the loader shuffles, samples or drops rows, so the results could not be assigned to the rows"
    for function in (pv.encode, pv.reconstruct, pv.score):
        with pytest.raises(DataError, match=message):
            function(vae, streamed)
    trained(streamed, vae)


def test_the_loader_that_a_function_returns_must_be_in_order_too():
    made = loader(shuffle=True, generator=torch.Generator())
    with pytest.raises(DataError, match="a function: the loader shuffles"):
        pv.encode(plain("a", "b"), stream(lambda: made, size=N, source="a function"))


def test_a_loader_in_order_gives_what_memory_gives():
    vae, known = plain("a", "b"), pv.encode(plain("a", "b"), X).z.values
    batches = BatchSampler(SequentialSampler(range(N)), 5, False)
    whole = BatchSampler(SequentialSampler(range(N)), 4, True)
    for settings in ({}, {"batch_sampler": batches}, {"batch_sampler": whole}):
        np.testing.assert_allclose(pv.encode(vae, stream(loader(**settings))).z, known, rtol=1e-6)


def test_a_loader_keeps_the_sampler_of_its_batches():
    batches = BatchSampler(WeightedRandomSampler(torch.eye(N)[3], 6), 2, False)
    streamed = stream(loader(batch_sampler=batches))
    assert len(streamed) == 6
    [window] = streamed.windows(seed=0, batch_size=2)
    assert window.rows.x.tolist() == [X.to_numpy()[3].tolist()] * 6


def test_columns_that_are_really_named_f0_and_f1_are_matched_by_name(tmp_path):
    x = pd.DataFrame(X.to_numpy(), columns=["f0", "f1"])
    vae, other = plain("f0", "f1"), x[["f1", "f0"]]
    known = pv.encode(vae, x).z
    other.to_csv(tmp_path / "x.csv", index=False)
    swapped = (other, load(other), load(tmp_path / "x.csv", like=load(x)), other.assign(id=ROWS).set_index("id"))
    for data in swapped:
        np.testing.assert_allclose(pv.encode(vae, data).z, known, rtol=1e-5)
    with pytest.raises(DataError, match=r"columns of the stream differ .* order does; give them as \['f0', 'f1'\]"):
        pv.encode(vae, stream(parquet(tmp_path, table=other)))
    with pytest.raises(DataError, match=r"columns of the stream differ"):
        trained(stream(parquet(tmp_path, table=other)), vae)
    assert pv.encode(vae, stream(parquet(tmp_path, table=other), columns=["f0", "f1"])).z.equals(pv.encode(vae, x).z)
    mask = pd.DataFrame({"f1": [True, False], "f0": [True, True]})
    assert rows_of(x[:2], mask=mask).mask.tolist() == [[True, True], [True, False]]


def test_columns_without_names_are_matched_by_position():
    vae, array = plain("f0", "f1"), X.to_numpy()
    known = pv.encode(vae, array).z.values
    for data in (X, X.set_axis(["f1", "b"], axis=1), load(array), array):
        np.testing.assert_allclose(pv.encode(vae, data).z, known, rtol=1e-5)
    np.testing.assert_allclose(pv.encode(plain("b", "a"), load(array)).z, known, rtol=1e-5)


MASKED = np.ma.array(X.to_numpy(), mask=np.arange(2 * N).reshape(N, 2) == 7)
REFUSED = r"is a masked array; give data.filled\(0\) and mask=~numpy.ma.getmaskarray\(data\)"


class Sliceable:
    """An array whose slices are masked, like a variable of netCDF4."""

    shape, dtype = MASKED.shape, MASKED.dtype

    def __getitem__(self, rows):
        return MASKED[rows]


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": X.to_numpy()[i], "context": MASKED[i]}


@pytest.mark.parametrize(
    "read",
    [
        lambda: stream(Sliceable()).head(N),
        lambda: stream(X.to_numpy(), context=Sliceable()).head(N),
        lambda: stream([*MASKED.reshape(3, 4, 2)], size=N).head(N),
        lambda: stream([MASKED.reshape(2, 6, 2)[0]], size=6).head(6),
        lambda: stream(Items()).head(N),
        lambda: rows_of([*MASKED]),
        lambda: rows_of(X, mask=np.ma.array(np.ones((N, 2), bool), mask=MASKED.mask)),
        lambda: VAETransformer(1).fit(MASKED),
    ],
)
def test_masked_values_are_never_read_as_numbers(read):
    with pytest.raises(DataError, match=REFUSED):
        read()


def test_a_masked_array_without_masked_values_is_read():
    whole = np.ma.array(X.to_numpy())
    assert stream([whole], size=N).head(N).x.tolist() == rows_of(whole).x.tolist() == X.to_numpy().tolist()


@pytest.mark.parametrize(("kind", "value"), [("i1", "true"), ("u1", "false"), ("i2", "TRUE")])
def test_integers_of_another_sign_than_stored_are_refused(kind, value):
    array = xr.DataArray(np.ones((2, 2), kind), dims=["row", "column"], attrs={"_Unsigned": value})
    with pytest.raises(
        DataError, match=f"the attribute _Unsigned is {value}, so the stored numbers are not the values"
    ):
        stream(array)
    other = {"true": "false", "false": "true"}.get(value, "false")
    assert len(stream(array.assign_attrs(_Unsigned=other))) == 2


def test_an_array_of_xarray_has_the_names_of_its_columns():
    array = xr.DataArray(X.to_numpy(), dims=["row", "column"], coords={"column": ["a", "b"]})
    vae, other = plain("a", "b"), array[:, ::-1]
    assert stream(array).columns == ["a", "b"]
    np.testing.assert_array_equal(pv.encode(vae, stream(array)).z, pv.encode(vae, array).z)
    with pytest.raises(DataError, match=r"columns of the stream differ .* give them as \['a', 'b'\]"):
        pv.encode(vae, stream(other))
    seen = array > -9
    assert len(stream(array, mask=seen)) == N
    with pytest.raises(DataError, match="the columns of the mask are 'b', 'a', but those of DataArray are 'a', 'b'"):
        stream(array, mask=seen[:, ::-1])
    with pytest.raises(pv.errors.SettingsError, match="columns does not apply to this kind of data"):
        stream(array, columns=["b", "a"])
    assert describe_array(array.drop_vars("column"), "x")["columns"] is None


def test_an_array_of_hdf5_is_no_table_of_named_columns(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        array = file.create_dataset("x", data=X.to_numpy())
        assert rows_of(array, context=array).x.tolist() == X.to_numpy().tolist()


def test_shuffled_rows_are_not_those_of_a_table_without_labels():
    shuffled = CONTEXT.set_axis(range(N))[::-1]
    for data, context in ((X, shuffled), (X.set_axis(range(N))[::-1], CONTEXT.set_axis(range(N)))):
        with pytest.raises(DataError, match="the rows of the context are labelled differently"):
            rows_of(data, context=context)


def test_labels_of_another_type_are_the_same_labels():
    days = pd.date_range("2020-01-01", periods=N)
    assert len(rows_of(X.set_axis(days), context=CONTEXT.set_axis(days.astype(str)))) == N
    assert len(rows_of(X.set_axis(range(5, N + 5)), mask=(X > -9).set_axis([*map(str, range(5, N + 5))]))) == N


def test_a_mask_is_compared_with_labels_in_a_first_column_without_a_name():
    data = X.reset_index(drop=True)
    data.insert(0, "", ROWS)
    mask = (X > -9).set_axis(ROWS)
    assert len(rows_of(data, mask=mask)) == N
    with pytest.raises(DataError, match="the rows of the mask are labelled differently"):
        rows_of(data, mask=mask[::-1])


def test_names_of_several_levels_are_matched():
    frame = X.set_axis(pd.MultiIndex.from_product([["u"], X.columns]), axis=1)
    data = load(frame)
    assert load(frame.iloc[:, ::-1], like=data).x.equal(data.x)
    assert rows_of(frame, mask=frame > -9).x.equal(rows_of(data).x)
    assert rows_of(data, mask=frame > -9).mask.all()


def test_a_mask_may_have_nullable_booleans_but_no_gap():
    mask = (X > -9).astype("boolean")
    assert rows_of(X, mask=mask).mask.all()
    with pytest.raises(DataError, match="the mask has type object"):
        rows_of(X, mask=mask.mask(mask))


@pytest.mark.parametrize("labels", [ROWS, [*range(10, 10 + N)]], ids=["text", "numbers"])
def test_streams_of_rows_in_another_order_are_refused(labels, tmp_path):
    X.set_axis(labels).to_parquet(tmp_path / "x.parquet")
    CONTEXT.set_axis(labels).to_parquet(tmp_path / "same.parquet", row_group_size=3)
    CONTEXT.set_axis(labels)[::-1].to_parquet(tmp_path / "other.parquet")
    CONTEXT.to_parquet(tmp_path / "none.parquet")
    for name in ("same.parquet", "none.parquet"):
        assert len(stream(tmp_path / "x.parquet", context=tmp_path / name)) == N
    with pytest.raises(DataError, match=r"the rows of the context are labelled differently from .*x\.parquet; write"):
        stream(tmp_path / "x.parquet", context=tmp_path / "other.parquet")
