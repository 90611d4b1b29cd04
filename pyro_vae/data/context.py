"""Context columns of a table: numbers, and one-hot categories, matched to other data by name."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.data.columns import list_names, numbers_of, recode
from pyro_vae.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Categories = Mapping[str, Sequence[str]]


def read_context(
    frame: "pd.DataFrame", columns: Sequence[str], *, categories: Categories | None = None, source: str = "data"
) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Convert columns of a DataFrame to a context.

    Args:
        frame: the table.
        columns: the names of the context columns.
        categories: the categories of other data, by column, whose order is used.
        source: the name of the data, for messages.

    Returns:
        The context, shape ``(row, c)``, and the names of the categories by column.

    Raises:
        DataError: if a value is missing, infinite or not a number, or a category is unknown.

    Example:
        >>> import pandas as pd
        >>> read_context(pd.DataFrame({"age": [30, 40, 50, 60], "sex": list("fmmf")}), ["age", "sex"])
        (array([[30.,  1.,  0.],
               [40.,  0.,  1.],
               [50.,  0.,  1.],
               [60.,  1.,  0.]]), {'sex': ['f', 'm']})
    """
    parts, coded = [np.empty((len(frame), 0))], {}
    for name in columns:
        values, found = numbers_of(frame[name], name, source, (categories or {}).get(name))
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise DataError(
                f"{source}: row {row} has {frame[name].iloc[row]} in context column {name!r}, but a context must be "
                "finite; fill it or drop the row (rows are counted from 0)"
            )
        if found is not None:
            coded[name] = found
        parts.append(values[:, None] if found is None else np.eye(len(found))[values.astype(int)])
    return np.concatenate(parts, 1), coded


def one_hot_context(data: Any) -> Tensor:
    """Convert a table of context columns to a context, with categories one-hot.

    Args:
        data: :class:`~pyro_vae.data.Data` with the context columns as its columns, in their order.

    Returns:
        The context, shape ``(row, c)``.

    Example:
        >>> from pyro_vae.data import Data
        >>> x = torch.tensor([[30.0, 1.0], [40.0, 0.0]])
        >>> one_hot_context(Data(x, columns=["age", "sex"], categories={"sex": ["f", "m"]}))
        tensor([[30.,  0.,  1.],
                [40.,  1.,  0.]])
    """
    columns = zip(data.columns, data.x.split(1, 1), strict=True)
    known = data.categories
    return torch.cat(
        [one_hot(part[:, 0].long(), len(known[name])).to(part) if name in known else part for name, part in columns], 1
    )


def context_names(columns: Sequence[str], categories: Categories) -> list[str]:
    """Return the names of the numbers in a context.

    Example:
        >>> context_names(["age", "sex"], {"sex": ["f", "m"]})
        ['age', 'sex=f', 'sex=m']
    """
    return [name if value is None else f"{name}={value}" for name in columns for value in categories.get(name, [None])]


def describe_context(columns: Sequence[str], categories: Categories) -> str:
    """Describe the context columns, and which are one-hot.

    Example:
        >>> describe_context(["age", "sex"], {"sex": ["f", "m"]})
        "context from columns 'age', 'sex' (one-hot: 2 categories)"
    """
    each = [
        f"{name!r}" + (f" (one-hot: {len(categories[name])} categories)" if name in categories else "")
        for name in columns
    ]
    return f"context from column{'s' if len(each) > 1 else ''} {', '.join(each)}"


def validate_context(names: Sequence[str], expected: Sequence[str], source: str, other: str) -> None:
    """Validate that a table has the context columns of other data.

    Raises:
        DataError: naming the first missing column.
    """
    if lacks := [name for name in expected if name not in names]:
        raise DataError(
            f"{source}: context column {lacks[0]!r} of {other} is missing (there are {list_names(names)}); add it or "
            "rename a column"
        )


def validate_kind(name: str, names: Sequence[str] | None, known: Sequence[str] | None, source: str, other: str) -> None:
    """Validate that a column contains numbers, or categories, as in other data.

    Raises:
        DataError: if it does not.
    """
    if (names is None) != (known is None):
        here, there = ("numbers" if each is None else "categories" for each in (names, known))
        raise DataError(f"{source}: column {name!r} contains {here}, but {there} in {other}; make them alike")


def context_recoded(data: Any, like: Any) -> Tensor:
    """Return the context of data with the columns and categories of other data, in their order.

    Args:
        data: :class:`~pyro_vae.data.Data` with named context columns.
        like: the other data.

    Raises:
        DataError: if a column is missing, or a category in it is unknown.
    """
    validate_context(data.context_columns, like.context_columns, data.source, like.source)
    widths = [len(data.categories.get(name, [None])) for name in data.context_columns]
    parts = dict(zip(data.context_columns, data.context.split(widths, 1), strict=True))
    return torch.cat([_part_like(parts[name], name, data, like) for name in like.context_columns], 1)


def _part_like(part: Tensor, name: str, data: Any, like: Any) -> Tensor:
    """Convert one context column to the categories of other data."""
    names, known = data.categories.get(name), like.categories.get(name)
    validate_kind(name, names, known, data.source, like.source)
    if names is None or known is None or names == known:
        return part
    codes = recode(part.argmax(1).to(part.dtype), names, known, name, data.source)
    return one_hot(codes.long(), len(known)).to(part)
