"""Zero-inflated and hurdle likelihoods of counts."""

from collections.abc import Callable
from typing import ClassVar

from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.errors import SettingsError, type_of
from pyro_vae.likelihoods import _counts
from pyro_vae.likelihoods.base import Likelihood, make_likelihood
from pyro_vae.likelihoods.counts import Counts

CountsMaker = Callable[[nn.Module], Likelihood]


class _WithZeros(Likelihood):
    """Base class of counts with an extra probability of zero, both given by the output of one network."""

    support = constraints.dependent
    distribution: ClassVar[type[Distribution]]

    def __init__(self, net: nn.Module, counts: CountsMaker) -> None:
        super().__init__(net)
        self.counts = _make_counts(counts)

    @classmethod
    def outputs(cls, size: int, *, counts: CountsMaker | None = None) -> int:
        if counts is None:
            raise SettingsError(f"the outputs of {cls.__name__} depend on its counts; pass counts=")
        return size * (1 + _make_counts(counts).numbers)

    @property
    def numbers(self) -> int:
        return 1 + self.counts.numbers

    @property
    def feature_support(self) -> constraints.Constraint:
        return self.counts.feature_support

    @property
    def takes(self) -> str:
        return self.counts.takes

    def features(self, out: Tensor) -> Distribution:
        logits = self.parts(out)[0]
        return self.distribution(logits, self.counts.features(self._count_outputs(out).double()))

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        return self.counts.beyond(self._count_outputs(out))

    def _count_outputs(self, out: Tensor) -> Tensor:
        """The network's outputs for the counts, after the logits of zero."""
        return out[..., out.shape[-1] // self.numbers :]


def _make_counts(counts: CountsMaker) -> Counts:
    likelihood = make_likelihood(counts, "counts")
    if not isinstance(likelihood, Counts):
        raise SettingsError(f"counts is {type_of(likelihood)}; it must be Poisson, NegativeBinomial or Binomial")
    return likelihood


class ZeroInflated(_WithZeros):
    """Counts with additional zeros, such as those of a detector that misses all events.

    .. math:: p(x | z) = \\prod_j \\left[\\pi_j 1_{x_j = 0} + (1 - \\pi_j)\\, p_c(x_j | z)\\right],
        \\qquad \\pi = \\sigma(l(z))

    Zeros come from both sources, so a zero is at least as probable as under the counts alone. The log-probability is
    computed in double precision. Samples have no gradient.

    Args:
        net: the decoder network, from ``(*batch, latent)`` to ``(*batch, outputs)``: the logits l of all features, then
            the outputs for the counts; ``ZeroInflated.outputs(features, counts=Poisson)`` is their number.
        counts: the likelihood :math:`p_c`: the class Poisson, NegativeBinomial or Binomial, or a function of a
            network, such as ``partial(Binomial, total_count=8)``. Its limits apply.

    Raises:
        SettingsError: if ``counts`` does not build a likelihood of counts.
        ModelError: when called, if the number of outputs is not a multiple of the number per feature.

    References:
        | Zero-Inflated Poisson Regression (Lambert, 1992), https://doi.org/10.2307/1269547
        | Deep Generative Modeling for Single-Cell Transcriptomics (Lopez et al., 2018),
          https://doi.org/10.1038/s41592-018-0229-2

    Example:
        >>> import torch
        >>> from pyro_vae.likelihoods import Poisson
        >>> p = ZeroInflated(nn.Identity(), Poisson)(torch.tensor([0.0, 1.0]))  # π = 1/2, a rate of e
        >>> p.log_prob(torch.zeros(1)).exp()  # 1/2 + exp(-e) / 2
        tensor(0.5330)
        >>> p.mean  # e / 2
        tensor([1.3591])
    """

    distribution = _counts.ZeroInflated


class Hurdle(_WithZeros):
    """Counts with a separate probability of zero, and counts above 0 otherwise.

    .. math:: p(x | z) = \\prod_j \\begin{cases} \\pi_j & x_j = 0 \\\\
        (1 - \\pi_j)\\, p_c(x_j | z) / (1 - p_c(0 | z)) & x_j > 0 \\end{cases}, \\qquad \\pi = \\sigma(l(z))

    Unlike under :class:`ZeroInflated`, a zero may be less probable than under the counts alone. The log-probability is
    computed in double precision. Samples have no gradient.

    Args:
        net: the decoder network, from ``(*batch, latent)`` to ``(*batch, outputs)``: the logits l of all features, then
            the outputs for the counts; ``Hurdle.outputs(features, counts=Poisson)`` is their number.
        counts: the likelihood :math:`p_c`: the class Poisson, NegativeBinomial or Binomial, or a function of a
            network, such as ``partial(Binomial, total_count=8)``. Its limits apply.

    Raises:
        SettingsError: if ``counts`` does not build a likelihood of counts.
        ModelError: when called, if the number of outputs is not a multiple of the number per feature.

    References:
        | Specification and Testing of Some Modified Count Data Models (Mullahy, 1986),
          https://doi.org/10.1016/0304-4076(86)90002-3

    Example:
        >>> import torch
        >>> from pyro_vae.likelihoods import NegativeBinomial
        >>> _ = torch.manual_seed(0)
        >>> p = Hurdle(nn.Linear(2, Hurdle.outputs(4, counts=NegativeBinomial)), NegativeBinomial)(torch.zeros(5, 2))
        >>> p.event_shape, p.log_prob(torch.tensor([0.0, 1.0, 2.0, 3.0])).shape
        (torch.Size([4]), torch.Size([5]))
    """

    distribution = _counts.Hurdle
