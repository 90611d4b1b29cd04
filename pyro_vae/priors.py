"""Priors, ``() → p(z)``."""

import pyro.distributions as dist
import torch

from pyro_vae.core import Conditional, Distribution
from pyro_vae.errors import SettingsError


class Prior(Conditional):
    """The base of priors: a module that takes nothing and returns ``p(z)`` of event shape ``(latent,)``.

    Example:
        >>> issubclass(StandardNormal, Prior)
        True
    """


class StandardNormal(Prior):
    """The standard normal prior of the note, equation (14).

    .. math:: p(z) = \\mathcal N(z | 0, I)

    Args:
        latent_dim: the number of latents d, at least 1.

    Raises:
        SettingsError: if ``latent_dim`` is below 1.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> StandardNormal(3)().log_prob(torch.zeros(3))
        tensor(-2.7568)
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise SettingsError(f"latent_dim is {latent_dim}; it must be at least 1")
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)

    def extra_repr(self) -> str:
        return f"latent_dim={len(self.loc)}"
