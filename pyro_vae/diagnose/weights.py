"""How good is q(z|x) for each datum?"""

import numpy as np
from torch import Tensor

from pyro_vae.errors import SettingsError

LEAST = 25
"""Particles below which there is no tail to fit."""

GOOD, BAD = 0.5, 0.7
"""k̂ below the first: the weights have a variance. Above the second: their mean cannot be relied on."""

CONSTANT = 1e-3
"""The relative spread of the largest weights below which they have no tail: rounding, or a plateau."""


def psis(log_weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log-weights and the shape k̂ of their tail, datum by datum.

    A k̂ below 0.5 says that q covers the posterior of that datum well enough for importance
    sampling, above 0.7 that it does not. Weights of several data are never pooled: k̂ then grows with
    their number though no q has changed. Where the largest weights are equal but for a thousandth, as those of
    an exact guide are, there is no tail and k̂ is 0; where all but a few weights are 0, it is infinite.

    Args:
        log_weights: from :func:`pyro_vae.elbo.log_weights`, shape ``(K, datum)``, K at least 25.

    Returns:
        Normalised smoothed log-weights, shape ``(datum, K)``, and k̂, shape ``(datum,)``.

    Raises:
        SettingsError: if there are too few particles for a tail.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        | Yes, but Did It Work? (Yao et al., 2018), https://arxiv.org/abs/1802.02538

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> heavy = -2 * torch.rand(4000, 1).log()  # weights u⁻², whose tail has k = 2
        >>> bool(abs(psis(heavy)[1][0] - 2) < 0.2)
        True
    """
    if len(log_weights) < LEAST:
        raise SettingsError(f"there are {len(log_weights)} particles; the tail needs at least {LEAST}")
    from pyro_vae._arviz import array_stats

    log_weights = log_weights.detach().double()
    smoothed = (log_weights - log_weights.logsumexp(0)).cpu().numpy().T.copy()
    tail = tail_length(len(log_weights))
    largest = np.sort(smoothed, 1)[:, -tail - 1 :]
    with np.errstate(all="ignore"):
        largest = np.exp(largest - largest[:, -1:])
        flat = largest[:, 0] >= 1 - CONSTANT
        steep = ~flat & ~(largest[:, (tail + 2) // 4] > largest[:, 0])  # where the fit takes its scale
        khat = np.where(steep, np.inf, 0.0)
        fitted = ~flat & ~steep
        if fitted.any():
            # This function takes log-likelihoods, and turns their sign to make weights of them.
            smoothed[fitted], khat[fitted] = array_stats.psislw(-smoothed[fitted])
    return smoothed, np.where(np.isnan(khat), np.inf, khat)


def tail_length(num_particles: int) -> int:
    """How many of the largest weights the tail is fitted to.

    Example:
        >>> tail_length(100), tail_length(1000)
        (20, 94)
    """
    return int(3 * num_particles**0.5) if num_particles > 225 else num_particles // 5
