"""Distributions of counts, scored in double precision, and their zero-inflated and hurdle variants.

Single precision is not enough, since terms of the size of the count cancel: with a count and a mean of 1e8,
``x log r - r - log x!`` is about -10, but its terms are 2e9, which single precision resolves to about 100.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn import functional as F

EMPTY = torch.Size()


class Poisson(dist.Poisson):
    """Pyro's Poisson distribution, parameterized by the logarithm of the rate."""

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Poisson":
        new: Poisson = self.__new__(type(self)) if _instance is None else _instance
        new.log_rate = self.log_rate.expand(batch_shape)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value, log_rate = value.double(), self.log_rate.double()
        return (value * log_rate - log_rate.exp() - torch.lgamma(value + 1)).to(self.log_rate.dtype)

    @property
    def log_positive(self) -> Tensor:
        """``log P(x > 0)``."""
        return _log_arrival_probability(self.log_rate)

    def sample_positive(self) -> Tensor:
        """Draw counts conditional on being above 0."""
        return 1 + torch.poisson(_rate_after_first(self.rate))


class Binomial(dist.Binomial):
    """Pyro's binomial distribution, given logits and one number of trials, even above 2^24 (single precision)."""

    def __init__(self, trials: int, logits: Tensor, validate_args: bool | None = None) -> None:
        self.trials = trials
        super().__init__(trials, logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Binomial":
        new: Binomial = self.__new__(type(self)) if _instance is None else _instance
        new.trials = self.trials
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value, logits, trials = value.double(), self.logits.double(), self.trials
        ways = math.lgamma(trials + 1) - torch.lgamma(value + 1) - torch.lgamma(trials - value + 1)
        return (ways + value * logits + trials * F.logsigmoid(-logits)).to(self.logits.dtype)

    @property
    def log_positive(self) -> Tensor:
        """``log P(x > 0)``."""
        return _log_arrival_probability(math.log(self.trials) + _log_softplus(self.logits))

    def sample_positive(self) -> Tensor:
        """Draw counts conditional on being above 0."""
        rate = _rate_after_first(self.trials * F.softplus(self.logits))
        return 1 + dist.Binomial(self.trials - 1, -torch.expm1(-rate / self.trials)).sample()


class NegativeBinomial(dist.NegativeBinomial):
    """Pyro's negative binomial distribution, parameterized by the logarithm of ``total_count`` and logits."""

    def __init__(self, log_count: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        self.log_count = log_count
        super().__init__(log_count.exp(), logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NegativeBinomial":
        new: NegativeBinomial = self.__new__(type(self)) if _instance is None else _instance
        new.log_count = self.log_count.expand(batch_shape)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value, count, logits = value.double(), self.log_count.double().exp(), self.logits.double()
        ways = torch.lgamma(value + count) - torch.lgamma(count) - torch.lgamma(value + 1)
        return (ways + value * logits + (value + count) * F.logsigmoid(-logits)).to(self.logits.dtype)

    @property
    def log_positive(self) -> Tensor:
        """``log P(x > 0)``."""
        return _log_arrival_probability(self.log_count + _log_softplus(self.logits))

    def sample_positive(self) -> Tensor:
        """Draw counts conditional on being above 0."""
        odds = torch.expm1(_rate_after_first(self.total_count * F.softplus(self.logits)) / self.total_count)
        return 1 + torch.poisson(odds * dist.Gamma(self.total_count + 1, 1.0).sample())


def _log_arrival_probability(log_rate: Tensor) -> Tensor:
    """``log(1 - e^-t)``, the log-probability that a Poisson process of rate t has an arrival, given log t."""
    rare = log_rate < -40  # where t / 2 is below the rounding error of 1
    return torch.where(rare, log_rate, log_one_minus_exp(-log_rate.clamp(min=-40).exp()))


def _log_softplus(x: Tensor) -> Tensor:
    """``log log(1 + e^x)``."""
    return torch.where(x < -40, x, F.softplus(x.clamp(min=-40)).log())


def log_one_minus_exp(a: Tensor) -> Tensor:
    """``log(1 - e^a)`` for a below 0; it and its gradient are exact to rounding (Mächler, 2012)."""
    near, far = a.clamp(min=-math.log(2)), a.clamp(max=-math.log(2))
    return torch.where(a < -math.log(2), torch.log1p(-far.exp()), torch.log(-torch.expm1(near)))


def _rate_after_first(rate: Tensor) -> Tensor:
    """Draw the rate that remains after the first arrival of a Poisson process, conditional on an arrival.

    Each distribution of counts here is a process in time whose first arrival is the first arrival of a Poisson
    process. The number of later arrivals is Poisson, binomial with one trial less, or negative binomial with a
    ``total_count`` larger by 1, over the remaining time. Thus counts above 0 are drawn without rejection, however rare
    they are.
    """
    return (rate + torch.log1p(torch.rand_like(rate) * torch.expm1(-rate))).clamp(min=0)


class _WithZeros(dist.TorchDistribution):
    """Base class of counts with extra zeros: logits of an extra zero, and counts in double precision."""

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012  (torch's own name and kind)

    def __init__(self, logits: Tensor, counts: Any, validate_args: bool | None = None) -> None:
        self.logits, self.counts = logits, counts
        super().__init__(torch.broadcast_shapes(logits.shape, counts.batch_shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = type(self)(self.logits.expand(batch_shape), self.counts.expand(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return self.counts.support

    @property
    def log_no_extra(self) -> Tensor:
        """The log-probability of no extra zero."""
        return F.logsigmoid(-self.logits.double())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_positive = self.log_no_extra + self.counts.log_prob(value.double()) + self._log_factor
        return torch.where(value == 0, self._log_zero, log_positive).to(self.logits.dtype)

    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            zero = torch.rand(shape, device=self.logits.device, dtype=torch.float64) < self.logits.double().sigmoid()
            return torch.where(zero, 0.0, self._draw(shape)).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        return (self.log_no_extra.exp() * self._moments[0]).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        mean, square = self._moments
        no_extra = self.log_no_extra.exp()
        return (no_extra * (square - no_extra * mean**2)).to(self.logits.dtype)


class ZeroInflated(_WithZeros):
    """Zero with the probability that the logits give, otherwise a count, which may be zero too."""

    _log_factor = 0.0

    @property
    def _log_zero(self) -> Tensor:
        """``log(π + (1 - π) p(0))``, computed as ``log(1 - (1 - π) P(x > 0))`` where the probability is near 1."""
        log_positive = self.log_no_extra + self.counts.log_positive
        log_sum = torch.logaddexp(F.logsigmoid(self.logits.double()), self.log_no_extra + self._log_zero_count)
        return torch.where(log_positive < -0.5, log_one_minus_exp(log_positive.clamp(max=-0.5)), log_sum)

    @property
    def _log_zero_count(self) -> Tensor:
        return self.counts.log_prob(torch.zeros_like(self.counts.mean))

    def _draw(self, shape: torch.Size) -> Tensor:
        return self.counts.expand(shape).sample()

    @property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the mean square of the counts."""
        mean = self.counts.mean
        return mean, self.counts.variance + mean**2


class Hurdle(_WithZeros):
    """Zero with the probability that the logits give, otherwise a count above 0."""

    @property
    def _log_zero(self) -> Tensor:
        return F.logsigmoid(self.logits.double())

    @property
    def _log_factor(self) -> Tensor:
        return -self.counts.log_positive

    def _draw(self, shape: torch.Size) -> Tensor:
        return self.counts.expand(shape).sample_positive()

    @property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the mean square of the counts above 0."""
        least = torch.finfo(torch.float64).tiny  # if the rate underflows, the count above 0 is 1
        positive, mean = self.counts.log_positive.exp().clamp(min=least), self.counts.mean.clamp(min=least)
        return mean / positive, (self.counts.variance.clamp(min=least) + mean**2) / positive
