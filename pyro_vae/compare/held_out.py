"""Log p(x) of held-out data under several models, and whether it may be compared."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.core.pair import Amortized
from pyro_vae.data.fingerprint import data_hash, row_hashes, validate_not_trained_on
from pyro_vae.data.repeats import distinct_rows, warn_of_duplicates
from pyro_vae.data.rows import data_for, rows_for, rows_of
from pyro_vae.errors import DataError, SettingsError, type_of
from pyro_vae.evidence.atoms import atoms, warn_of_atoms
from pyro_vae.evidence.estimate import METHODS, Method, log_evidence, validate_method
from pyro_vae.evidence.kinds import NOT_KNOWN, differing, kind, known_features

Features = dict[str, tuple[bool, ...] | None]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Log p(x) of held-out data under several models.

    Args:
        evidence: model → the dataset of :func:`~pyro_vae.log_evidence` of each seed.
        hashes: of the rows, shape ``(datum,)``.
        row_number: the number of the distinct row that each datum is, shape ``(datum,)``.
        features: model → whether each feature is countable; None if this is unknown.
        incomparable: the features with a density under one model and a probability under another; empty if there are
            none.
        atoms: the features with atoms that have a density under all models; empty if there are none.
    """

    evidence: dict[str, list[xr.Dataset]]
    hashes: np.ndarray
    row_number: np.ndarray
    features: Features
    incomparable: str
    atoms: str

    @property
    def kinds(self) -> dict[str, str]:
        """Model → whether p(x) is a probability, a density or both."""
        return {name: NOT_KNOWN if own is None else kind(own) for name, own in self.features.items()}


def evaluate_models(
    models: Mapping[str, Sequence[Amortized | xr.Dataset]],
    x: Any,
    *,
    source: str,
    method: Method,
    stacklevel: int = 2,
    **settings: Any,
) -> HeldOut:
    """Estimate log p(x) of held-out data under each model, after all models are validated.

    Args:
        models: name → the VAEs, Pairs or datasets of :func:`~pyro_vae.log_evidence`, one for each seed.
        x: at least two rows, or :class:`~pyro_vae.data.Data`.
        source: the name of ``x`` in messages.
        method: of :func:`~pyro_vae.log_evidence`, but not ``"bdmc"``, which simulates its data.
        stacklevel: of the warnings, as of ``warnings.warn``.
        settings: of :func:`~pyro_vae.log_evidence`.

    Raises:
        DataError: if there is one row only, the data were trained on, or a dataset is of other data.
        ModelError: if a model does not match the data.
        SettingsError: if a model is of another type, or a setting is out of range.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> evaluate_models({"a": [linear.as_vae()]}, linear.sample(5), source="x", method="iw").kinds
        {'a': 'density'}
    """
    validate_method(method, tuple(name for name in METHODS if name != "bdmc"))
    amortized = [each[0] for each in models.values() if isinstance(each[0], Amortized)]  # seeds have equal columns
    tables = [data_for(model, x, source=source) for model in amortized] or [x]  # the columns in each model's order
    rows, columns = rows_of(tables[0], source=source), getattr(tables[0], "columns", None)
    validate_several_rows(len(rows), source)
    orders = _orders([*tables, x], source)
    for name, each in models.items():
        for model in each:
            _validate(name, model, x, source, orders)
    found = {name: [_evidence(m, x, {"method": method, **settings}) for m in each] for name, each in models.items()}
    features = {name: _features(each[0], rows.x[0].numel(), columns, orders) for name, each in found.items()}
    row_number = distinct_rows(rows, _log_probability(found, features))
    remedy = "standard errors are clustered by distinct row"
    warn_of_duplicates(row_number, source=source, remedy=remedy, stacklevel=stacklevel + 1)
    shared = atoms(rows, features.values(), columns) if len(models) > 1 else ""
    warn_of_atoms(shared, source=source, stacklevel=stacklevel + 1)
    return HeldOut(found, row_hashes(rows), row_number, features, differing(features, columns), shared)


def _orders(tables: Sequence[Any], source: str) -> dict[str, Sequence[str] | None]:
    """Return the hash of each table → its columns, in their order."""
    orders: dict[str, Sequence[str] | None] = {}
    for table in {id(table): table for table in tables}.values():  # without named columns, all are one table
        with contextlib.suppress(DataError):  # only a model knows the codes of some columns
            orders[data_hash(row_hashes(rows_of(table, source=source)))] = getattr(table, "columns", None)
    return orders


def validate_several_rows(rows: int, source: str) -> None:
    """Raise a DataError if there are too few held-out data for a standard error.

    Example:
        >>> validate_several_rows(2, "x_test")
    """
    if rows < 2:
        raise DataError(f"{source} holds 1 datum; standard errors need at least 2")


def _evidence(model: Amortized | xr.Dataset, x: Any, settings: Mapping[str, Any]) -> xr.Dataset:
    return model if isinstance(model, xr.Dataset) else log_evidence(model, x, **settings)


def _features(
    found: xr.Dataset, number: int, columns: Sequence[str] | None, orders: Mapping[str, Sequence[str] | None]
) -> tuple[bool, ...] | None:
    """Return whether each feature is countable, in the order of ``columns``; None if this is unknown."""
    flags, own = known_features(found, number), orders.get(found.attrs["data_hash"])
    if flags is None or own is None or columns is None or len(own) != number:
        return flags
    return tuple(dict(zip(own, flags, strict=True))[column] for column in columns)


def _validate(name: str, model: Any, x: Any, source: str, orders: Collection[str]) -> None:
    if isinstance(model, xr.Dataset):
        _validate_dataset(name, model, source, orders)
    elif isinstance(model, Amortized):
        labels = getattr(x, "row_labels", None)
        hashes = row_hashes(rows_for(model, x, source=source))
        validate_not_trained_on(model, hashes, labels, name=name, source=source)
    else:
        raise SettingsError(f"models[{name!r}] is {type_of(model)}; pass a VAE, a Pair or a dataset from log_evidence")


def _validate_dataset(name: str, found: xr.Dataset, source: str, orders: Collection[str]) -> None:
    if not {"log_evidence", "mcse"} <= set(found):
        raise SettingsError(f"models[{name!r}] lacks log_evidence or mcse; pass a dataset from log_evidence")
    if found.attrs.get("method") == "bdmc":
        raise DataError(
            f"models[{name!r}] is the evidence of simulated data; estimate that of {source}, such as by ais"
        )
    if found.attrs.get("data_hash") not in orders:
        raise DataError(f"models[{name!r}] is the evidence of data other than {source}; estimate that of {source}")
    if overlap := found.attrs.get("trained_on"):
        raise DataError(f"{source} overlaps the training data of model {name!r} ({overlap}); use held-out data")


def _log_probability(found: Mapping[str, list[xr.Dataset]], features: Features) -> np.ndarray | None:
    """Return log p of each row under the best model that gives it a probability, not a density, if there is one."""
    countable = [each for name, each in found.items() if all(features[name] or (False,))]
    values = [np.mean([one.log_evidence.values.astype(float) for one in each], 0) for each in countable]
    return max(values, key=np.sum) if values else None
