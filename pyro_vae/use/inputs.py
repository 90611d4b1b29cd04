"""Read the tables that a trained VAE is applied to, and process them block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import derive_seed, numbers_at_once, seeded
from pyro_vae.core.progress import ticking
from pyro_vae.core.rows import Rows
from pyro_vae.data.frames import as_frame, is_table
from pyro_vae.data.rows import context_like, data_for, mask_nan, rows_for
from pyro_vae.data.streams import Streamed
from pyro_vae.data.tables import given_names
from pyro_vae.data.values import Data
from pyro_vae.errors import SettingsError

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortized

Found: TypeAlias = dict[str, Tensor]
"""The results for a block of rows, by name, shape ``(datum, …)``."""


@dataclass(frozen=True)
class Names:
    """The names of the columns, categories and rows of a table.

    Args:
        columns: the names of the features; by default they are numbered.
        categories: the meaning of the codes 0, 1, … of a column, by its name.
        row_labels: numbers, times or text that label the rows; by default they are numbered.
    """

    columns: Sequence[str] | None = None
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    row_labels: np.ndarray | None = None

    @classmethod
    def of(cls, vae: "Amortized", data: Any = None) -> "Names":
        """Return the names of data, or those of the training data of a VAE if the data have none.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
            >>> Names.of(vae, Data(torch.zeros(1, 2), columns=["a", "b"])).columns
            ['a', 'b']
        """
        known = getattr(vae, "trained_on", None)
        trained = cls() if known is None else cls(known.columns, known.categories)
        own = given_names(getattr(data, "columns", None))
        labels = getattr(data, "row_labels", None)
        if own is None:
            return replace(trained, row_labels=labels)
        return cls(own, getattr(data, "categories", {}) or trained.categories, labels)


@dataclass(frozen=True)
class Table:
    """Rows for a VAE, in memory or streamed, and their names.

    Args:
        rows: the rows; if they are in memory, on the VAE's device and in its precision.
        names: of the columns, categories and rows.
        values: for data in memory with missing values, the unrounded values, shape ``(datum, feature)``.
    """

    rows: Rows | Streamed
    names: Names
    values: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def first(self) -> Rows:
        """The first row."""
        return self.rows.take(slice(1)) if isinstance(self.rows, Rows) else self.rows.head(1)

    def blocks(self, size: int) -> Iterator[Rows]:
        """Iterate over the rows in order, at most ``size`` at a time."""
        return self.rows.split(size) if isinstance(self.rows, Rows) else self.rows.in_order(size)


def read(
    vae: "Amortized",
    data: Any,
    *,
    context: Any = None,
    mask: Any = None,
    nan_is_missing: bool = False,
    source: str = "data",
) -> Table:
    """Read data for a VAE, with the columns and categories that it was trained on.

    Args:
        vae: the VAE to apply to the data.
        data: what :func:`pyro_vae.data.rows_for` takes, or a stream.
        context: as for :func:`pyro_vae.data.rows_for`.
        mask: as for :func:`pyro_vae.data.rows_for`.
        nan_is_missing: whether NaN marks a missing value, if there is no mask.
        source: the name of the data in messages.

    Raises:
        DataError: if the data do not fit what the VAE was trained on, or a value is not a finite number.
        ModelError: if the data do not fit the parts of the VAE.
        SettingsError: if a stream is given together with a context or a mask.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> read(vae, [[1.0, torch.nan]], nan_is_missing=True).first.mask
        tensor([[ True, False]])
    """
    if isinstance(data, Streamed):
        return _streamed(vae, data, context, mask, nan_is_missing)
    if is_table(data):
        data = as_frame(data, source)  # convert once, because some tables can be read only once
    elif isinstance(data, TensorDataset):
        data = data.tensors[0]  # the other tensors are labels
    context = context_like(getattr(vae, "trained_on", None), context, source=f"context of {source}")
    known = given = data_for(
        vae, data, source=source, missing=[] if nan_is_missing else None, mask=mask, context=context
    )
    if nan_is_missing and mask is None and not is_table(data) and not isinstance(data, Rows):
        known = mask_nan(known, source=source)
    mask = None if isinstance(known, Data) else mask  # Data hold their mask
    rows = rows_for(vae, known, context=context, mask=mask, source=source)
    values = _values(data, given, rows) if nan_is_missing else None
    return Table(rows.like(vae), Names.of(vae, known), values)


def _streamed(vae: "Amortized", data: Streamed, context: Any, mask: Any, nan_is_missing: bool) -> Table:
    if context is not None or mask is not None:
        raise SettingsError(f"{data.source}: a stream holds its own context and mask; pass them where it is made")
    data = replace(data, nan_is_missing=True) if nan_is_missing else data
    return Table(data.like(vae).checked_for(vae), Names.of(vae, data))


def _values(data: Any, known: Any, rows: Rows) -> np.ndarray:
    """Return the unrounded values of data: in double precision for a table, which reading may have rounded."""
    exact = getattr(known, "exact", None)
    raw = getattr(known, "x", known) if exact is None else exact
    array = raw.detach().cpu() if isinstance(raw, Tensor) else raw
    if isinstance(array, Tensor):
        array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
        array = array.numpy()
    array = np.asarray(array)
    array = array if array.dtype == np.float32 and not is_table(data) else array.astype(np.float64)
    return array.reshape(len(rows), -1)


def by_block(
    vae: "Amortized",
    table: Table,
    compute: Callable[[Rows], Found],
    *,
    draws: int,
    width: int,
    chunk: int,
    seed: int,
    purpose: str,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Apply a function to all rows, block by block, with a seed that depends on the first row of a block.

    Args:
        vae: a VAE, which is in evaluation mode meanwhile.
        table: the rows.
        compute: a function of the rows of a block.
        draws: the number of draws for each row.
        width: the number of values of each draw.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU).
        seed: of all draws.
        purpose: the title of the progress bar; the seeds depend on it too.
        progress: whether to show a progress bar.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> table = read(vae, torch.ones(3, 2))
        >>> settings = {"draws": 1, "width": 2, "chunk": 2, "seed": 0, "purpose": "Adding", "progress": False}
        >>> by_block(vae, table, lambda rows: {"sum": rows.x.sum(1)}, **settings)["sum"]
        array([2., 2., 2.], dtype=float32)
    """
    device = vae.like(torch.empty(0)).device
    size = max(1, numbers_at_once(chunk, device) // (draws * width))
    size, first, parts = min(size, len(table)), 0, []
    with evaluating(vae, draws * size), ticking(purpose, -(-len(table) // size), progress) as tick:
        for rows in table.blocks(size):
            with seeded(derive_seed(seed, purpose, first), device):
                found = compute(rows)
            parts.append({name: value.cpu().numpy() for name, value in found.items()})
            first += len(rows)
            tick()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
