"""A component of a VAE, a module whose call returns a distribution, and how it is called."""

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
    """A module whose call returns a distribution: ``() → p(z)``, ``z → p(x|z)`` or ``x → q(z|x)``.

    A member implements ``forward``. What it is given has shape ``(*batch, features)``; what it
    returns is a ``pyro.distributions`` object of batch shape ``(*batch)``.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> class Laplace(Conditional):
        ...     def forward(self):
        ...         return dist.Laplace(torch.zeros(3), 1.0).to_event(1)
        >>> Laplace()().event_shape
        torch.Size([3])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep what a part is made of, so that a file can tell it; copies keep it too."""
        part = super().__new__(cls)
        args, kwargs = tuple(map(python_number, args)), {name: python_number(v) for name, v in kwargs.items()}
        vars(part)["_made_of"] = args, kwargs
        return part

    def _forget(self, given: Any, instead: Any) -> None:
        """Keep, in the place of an argument that is large, one that the part can as well be made of."""
        args, kwargs = vars(self)["_made_of"]
        args = tuple(instead if value is given else value for value in args)
        kwargs = {name: instead if value is given else value for name, value in kwargs.items()}
        vars(self)["_made_of"] = args, kwargs

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Distribution:
        """The distribution, given nothing, z or x."""

    @classmethod
    def outputs(cls, size: int) -> int:
        """How many numbers the network must give for an event of ``size`` features."""
        return size


def distribution(part: nn.Module, role: str, *given: Any) -> Distribution:
    """What ``part(*given)`` returns, if that is a Pyro distribution."""
    result = part(*given)
    if isinstance(result, TorchDistributionMixin):
        return result
    kind = f"{type(result).__module__}.{type(result).__qualname__}"
    raise ModelError(f"the {role} returned {kind}; return an object of pyro.distributions, as pyro.sample needs")


def join(given: Tensor, context: Tensor | None) -> Tensor:
    """What a network is fed: ``given`` of shape ``(*batch, features)``, with its context behind it.

    Example:
        >>> join(torch.zeros(7, 5, 3), torch.ones(5, 2)).shape
        torch.Size([7, 5, 5])
    """
    if context is None:
        return given
    return torch.cat([given, context.to(given).expand(*given.shape[:-1], context.shape[-1])], -1)


def at_least_single(out: Tensor) -> Tensor:
    """A network's output, in single precision where it is coarser: densities are not computed in bfloat16.

    Example:
        >>> at_least_single(torch.zeros(2, dtype=torch.bfloat16)).dtype, at_least_single(torch.zeros(2).double()).dtype
        (torch.float32, torch.float64)
    """
    return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


def as_taken(net: nn.Module, given: Tensor) -> Tensor:
    """``given`` in the precision of a network of 16 bits; draws of a posterior are of more.

    Example:
        >>> as_taken(nn.Linear(2, 2).bfloat16(), torch.zeros(2)).dtype, as_taken(nn.Linear(2, 2), torch.zeros(2)).dtype
        (torch.bfloat16, torch.float32)
    """
    own = next((p.dtype for p in net.parameters()), given.dtype)
    return given.to(own) if own in (torch.bfloat16, torch.float16) else given


def masked(likelihood: Distribution, mask: Tensor) -> Distribution:
    """``likelihood`` without the features where ``mask`` is false: they are missing, and integrate to one.

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
            f"missing values need a likelihood of independent features, this is a {type(likelihood).__name__}"
        )
    return likelihood.base_dist.mask(mask).to_event(likelihood.reinterpreted_batch_ndims)


def observed(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with 0 in the place of what is missing, which every likelihood takes and none then scores."""
    return x if mask is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def as_encoded(encoder: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` as an encoder is given it: 0, or where it standardizes the center, in the place of what is missing."""
    center = getattr(encoder, "center", None)
    return observed(x, mask) if mask is None or center is None else torch.where(mask, x, center)


def infer(encoder: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Distribution:
    """``q(z|x)``: the encoder sees 0 (the center, where it standardizes) for what is missing; one with ``takes_mask``
    is told what that is.

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
    """``module`` in evaluation mode inside, so that looking at it neither drops out nor moves running means.

    Args:
        module: what is evaluated.
        evaluations: how many data, times draws of each, go through it at once, where that is known: a small evaluation
            is made by one thread (:func:`~pyro_vae.core.threads.threads_for_evaluations`).

    Example:
        >>> layer = nn.Dropout(0.9)
        >>> with evaluating(layer):
        ...     layer(torch.ones(3))
        tensor([1., 1., 1.])
    """
    were_training = [part for part in module.modules() if part.training]
    module.eval()
    known = (
        contextlib.nullcontext() if evaluations is None else threads_for_evaluations(module.parameters(), evaluations)
    )
    try:
        with known:
            yield
    finally:
        for part in were_training:
            part.training = True
