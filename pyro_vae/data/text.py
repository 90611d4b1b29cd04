"""Read tables from text files: infer the dialect from the first lines, and parse with pandas."""

import codecs
import csv
import gzip
import io
import itertools
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pyro_vae.data.dialect import EXCEL_ERROR, MOST_COLUMNS, SEPARATORS, SPACES, Dialect, find_dialect, lines_above
from pyro_vae.data.limits import Unpacking, in_bytes
from pyro_vae.data.row_labels import UNNAMED, as_written
from pyro_vae.data.values import reason
from pyro_vae.errors import DataError, SettingsError

if TYPE_CHECKING:
    import pandas as pd

HEAD = 2**16
"""The number of bytes from which the dialect is inferred, unless the first lines are longer."""

LONGEST_HEAD = 2**24
"""The maximum number of bytes from which the dialect is inferred."""


def read_text(
    path: Path,
    *,
    sep: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    missing: Sequence[str] = (),
    index: str | None = None,
    label: str | None = None,
    named: Set[str] = frozenset(),
) -> tuple[Any, Dialect]:
    """Read a table from a text file, gzipped, zipped or plain.

    Row labels and class labels are numbers only if their text is that of these numbers, and no row label is missing.

    Args:
        path: the path of the file.
        sep: the separator, or its name in ``SEPARATORS``; inferred if not given.
        decimal: the decimal point; inferred if not given.
        header: whether the first line names the columns; inferred if not given.
        missing: cells that mark a missing value, besides ``MISSING``.
        index: the column of the row labels, ``""`` for none; a first column without a name if not given.
        label: the column of the class labels.
        named: the names of all columns that have a use.

    Returns:
        The table as a DataFrame, and the dialect.

    Raises:
        DataError: if the file is not text, its rows differ in length, or its dialect is ambiguous.
        SettingsError: if ``sep`` or ``decimal`` is invalid.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("height;weight\\n1,8;80\\n1,7;70\\n")
        ...     frame, dialect = read_text(Path(folder, "a.csv"))
        >>> frame.height.tolist(), dialect.describe()
        ([1.8, 1.7], ['separated by semicolons', 'decimal commas'])
    """
    import pandas as pd

    by_name = {name: key for key, name in SEPARATORS.items()} | {"\\t": "\t", " ": SPACES, "tab": "\t", "space": SPACES}
    sep = None if sep is None else by_name.get(sep, sep)
    if decimal not in (None, ".", ",") or (sep is not None and len(sep) != 1 and sep != SPACES):
        raise SettingsError(
            f"sep is {sep!r} and decimal {decimal!r}; sep must be one character, tabs or spaces, and decimal . or ,"
        )
    if sep is not None and sep == (decimal or ".") != ",":
        raise SettingsError(f"sep and decimal are both {sep!r}; give different characters")
    encoding, lines = _head(path)
    given: Any = {"sep": sep, "decimal": decimal, "header": header, "missing": missing, "named": named}
    found = find_dialect(lines, encoding=encoding, source=str(path), **given)
    _validate_first(path, found)
    try:
        frame = _parse_labelled(path, found, missing, index, label, named)
    except DataError:
        raise
    except UnicodeError as error:
        raise _not_text(path, error) from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: the table has no rows; give at least one") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        _validate_lengths(path, found)
        raise DataError(f"{path}: not a table ({reason(error)}); if it is one, give its separator as sep") from error
    frame.attrs["decimal"] = found.decimal
    return frame, found


def _parse_labelled(
    path: Path, found: Dialect, missing: Sequence[str], index: str | None, label: str | None, named: Set[str]
) -> "pd.DataFrame":
    """Parse a table; its row labels and class labels are parsed as text first."""
    import pandas as pd

    top = _parse(path, found, missing, nrows=1, dtype=str)
    names = [str(name).strip() if found.header else f"f{i}" for i, name in enumerate(top.columns)]
    leading = int(not isinstance(top.index, pd.RangeIndex))  # rows have one cell more than the header
    unnamed = index != "" and not leading and len(names) > 1 and names[0] in {*UNNAMED} - named
    classes = [i for i, name in enumerate(names) if name == label]
    rows = [i for i, name in enumerate(names) if (name == index or (unnamed and i == 0)) and i not in classes]
    # bytes, because pandas would find missing values among texts
    converters = dict.fromkeys([*range(leading), *(i + leading for i in rows)], str.encode)
    frame = _parse(path, found, missing, converters=converters, dtype={i + leading: str for i in classes})
    last = frame.iloc[:, -1]
    if leading or (last == b"" if len(names) - 1 in rows else last.isna()).any():
        _validate_lengths(path, found)  # pandas fills short rows with missing values
    if frame.shape[1] == 1 and not leading:
        _validate_no_blank_lines(path, found)
    if leading:
        frame.index = pd.Index(_row_labels(frame.index, found.decimal))
    for i in rows:
        frame.isetitem(i, _row_labels(frame.iloc[:, i], found.decimal))
    for i in classes:
        frame.isetitem(i, _classes(frame.iloc[:, i], found.decimal))
    return frame.set_axis(names, axis="columns")


def _parse(path: Path, found: Dialect, missing: Sequence[str], **more: Any) -> "pd.DataFrame":
    """Parse a table with pandas."""
    import pandas as pd

    if pd.__version__ < "3.1":
        more["float_precision"] = "round_trip"  # the default of 3.1
    with open_text(path) as file, _below_comments(file, found) as text, warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            text, sep=found.sep, decimal=found.decimal, header=0 if found.header else None,
            index_col=False if found.open_ended else None, na_values=list(missing), skipinitialspace=True,
            low_memory=False, **more,
        )  # fmt: skip


def _row_labels(cells: Any, decimal: str) -> Any:
    """Convert row labels to numbers if they are written so; nan if there are none."""
    labels = [cell.decode().strip() for cell in cells]
    return as_written(labels, decimal) if any(labels) else np.full(len(labels), np.nan)


def _classes(column: "pd.Series", decimal: str) -> Any:
    """Convert class labels to numbers if they are written so, or are fractions, which are not labels."""
    import pandas as pd

    if column.isna().any():
        return column
    codes, distinct = pd.factorize(column)
    labels = [text.strip() for text in distinct]
    swapped = str.maketrans(",.", ".,") if decimal == "," else {}
    numbers = pd.to_numeric(pd.Series([text.translate(swapped) for text in labels]), errors="coerce")
    fractions = numbers.notna().all() and (numbers % 1 > 0).any()
    return pd.Series(numbers if fractions else as_written(labels, decimal)).to_numpy()[codes]


@contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """Open a text file, plain, gzipped or zipped.

    Raises:
        DataError: if a zipped file does not contain exactly one file.
    """
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            yield io.BufferedReader(Unpacking(file, path))  # type: ignore[arg-type]
    elif path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
                if len(names) != 1:
                    raise DataError(f"{path}: contains {names or 'no files'}; give a zip file with exactly one table")
                with archive.open(names[0]) as file:
                    yield io.BufferedReader(Unpacking(file, path))
        except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted, or packed in an unknown way
            raise DataError(f"{path}: cannot be read ({reason(error)}); copy or make it again") from error
    else:
        with path.open("rb") as file:
            yield file


def _below_comments(file: IO[bytes], found: Dialect) -> IO[str]:
    """Return the text from the table's first line on, because pandas lets a quote in a skipped line start a cell."""
    text = io.TextIOWrapper(file, found.encoding, newline="")
    for _ in itertools.islice(text, found.skipped):
        pass
    return text


def _not_text(path: Path, why: object) -> DataError:
    return DataError(f"{path}: not text in UTF-8 ({reason(why)}); save the table as CSV in UTF-8")


def _head(path: Path) -> tuple[str, list[str]]:
    """Return the encoding of a text file and its first complete lines, at least three of them below comments."""
    size, head, lines = HEAD, b"", [""]
    with open_text(path) as file:
        while size <= LONGEST_HEAD:
            head += file.read(size - len(head))
            encoding, lines = _decode(path, head, final=len(head) < size)
            if len(head) < size or sum(bool(line.strip()) for line in lines[lines_above(lines)[0] :]) >= 3:
                return encoding, lines
            size *= 2
    raise DataError(
        f"{path}: its first three lines have more than {in_bytes(LONGEST_HEAD)}; save the numbers as .npy, or correct "
        "its line breaks"
    )


def _decode(path: Path, head: bytes, final: bool) -> tuple[str, list[str]]:
    """Return the encoding of text and its lines, without the last one if the text goes on."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=final)
    except UnicodeError as error:
        raise _not_text(path, error) from error
    if "\0" in text:  # UTF-16 without a byte order mark, or not text
        raise _not_text(path, "it contains NUL characters")
    lines = re.split(r"\r\n|\r|\n", text)
    return encoding, lines if final else lines[:-1]


def _validate_lengths(path: Path, found: Dialect) -> None:
    """Validate that all rows have the same length; pandas reads a short row as missing values."""
    rows = _rows(path, found)
    expected, more = len(next(rows, [])), ""
    for i, row in enumerate(rows, 0 if found.header else 1):
        if i == 0 and len(row) == expected + 1:
            more = " and row labels" if row[-1].strip() else " and a separator at the end of each row"
        if len(row) == expected + bool(more):
            continue
        if row[0].startswith("#") and not EXCEL_ERROR.match(row[0]):
            raise DataError(
                f"{path}: row {i} starts with #; delete comments below the header (rows are counted from 0, after it)"
            )
        raise DataError(
            f"{path}: row {i} has {len(row)} value{'s' * (len(row) > 1)}, but the table has {expected} "
            f"column{'s' * (expected > 1)}{more}; make them equal (rows are counted from 0, after the header)"
        )


def _validate_no_blank_lines(path: Path, found: Dialect) -> None:
    """Validate that no blank line is between the rows of a single column, where it may be a missing value."""
    rows = [bool(row) for row in _rows(path, found, blank=True)]
    first, last = rows.index(True), len(rows) - rows[::-1].index(True)
    if not all(rows[first:last]):
        row = rows.index(False, first) - first - found.header
        raise DataError(
            f"{path}: row {row} is blank; write nan if its value is missing, or delete the line (rows are counted from "
            "0, after the header)"
        )


def _validate_first(path: Path, found: Dialect) -> None:
    """Count the columns before pandas parses each separately, and their names before it renames equal ones."""
    first = next(_rows(path, found), [])
    if len(first) > MOST_COLUMNS:
        raise DataError(
            f"{path}: has {len(first):,} columns, above the limit of {MOST_COLUMNS:,} for text files; save the numbers "
            "as .npy"
        )
    counts = Counter(name for cell in first if (name := cell.strip()))
    name, count = counts.most_common(1)[0] if counts and found.header else ("", 0)
    if count > 1:
        raise DataError(f"{path}: {count} columns have the name {name!r}; rename them")


def _rows(path: Path, found: Dialect, blank: bool = False) -> Iterator[list[str]]:
    """Iterate over the cells of each line that is not empty; or of each line, without outer spaces, if ``blank``."""
    spaces = found.sep == SPACES
    try:
        with open_text(path) as file, _below_comments(file, found) as lines:
            cut: Iterable[str] = lines
            if blank:
                cut = (line.strip() + "\n" for line in lines)
            elif spaces:
                cut = (re.sub(r"[ \t]+", " ", line.strip()) + "\n" for line in lines)
            rows = csv.reader(cut, delimiter=" " if spaces else found.sep, skipinitialspace=True)
            yield from (row for row in rows if row or blank)
    except csv.Error as error:
        raise DataError(f"{path}: not a table ({reason(error)}); check its quotes") from error
    except UnicodeError as error:
        raise _not_text(path, error) from error
