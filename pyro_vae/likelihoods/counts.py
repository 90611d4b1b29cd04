"""Likelihoods of counts."""

import math

from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.core.validation import whole
from pyro_vae.likelihoods import _counts
from pyro_vae.likelihoods.base import Likelihood

LIMIT = 20.0
"""The logarithm of the largest rate; data above e^20 raise an error."""
MOST = math.floor(math.exp(LIMIT))


class Counts(Likelihood):
    """Base class of likelihoods of counts; their distributions know the probability of a count above 0."""


class Binomial(Counts):
    """The number of successes among a given number of trials, per feature.

    .. math:: p(x | z) = \\prod_j \\binom{n}{x_j} \\lambda_j^{x_j} (1 - \\lambda_j)^{n - x_j},
        \\qquad \\lambda = \\sigma(f_\\Theta(z))

    The log-probability is computed in double precision, since its terms, of size n, cancel.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to the logits, ``(*batch, *features)``.
        total_count: the number of trials n of every feature, at least 1.

    Raises:
        SettingsError: if ``total_count`` is not a whole number of at least 1.

    References:
        | Generalized Linear Models (Nelder & Wedderburn, 1972), https://doi.org/10.2307/2344614

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> likelihood = Binomial(nn.Linear(2, 3), total_count=8)
        >>> likelihood.feature_support
        IntegerInterval(lower_bound=0, upper_bound=8)
        >>> likelihood(torch.zeros(4, 2)).mean.shape
        torch.Size([4, 3])
    """

    support = constraints.nonnegative_integer

    def __init__(self, net: nn.Module, total_count: int) -> None:
        super().__init__(net)
        self.total_count = whole("total_count", total_count, 1)

    @property
    def feature_support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.total_count)

    @property
    def takes(self) -> str:
        return f"whole numbers from 0 to {self.total_count}"

    def features(self, out: Tensor) -> Distribution:
        (logits,) = self.parts(out)
        return _counts.Binomial(self.total_count, logits)

    def extra_repr(self) -> str:
        return f"total_count={self.total_count}"


class _Unbounded(Counts):
    """Base class of counts whose only upper bound is the largest rate."""

    support = constraints.integer_interval(0, MOST)

    @property
    def takes(self) -> str:
        return f"whole numbers from 0 to {MOST:,}"


class Poisson(_Unbounded):
    """Counts whose variance equals their mean, the rate.

    .. math:: p(x | z) = \\prod_j \\frac{r_j^{x_j} e^{-r_j}}{x_j!}, \\qquad r = e^{f_\\Theta(z)}

    The log-probability is computed in double precision, since its terms, of the size of the count, cancel.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to the log-rates (counts per datum),
            ``(*batch, *features)``. Log-rates are clamped to at most 20, a rate of 4.9e8, above which the gradient is
            zero. Data above this rate raise an error.

    References:
        | Generalized Linear Models (Nelder & Wedderburn, 1972), https://doi.org/10.2307/2344614

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> Poisson(nn.Linear(2, 3))(torch.zeros(4, 2)).log_prob(torch.ones(4, 3)).shape
        torch.Size([4])
    """

    def features(self, out: Tensor) -> Distribution:
        (log_rate,) = self.parts(out)
        return _counts.Poisson(log_rate.clamp(max=LIMIT))

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        return {f"log-rates above {LIMIT:g}": self.parts(out)[0] > LIMIT}


class NegativeBinomial(_Unbounded):
    """Overdispersed counts: Poisson counts with a gamma-distributed rate.

    .. math:: p(x | z) = \\prod_j \\frac{\\Gamma(x_j + r_j)}{x_j!\\, \\Gamma(r_j)}
        (1 - \\lambda_j)^{r_j} \\lambda_j^{x_j}, \\qquad \\lambda = \\sigma(l(z)),\\ r = e^{k(z)}

    The mean is :math:`r e^{l}` and the variance :math:`r e^{l} (1 + e^{l})`; as r grows at a fixed mean, the
    distribution tends to a Poisson. The log-probability is computed in double precision, as for :class:`Poisson`.

    Args:
        net: the decoder network, from ``(*batch, latent)`` to ``(*batch, 2 features)``: all logits l, then
            all k. The logits are clamped to at most 20 and k to [-20, 20], r from 2e-9 to 4.9e8, beyond which the
            gradient is zero. Data above 4.9e8 raise an error.

    Raises:
        ModelError: when called, if the network does not give two outputs for each feature.

    References:
        | Deep Generative Modeling for Single-Cell Transcriptomics (Lopez et al., 2018),
          https://doi.org/10.1038/s41592-018-0229-2

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> p = NegativeBinomial(nn.Linear(2, 6))(torch.zeros(4, 2))
        >>> bool((p.variance > p.mean).all())
        True
    """

    @classmethod
    def outputs(cls, size: int) -> int:
        return 2 * size

    def features(self, out: Tensor) -> Distribution:
        logits, log_count = self.parts(out)
        return _counts.NegativeBinomial(log_count.clamp(-LIMIT, LIMIT), logits.clamp(max=LIMIT))

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        logits, log_count = self.parts(out)
        return {
            f"logits above {LIMIT:g}": logits > LIMIT,
            f"k outside -{LIMIT:g} to {LIMIT:g}": log_count.abs() > LIMIT,
        }
