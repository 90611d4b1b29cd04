"""Zuko's flows as Pyro distributions."""

from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import ModelError

MEAN_DRAWS = 256
"""The number of draws that estimate the mean of a flow, which has no closed form, for figures."""


class FlowDistribution(ZukoToPyro):
    """A flow with a mean, and without Pyro's cache of log-densities, which grows with each sample."""

    support = constraints.real_vector

    @property
    def has_rsample(self) -> bool:
        """Whether samples are reparameterized; zuko ignores the base of the flow."""
        base: Any = getattr(self.dist, "base", self.dist)
        return bool(self.dist.has_rsample and base.has_rsample)

    def __call__(self, shape: Any = ()) -> Tensor:
        return self.rsample(shape) if self.has_rsample else self.sample(shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.dist.rsample(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.dist.sample(torch.Size(sample_shape))

    def log_prob(self, x: Tensor) -> Tensor:
        """Score values that broadcast against the batch; zuko's transforms do not broadcast."""
        return self.dist.log_prob(x.expand(torch.broadcast_shapes(x.shape, self.batch_shape + self.event_shape)))

    def expand(self, batch_shape: Any, *_: Any) -> "FlowDistribution":
        return FlowDistribution(self.dist.expand(torch.Size(batch_shape)))

    @property
    def mean(self) -> Tensor:
        """A Monte-Carlo estimate that leaves the global generator unchanged."""
        return self._draws().mean(0)

    @property
    def variance(self) -> Tensor:
        """A Monte-Carlo estimate that leaves the global generator unchanged."""
        return self._draws().var(0)

    def _draws(self) -> Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return self.dist.sample((MEAN_DRAWS,))


def as_pyro(flow: Any, name: str) -> FlowDistribution:
    """Convert a zuko distribution to one for ``pyro.sample``.

    Raises:
        ModelError: if ``flow`` is not a distribution, or its support is not all real numbers.

    Example:
        >>> import zuko
        >>> as_pyro(zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2)), "mine").event_shape
        torch.Size([2])
    """
    if not isinstance(flow, torch.distributions.Distribution):
        raise ModelError(f"{name} does not return a distribution; use a zuko flow over the latents")
    base = flow
    while isinstance(inner := getattr(base, "base", None), torch.distributions.Distribution):
        base = inner
    if not _is_real(base):
        raise ModelError(
            f"the base of {name} has the support {base.support}, but the support of the latents is all real numbers; "
            "use a flow with a normal base, such as zuko.flows.NSF"
        )
    return FlowDistribution(flow)


def _is_real(base: torch.distributions.Distribution) -> bool:
    """Return whether the support of a distribution is all real numbers; assume so if it declares none."""
    try:
        support = base.support
    except NotImplementedError:
        return True
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))
