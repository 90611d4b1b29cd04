"""Map-style data sets of torch, whose items are read by their number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.streams.parts import own_noise, parts_of
from pyro_vae.data.streams.tables import Table, put
from pyro_vae.errors import DataError


@dataclass(frozen=True, eq=False)
class Items(Table):
    """A map-style data set.

    Args:
        data: with a length and items.
    """

    data: Any

    def read(self, start: int, into: Rows) -> None:
        places = (into.x, into.context, into.mask if self.masked else None)
        outs = [None if place is None else place.numpy() for place in places]
        for i in range(len(into)):
            fill_from(parts_of(self.data[start + i], self.name), outs, i, self.name, start + i)


def fill_from(
    parts: Sequence[np.ndarray | None], outs: Sequence[np.ndarray | None], at: Any, name: str, row: int
) -> None:
    """Put x, context and mask where they belong.

    Args:
        parts: what was given.
        outs: where to put each, None where there is none.
        at: at which place, or slice of places.
        name: for messages.
        row: the number of the first row.

    Raises:
        DataError: if one is of another shape than it was before.
    """
    for what, part, out in zip(("x", "context", "mask"), parts, outs, strict=True):
        if out is None:
            continue
        if part is None or part.shape != out[at].shape:
            shape = "missing" if part is None else f"of shape {part.shape}"
            raise DataError(
                f"{name}: from row {row} on {what} is {shape}, and {out[at].shape} before; make all rows alike"
            )
        put(part, out[at])


def items(data: Any, name: str) -> Items:
    """A map-style data set, of which one item is read.

    Args:
        data: with a length and items; an item is a tensor or an array, a tuple whose first is x, or a
            mapping with ``"x"`` and perhaps ``"context"`` and ``"mask"``.
        name: for messages.

    Raises:
        DataError: if it is empty, or an item is nothing of this kind.
    """
    if not len(data):
        raise DataError(f"{name}: it has no items; there must be at least one row")
    with own_noise(name):
        x, context, mask = parts_of(data[0], name)
    refuse_datum(x, context, mask, name)
    width = 0 if context is None else len(context)
    return Items(name, len(data), x.shape, context=width, masked=mask is not None, data=data)


def refuse_datum(x: np.ndarray, context: np.ndarray | None, mask: np.ndarray | None, name: str) -> None:
    """Refuse a datum whose parts do not fit each other.

    Raises:
        DataError: naming the shapes.
    """
    if not x.ndim or not x.size:
        raise DataError(f"{name}: a datum has shape {x.shape}; it must have at least one feature")
    if context is not None and (context.ndim != 1 or not len(context)):
        raise DataError(f"{name}: a datum's context has shape {context.shape}; give a row of numbers")
    if mask is not None and (mask.shape != x.shape or mask.dtype != np.bool_):
        raise DataError(
            f"{name}: a datum's mask is of {mask.dtype} and shape {mask.shape}; give booleans of its shape {x.shape}"
        )
