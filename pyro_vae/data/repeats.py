"""Detect duplicate rows, and compute standard errors clustered by distinct row."""

import warnings

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.fingerprint import as_table, row_hashes
from pyro_vae.errors import DuplicateRowsWarning

BEYOND_CHANCE = 3.0
"""Equal rows count as copies if there are more than this many times the pairs expected by chance."""

FEW_COPIES = 0.05
"""Up to this share of copies, a standard error over rows changes by at most a few per cent."""


def distinct_rows(rows: Rows, log_probability: np.ndarray | None = None) -> np.ndarray:
    """Number the distinct rows.

    Independent rows with few countable values can be equal by chance. The number of equal pairs is therefore compared
    with its expectation for independent columns with the same values and, if the probability of each row is known,
    with :math:`\\frac{n - 1}{2} \\sum_i p(x_i)`. Rows count as copies only if the number is clearly larger. In a single
    column, copies cannot be distinguished from chance.

    Args:
        rows: the data; context and missing values are part of a row.
        log_probability: log p of each row, shape ``(datum,)``, if all features are countable.

    Returns:
        For each row the number of its distinct row, from 0, shape ``(datum,)``.

    Example:
        >>> import torch
        >>> distinct_rows(Rows(torch.arange(12.0).reshape(2, 6)[[0, 1, 0]])).tolist()
        [0, 1, 0]
        >>> bits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> distinct_rows(Rows(bits.repeat(2, 1))).tolist()  # equal by chance: there are only four different rows
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    _, first, number = np.unique(row_hashes(rows), return_index=True, return_inverse=True)
    pairs = _equal_pairs(number)
    if not pairs:
        return np.arange(len(rows))
    by_chance = _pairs_by_chance(as_table(rows))
    if log_probability is not None:
        by_chance = max(by_chance, (len(rows) - 1) / 2 * float(np.exp(log_probability).sum()))
    if pairs <= BEYOND_CHANCE * by_chance + 5 * by_chance**0.5:
        return np.arange(len(rows))
    order: np.ndarray = first.argsort().argsort()[number]  # in the order of first appearance
    return order


def _equal_pairs(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1].astype(float)
    return float((counts * (counts - 1)).sum() / 2)


def _pairs_by_chance(table: np.ndarray) -> float:
    """Compute the expected number of equal pairs of rows for independent columns."""
    n = len(table)
    every = n * (n - 1) / 2
    return every * float(np.prod([_equal_pairs(column) / every for column in table.T]))


def warn_of_duplicates(number: np.ndarray, *, source: str, remedy: str, stacklevel: int = 2) -> None:
    """Warn of duplicate rows.

    Args:
        number: the number of each row's distinct row, from :func:`distinct_rows`.
        source: the name of the data, for messages.
        remedy: how the standard errors account for duplicates, or what to do.
        stacklevel: as in ``warnings.warn``.

    Example:
        >>> warn_of_duplicates(np.array([0, 1, 2]), source="x", remedy="drop them")
    """
    distinct = count(number)
    if distinct < len(number):
        warnings.warn(
            f"{source}: only {distinct} of {len(number)} rows are distinct; {remedy}",
            DuplicateRowsWarning,
            stacklevel=stacklevel + 1,
        )


def warn_of_too_small_errors(rows: Rows, *, source: str, stacklevel: int = 2) -> None:
    """Warn of standard errors that assume independent rows, if more than 5 % of the rows are copies.

    Fewer copies change an error by at most a few per cent, and dependent coarse values, such as black and white
    pixels, have that many equal rows by chance.

    Args:
        rows: the data.
        source: the name of the data, for messages.
        stacklevel: as in ``warnings.warn``.

    Example:
        >>> import torch
        >>> warn_of_too_small_errors(Rows(torch.tensor([[0.1, 0.2], [0.3, 0.4]])), source="x")
    """
    remedy = "standard errors assume independent rows, so they are too small; drop the duplicates"
    number = distinct_rows(rows)
    if count(number) < (1 - FEW_COPIES) * len(rows):
        warn_of_duplicates(number, source=source, remedy=remedy, stacklevel=stacklevel + 1)


def count(number: np.ndarray) -> int:
    """Count the distinct rows.

    Example:
        >>> count(np.array([0, 1, 0]))
        2
    """
    return int(number.max()) + 1


def clustered_error(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Compute the standard error of the mean over data, clustered by distinct row.

    .. math:: se^2 = \\frac{G}{G - 1} \\frac1{n^2} \\sum_{g=1}^G \\Big(\\sum_{i \\in g} (v_i - \\bar v)\\Big)^2

    Without duplicates the error is :math:`s / \\sqrt n`. If each of G rows occurs r times, the error is that of the G
    rows, so the error of a sum over all rG rows is r times that of a sum over G rows.

    Args:
        values: shape ``(…, datum)``.
        number: the number of each row's distinct row, from :func:`distinct_rows`, shape ``(datum,)``.

    Returns:
        Shape ``(…)``; NaN for a single distinct row.

    References:
        | A Practitioner's Guide to Cluster-Robust Inference (Cameron & Miller, 2015),
          https://doi.org/10.3368/jhr.50.2.317

    Example:
        >>> float(clustered_error(np.array([0.0, 2.0]), np.array([0, 1])))
        1.0
        >>> float(clustered_error(np.array([0.0, 2.0, 0.0, 2.0]), np.array([0, 1, 0, 1])))
        1.0
    """
    n, groups = len(number), count(number)
    apart = values - values.mean(-1, keepdims=True)
    order = number.argsort(kind="stable")
    starts = np.searchsorted(number[order], np.arange(groups))
    sums = np.add.reduceat(apart[..., order], starts, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        error: np.ndarray = np.sqrt(np.divide(groups, groups - 1) * (sums**2).sum(-1)) / n
    return error if groups > 1 else np.full_like(error, np.nan)
