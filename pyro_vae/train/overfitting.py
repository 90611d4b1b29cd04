"""Measure by paired differences whether the validation ELBO fell during training, and judge it."""

from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import above_zero
from pyro_vae.errors import DataError

NATS = 0.1
"""A smaller fall, in nats per datum, does not count as overfitting."""

ERRORS = 2.0
"""A fall of more than this many standard errors is significant."""

LAST = 10
"""The most epochs at the end that are averaged over."""


def overfitting(history: xr.Dataset | None, *, nats: float = NATS) -> xr.Dataset:
    """Measure how far the validation ELBO has fallen since its best epoch.

    .. math:: f = \\frac1{|E|} \\sum_{e \\in E} \\frac1n \\sum_i (\\mathcal L_{i, e^*} - \\mathcal L_{i, e})

    E holds the last epochs after the best one, e*, at most 10. Each datum is compared with itself, evaluated
    with the same noise, so that differences in difficulty between data cancel. The standard error is over the
    validation data; the standard error of the mean over E is at most the mean of those of its epochs.

    The best epoch has the highest ELBO of many, so noise alone gives a small fall: ``nats`` is the smallest fall that
    counts.

    Args:
        history: of a fit with validation data.
        nats: the smallest fall that counts, in nats per datum, above 0.

    Returns:
        A dataset of ``fall`` and ``fall_se`` of the last weights, ``best_epoch``, ``kept_epoch`` (the epoch whose
        weights the VAE has, 0 if they belong to no single epoch), ``kept_fall`` and ``kept_fall_se`` (of those
        weights), ``train_rise`` (of the training ELBO since the best epoch) and ``train_above`` (how far the training
        ELBO of the last epochs lies above their validation ELBO); and ``below_best``, ``below_best_se`` and
        ``validation_elbo`` over ``epoch``.

    Raises:
        DataError: if the history has no validation ELBO with paired differences.
        SettingsError: if ``nats`` is not above 0.

    References:
        | Early Stopping - But When? (Prechelt, 1998), https://doi.org/10.1007/3-540-49430-8_3

    Example:
        >>> elbo, below = np.array([1.0, 9.0, 2.0]), np.array([0.0, 0.0, 7.0])
        >>> columns = {"train_elbo": elbo, "validation_elbo": elbo, "validation_below_best": below}
        >>> columns["validation_below_best_se"] = 0 * below + 0.5
        >>> history = xr.Dataset({name: ("epoch", values) for name, values in columns.items()}, {"epoch": [1, 2, 3]})
        >>> found = overfitting(history)
        >>> found.fall.item(), found.fall_se.item(), found.best_epoch.item()
        (7.0, 0.5, 2)
    """
    above_zero("nats", nats)
    found = None if history is None else fall_of_validation(history, nats=nats)
    if found is None:
        raise DataError("the history has no paired differences of a validation ELBO; pass validation_data= to fit")
    return found


def fall_of_validation(history: xr.Dataset, *, nats: float = NATS) -> xr.Dataset | None:
    """Do what :func:`overfitting` does; return None if the history lacks the data for it.

    Example:
        >>> fall_of_validation(xr.Dataset({"train_elbo": ("epoch", [1.0])})) is None
        True
    """
    if "validation_below_best" not in history or not history.sizes["epoch"]:
        return None
    below, errors = history.validation_below_best.values, history.validation_below_best_se.values
    if not np.isfinite(history.validation_elbo.values).any():
        return None
    best = int(np.nanargmax(history.validation_elbo.values))
    last = slice(max(best + 1, len(below) - LAST), None) if best + 1 < len(below) else slice(best, None)
    kept = int(history.attrs.get("weights_epoch", len(below)))
    nat = {"units": "nats per datum"}
    of_kept = (below[kept - 1], errors[kept - 1]) if 0 < kept < len(below) else (np.nan, np.nan)
    train = history.train_elbo.values
    scalars: dict[str, Any] = {
        "fall": below[last].mean(), "fall_se": errors[last].mean(),
        "kept_fall": of_kept[0], "kept_fall_se": of_kept[1],
        "train_rise": train[last].mean() - train[best],
        "train_above": (train - history.validation_elbo.values)[last].mean(),
    }  # fmt: skip
    variables: dict[str, Any] = {name: ((), float(value), nat) for name, value in scalars.items()}
    variables |= {"best_epoch": ((), int(history.epoch.values[best])), "kept_epoch": ((), kept)}
    variables |= {"below_best": ("epoch", below, nat), "below_best_se": ("epoch", errors, nat)}
    variables["validation_elbo"] = ("epoch", history.validation_elbo.values, nat)
    return xr.Dataset(
        variables, {"epoch": history.epoch.values}, {"threshold_nats": nats, "errors": ERRORS, **versions()}
    )


def overfits(found: xr.Dataset) -> bool:
    """Return whether the validation ELBO fell by more than its error and the threshold.

    Example:
        >>> overfits(xr.Dataset({"fall": 7.0, "fall_se": 0.5}, attrs={"threshold_nats": 0.1, "errors": 2.0}))
        True
    """
    return float(found.fall) > max(found.attrs["threshold_nats"], found.attrs["errors"] * float(found.fall_se))


def judge_overfitting(found: xr.Dataset) -> Finding:
    """Judge whether the VAE is worse on new data than it was earlier in its training.

    Args:
        found: from :func:`overfitting`.

    Returns:
        ``"bad"`` if the fall exceeds the threshold by more than 2 standard errors, ``"doubtful"`` if it exceeds both
        the threshold and 2 standard errors, else ``"fine"``; also ``"fine"`` if the VAE has the weights of an
        earlier epoch.

    Example:
        >>> elbo, below = np.array([1.0, 9.0, 2.0]), np.array([0.0, 0.0, 7.0])
        >>> columns = {"train_elbo": -elbo, "validation_elbo": elbo, "validation_below_best": below}
        >>> columns["validation_below_best_se"] = 0 * below + 0.5
        >>> history = xr.Dataset({name: ("epoch", values) for name, values in columns.items()}, {"epoch": [1, 2, 3]})
        >>> judge_overfitting(overfitting(history)).level
        'bad'
    """
    fall, error, nats = float(found.fall), float(found.fall_se), found.attrs["threshold_nats"]
    best, epochs, kept = int(found.best_epoch), found.sizes["epoch"], int(found.kept_epoch)
    by = f"{format_estimate(fall, error, over='')} nats per datum (paired differences, error over validation data)"
    if 0 < kept < epochs and not found.kept_fall > max(nats, ERRORS * float(found.kept_fall_se)):
        why = (
            f"the weights are those after epoch {kept}, selected by the validation ELBO, which fell by {by} from its "
            f"best, after epoch {best}, to the end. The validation ELBO of selected weights is too high: hold out "
            "other data for a final number"
        )
        return Finding("overfitting", "fine", why)
    apart = f"the training ELBO ended {found.train_above:+.2g} nats from it"
    if best == epochs:
        why = f"the validation ELBO was best after the last of {epochs} epochs"
        return Finding("overfitting", "fine", f"{why}; {apart}")
    if not overfits(found):
        why = f"the validation ELBO ended {by} below that of epoch {best}, its best of {epochs} (threshold {nats:g})"
        return Finding("overfitting", "fine", f"{why}; {apart}")
    level: Level = "bad" if fall - ERRORS * error > nats else "doubtful"
    rise = float(found.train_rise)
    why = (
        f"the validation ELBO was best after epoch {best} of {epochs} and has fallen by {by} since, while the "
        f"training ELBO {'rose' if rise > 0 else 'fell'} by {abs(rise):.2g}; {apart}"
    )
    return Finding("overfitting", level, why, STOP if rise > 0 else LOWER)


STOP = (
    "keep the weights of the best epoch (callbacks.EarlyStopping), or use more data, a smaller network or weight "
    "decay; more epochs make it worse"
)
LOWER = "lower the learning rate, since the training ELBO fell too; keep the best weights with callbacks.EarlyStopping"
