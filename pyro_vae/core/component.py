"""Components of a VAE (modules that return distributions), and helpers that call them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self, TypeAlias

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae.core.param_store import Picklable
from pyro_vae.core.threads import threads_for_evaluations
from pyro_vae.core.validation import python_number
from pyro_vae.errors import ModelError

Distribution: TypeAlias = TorchDistributionMixin


class Conditional(Picklable, ABC):
    """Base class of the components of a VAE: ``() → p(z)``, ``z → p(x|z)`` or ``x → q(z|x)``.

    Subclasses implement ``forward``, which maps an input of shape ``(*batch, features)`` to a
    ``pyro.distributions`` object of batch shape ``(*batch)``.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> class Laplace(Conditional):
        ...     def forward(self):
        ...         return dist.Laplace(torch.zeros(3), 1.0).to_event(1)
        >>> Laplace()().event_shape
        torch.Size([3])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the constructor arguments, which saved files describe; copies keep them."""
        part = super().__new__(cls)
        args, kwargs = tuple(map(python_number, args)), {name: python_number(v) for name, v in kwargs.items()}
        vars(part)["_made_of"] = args, kwargs
        return part

    def _forget(self, given: Any, instead: Any) -> None:
        """Replace a large constructor argument by an equivalent small one in the record."""
        args, kwargs = vars(self)["_made_of"]
        args = tuple(instead if value is given else value for value in args)
        kwargs = {name: instead if value is given else value for name, value in kwargs.items()}
        vars(self)["_made_of"] = args, kwargs

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Distribution:
        """Return the distribution, given nothing, z or x."""

    @classmethod
    def outputs(cls, size: int) -> int:
        """Return the number of network outputs for an event of ``size`` features."""
        return size


def distribution(part: nn.Module, role: str, *given: Any) -> Distribution:
    """Call a component and validate that it returns a Pyro distribution."""
    result = part(*given)
    if isinstance(result, TorchDistributionMixin):
        return result
    kind = f"{type(result).__module__}.{type(result).__qualname__}"
    raise ModelError(f"the {role} returned {kind}; return an object of pyro.distributions, which pyro.sample needs")


def join(given: Tensor, context: Tensor | None) -> Tensor:
    """Concatenate the input of a network, shape ``(*batch, features)``, and its context.

    Example:
        >>> join(torch.zeros(7, 5, 3), torch.ones(5, 2)).shape
        torch.Size([7, 5, 5])
    """
    if context is None:
        return given
    return torch.cat([given, context.to(given).expand(*given.shape[:-1], context.shape[-1])], -1)


def at_least_single(out: Tensor) -> Tensor:
    """Convert 16-bit network outputs to single precision, in which densities are computed.

    Example:
        >>> at_least_single(torch.zeros(2, dtype=torch.bfloat16)).dtype, at_least_single(torch.zeros(2).double()).dtype
        (torch.float32, torch.float64)
    """
    return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


def as_taken(net: nn.Module, given: Tensor) -> Tensor:
    """Convert an input to the precision of a 16-bit network; draws of a posterior have more.

    Example:
        >>> as_taken(nn.Linear(2, 2).bfloat16(), torch.zeros(2)).dtype, as_taken(nn.Linear(2, 2), torch.zeros(2)).dtype
        (torch.bfloat16, torch.float32)
    """
    dtype = next((p.dtype for p in net.parameters()), given.dtype)
    return given.to(dtype) if dtype in (torch.bfloat16, torch.float16) else given


def masked(likelihood: Distribution, mask: Tensor) -> Distribution:
    """Leave missing features, where ``mask`` is false, out of a likelihood: they integrate to one.

    Raises:
        ModelError: if the features of the likelihood are not independent.

    Example:
        >>> import pyro.distributions as dist
        >>> d = masked(dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), torch.tensor([True, False, True]))
        >>> whole = dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)
        >>> torch.allclose(d.log_prob(torch.ones(4, 3)), whole.log_prob(torch.ones(4, 2)))
        True
    """
    if not isinstance(likelihood, torch.distributions.Independent):
        raise ModelError(
            f"missing values need a likelihood of independent features; the decoder returns a "
            f"{type(likelihood).__name__}"
        )
    return likelihood.base_dist.mask(mask).to_event(likelihood.reinterpreted_batch_ndims)


def observed(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set missing values to 0, which every likelihood accepts and the mask leaves unscored."""
    return x if mask is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def as_encoded(encoder: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Set missing values to 0, or to the center if the encoder standardizes."""
    center = getattr(encoder, "center", None)
    return observed(x, mask) if mask is None or center is None else torch.where(mask, x, center)


def infer(encoder: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Distribution:
    """Return ``q(z|x)``.

    The encoder sees 0 in place of a missing value (the center, if it standardizes), and the mask if it has
    ``takes_mask``.

    Example:
        >>> import pyro_vae as pv
        >>> infer(pv.posteriors.DiagNormal(nn.Linear(3, 4)), torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """
    given: tuple[Tensor | None, ...] = () if context is None else (context,)
    if mask is not None and getattr(encoder, "takes_mask", False):
        given = (context, mask)
    return distribution(encoder, "encoder", as_encoded(encoder, x, mask), *given)


@contextlib.contextmanager
def evaluating(module: nn.Module, evaluations: int | None = None) -> Iterator[None]:
    """Put a module into evaluation mode inside: no dropout, no update of running means.

    Args:
        module: the module to evaluate.
        evaluations: the number of data times draws per forward pass, if known; a small evaluation uses one thread
            (:func:`~pyro_vae.core.threads.threads_for_evaluations`).

    Example:
        >>> layer = nn.Dropout(0.9)
        >>> with evaluating(layer):
        ...     layer(torch.ones(3))
        tensor([1., 1., 1.])
    """
    were_training = [part for part in module.modules() if part.training]
    module.eval()
    threads = (
        contextlib.nullcontext() if evaluations is None else threads_for_evaluations(module.parameters(), evaluations)
    )
    try:
        with threads:
            yield
    finally:
        for part in were_training:
            part.training = True
