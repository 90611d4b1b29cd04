"""Convert masks of observed values, and validate that their rows are those of the data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.columns import list_names
from pyro_vae.data.frames import as_frame
from pyro_vae.data.row_labels import labels_of_index
from pyro_vae.data.tables import column_names, given_names
from pyro_vae.data.values import validate_unmasked
from pyro_vae.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def validate_same_labels(part: str, own: np.ndarray | None, labels: np.ndarray | None, source: str) -> None:
    """Validate that the rows of a context or a mask are labelled as those of the data.

    Where only one of them has labels, they are not compared, unless they are the numbers of the rows.

    Raises:
        DataError: if they are not, naming the first row that differs.

    Example:
        >>> validate_same_labels("context", np.array(["s", "r"]), np.array(["r", "s"]), "data")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: the rows of the context are labelled differently from the data ...
    """
    import pandas as pd

    if own is None or labels is None:
        known = labels if own is None else own
        if known is None or known.dtype.kind not in "iu" or not np.array_equal(np.sort(known), np.arange(len(known))):
            return  # not even the labels of shuffled rows
        own, labels = (np.arange(len(known)) if each is None else each for each in (own, labels))
    first, second = pd.Index(own), pd.Index(labels)
    if first.equals(second) or first.astype(str).equals(second.astype(str)):  # dates may be text on one side
        return
    row = next((i for i, pair in enumerate(zip(own, labels, strict=False)) if pair[0] != pair[1]), 0)
    here, there = (repr(each[row : row + 1].tolist()[0]) for each in (own, labels))
    raise DataError(
        f"{source}: the rows of the {part} are labelled differently from the data (row {row} is {here} in the {part} "
        f"and {there} in the data); give both the same labels in the same order, or neither (reset_index(drop=True))"
    )


def as_mask(
    mask: Any,
    shape: Sequence[int],
    source: str,
    columns: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
) -> Tensor:
    """Convert a mask to a tensor; match the columns of a table by name, and compare its row labels.

    Args:
        mask: booleans, or a table of booleans: true where observed.
        shape: the shape of the data.
        source: the name of the data, for messages.
        columns: the columns of the data, if they have names.
        labels: the row labels of the data, if any.

    Raises:
        DataError: if they are not booleans of this shape, or columns or row labels differ.

    Example:
        >>> as_mask({"b": [True], "a": [False]}, (1, 2), "data", ["a", "b"])
        tensor([[False,  True]])
    """
    validate_unmasked(mask, f"mask of {source}")
    if (frame := as_frame(mask, f"mask of {source}")) is not None:
        frame = _in_order(frame, columns, source)
        whole = all(kind.kind == "b" for kind in frame.dtypes) and not frame.isna().any(axis=None)
        mask = frame.to_numpy(bool if whole else None)  # booleans that may be missing are objects in pandas
    given = mask if isinstance(mask, Tensor) else np.array(mask)  # a copy, since arrays of pandas are read-only
    if given.dtype not in (torch.bool, bool) or tuple(given.shape) != tuple(shape):
        raise DataError(
            f"{source}: the mask has type {given.dtype} and shape {tuple(given.shape)}; "
            f"give booleans of the data's shape {tuple(shape)}"
        )
    mask = torch.as_tensor(given)
    validate_same_labels("mask", None if frame is None else labels_of_index(frame), labels, source)
    return mask


def _in_order(mask: "pd.DataFrame", columns: Sequence[str] | None, source: str) -> "pd.DataFrame":
    """Return a mask with its columns in the order of the data, unless one of them has no names of columns."""
    names = column_names(mask.columns)
    if columns is None or sorted(names) == sorted(columns):
        place = {name: i for i, name in enumerate(names)}
        return mask if columns is None else mask.iloc[:, [place[name] for name in columns]]
    unnamed = [*map(str, range(len(names)))]  # by pandas
    if names == unnamed or given_names(names) is None or given_names(columns) is None:
        return mask
    raise DataError(
        f"{source}: the columns of the mask are {list_names(names)}, but those of the data are {list_names(columns)}; "
        "give the mask the columns of the data"
    )
