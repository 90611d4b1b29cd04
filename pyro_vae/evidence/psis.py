"""Pareto-smoothed importance sampling: smoothed weights and the tail shape k̂ of each datum."""

import math

import numpy as np
from torch import Tensor

from pyro_vae.errors import SettingsError

LEAST = 25
"""The smallest number of particles for which a tail is fitted."""

GOOD, BAD = 0.5, 0.7
"""Thresholds of k̂: below the first, the weights have finite variance; above the second, their mean is unreliable."""

CONSTANT = 1e-3
"""The relative spread of the largest weights below which they are treated as constant, without a tail."""

PRIOR_DRAWS, PRIOR_SHAPE = 10, 0.5
"""The prior of k̂: its weight, as a number of tail draws, and its shape (Vehtari et al., 2024)."""

CHUNK = 2**23
"""The number of array elements that the fit holds at a time."""


def psis(log_weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Smooth the largest log-weights of each datum and estimate their tail shape k̂.

    A k̂ below 0.5 means that q covers the posterior of the datum well enough for importance sampling, a k̂ above 0.7
    that it does not. The weights of several data are not pooled, since the k̂ of pooled weights grows with their number.
    If the largest weights agree to within 0.1 %, as for an exact guide, there is no tail and k̂ is 0; if all but a few
    weights are 0, k̂ is infinite. k̂ depends on the draws only: if q misses a whole mode, no draw shows it and k̂ is
    small.

    Args:
        log_weights: log-weights from :func:`pyro_vae.elbo.log_weights`, shape ``(K, datum)``, K at least 25.

    Returns:
        Normalized smoothed log-weights, shape ``(datum, K)``, and k̂, shape ``(datum,)``.

    Raises:
        SettingsError: if there are too few particles for a tail.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        | Yes, but Did It Work? (Yao et al., 2018), https://arxiv.org/abs/1802.02538
        | A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang & Stephens, 2009),
          https://doi.org/10.1198/tech.2009.08017

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> heavy = -2 * torch.rand(4000, 1).log()  # weights u⁻², whose tail has k = 2
        >>> bool(abs(psis(heavy)[1][0] - 2) < 0.2)
        True
    """
    if len(log_weights) < LEAST:
        raise SettingsError(f"there are {len(log_weights)} particles; k̂ needs at least {LEAST}")
    values = log_weights.detach().double().cpu().numpy().T
    with np.errstate(all="ignore"):
        values = values - values.max(1, keepdims=True)
        size = max(1, CHUNK // (50 * tail_length(values.shape[1])))
        khat = np.concatenate([_smooth_tails(part) for part in np.split(values, range(size, len(values), size))])
        normalized = values - np.log(np.exp(values).sum(1, keepdims=True))
    return normalized, np.where(np.isnan(khat), np.inf, khat)


def tail_length(num_particles: int) -> int:
    """Return the number of largest weights that make up the tail: ⌈min(S/5, 3√S)⌉.

    Example:
        >>> tail_length(100), tail_length(1000)
        (20, 95)
    """
    return math.ceil(min(num_particles / 5, 3 * num_particles**0.5))


def _smooth_tails(values: np.ndarray) -> np.ndarray:
    """Replace the tail of each row of log-weights, whose largest value is 0, by quantiles in place; return k̂."""
    tail = tail_length(values.shape[1])
    order = np.argsort(values, 1)[:, -tail - 1 :]
    largest = np.exp(np.take_along_axis(values, order, 1))
    flat = largest[:, 0] >= 1 - CONSTANT
    steep = ~flat & ~(largest[:, _quartile(tail) + 1] > largest[:, 0])  # the fit takes its scale from this quartile
    khat = np.where(steep, np.inf, 0.0)
    fitted = np.flatnonzero(~flat & ~steep)
    if not len(fitted):
        return khat
    cutoff = largest[fitted, :1]
    shape, scale = fit_pareto(largest[fitted, 1:] - cutoff)
    khat[fitted] = shape
    quantiles = cutoff + _pareto_quantiles((np.arange(tail) + 0.5) / tail, shape[:, None], scale[:, None])
    usable = np.isfinite(quantiles).all(1)
    rows = fitted[usable]
    values[rows[:, None], order[rows, 1:]] = np.log(np.minimum(quantiles[usable], 1.0))
    return khat


def _quartile(tail: int) -> int:
    """The index of the first quartile among ``tail`` ordered values."""
    return int(tail / 4 + 0.5) - 1


def fit_pareto(excesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a generalized Pareto distribution to each row of ordered excesses over a threshold.

    .. math:: k(\\theta) = \\frac1M \\sum_i \\log(1 - \\theta x_i), \\qquad
        \\ell(\\theta) = M [\\log(-\\theta / k(\\theta)) - k(\\theta) - 1]

    θ is the mean of a grid under the profile likelihood ℓ, and the scale is ``-k(θ) / θ``. The shape is shrunk
    towards ½ with the weight of ten draws, which stabilizes it for short tails.

    Args:
        excesses: shape ``(datum, M)``, each row in ascending order.

    Returns:
        The shape k̂ and the scale, shape ``(datum,)``.

    References:
        | A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang & Stephens, 2009),
          https://doi.org/10.1198/tech.2009.08017

    Example:
        >>> uniform = (np.arange(10_000) + 0.5) / 10_000
        >>> shape, scale = fit_pareto((uniform[None] ** -0.5)[:, ::-1] - 1)  # a tail of k = ½
        >>> bool(abs(shape[0] - 0.5) < 0.01), bool(abs(scale[0] - 0.5) < 0.01)
        (True, True)
    """
    count = excesses.shape[1]
    points = 30 + int(count**0.5)
    grid = 1 - np.sqrt(points / (np.arange(points) + 0.5))
    theta = 1 / excesses[:, -1:] + grid / (3 * excesses[:, _quartile(count), None])  # (datum, point)
    shapes = np.log1p(-theta[:, :, None] * excesses[:, None]).mean(2)
    profile = count * (np.log(-theta / shapes) - shapes - 1)
    weights = np.exp(profile - profile.max(1, keepdims=True))
    theta = (weights * theta).sum(1) / weights.sum(1)
    shape = np.log1p(-theta[:, None] * excesses).mean(1)
    return (count * shape + PRIOR_DRAWS * PRIOR_SHAPE) / (count + PRIOR_DRAWS), -shape / theta


def _pareto_quantiles(probability: np.ndarray, shape: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The quantiles of a generalized Pareto distribution; NaN if its scale is not above 0."""
    exponent = -np.log1p(-probability)
    safe = np.where(shape == 0, 1.0, shape)
    excess = np.where(shape == 0, exponent, np.expm1(safe * exponent) / safe)
    return np.where(scale > 0, scale * excess, np.nan)
