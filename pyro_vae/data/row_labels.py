"""Find the labels of the rows of a table, and read labels as they are written."""

import itertools
import math
from collections.abc import Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.data.columns import list_names
from pyro_vae.data.frames import usable

if TYPE_CHECKING:
    import pandas as pd

UNNAMED = ("", "__index_level_0__", "Unnamed: 0", *(f"Unnamed: 0.{i}" for i in range(1, 10)))
"""The names that pandas and others give to an index saved as a column, those with points to one saved several times."""


def find_row_labels(
    frame: "pd.DataFrame", index: str | None, used: Set[str | None]
) -> tuple[np.ndarray | None, list[str], list[str]]:
    """Find the row labels of a table.

    Args:
        frame: the table.
        index: the column of the row labels, ``""`` for none; if not given, the index of the frame unless it counts the
            rows, or a first column without a name.
        used: columns that have another use.

    Returns:
        The row labels, the columns that are therefore not data, and notes for the summary.

    Example:
        >>> import pandas as pd
        >>> find_row_labels(pd.DataFrame({"": [7, 7], "a": [1, 2]}), None, set())
        (array([7, 7]), [''], ['row labels from the unnamed first column'])
    """
    if index == "":
        return None, [], []
    unnamed = _unnamed(frame, used)
    if index:
        labels, where, columns = row_labels_of(_as_index(frame[index])), f"column {index!r}", [index]
    elif (of_index := labels_of_index(frame)) is not None:
        labels, where, columns = of_index, "the index", []
    elif unnamed:
        labels, where, columns = row_labels_of(_as_index(frame[unnamed[0]])), "the unnamed first column", unnamed[:1]
    else:
        return None, [], []
    notes = [f"row labels from {where}"]
    if lost := [name for name in unnamed if name not in columns]:  # an index that was saved before
        notes.append("the unnamed first column left out" if lost == unnamed[:1] else f"{list_names(lost)} left out")
    return labels, [*columns, *lost], notes


def _unnamed(frame: "pd.DataFrame", used: Set[str | None]) -> list[str]:
    """Return the first columns without name and other use, unless they are empty: a separator may start each line."""
    first = itertools.takewhile(lambda name: name in UNNAMED and name not in used, frame.columns[:-1])
    return [name for name in first if not bool(frame[name].isna().all())]


def _as_index(column: "pd.Series") -> "pd.Index":
    """Convert a column to an index; an index cannot have half precision, nor values without a hash."""
    import pandas as pd

    if column.dtype == object:
        return pd.Index(column.map(lambda value: str(value) if np.iterable(value) else value), dtype=object)
    if getattr(column.dtype, "numpy_dtype", None) == np.float16:  # of Arrow
        column = column.astype(np.float32)
    return pd.Index(usable(column))


def labels_of_index(frame: "pd.DataFrame") -> np.ndarray | None:
    """Return the labels in the index of a DataFrame, or None if it counts the rows.

    Example:
        >>> import pandas as pd
        >>> labels_of_index(pd.DataFrame(index=["a", "b"])).tolist()
        ['a', 'b']
    """
    import pandas as pd

    counts = isinstance(frame.index, pd.RangeIndex) and frame.index.equals(pd.RangeIndex(len(frame)))
    return None if counts else row_labels_of(frame.index)


def row_labels_of(index: "pd.Index") -> np.ndarray:
    """Convert an index to a type that xarray and netCDF support: numbers, times or text, empty where missing.

    Example:
        >>> import pandas as pd
        >>> row_labels_of(pd.Index(["a", 3])).tolist()
        ['a', '3']
    """
    import pandas as pd

    if isinstance(index, pd.MultiIndex):
        return np.array([", ".join(map(str, key)) for key in index])
    kind = index.dtype
    if isinstance(kind, np.dtype) and kind.kind in "iufM" and not (kind.kind == "f" and index.hasnans):
        return index.to_numpy(copy=True)
    if pd.api.types.is_integer_dtype(kind) and not index.hasnans:
        return index.to_numpy(np.uint64 if pd.api.types.is_unsigned_integer_dtype(kind) else np.int64)
    values = index.astype(object)  # iterates faster
    # pandas makes integers beside a missing value 7.0
    texts = [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) for value in values]
    return np.where(index.isna(), "", texts) if index.hasnans else np.array(texts)


def as_written(texts: Sequence[str], decimal: str = ".") -> Any:
    """Convert texts to integers or floats if each is how Python writes its number; otherwise return the texts.

    So 007 and 7, or 1E5 and 100000, remain different labels.

    Args:
        texts: the texts.
        decimal: the decimal point of floats.

    Example:
        >>> as_written(["7", "10"]), as_written(["0.5", "1.5"]), as_written(["007", "7"])
        (array([ 7, 10]), array([0.5, 1.5]), ['007', '7'])
    """
    import pyarrow as pa

    array = pa.array(texts, pa.large_string())
    for kind in (pa.int64(), pa.uint64()):
        with suppress(pa.ArrowInvalid):  # not integers, or too large for 64 bits
            integers = array.cast(kind)
            if integers.cast(pa.large_string()).equals(array):
                return np.array(integers)
    try:
        floats = [float(text.replace(decimal, ".")) for text in texts]
    except ValueError:
        return texts
    same = all(repr(number).replace(".", decimal) == text for number, text in zip(floats, texts, strict=True))
    return np.array(floats) if same and all(map(math.isfinite, floats)) else texts
