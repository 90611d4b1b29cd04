"""Do predicted probabilities of classes hold? Accuracy against confidence, and its expected error."""

from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_p
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import DataError

REPLICATES = 1000
"""Data sets that are drawn for the errors and for the distribution of a calibrated classifier."""


@takes_settings
def reliability(probability: Any, labels: Any, *, bins: int = 10, seed: int = 0) -> xr.Dataset:
    """Compare how sure a classifier is of its predictions with how often they are right.

    .. math:: \\mathrm{ECE} = \\sum_b \\frac{n_b}n \\, |\\mathrm{accuracy}_b - \\mathrm{confidence}_b|

    The confidence of a datum is the probability of the class that is predicted for it. Even a calibrated classifier has
    an ECE above 0, since a few data of a bin are right more or less often than they should be. So it is judged by
    labels drawn from the predicted probabilities themselves.

    Args:
        probability: of each class, shape ``(datum, class)``, as ``pv.classify(pair, x).probability``.
        labels: the true classes, whole numbers from 0, shape ``(datum,)``.
        bins: of equal width between 0 and 1, at least 2.
        seed: of the replicates.

    Returns:
        A dataset. Over ``bin``: ``confidence``, ``accuracy`` and its standard error over data ``accuracy_se``, and
        ``count`` (NaN where it is 0). Without a dimension: ``accuracy_of_all`` and ``ece`` with their standard errors
        over data ``…_se`` (of 1000 bootstrap samples); ``ece_calibrated``, the mean ECE of a calibrated classifier with
        these probabilities, and ``p_value``, the probability that such a one has an ECE of at least this.

    Raises:
        DataError: if the probabilities are none, or the labels are not as many, or none of the classes.
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
    """The ECE of bootstrap samples, and of labels drawn from the probabilities themselves; some at a time."""
    n, member = len(place), np.eye(bins)[place]
    at_once = max(1, 10**7 // n)
    found: list[list[np.ndarray]] = [[], []]
    for first in range(0, REPLICATES, at_once):
        shape = (min(at_once, REPLICATES - first), n)
        times = rng.multinomial(n, np.full(n, 1 / n), size=shape[0])
        apart = times * (right - confidence), (rng.random(shape) < confidence) - confidence
        for kept, each in zip(found, apart, strict=True):
            kept.append(np.abs(each @ member).sum(1) / n)
    return np.concatenate(found[0]), np.concatenate(found[1])


def _error(share: Any, number: Any) -> Any:
    """The standard deviation of a Beta distribution, so that a share of all has an error too."""
    middle = (share * number + 1) / (number + 2)
    return np.sqrt(middle * (1 - middle) / (number + 3))


def _ece(place: np.ndarray, confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    return float(np.abs(np.bincount(place, right - confidence, minlength=bins)).sum() / len(right))


def _validate(share: np.ndarray, known: np.ndarray) -> None:
    if share.ndim != 2 or not (share >= 0).all() or not np.allclose(share.sum(1), 1, atol=1e-4):
        raise DataError(
            f"probability has shape {share.shape} and must hold the probabilities of the classes of each datum, which "
            "add up to 1"
        )
    if known.shape != share.shape[:1]:
        raise DataError(f"labels have shape {known.shape} for {len(share)} data; give one for each")
    if not np.isin(known, np.arange(share.shape[1])).all():
        raise DataError(
            f"labels must be whole numbers from 0 to {share.shape[1] - 1}; take rows of known classes alone"
        )


def judge_reliability(found: xr.Dataset) -> Finding:
    """Are the predicted probabilities calibrated?

    Args:
        found: from :func:`reliability`.

    Returns:
        Fine where p is at least 0.05, bad where it is below 0.001, else doubtful.

    Example:
        >>> judge_reliability(reliability([[0.9, 0.1], [0.2, 0.8]] * 50, [0, 1] * 40 + [1, 0] * 10)).level
        'fine'
    """
    p = float(found.p_value)
    level: Level = "fine" if p >= 0.05 else "bad" if p < 0.001 else "doubtful"
    ece = format_estimate(100 * float(found.ece), 100 * float(found.ece_se), "%", over="data")
    why = (
        f"the expected calibration error is {ece}, and {100 * float(found.ece_calibrated):.1f} % on average for a "
        f"calibrated classifier ({format_p(p)})"
    )
    advice = "look at plots.reliability, and correct the probabilities by held-out labels (temperature scaling)"
    return Finding("calibration of classes", level, why, "" if level == "fine" else advice)
