"""Files of data: arrays, tables and MNIST's; nothing is ever unpickled."""

import gzip
import math
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.rows import Data, as_tensor, reason
from pyro_vae.errors import DataError


def load(path: str | Path) -> Data:
    """Read data from a file: ``.npy``, ``.npz``, ``.csv``, ``.parquet``, or MNIST's IDX, gzipped or not.

    An ``.npz`` with several arrays gives ``x``, and ``y`` as labels. A folder is searched for
    MNIST's training images. Rows of more than one dimension are flattened; the bytes of IDX files are
    divided by 255, other numbers are taken as they are.

    Args:
        path: the file, or MNIST's folder.

    Returns:
        The data, as float32, with labels where the file has them.

    Raises:
        DataError: with one sentence, if there is no such file or its contents cannot be used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("height,weight\\n1.8,80\\n1.7,70\\n")
        ...     data = load(Path(folder, "a.csv"))
        >>> data.columns, data.x.shape
        (['height', 'weight'], torch.Size([2, 2]))
    """
    path = Path(path)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file; give the path of a data file")
        if path.is_dir():
            return _load_mnist_folder(path, "train")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; give one that holds data")
        return _reader(path)(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); copy or make it again") from error


def load_held_out(path: str | Path) -> Data | None:
    """MNIST's own test images, where ``path`` is its folder; otherwise nothing.

    Raises:
        DataError: if the folder's test images are damaged.

    Example:
        >>> load_held_out("data.csv") is None
        True
    """
    path = Path(path)
    return _load_mnist_folder(path, "t10k") if path.is_dir() and _find(path, "t10k-images") else None


def _reader(path: Path) -> Callable[[Path], Data]:
    readers = {".npy": _load_numpy, ".npz": _load_numpy, ".csv": _load_csv, ".parquet": _load_parquet}
    if reader := readers.get(path.suffix.lower()):
        return reader
    if "idx" in path.name.lower():
        return _load_idx
    raise DataError(f"{path}: unknown kind of file; give .npy, .npz, .csv, .parquet or MNIST's IDX files")


def _table(array: np.ndarray, path: Path, labels: np.ndarray | None = None, labels_path: Path | None = None) -> Data:
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused by place
            array = array.astype(np.float32)
    x = as_tensor(array, source=str(path))
    image_shape = (x.shape[1], x.shape[2]) if x.dim() == 3 else None
    return Data(x.flatten(1), _labels(labels, len(x), labels_path or path), image_shape=image_shape, source=str(path))


def _labels(labels: np.ndarray | None, rows: int, path: Path) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != (rows,) or labels.dtype.kind not in "iub":
        raise DataError(f"{path}: the labels have shape {labels.shape}, type {labels.dtype}; give {rows} integers")
    return torch.as_tensor(labels.astype(np.int64))


def _load_numpy(path: Path) -> Data:
    with whole_numpy(path), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        array, labels = (loaded, None) if isinstance(loaded, np.ndarray) else _of_archive(loaded, path)
    return _table(array, path, labels)


@contextmanager
def whole_numpy(path: Path) -> Iterator[None]:
    """Say in one sentence what NumPy complains of when it reads a file.

    Raises:
        DataError: if it does.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # what numpy and its zip reader raise has no common base
        if "pickle" in str(error) or "Python objects" in str(error):
            what = "it holds pickled objects, or nothing of NumPy's; a pickle could run code and is never loaded"
            raise DataError(f"{path}: {what}: save numbers, by numpy.save") from error
        raise DataError(f"{path}: not a whole {path.suffix} file ({reason(error)}); copy or make it again") from error


def _of_archive(archive: Any, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    names = list(archive.files)
    name = names[0] if len(names) == 1 else "x"
    if name not in names:
        raise DataError(f"{path}: it holds {names or 'no arrays'}; name the data x (and labels, if any, y)")
    return archive[name], archive["y"] if "y" in names and name == "x" else None


def _load_csv(path: Path) -> Data:
    import pyarrow as pa
    from pyarrow import csv

    header = _has_header(path)
    read = csv.ReadOptions(autogenerate_column_names=not header)
    try:
        return _from_arrow(csv.read_csv(path, read_options=read), path)
    except pa.ArrowException as error:
        _refuse_ragged(path, header)
        raise DataError(f"{path}: not comma-separated numbers ({reason(error)}); give a table of them") from error


def _refuse_ragged(path: Path, header: bool) -> None:
    """Say which row is too long or too short, if that is the trouble: Arrow counts rows in a single thread only."""
    from pyarrow import csv

    read = csv.ReadOptions(autogenerate_column_names=not header, use_threads=False)
    try:
        csv.read_csv(path, read_options=read)
    except ValueError as error:
        if found := re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error)):
            line, expected, got = map(int, found.groups())
            raise DataError(
                f"{path}: row {line - 1 - header} has {got} value{'s' if got > 1 else ''} and the table has {expected} "
                "columns; make them equal (rows are counted from 0, after the header)"
            ) from error


def _has_header(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    try:
        line = first.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 ({reason(error)}); save the table as CSV in UTF-8") from error
    if "\0" in line:  # UTF-16, or no text at all
        raise DataError(f"{path}: not text in UTF-8 (it holds NUL characters); save the table as CSV in UTF-8")
    return not all(_is_number(cell.strip().strip('"')) for cell in line.strip().split(","))


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def _load_parquet(path: Path) -> Data:
    from pyarrow import parquet

    with whole_parquet(path), parquet.ParquetFile(path) as file:
        return _from_arrow(file.read(), path)


@contextmanager
def whole_parquet(path: str | Path) -> Iterator[None]:
    """Say in one sentence what Arrow complains of when it reads a Parquet file.

    Raises:
        DataError: if it does.
    """
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file ({reason(error)}); copy or make it again") from error


def _from_arrow(table: Any, path: Path) -> Data:
    if table.num_rows == 0 or table.num_columns == 0:
        raise DataError(f"{path}: the table has {table.num_rows} rows and {table.num_columns} columns; it needs both")
    names = [str(name) for name in table.column_names]
    columns = [_column(table.column(i), name, path) for i, name in enumerate(names)]
    x = as_tensor(np.stack(columns, 1), source=str(path), columns=names)
    return Data(x, columns=names, source=str(path))


def _column(column: Any, name: str, path: Path) -> np.ndarray:
    if (values := arrow_numbers(column)) is not None:
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused by place
            return values.astype(np.float32)
    row = next((i for i, value in enumerate(column) if not _casts(value)), 0)
    raise DataError(
        f"{path}: row {row}, column {name!r} is {reprlib.repr(column[row].as_py())}, not a number; encode it as "
        "numbers or drop it (rows are counted from 0)"
    )


def arrow_numbers(column: Any) -> np.ndarray | None:
    """A column of an Arrow table as numbers, NaN for null; nothing where it is of another type.

    Example:
        >>> import pyarrow as pa
        >>> arrow_numbers(pa.chunked_array([[1, None]])), arrow_numbers(pa.chunked_array([["a"]]))
        (array([ 1., nan]), None)
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_floating(kind):
        values: np.ndarray = column.to_numpy(zero_copy_only=False)
        return values
    if pa.types.is_integer(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return column.cast(pa.uint8()).to_numpy(zero_copy_only=False) if pa.types.is_boolean(kind) else None


def _casts(scalar: Any) -> bool:
    """Whether Arrow takes it for a number, which is stricter than Python."""
    import pyarrow as pa

    try:
        scalar.cast(pa.float64())
    except pa.ArrowException:
        return False
    return True


# The types of the IDX format, by the third byte of the file; numbers are stored high byte first.
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or head[3] > 32:
            raise DataError(f"{path}: not an IDX file (it begins with {head.hex(' ')}); copy it again")
        sizes = file.read(4 * head[3])
        shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
        kind, body = np.dtype(_IDX_TYPES[head[2]]), file.read()
    expected = math.prod(shape) * kind.itemsize
    if len(shape) != head[3] or len(body) != expected:
        raise DataError(f"{path}: damaged, {len(body)} bytes follow the header, which says {expected}; copy it again")
    return np.frombuffer(body, kind).reshape(shape)


def _load_idx(path: Path) -> Data:
    array = _read_idx(path)
    if array.ndim < 2:
        raise DataError(f"{path}: it holds {array.ndim}-dimensional data, labels perhaps; give the images' file")
    labels = _sibling_labels(path)
    pixels = array.astype(np.float32) / 255 if array.dtype == np.uint8 else array
    return _table(pixels, path, None if labels is None else _read_idx(labels), labels)


def _sibling_labels(images: Path) -> Path | None:
    stem = images.name.split("images")[0]
    return _find(images.parent, stem + "labels") if "images" in images.name else None


def _find(folder: Path, prefix: str) -> Path | None:
    return next((p for p in sorted(folder.glob(prefix + "*")) if "idx" in p.name and p.is_file()), None)


def _load_mnist_folder(folder: Path, part: str) -> Data:
    images = _find(folder, f"{part}-images")
    if images is None:
        raise DataError(f"{folder}: a folder without MNIST's {part}-images-idx3-ubyte; give a file, or MNIST's folder")
    return _load_idx(images)
