"""Data beyond memory: every row once per epoch, in an order of the seed alone, and nothing left behind.

``test_streams_fit.py`` trains on them.
"""

import gc
import itertools
import logging
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers.checks import small_vae
from helpers.stream_checks import KINDS, cut, files, narrow, npy, ours, table_of, zarr_array
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.data.fingerprint import data_hash
from pyro_vae.data.sources import InMemory, Source, hashes_of, source_of
from pyro_vae.data.streams.layout import BLOCKS, Layout, window_rows
from pyro_vae.errors import DataError

# pytest listens to every logger, and torch's own trace of a trace takes longer than the trace.
logging.getLogger("torch.__trace").propagate = False


def rows(n):
    """Row i holds i and 2 i."""
    return np.stack([np.arange(n), 2 * np.arange(n)], 1).astype(np.float32)


def visited(source, **settings):
    """The rows in the order of one pass, and the shape of each window; both columns must be of one row."""
    seen, shapes, not_loader = [], [], source.source != "DataLoader"
    for window in source.windows(**settings):
        taken = window.rows.take(window.order)
        assert torch.equal(taken.x[:, 1], 2 * taken.x[:, 0])
        if not_loader:
            assert torch.equal(window.numbers[window.order].float(), taken.x[:, 0]), "rows are known by their number"
        assert taken.context is None or torch.equal(taken.context[:, 0], 10 * taken.x[:, 0])
        seen += taken.x[:, 0].int().tolist()
        shapes.append((window.rows.x.shape, len(window.order)))
    return seen, shapes


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_row_once_in_windows_of_one_shape_and_skip_is_the_tail(kind, data):
    n = data.draw(st.integers(3, 40))
    batch = data.draw(st.integers(1, n))
    window, seed = data.draw(st.integers(1, 50)), data.draw(st.integers(-(2**40), 2**62))
    skip = data.draw(st.integers(0, n + 2))
    with tempfile.TemporaryDirectory() as folder:
        source = narrow(KINDS[kind](rows(n), Path(folder)), window)
        assert isinstance(source, Source)
        assert (len(source), source.features) == (n, (2,))
        before = torch.get_rng_state()
        whole, shapes = visited(source, seed=seed, batch_size=batch)
        again, _ = visited(source, seed=seed, batch_size=batch)
        tail, _ = visited(source, seed=seed, batch_size=batch, skip=skip)
        assert torch.equal(before, torch.get_rng_state()), "no global random number is drawn"
    assert sorted(whole) == list(range(n))
    assert whole == again
    assert tail == whole[skip:]
    assert len({shape for shape, _ in shapes}) == 1
    assert all(count % batch == 0 for _, count in shapes[:-1])
    assert not ours()


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_is_another_order_and_the_head_is_the_first_rows(kind, tmp_path):
    source = narrow(KINDS[kind](rows(40), tmp_path), 10)
    orders = [visited(source, seed=seed, batch_size=2)[0] for seed in range(5)]
    assert len(set(map(tuple, orders))) == 5
    if source.table.seekable:  # a window of two chunks out of eight may be that of another seed, of 1 in 28
        windows = {frozenset(order[:10]) for order in orders}
        assert len(windows) > 2, "power: the blocks are shuffled, not the windows alone"
        assert source.sample(30).x[:, 0].tolist() == [i * 40 // 30 for i in range(30)], "over all files and chunks"
    if kind != "loader":
        assert source.head(3).x[:, 0].tolist() == [0, 1, 2]
    assert len(source.sample(7)) == 7
    assert torch.equal(source.sample(7).x, source.sample(7).x)


@given(n=st.integers(1, 3000), k=st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_a_sample_has_distinct_rows_all_over_the_data(n, k):
    took = pv.data.stream(rows(n)).sample(k).x[:, 0].int().tolist()
    assert len(took) == len(set(took)) == min(n, k)
    assert took == sorted(took)
    assert took[0] == 0
    gaps = np.diff([*took, n])
    assert gaps.max() <= 2 * n / min(k, 256, n) + 1, "no part of the data is left out"


@given(n=st.integers(1, 10**9), row=st.integers(1, 10**5), window=st.integers(1, 10**9), batch=st.integers(1, 10**4))
@settings(max_examples=300, deadline=None)
def test_a_window_is_whole_batches_within_the_bytes_or_everything(n, row, window, batch):
    size = window_rows(n, row, window, min(batch, n))
    assert 1 <= size <= n
    assert size == n or size % min(batch, n) == 0
    assert size * row <= window or size == min(batch, n) or size == n <= 2 * min(batch, n)


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=30), window=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_spans_cover_the_chain(cuts, window, seed):
    bounds = np.cumsum([0, *cuts])
    layout, n = Layout.of(bounds, seed=seed, window=window), int(bounds[-1])
    chain = [[r for a, b in layout.spans(w) for r in range(a, b)] for w in range(-(-n // window))]
    assert sorted(itertools.chain(*chain)) == list(range(n))
    assert {len(part) for part in chain[:-1]} <= {window}


def test_what_lies_in_files_is_told_by_the_number_there(tmp_path):
    x = rows(30)
    x[17, 1] = np.nan
    source = narrow(pv.data.stream(npy(x, tmp_path), block_rows=4), 8)
    with pytest.raises(DataError, match=r"x\.npy: 1 of \d+ values is not finite, the first in row 17, column 1"):
        visited(source, seed=0, batch_size=2)
    (tmp_path / "p").mkdir()
    with pytest.raises(DataError, match=r"b\.parquet: .* the first in row 7, column 'b'"):
        visited(pv.data.stream(files(x, tmp_path / "p")), seed=0, batch_size=2)
    with pytest.raises(DataError, match=r"list: .* the first in row 17, column 1"):
        visited(narrow(pv.data.stream(cut(x), size=30), 8), seed=0, batch_size=2)
    assert not ours()


def test_what_the_likelihood_does_not_take_is_refused_as_it_is_read(tmp_path):
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2), decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(2, [], 3)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4)),
    )  # fmt: skip
    x = np.zeros((30_000, 3), np.float32)
    x[27_222, 1] = 0.5
    source = source_of(pv.data.stream(npy(x, tmp_path), block_rows=15_000), vae)
    with pytest.raises(DataError, match=r"x\.npy: row 27222, column 1 is 0\.5, but Bernoulli takes"):
        list(source.windows(seed=0, batch_size=10))
    x[0, 0] = 3
    with pytest.raises(DataError, match=r"row 0, column 0 is 3"):
        source_of(pv.data.stream(npy(x, tmp_path)), vae)
    with pytest.raises(pv.errors.ModelError):
        source_of(pv.data.stream(npy(x[:, :2], tmp_path)), vae)


def test_nan_is_missing_where_that_was_said(tmp_path):
    x = rows(40)
    x[5, 0] = x[11, 1] = np.nan
    source = narrow(pv.data.stream(npy(x, tmp_path), nan_is_missing=True, block_rows=3), 8)
    for _ in range(2):  # the second pass fills places where the first has left a mask
        missing = []
        for window in source.windows(seed=0, batch_size=4):
            taken = window.rows.take(window.order)
            assert (taken.x[~taken.mask] == 0).all()
            missing += taken.x[(~taken.mask).any(1)].tolist()
        assert sorted(missing) == [[0, 10], [11, 0]]
    x[5] = np.nan
    with pytest.raises(DataError, match="row 5 has no observed value"):
        list(pv.data.stream(npy(x, tmp_path), nan_is_missing=True).windows(seed=0, batch_size=4))
    x[5] = np.inf
    with pytest.raises(DataError, match="row 5, column 0"):
        list(pv.data.stream(npy(x, tmp_path), nan_is_missing=True).windows(seed=0, batch_size=4))


def test_context_and_mask_come_beside(tmp_path):
    x = rows(30)
    np.save(tmp_path / "c.npy", x[:, :1] * 10)
    np.save(tmp_path / "m.npy", np.stack([x[:, 0] >= 0, x[:, 0] % 3 > 0], 1))
    source = narrow(pv.data.stream(npy(x, tmp_path), context=tmp_path / "c.npy", mask=tmp_path / "m.npy"), 8)
    for window in source.windows(seed=0, batch_size=4):
        taken = window.rows.take(window.order)
        assert torch.equal(taken.context[:, 0], 10 * taken.x[:, 0])
        assert torch.equal(taken.mask[:, 1], taken.x[:, 0] % 3 > 0)
        assert torch.equal(taken.x[:, 1], 2 * taken.x[:, 0] * taken.mask[:, 1])
    (tmp_path / "p").mkdir()
    source = pv.data.stream(files(np.concatenate([x, 10 * x[:, :1]], 1), tmp_path / "p"), context=["c"])
    assert (source.columns, source.context) == (["a", "b"], 1)
    assert sorted(visited(source, seed=0, batch_size=4)[0]) == list(range(30))
    with pytest.raises(DataError, match="the context has 29 rows"):
        pv.data.stream(npy(x, tmp_path), context=x[:29])
    with pytest.raises(DataError, match="make them equal"):
        pv.data.stream(npy(x, tmp_path), mask=x[:, :1] > 0)
    with pytest.raises(DataError, match="the mask has type float32; give booleans"):
        pv.data.stream(npy(x, tmp_path), mask=x)


@pytest.mark.parametrize("x_first", [True, False])
def test_context_is_read_whole_where_its_row_groups_end_elsewhere(x_first, tmp_path):
    x = rows(30)
    parquet.write_table(table_of(x if x_first else 10 * x[:, :1]), tmp_path / "t.parquet", row_group_size=4)
    np.save(tmp_path / "t.npy", 10 * x[:, :1] if x_first else x)
    data, context = ("t.parquet", "t.npy") if x_first else ("t.npy", "t.parquet")
    source = narrow(pv.data.stream(tmp_path / data, context=tmp_path / context, block_rows=7), 12)
    assert source.context == 1
    assert sorted(visited(source, seed=0, batch_size=3)[0]) == list(range(30))


class OwnIterator(IterableDataset):
    """A data set that is its own iterator and begins anew."""

    def __iter__(self):
        self.rest = list(torch.from_numpy(rows(6)))
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        return self.rest.pop(0)


def test_an_iterable_data_set_may_be_its_own_iterator():
    source = pv.data.stream(OwnIterator(), size=6)
    assert [sorted(visited(source, seed=seed, batch_size=2)[0]) for seed in range(2)] == [[*range(6)]] * 2


def test_images_are_flattened_as_load_does(tmp_path):
    x = np.arange(24.0).reshape(2, 3, 4)
    loaded, source = pv.data.load(npy(x, tmp_path)), pv.data.stream(npy(x, tmp_path))
    assert torch.equal(source.head().x, loaded.x)
    assert source.image_shape == loaded.image_shape == (3, 4)


@pytest.mark.parametrize("end", ["break", "close", "dropped", "error in the loop", "error in the thread", "whole"])
def test_the_thread_ends(end):
    x = rows(400)
    if end == "error in the thread":
        x[399] = np.nan
    source = narrow(pv.data.stream(x, block_rows=4), 20)
    windows = source.windows(seed=3, batch_size=4)
    if end in ("close", "dropped"):
        next(windows)
        assert len(ours()) == 1, "power: there is a thread to end"
        windows.close() if end == "close" else None
    elif end == "error in the loop":
        with suppress(ZeroDivisionError):
            for _ in source.windows(seed=3, batch_size=4):
                1 / 0  # noqa: B018
    elif end == "error in the thread":
        with pytest.raises(DataError, match="row 399"):
            list(windows)
    else:
        for _ in windows:
            if end == "break":
                break
    del windows
    gc.collect()
    assert not ours()


WAITING = """
import time, torch, pyro_vae as pv
def batches():
    yield torch.zeros(4, 2)
    print("ready", flush=True)
    time.sleep(60)
for _ in pv.data.stream(batches, size=8, window_bytes=32).windows(seed=0, batch_size=4):
    pass
"""


def test_an_interrupt_ends_a_loop_that_waits_for_a_slow_iterable():
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_window_holds_while_the_next_is_read():
    source = narrow(pv.data.stream(rows(4000), block_rows=4), 20)
    for window in source.windows(seed=0, batch_size=4):
        before = window.rows.x.clone()
        threading.Event().wait(0.001)
        assert torch.equal(before, window.rows.x)


REFUSED = {
    "no file": (lambda f: f / "nothing.npy", "no such file"),
    "another kind": (lambda f: (f / "a.csv").write_text("1,2") and f / "a.csv", "only .npy, Parquet and Zarr"),
    "empty folder": (lambda f: f, "contains no .parquet files"),
    "one number per row": (lambda f: npy(np.zeros(3), f), r"the shape is \(3,\)"),
    "no rows": (lambda f: npy(np.zeros((0, 3)), f), "at least one row"),
    "text": (lambda f: npy(np.array([["a"]]), f), "have type <U1"),
    "objects": (lambda f: npy(np.array([[None]]), f), "never loaded"),
    "not an array": (lambda f: (f / "a.npy").write_bytes(b"hello") and f / "a.npy", "never loaded"),
    "Fortran's order": (lambda f: npy(np.asfortranarray(np.zeros((3, 2))), f), "ascontiguousarray"),
    "generator": (lambda f: (b for b in cut(rows(3))), "can be read only once"),
    "batches of no size": (lambda f: cut(rows(3)), "pass size="),
    "a number": (lambda f: 3, "cannot be streamed"),
    "no batches": (lambda f: DataLoader(TensorDataset(torch.zeros(0, 2))), "the iterable has no rows"),
    "empty data set": (lambda f: TensorDataset(torch.zeros(0, 2)), "the data set is empty"),
    "text column": (
        lambda f: parquet.write_table(pa.table({"a": [1.0], "name": ["x"]}), f / "a.parquet") or f,
        "column 'name' has type string",
    ),
    "damaged Parquet": (lambda f: (f / "a.parquet").write_bytes(b"PAR1junk") and f, "not a valid Parquet file"),
    "empty table": (lambda f: parquet.write_table(pa.table({"a": pa.array([], "f4")}), f / "a.parquet") or f, "0 rows"),
    "masked array": (lambda f: np.ma.masked_array(np.zeros((3, 2))), "a masked array"),
    "damaged Zarr": (lambda f: (f / "zarr.json").write_text("{") and f, "cannot be read"),
    "Zarr without a shape": (lambda f: (f / "zarr.json").write_text("{}") and f, "not a valid Zarr array"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_gets_one_sentence(what, tmp_path):
    make, sentence = REFUSED[what]
    if "Zarr" in what:
        pytest.importorskip("zarr")
    with pytest.raises(DataError, match=sentence) as caught:
        pv.data.stream(make(tmp_path))
    assert "\n" not in str(caught.value)


class Unsliceable:
    """Looks like an array, and gives no numbers."""

    shape, dtype = (3, 2), np.dtype("f4")

    def __getitem__(self, rows):
        return [[object()]] * 3


def test_an_array_that_gives_no_numbers_is_refused():
    with pytest.raises(DataError, match="cannot be read"):
        visited(pv.data.stream(Unsliceable()), seed=0, batch_size=2)


def test_what_was_changed_in_memory_alone_is_what_is_read(tmp_path):
    """NumPy's copy on write: the file stays as it was."""
    array = np.load(npy(rows(3), tmp_path), mmap_mode="c")
    array[0] = 7, 14
    assert pv.data.stream(array).head(3).x[:, 0].tolist() == [7, 1, 2]


@pytest.mark.parametrize("make", [lambda x: x, TensorDataset, lambda x: lambda: [x]])
def test_bfloat16_is_read_as_float32(make):
    x = torch.from_numpy(rows(8)).bfloat16()
    assert sorted(visited(pv.data.stream(make(x), size=8), seed=0, batch_size=2)[0]) == list(range(8))


def test_what_writers_of_parquet_leave_behind_is_not_read(tmp_path):
    files(rows(30), tmp_path)
    (tmp_path / "_temporary").mkdir()
    parquet.write_table(table_of(rows(4)), tmp_path / "_temporary" / "d.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"of another system")
    (tmp_path / "README.md").write_text("no table")
    assert len(pv.data.stream(tmp_path)) == 30


class Noisy(TensorDataset):
    def __getitem__(self, i):
        return super().__getitem__(i)[0] + torch.rand(2)


@pytest.mark.parametrize("make", [lambda data: data, lambda data: DataLoader(data, batch_size=2)])
def test_noise_of_torchs_own_generator_is_warned_of_and_undone(make):
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="draws from torch's global generator"):
        pv.data.stream(make(Noisy(torch.zeros(6, 2))))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [None, "id"])
@pytest.mark.parametrize("labels", [[7, 5, 9], ["x", "y", "z"]])
def test_the_index_that_pandas_wrote_is_no_data(labels, name, tmp_path):
    frame = pd.DataFrame(rows(3), pd.Index(labels, name=name), ["a", "b"])
    frame.to_parquet(tmp_path / "x.parquet")
    assert pv.data.stream(tmp_path / "x.parquet").head(3).x.equal(pv.data.load(tmp_path / "x.parquet").x)
    if name and labels[0] == 7:
        with_index = pv.data.stream(tmp_path / "x.parquet", columns=["a", "id"]).head(3).x
        assert with_index[:, 1].tolist() == labels


def test_integers_that_double_precision_would_round_are_refused_with_their_column(tmp_path):
    parquet.write_table(pa.table({"a": [1, 2], "b": [2**53 + 1, None]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'b': has 9007199254740993, which double precision"):
        pv.data.stream(tmp_path / "x.parquet").head(2)


def test_columns_are_refused_where_they_mean_nothing(tmp_path):
    parquet.write_table(table_of(rows(3)), tmp_path / "x.parquet")
    for data, wrong, kind, sentence in [
        (rows(3), {"columns": ["a"]}, pv.errors.SettingsError, "columns does not apply"),
        (tmp_path, {"columns": "ab"}, pv.errors.SettingsError, "give a list of names"),
        (tmp_path, {"columns": ["a", "a"]}, DataError, "column 'a' is selected twice"),
        (tmp_path, {"columns": ["a", "b"], "context": ["b"]}, DataError, "column 'b' is selected twice"),
    ]:
        with pytest.raises(kind, match=sentence):
            pv.data.stream(data, **wrong)


def test_settings_are_refused(tmp_path):
    x = rows(3)
    for wrong, sentence in [
        ({"window_bytes": 0}, "window_bytes is 0"), ({"block_rows": 0.5}, "block_rows is 0.5"),
        ({"size": 4}, "size is 4 but there are 3 rows"), ({"columns": ["a"]}, "columns does not apply"),
        ({"context": cut(x)}, "is an iterable, whose order may differ"),
    ]:  # fmt: skip
        with pytest.raises(pv.errors.SettingsError, match=sentence):
            pv.data.stream(npy(x, tmp_path), **wrong)
    with pytest.raises(DataError, match=r"parts of shapes \[\(3, 2\), \(0, 2\)\]"):
        pv.data.stream([{"x": x, "context": x[:0]}], size=3)
    with pytest.raises(pv.errors.SettingsError, match="mask does not apply"):
        pv.data.stream(cut(x), size=3, mask=x > 0)


def test_a_truncated_and_a_changed_file_are_refused(tmp_path):
    path = npy(rows(50), tmp_path)
    source = narrow(pv.data.stream(path, block_rows=4), 10)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"not a valid \.npy file"):
        pv.data.stream(path)
    with pytest.raises(DataError, match="has changed since"):
        visited(source, seed=0, batch_size=2)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        visited(source, seed=0, batch_size=2)


def test_a_file_that_changes_within_an_epoch_is_refused(tmp_path):
    path = npy(rows(500), tmp_path)
    source = narrow(pv.data.stream(path, block_rows=4), 20)
    windows = source.windows(seed=0, batch_size=2)
    next(windows)
    np.save(tmp_path / "other.npy", rows(501))
    (tmp_path / "other.npy").replace(path)
    with pytest.raises(DataError, match="has changed since"):
        list(windows)


def test_parquet_files_that_differ_are_refused(tmp_path):
    folder = files(rows(30), tmp_path)
    source = pv.data.stream(folder)
    for other, sentence in [
        (table_of(rows(4), "ax"), r"b\.parquet: the columns differ from .*a\.parquet \(\['b', 'x'\]\)"),
        (table_of(rows(4), "ba"), "another order"),
        (table_of(rows(4).astype(np.float64)), "column 'a' has type double, but float in"),
    ]:
        parquet.write_table(other, folder / "b.parquet")
        with pytest.raises(DataError, match=sentence):
            pv.data.stream(folder)
    with pytest.raises(DataError, match=r"b\.parquet: the file has changed"):
        visited(source, seed=0, batch_size=2)


ENCODED = [
    ("i2", "scale_factor", 0.01), ("i2", "add_offset", 273.15), ("i2", "_FillValue", -32768),
    ("i2", "missing_value", [-1]), ("f4", "add_offset", float("nan")), ("f4", "missing_value", -1.0),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
@pytest.mark.parametrize(("dtype", "name", "value"), ENCODED)
def test_numbers_that_the_netcdf_conventions_encode_are_refused(dtype, name, value, kind, tmp_path):
    zarr, h5py = pytest.importorskip("zarr"), pytest.importorskip("h5py")
    folder = zarr_array(np.ones((10, 2), dtype), tmp_path)
    array = zarr.open_array(str(folder)) if kind == "zarr" else h5py.File(tmp_path / "a.h5", "w").create_dataset(
        "a", data=np.ones((10, 2), dtype)
    )  # fmt: skip
    array.attrs[name] = value
    with pytest.raises(DataError, match=f"the attribute {name} is .*; open it with xarray, and save the decoded"):
        pv.data.stream(folder if kind == "zarr" else array)


@pytest.mark.parametrize("version", [2, 3])
def test_what_xarray_writes_is_read_where_the_numbers_are_the_values(version, tmp_path):
    """NaN is the fill value that xarray writes for every array of numbers with a fraction."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    data = xarray.Dataset({"a": (("i", "j"), rows(10)), "b": (("i", "j"), rows(10))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on consolidated metadata
        data.to_zarr(tmp_path / "x.zarr", zarr_format=version, encoding={"b": {"_FillValue": -9999.0}})
    assert pv.data.stream(tmp_path / "x.zarr" / "a").head(10).x.tolist() == rows(10).tolist()
    with pytest.raises(DataError, match="the attribute _FillValue is "):
        pv.data.stream(tmp_path / "x.zarr" / "b")


def test_pickle_in_a_zarr_array_is_never_run(tmp_path):
    zarr = pytest.importorskip("zarr")
    import json

    folder = zarr_array(rows(10), tmp_path, 2)
    about = json.loads((folder / ".zarray").read_text())
    about["filters"] = [{"id": "pickle"}]
    (folder / ".zarray").write_text(json.dumps(about))
    with pytest.raises(DataError, match="the codec 'pickle' is not known to be safe"):
        pv.data.stream(folder)
    zarr.create_group(str(tmp_path / "g")).create_array("inside", data=np.ones((2, 2), "f4"))
    with pytest.raises(DataError, match=r"a Zarr group with .*inside"):
        pv.data.stream(tmp_path / "g")
    assert len(pv.data.stream(tmp_path / "g" / "inside")) == 2


@pytest.mark.parametrize(("size", "sentence"), [(31, "had 30 rows, but size is 31"), (29, "more rows than size=29")])
def test_a_wrong_size_is_told_after_an_epoch(size, sentence):
    source = narrow(pv.data.stream(cut(rows(30)), size=size), 8)
    with pytest.raises(DataError, match=sentence):
        visited(source, seed=0, batch_size=2)
    assert not ours()


def test_what_gives_nothing_at_the_second_pass_is_told_so():
    once, passes = iter(cut(rows(30))), iter([cut(rows(30)), cut(rows(30)), cut(rows(30)), cut(rows(30)), []])
    with pytest.raises(DataError, match="returns the same generator twice"):
        pv.data.stream(lambda: once, size=30)
    source = pv.data.stream(lambda: next(passes), size=30)
    with pytest.raises(DataError, match="an epoch had 0 rows, but size is 30; make it start again"):
        [visited(source, seed=epoch, batch_size=2) for epoch in range(4)]


def test_batches_that_are_not_alike_are_refused():
    for other, sentence in [
        (torch.zeros(2, 3), r"from row 3 on x is of shape \(2, 3\)"),
        (torch.zeros(3), r"has parts of shapes \[\(3,\)\]"),
        ({"y": torch.zeros(2, 2)}, "name the data x"),
        (np.array([["a", "b"]]), "have type <U1"),
        (object(), "have type object"),
    ]:
        with pytest.raises(DataError, match=sentence):
            visited(pv.data.stream([*cut(rows(3)), other], size=5), seed=0, batch_size=1)


def test_a_loader_knows_its_size_and_keeps_its_own_state():
    data = TensorDataset(torch.from_numpy(rows(30)))
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    assert len(pv.data.stream(loader)) == 28
    assert loader.generator is None
    assert loader.sampler.generator is None


@pytest.mark.parametrize("kind", ["npy", "parquet", "batches"])
def test_hashes_tell_other_data_and_not_another_precision_or_kind(kind, tmp_path):
    found = []
    for i, x in enumerate((rows(30), rows(30), rows(31), rows(30) + 1)):
        (tmp_path / str(i)).mkdir()
        found.append(data_hash(hashes_of(KINDS[kind](x, tmp_path / str(i)))))
    assert found[0] == found[1] == data_hash(hashes_of(InMemory(Rows(torch.from_numpy(rows(30))))))
    assert len(set(found)) == 3
    (tmp_path / "d").mkdir()
    double = KINDS[kind](rows(30), tmp_path / "d").like(small_vae(2))
    assert data_hash(hashes_of(double)) == found[0]


@pytest.mark.parametrize("kind", ["npy", "parquet", "zarr", "data set", "loader", "batches", "iterable data set"])
def test_a_stream_can_be_handed_to_another_process(kind, tmp_path):
    source = KINDS[kind](rows(1000), tmp_path)
    before, _ = visited(source, seed=1, batch_size=4)
    handed = pickle.dumps(source)
    assert visited(pickle.loads(handed), seed=1, batch_size=4)[0] == before  # noqa: S301
    assert kind not in ("npy", "zarr") or len(handed) < 5000, "the rows stay where they are"


def test_windows_are_in_the_precision_of_the_vae(tmp_path):
    source = pv.data.stream(npy(np.full((3, 6), 0.1), tmp_path)).like(small_vae())
    [window] = source.windows(seed=0, batch_size=2)
    assert window.rows.x.dtype == torch.float64
    assert window.rows.x[0, 0].item() == 0.1


SECONDS = 1_700_000_000
"""Since 1970; single precision has one number in 128."""

EXACT = {
    "npy": npy,
    "zarr": zarr_array,
    "parquet": lambda x, f: parquet.write_table(table_of(x), f / "x.parquet") or f / "x.parquet",
}


def warned(source, vae):
    """The warnings about precision; that the VAE cannot take such large numbers does not matter here."""
    with warnings.catch_warnings(record=True) as caught, suppress(pv.errors.ModelError):
        warnings.simplefilter("always")
        source_of(source, vae)
    return [str(one.message) for one in caught if one.category is pv.errors.PrecisionWarning]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("n", [3, 200])
def test_a_stream_is_as_precise_as_its_columns_need(n, kind, tmp_path):
    counts = np.arange(6 * n).reshape(n, 6)
    source = pv.data.stream(EXACT[kind](counts + SECONDS, tmp_path))
    assert source.head(n).x.tolist() == (counts + SECONDS).tolist()
    assert "distinct values, but only" in warned(source, small_vae().float())[0]
    assert warned(source, small_vae()) == []
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    gaps = np.where(counts % 5, counts, np.nan)
    assert pv.data.stream(EXACT[kind](gaps, tmp_path / "b"), nan_is_missing=True).dtype == torch.float32
    assert pv.data.stream(EXACT[kind](counts / 7, tmp_path / "c")).head(n).x.dtype == torch.float32


@pytest.mark.parametrize("make", [TensorDataset, lambda x: lambda: [x]])
def test_coarse_numbers_of_a_data_set_or_an_iterable_are_warned_of(make):
    source = pv.data.stream(make(torch.arange(60).reshape(10, 6) + SECONDS), size=10)
    assert "column 0 has 10 distinct values, but only 1 in" in warned(source, small_vae().float())[0]


READING = """
import sys, pyro_vae as pv
source = pv.data.stream(sys.argv[1])
for number, window in enumerate(source.windows(seed=0, batch_size=128)):
    if number == 19:
        break
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux's /proc")
def test_reading_40_gigabytes_takes_less_than_2_of_memory(tmp_path):
    """20 windows are 2.7 GB: a memory-mapped file, whose pages count once they are touched, would be above the bar."""
    n, path = 10**10 // 784, tmp_path / "sparse.npy"
    with path.open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": (n, 784)}
        np.lib.format.write_array_header_1_0(file, about)
        file.truncate(file.tell() + 4 * 784 * n)
    command = [sys.executable, "-c", READING, str(path)]
    kilobytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kilobytes * 1024 < 2e9


def shuffled_spread(n, blocks, seed=0, batch=128, window_share=20):
    """The mean over batches of the standard deviation of sorted values in a batch, against that of all."""
    x = np.sort(np.random.default_rng(0).normal(size=(n, 1)).astype(np.float32), 0)
    window = n // window_share // batch * batch
    source = narrow(pv.data.stream(x, block_rows=max(window // blocks, 1)), window)
    spreads = [
        taken.std().item()
        for w in source.windows(seed=seed, batch_size=batch)
        for taken in w.rows.x[w.order].split(batch)
        if len(taken) == batch
    ]
    return float(np.mean(spreads)) / float(x.std())


def test_batches_of_sorted_data_spread_as_if_all_were_shuffled():
    """By default a window holds 512 blocks; the expected ratio is sqrt(1 - 1/512), and 0.71 with one of 2 blocks."""
    assert shuffled_spread(400_000, BLOCKS) == pytest.approx(1, abs=0.01)
    assert shuffled_spread(400_000, 2) < 0.9, "power: too few blocks are seen"


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_integers_that_double_precision_would_round_are_refused(name, tmp_path):
    array = np.array([[2**53 + 1, 2], [3, 4]])
    np.save(tmp_path / "x.npy", array)
    parquet.write_table(pa.table({"a": array[:, 0], "b": array[:, 1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has 9007199254740993, which double precision would round"):
        pv.data.stream(tmp_path / name).sample(2)


def test_a_checksum_behind_a_packed_chunk_is_no_part_of_it(tmp_path):
    zarr = pytest.importorskip("zarr")
    codecs = [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]
    array = zarr.create_array(str(tmp_path / "x"), shape=(8, 3), chunks=(4, 3), dtype="f4", compressors=codecs)
    array[:] = 1.5
    assert (pv.data.stream(tmp_path / "x").sample(8).x == 1.5).all()
