"""Draws from the prior, given the context of each datum."""

from torch import Tensor

from pyro_vae.core.compatibility import called, drawn
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE


def latents(vae: VAE, rows: Rows, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw z from the prior given the context of each row; shape ``(*shape, datum, latent)``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> latents(vae, Rows(torch.ones(7, 5)), (3,)).shape
        torch.Size([3, 7, 2])
    """
    prior = called("prior", vae.prior, *rows.given)
    return drawn("prior", prior, shape if prior.batch_shape else (*shape, len(rows)))
