"""A stream of rows that are read by their number, in shuffled blocks."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.sources import spaced
from pyro_vae.data.streams.ahead import Fill
from pyro_vae.data.streams.base import Streamed, moved
from pyro_vae.data.streams.layout import BLOCKS, Layout
from pyro_vae.data.streams.tables import Table

LOOKS = 256
"""A sample is taken from at most so many blocks."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tabled(Streamed):
    """A table as a source: blocks of consecutive rows in a new order at each pass, and shuffled in each window.

    Args:
        table: the rows.
        block_rows: about so many rows are read at once; if not given, so many that a window holds 512 blocks.
    """

    table: Table
    block_rows: int | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def source(self) -> str:
        return self.table.name

    @property
    def features(self) -> tuple[int, ...]:
        return self.table.features

    @property
    def context(self) -> int:
        return self.table.context

    @property
    def masked(self) -> bool:
        return self.table.masked

    @property
    def columns(self) -> Sequence[str] | None:
        return self.table.columns

    @property
    def image_shape(self) -> tuple[int, int] | None:
        return self.table.image_shape

    def head(self, rows: int = 2) -> Rows:
        return self._read([(0, min(rows, len(self)))])

    def sample(self, k: int) -> Rows:
        """k rows, or all where there are fewer, evenly spaced over at most 256 places.

        Args:
            k: how many, at least 1.
        """
        n, most = len(self), min(k, len(self))
        if n < 2 * most:
            return self._read([(0, n)]).take(spaced(n, most).to(self.device))
        looks = min(most, LOOKS)
        counts = [most * (i + 1) // looks - most * i // looks for i in range(looks)]
        return self._read([(s, s + c) for s, c in zip(spaced(n, looks).tolist(), counts, strict=True)])

    def _read(self, spans: Sequence[tuple[int, int]]) -> Rows:
        """The rows of spans, where they are used."""
        rows = self._place(sum(last - first for first, last in spans))
        for _ in self._into(rows, spans):
            pass
        return moved(rows, self.device)

    def _into(self, place: Rows, spans: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Fill a place with spans of rows, one file at a time, each held against what may be."""
        at = 0
        for first, last in spans:
            while first < last:
                name, number, left = self.table.place(first)
                count = min(last - first, left)
                part = place.take(slice(at, at + count))
                self.table.read(first, part)
                self._checked(part, name, number)
                first, at = first + count, at + count
            yield

    def ordered(self, batch_size: int) -> str:
        cuts = self._cuts(self.window_rows(batch_size))
        digest = hashlib.blake2b(np.asarray(cuts, "<i8").tobytes(), digest_size=8).hexdigest()
        return f"{super().ordered(batch_size)}, of {len(cuts) - 1} blocks ({digest})"

    def _cuts(self, window: int) -> np.ndarray:
        return self.table.cuts(self.block_rows or max(window // BLOCKS, 1))

    def _fill(self, *, seed: int, window: int) -> tuple[Fill, Callable[[int], np.ndarray]]:
        layout = Layout.of(self._cuts(window), seed=seed, window=window)

        def fill(number: int, place: Rows) -> Iterator[None]:
            spans = list(layout.spans(number))
            for span in spans:
                self.table.soon(*span)
            return self._into(place, spans)

        return fill, layout.numbers
