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
        value, logits, trials = value.double(), self.logits.double(), self.trials
        ways = math.lgamma(trials + 1) - torch.lgamma(value + 1) - torch.lgamma(trials - value + 1)
        return (ways + value * logits + trials * F.logsigmoid(-logits)).to(self.logits.dtype)


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
        ways = torch.lgamma(value + count) - torch.lgamma(count) - torch.lgamma(value + 1)
        return (ways + value * logits + (value + count) * F.logsigmoid(-logits)).to(self.logits.dtype)
