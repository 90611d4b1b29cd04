"""Datasets with the user's names, and the wide tables that they become."""

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
"""The dimensions that become columns of a wide table; the first other one has its rows."""

UNITS = {"x": "of the data", "z": "of the latents"}


def label(
    variables: Mapping[str, tuple[Sequence[str], np.ndarray]],
    names: Names,
    coords: Mapping[str, Any] | None = None,
    **about: Any,
) -> xr.Dataset:
    """Make a dataset whose dimensions have the names of a table's parts.

    Args:
        variables: by name their dimensions and numbers.
        names: of the rows, features and categories.
        coords: of further dimensions, or instead of those.
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
    """Make a wide DataFrame of a dataset: a row per datum, and a column per feature or latent.

    The values of ``x`` get the names of the features, and latents are called ``z0``, ``z1``, …; ``_sd`` or ``_mcse``
    behind a name is of that feature's standard deviation or Monte-Carlo error. Features without names are ``f0``,
    ``f1``, …. Of imputed data, only columns in which something was missing have errors. A variable of the datum alone,
    as ``khat``, is a column of its own name. Variables with more dimensions are left out.

    Args:
        dataset: from :func:`pyro_vae.encode`, :func:`~pyro_vae.reconstruct`, :func:`~pyro_vae.impute`,
            :func:`~pyro_vae.sample`, :func:`~pyro_vae.interpolate` or :func:`~pyro_vae.traverse`.
        decode: whether codes of categories become their names, in columns that hold nothing but codes; of imputed
            data, a number that is no code (as a ``Normal`` gives) becomes the nearest category.

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
        raise DataError("the dataset has no dimension for rows, as datum; give what encode or impute returned")
    columns: dict[str, Any] = {}
    names = {COLUMNS: _features(dataset), LATENTS: [f"z{i}" for i in range(dataset.sizes.get(LATENTS, 0))]}
    for name, variable in dataset.data_vars.items():
        if variable.dims == (row,):
            columns[_free(str(name), columns)] = variable.values
        elif len(variable.dims) == 2 and variable.dims[0] == row and name != "missing":
            column = variable.dims[1]
            shown = _shown(dataset, str(name), names[str(column)])
            columns |= {_free(told, columns): variable.values[:, i] for i, told in shown}
    table = pd.DataFrame(columns, index=pd.Index(dataset[row].values))
    return _decoded(table, dataset) if decode else table


def _features(dataset: xr.Dataset) -> list[str]:
    labels = dataset[COLUMNS].values if COLUMNS in dataset.coords else np.empty(0)
    return [f"f{i}" for i in labels] if labels.dtype.kind in "iu" else [*map(str, labels)]


def _shown(dataset: xr.Dataset, name: str, names: Sequence[str]) -> list[tuple[int, str]]:
    """Which columns of a variable are shown, and as what: ``x_sd`` of feature ``age`` is ``age_sd``."""
    what = name.partition("_")[2] if name[:1] in ("x", "z") else name
    numbers = [*range(len(names))]
    if "missing" in dataset and what:
        numbers = np.flatnonzero(dataset["missing"].values.any(0)).tolist()
    if what:  # nothing is known of a feature that has no such number at all
        numbers = [i for i in numbers if not np.isnan(dataset[name].values[:, i]).all()]
    return [(i, f"{names[i]}_{what}" if what else names[i]) for i in numbers]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name that no column has."""
    while name in taken:
        name += "_"
    return name


def _decoded(table: "pd.DataFrame", dataset: xr.Dataset) -> "pd.DataFrame":
    """A table whose codes are the names of categories, in columns that hold nothing but codes."""
    for name, known in json.loads(dataset.attrs.get("categories", "{}")).items():
        if name in table:
            codes = table[name].to_numpy()
            nearest = codes.round().clip(0, len(known) - 1)
            if "missing" in dataset or (nearest == codes).all():
                table[name] = np.asarray(known, dtype=object)[nearest.astype(int)]
    return table
