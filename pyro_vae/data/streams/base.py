"""What all streams have in common: windows that are filled ahead, and every row held against what may be."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core.device import derive_seed
from pyro_vae.core.rows import Rows
from pyro_vae.data.rows import refuse_non_finite
from pyro_vae.data.sources import Window, permutation
from pyro_vae.data.streams.ahead import Fill, ahead
from pyro_vae.data.streams.layout import window_rows
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.vae import VAE

WINDOW_BYTES = 2**27
"""A window takes at most so much, and there are two: one is used while the other is filled."""

PIECE = 2**15 - 1
"""So many numbers torch checks in the thread that asks, and wakes no others, which have steps to take."""

Own = TypeVar("Own", bound="Streamed")


@dataclass(frozen=True, eq=False, kw_only=True)
class Streamed:
    """Data that are read a window at a time.

    Args:
        nan_is_missing: whether NaN means that a value was not observed.
        window_bytes: at most so many in a window.
        dtype: of the windows.
        device: of the windows.
        likelihood: whose support every value must lie in.
    """

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
        raise NotImplementedError

    @property
    def source(self) -> str:
        """What to call the data in messages."""
        raise NotImplementedError

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of a datum."""
        raise NotImplementedError

    @property
    def context(self) -> int:
        """The width of the context, 0 where there is none."""
        raise NotImplementedError

    @property
    def masked(self) -> bool:
        """Whether the data say themselves what is missing."""
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[str] | None:
        """The names of the features, where they have some."""
        return None

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """``(height, width)`` where a row is an image."""
        return None

    def head(self, rows: int = 2) -> Rows:
        """The first rows, checked.

        Args:
            rows: how many.
        """
        raise NotImplementedError

    def sample(self, k: int) -> Rows:
        """Rows to look at, the same at each call.

        Args:
            k: how many, at least 1.
        """
        raise NotImplementedError

    def _fill(self, *, seed: int, window: int) -> tuple[Fill, Callable[[int], np.ndarray]]:
        """What fills windows of so many rows, and what tells the numbers of a window's rows in the data."""
        raise NotImplementedError

    def window_rows(self, batch_size: int) -> int:
        """How many rows a window has.

        Args:
            batch_size: rows per step.
        """
        return window_rows(len(self), self._row_bytes, self.window_bytes, batch_size)

    def ordered(self, batch_size: int) -> str:
        """On what the order of the rows depends besides the seed, in words.

        Args:
            batch_size: rows per step.
        """
        return f"streamed, {self.window_rows(batch_size)} rows to a window"

    @property
    def _row_bytes(self) -> int:
        numbers, mask = torch.Size(self.features).numel(), self.masked or self.nan_is_missing
        return (numbers + self.context) * self.dtype.itemsize + (numbers if mask else 0)

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """One pass over the data, the next window being read while steps run on the one that is here.

        Args:
            seed: of the order; torch's own generators stay as they are.
            batch_size: rows per step; a window is a multiple of it.
            skip: the rows of this pass that were visited already; windows before are not read.

        Returns:
            The windows; each holds until the next is asked for.

        Raises:
            DataError: if something cannot be read, is no finite number or not one that the likelihood takes.
        """
        n, window = len(self), self.window_rows(batch_size)
        numbers = range(skip // window, -(-n // window))
        if not numbers:
            return
        fill, rows_of = self._fill(seed=seed, window=window)
        places, resident = self._places(window, min(len(numbers), 2))
        with closing(ahead(fill, numbers, places)) as filled:
            for number, rows in filled:
                of_window = derive_seed(seed, "rows of a window", number)
                order = permutation(min(window, n - number * window), of_window)
                order = order[max(skip - number * window, 0) :].to(self.device)
                known = torch.from_numpy(rows_of(number)).to(self.device)
                yield Window(rows if resident is None else _copied(rows, resident), order, known)
        self._spare.append((places, resident))

    def _places(self, window: int, count: int) -> tuple[list[Rows], Rows | None]:
        """Where to fill windows, and on a GPU where to put them in turn: those of the last pass, if they are free.

        There is one place on a GPU, as a graph reads where it was captured.
        """
        places, resident = self._spare.pop() if self._spare else ([], None)
        if len(places) < count or len(places[0]) != window:
            places = [self._place(window) for _ in range(count)]
            resident = None if self.device.type == "cpu" else moved(self._place(window), self.device)
        return places, resident

    def _place(self, rows: int) -> Rows:
        pinned = self.device.type == "cuda"
        shape, mask = (rows, *self.features), self.masked or self.nan_is_missing
        return Rows(
            torch.zeros(shape, dtype=self.dtype, pin_memory=pinned),
            torch.zeros(rows, self.context, dtype=self.dtype, pin_memory=pinned) if self.context else None,
            torch.ones(shape, dtype=torch.bool, pin_memory=pinned) if mask else None,
        )

    def _checked(self, part: Rows, name: str, first: int) -> Rows:
        """Rows that were just read, made what model and guide take: refused, or 0 where missing.

        Args:
            part: the rows, which are changed in place.
            name: where they come from.
            first: the number of the first of them there.
        """
        x, mask = part.x, part.mask
        width = max(PIECE // max(x[0].numel(), 1), 1)
        if part.context is not None and not _finite(part.context):
            refuse_non_finite(part.context, f"context of {name}", None, first)
        for at in range(0, len(x), width):
            piece = x[at : at + width]
            missing = None if mask is None else self._missing(piece, mask[at : at + width], name, first + at)
            if missing is None and not _finite(piece):
                refuse_non_finite(piece, name, self.columns, first + at)
            if missing is not None:
                refuse_non_finite(piece.masked_fill(missing, 0), name, self.columns, first + at)
                piece.masked_fill_(missing, torch.nan)
            if self.likelihood is not None and not (missing is None and _inside(piece, self.likelihood)):
                self.likelihood.refuse(piece, name, self.columns, first + at)
            if missing is not None:
                piece.masked_fill_(missing, 0)
        return part

    def _missing(self, x: Tensor, mask: Tensor, name: str, first: int) -> Tensor:
        """What is missing; NaN too, where that was said, and then the mask says so as well."""
        if self.nan_is_missing:
            known = ~x.isnan()
            mask.copy_(mask & known if self.masked else known)
        if (empty := (~mask.flatten(1).any(1)).nonzero()).numel():
            raise DataError(f"{name}: row {first + int(empty[0])} has no observed value, counted from 0; drop it")
        return ~mask

    def like(self: Own, vae: "VAE") -> Own:
        """The same stream, its windows on the device and in the precision of a VAE.

        Args:
            vae: the VAE.

        Raises:
            SettingsError: if the VAE is in a precision that NumPy has not.
        """
        own = vae.like(torch.empty(0))
        if own.dtype not in (torch.float16, torch.float32, torch.float64):
            raise SettingsError(f"{self.source}: a stream is read in float32 or float64, and the VAE is in {own.dtype}")
        return replace(self, dtype=own.dtype, device=own.device)

    def checked_for(self: Own, vae: "VAE") -> Own:
        """The same stream, its first rows seen to fit a VAE, and all to be held against its likelihood's support.

        Args:
            vae: the VAE.

        Raises:
            DataError: if a value is one that the likelihood does not take.
            ModelError: if the data do not fit the parts.
        """
        rows = self.head()
        vae.check(rows.x, rows.context)
        held = replace(self, likelihood=vae.decoder if isinstance(vae.decoder, Likelihood) else None)
        held.head()
        return held


def _finite(x: Tensor) -> bool:
    """Whether all are finite, in one pass: NaN would be the least, and the greatest."""
    least, greatest = x.aminmax()
    return bool((greatest - least).isfinite()) or bool(x.isfinite().all())


def _inside(x: Tensor, likelihood: Likelihood) -> bool:
    """Whether numbers that are finite all lie in the support: quicker than to say what is wrong with them."""
    return bool(likelihood.feature_support.check(x).all())


def moved(rows: Rows, device: torch.device) -> Rows:
    """Rows on a device.

    Args:
        rows: the rows.
        device: where to.

    Example:
        >>> moved(Rows(torch.zeros(2, 1)), torch.device("cpu")).mask is None
        True
    """
    context, mask = (None if part is None else part.to(device) for part in (rows.context, rows.mask))
    return Rows(rows.x.to(device), context, mask)


def _copied(rows: Rows, resident: Rows) -> Rows:
    """Rows copied to where they are used; once this returns, where they were may be filled anew."""
    for place, value in ((resident.x, rows.x), (resident.context, rows.context), (resident.mask, rows.mask)):
        if place is not None and value is not None:
            place.copy_(value, non_blocking=True)
    torch.cuda.synchronize(resident.x.device)
    return resident
