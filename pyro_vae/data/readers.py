"""Read data files: tables, arrays and images; pickles are never loaded."""

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.columns import list_names
from pyro_vae.data.images import find_pictures, read_pictures
from pyro_vae.data.limits import (
    HIGHEST_RATIO,
    MOST_CELLS,
    UNPACKED,
    in_bytes,
    try_reading,
    validate_hdf5,
    validate_unpacked,
)
from pyro_vae.data.memory import DEFAULTS, Options, as_list, as_missing, dense, from_anndata, from_memory
from pyro_vae.data.parquet import read_parquet
from pyro_vae.data.text import open_text, read_text
from pyro_vae.data.values import Data, reason
from pyro_vae.errors import DataError, SettingsError


def load(
    source: Any,
    *,
    index: str | None = None,
    label: str | None = None,
    drop: str | Sequence[str] = (),
    columns: str | Sequence[str] | None = None,
    missing: str | Sequence[Any] | None = None,
    context: str | Sequence[str] = (),
    sep: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    key: str | None = None,
    like: Data | None = None,
) -> Data:
    """Read data from a file, or from a table or array of any library.

    The attribute ``summary`` describes in one line what was read and which options were detected. The first line of a
    text file is a header if it contains no numbers, or numbers that are names by their position or order, such as years
    above fractions; a line that may be either is an error unless ``header`` is given. A first column without a name
    holds the row labels. Row labels and class labels that are not numbers as Python writes them, such as 007 and 1E5,
    stay text. Rows with more than one dimension are flattened, and bytes of shape
    ``(n, height, width, 3)`` have the channels moved first. Pixels of IDX files and of image files are divided by 255;
    other numbers are not changed.

    Args:
        source: a ``.csv``, ``.tsv`` or ``.txt`` file, gzipped, zipped or plain; a ``.parquet``, ``.npy``, ``.npz``,
            ``.mat`` or ``.h5ad`` file (``pip install pyro-vae[anndata]``); an IDX file or MNIST's folder; a folder of
            images of one size and 8 bits per channel, whose subfolders, if any, are the labels; a DataFrame, a Series,
            an Arrow table or any table with the Arrow protocol, such as polars'; an AnnData; an array or tensor,
            structured or sparse; a DataArray, whose second dimension may name the columns.
        index: the column of the row labels; ``""`` for none.
        label: the column of the labels, for colours in figures.
        drop: columns to leave out, as ``"id,date"`` or a list.
        columns: columns to use, in this order; all remaining columns if not given.
        missing: codes of missing values, as ``"?,-999"`` or a list. NaN and empty cells are always included; ``"nan"``
            means only these. If not given, a missing value is an error.
        context: columns that are not data but additional inputs of prior, decoder and encoder, as ``"age,sex"`` or a
            list. Categories become one-hot. No value may be missing.
        sep: the separator of a text file: one character, ``"tabs"`` or ``"spaces"``.
        decimal: the decimal point of a text file, ``"."`` or ``","``.
        header: whether the first line of a text file names the columns.
        key: the array of an ``.npz`` or ``.mat`` file, by default ``x`` or the only one; or the layer of an AnnData, by
            default ``X``. Its ``obs`` holds label and context.
        like: other data, whose columns, context columns and categories these data must have, in any order.

    Returns:
        The data, as float32 (float64 if float32 would merge values of a column), with the labels, if any.

    Raises:
        DataError: if the file does not exist or its contents cannot be used.
        SettingsError: if an argument does not apply to this kind of data.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("height;weight\\n1,8;80\\n1,7;70\\n")
        ...     data = load(Path(folder, "a.csv"))
        >>> data.columns, data.x.shape, data.summary
        (['height', 'weight'], torch.Size([2, 2]), 'read 2 rows, 2 columns; separated by semicolons; decimal commas')
    """
    one = {"index": index, "label": label}
    if odd := next((name for name, value in one.items() if not isinstance(value, str | None)), None):
        raise SettingsError(f"{odd} is {one[odd]!r}; give the name of a column")
    if not isinstance(header, bool | None):
        raise SettingsError(f"header is {header!r}; give True or False")
    options = Options(
        index, label, as_list(drop) or [], as_list(columns), as_missing(missing), as_list(context) or [], key, like
    )  # fmt: skip
    of_text: dict[str, Any] = {"sep": sep, "decimal": decimal, "header": header}
    if not isinstance(source, str | Path):
        options.validate_unused("data in memory", **of_text)
        return from_memory(source, options)
    path = Path(source)
    try:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file; give the path of a data file")
        if os.path.isdir(path):
            options.validate_unused(str(path), **of_text, **options.of_tables())
            return _load_folder(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; give a file with data")
        if is_text(path):
            _validate_packed(path)
            frame, dialect = read_text(
                path, **of_text, missing=[m for m in options.missing or () if isinstance(m, str)],
                index=options.index, label=options.label, named=options.named(),
            )  # fmt: skip
            return options.table(frame, str(path), dialect.describe())
        options.validate_unused(str(path), **of_text)
        return _reader(path)(path, options)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); copy or make it again") from error


TEXT = (".csv", ".tsv", ".txt")
"""The suffixes of text files, before ``.gz`` if gzipped."""


def is_text(path: Path) -> bool:
    """Return whether the name of a file is that of a text table.

    Example:
        >>> is_text(Path("a.csv.gz")), is_text(Path("a.zip")), is_text(Path("a.npy"))
        (True, True, False)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2:-1] != [] and suffixes[-2] in TEXT
    return suffixes[-1:] == [".zip"] or (suffixes[-1:] != [] and suffixes[-1] in TEXT)


def _validate_packed(path: Path) -> None:
    """Validate the unpacked size of a text file by unpacking it to nowhere."""
    if path.suffix.lower() not in TEXT and path.stat().st_size > MOST_CELLS / HIGHEST_RATIO:
        with open_text(path) as file:
            while file.read(2**20):
                pass


def load_held_out(path: str | Path) -> Data | None:
    """Load MNIST's test images if ``path`` is its folder, else return None.

    Raises:
        DataError: if the test images are damaged.

    Example:
        >>> load_held_out("data.csv") is None
        True
    """
    path = Path(path)
    return _load_mnist_folder(path, "t10k") if os.path.isdir(path) and _find(path, "t10k-images") else None


def _reader(path: Path) -> Callable[[Path, Options], Data]:
    readers = {".npy": _load_numpy, ".npz": _load_numpy, ".parquet": _load_parquet, ".mat": _load_matlab}
    readers[".h5ad"] = _load_anndata
    if reader := readers.get(path.suffix.lower()):
        return reader
    if "idx" in path.name.lower():
        return _load_idx
    kinds = ".csv, .tsv, .txt, .parquet, .npy, .npz, .mat, .h5ad or MNIST's IDX files"
    raise DataError(f"{path}: unknown file type; give {kinds}")


def _load_numpy(path: Path, options: Options) -> Data:
    with whole_numpy(path), path.open("rb") as file:
        _validate_numpy(path, file)
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            options.validate_unused(str(path), key=options.key)
            return options.array(loaded, str(path))
        array, labels, notes = _choose_arrays(loaded, [*loaded.files], path, options.key)
    return options.array(array, str(path), labels, notes=notes)


def _validate_numpy(path: Path, file: Any) -> None:
    """Validate the sizes in the headers of an array or of an archive of arrays."""
    if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):  # the magic numbers of an archive and of an empty archive
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            counts = Counter(info.filename.removesuffix(".npy") for info in members)
            for name, count in counts.most_common(1):
                if count > 1:  # NumPy reads the last
                    raise DataError(f"{path}: {count} arrays have the name {name!r}; save each with its own name")
            validate_unpacked(path, sum(info.file_size for info in members))
            for info in members:
                with archive.open(info) as packed:
                    is_array = packed.read(6) == np.lib.format.MAGIC_PREFIX
                    packed.seek(0)
                    if is_array or info.filename.endswith(".npy"):
                        _validate_array(path, packed, info.file_size)
    else:
        file.seek(0)
        _validate_array(path, file, path.stat().st_size)
    file.seek(0)


def _validate_array(path: Path, file: Any, size: int) -> None:
    """Validate that a file holds as many bytes as the header of its array announces."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file, max_header_size=10_000)
    if not dtype.hasobject and (needed := math.prod(shape) * dtype.itemsize) > size:
        raise ValueError(f"the header announces {in_bytes(needed)}, but the file has {in_bytes(size)}")


@contextmanager
def whole_numpy(path: Path) -> Iterator[None]:
    """Convert NumPy's errors on reading a file to a DataError of one sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # errors of numpy and its zip reader have no common base class
        if "pickle" in str(error) or "Python objects" in str(error):
            what = "contains pickled objects or is not a NumPy file; pickles can run code and are never loaded"
            raise DataError(f"{path}: {what}, so save numbers with numpy.save") from error
        raise DataError(f"{path}: not a valid {path.suffix} file ({reason(error)}); copy or make it again") from error


def _choose_arrays(
    archive: Any, names: Sequence[str], path: Path, key: str | None
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Return the array named by ``key``, the only array or ``x``, its labels ``y``, and a note of unread arrays."""
    name = key or (names[0] if len(names) == 1 else "x")
    if name not in names:
        lacks = "" if key is None else f" but not {key}"
        raise DataError(
            f"{path}: contains {[*names] or 'no arrays'}{lacks}; choose an array by key, or name the data x (and the "
            "labels y)"
        )
    labels = archive["y"] if "y" in names and name != "y" and (key or name == "x") else None
    unread = [other for other in names if other != name and (other != "y" or labels is None)]
    notes = [f"array {name!r}; not read: {list_names(unread)}"] if unread else []
    return _validate_converted(path, dense(archive[name], str(path))), labels, notes


def _validate_converted(path: Path, array: np.ndarray) -> np.ndarray:
    """Validate the size of the numbers that an unpacked array becomes."""
    single = array.itemsize < 3 or array.dtype == np.float32
    validate_unpacked(path, (4 if single else max(8, array.itemsize)) * array.size)
    return array


def _load_matlab(path: Path, options: Options) -> Data:
    from scipy.io import loadmat

    try:
        try_reading("mat", path, ".mat file", _matlab_bytes(path))
        loaded = loadmat(path)
    except DataError:
        raise
    except Exception as error:  # scipy's errors on damaged files have no common base class
        raise DataError(f"{path}: not a valid .mat file ({reason(error)}); copy or make it again") from error
    names = [name for name in loaded if not name.startswith("__")]
    array, labels, notes = _choose_arrays(loaded, names, path, options.key)
    return options.array(array, str(path), None if labels is None else np.squeeze(labels), notes=notes)


def _matlab_bytes(path: Path) -> int:
    """Measure the unpacked size of a MATLAB file by unpacking its compressed variables to nowhere."""
    with path.open("rb") as file:
        head, unpacked = file.read(128), 0
        order = {b"IM": "<", b"MI": ">"}.get(head[126:])
        if order and max(head[124:126]) == 2:  # HDF5
            raise DataError(f"{path}: is a MATLAB file of version 7.3; save it with save(..., '-v7')")
        while order and len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}II", tag)
            unpacker, packed = zlib.decompressobj(), file.read(min(size, path.stat().st_size))
            while kind == 15 and packed:
                unpacked += len(unpacker.decompress(packed, 2**20))
                packed = unpacker.unconsumed_tail
                if unpacked > UNPACKED:
                    validate_unpacked(path, unpacked)
    return unpacked + path.stat().st_size


def _load_anndata(path: Path, options: Options) -> Data:
    try:
        import anndata
    except ImportError as error:
        raise DataError(f"{path}: reading .h5ad needs anndata; pip install pyro-vae[anndata]") from error
    validate_hdf5(path)
    try:
        annotated = anndata.read_h5ad(path)
    except Exception as error:  # errors of anndata and its HDF5 reader have no common base class
        raise DataError(f"{path}: not a valid .h5ad file ({reason(error)}); copy or make it again") from error
    return from_anndata(annotated, options, str(path))


def _load_parquet(path: Path, options: Options) -> Data:
    known = () if options.like is None else options.like.context_columns or ()
    used = {options.index, options.label, *options.context, *known}
    unused = [name for name in options.drop if name not in used]
    table, dropped = read_parquet(path, drop=unused, text=(options.index, options.label))
    return replace(options, drop=[name for name in options.drop if name not in dropped]).table(table, str(path))


# The types of the IDX format, by the third byte of the file; numbers are big-endian.
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or head[3] > 32:
            raise DataError(f"{path}: not an IDX file (it starts with {head.hex(' ')}); copy it again")
        sizes = file.read(4 * head[3])
        shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
        kind = np.dtype(_IDX_TYPES[head[2]])
        expected = math.prod(shape) * kind.itemsize
        validate_unpacked(path, expected)
        body = file.read(expected + 1)
    if 0 in shape:
        raise DataError(f"{path}: the shape is {shape}; there must be at least one row and one feature")
    if len(shape) != head[3] or len(body) != expected:
        found = f"more than {expected}" if len(body) > expected else str(len(body))
        raise DataError(f"{path}: damaged: {found} bytes follow the header, which announces {expected}; copy it again")
    return np.frombuffer(body, kind).reshape(shape)


def _load_idx(path: Path, options: Options = DEFAULTS) -> Data:
    options.validate_unused(str(path), **options.of_tables())
    array = _validate_converted(path, _read_idx(path))
    if array.ndim < 2:
        raise DataError(f"{path}: contains {array.ndim}-dimensional data, perhaps labels; give the file of the images")
    labels = _sibling_labels(path)
    pixels = np.divide(array, 255, dtype=np.float32) if array.dtype == np.uint8 else array
    named = str(path if labels is None else labels)
    return options.array(pixels, str(path), None if labels is None else _read_idx(labels), named)


def _sibling_labels(images: Path) -> Path | None:
    stem = images.name.split("images")[0]
    return _find(images.parent, stem + "labels") if "images" in images.name else None


def _find(folder: Path, prefix: str) -> Path | None:
    return next((p for p in sorted(folder.glob(prefix + "*")) if "idx" in p.name and os.path.isfile(p)), None)


def _load_folder(folder: Path) -> Data:
    paths, notes = ([], []) if _find(folder, "train-images") is not None else find_pictures(folder)
    if not paths:
        return _load_mnist_folder(folder, "train")
    found = read_pictures(folder, paths, notes)
    data = DEFAULTS.array(found.array, str(folder), found.labels, notes=found.notes)
    return replace(data, x=data.x / 255, row_labels=np.array(found.names), label_names=found.label_names)


def _load_mnist_folder(folder: Path, part: str) -> Data:
    images = _find(folder, f"{part}-images")
    if images is None:
        raise DataError(
            f"{folder}: the folder contains neither MNIST's {part}-images-idx3-ubyte nor images; give a file, or a "
            "folder with either"
        )
    return _load_idx(images)
