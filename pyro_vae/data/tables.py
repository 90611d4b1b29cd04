"""Convert tables of named columns to numbers, row labels, labels and category names."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.data.columns import list_names, numbers_of
from pyro_vae.data.context import describe_context, read_context
from pyro_vae.data.row_labels import UNNAMED, find_row_labels
from pyro_vae.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MOST_TEXT_COLUMNS = 10**4
"""The maximum number of columns that are not numbers; encoding each takes a millisecond."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A table, converted to numbers.

    Args:
        values: shape ``(row, column)``, NaN where missing.
        names: the names of the columns.
        row_labels: the row labels, if any.
        labels: a class per row.
        label_names: the names of the classes, unless they are integers.
        categories: the names of the codes 0, 1, …, by column.
        notes: sentences for the summary, such as which column holds the row labels.
        context: shape ``(row, c)``, if there are context columns.
    """

    values: np.ndarray
    names: list[str]
    row_labels: np.ndarray | None
    labels: np.ndarray | None
    label_names: list[str] | None
    categories: dict[str, list[str]]
    notes: list[str]
    context: np.ndarray | None = None


def columns_of(
    frame: "pd.DataFrame",
    *,
    index: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    missing: Sequence[Any] = (),
    context: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    source: str = "data",
) -> Columns:
    """Convert the columns of a DataFrame to numbers.

    Text columns of numbers become numbers. Categories become codes 0, 1, …, and so does text with at most 20 distinct
    values that occur twice on average.

    Args:
        frame: the table.
        index: the column of the row labels, ``""`` for none; if not given, the index of the frame unless it counts the
            rows, or a first column without a name that ``columns`` and ``context`` do not list.
        label: the column of the labels.
        drop: columns to leave out.
        columns: columns to use, in this order; all remaining columns if not given.
        missing: codes of missing values, besides NaN and None.
        context: the context columns.
        categories: the categories of other data, by column, whose codes are used.
        source: the name of the data, for messages.

    Raises:
        DataError: if a column does not exist, two have the same name, or a value is not a number.

    Example:
        >>> import pandas as pd
        >>> table = columns_of(pd.DataFrame({"size": [1, 2, 4, 3], "colour": list("rgrg")}))
        >>> table.values[:2].tolist(), table.categories, table.notes
        ([[1.0, 1.0], [2.0, 0.0]], {'colour': ['g', 'r']}, ["column 'colour' as codes of 2 categories"])
    """
    names, decimal_comma = _names(frame, source), frame.attrs.get("decimal") == ","
    notes: list[str] = []
    frame = frame.set_axis(names, axis="columns")
    _validate_uses(names, [index or None, label, *{*drop}], {"columns": columns or (), "context": context}, source)
    used = {label, *drop, *(columns or ()), *context}
    row_labels, beside, found = find_row_labels(frame, index, used)  # before codes of missing values are masked
    if missing and names:
        frame = frame.mask(frame.apply(_equals_any, values=list(missing)))
    if decimal_comma:
        _validate_no_points(frame[[*context]], source)
    given, coded = read_context(frame, context, categories=categories, source=source)
    if context:
        notes.append(describe_context(context, coded))
    frame = frame.drop(columns=list(drop))
    labels, label_names = None, None
    if label is not None:
        labels, label_names = _labels(frame.pop(label), label, source)
        notes.append(f"labels from column {label!r}")
    notes.extend(found)
    frame = frame.drop(columns=[name for name in (*beside, *context) if name in frame])
    frame = _without_empty(frame, notes) if columns is None else frame[[name for name in columns if name in frame]]
    if 0 in frame.shape:
        raise DataError(
            f"{source}: the table has {frame.shape[0]} rows and {frame.shape[1]} columns; give at least one of each"
        )
    if (texts := sum(kind.kind not in "biufcmM" for kind in frame.dtypes)) > MOST_TEXT_COLUMNS:
        raise DataError(
            f"{source}: {texts:,} columns are not numbers, above the limit of {MOST_TEXT_COLUMNS:,}; encode them first"
        )
    if decimal_comma:
        _validate_no_points(frame, source)
    values = np.empty(frame.shape)
    for i, name in enumerate(frame.columns):
        values[:, i], levels = numbers_of(frame.iloc[:, i], name, source, (categories or {}).get(name))
        if levels is not None:
            coded[name] = levels
            notes.append(f"column {name!r} as codes of {len(levels)} categories")
    if counting := _counts_rows(values[:, 0]):
        notes.append(f"column {frame.columns[0]!r} {counting}: index={frame.columns[0]!r} uses it as row labels")
    return Columns(
        values, [*frame.columns], row_labels, labels, label_names, coded, notes, given if context else None
    )  # fmt: skip


def column_names(columns: Iterable[Any]) -> list[str]:
    """Return the names of columns as text, the levels of a name separated by commas.

    Example:
        >>> column_names([("height", 1), " weight"])
        ['height, 1', 'weight']
    """
    return [", ".join(map(str, name)) if isinstance(name, tuple) else str(name).strip() for name in columns]


def _names(frame: "pd.DataFrame", source: str) -> list[str]:
    """Validate that the names of the columns differ, and return them as text."""
    names = column_names(frame.columns)
    counts = Counter(names)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{source}: {counts[twice]} columns have the name {twice!r}; rename them or leave some out")
    return names


POINT, POINTS_BETWEEN = re.compile(r"\s*[-+]?\d*\.\d+\s*"), re.compile(r"\s*[-+]?\d{1,3}(\.\d{3})+(,\d+)?\s*")


def _validate_no_points(frame: "pd.DataFrame", source: str) -> None:
    """Raise if a column has points between thousands where the decimal is a comma: 1.234 would be read as 1,234."""
    for name, column in frame.items():
        cells = [] if column.dtype.kind in "biuf" else [cell for cell in column if isinstance(cell, str)]
        odd = next((cell for cell in cells if POINTS_BETWEEN.fullmatch(cell)), None)
        if odd is None and cells and all(POINT.fullmatch(cell) for cell in cells):
            odd = cells[0]
        if odd is not None:
            raise DataError(
                f"{source}: column {name!r} has {odd.strip()!r}, but the decimals are commas; write its numbers "
                "without points, or drop it"
            )


def _validate_uses(
    names: Sequence[str], removed: Sequence[str | None], lists: Mapping[str, Sequence[str]], source: str
) -> None:
    """Raise unless the columns that options name exist, and none is removed from the data or listed twice."""
    uses, known = Counter(name for name in removed if name is not None), {*names}
    for name in (*uses, *itertools.chain(*lists.values())):
        if name not in known:
            raise DataError(f"{source}: there is no column {name!r}; the columns are {list_names(names)}")
        if uses[name] > 1:
            raise DataError(
                f"{source}: column {name!r} is given {uses[name]} times among index, label and drop; give it one use"
            )
    for option, listed in lists.items():
        name, times = max(Counter(listed).items(), key=lambda item: item[1], default=("", 0))
        if times > 1:
            raise DataError(f"{source}: column {name!r} is given {times} times in {option}; give it once")


def _equals_any(column: "pd.Series", values: list[Any]) -> "pd.Series":
    """Return where a column equals one of some values, rounded to its precision; outer spaces of text are ignored."""
    import pandas as pd
    import pyarrow as pa

    kind = getattr(column.dtype, "numpy_dtype", column.dtype)  # of extension types
    if kind in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            values = [*values, *(float(kind.type(value)) for value in values if isinstance(value, float))]
    if isinstance(column.dtype, pd.StringDtype):
        column = column.str.strip()
    try:
        return column.isin(values)
    except (TypeError, pa.ArrowException):  # Arrow compares values of one type only
        return column.astype(object).isin(values)


def given_names(names: Sequence[str] | None) -> list[str] | None:
    """Return the names of columns, or None if they are missing or the default ``f0``, ``f1``, ….

    Example:
        >>> given_names(["a", "b"]), given_names(["f0", "f1"])
        (['a', 'b'], None)
    """
    if names is None or [*names] == [f"f{i}" for i in range(len(names))]:
        return None
    return [*map(str, names)]


def matched_by_name(names: Sequence[str] | None, expected: Sequence[str] | None) -> bool:
    """Return whether columns are matched to those of other data by name, and not by position.

    Columns without names, or with the default names ``f0``, ``f1``, …, are matched by position, unless all names of the
    other data are among those of the table.

    Example:
        >>> matched_by_name(["b", "a"], ["a", "b"]), matched_by_name(["f1", "f0"], ["f0", "f1"])
        (True, True)
        >>> matched_by_name(["a", "b"], ["f0", "f1"])
        False
    """
    if names is None or expected is None:
        return False
    return {*expected} <= {*names} or bool(given_names(names) and given_names(expected))


def columns_like(
    names: Sequence[str], expected: Sequence[str], besides: Set[str | None], source: str, other: str
) -> tuple[list[str], list[str]]:
    """Validate that columns are those of other data.

    Args:
        names: the columns of the table.
        expected: the columns of the other data.
        besides: columns to ignore; a first column without a name is ignored too, unless the other data have it.
        source: the name of the data, for messages.
        other: the name of the other data, for messages.

    Returns:
        The columns to use, and a note if they are reordered.

    Raises:
        DataError: if a column is missing or unknown.
    """
    unnamed = {*names[:1]} & {*UNNAMED} - {*expected}
    found = [name for name in names if name not in besides and name not in unnamed]
    here, there = {*found}, {*expected}
    if lacks := [name for name in expected if name not in here]:
        raise DataError(
            f"{source}: column {lacks[0]!r} of {other} is missing (there are {list_names(found)}); add it or rename one"
        )
    if unknown := [name for name in found if name not in there]:
        raise DataError(f"{source}: column {unknown[0]!r} is not in {other}; drop it")
    return [*expected], [] if found == [*expected] else [f"columns in the order of {other}"]


def _labels(column: "pd.Series", name: str, source: str) -> tuple[np.ndarray, list[str] | None]:
    """Convert labels to integers: codes of their sorted values unless they are integers."""
    import pandas as pd

    if column.isna().any():
        row = int(column.isna().to_numpy().argmax())
        raise DataError(
            f"{source}: row {row} has no label in column {name!r}; add one or drop the row (rows are counted from 0)"
        )
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_complex_dtype(column.dtype):
        numbers = column.to_numpy(np.float64)
        if (numbers != np.floor(numbers)).any():
            raise DataError(
                f"{source}: label column {name!r} contains fractions, but labels are classes; drop it, or use it as "
                "data"
            )
        if (np.abs(numbers) < 2.0**63).all():
            return column.to_numpy(np.int64), None
    text = column.map(_as_text) if column.dtype == object else column.astype(str)
    codes, names = pd.factorize(text.to_numpy(object), sort=True)
    return codes.astype(np.int64), [*names]


def _as_text(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _without_empty(frame: "pd.DataFrame", notes: list[str]) -> "pd.DataFrame":
    """Drop columns without name and values, which a separator at the end of each line creates."""
    empty = [name for name in frame.columns if name.startswith("Unnamed: ") and frame[name].isna().all()]
    if empty:
        notes.append(f"{len(empty)} empty column{'s' if len(empty) > 1 else ''} left out")
    return frame.drop(columns=empty)


def _counts_rows(column: np.ndarray) -> str:
    """Return a note if a column counts the rows."""
    n = len(column)
    return "counts the rows" if n > 2 and column[0] in (0, 1) and (column == column[0] + np.arange(n)).all() else ""
