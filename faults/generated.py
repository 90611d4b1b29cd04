"""Arrays and tables of all types, generated from bytes, so that the fuzzer reaches types that few files have."""

import datetime
import random
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

import pyro_vae as pv

TYPES = [
    "?", "i1", "u1", "i2", "u4", "i8", "u8", "f2", "f4", "f8", "g", "F", "D", "S3", "U2", "S0", "U0", "V4",
    "M8[ns]", "M8[D]", "m8[s]", "M8", "m8", ">i4", ">f8", ">U2", ">M8[s]", "O",
]  # fmt: skip
NAMES = ("a", "b", "c", "", "index", "Unnamed: 0", "__index_level_0__", "x y", "ä", "0", "a\n", "\x07", "a ", "f0")
VALUES: tuple[list[Any], ...] = (
    [1, 2, 3], [1.5, float("nan"), float("inf"), -1e308], ["a", "b", "c"], ["1", "2,5", "1e3", "nan", "", "NA", " 3 "],
    [True, False], [None, 1, 2], [None], [Decimal("1.5"), Decimal("NaN"), Decimal("1e400")],
    [datetime.date(2020, 1, 1), None], [datetime.datetime(1, 1, 1), datetime.datetime(9999, 1, 1)], [b"a", b"\xff"],
    [[1, 2], [3]], [{}, {"a": 1}], [2**53 + 1, 2**63, 10**400], [2**64 - 1, 0], [1, "a", 2.5, None], ["\ud800"],
    [pd.NA, 1], [pd.NaT, pd.Timestamp(0)], [np.float16(65504)], ["a\nb", "\x07"], [uuid.UUID(int=1)], [1 + 2j, 1],
)  # fmt: skip
PANDAS = [
    "Int8", "UInt64", "Float32", "Float64", "boolean", "string", "category", "int64[pyarrow]", "double[pyarrow]",
    "string[pyarrow]", "bool[pyarrow]", "Sparse[float]", "Sparse[int]", "datetime64[s]", "datetime64[ns, UTC]",
    "timedelta64[ns]", "period[D]", "object", "float16", "float32", "complex128", "uint8", "date32[day][pyarrow]",
    "time64[us][pyarrow]", "binary[pyarrow]", "null[pyarrow]", "halffloat[pyarrow]",
]  # fmt: skip
ARROW = (
    pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(),
    pa.binary(), pa.null(), pa.date32(), pa.timestamp("ns", "UTC"), pa.time32("s"), pa.duration("s"),
    pa.decimal128(5, 2), pa.decimal256(50, 3), pa.list_(pa.int8()), pa.list_(pa.float32(), 2),
    pa.struct([("a", pa.int8())]), pa.map_(pa.string(), pa.int8()), pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.float64()), pa.month_day_nano_interval(), pa.binary(3), pa.string_view(),
)  # fmt: skip
CODES = (0, -1, 1.5, "a", "", float("nan"), None, True, 10**400, b"x", "-9999.9")


def read_array(folder: Path) -> object:
    """Read an array, in memory or from ``.npy``."""
    chance = random.Random((folder / "seed").read_bytes())
    try:
        array = _array(chance)
    except ValueError:  # a type that NumPy cannot make
        return None
    options = _options(chance, list(array.dtype.names or ("f0", "f1")))
    if chance.random() < 0.5 or array.dtype.hasobject:
        return _validated(pv.data.load(array, **options), options)
    np.save(folder / "x.npy", array)
    return _validated(pv.data.load(folder / "x.npy", **options), options)


def read_table(folder: Path) -> object:
    """Read a table of pandas or Arrow, in memory, from Parquet or from CSV."""
    chance = random.Random((folder / "seed").read_bytes())
    names = chance.sample(NAMES, chance.choice([0, 1, 1, 2, 2, 3, 4]))
    rows = chance.choice([0, 1, 2, 3, 5, 8])
    try:
        table = _frame(chance, names, rows) if chance.random() < 0.6 else _arrow(chance, names, rows)
        source = _stored(chance, table, folder)
    except Exception:  # a table that its own library cannot make or write
        return None
    options = _options(chance, names)
    if isinstance(source, Path) and source.suffix == ".parquet" and chance.random() < 0.2:
        rows_read = pv.data.stream(source, **{name: value for name, value in options.items() if name != "index"})
        return rows_read.sample(8)
    return _validated(pv.data.load(source, **options), options)


def _validated(data: pv.data.Data, options: dict[str, Any]) -> pv.data.Data:
    assert data.x.numel(), data.x.shape
    assert "missing" in options or bool(data.x.isfinite().all()), "a number is not finite"
    return data


def _options(chance: random.Random, names: list[str]) -> dict[str, Any]:
    """Choose options, which name columns that there are, most of the time."""

    def name() -> str:
        return chance.choice(names) if names and chance.random() < 0.8 else chance.choice(["zz", "", "a"])

    options: dict[str, Any] = {
        "index": name(),
        "label": name(),
        "drop": [name()],
        "columns": [name()],
        "context": [name()],
    }
    options["missing"] = [chance.choice(CODES)]
    return {key: value for key, value in options.items() if chance.random() < 0.12}


def _type(chance: random.Random, depth: int = 0) -> np.dtype[Any]:
    if chance.random() < 0.75 or depth > 2:
        return np.dtype(chance.choice(TYPES))
    fields: list[Any] = [
        (name, _type(chance, depth + 1)) for name in chance.sample(NAMES, chance.choice([0, 1, 1, 2, 3]))
    ]
    fields = [(*field, chance.choice([(2,), (0,), (2, 2)])) if chance.random() < 0.1 else field for field in fields]
    return np.dtype([field for field in fields if field[0]] or "f8", align=chance.random() < 0.2)


def _array(chance: random.Random) -> np.ndarray:
    shape = tuple(chance.choice([0, 1, 1, 2, 3, 4, 7]) for _ in range(chance.choice([0, 1, 1, 2, 2, 2, 3, 4])))
    kind = _type(chance)
    if kind.hasobject:
        array = np.zeros(shape, kind)
    else:
        size = int(np.prod(shape)) * kind.itemsize
        array = np.frombuffer(chance.randbytes(size), np.uint8).copy()
        array = np.zeros(shape, kind) if not size or chance.random() < 0.3 else array.view(kind).reshape(shape)
    if array.dtype.kind == "O":
        array = np.array([chance.choice(chance.choice(VALUES)) for _ in range(array.size)] + [None], object)[:-1]
        array = array.reshape(shape)
    return np.asfortranarray(array) if chance.random() < 0.3 else array


def _values(chance: random.Random, rows: int) -> list[Any]:
    pool = chance.choice(VALUES)
    return [chance.choice(pool) for _ in range(rows)]


def _frame(chance: random.Random, names: list[str], rows: int) -> pd.DataFrame:
    columns = [
        pd.Series(_values(chance, rows), dtype=chance.choice(PANDAS) if chance.random() < 0.5 else None) for _ in names
    ]
    frame = pd.concat(columns, axis=1, keys=names) if columns else pd.DataFrame(index=range(rows))
    if chance.random() < 0.2:
        frame.index = pd.Index(_values(chance, rows))
    return frame


def _arrow(chance: random.Random, names: list[str], rows: int) -> pa.Table:
    return pa.table([pa.array(_values(chance, rows), chance.choice(ARROW)) for _ in names], names=names)


def _stored(chance: random.Random, table: Any, folder: Path) -> Any:
    """Return the table, or the path of a file of it."""
    where = chance.random()
    if where < 0.5:
        return table
    if where < 0.7 and isinstance(table, pd.DataFrame):
        table.to_csv(folder / "x.csv", index=chance.random() < 0.5, sep=chance.choice(",;\t"))
        return folder / "x.csv"
    if isinstance(table, pd.DataFrame):
        table.to_parquet(folder / "x.parquet")
    else:
        parquet.write_table(table, folder / "x.parquet")
    return folder / "x.parquet"
