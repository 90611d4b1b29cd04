"""Distributions of categorical latents: Gumbel-Softmax as log-ratios, and one-hot."""

import itertools
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

EMPTY = torch.Size()


class GumbelSoftmax(dist.TorchDistribution):
    """Relaxed categorical variables, as log-ratios to the last category.

    .. math:: y_k = (l_k + g_k - l_K - g_K) / \\tau, \\qquad
        \\log p(y) = \\log (K - 1)! + (K - 1) \\log \\tau + \\sum_{k=1}^K \\log \\mathrm{softmax}(l - \\tau y)_k

    with y_K = 0 and independent Gumbel variables g. ``softmax(y)`` has the Concrete distribution. Log-ratios and their
    densities do not underflow, unlike those on the simplex.

    Args:
        logits: l, shape ``(*batch, variables, K)``.
        temperature: τ, above 0.

    References:
        | The Concrete Distribution (Maddison, Mnih & Teh, 2017), https://arxiv.org/abs/1611.00712
        | Categorical Reparameterization with Gumbel-Softmax (Jang, Gu & Poole, 2017), https://arxiv.org/abs/1611.01144

    Example:
        >>> d = GumbelSoftmax(torch.zeros(5, 2, 4), 0.5)
        >>> d.batch_shape, d.event_shape, d.rsample().shape
        (torch.Size([5]), torch.Size([6]), torch.Size([5, 6]))
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 2)}  # noqa: RUF012  (torch's own)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, validate_args: bool | None = None) -> None:
        self.logits, self.temperature = logits, temperature
        *batch, variables, categories = logits.shape
        super().__init__(torch.Size(batch), torch.Size([variables * (categories - 1)]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GumbelSoftmax":
        logits = self.logits.expand(*batch_shape, *self.logits.shape[-2:])
        return _validating_like(self, GumbelSoftmax(logits, self.temperature, validate_args=False))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        last = self.logits.shape[-1] - 1
        ratios = torch.nn.functional.pad(value.unflatten(-1, (-1, last)), (0, 1))
        each = (self.logits - self.temperature * ratios).log_softmax(-1).sum(-1)
        return (each + math.lgamma(last + 1) + last * math.log(self.temperature)).sum(-1)

    def rsample(self, sample_shape: Any = EMPTY) -> Tensor:
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        u = torch.rand_like(logits).clamp(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps)
        return self._ratios(logits - torch.log(-u.log())) / self.temperature

    @property
    def mean(self) -> Tensor:
        return self._ratios(self.logits) / self.temperature

    @property
    def variance(self) -> Tensor:
        """The variance of the logistic distribution, that of a difference of two Gumbel variables."""
        return torch.full_like(self.mean, math.pi**2 / 3 / self.temperature**2)

    def _ratios(self, logits: Tensor) -> Tensor:
        return (logits[..., :-1] - logits[..., -1:]).flatten(-2)


class OneHots(dist.TorchDistribution):
    """Categorical variables as concatenated one-hot vectors.

    Args:
        logits: shape ``(*batch, variables, K)``.

    Example:
        >>> d = OneHots(torch.zeros(5, 2, 4))
        >>> d.batch_shape, d.event_shape, d.enumerate_support().shape
        (torch.Size([5]), torch.Size([8]), torch.Size([16, 5, 8]))
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 2)}  # noqa: RUF012  (torch's own)
    support = constraints.independent(constraints.boolean, 1)
    has_enumerate_support = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        *batch, variables, categories = logits.shape
        super().__init__(torch.Size(batch), torch.Size([variables * categories]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OneHots":
        return _validating_like(self, OneHots(self.logits.expand(*batch_shape, *self.logits.shape[-2:]), False))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value.unflatten(-1, self.logits.shape[-2:]) * self.logits.log_softmax(-1)).sum((-1, -2))

    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        with torch.no_grad():
            return dist.OneHotCategorical(logits=self.logits).sample(torch.Size(sample_shape)).flatten(-2)

    @property
    def mean(self) -> Tensor:
        """The probability of each category."""
        return self.logits.softmax(-1).flatten(-2)

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 - self.mean)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All combinations of categories, shape ``(K^variables, *batch, event)``."""
        variables, categories = self.logits.shape[-2:]
        each = torch.eye(categories, dtype=self.logits.dtype, device=self.logits.device)
        codes = list(itertools.product(range(categories), repeat=variables))
        values = each[torch.tensor(codes, device=each.device)].flatten(1)
        values = values.reshape(-1, *[1] * len(self.batch_shape), values.shape[-1])
        return values.expand(-1, *self.batch_shape, -1) if expand else values


def _validating_like(old: Any, new: Any) -> Any:
    """Set the validation flag of a distribution to that of another."""
    new._validate_args = old._validate_args
    return new
