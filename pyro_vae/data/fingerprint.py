"""Data by their hashes: whether two sets are the same, and which rows a VAE was trained on."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae.core.rows import Rows
from pyro_vae.errors import DataError

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortised


def row_hashes(rows: Rows) -> np.ndarray:
    """A hash of each row, its mask and its context, in single precision, so that a copy in double is the same row.

    Args:
        rows: data; what is missing may hold anything, and is no 0.

    Returns:
        64 bits each, shape ``(datum,)``.

    Example:
        >>> one, other, again = row_hashes(Rows(torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.1, -0.0]])))
        >>> bool(one == again), bool(one == other)
        (True, False)
    """
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in np.ascontiguousarray(as_table(rows)))
    return np.frombuffer(digests, dtype=np.uint64)


def as_table(rows: Rows) -> np.ndarray:
    """The numbers that :func:`row_hashes` hashes: features, NaN where missing, then the context.

    Example:
        >>> as_table(Rows(torch.zeros(3, 2), torch.ones(3, 1))).shape
        (3, 3)
    """
    x = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    parts = [x.flatten(1)] + ([] if rows.context is None else [rows.context])
    table: np.ndarray = torch.cat([part.detach().cpu().float() for part in parts], 1).numpy() + np.float32(0)
    return table  # adding 0 leaves no minus 0


def data_hash(hashes: np.ndarray) -> str:
    """One hash of all rows in their order.

    Args:
        hashes: from :func:`row_hashes`.

    Example:
        >>> len(data_hash(row_hashes(Rows(torch.zeros(3, 2)))))
        32
    """
    return hashlib.blake2b(hashes.tobytes(), digest_size=16).hexdigest()


KEPT = 2**18
"""Of more rows only the smallest hashes are kept, 2 MiB of them: they are a random sample of the rows."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a VAE was trained on.

    Args:
        rows: the hashes of the rows, each once, the smallest ``KEPT``.
        twins: the share of rows that had an equal among them: what chance alone has a new row meet.
        whole: the hash of each set of data.
        columns: the names of the features, where they have some.
        categories: by the name of a column what its codes 0, 1, … stand for.
        context_columns: the names of the columns that the context was made of, where they have some.

    Example:
        >>> Trained.on(row_hashes(Rows(torch.tensor([[0.0], [1.0], [1.0], [2.0]])))).twins
        0.5
    """

    rows: np.ndarray
    twins: float
    whole: frozenset[str]
    columns: Sequence[str] | None = None
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    context_columns: Sequence[str] | None = None

    @classmethod
    def on(
        cls,
        hashes: np.ndarray,
        before: "Trained | None" = None,
        *,
        columns: Sequence[str] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        context_columns: Sequence[str] | None = None,
    ) -> "Trained":
        """Trained on these rows, and on others before.

        Example:
            >>> first = Trained.on(row_hashes(Rows(torch.zeros(1, 2))))
            >>> len(Trained.on(row_hashes(Rows(torch.ones(1, 2))), first).rows)
            2
        """
        rows, counts = np.unique(hashes, return_counts=True)
        twins, whole = float(counts[counts > 1].sum() / len(hashes)), frozenset([data_hash(hashes)])
        known = dict(categories or {})
        if before is None:
            return cls(rows[:KEPT], twins, whole, columns, known, context_columns)
        if columns is None:
            columns, known, context_columns = before.columns, dict(before.categories), before.context_columns
        rows = np.union1d(rows, before.rows)[:KEPT]
        return cls(rows, max(twins, before.twins), whole | before.whole, columns, known, context_columns)

    def told(self, hashes: np.ndarray) -> np.ndarray:
        """Of which rows it is known whether they were trained on: all, unless only some hashes were kept.

        Example:
            >>> few = row_hashes(Rows(torch.zeros(1, 2)))
            >>> Trained.on(few).told(few)
            array([ True])
        """
        return np.ones(len(hashes), bool) if len(self.rows) < KEPT else hashes <= self.rows[-1]

    def as_text(self) -> str:
        """To be written beside the weights.

        Example:
            >>> known = Trained.on(row_hashes(Rows(torch.zeros(1, 2))))
            >>> Trained.from_text(known.as_text()).whole == known.whole
            True
        """
        rows = base64.b64encode(self.rows.astype("<u8").tobytes()).decode()
        columns = None if self.columns is None else [*self.columns]
        categories = {name: [*known] for name, known in self.categories.items()}
        about = {"twins": self.twins, "whole": sorted(self.whole), "columns": columns, "categories": categories}
        context = None if self.context_columns is None else [*self.context_columns]
        return json.dumps({"rows": rows, **about, "context_columns": context})

    @classmethod
    def from_text(cls, text: str) -> "Trained":
        """What :meth:`as_text` wrote.

        Raises:
            DataError: if it did not.
        """
        try:
            known = json.loads(text)
            rows = np.frombuffer(base64.b64decode(known["rows"]), dtype="<u8").astype(np.uint64)
            columns, categories = known.get("columns"), known.get("categories") or {}
            context = known.get("context_columns")
            validate_names(columns or [], context or [], *categories.values())
            return cls(rows, float(known["twins"]), frozenset(known["whole"]), columns, categories, context)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"what the weights were trained on cannot be read ({error}); copy the run again") from error


def validate_names(*lists: Any) -> None:
    """Validate that what was read are lists of names.

    Raises:
        ValueError: if they are not.
    """
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError("the names of its columns are no text")


def trained_on(vae: "Amortised", hashes: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Which rows were trained on, in words, where there are more of them than chance has it; else nothing.

    Rows of a few countable values meet by chance: as often as training data meet each other.

    Args:
        vae: a VAE; :func:`pyro_vae.fit` leaves on it what it was trained on.
        hashes: of the data, from :func:`row_hashes`.
        labels: what the rows are called, if not by their numbers.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> vae.trained_on = Trained.on(row_hashes(Rows(torch.zeros(1, 4))))
        >>> trained_on(vae, row_hashes(Rows(torch.zeros(1, 4))))
        '1 of its 1 rows, the first of them row 0 (counted from 0)'
    """
    known = getattr(vae, "trained_on", None)
    return "" if known is None else overlap(known, hashes, labels)


def overlap(known: Trained, hashes: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Which rows are among those that were trained on, as :func:`trained_on` says.

    Args:
        known: what was trained on.
        hashes: of the data, from :func:`row_hashes`.
        labels: what the rows are called, if not by their numbers.

    Example:
        >>> overlap(Trained.on(row_hashes(Rows(torch.zeros(1, 4)))), row_hashes(Rows(torch.ones(1, 4))))
        ''
    """
    told, met = known.told(hashes), np.isin(hashes, known.rows)
    count, n = int(met.sum()), int(told.sum())
    by_chance = n * known.twins + 5 * math.sqrt(n * known.twins * (1 - known.twins))
    if count <= by_chance and data_hash(hashes) not in known.whole:
        return ""
    among = f"its {n} rows" if n == len(met) else f"the {n} of its {len(met)} rows that can be told"
    first = int(met.argmax())
    which = f"{first} (counted from 0)" if labels is None else f"{labels[first]}"
    return f"{count} of {among}, the first of them row {which}"


def refuse_trained_on(
    vae: "Amortised", hashes: np.ndarray, labels: np.ndarray | None = None, *, name: str, source: str = "x_test"
) -> None:
    """Refuse data of which more rows were trained on than chance has it, as :func:`trained_on` says.

    Args:
        vae: a VAE.
        hashes: of the data, from :func:`row_hashes`.
        labels: what the rows are called, if not by their numbers.
        name: what to call the VAE.
        source: what to call the data.

    Raises:
        DataError: if they were trained on.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> refuse_trained_on(vae, row_hashes(Rows(torch.zeros(3, 4))), name="vae")
    """
    if told := trained_on(vae, hashes, labels):
        raise DataError(f"{source} was trained on: {told}, are training data of {name!r}; give rows that were held out")
