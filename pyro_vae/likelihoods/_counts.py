"""Distributions of counts, scored in double precision: their terms are of the size of the count, and cancel.

With a count and a mean of 1e8, ``x log r - r - log x!`` is -10 and its terms are 2e9, whose digits end at 100 in
single precision.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F


class Poisson(dist.Poisson):
    """Pyro's, given the logarithm of the rate."""

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


class Binomial(dist.Binomial):
    """Pyro's, given one number of trials, which may be more than single precision counts to, and logits."""

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
        ones, logits = value.double(), self.logits.double()
        zeros = self.trials - ones
        ways = math.lgamma(self.trials + 1) - torch.lgamma(ones + 1) - torch.lgamma(zeros + 1)
        return (ways + ones * F.logsigmoid(logits) + zeros * F.logsigmoid(-logits)).to(self.logits.dtype)


class NegativeBinomial(dist.NegativeBinomial):
    """Pyro's, given the logarithm of ``total_count``, and logits."""

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
        ways = log_rising(count, value) - torch.lgamma(value + 1)
        return (ways + value * F.logsigmoid(logits) + count * F.logsigmoid(-logits)).to(self.logits.dtype)


def log_rising(r: Tensor, x: Tensor) -> Tensor:
    """log Γ(r + x) - log Γ(r), whose gradient by r keeps its digits where r is much larger than x.

    .. math:: x \\log a + (a + x - \\tfrac12) \\log(1 + x / a) - x + S(a + x) - S(a) - \\log \\frac{P(r + x)}{P(r)}

    with Stirling's series S at a = r + 8, and :math:`P(r) = r (r + 1) \\cdots (r + 7)`.

    Args:
        r: above 0.
        x: at least 0.

    Example:
        >>> log_rising(torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)).exp()  # ½ · 1½
        tensor(0.7500, dtype=torch.float64)
    """
    a = r + 8
    main = x * a.log() + (a + x - 0.5) * torch.log1p(x / a) - x
    return main + _stirling(a + x) - _stirling(a) - torch.log(_product(r + x) / _product(r))


def _product(r: Tensor) -> Tensor:
    """r (r + 1) ⋯ (r + 7), with the factors r + i and r + 7 - i together."""
    t = r * (r + 7)
    return t * (t + 6) * (t + 10) * (t + 12)


def _stirling(a: Tensor) -> Tensor:
    """log Γ(a) - (a - ½) log a + a - ½ log 2π, of a from 8 on to 1e-13."""
    rate = 1 / a
    square = rate * rate
    series = 1 / 1260 - square * (1 / 1680 - square * (1 / 1188 - square * (691 / 360360 - square / 156)))
    return rate * (1 / 12 - square * (1 / 360 - square * series))
