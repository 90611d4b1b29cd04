"""Test whether ranks are uniform: simultaneous bands for their ECDF, and p-values."""

from functools import lru_cache

import numpy as np

DRAWS = 10_000
"""The number of sets of uniform ranks that are simulated for the null distribution."""


def counts_below(ranks: np.ndarray, levels: int) -> np.ndarray:
    """Count the ranks below 1, 2, …, ``levels - 1``; ranks ``(simulation, …)`` go from 0 to ``levels - 1``.

    Example:
        >>> counts_below(np.array([0, 2, 2, 1]), 3)
        array([1, 2])
    """
    steps = np.arange(1, levels).reshape(-1, *[1] * ranks.ndim)
    return (ranks < steps).sum(1)


@lru_cache(maxsize=8)
def tails(number: int, levels: int) -> np.ndarray:
    """Compute twice the smaller binomial tail of each count, shape ``(levels - 1, number + 1)``.

    .. math:: t_{ir} = 2 \\min\\{P(B_i \\le r), P(B_i \\ge r)\\}, \\qquad
        B_i \\sim \\mathrm{Bin}(n, i / \\mathrm{levels})

    Example:
        >>> tails(2, 2).round(2)
        array([[0.5, 1.5, 0.5]])
    """
    from scipy.stats import binom

    r, share = np.arange(number + 1), np.arange(1, levels)[:, None] / levels
    return 2 * np.minimum(binom.cdf(r, number, share), binom.sf(r - 1, number, share))


@lru_cache(maxsize=8)
def null(number: int, levels: int) -> np.ndarray:
    """Simulate the smallest tail of :func:`tails` along the ECDF of uniform ranks, sorted.

    Example:
        >>> null(20, 5).shape
        (10000,)
    """
    uniform = np.full(levels, 1 / levels)
    table, places = tails(number, levels), np.arange(levels - 1)
    drawn = np.random.default_rng(0).multinomial(number, uniform, size=DRAWS).cumsum(1)[:, :-1]
    return np.sort(table[places, drawn].min(1))


def p_value(counts: np.ndarray, number: int) -> tuple[float, float]:
    """Return the probability that the ECDF of uniform ranks deviates as far anywhere, and its standard error.

    The smallest tail along the ECDF is compared with its distribution under uniform ranks. If no simulated set
    deviates as far, the sum of the tails at all places bounds the p-value, and its error is 0.

    Args:
        counts: from :func:`counts_below`, shape ``(levels - 1,)``.
        number: the number of ranks.

    Example:
        >>> p_value(np.array([5, 10, 15]), 20)[0] > 0.9, p_value(np.array([20, 20, 20]), 20)[0] < 1e-10
        (True, True)
    """
    places = len(counts)
    least = tails(number, places + 1)[np.arange(places), counts].min()
    simulated = null(number, places + 1)
    p = (1 + np.searchsorted(simulated, least * (1 + 1e-9), side="right")) / (1 + len(simulated))
    if places * least < 1 / (1 + len(simulated)):
        return float(places * least), 0.0
    return float(p), float(np.sqrt(p * (1 - p) / len(simulated)))


def band(number: int, levels: int, miss: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper counts of a band that uniform ranks leave anywhere with probability ``miss``.

    Example:
        >>> low, high = band(100, 4, 0.05)
        >>> bool((low < [25, 50, 75]).all() and (high > [25, 50, 75]).all())
        True
    """
    inside = tails(number, levels) >= np.quantile(null(number, levels), miss, method="lower")
    return inside.argmax(1), number - inside[:, ::-1].argmax(1)
