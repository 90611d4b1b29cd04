"""x, context and mask of what data sets and iterables give."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_vae.errors import DataError
from pyro_vae.rows import Data, Rows, reason

TENSORS = (Tensor, np.ndarray)

Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""x, context and mask."""


def parts_of(given: Any, name: str) -> Parts:
    """x, context and mask of what a data set or an iterable gives: a datum or a batch of them.

    Args:
        given: a tensor or an array; :class:`Rows` or :class:`Data`; a mapping with ``"x"`` and perhaps
            ``"context"`` and ``"mask"``; or a tuple or list whose first is x, and whose others are left out.
        name: for messages.

    Raises:
        DataError: if it is no such thing.

    Example:
        >>> x, context, mask = parts_of(([1.0, 2.0], "a label"), "data")
        >>> x, context, mask
        (array([1., 2.]), None, None)
    """
    if isinstance(given, Rows | Data):
        given = {"x": given.x, "context": given.context, "mask": given.mask}
    if isinstance(given, Mapping):
        if "x" not in given:
            raise DataError(f"{name}: it gives a mapping with {sorted(map(str, given))}; name the data x")
        x, context, mask = (None if (v := given.get(k)) is None else _array(v, name) for k in ("x", "context", "mask"))
        assert x is not None
        return x, context, mask
    if (isinstance(given, tuple) and given) or (isinstance(given, list) and isinstance(next(iter(given), 0), TENSORS)):
        given = given[0]
    return _array(given, name), None, None


def _array(value: Any, name: str) -> np.ndarray:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: it gives a {type(value).__name__}, no array ({reason(error)})") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name}: the values are of type {array.dtype}; give real numbers")
    return array
