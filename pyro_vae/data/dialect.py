"""Infer the dialect of a text table from its first lines: separator, decimal point and header."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from pyro_vae.data.columns import list_names
from pyro_vae.errors import DataError

SPACES = r"\s+"

SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", SPACES: "spaces"}
"""Separators of columns, and their names; the first ones are the rarest in names and numbers."""

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


def find_dialect(
    lines: Sequence[str],
    *,
    encoding: str = "utf-8",
    sep: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    missing: Sequence[str] = (),
    named: Set[str] = frozenset(),
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
        named: names of columns that options mention; a first line with one of them is the header.
        source: the name of the data, for messages.

    Raises:
        DataError: if the lines can be read in two ways.

    Example:
        >>> find_dialect(["1,5 2", "3 4,25"]).describe()
        ['separated by spaces', 'decimal commas', 'no header']
    """
    skipped, stated = lines_above(lines)
    lines = [line for line in lines[skipped:] if line.strip()]
    sep = sep or (stated if stated != decimal else None)
    sep = sep or _find_separator(lines, decimal, source)
    rows = _cells(lines, sep)
    first, rest = (rows[0], rows[1:]) if rows else ([], [])
    decimal = decimal or _find_decimal(rows, sep, source)
    names = header if header is not None else not named.isdisjoint(first) or is_header(first, rest, decimal, missing)
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


def lines_above(lines: Sequence[str]) -> tuple[int, str | None]:
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
    if any(line.count(mark) > MOST_COLUMNS for line in text):  # refused with their number by _validate_first
        return []
    reader = csv.reader((line + "\n" for line in text), delimiter=mark, skipinitialspace=True)
    try:
        return [[cell.strip() for cell in row] for row in reader if row]
    except csv.Error:  # a cell is too long
        return []


def _find_separator(lines: Sequence[str], decimal: str | None, source: str) -> str:
    """Infer the separator.

    A separator that the first line lacks is used only if there is no other: R writes one name above two columns, the
    first of which holds the row labels.
    """
    cut = {key: _cells(lines, key) for key in SEPARATORS if key != decimal}
    scores = {key: _score(rows) for key, rows in cut.items()}
    even = [key for key, rows in cut.items() if scores[key] and len({*map(len, rows)}) == 1]
    others = [key for key in even if key != SPACES]
    if others and not any(COMMA.fullmatch(cell) for row in cut[SPACES][:1] for cell in row):
        if SPACES in even and scores[SPACES] > max(scores[key] for key in others):
            raise DataError(f"{source}: the columns may be separated by {SEPARATORS[others[0]]} or spaces; give sep")
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
    above_numbers = [cell for cell, column in texts if column and _all_numbers(column, decimal)]
    if above_numbers and not places:
        return True
    if above_numbers:
        return None if again or names is False else True
    if not places:
        repeated = bool(rest) and len({cell for cell, _ in texts}) < len(texts)
        return False if any(gaps) else None if gaps or again or repeated else True
    if gaps or again:
        return False
    if names is False and any(len({*map(_shape, column)}) < len(column) for _, column in texts):
        return None  # text that is not below, where texts repeat
    if shorter and names is None:
        return True
    if first[0] == "" and not texts and len(columns[0]) == len(rest):  # every row has a label
        counts = [str(i) for i in range(max(len(first), len(rest)))]
        of_pandas = first[1:] == counts[: len(first) - 1] or columns[0] == counts[: len(rest)]
        return True if of_pandas or all(_number(cell, ".") is None for cell in columns[0]) else names or None
    return names


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

    Names count, as years and the default names of pandas do, or increase, as wavelengths do. They are names for sure if
    there are ten in equal steps, or three outside the range of the numbers below and written unlike them: without
    fractions. Rows of numbers alone that increase by the same steps are data, as those of ``numpy.arange``.

    Args:
        cells: the numbers in the first row.
        below: the cells below them, by row.
        decimal: the decimal point.
        labelled: whether the rows may have labels: text or an empty cell is beside the numbers.
    """
    found = [float(_number(cell, decimal) or 0) for cell in cells]
    others = [[number for cell in row if (number := _number(cell, decimal)) is not None] for row in below]
    values = [number for row in others for number in row]
    steps = [b - a for a, b in itertools.pairwise(found)]
    rising, several, whole = bool(steps) and min(steps) > 0, len(found) > 2, all(map(str.isdecimal, cells))
    regular = rising and max(steps) - min(steps) <= 1e-6 * max(steps)
    counting = whole and (set(steps) == {1} if steps else found == [0])
    apart = bool(values) and not any(min(values) <= number <= max(values) for number in found)
    if not counting and not (rising and several and (regular or apart)):
        return False
    if not labelled and (found[0] or not whole) and values and all(_increase_by(row, steps) for row in others):
        return False
    enough = several or (counting and rising and labelled)
    unlike = whole and _are_fractions(below, decimal)
    sure = enough and (counting or apart) and (unlike or (apart and labelled))
    return True if regular and (len(found) >= 10 or sure) else None


def _are_fractions(rows: Sequence[Sequence[str]], decimal: str) -> bool:
    """Return whether there are numbers with fractions, and no column mixes them with whole numbers."""
    columns = itertools.zip_longest(*rows, fillvalue="")
    kinds = [{bool(INTEGER.fullmatch(cell)) for cell in one if _number(cell, decimal) is not None} for one in columns]
    return {False} in kinds and {True, False} not in kinds


def _increase_by(row: Sequence[float], steps: Sequence[float]) -> bool:
    """Return whether a row increases by given steps, up to rounding."""
    pairs = [*itertools.pairwise(row)]
    return len(pairs) == len(steps) and all(
        abs(b - a - step) <= 1e-6 * step for (a, b), step in zip(pairs, steps, strict=True)
    )
