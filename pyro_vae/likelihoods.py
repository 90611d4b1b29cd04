"""Likelihoods, ``z → p(x|z)``."""

import math

import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.core import Conditional, Distribution
from pyro_vae.errors import SettingsError


class Likelihood(Conditional):
    """The base of likelihoods: a module from ``z`` of shape ``(*batch, latent)`` to ``p(x|z)``.

    Example:
        >>> issubclass(Normal, Likelihood)
        True
    """


class Normal(Likelihood):
    """The Gaussian likelihood of the note, equation (14), its isotropic variance fixed or learned.

    .. math:: p(x | z) = \\mathcal N(x | f_\\Theta(z), s^2 I)

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to ``(*batch, *features)``.
        scale: s, the standard deviation in units of the data, above 0; where learning starts.
        learn_scale: whether s is a parameter of Θ, trained as ``log s``.

    Raises:
        SettingsError: if ``scale`` is not a finite number above 0.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> _ = torch.manual_seed(0)
        >>> likelihood = Normal(nn.Linear(2, 3), scale=0.5)
        >>> likelihood(torch.zeros(4, 2)).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    fixed_scale: torch.Tensor

    def __init__(self, net: nn.Module, scale: float = 1.0, *, learn_scale: bool = False) -> None:
        super().__init__()
        if not (scale > 0 and math.isfinite(scale)):
            raise SettingsError(f"scale is {scale}; a standard deviation must be a finite number above 0")
        self.net, self.learn_scale = net, learn_scale
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        else:
            self.register_buffer("fixed_scale", torch.tensor(float(scale)))

    @property
    def scale(self) -> torch.Tensor:
        """s, a tensor of shape ``()``."""
        return self.log_scale.exp() if self.learn_scale else self.fixed_scale

    def forward(self, z: torch.Tensor) -> Distribution:
        loc = self.net(z)
        return dist.Normal(loc, self.scale).to_event(loc.dim() - z.dim() + 1)

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.4g}, learn_scale={self.learn_scale}"
