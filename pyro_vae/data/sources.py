"""Sources of training data: the protocol, and rows in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core.device import make_generator
from pyro_vae.core.rows import Rows
from pyro_vae.data.fingerprint import row_hashes
from pyro_vae.data.rows import context_like, data_for, rows_for
from pyro_vae.data.values import Data
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.likelihoods import Likelihood

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortized


@dataclass(frozen=True)
class Window:
    """Rows in memory, and the order in which training visits them.

    Args:
        rows: the same shape for all windows of a source; the last window may end with rows of an earlier one.
        order: indices of the rows to visit, each once, shape ``(visited,)``.
        numbers: the number of each row in the data, shape ``(row,)``; its index in ``rows`` if not given.

    Example:
        >>> len(Window(Rows(torch.zeros(3, 2)), torch.tensor([2, 0, 1])).order)
        3
    """

    rows: Rows
    order: Tensor
    numbers: Tensor | None = None


@runtime_checkable
class Source(Protocol):
    """A source of training data, which visits each row once per epoch in an order determined by a seed.

    Attributes:
        source: the name of the data, for messages.
        columns: the names of the features, if any.
        image_shape: ``(height, width)`` if rows are grey images, ``(3, height, width)`` if colour images.
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
        """Return the number of rows, the n of the n/m scaling."""

    def head(self, rows: int = 2) -> Rows:
        """Return the first rows, validated."""

    def sample(self, k: int) -> Rows:
        """Return k rows (all if there are fewer), evenly spaced over the data, the same at each call."""

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """Iterate over the data once, without the first ``skip`` rows of the pass.

        The order depends only on the seed, the batch size, the number of rows and the settings of the source, not on
        earlier passes. If ``skip`` is a multiple of ``batch_size``, so is the number of rows to visit in each window
        but the last. A window is valid until the next one is requested.
        """

    def like(self, vae: "Amortized") -> "Source":
        """Return the source with its windows on the device and in the precision of a VAE."""

    def checked_for(self, vae: "Amortized") -> "Source":
        """Validate the source against a VAE; rows read later are validated against the likelihood's support."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """A source of rows in memory: one window of all rows, in a new order in each pass.

    Args:
        rows: the data, on the device where they are used.
        source: the name of the data, for messages.
        columns: the names of the features.
        image_shape: ``(height, width)`` if rows are grey images, ``(3, height, width)`` if colour images.
        categories: the names of the codes 0, 1, …, by column.
        context_columns: the names of the context columns.

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
        """Return the first rows.

        Args:
            rows: the number of rows.
        """
        return self.rows.take(slice(rows))

    def sample(self, k: int) -> Rows:
        """Return k rows (all if there are fewer), evenly spaced.

        Args:
            k: the number of rows, at least 1.

        Example:
            >>> InMemory(Rows(torch.arange(6.0).reshape(6, 1))).sample(3).x.tolist()
            [[0.0], [2.0], [4.0]]
        """
        return self.rows.take(spaced(len(self), k).to(self.rows.x.device))

    def windows(self, *, seed: int, batch_size: int, skip: int = 0) -> Iterator[Window]:
        """Iterate over the data once, as one window without copies.

        Args:
            seed: the seed of the order; torch's global generators do not change.
            batch_size: has no effect here.
            skip: the number of rows of this pass that were already visited.

        Returns:
            The window, or nothing if all rows were visited.
        """
        if skip < len(self):
            yield Window(self.rows, permutation(len(self), seed, self.rows.x.device)[skip:])

    def like(self, vae: "Amortized") -> "InMemory":
        """Return the source with its rows on the device and in the precision of a VAE, copied only if needed."""
        return replace(self, rows=self.rows.like(vae))

    def checked_for(self, vae: "Amortized") -> "InMemory":
        """Validate the rows against a VAE and the support of its likelihood, and return the source.

        Raises:
            DataError: if a value is outside the support of the likelihood.
            ModelError: if the data do not fit the components.
        """
        vae.check(self.rows.x, self.rows.context, self.rows.mask)
        if isinstance(decoder := getattr(vae, "decoder", None), Likelihood):
            decoder.refuse(self.rows.x, self.source, self.columns)
        return self


HASHED_ROWS = 2**14
"""The number of rows in the fingerprint of streamed data."""


def hashes_of(source: Source) -> np.ndarray:
    """Hash all rows in memory, or a sample of the rows of a stream.

    Args:
        source: the data; their device and precision do not change the hashes.

    Returns:
        64 bits per row, shape ``(row,)``.

    Example:
        >>> len(hashes_of(InMemory(Rows(torch.zeros(3, 2)))))
        3
    """
    return row_hashes(source.rows if isinstance(source, InMemory) else source.sample(HASHED_ROWS))


def permutation(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw a random permutation of n numbers from a separate generator.

    Args:
        n: the number of elements.
        seed: any whole number.
        device: the device of the generator; the order depends on it.

    Example:
        >>> bool((permutation(10, 3) == permutation(10, 3)).all())
        True
    """
    return torch.randperm(n, generator=make_generator(seed, device), device=device)


def spaced(n: int, k: int) -> Tensor:
    """Return at most k of n indices, evenly spaced from 0 on.

    Args:
        n: the number of indices.
        k: the number of indices to return, at least 1.

    Example:
        >>> spaced(10, 4)
        tensor([0, 2, 5, 7])
    """
    k = min(n, k)
    return torch.arange(k) * n // k


def source_of(data: Any, vae: "Amortized", *, context: Any = None, mask: Any = None, source: str = "data") -> Source:
    """Convert the data of :func:`pyro_vae.fit` to a source, and validate it against a VAE.

    Args:
        vae: the VAE.
        data: a source, or as for :func:`pyro_vae.data.rows_for`.
        context: as for :func:`pyro_vae.data.rows_for`; None if ``data`` is a source.
        mask: booleans, same shape as the data; None if ``data`` is a source.
        source: the name of data that have none.

    Returns:
        The source.

    Raises:
        DataError: if a value is not finite, or outside the support of the likelihood.
        ModelError: if the data do not fit the components.
        SettingsError: if a source is given together with a context or a mask.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> source_of(torch.zeros(3, 4), vae).features
        (4,)
    """
    if not isinstance(data, Source):
        context = context_like(getattr(vae, "trained_on", None), context, source=f"context of {source}")
        data = data_for(vae, data, source=source, mask=mask, context=context)
        mask = None if isinstance(data, Data) else mask  # Data contains the mask
        rows = rows_for(vae, data, context=context, mask=mask, source=source)
        about = data if isinstance(data, Data) else Data(rows.x)
        columns, categories = about.context_columns, dict(about.categories)
        if isinstance(context, Data):
            columns = context.columns
            _validate_own_columns(context, about)
            categories |= context.categories
        name = source if about.source == "data" else about.source
        return InMemory(rows, name, about.columns, about.image_shape, categories, columns)
    if context is not None or mask is not None:
        raise SettingsError(f"{data.source}: a source contains its context and mask; give them when you create it")
    return data.checked_for(vae)


def _validate_own_columns(context: Data, data: Data) -> None:
    """Raise if a context column has the name of a column of categories, which its numbers would later be read as."""
    for name in context.columns or ():
        if name in (data.columns or ()) and name in data.categories:
            raise DataError(f"{context.source}: column {name!r} is a column of the data too; rename one")
