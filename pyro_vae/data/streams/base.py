"""A table as training reads it: windows that are filled ahead, in shuffled blocks, and every value validated."""

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
from pyro_vae.data.sources import Window, permutation, spaced
from pyro_vae.data.streams.layout import BLOCKS, Layout, window_rows
from pyro_vae.data.streams.prefetch import prefetch
from pyro_vae.data.streams.tables import Read, Table
from pyro_vae.data.values import refuse_non_finite
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortised

WINDOW_BYTES = 2**27
"""The most bytes of a window. There are two: one is used while the other is filled."""

PIECE = 2**15 - 1
"""So many numbers torch checks in the thread that asks, and wakes no others, which have steps to take."""

LOOKS = 256
"""The most blocks that a sample is taken from."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Streamed:
    """A table as a source: blocks of consecutive rows in a new order at each pass, and shuffled in each window.

    Args:
        table: the rows.
        beside: tables of as many rows that fill ``"context"`` or ``"mask"``.
        block_rows: about so many rows are read at once; if not given, a window holds 512 blocks.
        nan_is_missing: whether NaN means that a value was not observed.
        window_bytes: the most bytes of a window.
        dtype: of the windows.
        device: of the windows.
        likelihood: whose support every value must lie in.
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
        """To be handed to another process, without the places of windows."""
        return {**self.__dict__, "_spare": []}

    def __len__(self) -> int:
        return self.table.size

    @property
    def source(self) -> str:
        """What to call the data in messages."""
        return self.table.name

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of a datum."""
        return self.table.features

    @property
    def columns(self) -> Sequence[str] | None:
        """The names of the features, where they have some."""
        return self.table.columns

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """``(height, width)`` where a row is an image."""
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
        """The first rows, validated."""
        return self._read([(0, min(rows, len(self)))])

    def sample(self, k: int) -> Rows:
        """k rows, or all where there are fewer, evenly spaced over at most 256 places, the same at each call.

        Of an iterable, which is read from the front, they are spaced over the first window.
        """
        most = min(k, len(self))
        n = len(self) if self.table.seekable else self.window_rows(most)
        if n < 2 * most or not self.table.seekable:
            return self._read([(0, n)]).take(spaced(n, most).to(self.device))
        looks = min(most, LOOKS)
        counts = [most * (i + 1) // looks - most * i // looks for i in range(looks)]
        return self._read([(s, s + c) for s, c in zip(spaced(n, looks).tolist(), counts, strict=True)])

    def in_order(self, rows: int) -> Iterator[Rows]:
        """One pass over the data in their order, at most so many rows at a time, validated."""
        read = self.table.reader(0)
        for first in range(0, len(self), rows):
            part = self._place(min(rows, len(self) - first))
            for _ in self._fill(part, [(first, first + len(part))], read):
                pass
            yield _moved(part, self.device)

    def window_rows(self, batch_size: int) -> int:
        """How many rows a window has, of batches of so many."""
        return window_rows(len(self), self._row_bytes, self.window_bytes, batch_size)

    def ordered(self, batch_size: int) -> str:
        """On what the order of the rows depends besides the seed, in words."""
        window = self.window_rows(batch_size)
        cuts = self._cuts(window)
        digest = hashlib.blake2b(np.asarray(cuts, "<i8").tobytes(), digest_size=8).hexdigest()
        return f"streamed, {window} rows to a window, of {len(cuts) - 1} blocks ({digest})"

    def _cuts(self, window: int) -> np.ndarray:
        return self.table.cuts(self.block_rows or max(window // BLOCKS, 1))

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """One pass over the data, as every :class:`Source` makes it.

        The next window is read while steps run on the present one; those before ``skip`` are not read.
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
                    table.soon(*span)
            return self._fill(place, spans, read)

        places, resident = self._places(window, min(len(numbers), 2))
        with closing(prefetch(fill, numbers, places)) as filled:
            for number, rows in filled:
                of_window = derive_seed(seed, "rows of a window", number)
                order = permutation(min(window, n - number * window), of_window)
                order = order[max(skip - number * window, 0) :].to(self.device)
                known = torch.from_numpy(layout.numbers(number)).to(self.device)
                yield Window(rows if resident is None else _copied(rows, resident), order, known)
        self._spare.append((places, resident))

    def _read(self, spans: Sequence[tuple[int, int]]) -> Rows:
        """The rows of spans, where they are used."""
        rows = self._place(sum(last - first for first, last in spans))
        for _ in self._fill(rows, spans, self.table.reader(0)):
            pass
        return _moved(rows, self.device)

    def _fill(self, place: Rows, spans: Sequence[tuple[int, int]], read: Read) -> Iterator[None]:
        """Fill a place with spans of rows, as many at each turn as are read at once, and validate them by file."""
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
        """Where to fill windows, and on a GPU where to put them in turn: those of the last pass, if they are free.

        There is one place on a GPU, as a graph reads where it was captured.
        """
        places, resident = self._spare.pop() if self._spare else ([], None)
        if len(places) < count or len(places[0]) != window:
            places = [self._place(window) for _ in range(count)]
            resident = None if self.device.type == "cpu" else _moved(self._place(window), self.device)
        return places, resident

    def _place(self, rows: int) -> Rows:
        pinned, shape, context = self.device.type == "cuda", (rows, *self.features), self.context
        return Rows(
            torch.zeros(shape, dtype=self.dtype, pin_memory=pinned),
            torch.zeros(rows, context, dtype=self.dtype, pin_memory=pinned) if context else None,
            torch.ones(shape, dtype=torch.bool, pin_memory=pinned) if self._masked or self.nan_is_missing else None,
        )

    def _validate(self, part: Rows, name: str, first: int) -> None:
        """Validate rows that were just read, row ``first`` of ``name`` first, and set to 0 what is missing."""
        x, mask, own = part.x, part.mask, self.likelihood
        width = max(PIECE // max(x[0].numel(), 1), 1)
        if part.context is not None and not _finite(part.context):
            refuse_non_finite(part.context, f"context of {name}", None, first)
        for at in range(0, len(x), width):
            piece = x[at : at + width]
            missing = None if mask is None else self._missing(piece, mask[at : at + width], name, first + at)
            if missing is not None:
                refuse_non_finite(piece.masked_fill(missing, 0), name, self.columns, first + at)
                piece.masked_fill_(missing, torch.nan)
            elif not _finite(piece):
                refuse_non_finite(piece, name, self.columns, first + at)
            # A look at the support of numbers that are finite is quicker than to say what is wrong with them.
            if own is not None and not (missing is None and own.feature_support.check(piece).all()):
                own.refuse(piece, name, self.columns, first + at)
            if missing is not None:
                piece.masked_fill_(missing, 0)

    def _missing(self, x: Tensor, mask: Tensor, name: str, first: int) -> Tensor:
        """What is missing; NaN too, where that was said, and then the mask says so as well."""
        if self.nan_is_missing:
            known = ~x.isnan()
            mask.copy_(mask & known if self._masked else known)
        if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
            raise DataError(f"{name}: row {first + int(empty[0])} has no observed value, counted from 0; drop it")
        return ~mask

    def like(self, vae: "Amortised") -> "Streamed":
        """The same stream, its windows on the device and in the precision of a VAE, which NumPy must have."""
        own = vae.like(torch.empty(0))
        if own.dtype not in (torch.float16, torch.float32, torch.float64):
            raise SettingsError(f"{self.source}: a stream is read in float32 or float64, and the VAE is in {own.dtype}")
        return replace(self, dtype=own.dtype, device=own.device)

    def checked_for(self, vae: "Amortised") -> "Streamed":
        """The same stream, its first rows seen to fit a VAE, and all to be held against its likelihood's support."""
        rows = self.head()
        vae.check(rows.x, rows.context, rows.mask)
        decoder = getattr(vae, "decoder", None)
        held = replace(self, likelihood=decoder if isinstance(decoder, Likelihood) else None)
        held.head()
        return held


def _finite(x: Tensor) -> bool:
    """Whether all are finite, in one pass: NaN would be the least, and the greatest."""
    least, greatest = x.aminmax()
    return bool((greatest - least).isfinite()) or bool(x.isfinite().all())


def _moved(rows: Rows, device: torch.device) -> Rows:
    context, mask = (None if part is None else part.to(device) for part in (rows.context, rows.mask))
    return Rows(rows.x.to(device), context, mask)


def _copied(rows: Rows, resident: Rows) -> Rows:
    """Rows copied to where they are used; once this returns, where they were may be filled anew."""
    for place, value in ((resident.x, rows.x), (resident.context, rows.context), (resident.mask, rows.mask)):
        if place is not None and value is not None:
            place.copy_(value, non_blocking=True)
    torch.cuda.synchronize(resident.x.device)
    return resident
