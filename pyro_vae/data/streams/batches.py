"""Data sets of torch, whose items are read by their number, and iterables of batches, read from the front."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from pyro_vae.core.device import make_generator
from pyro_vae.core.rows import Rows
from pyro_vae.data.streams.tables import Read, Table, put
from pyro_vae.data.values import Data, reason
from pyro_vae.errors import DataError

ONCE = "a generator can be read only once, where training reads the data in each epoch anew"
PARTS = ("x", "context", "mask")

Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""x, context and mask."""


@dataclass(frozen=True, eq=False)
class Items(Table):
    """A map-style data set.

    Args:
        data: with a length and items.
    """

    data: Any

    def read(self, start: int, into: Rows) -> int:
        outs = _arrays(into, self)
        for i in range(len(into)):
            _put_parts(parts_of(self.data[start + i], self.name), outs, i, self.name, start + i)
        return len(into)


@dataclass(frozen=True, eq=False)
class Batches(Table):
    """An iterable of batches: one block, so that its rows come in the order in which it gives them.

    Args:
        data: a loader, an iterable that can be read again and again, or a function that makes one.
    """

    data: Any

    def cuts(self, rows: int) -> np.ndarray:
        return np.array([0, self.size])

    def reader(self, seed: int) -> Read:
        return _Pass(self, seed).read


class _Pass:
    """One pass over the batches, and how far it has come."""

    def __init__(self, table: Batches, seed: int) -> None:
        self.table, self.row = table, 0
        self._given = iter(_epoch(table.data, table.name, seed))
        self._left: Parts = (np.empty(0), None, None)

    def read(self, start: int, into: Rows) -> int:
        """Fill ``into`` with rows of one batch; none, as long as the rows before ``start`` are dropped."""
        row, name = self.row, self.table.name
        if row < start:
            self._take(start - row)
            return 0
        parts = self._take(len(into))
        _put_parts(parts, _arrays(into, self.table), slice(len(parts[0])), name, row)
        ended = self.row == self.table.size
        if ended and (len(self._left[0]) or any(len(_batch(b, name, row)[0]) for b in self._given)):
            raise DataError(
                f"{name}: an epoch gives more rows than size says, {self.row}; give size= the rows of all batches"
            )
        return len(parts[0])

    def _take(self, most: int) -> Parts:
        """The next rows, at most so many, of one batch."""
        while not len(self._left[0]):
            try:
                self._left = _batch(next(self._given), self.table.name, self.row)
            except StopIteration:
                advice = f"give size={self.row}" if self.row else "let it begin anew each time it is iterated"
                name, size = self.table.name, self.table.size
                raise DataError(f"{name}: an epoch gave {self.row} rows, and size says {size}; {advice}") from None
        taken, self._left = _cut(self._left, slice(most)), _cut(self._left, slice(most, None))
        self.row += len(taken[0])
        return taken


def open_dataset(data: Any, name: str) -> Items:
    """Open a map-style data set, of which one item is read."""
    if not len(data):
        raise DataError(f"{name}: it has no items; there must be at least one row")
    with own_noise(name):
        first = parts_of(data[0], name)
    return Items(name, len(data), **_describe(first, name), data=data)


def open_batches(data: Any, name: str, size: int | None) -> Batches:
    """Open an iterable of batches, of which the first is read; its size, unless a loader knows it, is to be given."""
    if isinstance(data, Iterator) and not isinstance(data, IterableDataset):
        raise DataError(f"{name}: {ONCE}; give the function that makes it")
    if isinstance(once := _epoch(data, name, 0), Iterator) and _epoch(data, name, 0) is once:
        raise DataError(f"{name}: the function gives the same generator again, and {ONCE}; let it make a new one")
    if size is None and (size := _known_size(data)) is None:
        raise DataError(f"{name}: the number of rows is unknown; give size= the n of the n/m scaling")
    with own_noise(name):
        batches = (_batch(given, name, 0) for given in _epoch(data, name, 0))
        first = next((parts for parts in batches if len(parts[0])), None)
    if first is None:
        raise DataError(f"{name}: it gives no rows; give at least one batch")
    return Batches(name, size, **_describe(_cut(first, 0), name), seekable=False, data=data)


def parts_of(given: Any, name: str) -> Parts:
    """x, context and mask of what a data set or an iterable gives: a datum or a batch of them.

    That may be a tensor or an array, :class:`Rows` or :class:`Data`, a mapping with ``"x"`` and perhaps
    ``"context"`` and ``"mask"``, or a tuple or list whose first is x, and whose others are left out.
    """
    if isinstance(given, Rows | Data):
        given = {what: getattr(given, what) for what in PARTS}
    if isinstance(given, Mapping):
        if "x" not in given:
            raise DataError(f"{name}: it gives a mapping with {sorted(map(str, given))}; name the data x")
        context, mask = (None if (v := given.get(k)) is None else _array(v, name) for k in PARTS[1:])
        return _array(given["x"], name), context, mask
    tensors = isinstance(given, list) and isinstance(next(iter(given), 0), Tensor | np.ndarray)
    return _array(given[0] if tensors or (isinstance(given, tuple) and given) else given, name), None, None


def as_numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array, in float32 where NumPy has not its precision."""
    value = value.detach().cpu()
    array: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


def _array(value: Any, name: str) -> np.ndarray:
    try:
        array = as_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: it gives a {type(value).__name__}, no array ({reason(error)})") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name}: the values are of type {array.dtype}; give real numbers")
    return array


@contextmanager
def own_noise(name: str) -> Iterator[None]:
    """Warn of a draw from torch's own generator inside, which is then undone.

    A thread would draw there while steps do, so that neither could be repeated.
    """
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        warnings.warn(
            f"{name}: it draws from torch's own generator, which the steps draw from meanwhile, so no training can be "
            "repeated or resumed to the bit; let it draw from a torch.Generator of its own",
            stacklevel=2,
        )


def _describe(datum: Parts, name: str) -> dict[str, Any]:
    """Validate that the parts of a datum fit each other, and describe it as :class:`Table` does."""
    x, context, mask = datum
    if not x.ndim or not x.size:
        raise DataError(f"{name}: a datum has shape {x.shape}; it must have at least one feature")
    if context is not None and (context.ndim != 1 or not len(context)):
        raise DataError(f"{name}: a datum's context has shape {context.shape}; give a row of numbers")
    if mask is not None and (mask.shape != x.shape or mask.dtype != np.bool_):
        raise DataError(
            f"{name}: a datum's mask is of {mask.dtype} and shape {mask.shape}; give booleans of its shape {x.shape}"
        )
    return {"features": x.shape, "context": 0 if context is None else len(context), "masked": mask is not None}


def _arrays(rows: Rows, table: Table) -> Sequence[np.ndarray | None]:
    """The places of x, context and mask, as far as a table fills them itself."""
    parts = (rows.x, rows.context if table.context else None, rows.mask if table.masked else None)
    return [None if part is None else part.numpy() for part in parts]


def _put_parts(parts: Parts, outs: Sequence[np.ndarray | None], at: Any, name: str, row: int) -> None:
    """Put x, context and mask where they belong, at a place or slice of places; ``row`` is the first of them."""
    for what, part, out in zip(PARTS, parts, outs, strict=True):
        if out is None:
            continue
        if part is None or part.shape != out[at].shape:
            shape = "missing" if part is None else f"of shape {part.shape}"
            raise DataError(f"{name}: from row {row} on {what} is {shape}, and {out[at].shape} before; make them alike")
        put(part, out[at])


def _cut(parts: Parts, index: Any) -> Parts:
    x, *others = parts
    context, mask = (None if part is None else part[index] for part in others)
    return x[index], context, mask


def _batch(given: Any, name: str, row: int) -> Parts:
    """x, context and mask of a batch, which must have as many rows each."""
    parts = parts_of(given, name)
    if parts[0].ndim < 2 or len({len(part) if part.ndim else 0 for part in parts if part is not None}) > 1:
        shapes = [part.shape for part in parts if part is not None]
        raise DataError(f"{name}: from row {row} on a batch has parts of shapes {shapes}; give one row each")
    return parts


def _epoch(data: Any, name: str, seed: int) -> Iterable[Any]:
    """The batches of an epoch from the front."""
    if isinstance(data, DataLoader):
        return _seeded(data, seed)
    if isinstance(data, IterableDataset):  # each datum is a batch of one
        return (dict(zip(PARTS, _cut(parts_of(one, name), None), strict=True)) for one in data)
    made = data if isinstance(data, Iterable) else data()
    if not isinstance(made, Iterable):
        raise DataError(f"{name}: the function gives a {type(made).__name__}; let it give an iterable of batches")
    return made


def _seeded(loader: "DataLoader[Any]", seed: int) -> "DataLoader[Any]":
    """The loader, drawing from a generator of its own: else it would draw torch's own numbers, and another order."""
    own, generator = copy.copy(loader), make_generator(seed)
    own.generator = generator
    sampler = copy.copy(loader.sampler)
    if hasattr(sampler, "generator"):
        sampler.generator = generator
    batch_sampler = copy.copy(loader.batch_sampler)
    if type(batch_sampler) is BatchSampler:
        batch_sampler.sampler = sampler
    own.__dict__.update(sampler=sampler, batch_sampler=batch_sampler, _iterator=None)
    return own


def _known_size(data: Any) -> int | None:
    """How many rows a loader gives, where that can be told."""
    counted = isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
    if not counted or type(data.batch_sampler) is not BatchSampler:
        return None
    rows, size = len(data.sampler), data.batch_sampler.batch_size
    return rows // size * size if data.batch_sampler.drop_last else rows
