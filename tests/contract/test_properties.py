"""Whatever data are given: the right answer or one sentence of ours, never another's traceback.

The whole 10,000 cases are slow; the ordinary tests take a twentieth of them.
"""

import io
import warnings
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.checks import linear_gaussian
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pyro_vae as pv
from pyro_vae.errors import PyroVAEError

CASES = {
    "arrays": 3000, "missing": 1500, "training": 1000, "damaged files": 2000, "files": 500, "streams": 1000,
    "states": 1000,
}  # fmt: skip
assert sum(CASES.values()) == 10_000
SHARE = pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])


def held(cases, strategy, share, body):
    """Whether ``body`` holds for so many cases; each may end in a sentence of ours."""

    def case(given_case):
        try:
            body(given_case)
        except PyroVAEError as error:
            assert "\n" not in str(error), "one sentence"  # noqa: PT017

    checks = settings(
        max_examples=round(cases * share), deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    checks(given(strategy)(case))()


DTYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(),
    hnp.complex_number_dtypes(), hnp.unicode_string_dtypes(), hnp.datetime64_dtypes(),
)  # fmt: skip
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
VIEWS = {
    "itself": lambda a: a,
    "backwards": lambda a: a[::-1] if a.ndim else a,
    "transposed": lambda a: a.T,
    "every other": lambda a: a[..., ::2] if a.ndim else a,
    "broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "in Fortran's order": np.asfortranarray,
    "a list": lambda a: a.tolist(),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) if a.size else a,
}


@st.composite
def given_arrays(draw):
    array = draw(hnp.arrays(draw(DTYPES), draw(SHAPES)))
    return VIEWS[draw(st.sampled_from(sorted(VIEWS)))](array)


def in_floats(values):
    array = np.asarray(values)
    with np.errstate(over="ignore"):
        return array if array.dtype == np.float64 else array.astype(np.float32)


@SHARE
def test_arrays_of_any_kind_shape_and_strides(share):
    def taken_as_it_is(values):
        rows = pv.data.rows_of(values).x
        assert rows.dim() >= 2
        assert rows.numel() > 0
        assert np.array_equal(rows.numpy(), in_floats(values)), "the numbers that were given"

    held(CASES["arrays"], given_arrays(), share, taken_as_it_is)


@st.composite
def with_nans(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5))
    numbers = st.one_of(st.just(np.nan), st.floats(-1e3, 1e3, width=32), st.sampled_from([np.inf, -np.inf, 0.0, -0.0]))
    values = draw(hnp.arrays(draw(st.sampled_from([np.float32, np.float64, np.float16])), shape, elements=numbers))
    return values, draw(st.one_of(st.none(), hnp.arrays(bool, shape)))


@SHARE
def test_any_pattern_of_what_is_missing(share):
    def missing_is_what_was_nan_or_masked(case):
        values, mask = case
        data = pv.data.mask_nan(
            values if mask is None else pv.data.Data(torch.as_tensor(values), mask=torch.as_tensor(mask))
        )
        seen = ~np.isnan(values) & (True if mask is None else mask)
        assert np.array_equal(data.mask.numpy(), seen)
        assert np.array_equal(data.x.numpy(), np.where(seen, values, 0).astype(data.x.numpy().dtype))
        assert seen.reshape(len(seen), -1).any(1).all(), "a row of nothing is refused"

    held(CASES["missing"], with_nans(), share, missing_is_what_was_nan_or_masked)


MODEL = linear_gaussian(features=3, latents=1)


@SHARE
def test_any_number_of_rows_and_batch_size_gives_the_exact_elbo(share):
    """With the exact guide the objective of an epoch is the mean of log p(x) over all data, if each is met once."""

    def exact(case):
        n, batch, epochs = case
        x = MODEL.sample(max(n, 1))[:n]
        fit = pv.fit(
            MODEL.as_vae(), x, batch_size=batch, epochs=epochs, optimizer=partial(torch.optim.SGD, lr=0.0),
            engine="eager", progress=False, device="cpu",
        )  # fmt: skip
        assert 1 <= batch <= n
        best = MODEL.log_marginal(x).mean().item()
        assert fit.history.objective.values == pytest.approx(best, abs=1e-10)
        assert fit.history.step.values.tolist() == [-(-n // batch) * (i + 1) for i in range(epochs)]

    cases = st.tuples(st.integers(0, 40), st.integers(-1, 45), st.integers(0, 2))
    held(CASES["training"], cases, share, exact)


def a_file(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def finite_rows(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = pv.data.load(path)
    assert data.x.dim() == 2
    assert len(data.x) > 0
    assert bool(data.x.isfinite().all())
    return data


KINDS = ("a.npy", "a.npz", "a.csv", "a.parquet", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")


def a_table(kind, array):
    held_in = io.BytesIO()
    if kind == "a.npy":
        np.save(held_in, array)
    elif kind == "a.npz":
        np.savez(held_in, x=array)
    elif kind == "a.csv":
        np.savetxt(held_in, array, delimiter=",")
    elif kind == "a.parquet":
        pq.write_table(pa.table({f"c{i}": column for i, column in enumerate(array.T)}), held_in)
    else:
        head = b"\0\0\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in (len(array), 1, array.shape[1]))
        held_in.write(head + np.clip(array, 0, 255).astype(np.uint8).tobytes())
    return held_in.getvalue()


TABLES = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.floats(0, 255, width=32))


@st.composite
def damaged_files(draw):
    kind = draw(st.sampled_from(KINDS))
    content = bytearray(a_table(kind, draw(TABLES)) if draw(st.booleans()) else draw(st.binary(max_size=300)))
    for _ in range(draw(st.integers(0, 3))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return kind, bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@SHARE
def test_files_of_any_content(share, tmp_path):
    held(CASES["damaged files"], damaged_files(), share, lambda case: finite_rows(a_file(tmp_path, *case)))


@SHARE
def test_whole_files_give_their_numbers(share, tmp_path):
    def read_back(case):
        kind, table = case
        read = finite_rows(a_file(tmp_path, kind, a_table(kind, table))).x.numpy()
        expected = table.astype(np.uint8).astype(np.float32) / 255 if "idx" in kind else table
        assert np.array_equal(read, expected)

    held(CASES["files"], st.tuples(st.sampled_from(KINDS[:-1]), TABLES), share, read_back)


@st.composite
def streams(draw):
    shape = draw(st.tuples(st.integers(0, 40), st.integers(0, 4)))
    dtype = draw(st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i2", "|u1", "|b1", "<c8", "<U3"]))
    array = draw(hnp.arrays(np.dtype(dtype), shape))
    return (
        np.asfortranarray(array) if draw(st.booleans()) else array,
        draw(st.integers(1, 400)),
        draw(st.integers(1, 50)),
    )


@SHARE
def test_streams_of_any_table(share, tmp_path):
    def every_row_once(case):
        array, window_bytes, batch = case
        np.save(tmp_path / "x.npy", array)
        rows = pv.data.stream(tmp_path / "x.npy", window_bytes=window_bytes)
        visited = [w.rows.x[w.order].clone() for w in rows.windows(seed=3, batch_size=batch)]
        met = torch.cat(visited).numpy()
        expected = array.astype(np.float32)  # as every file is read
        assert np.array_equal(met[np.lexsort(met.T)], expected[np.lexsort(expected.T)])

    held(CASES["streams"], streams(), share, every_row_once)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8)
    | hnp.arrays(st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]), SHAPES).map(torch.as_tensor),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def alike(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and (a == b or a != a)


@SHARE
def test_states_of_any_shape_come_back_from_their_file(share, tmp_path):
    from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree

    def comes_back(tree):
        write_tree(tmp_path / "t.safetensors", tree)
        assert alike(tree, read_tree(tmp_path / "t.safetensors")[0])

    held(CASES["states"], VALUES, share, comes_back)


def test_a_wrong_answer_is_seen():
    """The power of these tests: a reader that turned rows around, or a traceback of another's, would fail them."""
    with pytest.raises(AssertionError):
        held(20, TABLES, 1.0, lambda table: np.testing.assert_array_equal(table[::-1] + 1, table))
    with pytest.raises(ZeroDivisionError):
        held(20, TABLES, 1.0, lambda table: 1 / 0)
