"""What training reads its data from: rows in memory, or windows of data that are too many for it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core.device import make_generator
from pyro_vae.core.rows import Rows
from pyro_vae.data.fingerprint import row_hashes
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import Data
from pyro_vae.errors import SettingsError
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortised


@dataclass(frozen=True)
class Window:
    """Rows that are here now, and the order in which steps visit them.

    Args:
        rows: of the same shape for every window of a source; a last one may hold less, and rows of before behind it.
        order: indices of the rows to visit, each once, shape ``(visited,)``.
        numbers: of each row its number in the data, shape ``(row,)``; that of its place if not given.

    Example:
        >>> len(Window(Rows(torch.zeros(3, 2)), torch.tensor([2, 0, 1])).order)
        3
    """

    rows: Rows
    order: Tensor
    numbers: Tensor | None = None


@runtime_checkable
class Source(Protocol):
    """Data as training visits them: each row once per epoch, in an order that a seed alone decides.

    Attributes:
        source: what to call the data in messages.
        columns: the names of the features, where they have some.
        image_shape: ``(height, width)`` where a row is a grey image, ``(3, height, width)`` where one of colours.
        features: the shape of a datum.
    """

    @property
    def source(self) -> str: ...
    @property
    def columns(self) -> Sequence[str] | None: ...
    @property
    def image_shape(self) -> tuple[int, ...] | None: ...
    @property
    def features(self) -> tuple[int, ...]: ...

    def __len__(self) -> int:
        """The n of n/m."""

    def head(self, rows: int = 2) -> Rows:
        """The first rows, checked."""

    def sample(self, k: int) -> Rows:
        """k rows, or all where there are fewer, evenly spaced over the data, the same at each call."""

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """One pass over the data, without its first ``skip`` rows.

        The order is a function of the seed, the batch size, the number of rows and the source's own
        settings, and of nothing that came before. Each window but the last has a multiple of
        ``batch_size`` rows to visit, as long as ``skip`` is one. A window holds until the next is asked for.
        """

    def like(self, vae: "Amortised") -> "Source":
        """The same source, its windows on the device and in the precision of a VAE."""

    def checked_for(self, vae: "Amortised") -> "Source":
        """The same source, seen to fit a VAE; what is read later is held against the likelihood's support."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Rows in memory as a source: one window of all of them, in a new order at each pass.

    Args:
        rows: the data, where they are used.
        source: what to call them in messages.
        columns: the names of the features.
        image_shape: ``(height, width)`` where a row is a grey image, ``(3, height, width)`` where one of colours.
        categories: by the name of a column what its codes 0, 1, … stand for.
        context_columns: the names of the columns that the context was made of.

    Example:
        >>> source = InMemory(Rows(torch.arange(6.0).reshape(3, 2)))
        >>> [window] = source.windows(seed=1, batch_size=2)
        >>> window.rows.x is source.rows.x, sorted(window.order.tolist())
        (True, [0, 1, 2])
    """

    rows: Rows
    source: str = "data"
    columns: Sequence[str] | None = None
    image_shape: tuple[int, ...] | None = None
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    context_columns: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of a datum."""
        return tuple(self.rows.x.shape[1:])

    def head(self, rows: int = 2) -> Rows:
        """The first rows.

        Args:
            rows: how many.
        """
        return self.rows.take(slice(rows))

    def sample(self, k: int) -> Rows:
        """k rows, or all where there are fewer, evenly spaced.

        Args:
            k: how many, at least 1.

        Example:
            >>> InMemory(Rows(torch.arange(6.0).reshape(6, 1))).sample(3).x.tolist()
            [[0.0], [2.0], [4.0]]
        """
        return self.rows.take(spaced(len(self), k).to(self.rows.x.device))

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """One pass, as one window; nothing is copied.

        Args:
            seed: of the order; torch's own generators stay as they are.
            batch_size: as for every source; here it changes nothing.
            skip: the rows of this pass that were visited already.

        Returns:
            The window, unless all was visited.
        """
        if skip < len(self):
            yield Window(self.rows, permutation(len(self), seed, self.rows.x.device)[skip:])

    def like(self, vae: "Amortised") -> "InMemory":
        """The same rows on the device and in the precision of a VAE; themselves where they are so already."""
        return replace(self, rows=self.rows.like(vae))

    def checked_for(self, vae: "Amortised") -> "InMemory":
        """The same source, its rows seen to fit a VAE and to lie in the support of its likelihood.

        Raises:
            DataError: if a value is one that the likelihood does not take.
            ModelError: if the data do not fit the parts.
        """
        vae.check(self.rows.x, self.rows.context, self.rows.mask)
        if isinstance(decoder := getattr(vae, "decoder", None), Likelihood):
            decoder.refuse(self.rows.x, self.source, self.columns)
        return self


HASHED_ROWS = 2**14
"""Of data that are streamed, so many stand for all of them in their hash."""


def hashes_of(source: Source) -> np.ndarray:
    """The hashes by which data are known again: of all rows in memory, and of a sample of a stream.

    Args:
        source: the data; in which precision they are used, and where, changes nothing.

    Returns:
        64 bits for each row, shape ``(row,)``.

    Example:
        >>> len(hashes_of(InMemory(Rows(torch.zeros(3, 2)))))
        3
    """
    return row_hashes(source.rows if isinstance(source, InMemory) else source.sample(HASHED_ROWS))


def permutation(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """An order of n, by a generator of its own.

    Args:
        n: how many.
        seed: any whole number.
        device: where the order is made; another device gives another order.

    Example:
        >>> bool((permutation(10, 3) == permutation(10, 3)).all())
        True
    """
    return torch.randperm(n, generator=make_generator(seed, device), device=device)


def spaced(n: int, k: int) -> Tensor:
    """At most k of n indices, evenly spaced from the first on.

    Args:
        n: how many there are.
        k: how many to take, at least 1.

    Example:
        >>> spaced(10, 4)
        tensor([0, 2, 5, 7])
    """
    k = min(n, k)
    return torch.arange(k) * n // k


def source_of(data: Any, vae: "Amortised", *, context: Any = None, mask: Any = None, source: str = "data") -> Source:
    """What :func:`pyro_vae.fit` is given, as a source, seen to fit a VAE.

    Args:
        vae: the VAE that is to see the data.
        data: a source, or as for :func:`pyro_vae.data.rows_for`.
        context: shape ``(datum, c)``; a source has its own.
        mask: booleans, the shape of the data; a source has its own.
        source: what to call data that have no name.

    Returns:
        The source.

    Raises:
        DataError: if a value is not a finite number, or not one that the likelihood takes.
        ModelError: if the data do not fit the parts.
        SettingsError: if a source is given together with a context or a mask.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> source_of(torch.zeros(3, 4), vae).features
        (4,)
    """
    if not isinstance(data, Source):
        data = data_for(vae, data, source=source, mask=mask)
        mask = None if isinstance(data, Data) else mask  # which have it as their own
        rows = rows_for(vae, data, context=context, mask=mask, source=source)
        if not isinstance(data, Data):
            return InMemory(rows, source)
        named = source if data.source == "data" else data.source
        return InMemory(rows, named, data.columns, data.image_shape, data.categories, data.context_columns)
    if context is not None or mask is not None:
        raise SettingsError(f"{data.source}: a source has its context and mask of its own; give them where it is made")
    return data.checked_for(vae)
