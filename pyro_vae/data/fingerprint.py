"""Fingerprints of data: compare data sets, and find the rows a VAE was trained on."""

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
    from pyro_vae.core.pair import Amortized


def row_hashes(rows: Rows) -> np.ndarray:
    """Hash each row with its mask and context, in single precision.

    A copy of a row in double precision has the same hash.

    Args:
        rows: the data; a missing value may hold any number, and its hash differs from that of 0.

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
    """Return the numbers that :func:`row_hashes` hashes: features, NaN where missing, then the context.

    Example:
        >>> as_table(Rows(torch.zeros(3, 2), torch.ones(3, 1))).shape
        (3, 3)
    """
    x = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    parts = [x.flatten(1)] + ([] if rows.context is None else [rows.context])
    table: np.ndarray = torch.cat([part.detach().cpu().float() for part in parts], 1).numpy() + np.float32(0)
    return table  # adding 0 turns -0 into 0


def data_hash(hashes: np.ndarray) -> str:
    """Hash a data set: all rows in their order.

    Args:
        hashes: from :func:`row_hashes`.

    Example:
        >>> len(data_hash(row_hashes(Rows(torch.zeros(3, 2)))))
        32
    """
    return hashlib.blake2b(hashes.tobytes(), digest_size=16).hexdigest()


KEPT = 2**18
"""The maximum number of stored hashes (2 MiB); of more rows the smallest, a random sample of the rows."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The fingerprint of the training data of a VAE.

    Args:
        rows: the distinct hashes of the rows, the smallest ``KEPT``.
        twins: the share of rows with a duplicate in the training data: the share of new rows that match by chance.
        whole: the hash of each training data set.
        columns: the names of the features, if any.
        categories: the names of the codes 0, 1, …, by column.
        context_columns: the names of the context columns, if any.

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
        """Fingerprint rows, in addition to those of an earlier training.

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
        columns = before.columns if columns is None else columns
        context_columns = before.context_columns if context_columns is None else context_columns
        known = {**before.categories, **known}
        rows = np.union1d(rows, before.rows)[:KEPT]
        return cls(rows, max(twins, before.twins), whole | before.whole, columns, known, context_columns)

    def covers(self, hashes: np.ndarray) -> np.ndarray:
        """Return which rows the stored hashes can check: all, unless hashes were dropped.

        Example:
            >>> few = row_hashes(Rows(torch.zeros(1, 2)))
            >>> Trained.on(few).covers(few)
            array([ True])
        """
        return np.ones(len(hashes), bool) if len(self.rows) < KEPT else hashes <= self.rows[-1]

    def as_text(self) -> str:
        """Encode the fingerprint as text, stored with the weights.

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
        """Decode the text of :meth:`as_text`.

        Raises:
            DataError: if the text is damaged.
        """
        try:
            known = json.loads(text)
            rows = np.frombuffer(base64.b64decode(known["rows"]), dtype="<u8").astype(np.uint64)
            columns, categories = known.get("columns"), known.get("categories") or {}
            context = known.get("context_columns")
            validate_names(known["whole"], columns or [], context or [], *categories.values())
            if not 0 <= (twins := float(known["twins"])) <= 1:
                raise ValueError(f"the share of duplicate rows is {twins}")
            return cls(rows, twins, frozenset(known["whole"]), columns, categories, context)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"the fingerprint of the training data is damaged ({error}); copy the run again") from error


def validate_names(*lists: Any) -> None:
    """Validate that each argument is a list of names.

    Raises:
        ValueError: if one is not.
    """
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError("its names are not text")


def trained_on(vae: "Amortized", hashes: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Describe the overlap of data with a VAE's training data; empty if due to chance.

    Rows with few countable values match by chance, as often as training rows match each other.

    Args:
        vae: a VAE; :func:`pyro_vae.fit` stores the fingerprint of its training data on it.
        hashes: the hashes of the data, from :func:`row_hashes`.
        labels: the row labels, if any.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> vae.trained_on = Trained.on(row_hashes(Rows(torch.zeros(1, 4))))
        >>> trained_on(vae, row_hashes(Rows(torch.zeros(1, 4))))
        '1 of its 1 rows (the first is row 0, counted from 0)'
    """
    known = getattr(vae, "trained_on", None)
    return "" if known is None else overlap(known, hashes, labels)


def overlap(known: Trained, hashes: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Describe the overlap of data with training data, as :func:`trained_on` does.

    Args:
        known: the fingerprint of the training data.
        hashes: the hashes of the data, from :func:`row_hashes`.
        labels: the row labels, if any.

    Example:
        >>> overlap(Trained.on(row_hashes(Rows(torch.zeros(1, 4)))), row_hashes(Rows(torch.ones(1, 4))))
        ''
    """
    covered, matches = known.covers(hashes), np.isin(hashes, known.rows)
    count, n = int(matches.sum()), int(covered.sum())
    by_chance = n * known.twins + 5 * math.sqrt(n * known.twins * (1 - known.twins))
    if count <= by_chance and data_hash(hashes) not in known.whole:
        return ""
    among = f"its {n} rows" if n == len(matches) else f"the {n} rows that can be checked (of {len(matches)})"
    first = int(matches.argmax())
    which = f"{first}, counted from 0" if labels is None else f"{labels[first]}"
    return f"{count} of {among} (the first is row {which})"


def mostly_trained_on(known: Trained, hashes: np.ndarray, sampled: float = 1.0) -> bool:
    """Return whether most of the rows of data are training data.

    Args:
        known: the fingerprint of the training data, or of a sample of their rows.
        hashes: the hashes of the data, from :func:`row_hashes`.
        sampled: the share of the training data in the sample; below 1, fewer than 5 equal rows are not enough.

    Example:
        >>> rows = row_hashes(Rows(torch.arange(8.0)[:, None]))
        >>> mostly_trained_on(Trained.on(rows), rows[:5]), mostly_trained_on(Trained.on(rows[:4]), rows, 0.5)
        (True, False)
    """
    count = int(np.isin(hashes, known.rows).sum())
    return count > sampled * len(hashes) / 2 and (sampled == 1 or count >= 5)


def validate_not_trained_on(
    vae: "Amortized", hashes: np.ndarray, labels: np.ndarray | None = None, *, name: str, source: str = "x_test"
) -> None:
    """Validate that data are held-out, up to matches by chance (see :func:`trained_on`).

    Args:
        vae: a VAE.
        hashes: the hashes of the data, from :func:`row_hashes`.
        labels: the row labels, if any.
        name: the name of the VAE, for messages.
        source: the name of the data, for messages.

    Raises:
        DataError: if the data overlap the training data.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> validate_not_trained_on(vae, row_hashes(Rows(torch.zeros(3, 4))), name="vae")
    """
    if shared := trained_on(vae, hashes, labels):
        raise DataError(f"{source} overlaps the training data of model {name!r}: {shared}; use held-out data")
