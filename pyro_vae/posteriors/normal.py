"""Normal posteriors, with a diagonal, a full or a low-rank covariance."""

import math

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.core.distributions import LowRankMultivariateNormal, MultivariateNormal
from pyro_vae.core.validation import whole
from pyro_vae.errors import ModelError
from pyro_vae.posteriors.base import Posterior


class DiagNormal(Posterior):
    """The diagonal normal posterior, equations (14) and (16) of the note.

    .. math:: q(z | x) = \\mathcal N(z | \\mu_\\phi(x), \\mathrm{diag}(\\sigma_\\phi(x)^2))

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, 2 · latent)``: first μ, then log σ.

    Raises:
        ModelError: when called, if the network has an odd number of outputs.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> q = DiagNormal(nn.Linear(3, 2 * 2))(torch.zeros(4, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([4]), torch.Size([2]))
    """

    @classmethod
    def outputs(cls, size: int) -> int:
        return 2 * size

    def distribution(self, out: Tensor) -> Distribution:
        if out.shape[-1] % 2:
            raise ModelError(f"the encoder network gives {out.shape[-1]} numbers; μ and log σ need an even number")
        loc, log_scale = out.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullNormal(Posterior):
    """A normal with a full covariance, parameterized by its Cholesky factor.

    .. math:: q(z | x) = \\mathcal N(z | \\mu, L L^\\top), \\qquad L_{jj} = \\exp \\ell_j

    Its KL divergence from a normal prior has a closed form here (Pyro alone would estimate it by sampling).

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, d (d + 3) / 2)`` for d latents:
            first μ, then ℓ, the logarithm of the diagonal of L, then the rows of L below the diagonal.

    Raises:
        ModelError: when called, if the number of outputs is not d (d + 3) / 2 for any d.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114
        | An Introduction to Variational Autoencoders (Kingma & Welling, 2019), section 2.5.1,
          https://arxiv.org/abs/1906.02691

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> q = FullNormal(nn.Linear(3, FullNormal.outputs(2)))(torch.zeros(4, 3))
        >>> q.covariance_matrix.shape
        torch.Size([4, 2, 2])
    """

    @classmethod
    def outputs(cls, size: int) -> int:
        return size * (size + 3) // 2

    def distribution(self, out: Tensor) -> Distribution:
        size = (math.isqrt(9 + 8 * out.shape[-1]) - 3) // 2
        if size < 1 or self.outputs(size) != out.shape[-1]:
            raise ModelError(
                f"the encoder network gives {out.shape[-1]} numbers; "
                f"a full normal of d latents needs d (d + 3) / 2, such as {self.outputs(size)} or "
                f"{self.outputs(size + 1)}"
            )
        loc, log_diagonal, below = out.split([size, size, size * (size - 1) // 2], -1)
        return MultivariateNormal(loc, log_diagonal, below)


class LowRankNormal(Posterior):
    """A normal whose covariance is diagonal plus low rank: correlations at a cost linear in the latents.

    .. math:: q(z | x) = \\mathcal N(z | \\mu, W W^\\top + \\mathrm{diag}(\\sigma^2)), \\qquad W \\in R^{d \\times r}

    Its KL divergence from a normal prior has a closed form here (Pyro alone would estimate it by sampling).

    Args:
        net: the encoder network, from ``(*batch, *features)`` to ``(*batch, d (2 + rank))`` for d latents:
            first μ, then log σ, then the rows of W.
        rank: the rank r, at least 1. ``outputs(size, rank=rank)`` is the number of outputs that the network needs.

    Raises:
        SettingsError: if ``rank`` is below 1.
        ModelError: when called, if the number of outputs is not a multiple of ``2 + rank``.

    References:
        | Stochastic Backpropagation (Rezende, Mohamed & Wierstra, 2014), section 4.3, https://arxiv.org/abs/1401.4082
        | Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott & Smith, 2018),
          https://arxiv.org/abs/1701.03208

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Linear(3, LowRankNormal.outputs(5, rank=2))
        >>> LowRankNormal(net, 2)(torch.zeros(4, 3)).cov_factor.shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, net: nn.Module, rank: int = 1) -> None:
        super().__init__(net)
        self.rank = whole("rank", rank, 1)

    @classmethod
    def outputs(cls, size: int, *, rank: int = 1) -> int:
        return size * (2 + rank)

    def distribution(self, out: Tensor) -> Distribution:
        size, rest = divmod(out.shape[-1], 2 + self.rank)
        if rest or size < 1:
            raise ModelError(
                f"the encoder network gives {out.shape[-1]} numbers; "
                f"a normal of rank {self.rank} needs {2 + self.rank} per latent"
            )
        loc, log_scale, factor = out.split([size, size, size * self.rank], -1)
        return LowRankMultivariateNormal(loc, factor.unflatten(-1, (size, self.rank)), log_scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
