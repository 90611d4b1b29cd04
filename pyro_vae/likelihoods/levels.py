"""Likelihoods of bits, grey values and levels."""

import math

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.core.validation import whole
from pyro_vae.errors import SettingsError
from pyro_vae.likelihoods._distributions import Bernoulli as _Bernoulli
from pyro_vae.likelihoods._distributions import ContinuousBernoulli as _ContinuousBernoulli
from pyro_vae.likelihoods._distributions import Levels, LogisticLevels, grid
from pyro_vae.likelihoods.base import Likelihood


class Bernoulli(Likelihood):
    """Bits, each 0 or 1, given the probability of a 1.

    .. math:: p(x | z) = \\prod_j \\lambda_j^{x_j} (1 - \\lambda_j)^{1 - x_j}, \\qquad \\lambda = \\sigma(f_\\Theta(z))

    For grey values between 0 and 1, use :class:`ContinuousBernoulli`.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to the logits, ``(*batch, *features)``.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), appendix C, https://arxiv.org/abs/1312.6114

    Example:
        >>> _ = torch.manual_seed(0)
        >>> Bernoulli(nn.Linear(2, 3))(torch.zeros(4, 2)).log_prob(torch.ones(4, 3)).shape
        torch.Size([4])
    """

    support = constraints.boolean

    @property
    def takes(self) -> str:
        return "0 and 1"

    def features(self, out: Tensor) -> Distribution:
        (logits,) = self.parts(out)
        return _Bernoulli(logits=logits)


class ContinuousBernoulli(Likelihood):
    """Grey values between 0 and 1, by a Bernoulli density with its proper normalizer.

    .. math:: p(x | z) = \\prod_j C(\\lambda_j) \\lambda_j^{x_j} (1 - \\lambda_j)^{1 - x_j},
        \\qquad \\lambda = \\sigma(f_\\Theta(z)),
        \\quad C(\\lambda) = \\frac{2 \\tanh^{-1}(1 - 2\\lambda)}{1 - 2\\lambda}

    The mean is not λ but :math:`\\tfrac12 + \\tfrac12 (\\coth h - 1/h)`, where h is half the logit. Near λ = ½, where
    the terms of these formulas cancel, density and mean are computed from a series and exact in single precision.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to the logits, ``(*batch, *features)``.

    References:
        | The Continuous Bernoulli (Loaiza-Ganem & Cunningham, 2019), https://arxiv.org/abs/1907.06845

    Example:
        >>> _ = torch.manual_seed(0)
        >>> p = ContinuousBernoulli(nn.Identity())(torch.tensor([0.0, 2.0]))
        >>> p.mean
        tensor([0.5000, 0.6565])
        >>> p.log_prob(torch.tensor([0.3, 0.5]))
        tensor(-0.1614)
    """

    support = constraints.unit_interval

    @property
    def takes(self) -> str:
        return "numbers from 0 to 1"

    def features(self, out: Tensor) -> Distribution:
        (logits,) = self.parts(out)
        return _ContinuousBernoulli(logits=logits)


class Categorical(Likelihood):
    """One of several levels per feature, ordered or not, given the probability of each.

    .. math:: p(x | z) = \\prod_j \\mathrm{softmax}(f_\\Theta(z)_j)_{x_j}

    Values are indices of levels, as floats; the mean is the expected index.

    Args:
        net: the decoder network f, from ``(*batch, latent)`` to the logits, ``(*batch, levels · features)``:
            the logits of level 0 for all features, then of level 1, ….
        levels: the number of levels, at least 2; a feature is a whole number from 0 to ``levels - 1``.

    Raises:
        SettingsError: if ``levels`` is not a whole number of at least 2.
        ModelError: when called, if the network does not give ``levels`` outputs for each feature.

    References:
        | Categorical Data Analysis (Agresti, 2002), chapter 7, https://doi.org/10.1002/0471249688

    Example:
        >>> _ = torch.manual_seed(0)
        >>> p = Categorical(nn.Linear(2, 4 * 3), levels=4)(torch.zeros(5, 2))
        >>> p.event_shape, p.sample().dtype, Categorical.outputs(3, levels=4)
        (torch.Size([3]), torch.float32, 12)
    """

    support = constraints.nonnegative_integer

    def __init__(self, net: nn.Module, levels: int) -> None:
        super().__init__(net)
        self.levels = whole("levels", levels, 2)

    @classmethod
    def outputs(cls, size: int, *, levels: int | None = None) -> int:
        if levels is None:
            raise SettingsError("the outputs of Categorical depend on the number of levels; pass levels=")
        return size * whole("levels", levels, 2)

    @property
    def numbers(self) -> int:
        return self.levels

    @property
    def feature_support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def takes(self) -> str:
        return f"whole numbers from 0 to {self.levels - 1}"

    def features(self, out: Tensor) -> Distribution:
        return Levels(torch.stack(self.parts(out), -1))

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class DiscretizedLogisticMixture(Likelihood):
    """8-bit grey values, scaled to [0, 1]: a mixture of logistic distributions, rounded to the levels.

    .. math:: p(x | z) = \\prod_j \\sum_k \\pi_{jk} \\left[\\sigma\\left(\\frac{y_j + h - m_{jk}}{s_{jk}}\\right)
        - \\sigma\\left(\\frac{y_j - h - m_{jk}}{s_{jk}}\\right)\\right], \\qquad y = 2 x - 1,\\ h = \\frac1{L - 1}

    with L levels. The bins of the first and the last level are open, so that the probabilities of all levels
    sum to one. The mixture is that of PixelCNN++, but pixels and channels are independent given z.

    Args:
        net: the decoder network, from ``(*batch, latent)`` to ``(*batch, 3 · components · features)``: the
            logits of π by component, each for all features, then m, in [-1, 1] for grey values, then
            log s, which is clamped to [-7, 7], scales from 9e-4 to 1,100, beyond which the gradient is zero. With
            more than 256 levels the smallest scale is 0.23 h, so that one level can have a probability of up to 0.97.
        components: the number of logistic distributions per feature, at least 1.
        levels: the number of levels L, at least 2; a feature is one of 0, 1/(L - 1), …, 1 (256 for 8 bits).

    Raises:
        SettingsError: if ``components`` is below 1 or ``levels`` below 2.
        ModelError: when called, if the network does not give ``3 · components`` outputs for each feature.

    References:
        | PixelCNN++ (Salimans, Karpathy, Chen & Kingma, 2017), https://arxiv.org/abs/1701.05517

    Example:
        >>> _ = torch.manual_seed(0)
        >>> p = DiscretizedLogisticMixture(nn.Linear(2, 3 * 5 * 4))(torch.zeros(7, 2))
        >>> p.event_shape, p.log_prob(torch.full((4,), 100 / 255)).shape
        (torch.Size([4]), torch.Size([7]))
    """

    support = grid(256)

    def __init__(self, net: nn.Module, components: int = 5, *, levels: int = 256) -> None:
        super().__init__(net)
        self.components, self.levels = whole("components", components, 1), whole("levels", levels, 2)

    @classmethod
    def outputs(cls, size: int, *, components: int = 5) -> int:
        return 3 * whole("components", components, 1) * size

    @property
    def numbers(self) -> int:
        return self.outputs(1, components=self.components)

    @property
    def feature_support(self) -> constraints.Constraint:
        return grid(self.levels)

    @property
    def takes(self) -> str:
        return f"the {self.levels} values k/{self.levels - 1} from 0 to 1"

    def features(self, out: Tensor) -> Distribution:
        logits, loc, log_scale = torch.stack(self.parts(out), -1).chunk(3, -1)
        return LogisticLevels(logits, loc, log_scale.clamp(*self._limits), self.levels)

    @property
    def _limits(self) -> tuple[float, float]:
        """The smallest and the largest log s."""
        return -7.0 - max(math.log((self.levels - 1) / 255), 0.0), 7.0

    def beyond(self, out: Tensor) -> dict[str, Tensor]:
        log_scale, (least, most) = out.chunk(3, -1)[2], self._limits
        return {f"log s outside {least:.3g} to {most:g}": (log_scale < least) | (log_scale > most)}

    def extra_repr(self) -> str:
        return f"components={self.components}, levels={self.levels}"
