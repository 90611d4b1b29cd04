"""Detection of atoms: values that many rows share exactly, where densities are not comparable."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.fingerprint import as_table
from pyro_vae.errors import AtomsWarning

SHARE = 0.2
"""A value is an atom if more than this share of the observed values of a feature equal it exactly."""

FEWEST = 20
"""The smallest number of rows with which atoms are detected."""

MEANING = (
    "a density can grow without bound at such a value, so a difference in log p(x) reflects how narrow a model is "
    "there, not how well it describes the data"
)

REMEDY = (
    f"{MEANING}; dequantize the values (add uniform noise of the width of their spacing), or use likelihoods that give "
    "each value a probability"
)


def atoms(rows: Rows, countable: Iterable[Sequence[bool] | None], columns: Sequence[str] | None = None) -> str:
    """Describe the features that have an atom and a density under every model; empty if there are none.

    Args:
        rows: held-out data.
        countable: for each model, whether each feature is countable, or None if this is unknown.
        columns: the names of the features; by default, features are numbered from 0.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 40).unsqueeze(1).repeat(1, 2)
        >>> x[:20, 1] = 0
        >>> atoms(Rows(x), [(False, False)])
        '1 of 2 features have a value that more than 20 % of the rows share exactly (first: feature 1, 0 in 50 %)'
        >>> atoms(Rows(x), [(False, False), (False, True)])
        ''
    """
    if len(rows) < FEWEST:
        return ""
    features = rows.x[0].numel()
    known = [np.asarray(flags) for flags in countable if flags is not None]
    density = ~np.any(known, axis=0) if known else np.zeros(features, bool)
    table = as_table(Rows(rows.x, None, rows.mask))
    with_atom = [(j, *top) for j in np.flatnonzero(density) if (top := _most_frequent(table[:, j]))[1] > SHARE]
    if not with_atom:
        return ""
    first, value, share = with_atom[0]
    name = f"feature {first}" if columns is None else str(columns[int(first)])
    return (
        f"{len(with_atom)} of {features} features have a value that more than {100 * SHARE:.0f} % of the rows share "
        f"exactly (first: {name}, {value:g} in {100 * share:.0f} %)"
    )


def _most_frequent(column: np.ndarray) -> tuple[float, float]:
    """The most frequent value and its share."""
    values, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    return (float(values[counts.argmax()]), counts.max() / counts.sum()) if len(values) else (np.nan, 0.0)


def warn_of_atoms(description: str, *, source: str, stacklevel: int) -> None:
    """Issue a warning if the ``description`` from :func:`atoms` is not empty.

    Example:
        >>> warn_of_atoms("", source="x", stacklevel=2)
    """
    if description:
        warnings.warn(f"{source}: {description}; {REMEDY}", AtomsWarning, stacklevel=stacklevel + 1)
