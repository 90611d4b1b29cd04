"""Values keep their meaning, whichever library stores them, or are refused in a sentence."""

import datetime
import io

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import zarr
from xarray import DataArray

from pyro_vae.data import load, rows_of, stream
from pyro_vae.errors import DataError


def of_arrow(array: pa.Array) -> pd.DataFrame:
    """A DataFrame with a column that pandas stores in Arrow's memory, as dtype_backend="pyarrow" does."""
    return pd.DataFrame({"a": pd.Series(array, dtype=pd.ArrowDtype(array.type)), "b": np.arange(len(array)) / 2})


TEXTS = [pa.array(["v", "u", None, "u", "v"], kind) for kind in (pa.string(), pa.large_string())]
TEXTS.append(TEXTS[0].dictionary_encode())


@pytest.mark.parametrize("array", TEXTS, ids=lambda array: str(array.type)[:12])
def test_text_in_arrows_memory_is_categories(array):
    data = load(of_arrow(array), missing="nan")
    assert data.categories == {"a": ["u", "v"]}
    assert data.x[:, 0].tolist() == [1, 0, 0, 0, 1]
    assert data.mask[:, 0].tolist() == [True, True, False, True, True]
    assert load(of_arrow(array.drop_null()), context="a").context[:, 1].tolist() == [1, 0, 0, 1]


NO_NUMBERS = {
    "decimal commas": pa.array(["1,5", "2,5", "3,5", "4,5"]),
    "bytes": pa.array([b"u", b"v", b"u", b"v"]),
    "lists": pa.array([[1], [2], [3], [4]]),
    "structs": pa.array([{"q": 1}] * 4),
    "times": pa.array([1, 2, 3, 4], pa.time32("s")),
}


@pytest.mark.parametrize("array", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_number_in_arrows_memory_is_not_missing(array):
    with pytest.raises(DataError, match=r"column 'a' (is .* not a number|has type .*, not numbers)"):
        load(of_arrow(array), missing="nan")


def test_numbers_as_text_in_arrows_memory_are_numbers():
    frame = pd.read_csv(io.StringIO("a,b\n1.5 ,x\n2.5,y\n"), dtype_backend="pyarrow", dtype={"a": "string[pyarrow]"})
    assert load(frame, drop="b").x.tolist() == [[1.5], [2.5]]


DATES = [
    pd.Timestamp("2020-01-01"), datetime.datetime(2020, 1, 1), np.datetime64("2020-01-01"), datetime.timedelta(1),
    np.timedelta64(1, "D"), pd.Period("2020"), datetime.date(2020, 1, 1), datetime.time(3),
]  # fmt: skip


@pytest.mark.parametrize("date", DATES, ids=lambda date: type(date).__module__ + "." + type(date).__name__)
@pytest.mark.parametrize("options", [{"missing": "nan"}, {"context": "a"}])
def test_dates_among_objects_are_not_counted_in_units_of_their_own(date, options):
    second = date if "context" in options else None
    frame = pd.DataFrame({"a": pd.Series([date, second], dtype=object), "b": [1.5, 2.5]})
    with pytest.raises(DataError, match=r"column 'a' has type .*, not numbers; convert it"):
        load(frame, **options)


def test_an_array_of_hdf5_is_an_array(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.eye(2)  # it has dims, as arrays of xarray have
        assert load(file["x"]).x.equal(torch.eye(2))
        assert rows_of(file["x"]).x.equal(torch.eye(2, dtype=torch.float64))


def arrays(numbers, attributes, folder):
    """The same numbers and attributes as arrays of three libraries, one of them with named columns."""
    file = h5py.File(folder / "a.h5", "w")
    file["x"] = numbers
    file["x"].attrs.update(attributes)
    stored = zarr.create_array(folder / "a.zarr", data=numbers)
    stored.attrs.update(attributes)
    named = {"dims": ["t", "column"], "coords": {"column": ["u", "v"]}}
    return file["x"], stored, DataArray(numbers, attrs=attributes), DataArray(numbers, attrs=attributes, **named)


@pytest.mark.parametrize("read", [load, rows_of, stream])
def test_stored_numbers_that_are_not_the_values_are_refused(read, tmp_path):
    for array in arrays(np.arange(6, dtype=np.int16).reshape(3, 2), {"scale_factor": 0.1}, tmp_path):
        with pytest.raises(DataError, match=r"the attribute scale_factor is 0.1, so the stored numbers are not the"):
            read(array)


def test_attributes_that_change_no_number_are_no_obstacle(tmp_path):
    for array in arrays(np.arange(6.0).reshape(3, 2), {"scale_factor": 1.0, "units": "m"}, tmp_path):
        assert load(array).x.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_a_code_of_missing_values_does_not_make_a_column_coarse(kind):
    array = np.column_stack([1_700_000_000 + np.arange(50), np.arange(50) % 3]).astype(kind)
    array[3, 0] = -999
    data = load(array, missing="-999")
    assert len(data.x[:, 0].unique()) == 50  # single precision has three
    assert data.mask.sum() == 99
    assert load(array.reshape(50, 2, 1), missing="-999").x.equal(data.x)


def test_codes_of_missing_values_in_single_precision_and_bytes():
    assert load(np.array([[0.1, 2]], np.float32), missing="0.1").mask.tolist() == [[False, True]]
    assert load(np.array([[7, 255], [255, 9]], np.uint8), missing="255").mask.tolist() == [[True, False], [False, True]]


def test_tensors_in_columns_are_numbers():
    table = {"a": torch.tensor([1.5, 2.5], requires_grad=True), "b": [torch.tensor(3.0), torch.tensor(4.0)]}
    assert load(table).x.tolist() == [[1.5, 3], [2.5, 4]]


def test_a_type_that_arrow_does_not_have_is_named():
    polars = pytest.importorskip("polars")
    with pytest.raises(DataError, match=r"data: cannot be converted to an Arrow table .*; convert its columns first"):
        load(polars.DataFrame({"a": polars.Series([1, 2], dtype=polars.Int128)}))
