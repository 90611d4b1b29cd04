"""The base class of posteriors."""

from abc import abstractmethod

from torch import Tensor, nn

from pyro_vae.core.component import Conditional, Distribution, at_least_single, join
from pyro_vae.core.standardize import Standardizable


class Posterior(Conditional, Standardizable):
    """Base class of amortized posteriors: modules from ``x`` of shape ``(*batch, *features)`` to ``q(z|x)``.

    A subclass implements ``distribution``, which turns the network's outputs into q, and ``outputs``, their number.

    Args:
        net: the encoder network. Its input is x; with a context, the flattened x followed by the context.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> class Unit(Posterior):
        ...     def distribution(self, out):
        ...         return dist.Normal(out, 1.0).to_event(1)
        >>> Unit(nn.Linear(3, 2))(torch.zeros(4, 3)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @abstractmethod
    def distribution(self, out: Tensor) -> Distribution:
        """Return q, of batch shape ``(*batch)``, given the network's outputs of shape ``(*batch, outputs)``."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        return self.distribution(at_least_single(self.encoded(x, context)))

    def encoded(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the network's outputs at x, shape ``(*batch, outputs)``."""
        x = x if self.standardize is None else self.standardize(x)
        return self.net(join(x if context is None else x.flatten(context.dim() - 1), context))
