"""Tables over map-style data sets of torch, and over iterables of batches."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from pyro_vae.core.device import make_generator
from pyro_vae.core.rows import Rows
from pyro_vae.data.streams.tables import Read, Table, copy_numbers
from pyro_vae.data.values import Data, reason, validate_unmasked
from pyro_vae.errors import DataError, type_of

ONCE = "a generator can be read only once, but training reads the data in each epoch"
PARTS = ("x", "context", "mask")

Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""x, context and mask."""


@dataclass(frozen=True, eq=False)
class Items(Table):
    """A map-style data set.

    Args:
        data: a data set with a length and items.
    """

    data: Any

    def read(self, start: int, into: Rows) -> int:
        outs = _arrays(into, self)
        for i in range(len(into)):
            _put_parts(parts_of(self.data[start + i], self.name), outs, i, self.name, start + i)
        return len(into)


@dataclass(frozen=True, eq=False)
class Batches(Table):
    """An iterable of batches: a single block, so its rows keep their order.

    Args:
        data: a loader, an iterable that can be read repeatedly, or a function that returns one.
    """

    data: Any

    def cuts(self, rows: int) -> np.ndarray:
        return np.array([0, self.size])

    def validate_in_order(self) -> None:
        if isinstance(loader := _epoch(self.data, self.name, 0), DataLoader) and not _gives_all_in_order(loader):
            raise DataError(
                f"{self.name}: the loader shuffles, samples or drops rows, so the results could not be assigned to the "
                "rows of its data set; give a loader with shuffle=False, and neither a sampler nor drop_last"
            )

    def reader(self, seed: int) -> Read:
        return _Pass(self, seed).read


class _Pass:
    """The state of one pass over the batches."""

    def __init__(self, table: Batches, seed: int) -> None:
        self.table, self.row = table, 0
        self._batches = iter(_epoch(table.data, table.name, seed))
        self._rest: Parts = (np.empty(0), None, None)

    def read(self, start: int, into: Rows) -> int:
        """Fill ``into`` with rows of one batch; return 0 while rows before ``start`` are dropped."""
        row, name = self.row, self.table.name
        if row < start:
            self._take(start - row)
            return 0
        parts = self._take(len(into))
        _put_parts(parts, _arrays(into, self.table), slice(len(parts[0])), name, row)
        ended = self.row == self.table.size
        if ended and (len(self._rest[0]) or any(len(_batch(b, name, row)[0]) for b in self._batches)):
            raise DataError(
                f"{name}: an epoch has more rows than size={self.row}; give the number of rows of all batches as size"
            )
        return len(parts[0])

    def _take(self, most: int) -> Parts:
        """Return the next rows of one batch, at most ``most``."""
        while not len(self._rest[0]):
            try:
                self._rest = _batch(next(self._batches), self.table.name, self.row)
            except StopIteration:
                advice = f"give size={self.row}" if self.row else "make it start again at each iteration"
                name, size = self.table.name, self.table.size
                raise DataError(f"{name}: an epoch had {self.row} rows, but size is {size}; {advice}") from None
        taken, self._rest = _cut(self._rest, slice(most)), _cut(self._rest, slice(most, None))
        self.row += len(taken[0])
        return taken


def open_dataset(data: Any, name: str) -> Items:
    """Open a map-style data set, and read its first item."""
    if not len(data):
        raise DataError(f"{name}: the data set is empty; it must have at least one row")
    with warn_of_global_draws(name):
        first = parts_of(data[0], name)
    return Items(name, len(data), **_describe(first, name), data=data)


def open_batches(data: Any, name: str, size: int | None) -> Batches:
    """Open an iterable of batches, and read its first batch; a loader may know its size."""
    if isinstance(data, Iterator) and not isinstance(data, IterableDataset):
        raise DataError(f"{name}: {ONCE}; give the function that creates it")
    if isinstance(once := _epoch(data, name, 0), Iterator) and _epoch(data, name, 0) is once:
        raise DataError(f"{name}: the function returns the same generator twice, but {ONCE}; return a new one")
    if size is None and (size := _known_size(data)) is None:
        raise DataError(f"{name}: the number of rows is unknown; pass size= (the n of the n/m scaling)")
    with warn_of_global_draws(name):
        batches = (_batch(given, name, 0) for given in _epoch(data, name, 0))
        first = next((parts for parts in batches if len(parts[0])), None)
    if first is None:
        raise DataError(f"{name}: the iterable has no rows; it must have at least one batch")
    return Batches(name, size, **_describe(_cut(first, 0), name), seekable=False, data=data)


def parts_of(given: Any, name: str) -> Parts:
    """Return x, context and mask of an item of a data set or a batch of an iterable.

    Args:
        given: a tensor or an array, :class:`Rows` or :class:`Data`, a mapping with ``"x"`` and perhaps ``"context"``
            and ``"mask"``, or a tuple or list with x first, whose other elements are left out.
        name: the name of the data, for messages.
    """
    if isinstance(given, Rows | Data):
        given = {what: getattr(given, what) for what in PARTS}
    if isinstance(given, Mapping):
        if "x" not in given:
            raise DataError(f"{name}: an item or batch is a mapping with {sorted(map(str, given))}; name the data x")
        context, mask = (None if (v := given.get(k)) is None else _array(v, name) for k in PARTS[1:])
        return _array(given["x"], name), context, mask
    tensors = isinstance(given, list) and isinstance(next(iter(given), 0), Tensor | np.ndarray)
    return _array(given[0] if tensors or (isinstance(given, tuple) and given) else given, name), None, None


def as_numpy(value: Tensor) -> np.ndarray:
    """Convert a tensor to an array, in float32 if NumPy lacks its precision."""
    value = value.detach().cpu()
    array: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


def _array(value: Any, name: str) -> np.ndarray:
    validate_unmasked(value, name)
    try:
        array = as_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: an item or batch is {type_of(value)}, not an array ({reason(error)}); give arrays"
        ) from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name}: the values have type {array.dtype}; give real numbers")
    return array


@contextmanager
def warn_of_global_draws(name: str) -> Iterator[None]:
    """Warn of draws from torch's global generator inside, and restore its state.

    A thread that draws from it while training does would make both irreproducible.
    """
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        warnings.warn(
            f"{name}: the data set draws from torch's global generator, as training does, so a training cannot be "
            "repeated or resumed exactly; use a separate torch.Generator in the data set",
            stacklevel=2,
        )


def _describe(datum: Parts, name: str) -> dict[str, Any]:
    """Validate x, context and mask of a datum, and return the arguments of :class:`Table` that describe it."""
    x, context, mask = datum
    if not x.ndim or not x.size:
        raise DataError(f"{name}: a datum has shape {x.shape}; it must have at least one feature")
    if context is not None and (context.ndim != 1 or not len(context)):
        raise DataError(f"{name}: the context of a datum has shape {context.shape}; give a row of numbers")
    if mask is not None and (mask.shape != x.shape or mask.dtype != np.bool_):
        raise DataError(
            f"{name}: the mask of a datum has type {mask.dtype} and shape {mask.shape}; give booleans of the shape of "
            f"the datum, {x.shape}"
        )
    return {"features": x.shape, "context": 0 if context is None else len(context), "masked": mask is not None}


def _arrays(rows: Rows, table: Table) -> Sequence[np.ndarray | None]:
    """Return the buffers of x, context and mask that a table fills itself, else None."""
    parts = (rows.x, rows.context if table.context else None, rows.mask if table.masked else None)
    return [None if part is None else part.numpy() for part in parts]


def _put_parts(parts: Parts, outs: Sequence[np.ndarray | None], at: Any, name: str, row: int) -> None:
    """Copy x, context and mask into buffers, at an index or slice that starts with row ``row`` of the data."""
    for what, part, out in zip(PARTS, parts, outs, strict=True):
        if out is None:
            continue
        if part is None or part.shape != out[at].shape:
            shape = "missing" if part is None else f"of shape {part.shape}"
            raise DataError(f"{name}: from row {row} on {what} is {shape}, but {out[at].shape} before; make them equal")
        copy_numbers(part, out[at])


def _cut(parts: Parts, index: Any) -> Parts:
    x, *others = parts
    context, mask = (None if part is None else part[index] for part in others)
    return x[index], context, mask


def _batch(given: Any, name: str, row: int) -> Parts:
    """Return x, context and mask of a batch, and validate that they have the same number of rows."""
    parts = parts_of(given, name)
    if parts[0].ndim < 2 or len({len(part) if part.ndim else 0 for part in parts if part is not None}) > 1:
        shapes = [part.shape for part in parts if part is not None]
        raise DataError(f"{name}: the batch at row {row} has parts of shapes {shapes}; give one row per datum in each")
    return parts


def _epoch(data: Any, name: str, seed: int) -> Iterable[Any]:
    """Return an iterable over the batches of an epoch."""
    if isinstance(data, DataLoader):
        return _seeded(data, seed)
    if isinstance(data, IterableDataset):  # each datum is a batch of one
        return (dict(zip(PARTS, _cut(parts_of(one, name), None), strict=True)) for one in data)
    made = data if isinstance(data, Iterable) else data()
    if not isinstance(made, Iterable):
        raise DataError(f"{name}: the function returns {type_of(made)}; return an iterable of batches")
    return made


def _seeded(loader: "DataLoader[Any]", seed: int) -> "DataLoader[Any]":
    """Copy a loader with a separate, seeded generator; its default is torch's global generator."""
    own, generator = copy.copy(loader), make_generator(seed)
    own.generator = generator
    batch_sampler = copy.copy(loader.batch_sampler)
    sampler = copy.copy(_sampler_of(loader))
    if hasattr(sampler, "generator"):
        sampler.generator = generator
    if type(batch_sampler) is BatchSampler:
        batch_sampler.sampler = sampler
    own.__dict__.update(sampler=sampler, batch_sampler=batch_sampler, _iterator=None)
    return own


def _sampler_of(loader: "DataLoader[Any]") -> Any:
    """Return the sampler of rows; a loader that was given a BatchSampler does not use its own."""
    return loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else loader.sampler


def _gives_all_in_order(loader: Any) -> bool:
    """Return whether a loader gives all rows in their order; an IterableDataset defines the order itself."""
    if isinstance(loader.dataset, IterableDataset):
        return True
    sampler, batches = _sampler_of(loader), loader.batch_sampler
    if type(sampler) is not SequentialSampler or len(sampler) != len(loader.dataset):
        return False
    if not getattr(loader, "in_order", True) or type(batches) not in (BatchSampler, type(None)):
        return False
    return batches is None or not (batches.drop_last and len(sampler) % batches.batch_size)


def _known_size(data: Any) -> int | None:
    """Return the number of rows of a loader, or None if it is unknown."""
    counted = isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
    if not counted or type(data.batch_sampler) is not BatchSampler:
        return None
    rows, size = len(_sampler_of(data)), data.batch_sampler.batch_size
    return rows // size * size if data.batch_sampler.drop_last else rows
