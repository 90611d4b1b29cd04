"""Log p(x) of held-out data under several models, and whether it may be compared."""

from collections.abc import Mapping, Sequence
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
from pyro_vae.evidence.estimate import log_evidence
from pyro_vae.evidence.kinds import NOT_KNOWN, differing, kind, known_features

Features = dict[str, tuple[bool, ...] | None]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Log p(x) of held-out data under several models.

    Args:
        found: model → the dataset of :func:`~pyro_vae.log_evidence` of each seed.
        hashes: of the rows, shape ``(datum,)``.
        number: the number of the distinct row that each datum is, shape ``(datum,)``.
        features: model → whether each feature is countable; None if this is unknown.
        unlike: the features with a density under one model and a probability under another; empty if there are none.
        shared: the features with atoms that have a density under all models; empty if there are none.
    """

    found: dict[str, list[xr.Dataset]]
    hashes: np.ndarray
    number: np.ndarray
    features: Features
    unlike: str
    shared: str

    @property
    def kinds(self) -> dict[str, str]:
        """Model → whether p(x) is a probability, a density or both."""
        return {name: NOT_KNOWN if own is None else kind(own) for name, own in self.features.items()}


def evaluate_models(
    models: Mapping[str, Sequence[Amortized | xr.Dataset]], x: Any, *, source: str, stacklevel: int = 2, **settings: Any
) -> HeldOut:
    """Estimate log p(x) of held-out data under each model, after all models are validated.

    Args:
        models: name → the VAEs, Pairs or datasets of :func:`~pyro_vae.log_evidence`, one for each seed.
        x: at least two rows, or :class:`~pyro_vae.data.Data`.
        source: the name of ``x`` in messages.
        stacklevel: of the warnings, as of ``warnings.warn``.
        settings: of :func:`~pyro_vae.log_evidence`.

    Raises:
        DataError: if there is one row only, the data were trained on, or a dataset is of other data.
        ModelError: if a model does not match the data.
        SettingsError: if a model is none, or a setting is out of range.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> evaluate_models({"a": [linear.as_vae()]}, linear.sample(5), source="x").features
        {'a': (False, False, False, False, False)}
    """
    first = next((model for each in models.values() for model in each if isinstance(model, Amortized)), None)
    x = x if first is None else data_for(first, x, source=source)
    rows, columns = rows_of(x, source=source), getattr(x, "columns", None)
    validate_several_rows(len(rows), source)
    hashes = row_hashes(rows)
    for name, each in models.items():
        for model in each:
            _validate(name, model, x, source, data_hash(hashes))
    found = {name: [_evidence(model, x, settings) for model in each] for name, each in models.items()}
    features = {name: known_features(each[0], rows.x[0].numel()) for name, each in found.items()}
    number = distinct_rows(rows, _log_probability(found, features))
    remedy = "standard errors are clustered by distinct row"
    warn_of_duplicates(number, source=source, remedy=remedy, stacklevel=stacklevel + 1)
    shared = atoms(rows, features.values(), columns) if len(models) > 1 else ""
    warn_of_atoms(shared, source=source, stacklevel=stacklevel + 1)
    return HeldOut(found, hashes, number, features, differing(features, columns), shared)


def validate_several_rows(rows: int, source: str) -> None:
    """Raise a DataError if there are too few held-out data for a standard error.

    Example:
        >>> validate_several_rows(2, "x_test")
    """
    if rows < 2:
        raise DataError(f"{source} holds 1 datum; standard errors need at least 2")


def _evidence(model: Amortized | xr.Dataset, x: Any, settings: Mapping[str, Any]) -> xr.Dataset:
    return model if isinstance(model, xr.Dataset) else log_evidence(model, x, **settings)


def _validate(name: str, model: Any, x: Any, source: str, expected: str) -> None:
    if isinstance(model, xr.Dataset):
        _validate_dataset(name, model, source, expected)
    elif isinstance(model, Amortized):
        ordered = rows_for(model, x, source=source)  # the model may order the columns differently
        labels = getattr(x, "row_labels", None)
        validate_not_trained_on(model, row_hashes(ordered), labels, name=name, source=source)
    else:
        raise SettingsError(f"models[{name!r}] is {type_of(model)}; pass a VAE, a Pair or a dataset from log_evidence")


def _validate_dataset(name: str, found: xr.Dataset, source: str, expected: str) -> None:
    if not {"log_evidence", "mcse"} <= set(found):
        raise SettingsError(f"models[{name!r}] lacks log_evidence or mcse; pass a dataset from log_evidence")
    if found.attrs.get("method") == "bdmc":
        raise DataError(
            f"models[{name!r}] is the evidence of simulated data; estimate that of {source}, such as by ais"
        )
    if found.attrs.get("data_hash") != expected:
        raise DataError(f"models[{name!r}] is the evidence of data other than {source}; estimate that of {source}")
    if overlap := found.attrs.get("trained_on"):
        raise DataError(f"{source} overlaps the training data of model {name!r} ({overlap}); use held-out data")


def _log_probability(found: Mapping[str, list[xr.Dataset]], features: Features) -> np.ndarray | None:
    """Return log p of each row under the best model that gives it a probability, not a density, if there is one."""
    countable = [each for name, each in found.items() if all(features[name] or (False,))]
    values = [np.mean([one.log_evidence.values.astype(float) for one in each], 0) for each in countable]
    return max(values, key=np.sum) if values else None
