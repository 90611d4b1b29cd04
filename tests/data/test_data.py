"""Data come in as they were written, whatever the format; what is not a finite number is refused by its place."""

import csv
import gzip
import struct
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import parquet
from scipy.io import savemat

from pyro_vae.data import Data, as_tensor, digits, load, load_held_out, rows_of, split
from pyro_vae.data.precision import narrow
from pyro_vae.errors import DataError, SettingsError

NUMBERS = np.random.default_rng(0).normal(size=(20, 3))
IMAGES = np.random.default_rng(1).integers(0, 256, (6, 5, 4)).astype(np.uint8)
CLASSES = np.arange(6, dtype=np.uint8)


def same(x: torch.Tensor, array: np.ndarray) -> bool:
    """Whether the tensor holds the array, as float32."""
    return x.dtype == torch.float32 and np.array_equal(x.numpy(), np.asarray(array, np.float32))


def idx(array: np.ndarray, code: int = 0x08, kind: str = ">u1") -> bytes:
    """Bytes in MNIST's format."""
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(kind).tobytes()


def write_csv(path: Path, array: np.ndarray, header: bool) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(f"c{i}" for i in range(array.shape[1]))
        writer.writerows([repr(float(value)) for value in row] for row in array)


def write_parquet(path: Path, array: np.ndarray) -> None:
    parquet.write_table(pa.table({f"c{i}": column for i, column in enumerate(array.T)}), path)


# Formats.


@pytest.mark.parametrize("kind", ["?", "u1", "i1", "<i2", ">i4", "i8", "f2", "f4", ">f4", "f8", ">f8"])
def test_npy_keeps_numbers_of_every_type(tmp_path, kind):
    array = (10 * NUMBERS).astype("i8").clip(0).astype(kind) if kind in ("?", "u1") else (10 * NUMBERS).astype(kind)
    np.save(tmp_path / "a.npy", array)
    data = load(tmp_path / "a.npy")
    assert same(data.x, array)
    assert data.labels is None
    assert data.source == str(tmp_path / "a.npy")


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_keeps_numbers_in_either_order(tmp_path, order):
    np.save(tmp_path / "a.npy", np.asarray(NUMBERS, order=order))
    assert same(load(tmp_path / "a.npy").x, NUMBERS)


def test_rows_of_images_are_flattened_and_their_shape_kept(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    data = load(str(tmp_path / "a.npy"))
    assert same(data.x, IMAGES.reshape(6, 20)), "bytes of arrays are numbers like others"
    assert data.image_shape == (5, 4)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_x_and_y(tmp_path, save):
    save(tmp_path / "a.npz", other=np.zeros(2), y=np.arange(20), x=NUMBERS)
    data = load(tmp_path / "a.npz")
    assert same(data.x, NUMBERS)
    assert data.labels.tolist() == list(range(20))


def test_npz_with_one_array_gives_it_by_any_name(tmp_path):
    np.savez(tmp_path / "a.npz", anything=NUMBERS)
    assert same(load(tmp_path / "a.npz").x, NUMBERS)


def test_the_labels_of_npz_stay_when_columns_are_chosen_and_arrays_that_are_not_read_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=NUMBERS, y=np.arange(20), mask=NUMBERS > 0, test=NUMBERS)
    data = load(tmp_path / "a.npz", drop="f0")
    assert data.labels.tolist() == [*range(20)]
    assert data.columns == ["f1", "f2"]
    assert "array 'x'; not read: 'mask', 'test'" in data.summary
    np.savez(tmp_path / "b.npz", x=np.arange(6).reshape(3, 2), y=[7, 7, 7])
    assert load(tmp_path / "b.npz", label="f0").labels.tolist() == [0, 2, 4]
    savemat(tmp_path / "a.mat", {"x": NUMBERS, "y": np.arange(20), "mask": NUMBERS > 0})
    assert load(tmp_path / "a.mat").summary == "read 20 rows, 3 columns; array 'x'; not read: 'mask'"


@pytest.mark.parametrize("header", [True, False])
def test_csv_keeps_numbers_with_and_without_a_header(tmp_path, header):
    write_csv(tmp_path / "a.CSV", NUMBERS, header)
    data = load(tmp_path / "a.CSV")
    assert same(data.x, NUMBERS)
    assert data.columns == (["c0", "c1", "c2"] if header else ["f0", "f1", "f2"])


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2\n3,4\n", "a,b\r\n1,2\r\n3,4", '"a","b"\n"1","2"\n3,4\n\n', "\ufeffa,b\n1,2\n 3 ,4e0\n"],
    ids=["plain", "Windows, no last newline", "quotes and an empty last line", "byte order mark and spaces"],
)
def test_csv_is_read_as_spreadsheets_write_it(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    data = load(tmp_path / "a.csv")
    assert data.x.tolist() == [[1, 2], [3, 4]]
    assert data.columns == ["a", "b"]


def test_a_byte_order_mark_is_no_header(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeff1,2\n3,4\n".encode())
    assert load(tmp_path / "a.csv").x.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("integer", [2**60 + 1, -(2**53) - 1, 2**63 + 1])
def test_integers_that_double_precision_would_round_are_refused_in_every_format(tmp_path, integer):
    array = np.array([[integer], [3]], np.uint64 if integer > 0 else np.int64)
    np.save(tmp_path / "a.npy", array)
    (tmp_path / "a.csv").write_text(f"{integer}\n3\n")
    parquet.write_table(pa.table({"c": array[:, 0]}), tmp_path / "a.parquet")
    for name in ("a.npy", "a.csv", "a.parquet"):
        with pytest.raises(DataError, match=f"{name}: .*has {integer}, which double precision would round; subtract"):
            load(tmp_path / name)
    assert same(load(np.array([[2**60], [3]])).x, [[2**60], [3]])


def test_parquet_keeps_numbers_of_every_type(tmp_path):
    columns = {
        "double": [1.5, -2.0],
        "float": pa.array([0.1, 3.0], pa.float32()),
        "integer": [2, 2**40],
        "byte": pa.array([0, 255], pa.uint8()),
        "boolean": [True, False],
        "decimal": [Decimal("1.25"), Decimal("-3.00")],
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet")
    assert same(data.x, [[1.5, 0.1, 2, 0, 1, 1.25], [-2, 3, 2**40, 255, 0, -3]])
    assert data.columns == list(columns)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
def test_idx_gives_pixels_from_0_to_1_and_their_shape(tmp_path, pack):
    (tmp_path / "some-images-idx3-ubyte").write_bytes(pack(idx(IMAGES)))
    data = load(tmp_path / "some-images-idx3-ubyte")
    assert same(data.x, IMAGES.reshape(6, 20) / np.float32(255))
    assert data.image_shape == (5, 4)
    assert data.labels is None


def test_idx_of_floats_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.idx").write_bytes(idx(NUMBERS, 0x0E, ">f8"))
    assert same(load(tmp_path / "a.idx").x, NUMBERS)


def mnist_folder(folder: Path, suffix: str = ".gz") -> Path:
    """Images as MNIST's folder has them: all six for training, the first two for testing."""
    pack = gzip.compress if suffix else bytes
    for part, count in ("train", 6), ("t10k", 2):
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(IMAGES[:count])))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(CLASSES[:count])))
    return folder


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_a_folder_gives_training_and_test_images_with_labels(tmp_path, suffix):
    train, held_out = load(mnist_folder(tmp_path, suffix)), load_held_out(tmp_path)
    for data, count in (train, 6), (held_out, 2):
        assert same(data.x, IMAGES[:count].reshape(count, 20) / np.float32(255))
        assert data.labels.tolist() == CLASSES[:count].tolist()


def test_only_a_folder_with_test_images_has_them(tmp_path):
    assert load_held_out(tmp_path) is None
    images = mnist_folder(tmp_path) / "train-images-idx3-ubyte.gz"
    assert load_held_out(images) is None
    assert load(images).labels.tolist() == CLASSES.tolist(), "labels lie beside their images"


def test_mnist_is_all_there(mnist):
    train, held_out = load(mnist), load_held_out(mnist)
    assert train.x.shape == (60000, 784)
    assert held_out.x.shape == (10000, 784)
    assert train.x.double().mean().item() == pytest.approx(0.13066, abs=1e-5)  # as published, of the training images
    for data in (train, held_out):
        assert data.image_shape == (28, 28)
        assert (data.x.min(), data.x.max()) == (0, 1)
        assert data.labels.unique().tolist() == list(range(10))


def test_digits_are_scikit_learns():
    data = digits()
    assert data.x.shape == (1797, 64)
    assert data.x.dtype == torch.float32
    assert (data.x.min(), data.x.max()) == (0, 1)
    assert data.image_shape == (8, 8)
    assert len(data.labels) == 1797
    assert data.labels.unique().tolist() == list(range(10))


# Arrays and tensors.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "view", [lambda a: a, lambda a: a.T, lambda a: a[::2, 1:]], ids=["whole", "transposed", "part"]
)
def test_a_float_array_is_viewed_not_copied(dtype, view):
    array = view(NUMBERS.astype(dtype))
    tensor = as_tensor(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float_tensor_is_viewed_not_copied(dtype):
    x = torch.tensor(NUMBERS, dtype=dtype, requires_grad=True)
    tensor = as_tensor(x)
    assert tensor.data_ptr() == x.data_ptr()
    assert tensor.dtype == dtype
    assert not tensor.requires_grad


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_that_torch_cannot_view_is_copied(dtype):
    fixed = NUMBERS.astype(dtype)
    fixed.flags.writeable = False
    for array in (fixed, NUMBERS.astype(dtype)[::-1], np.broadcast_to(fixed[:1], (4, 3))):
        tensor = as_tensor(array)
        assert np.array_equal(tensor.numpy(), array)
        tensor.add_(1)  # were it shared, this would change what must not change
    assert np.array_equal(fixed, NUMBERS.astype(dtype))


@pytest.mark.parametrize("data", [[[1, 2], [3, 4]], ((True, False),), torch.ones(2, 3, dtype=torch.bfloat16)])
def test_other_numbers_become_float32(data):
    assert as_tensor(data).dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[1, 2], [3]], "differ in length"),
        ([["a"]], "give real numbers"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex; give real numbers"),
        ([1, 2], "one row per datum"),
        (torch.zeros(0, 2), "at least one row"),
        (torch.tensor([[[0.0, 1.0], [2.0, torch.nan]]]), r"row 0, column 1, 1 \(nan\)"),
    ],
)
def test_what_is_no_table_of_finite_numbers_is_refused(data, message):
    with pytest.raises(DataError, match=f"readings: .*{message}"):
        as_tensor(data, source="readings")


JAGGED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
TENSORS = {  # a tensor, and why it is refused
    "nested": (lambda: JAGGED, "is nested; give rows of the same length"),
    "sparse": (lambda: torch.eye(2).to_sparse(), r"is sparse; give its to_dense\(\)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8), r"give its dequantize\(\)"),
    "meta": (lambda: torch.eye(2, device="meta"), "is on the meta device, which stores no values"),
    "complex": (lambda: (torch.eye(2) * 1j).conj(), "is complex; give real numbers"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("read", [as_tensor, load, rows_of, lambda x: rows_of(x, mask=np.ones((2, 2), bool))])
@pytest.mark.parametrize(("tensor", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_without_a_real_number_for_each_value_is_refused(read, tensor, message):
    if read is load and "sparse" in message:  # which converts it
        assert load(tensor()).x.equal(torch.eye(2))
        return
    with pytest.raises(DataError, match=f"data: the tensor .*{message}"):
        read(tensor())


def test_tensors_of_eight_bits_and_lazily_negative_ones_are_read():
    minus = (torch.eye(2) * 1j).conj().imag
    assert minus.is_neg()
    assert load(minus).x.equal(-torch.eye(2))
    assert load(torch.eye(2).to(torch.float8_e4m3fn)).x.equal(torch.eye(2))


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_integers_beside_a_gap_in_an_arrow_table_are_not_rounded(kind):
    table = pa.table({"a": pa.array([2**53 + 1, None, 3], kind), "b": [1.5, 2.5, 3.5]})
    with pytest.raises(DataError, match="column 'a': has 9007199254740993, which double precision would round"):
        load(table, missing="nan")
    assert load(table, missing="nan", drop="a").columns == ["b"]


def test_integers_with_gaps_and_codes_in_an_arrow_table_are_read():
    data = load(pa.table({"a": pa.array([7, None, -9]), "b": pa.array([1, 2, 3])}), missing="-9,nan")
    assert data.x.tolist() == [[7, 1], [0, 2], [0, 3]]
    assert data.mask.tolist() == [[True, True], [False, True], [False, True]]


def test_a_refusal_names_the_column():
    with pytest.raises(DataError, match="row 1, column 'height'"):
        as_tensor([[1, 2], [3, np.nan]], columns=["weight", "height"])


VALUES = st.floats(width=64) | st.floats(-1e3, 1e3) | st.sampled_from([np.nan, np.inf, -np.inf, 1e39, 0.0])
ARRAYS = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=VALUES)


@pytest.mark.parametrize("name", ["a.npy", "header.csv", "bare.csv", "a.parquet"])
@settings(max_examples=50, deadline=None, database=None)
@given(array=ARRAYS)
def test_any_array_is_loaded_as_it_is_or_refused_by_its_first_bad_row(tmp_path_factory, name, array):
    path = tmp_path_factory.getbasetemp() / name
    write = {".npy": np.save, ".csv": lambda p, a: write_csv(p, a, name == "header.csv"), ".parquet": write_parquet}
    write[path.suffix](path, array)
    expected = narrow(array).numpy()
    # A few numbers that increase, above a row or two of others, may be names.
    rising = name == "bare.csv" and array.shape[1] > 2 and (array[0, 1:] > array[0, :-1]).all()
    options = {"header": False} if rising else {}
    bad = np.flatnonzero(~np.isfinite(expected).all(1))
    if len(bad):
        with pytest.raises(DataError, match=f"the first in row {bad[0]}, column"):
            load(path, **options)
    else:
        assert np.array_equal(load(path, **options).x.numpy(), expected)


# Splits.


@settings(max_examples=50, deadline=None, database=None)
@given(n=st.integers(2, 300), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_a_split_puts_every_row_on_one_side(n, fraction, seed):
    rows = torch.arange(n)
    train, held_out = split(Data(rows[:, None].float(), labels=rows), fraction, seed=seed)
    both = torch.cat([train.labels, held_out.labels])
    assert sorted(both.tolist()) == rows.tolist()
    assert len(held_out.x) == min(max(round(fraction * n), 1), n - 1)
    for part in (train, held_out):
        assert torch.equal(part.x[:, 0].long(), part.labels), "rows keep their labels"


def test_a_split_follows_its_seed_alone():
    data = digits()
    first = split(data, seed=3)
    torch.manual_seed(17)
    again, other = split(data, seed=3), split(data, seed=4)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1].x, other[1].x)
    assert first[1].image_shape == (8, 8)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(SettingsError, match=f"fraction is {fraction}; it must lie between 0 and 1"):
        split(Data(torch.zeros(4, 2)), fraction)


def test_a_table_is_split_as_its_data_are():
    table = pd.DataFrame({"a": range(10), "b": range(10, 20)})
    for part, expected in zip(split(table), split(load(table)), strict=True):
        assert part.x.equal(expected.x)
        assert part.columns == ["a", "b"]


def test_one_row_is_not_split():
    with pytest.raises(DataError, match="readings: a single row cannot be split"):
        split(Data(torch.zeros(1, 2), source="readings"))


def test_a_masked_array_is_not_taken_for_whole():
    values = np.ma.masked_greater(np.arange(6.0).reshape(3, 2), 3)
    with pytest.raises(DataError, match=r"masked array; give data.filled\(0\) and mask="):
        rows_of(values)
    rows = rows_of(values.filled(0), mask=~np.ma.getmaskarray(values))
    assert rows.x.tolist() == [[0, 1], [2, 3], [0, 0]]
