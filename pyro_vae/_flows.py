"""Zuko's flows as Pyro distributions."""

from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch import Tensor

MEAN_DRAWS = 256
"""A flow has no mean in closed form; this many draws estimate it, for figures."""


class FlowDistribution(ZukoToPyro):
    """A flow without Pyro's cache of log-densities, which grows with every sample, and with a mean."""

    support = constraints.real_vector

    def __call__(self, shape: Any = ()) -> Tensor:
        return self.rsample(shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.dist.rsample(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.dist.rsample(sample_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Of values that broadcast against the batch, which zuko's transforms do not do of themselves."""
        return self.dist.log_prob(x.expand(torch.broadcast_shapes(x.shape, self.batch_shape + self.event_shape)))

    def expand(self, batch_shape: Any, *_: Any) -> "FlowDistribution":
        return FlowDistribution(self.dist.expand(batch_shape))

    @property
    def mean(self) -> Tensor:
        """By Monte Carlo, with draws of its own that leave the global generator alone."""
        return self._draws().mean(0)

    @property
    def variance(self) -> Tensor:
        """By Monte Carlo, as the mean."""
        return self._draws().var(0)

    def _draws(self) -> Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return self.dist.sample((MEAN_DRAWS,))


def as_pyro(flow: torch.distributions.Distribution) -> FlowDistribution:
    """A zuko distribution as ``pyro.sample`` takes it."""
    return FlowDistribution(flow)
