"""A stream over a table: shuffled blocks, windows that are prefetched, and validated values."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core.device import derive_seed
from pyro_vae.core.rows import Rows
from pyro_vae.data.context import context_names
from pyro_vae.data.precision import coarse_columns
from pyro_vae.data.rows import warn_if_coarse
from pyro_vae.data.sources import Window, permutation, spaced
from pyro_vae.data.streams.layout import BLOCKS, Layout, window_rows
from pyro_vae.data.streams.prefetch import prefetch
from pyro_vae.data.streams.tables import Read, Table
from pyro_vae.data.tables import matched_by_name
from pyro_vae.data.values import validate_finite
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortized

WINDOW_BYTES = 2**27
"""The maximum size, in bytes, of a window. There are two: one is used while the other is filled."""

PIECE = 2**15 - 1
"""The most numbers that torch validates in one thread, without taking threads from the training steps."""

SAMPLE_SPANS = 256
"""The maximum number of spans that a sample of rows is drawn from."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Streamed:
    """A table as a source: each pass reorders blocks of consecutive rows, and shuffles the rows of each window.

    Args:
        table: the rows.
        beside: tables for ``"context"`` or ``"mask"``, with the same number of rows.
        block_rows: the approximate number of rows to read at once; by default a window has 512 blocks.
        nan_is_missing: whether NaN marks missing values.
        window_bytes: the maximum size, in bytes, of a window.
        dtype: the type of the windows.
        device: the device of the windows.
        likelihood: the likelihood in whose support all values must lie.
    """

    table: Table
    beside: Mapping[str, Table] = field(default_factory=dict)
    block_rows: int | None = None
    nan_is_missing: bool = False
    window_bytes: int = WINDOW_BYTES
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    likelihood: Likelihood | None = None
    _spare: list[tuple[list[Rows], Rows | None]] = field(default_factory=list, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, without the buffers of windows."""
        return {**self.__dict__, "_spare": []}

    def __len__(self) -> int:
        return self.table.size

    @property
    def source(self) -> str:
        """The name of the data, for messages."""
        return self.table.name

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of a datum."""
        return self.table.features

    @property
    def columns(self) -> Sequence[str] | None:
        """The names of the features, if any."""
        return self.table.columns

    @property
    def context_columns(self) -> Sequence[str] | None:
        """The names of the context columns, if any."""
        return self.beside["context"].columns if "context" in self.beside else self.table.context_columns

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of an image, ``(height, width)`` or ``(3, height, width)``, if rows are images."""
        return self.table.image_shape

    @property
    def context(self) -> int:
        """The width of the context, 0 for none."""
        return self.beside["context"].features[0] if "context" in self.beside else self.table.context

    @property
    def _masked(self) -> bool:
        return self.table.masked or "mask" in self.beside

    @property
    def _row_bytes(self) -> int:
        numbers, mask = torch.Size(self.features).numel(), self._masked or self.nan_is_missing
        return (numbers + self.context) * self.dtype.itemsize + (numbers if mask else 0)

    def head(self, rows: int = 2) -> Rows:
        """Return the first rows, validated."""
        return self._read([(0, min(rows, len(self)))])

    def sample(self, k: int) -> Rows:
        """Return k rows (all if there are fewer) from at most 256 evenly spaced spans, the same at each call.

        The rows of an iterable, which is read sequentially, come from the first window.
        """
        most = min(k, len(self))
        n = len(self) if self.table.seekable else self.window_rows(most)
        if n < 2 * most or not self.table.seekable:
            return self._read([(0, n)]).take(spaced(n, most).to(self.device))
        spans = min(most, SAMPLE_SPANS)
        counts = [most * (i + 1) // spans - most * i // spans for i in range(spans)]
        return self._read([(s, s + c) for s, c in zip(spaced(n, spans).tolist(), counts, strict=True)])

    def glance(self) -> Rows:
        """Return a few rows in double precision, not validated: 4 of each of 4 places if rows are read in any order."""
        exact = replace(self, dtype=torch.float64, device=torch.device("cpu"), likelihood=None)
        if not self.table.seekable:
            return exact.head(16)
        firsts = spaced(len(self), 4).tolist() if len(self) >= 32 else [0]
        each = min(len(self), 4 if len(firsts) > 1 else 32)
        rows = exact._place(each * len(firsts))
        for i, first in enumerate(firsts):
            self.table.read_all(first, rows.take(slice(i * each, (i + 1) * each)))
        return rows

    def narrowed(self) -> "Streamed":
        """Return the stream in single precision, or in double if a column would be too coarse."""
        return replace(self, dtype=torch.float64 if coarse_columns(*_flat(self.glance())) else torch.float32)

    def in_order(self, rows: int) -> Iterator[Rows]:
        """Iterate over the data in their order, at most ``rows`` rows at a time, validated.

        Raises:
            DataError: if a loader shuffles, samples or drops rows.
        """
        self.table.validate_in_order()
        read = self.table.reader(0)
        for first in range(0, len(self), rows):
            part = self._place(min(rows, len(self) - first))
            for _ in self._fill(part, [(first, first + len(part))], read):
                pass
            yield _to_device(part, self.device)

    def window_rows(self, batch_size: int) -> int:
        """Return the number of rows in a window, a multiple of ``batch_size`` unless it has all rows."""
        return window_rows(len(self), self._row_bytes, self.window_bytes, batch_size)

    def ordered(self, batch_size: int) -> str:
        """Describe what the order of the rows depends on, in addition to the seed."""
        window = self.window_rows(batch_size)
        cuts = self._cuts(window)
        digest = hashlib.blake2b(np.asarray(cuts, "<i8").tobytes(), digest_size=8).hexdigest()
        return f"streamed, {window} rows to a window, of {len(cuts) - 1} blocks ({digest})"

    def _cuts(self, window: int) -> np.ndarray:
        return self.table.cuts(self.block_rows or max(window // BLOCKS, 1))

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """Iterate over the data once, as described in :meth:`pyro_vae.data.sources.Source.windows`.

        The next window is read while training uses the current one; windows before ``skip`` are not read.
        """
        n, window = len(self), self.window_rows(batch_size)
        numbers = range(skip // window, -(-n // window))
        if not numbers:
            return
        layout, read = Layout.of(self._cuts(window), seed=seed, window=window), self.table.reader(seed)

        def fill(number: int, place: Rows) -> Iterator[None]:
            spans = list(layout.spans(number))
            for span in spans:
                for table in (self.table, *self.beside.values()):
                    table.read_ahead(*span)
            return self._fill(place, spans, read)

        places, resident = self._places(window, min(len(numbers), 2))
        with closing(prefetch(fill, numbers, places)) as filled:
            for number, rows in filled:
                of_window = derive_seed(seed, "rows of a window", number)
                order = permutation(min(window, n - number * window), of_window)
                order = order[max(skip - number * window, 0) :].to(self.device)
                known = torch.from_numpy(layout.numbers(number)).to(self.device)
                yield Window(rows if resident is None else _copy_into(rows, resident), order, known)
        self._spare.append((places, resident))

    def _read(self, spans: Sequence[tuple[int, int]]) -> Rows:
        """Read the rows of spans, and move them to the device."""
        rows = self._place(sum(last - first for first, last in spans))
        for _ in self._fill(rows, spans, self.table.reader(0)):
            pass
        return _to_device(rows, self.device)

    def _fill(self, place: Rows, spans: Sequence[tuple[int, int]], read: Read) -> Iterator[None]:
        """Fill a buffer with spans of rows and validate them by file; yield after each read."""
        at = 0
        for first, last in spans:
            while first < last:
                name, number, left = self.table.place(first)
                part, done = place.take(slice(at, at + min(last - first, left))), 0
                while done < len(part):
                    done += read(first + done, part.take(slice(done, None)) if done else part)
                    yield
                for what, table in self.beside.items():
                    table.read_all(first, Rows(getattr(part, what)))
                self._validate(part, name, number)
                first, at = first + done, at + done

    def _places(self, window: int, count: int) -> tuple[list[Rows], Rows | None]:
        """Return the host buffers of windows and the one on a GPU, reusing those of an earlier pass.

        There is only one buffer on a GPU, because a CUDA graph always reads the memory it was captured with.
        """
        places, resident = self._spare.pop() if self._spare else ([], None)
        if len(places) < count or len(places[0]) != window:
            places = [self._place(window) for _ in range(count)]
            resident = None if self.device.type == "cpu" else _to_device(self._place(window), self.device)
        return places, resident

    def _place(self, rows: int) -> Rows:
        pinned, shape, context = self.device.type == "cuda", (rows, *self.features), self.context
        return Rows(
            torch.zeros(shape, dtype=self.dtype, pin_memory=pinned),
            torch.zeros(rows, context, dtype=self.dtype, pin_memory=pinned) if context else None,
            torch.ones(shape, dtype=torch.bool, pin_memory=pinned) if self._masked or self.nan_is_missing else None,
        )

    def _validate(self, part: Rows, name: str, first: int) -> None:
        """Validate rows read from row ``first`` of ``name`` on, and set missing values to 0."""
        x, mask, likelihood = part.x, part.mask, self.likelihood
        width = max(PIECE // max(x[0].numel(), 1), 1)
        if part.context is not None and not _all_finite(part.context):
            validate_finite(part.context, f"context of {name}", None, first)
        for at in range(0, len(x), width):
            piece = x[at : at + width]
            missing = None if mask is None else self._missing(piece, mask[at : at + width], name, first + at)
            if missing is not None:
                validate_finite(piece.masked_fill(missing, 0), name, self.columns, first + at)
                piece.masked_fill_(missing, torch.nan)
            elif not _all_finite(piece):
                validate_finite(piece, name, self.columns, first + at)
            # Checking the support of finite numbers is faster than refuse(), which explains what is wrong.
            if likelihood is not None and not (missing is None and likelihood.feature_support.check(piece).all()):
                likelihood.refuse(piece, name, self.columns, first + at)
            if missing is not None:
                piece.masked_fill_(missing, 0)

    def _missing(self, x: Tensor, mask: Tensor, name: str, first: int) -> Tensor:
        """Return where values are missing; with ``nan_is_missing``, add NaN to the mask."""
        if self.nan_is_missing:
            known = ~x.isnan()
            mask.copy_(mask & known if self._masked else known)
        if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
            row = first + int(empty[0])
            raise DataError(f"{name}: row {row} has no observed value; drop it (rows are counted from 0)")
        return ~mask

    def like(self, vae: "Amortized") -> "Streamed":
        """Return the stream with its windows on the device and in the precision of a VAE, which NumPy must support."""
        own = vae.like(torch.empty(0))
        if own.dtype not in (torch.float16, torch.float32, torch.float64):
            raise SettingsError(
                f"{self.source}: the VAE is in {own.dtype}, but streams are in float32 or float64; convert the VAE"
            )
        return replace(self, dtype=own.dtype, device=own.device)

    def _validate_names(self, known: Any) -> None:
        """Validate that columns and context columns with names are those of training data, in their order."""
        expected = [*map(str, getattr(known, "columns", None) or ())]
        if expected and self.columns and matched_by_name(self.columns, expected) and [*self.columns] != expected:
            raise DataError(
                f"{self.source}: the columns of the stream differ from those of the training data, or their order "
                f"does; give them as {expected} (for Parquet, columns= of pyro_vae.data.stream)"
            )
        if known is None or not known.context_columns or not self.context_columns:
            return
        expected = context_names(known.context_columns, known.categories)
        if [*self.context_columns] != expected:
            raise DataError(
                f"{self.source}: the context columns of the stream differ from those of the training data, or their "
                f"order does; give them as {expected} (for Parquet, context= of pyro_vae.data.stream)"
            )

    def checked_for(self, vae: "Amortized") -> "Streamed":
        """Validate the columns and the first rows against a VAE, and all rows against the support when read."""
        self._validate_names(getattr(vae, "trained_on", None))
        warn_if_coarse(self.glance(), vae, f"some rows of {self.source}", self.columns)
        rows = self.head()
        vae.check(rows.x, rows.context, rows.mask)
        decoder = getattr(vae, "decoder", None)
        checked = replace(self, likelihood=decoder if isinstance(decoder, Likelihood) else None)
        checked.head()
        return checked


def _flat(rows: Rows) -> tuple[Tensor, Tensor | None]:
    return rows.x.flatten(1), None if rows.mask is None else rows.mask.flatten(1)


def _all_finite(x: Tensor) -> bool:
    """Return whether all values are finite, in one pass: NaN propagates to minimum and maximum."""
    least, greatest = x.aminmax()
    return bool((greatest - least).isfinite()) or bool(x.isfinite().all())


def _to_device(rows: Rows, device: torch.device) -> Rows:
    context, mask = (None if part is None else part.to(device) for part in (rows.context, rows.mask))
    return Rows(rows.x.to(device), context, mask)


def _copy_into(rows: Rows, resident: Rows) -> Rows:
    """Copy rows to the buffer on the GPU, and wait until their host buffer can be reused."""
    for place, value in ((resident.x, rows.x), (resident.context, rows.context), (resident.mask, rows.mask)):
        if place is not None and value is not None:
            place.copy_(value, non_blocking=True)
    torch.cuda.synchronize(resident.x.device)
    return resident
