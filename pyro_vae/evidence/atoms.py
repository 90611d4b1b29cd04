"""Find atoms: values that many rows share exactly, where a density says nothing about the data."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from pyro_vae.core.rows import Rows
from pyro_vae.data.fingerprint import as_table
from pyro_vae.errors import AtomsWarning

SHARE = 0.2
"""A value is an atom where more than this share of the observed values of a feature is exactly equal to it."""

FEWEST = 20
"""Of fewer rows, equal values say little."""

MEANING = (
    "a density can grow without bound at such a value, so a difference in log p(x) says how narrow a model is there, "
    "not which describes the data"
)

REMEDY = (
    f"{MEANING}; spread the values by uniform noise of their spacing (dequantise), or take "
    "likelihoods that give each value a probability"
)


def atoms(rows: Rows, countable: Iterable[Sequence[bool] | None], columns: Sequence[str] | None = None) -> str:
    """Name the features that have an atom and are a density under every model; empty if there are none.

    Args:
        rows: held-out data.
        countable: of each model, which features are countable; None where it is not known.
        columns: the names of the features; otherwise they are numbered from 0.

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
    known = [np.asarray(own) for own in countable if own is not None]
    density = ~np.any(known, axis=0) if known else np.zeros(features, bool)
    table = as_table(Rows(rows.x, None, rows.mask))
    found = [(j, *top) for j in np.flatnonzero(density) if (top := _most_frequent(table[:, j]))[1] > SHARE]
    if not found:
        return ""
    first, value, share = found[0]
    name = f"feature {first}" if columns is None else str(columns[int(first)])
    return (
        f"{len(found)} of {features} features have a value that more than {100 * SHARE:.0f} % of the rows share "
        f"exactly (first: {name}, {value:g} in {100 * share:.0f} %)"
    )


def _most_frequent(column: np.ndarray) -> tuple[float, float]:
    values, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    return (float(values[counts.argmax()]), counts.max() / counts.sum()) if len(values) else (np.nan, 0.0)


def warn_of_atoms(told: str, *, source: str, stacklevel: int) -> None:
    """Warn where :func:`atoms` names features.

    Example:
        >>> warn_of_atoms("", source="x", stacklevel=2)
    """
    if told:
        warnings.warn(f"{source}: {told}; {REMEDY}", AtomsWarning, stacklevel=stacklevel + 1)
