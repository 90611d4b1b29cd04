"""The unnormalised posterior, ``log p(x, z)`` as a function of z."""

from torch import Tensor

from pyro_vae.core.component import distribution, masked
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE


def log_joint(vae: VAE, rows: Rows, z: Tensor) -> Tensor:
    """``log p(z) + log p(x|z)`` of each datum at latents of its own, in nats; missing values are left out.

    Args:
        vae: for its prior and decoder.
        rows: the data.
        z: shape ``(*, datum, latent)``.

    Returns:
        Shape ``(*, datum)``.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> x, q = torch.ones(3, 5), linear.posterior(torch.ones(3, 5))
        >>> z = q.sample((4,))
        >>> evidence = log_joint(linear.as_vae(), Rows(x), z) - q.log_prob(z)
        >>> bool((evidence - linear.log_marginal(x)).abs().max() < 1e-4)
        True
    """
    given = () if rows.context is None else (rows.context,)
    likelihood = distribution(vae.decoder, "decoder", z, *given)
    likelihood = likelihood if rows.mask is None else masked(likelihood, rows.mask)
    return likelihood.log_prob(rows.x) + distribution(vae.prior, "prior", *given).log_prob(z)
