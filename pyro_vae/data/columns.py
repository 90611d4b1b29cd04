"""Convert a column of a table to numbers, or to the codes of its categories."""

import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.precision import validate_integers
from pyro_vae.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MOST_CATEGORIES = 20
"""A text column with more distinct values is not treated as categorical."""

OTHER_NOTATION = re.compile(r"[-+−]?[$€£]?\s?\d+([ ,.'\u00a0]\d{3})*([.,]\d+)?\s?[%$€£]?")
"""A number with a decimal comma, thousands separators, a unit or another minus sign."""

DATES = ("date", "datetime", "datetime64", "interval", "period", "time", "timedelta", "timedelta64")
"""The kinds of Python objects, as pandas names them, that it would convert to counts of some unit."""


def numbers_of(
    column: "pd.Series", name: str, source: str, known: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Convert a column to numbers, NaN where missing.

    Args:
        column: a column of any type.
        name: the name of the column, for messages.
        source: the name of the data, for messages.
        known: the names of the categories of the column in other data, which define the codes; the name of a number is
            its text, and 1.0 has the name of 1.

    Returns:
        The numbers, and the names of the categories if the numbers are codes.

    Raises:
        DataError: if a value is not a number in a column without categories, or a category is unknown.
    """
    import pandas as pd
    import pyarrow as pa

    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        names = [str(value) for value in kind.categories]
        if (alike := next((text for text, count in Counter(names).items() if count > 1), None)) is not None:
            raise DataError(
                f"{source}: column {name!r} has two categories with the text {alike!r}, such as a number and a text; "
                "merge or rename them"
            )
        return code_by_name(column.astype(object), name, source, names if known is None else known)
    if isinstance(kind, pd.SparseDtype):
        return numbers_of(column.sparse.to_dense(), name, source, known)
    is_date = isinstance(kind, pd.DatetimeTZDtype | pd.PeriodDtype | pd.IntervalDtype) or kind.kind in "mM"
    inferred = pd.api.types.infer_dtype(column) if kind.kind == "O" else ""
    if is_date or inferred in DATES or pd.api.types.is_complex_dtype(kind):
        raise DataError(
            f"{source}: column {name!r} has type {inferred or kind}, not numbers; convert it (to days since the first "
            "date, for example), use it as row labels (index), or drop it"
        )
    if isinstance(kind, pd.ArrowDtype) and not pd.api.types.is_any_real_numeric_dtype(kind) and kind.kind != "b":
        is_string = pa.types.is_string(kind.pyarrow_dtype) or pa.types.is_large_string(kind.pyarrow_dtype)
        return numbers_of(column.astype("str" if is_string else object), name, source, known)
    if known is not None:
        return code_by_name(column, name, source, known)
    if pd.api.types.is_bool_dtype(kind) or pd.api.types.is_numeric_dtype(kind):
        if pd.api.types.is_integer_dtype(kind):
            validate_integers(column.dropna().to_numpy(), f"{source}: column {name!r}")
        return column.to_numpy(np.float64, na_value=np.nan), None
    is_text = isinstance(kind, pd.StringDtype)
    try:
        numbers = _parse_text(column) if is_text else pd.to_numeric(column.map(_as_scalar), errors="coerce")
    except (OverflowError, UnicodeError, pa.ArrowException) as error:  # too large for a float, or not Unicode
        reason = f"{type(error).__name__}: {str(error)[:60]!r}"
        raise DataError(
            f"{source}: column {name!r} cannot be read as numbers ({reason}); correct its values, or drop it"
        ) from error
    here, text = column.notna().to_numpy(), (numbers.isna() & column.notna()).to_numpy()
    if not text.any() and not pd.api.types.is_complex_dtype(numbers.dtype):
        return numbers.to_numpy(np.float64, na_value=np.nan), None
    if text.sum() == here.sum() and (categories := _categories(column[here])):
        return code_by_name(column, name, source, categories)
    row = int(text.argmax())
    value = column.iloc[row]
    shown = reprlib.repr(value.tolist() if isinstance(value, np.ndarray) else value)
    raise DataError(
        f"{source}: row {row}, column {name!r} is {shown}, not a number; encode the column as "
        "numbers, use it as row labels (index) or label, or drop it (rows are counted from 0)"
    )


def _categories(column: "pd.Series") -> list[str]:
    """Return the sorted categories of a column of text; none if there are too many, or they are numbers."""
    import pandas as pd

    is_text = isinstance(column.dtype, pd.StringDtype)
    values = column.str.strip() if is_text else column.map(_stripped)
    if values.isna().any() or values.nunique() > min(MOST_CATEGORIES, len(values) // 2):
        return []
    distinct = sorted(values.unique())
    return [] if all(map(OTHER_NOTATION.fullmatch, distinct)) else distinct  # codes would put numbers in another order


def _parse_text(column: "pd.Series") -> "pd.Series":
    """Convert a column of text to numbers, each distinct value once; NaN where it is not a number."""
    import pandas as pd

    codes, distinct = pd.factorize(column)
    numbers = pd.to_numeric(pd.Series(distinct), errors="coerce").to_numpy()
    return pd.Series(np.append(numbers, np.nan)[codes], index=column.index)  # the code of a missing value is -1


def _stripped(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) else None


def _as_scalar(value: Any) -> Any:
    """Convert a list or array to text, so that pandas does not parse it as several values, and a tensor to a number."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    return value if value is None or isinstance(value, str | bytes) or np.ndim(value) == 0 else str(value)


def code_by_name(column: "pd.Series", name: str, source: str, known: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Encode values by their positions in ``known``, NaN if missing; return the names, too.

    Raises:
        DataError: if a value is not in ``known``.

    Example:
        >>> import pandas as pd
        >>> code_by_name(pd.Series([2.0, None, 1.0]), "a", "data", ["1", "2"])
        (array([ 1., nan,  0.]), ['1', '2'])
    """
    import pandas as pd

    exact = {value: float(i) for i, value in enumerate(known)}
    stripped = _unique([value.strip() for value in known])
    folded = _unique([value.strip().lower() for value in known])
    numbers = _unique([_as_number(value) for value in known])

    def code(value: Any) -> float:
        text = str(value)
        found = exact.get(text, stripped.get(text.strip()))
        if found is None and isinstance(value, bool | np.bool_):  # pandas reads TRUE as True
            found = folded.get(text.lower())
        if found is None and not isinstance(value, str | bytes):
            found = numbers.get(_as_number(value))
        return np.nan if found is None else found

    # Text is encoded once per distinct value; in other columns 1, 1.0 and True would count as one.
    is_text = isinstance(column.dtype, pd.StringDtype)
    coded = {value: code(value) for value in column.dropna().unique()} if is_text else code
    codes = column.map(coded, na_action="ignore").to_numpy(np.float64, na_value=np.nan)
    unknown = np.isnan(codes) & column.notna().to_numpy()
    if unknown.any():
        row = int(unknown.argmax())
        value = column.iloc[row]
        shown = reprlib.repr(value.item() if isinstance(value, np.generic) else value)
        raise DataError(
            f"{source}: row {row}, column {name!r} is {shown}, not one of its categories "
            f"{list_names(known)}; correct it or drop the row (rows are counted from 0)"
        )
    return codes, [*known]


def _unique(names: Sequence[Any]) -> dict[Any, float]:
    """Return the positions of names that occur once."""
    times = Counter(names)
    return {value: float(i) for i, value in enumerate(names) if value is not None and times[value] == 1}


def _as_number(value: Any) -> float | None:
    """Convert a value or its text to a number, or return None."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def recode(
    codes: Tensor,
    names: Sequence[str],
    known: Sequence[str],
    column: str,
    source: str,
    seen: Tensor | None = None,
) -> Tensor:
    """Convert codes of categories to those of other data; unobserved values get any code.

    Args:
        codes: shape ``(datum,)``.
        names: the names of the codes.
        known: the names of the codes in the other data.
        column: the name of the column, for messages.
        source: the name of the data, for messages.
        seen: true where a value was observed; everywhere if not given.

    Raises:
        DataError: if an observed category is not in ``known``.

    Example:
        >>> import torch
        >>> recode(torch.tensor([0.0, 1.0]), ["g", "r"], ["b", "g", "r"], "colour", "data")
        tensor([1., 2.])
    """
    name_of: dict[float, Any] = dict(enumerate(names))
    seen = torch.ones_like(codes, dtype=torch.bool) if seen is None else seen
    occurring = [name_of.get(code, code) for code in codes[seen].unique().tolist()]
    if lacks := [name for name in occurring if name not in known]:
        raise DataError(
            f"{source}: column {column!r} contains {lacks[0]!r}, not one of the known categories {list_names(known)}; "
            "correct it or drop its rows"
        )
    place = torch.tensor([known.index(name) if name in known else 0 for name in names], dtype=codes.dtype)
    return place.to(codes.device)[codes.where(seen, torch.zeros_like(codes)).long()]


def list_names(names: Sequence[str]) -> str:
    """List names, truncated to the first eight.

    Example:
        >>> list_names(["a", "b"])
        "'a', 'b'"
    """
    shown = ", ".join(map(repr, names[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
