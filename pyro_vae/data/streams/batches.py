"""Iterables of batches: read from the front, as often as there are epochs."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from pyro_vae.core.device import make_generator
from pyro_vae.core.rows import Rows
from pyro_vae.data.sources import spaced
from pyro_vae.data.streams.ahead import Fill
from pyro_vae.data.streams.base import Streamed, moved
from pyro_vae.data.streams.items import fill_from, refuse_datum
from pyro_vae.data.streams.parts import Parts, own_noise, parts_of
from pyro_vae.errors import DataError

ONCE = "a generator can be read only once, where training reads the data in each epoch anew"

Maker = Callable[[int], Iterable[Any]]
"""Of a seed, batches from the front."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batches(Streamed):
    """An iterable of batches as a source: rows in the order it gives them, shuffled in each window.

    Args:
        make: of the seed of an epoch, the batches from the front.
        size: how many rows there are.
        name: for messages.
        first: x, context and mask of its first row.
    """

    make: Maker
    size: int
    name: str
    first: Parts

    def __len__(self) -> int:
        return self.size

    @property
    def source(self) -> str:
        return self.name

    @property
    def features(self) -> tuple[int, ...]:
        return self.first[0].shape

    @property
    def context(self) -> int:
        return 0 if self.first[1] is None else len(self.first[1])

    @property
    def masked(self) -> bool:
        return self.first[2] is not None

    def head(self, rows: int = 2) -> Rows:
        return self._front(min(rows, self.size))

    def sample(self, k: int) -> Rows:
        """k rows, evenly spaced over the first window: an iterable is read from the front.

        Args:
            k: how many, at least 1.
        """
        rows = self._front(self.window_rows(min(k, self.size)))
        return rows.take(spaced(len(rows), k).to(self.device))

    def _front(self, rows: int) -> Rows:
        """The first rows, where they are used."""
        place = self._place(rows)
        for _ in _Reading(self, 0).into(place, self._checked):
            pass
        return moved(place, self.device)

    def _fill(self, *, seed: int, window: int) -> tuple[Fill, Callable[[int], np.ndarray]]:
        reading = _Reading(self, seed)

        def fill(number: int, place: Rows) -> Iterator[None]:
            while reading.row < number * window:
                reading.drop(number * window - reading.row)
                yield
            rows = min(window, self.size - number * window)
            yield from reading.into(place.take(slice(rows)), self._checked)
            if number * window + rows == self.size:
                reading.end()

        return fill, lambda number: np.arange(number * window, min((number + 1) * window, self.size))


class _Reading:
    """One pass over the batches, and how far it has come."""

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches, self.name, self.row = batches, batches.name, 0
        self._given = iter(batches.make(seed))
        self._left: Parts = (np.empty((0,)), None, None)

    def _take(self, most: int) -> Parts:
        """The next rows, at most so many, of one batch."""
        while not len(self._left[0]):
            try:
                batch = next(self._given)
            except StopIteration:
                raise self._too_few() from None
            self._left = parts_of(batch, self.name)
            lengths = {len(part) if part.ndim else 0 for part in self._left if part is not None}
            if len(lengths) > 1 or self._left[0].ndim < 2:
                shapes = [part.shape for part in self._left if part is not None]
                raise DataError(
                    f"{self.name}: from row {self.row} on a batch has parts of shapes {shapes}; give one row each"
                )
        taken = tuple(None if part is None else part[:most] for part in self._left)
        self._left = tuple(None if part is None else part[most:] for part in self._left)  # type: ignore[assignment]
        assert taken[0] is not None
        self.row += len(taken[0])
        return taken  # type: ignore[return-value]

    def _too_few(self) -> DataError:
        size = self.batches.size
        advice = f"give size={self.row}" if self.row else "let it begin anew each time it is iterated"
        return DataError(f"{self.name}: an epoch gave {self.row} rows, and size says {size}; {advice}")

    def drop(self, most: int) -> None:
        """Go on by at most so many rows, of one batch."""
        self._take(most)

    def into(self, place: Rows, checked: Callable[[Rows, str, int], Rows]) -> Iterator[None]:
        """Fill a place, a batch at each turn."""
        began, at = self.row, 0
        if place.mask is not None:
            place.mask.fill_(True)
        parts = (place.x, place.context, place.mask if self.batches.masked else None)
        outs = [None if part is None else part.numpy() for part in parts]
        while at < len(place):
            row = self.row
            taken = self._take(len(place) - at)
            fill_from(taken, outs, slice(at, at + len(taken[0])), self.name, row)
            at += len(taken[0])
            yield
        checked(place, self.name, began)

    def end(self) -> None:
        """There must be no more."""
        if len(self._left[0]) or any(len(parts_of(batch, self.name)[0]) for batch in self._given):
            size = self.batches.size
            raise DataError(
                f"{self.name}: an epoch gives more rows than size says, {size}; give size= the rows of all batches"
            )


def batches(data: Any, name: str, size: int | None, **settings: Any) -> Batches:
    """An iterable of batches, of which the first is read.

    Args:
        data: a function that makes an iterable of batches, or such an iterable that can be read again and again.
        name: for messages.
        size: how many rows there are; a loader of a data set of known length knows it.
        settings: of :class:`Streamed`.

    Raises:
        DataError: if it can be read only once, gives nothing, or its size is not known.
    """
    make = _maker(data, name)
    size = _known_size(data) if size is None else size
    if size is None:
        raise DataError(f"{name}: nobody knows how many rows it gives, which the n of n/m is; give size= that number")
    with own_noise(name):
        first = _first_datum(make(0), name)
    refuse_datum(*first, name)
    return Batches(make=make, size=size, name=name, first=first, **settings)


def _first_datum(given: Iterable[Any], name: str) -> Parts:
    for batch in given:
        x, context, mask = parts_of(batch, name)
        if x.ndim and len(x):
            if any(part is not None and (not part.ndim or not len(part)) for part in (context, mask)):
                raise DataError(f"{name}: a batch has {len(x)} rows, and its context or mask none; make them equal")
            return x[0], None if context is None else context[0], None if mask is None else mask[0]
    raise DataError(f"{name}: it gives no rows; give at least one batch")


def _maker(data: Any, name: str) -> Maker:
    """What gives the batches of an epoch, from its seed."""
    if isinstance(data, DataLoader):
        return partial(_seeded, data)
    if isinstance(data, IterableDataset):
        return partial(_one_by_one, data, name)
    if isinstance(data, Iterator):
        raise DataError(f"{name}: {ONCE}; give the function that makes it")
    if isinstance(data, Iterable):
        return partial(_again, data)
    if isinstance(once := _fresh(data, name, 0), Iterator) and _fresh(data, name, 0) is once:
        raise DataError(f"{name}: the function gives the same generator again, and {ONCE}; let it make a new one")
    return partial(_fresh, data, name)


def _named(parts: Parts) -> dict[str, np.ndarray]:
    return {name: part for name, part in zip(("x", "context", "mask"), parts, strict=True) if part is not None}


def _again(data: Iterable[Any], seed: int) -> Iterable[Any]:
    return data


def _one_by_one(data: Iterable[Any], name: str, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Each datum as a batch of one."""
    for one in data:
        yield {what: part[None] for what, part in _named(parts_of(one, name)).items()}


def _fresh(function: Callable[[], Any], name: str, seed: int) -> Iterable[Any]:
    made = function()
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
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    if type(data.batch_sampler) is not BatchSampler:
        return None
    rows, size = len(data.sampler), data.batch_sampler.batch_size  # type: ignore[arg-type]
    return rows // size * size if data.batch_sampler.drop_last else rows
