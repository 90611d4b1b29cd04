"""Label datasets with the user's names, and convert them to wide tables."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.errors import DataError
from pyro_vae.use.inputs import Names

if TYPE_CHECKING:
    import pandas as pd

COLUMNS, LATENTS = "feature", "latent"
"""The dimensions that become columns of a wide table; the first other dimension becomes its rows."""

UNITS = {"x": "of the data", "z": "of the latents"}


def label(
    variables: Mapping[str, tuple[Sequence[str], np.ndarray]],
    names: Names,
    coords: Mapping[str, Any] | None = None,
    **about: Any,
) -> xr.Dataset:
    """Make a dataset whose coordinates are the names of rows and columns.

    Args:
        variables: the dimensions and values of each variable, by name.
        names: of the rows, features and categories.
        coords: further coordinates, which take precedence over the names.
        about: attributes.

    Example:
        >>> label({"x": (["datum", "feature"], np.zeros((1, 2)))}, Names(["a", "b"])).feature.values.tolist()
        ['a', 'b']
    """
    made = xr.Dataset({name: (dims, array, _units(name)) for name, (dims, array) in variables.items()})
    known = {"datum": names.row_labels, COLUMNS: names.columns, **(coords or {})}
    fit = {dim: known.get(str(dim)) for dim in made.sizes}
    labels = {
        dim: np.arange(size) if fit[dim] is None or len(fit[dim]) != size else np.asarray(fit[dim])  # type: ignore[arg-type]
        for dim, size in made.sizes.items()
    }
    if COLUMNS in made.sizes and names.categories and names.columns is not None:
        about["categories"] = json.dumps({name: [*known] for name, known in names.categories.items()})
    return made.assign_coords(labels).assign_attrs(**about, **versions())


def _units(name: str) -> dict[str, str]:
    return {"units": UNITS.get(name.partition("_")[0], "1")}


def as_table(dataset: xr.Dataset, *, decode: bool = True) -> "pd.DataFrame":
    """Convert a dataset to a wide DataFrame, with a row per datum and a column per feature or latent.

    The values of ``x`` are named like the features (``f0``, ``f1``, … without names), and latents are ``z0``, ``z1``,
    …. The suffixes ``_sd`` and ``_mcse`` mark the standard deviation and the Monte-Carlo error. In imputed data, only
    columns with missing values have errors. A variable over data alone, such as ``khat``, is a column with its own
    name. Variables with more dimensions are left out.

    Args:
        dataset: from :func:`pyro_vae.encode`, :func:`~pyro_vae.reconstruct`, :func:`~pyro_vae.impute`,
            :func:`~pyro_vae.sample`, :func:`~pyro_vae.interpolate` or :func:`~pyro_vae.traverse`.
        decode: whether to replace codes by the names of categories, in columns that hold only codes. In imputed data,
            other numbers (for example from a ``Normal``) become the nearest category.

    Returns:
        A DataFrame with the row labels as its index.

    Raises:
        DataError: if the dataset has no dimension for rows.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> table = as_table(pv.encode(vae, {"a": [1.0, 2.0], "b": [0.5, 1.5]}))
        >>> table.columns.tolist(), table.shape
        (['z0', 'z0_sd'], (2, 2))
    """
    import pandas as pd

    row = next((dim for dim in dataset.dims if dim not in (COLUMNS, LATENTS)), None)
    if row is None:
        raise DataError("the dataset has no dimension for rows, such as datum; pass a result of encode or impute")
    columns: dict[str, Any] = {}
    names = {COLUMNS: _features(dataset), LATENTS: [f"z{i}" for i in range(dataset.sizes.get(LATENTS, 0))]}
    for name, variable in dataset.data_vars.items():
        if variable.dims == (row,):
            columns[_free(str(name), columns)] = variable.values
        elif len(variable.dims) == 2 and variable.dims[0] == row and name != "missing":
            column = variable.dims[1]
            shown = _column_names(dataset, str(name), names[str(column)])
            columns |= {_free(title, columns): variable.values[:, i] for i, title in shown}
    table = pd.DataFrame(columns, index=pd.Index(dataset[row].values))
    return _decode(table, dataset) if decode else table


def _features(dataset: xr.Dataset) -> list[str]:
    labels = dataset[COLUMNS].values if COLUMNS in dataset.coords else np.empty(0)
    return [f"f{i}" for i in labels] if labels.dtype.kind in "iu" else [*map(str, labels)]


def _column_names(dataset: xr.Dataset, name: str, names: Sequence[str]) -> list[tuple[int, str]]:
    """List the index and the name of each shown column of a variable: ``x_sd`` of feature ``age`` is ``age_sd``."""
    suffix = name.partition("_")[2] if name[:1] in ("x", "z") else name
    numbers = [*range(len(names))]
    if "missing" in dataset and suffix:
        numbers = np.flatnonzero(dataset["missing"].values.any(0)).tolist()
    if suffix:  # leave out columns without any value
        numbers = [i for i in numbers if not np.isnan(dataset[name].values[:, i]).all()]
    return [(i, f"{names[i]}_{suffix}" if suffix else names[i]) for i in numbers]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Append underscores to a name until no column has it."""
    while name in taken:
        name += "_"
    return name


def _decode(table: "pd.DataFrame", dataset: xr.Dataset) -> "pd.DataFrame":
    """Replace codes by the names of categories, in columns that hold only codes."""
    for name, known in json.loads(dataset.attrs.get("categories", "{}")).items():
        if name in table:
            codes = table[name].to_numpy()
            nearest = codes.round().clip(0, len(known) - 1)
            if "missing" in dataset or (nearest == codes).all():
                table[name] = np.asarray(known, dtype=object)[nearest.astype(int)]
    return table
