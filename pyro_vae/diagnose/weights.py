"""How good is q(z|x) for each datum?"""

import numpy as np
from torch import Tensor

from pyro_vae.errors import SettingsError


def psis(log_weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log-weights and the shape k̂ of their tail, datum by datum.

    A k̂ below 0.5 says that q covers the posterior of that datum well enough for importance
    sampling, above 0.7 that it does not. Weights of several data are never pooled: k̂ then grows with
    their number though no q has changed.

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
    if len(log_weights) < 25:
        raise SettingsError(f"there are {len(log_weights)} particles; the tail needs at least 25")
    from pyro_vae._arviz import array_stats

    # This function takes log-likelihoods, and turns their sign to make weights of them.
    smoothed, khat = array_stats.psislw(-log_weights.detach().double().cpu().numpy().T)
    return smoothed, khat
