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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pyro_vae.data.columns import list_names
from pyro_vae.data.limits import Unpacking, in_bytes
from pyro_vae.data.row_labels import UNNAMED, as_written
from pyro_vae.data.values import reason
from pyro_vae.errors import DataError, SettingsError

if TYPE_CHECKING:
    import pandas as pd

SPACES = r"\s+"

SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", SPACES: "spaces"}
"""Separators of columns, and their names; the first ones are the rarest in names and numbers."""

HEAD = 2**16
"""The number of bytes from which the dialect is inferred, unless the first lines are longer."""

LONGEST_HEAD = 2**24
"""The maximum number of bytes from which the dialect is inferred."""

MOST_COLUMNS = 10**5
"""The maximum number of columns of a text file; each is parsed separately."""

MISSING = frozenset({"", "#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"})
"""Cells that mark a missing value."""


@dataclass(frozen=True)
class Dialect:
    """The dialect of a table in a text file.

    Args:
        sep: the separator, a key of ``SEPARATORS`` or another character.
        decimal: the decimal point.
        header: whether the first line names the columns.
        numbered: whether that line was found to be names though it has numbers.
        skipped: the number of lines above the table: comments, which start with ``#``, blank lines, and the line
            ``sep=;`` of Excel.
        encoding: the encoding of the text.
        open_ended: whether each row, but not the header, ends with a separator.
    """

    sep: str
    decimal: str
    header: bool
    numbered: bool
    skipped: int
    encoding: str
    open_ended: bool

    def describe(self) -> list[str]:
        """Describe the differences from plain CSV."""
        name = SEPARATORS.get(self.sep, repr(self.sep))
        return [
            *([f"separated by {name}"] if self.sep != "," else []),
            *(["decimal commas"] if self.decimal == "," else []),
            *([] if self.header else ["no header"]),
            *(["the first line names the columns"] if self.numbered else []),
            *([f"{self.skipped} line{'s' * (self.skipped > 1)} above the table skipped"] if self.skipped else []),
        ]


def read_text(
    path: Path,
    *,
    sep: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    missing: Sequence[str] = (),
    index: str | None = None,
    label: str | None = None,
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

    by_name = {name: key for key, name in SEPARATORS.items()} | {"\\t": "\t", " ": r"\s+", "tab": "\t", "space": r"\s+"}
    sep = None if sep is None else by_name.get(sep, sep)
    if decimal not in (None, ".", ",") or (sep is not None and len(sep) != 1 and sep != r"\s+"):
        raise SettingsError(
            f"sep is {sep!r} and decimal {decimal!r}; sep must be one character, tabs or spaces, and decimal . or ,"
        )
    if sep is not None and sep == (decimal or "."):
        raise SettingsError(f"sep and decimal are both {sep!r}; give different characters")
    encoding, lines = _head(path)
    found = find_dialect(
        lines, encoding=encoding, sep=sep, decimal=decimal, header=header, missing=missing, source=str(path)
    )
    _validate_width(path, found)
    try:
        top = _parse(path, found, missing, nrows=1, dtype=str)
        names = _column_names(top, found)
        leading = int(not isinstance(top.index, pd.RangeIndex))  # rows have one cell more than the header
        unnamed = index != "" and not leading and len(names) > 1 and names[0] in UNNAMED
        classes = [i for i, name in enumerate(names) if name == label]
        rows = [i for i, name in enumerate(names) if (name == index or (unnamed and i == 0)) and i not in classes]
        # bytes, because pandas would find missing values among texts
        converters = dict.fromkeys([*range(leading), *(i + leading for i in rows)], str.encode)
        frame = _parse(path, found, missing, converters=converters, dtype={i + leading: str for i in classes})
    except UnicodeError as error:
        raise _not_text(path, error) from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: the table has no rows; give at least one") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        _validate_lengths(path, found)
        raise DataError(f"{path}: not a table ({reason(error)}); if it is one, give its separator as sep") from error
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
    frame.columns = pd.Index(names)
    frame.attrs["decimal"] = found.decimal
    return frame, found


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


def _column_names(frame: "pd.DataFrame", found: Dialect) -> list[str]:
    return [str(name).strip() if found.header else f"f{i}" for i, name in enumerate(frame.columns)]


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
            if len(head) < size or sum(bool(line.strip()) for line in lines[_lines_above(lines)[0] :]) >= 3:
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


def find_dialect(
    lines: Sequence[str],
    *,
    encoding: str = "utf-8",
    sep: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    missing: Sequence[str] = (),
    source: str = "data",
) -> Dialect:
    """Infer the dialect of a table from its first lines, except for the given settings.

    The inferred separator splits the lines into equal numbers of cells, most of them numbers.

    Args:
        lines: the first lines of the text.
        encoding: the encoding, which is only copied to the result.
        sep: the separator.
        decimal: the decimal point.
        header: whether the first line names the columns.
        missing: cells that mark a missing value, besides ``MISSING``.
        source: the name of the data, for messages.

    Raises:
        DataError: if the lines can be read in two ways.

    Example:
        >>> find_dialect(["1,5 2", "3 4,25"]).describe()
        ['separated by spaces', 'decimal commas', 'no header']
    """
    skipped, stated = _lines_above(lines)
    lines = [line for line in lines[skipped:] if line.strip()]
    sep = sep or (stated if stated != decimal else None)
    sep = sep or _find_separator(lines, decimal, source)
    rows = _cells(lines, sep)
    first, rest = (rows[0], rows[1:]) if rows else ([], [])
    decimal = decimal or _find_decimal(rows, sep, source)
    names = is_header(first, rest, decimal, missing) if header is None else header
    if names is None:
        raise DataError(
            f"{source}: the first line ({list_names(first)}) may be names or data; give header as true if it names the "
            "columns, else as false"
        )
    numbered = header is None and names and first[0] != "" and any(_number(cell, decimal) is not None for cell in first)
    longer = [row for row in rest if len(row) == len(first) + 1]
    open_ended = names and bool(longer) and len(longer) == len(rest) and not any(row[-1] for row in longer)
    return Dialect(sep, decimal, names, numbered, skipped, encoding, open_ended)


COMMA, POINT = re.compile(r"[-+]?\d*,\d+([eE][-+]?\d+)?"), re.compile(r"[-+]?\d*\.\d+([eE][-+]?\d+)?")
THOUSANDS, INTEGER = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}"), re.compile(r"[-+]?\d+")
ONE_OR_TWO = re.compile(r"[-+]?(\d[\d.]*)?,\d+([eE][-+]?\d+)?|[-+]?\d{1,3}([ ,]\d{3})+([.,]\d+)?")
"""A number that a comma or a space would cut into two numbers."""
EXCEL_ERROR = re.compile(r"#(N/?A|DIV/0|REF|NAME|NULL|NUM|VALUE)\b")
EXCEL_SEPARATOR = re.compile(r"\s*\"?sep=(\t|\S)\"?\s*", re.IGNORECASE)


def _lines_above(lines: Sequence[str]) -> tuple[int, str | None]:
    """Return the number of lines above a table, and the separator that Excel's first line ``sep=;`` states, if any."""
    stated = EXCEL_SEPARATOR.fullmatch(lines[0]) if lines else None
    return (1 + _comments_above(lines[1:]), stated[1]) if stated else (_comments_above(lines), None)


def _comments_above(lines: Sequence[str]) -> int:
    """Count the lines above a table: comments and blank lines; 0 without comments.

    Below its first line, a line that starts with ``#`` is data.
    """
    for i, line in enumerate(lines):
        if line.strip() and (not line.lstrip().startswith("#") or EXCEL_ERROR.match(line.lstrip())):
            return i if any(above.strip() for above in lines[:i]) else 0
    return len(lines) if any(line.strip() for line in lines) else 0


def _cells(lines: Sequence[str], sep: str) -> list[list[str]]:
    """Split each line into cells, without quotes and outer spaces; return none if the lines cannot be split."""
    spaces = sep == SPACES
    text = [re.sub(r"[ \t]+", " ", line.strip()) for line in lines] if spaces else lines
    mark = " " if spaces else sep
    if any(line.count(mark) > MOST_COLUMNS for line in text):  # refused with their number by _validate_width
        return []
    reader = csv.reader((line + "\n" for line in text), delimiter=mark, skipinitialspace=True)
    try:
        return [[cell.strip() for cell in row] for row in reader if row]
    except csv.Error:  # a cell above the limit of csv
        return []


def _find_separator(lines: Sequence[str], decimal: str | None, source: str) -> str:
    """Infer the separator.

    Where the first line has one cell, it lacks the separator, or is that of R above one column and row names. So these
    separators come last.
    """
    cut = {key: _cells(lines, key) for key in SEPARATORS if key != decimal}
    scores = {key: _score(rows) for key, rows in cut.items()}
    even = [key for key, rows in cut.items() if scores[key] and len({*map(len, rows)}) == 1]
    if {*even} - {SPACES} and not any(COMMA.fullmatch(cell) for row in cut[SPACES][:1] for cell in row):
        scores[SPACES] = 0  # spaces are in many names and texts, and between thousands
    found = [key for key, score in scores.items() if score]
    found = [key for key in found if len(cut[key][0]) > 1] or found
    if not found:
        return "," if decimal != "," else ";"  # a single column
    best = max(found, key=scores.__getitem__)
    rarer = [*SEPARATORS][: [*SEPARATORS].index(best)]
    rivals = [key for key in even if key in rarer and (key, best) != (",", SPACES)]
    if best == "," and SPACES in even and scores[SPACES] == scores[best]:
        rivals.append(SPACES)
    if rivals:
        raise DataError(
            f"{source}: the columns may be separated by {SEPARATORS[rivals[0]]} or {SEPARATORS[best]}; give sep"
        )
    numbers = [line.strip() for line in lines[1:]] if len(cut[best][0]) == 1 and decimal is None else []
    if numbers and all(map(ONE_OR_TWO.fullmatch, numbers)):
        raise DataError(
            f"{source}: below the first line {lines[0].strip()!r}, {numbers[0]!r} may be one number or two; give "
            "decimal or sep"
        )
    return best


def _score(rows: Sequence[Sequence[str]]) -> float:
    """Score a separator: the share of rows of equal length, weighted by the share of numbers; 0 for single cells."""
    body = rows[1:] or rows
    if not body:
        return 0.0
    width, count = Counter(map(len, body)).most_common(1)[0]
    if width < 2 or abs(len(rows[0]) - width) > 1:
        return 0.0
    numbers = [_number(cell, ",") is not None or cell in MISSING for row in body for cell in row]
    whole = ['"' not in cell for row in body for cell in row]  # a quote is left where a separator cuts a quoted cell
    return count / len(body) * (0.1 + sum(numbers) / len(numbers)) * sum(whole) / len(whole)


def _find_decimal(rows: Sequence[Sequence[str]], sep: str, source: str) -> str:
    """Infer the decimal point."""
    commas = [cell for row in rows for cell in row if COMMA.fullmatch(cell)]
    points = sum(bool(POINT.fullmatch(cell)) for row in rows for cell in row)
    if sep == "," or len(commas) <= points:
        return "."
    if sep != ";" and all(map(THOUSANDS.fullmatch, commas)):  # semicolons are used where commas are decimal
        raise DataError(f"{source}: the comma of {commas[0]!r} may be decimal or between thousands; give decimal")
    return ","


def _number(cell: str, decimal: str) -> float | None:
    if "_" in cell:
        return None
    try:
        return float(cell.replace(",", ".") if decimal == "," else cell)
    except ValueError:
        return None


def is_header(
    first: Sequence[str], rest: Sequence[Sequence[str]], decimal: str, missing: Sequence[str] = ()
) -> bool | None:
    """Return whether the first row names the columns, or None if it may be names or data.

    Text above numbers is a name, and text that occurs again in its column, up to digits, is not. A missing value is no
    name, except that pandas and R leave the name of the row labels empty. For numbers, see ``_are_names``.

    Args:
        first: the cells of the first row.
        rest: the cells of the other rows.
        decimal: the decimal point.
        missing: cells that mark a missing value, besides ``MISSING``.

    Example:
        >>> is_header(["", "0", "1"], [], "."), is_header(["5.1", "3.5", "setosa"], [], ".")
        (True, False)
        >>> is_header(["0", "1"], [["1", "0"]], ".") is None
        True
    """
    marks = MISSING | {*missing}
    shorter = bool(rest) and all(len(row) == len(first) + 1 for row in rest)
    start = int(shorter and any(row[-1] for row in rest))  # below are row labels, or separators at the end
    columns = [
        [row[i] for row in rest if i < len(row) and row[i] not in marks] for i in range(start, start + len(first))
    ]
    kinds = [_kind(cell, decimal, marks) for cell in first]
    texts = [(cell, column) for cell, column, kind in zip(first, columns, kinds, strict=True) if kind == "text"]
    places = [i for i, kind in enumerate(kinds) if kind == "number"]
    gaps = [first[i] for i, kind in enumerate(kinds) if kind == "gap" and (i or first[i]) and columns[i]]
    again = any(_shape(cell) in map(_shape, column) for cell, column in texts)
    if not texts and (not places or not (rest or first[0] == "")):
        return False
    below = [[row[i + start] for i in places if i + start < len(row)] for row in rest]
    labelled = bool(texts) or shorter or first[0] == ""
    names = _are_names([first[i] for i in places], below, decimal, labelled) if places else True
    if any(column and _all_numbers(column, decimal) for _, column in texts):
        return None if again or names is False else True
    if not places:
        repeated = bool(rest) and len({cell for cell, _ in texts}) < len(texts)
        return False if any(gaps) else None if gaps or again or repeated else True
    if gaps or again:
        return False
    if shorter and names is None:
        return True
    return _is_below_index(first, columns[0], names) if first[0] == "" and not texts else names


def _kind(cell: str, decimal: str, marks: Set[str]) -> str:
    """Return whether a cell is a number, text or a gap; signs such as ``?`` stand for missing values."""
    if cell in marks or not any(map(str.isalnum, cell)):
        return "gap"
    return "text" if _number(cell, decimal) is None else "number"


def _shape(cell: str) -> str:
    """Replace numbers in a text, such as a date or a count of samples, by 9."""
    return re.sub(r"\d+", "9", cell)


def _all_numbers(cells: Sequence[str], decimal: str) -> bool:
    return all(_number(cell, decimal) is not None for cell in cells)


def _are_names(cells: Sequence[str], below: Sequence[Sequence[str]], decimal: str, labelled: bool) -> bool | None:
    """Return whether numbers in the first row are names, or None if they may be.

    Such names count, as years and the names that pandas gives, or increase in equal steps outside the range of the
    numbers below, as wavelengths. Whole numbers above fractions are names then, and above whole numbers may be either.
    Rows of numbers alone that increase by the same steps are data, as those of ``numpy.arange``.

    Args:
        cells: the numbers in the first row.
        below: the cells below them, by row.
        decimal: the decimal point.
        labelled: whether the rows may have labels: text or an empty cell is beside the numbers.
    """
    found = [float(_number(cell, decimal) or 0) for cell in cells]
    others = [[number for cell in row if (number := _number(cell, decimal)) is not None] for row in below]
    values = [number for row in others for number in row]
    several, whole = len(found) > 2, all(map(str.isdecimal, cells))
    fractions = any(_number(cell, decimal) is not None and not INTEGER.fullmatch(cell) for row in below for cell in row)
    steps = [b - a for a, b in itertools.pairwise(found)]
    rising = bool(steps) and min(steps) > 0
    regular = rising and max(steps) - min(steps) <= 1e-6 * max(steps)
    counting = whole and (set(steps) == {1} if steps else found == [0])
    apart = bool(values) and not any(min(values) <= number <= max(values) for number in found)
    if whole and fractions:
        sure, maybe = (
            (counting and (bool(steps) or not labelled)) or (apart and regular and several),
            counting or (apart and (rising or several)),
        )
    elif labelled:
        sure, maybe = apart and regular and (counting or several), counting or (apart and rising and several)
    elif values and (found[0] or not whole) and all(_increase_by(row, steps) for row in others):
        sure, maybe = False, False
    else:
        many = len(found) >= 10  # of few numbers, a row of data may have equal steps
        sure, maybe = apart and regular and many and not whole, counting or (apart and rising and several)
    return True if sure else None if maybe else False


def _increase_by(row: Sequence[float], steps: Sequence[float]) -> bool:
    """Return whether a row increases by given steps, up to rounding."""
    pairs = [*itertools.pairwise(row)]
    return len(pairs) == len(steps) and all(
        abs(b - a - step) <= 1e-6 * step for (a, b), step in zip(pairs, steps, strict=True)
    )


def _is_below_index(first: Sequence[str], labels: Sequence[str], names: bool | None) -> bool | None:
    """Return whether numbers behind an empty cell are names above row labels, as pandas writes a table."""
    count = [str(i) for i in range(max(len(first), len(labels)))]
    if first[1:] == count[: len(first) - 1] or (labels and labels == count[: len(labels)]):
        return True
    if names is None or (names is False and len(first) == 2 and first[1].isdecimal()):
        return True if labels and all(_number(label, ".") is None for label in labels) else None
    return names


def _validate_lengths(path: Path, found: Dialect) -> None:
    """Validate that all rows have the same length; pandas reads a short row as missing values."""
    rows = _rows(path, found)
    expected, more = len(next(rows, [])), ""
    for i, row in enumerate(rows, 0 if found.header else 1):
        if i == 0 and len(row) == expected + 1:
            more = " and row labels" if row[-1].strip() else " and a separator at the end of each row"
        if row[0].startswith("#") and not EXCEL_ERROR.match(row[0]):
            raise DataError(
                f"{path}: row {i} starts with #; delete comments below the header (rows are counted from 0, after it)"
            )
        if len(row) != expected + bool(more):
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


def _validate_width(path: Path, found: Dialect) -> None:
    """Count the columns before pandas parses each separately."""
    if (columns := len(next(_rows(path, found), []))) > MOST_COLUMNS:
        raise DataError(
            f"{path}: has {columns:,} columns, above the limit of {MOST_COLUMNS:,} for text files; save the numbers as "
            ".npy"
        )


def _rows(path: Path, found: Dialect, blank: bool = False) -> Iterator[list[str]]:
    """Iterate over the cells of each line that is not empty; or of each line, without outer spaces, if ``blank``."""
    spaces = found.sep == r"\s+"
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
