"""Calibration of predicted class probabilities: reliability diagrams and the expected calibration error."""

from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_p
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import DataError

REPLICATES = 1000
"""Bootstrap samples for the standard errors, and simulated label sets for the p-value."""


@takes_settings
def reliability(probability: Any, labels: Any, *, bins: int = 10, seed: int = 0) -> xr.Dataset:
    """Compare the confidence of a classifier with its accuracy.

    .. math:: \\mathrm{ECE} = \\sum_b \\frac{n_b}n \\, |\\mathrm{accuracy}_b - \\mathrm{confidence}_b|

    The confidence of a datum is the probability of its predicted class. In finite samples even a calibrated classifier
    has an ECE above 0, since the accuracy of each bin is noisy. The p-value therefore compares the ECE with that of
    labels drawn from the predicted probabilities.

    Args:
        probability: probability of each class, shape ``(datum, class)``, such as ``pv.classify(pair, x).probability``.
        labels: the true classes, integers from 0, shape ``(datum,)``.
        bins: number of bins of equal width between 0 and 1, at least 2.
        seed: seed of the bootstrap and of the simulated labels.

    Returns:
        A dataset. Over ``bin``: ``confidence``, ``accuracy`` and its standard error over data ``accuracy_se``, and
        ``count``; the other variables are NaN in empty bins. Scalars: ``accuracy_of_all`` with its standard error over
        data ``accuracy_of_all_se``; ``ece`` with its standard error over data ``ece_se`` (1000 bootstrap samples);
        ``ece_calibrated``, the mean ECE of a calibrated classifier with these probabilities; and ``p_value``, the
        probability that a calibrated classifier has an ECE of at least ``ece``.

    Raises:
        DataError: if rows of ``probability`` do not add up to 1, the number of labels differs from the number of rows,
            or a label is not a class.
        SettingsError: if ``bins`` is below 2.

    References:
        | On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599
        | Increasing the Reliability of Reliability Diagrams (Bröcker & Smith, 2007), https://doi.org/10.1175/WAF993.1

    Example:
        >>> found = reliability([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]], [0, 1, 0, 1])
        >>> float(found.accuracy_of_all), round(float(found.ece), 3)
        (0.75, 0.35)
    """
    whole("bins", bins, 2)
    share, known = np.asarray(probability, float), np.asarray(labels)
    _validate(share, known)
    rng = np.random.default_rng(seed)
    confidence, right = share.max(1), share.argmax(1) == known
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    ece = _ece(place, confidence, right, bins)
    n = len(right)
    bootstrap, calibrated = _replicates(place, confidence, right, bins, rng)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = {
            name: np.bincount(place, value, minlength=bins) / count
            for name, value in (("confidence", confidence), ("accuracy", right))
        }
        spread = np.where(count > 0, _error(means["accuracy"], count), np.nan)
    by_bin = {**means, "accuracy_se": spread, "count": count}
    whole_set = {
        "accuracy_of_all": right.mean(),
        "accuracy_of_all_se": _error(right.mean(), n),
        "ece": ece,
        "ece_se": bootstrap.std(),
        "ece_calibrated": calibrated.mean(),
        "p_value": (1 + (calibrated >= ece - 1e-12).sum()) / (1 + REPLICATES),
    }
    return xr.Dataset(
        {name: ("bin", value) for name, value in by_bin.items()} | whole_set,
        {"bin": (np.arange(bins) + 0.5) / bins},
        {"data": n, "bins": bins, "seed": seed},
    )


def _replicates(
    place: np.ndarray, confidence: np.ndarray, right: np.ndarray, bins: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the ECE of bootstrap samples and of labels drawn from the probabilities, in chunks."""
    n, member = len(place), np.eye(bins)[place]
    chunk = max(1, 10**7 // n)
    bootstrap: list[np.ndarray] = []
    calibrated: list[np.ndarray] = []
    for first in range(0, REPLICATES, chunk):
        shape = (min(chunk, REPLICATES - first), n)
        times = rng.multinomial(n, np.full(n, 1 / n), size=shape[0])
        residuals = times * (right - confidence), (rng.random(shape) < confidence) - confidence
        for eces, residual in zip((bootstrap, calibrated), residuals, strict=True):
            eces.append(np.abs(residual @ member).sum(1) / n)
    return np.concatenate(bootstrap), np.concatenate(calibrated)


def _error(share: Any, number: Any) -> Any:
    """Return the standard deviation of a Beta posterior, which is positive even for shares of 0 and 1."""
    middle = (share * number + 1) / (number + 2)
    return np.sqrt(middle * (1 - middle) / (number + 3))


def _ece(place: np.ndarray, confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    return float(np.abs(np.bincount(place, right - confidence, minlength=bins)).sum() / len(right))


def _validate(share: np.ndarray, known: np.ndarray) -> None:
    if share.ndim != 2 or not (share >= 0).all() or not np.allclose(share.sum(1), 1, atol=1e-4):
        raise DataError(
            f"probability, of shape {share.shape}, is not a table of class probabilities; pass shape (datum, class) "
            "with rows that add up to 1"
        )
    if known.shape != share.shape[:1]:
        raise DataError(f"labels have shape {known.shape} for {len(share)} data; pass one label for each datum")
    if not np.isin(known, np.arange(share.shape[1])).all():
        raise DataError(
            f"labels must be integers from 0 to {share.shape[1] - 1}; leave out rows whose class is unknown"
        )


def judge_reliability(found: xr.Dataset) -> Finding:
    """Judge whether predicted class probabilities are calibrated.

    Args:
        found: the result of :func:`reliability`.

    Returns:
        Fine if p is at least 0.05, bad if p is below 0.001, else doubtful.

    Example:
        >>> judge_reliability(reliability([[0.9, 0.1], [0.2, 0.8]] * 50, [0, 1] * 40 + [1, 0] * 10)).level
        'fine'
    """
    p = float(found.p_value)
    level: Level = "fine" if p >= 0.05 else "bad" if p < 0.001 else "doubtful"
    ece = format_estimate(100 * float(found.ece), 100 * float(found.ece_se), "%", over="data")
    why = (
        f"the expected calibration error is {ece}, compared with {100 * float(found.ece_calibrated):.1f} % on average "
        f"for a calibrated classifier ({format_p(p)})"
    )
    advice = "see plots.reliability, and recalibrate the probabilities on held-out labels (temperature scaling)"
    return Finding("calibration of classes", level, why, "" if level == "fine" else advice)
