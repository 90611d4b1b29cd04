"""Draws from the model that take the context of each datum."""

from torch import Tensor

from pyro_vae.core.compatibility import called, drawn
from pyro_vae.core.component import Distribution
from pyro_vae.core.vae import VAE


def latents(vae: VAE, number: int, context: Tensor | None, shape: tuple[int, ...] = ()) -> Tensor:
    """Draws of z from the prior for ``number`` data, each at its own context; shape ``(*shape, number, latent)``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> latents(vae, 7, None, (3,)).shape
        torch.Size([3, 7, 2])
    """
    prior = called("prior", vae.prior, *given(context))
    return drawn("prior", prior, shape if prior.batch_shape else (*shape, number))


def likelihood(vae: VAE, z: Tensor, context: Tensor | None) -> Distribution:
    """``p(x|z)``, or a sentence that says why not.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> likelihood(vae, torch.zeros(3, 2), None).event_shape
        torch.Size([5])
    """
    return called("decoder", vae.decoder, z, *given(context))


def given(context: Tensor | None) -> tuple[Tensor, ...]:
    """A context as the last argument of a part, where there is one.

    Example:
        >>> given(None)
        ()
    """
    return () if context is None else (context,)
