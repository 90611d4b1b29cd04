"""Posteriors, ``x → q(z|x)``."""

import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.core import Conditional, Distribution
from pyro_vae.errors import ModelError


class Posterior(Conditional):
    """The base of amortised posteriors: a module from ``x`` of shape ``(*batch, *features)`` to ``q(z|x)``.

    Example:
        >>> issubclass(DiagNormal, Posterior)
        True
    """


class DiagNormal(Posterior):
    """The diagonal normal of the note, equations (14) and (16).

    .. math:: q(z | x) = \\mathcal N(z | \\mu_\\phi(x), \\mathrm{diag}(\\sigma_\\phi(x)^2))

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, 2 · latent)``: first μ, then log σ.

    Raises:
        ModelError: when called, if the network gives an odd number of outputs.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> _ = torch.manual_seed(0)
        >>> q = DiagNormal(nn.Linear(3, 2 * 2))(torch.zeros(4, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([4]), torch.Size([2]))
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @classmethod
    def outputs(cls, size: int) -> int:
        return 2 * size

    def forward(self, x: torch.Tensor) -> Distribution:
        out = self.net(x)
        if out.shape[-1] % 2:
            raise ModelError(f"the encoder network gives {out.shape[-1]} numbers; μ and log σ make an even number")
        loc, log_scale = out.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
