"""Three modules that return distributions, wired into a Pyro model and guide."""

import contextlib
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae.errors import DataError, ModelError, SettingsError

if TYPE_CHECKING:
    from pyro_vae.data.fingerprint import Trained

Distribution: TypeAlias = TorchDistributionMixin


class Conditional(nn.Module, ABC):
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


def store_name(module: nn.Module) -> str:
    """A name for Pyro's parameter store that no other module, copy or later module has."""
    if module not in _names:
        _forget_the_dead()
        _names[module] = name = f"{type(module).__name__.lower()}_{next(_numbers)}"
        weakref.finalize(module, _dead.append, name).atexit = False
    return _names[module]


_names: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_numbers = itertools.count()
_dead: list[str] = []


def _forget_the_dead() -> None:
    """Drop the parameters of collected modules, here and not in a finalizer, which may run anywhere."""
    store, dead = pyro.get_param_store(), {_dead.pop() for _ in range(len(_dead))}
    for name in [name for name in store if name.split("$$$")[0] in dead]:
        with contextlib.suppress(KeyError):  # two modules that shared a parameter: its reverse entry went before
            del store[name]


def register(module: nn.Module) -> None:
    """Tell Pyro of each trainable parameter of ``module``.

    ``pyro.module`` would hand a second module of the same name the first one's weights, and train
    those; here the name follows the module's identity and the store always holds its own tensors.
    """
    store, prefix = pyro.get_param_store(), store_name(module)
    for name, parameter in module.named_parameters():
        # torch.func puts plain tensors in the place of parameters; those are not Pyro's to train.
        if not (parameter.requires_grad and isinstance(parameter, nn.Parameter)):
            continue
        if not parameter.is_contiguous():
            raise ModelError(f"parameter {name} is not contiguous, so Pyro would train a copy; call .contiguous()")
        full = f"{prefix}$$${name}"
        if full in store and (store[full].unconstrained() is not parameter or store.param_name(parameter) is None):
            store[full] = parameter
        pyro.param(full, parameter)


def distribution(part: nn.Module, role: str, *given: Any) -> Distribution:
    """What ``part(*given)`` returns, if that is a Pyro distribution."""
    result = part(*given)
    if isinstance(result, TorchDistributionMixin):
        return result
    kind = f"{type(result).__module__}.{type(result).__qualname__}"
    raise ModelError(f"the {role} returned {kind}; return an object of pyro.distributions, as pyro.sample needs")


def data_plate(x: Tensor, size: int | None) -> pyro.plate:
    """The plate over data: ``len(x)`` rows that stand for ``size``, each scaled by size / len(x)."""
    if len(x) == 0:
        raise DataError("x holds no rows; give at least one")
    if size is not None and size < len(x):
        raise SettingsError(f"size is {size} but the batch has {len(x)} rows; size counts all data, so it is no less")
    return pyro.plate("data", len(x) if size is None else size, subsample=x)


def join(given: Tensor, context: Tensor | None) -> Tensor:
    """What a network is fed: ``given`` of shape ``(*batch, features)``, with its context behind it.

    Example:
        >>> join(torch.zeros(7, 5, 3), torch.ones(5, 2)).shape
        torch.Size([7, 5, 5])
    """
    if context is None:
        return given
    return torch.cat([given, context.to(given).expand(*given.shape[:-1], context.shape[-1])], -1)


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


def infer(encoder: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Distribution:
    """``q(z|x)``: the encoder sees 0 for what is missing; one with ``takes_mask`` is told what that is.

    Example:
        >>> import pyro_vae as pv
        >>> infer(pv.posteriors.DiagNormal(nn.Linear(3, 4)), torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """
    given: tuple[Tensor | None, ...] = () if context is None else (context,)
    if mask is not None and getattr(encoder, "takes_mask", False):
        given = (context, mask)
    return distribution(encoder, "encoder", observed(x, mask), *given)


class Generative(nn.Module):
    """The Pyro model ``p(z) p(x|z)``: call it with ``(x, size=None, context=None, mask=None)``; its parameters are Θ.

    Example:
        >>> import pyro_vae as pv, torch
        >>> decoder = pv.likelihoods.Normal(pv.nn.mlp(2, [], 3))
        >>> model = Generative(pv.priors.StandardNormal(2), decoder)
        >>> pyro.poutine.trace(model).get_trace(torch.zeros(5, 3)).nodes["z"]["value"].shape
        torch.Size([5, 2])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.prior, self.decoder = prior, decoder

    def forward(
        self, x: Tensor, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        register(self)
        given = () if context is None else (context,)
        with data_plate(x, size):
            z = pyro.sample("z", distribution(self.prior, "prior", *given))
            likelihood = distribution(self.decoder, "decoder", z, *given)
            if mask is not None:
                likelihood = masked(likelihood, mask)
            return pyro.sample("x", likelihood, obs=observed(x, mask))


class Inference(nn.Module):
    """The Pyro guide ``q(z|x)``: call it with ``(x, size=None, context=None, mask=None)``; its parameters are φ.

    Example:
        >>> import pyro_vae as pv, torch
        >>> guide = Inference(pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4)))
        >>> guide(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, x: Tensor, size: int | None = None, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        register(self)
        with data_plate(x, size):
            return pyro.sample("z", infer(self.encoder, x, context, mask))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode inside, so that looking at it neither drops out nor moves running means.

    Example:
        >>> layer = nn.Dropout(0.9)
        >>> with evaluating(layer):
        ...     layer(torch.ones(3))
        tensor([1., 1., 1.])
    """
    were_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in were_training:
            part.training = True


class VAE(nn.Module):
    """A variational autoencoder: a prior, a decoder and an encoder, each a module that returns a distribution.

    .. math:: p(x, z) = p(z)\\, p(x | z), \\qquad q(z | x)

    ``vae.model`` and ``vae.guide`` are Pyro callables of ``(x, size=None, context=None, mask=None)``
    with sites ``z`` and ``x`` in the plate ``data``; with ``size`` every datum counts ``size / len(x)``
    times. A ``context`` of shape ``(datum, c)`` is handed to prior, decoder and encoder as their last
    argument (a conditional VAE); through Pyro's handlers it goes by position, since they have an
    argument of that name themselves. Where ``mask`` is false a feature is missing: it leaves the
    likelihood, and the encoder sees 0 (and the mask as its third argument, if it has ``takes_mask``).

    They are modules too: ``vae.model.parameters()`` are the generative Θ, ``vae.guide.parameters()``
    the inference φ. Any number of VAEs, deep copies included, train in one process.

    Args:
        prior: ``() → p(z)``, event shape ``(latent,)``.
        decoder: ``z → p(x|z)``, from ``(*batch, latent)`` to event shape ``(*features)``.
        encoder: ``x → q(z|x)``, from ``(*batch, *features)`` to event shape ``(latent,)``.

    A prior or encoder that needs another part has a method ``bind(vae)``, called when the VAE is made.

    Raises:
        ModelError: if a part is not a ``torch.nn.Module``.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv, torch
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5), scale=0.5),
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 2 * 2)),
        ... )
        >>> vae.encoder(torch.zeros(3, 5)).batch_shape, vae.prior().event_shape
        (torch.Size([3]), torch.Size([2]))
    """

    trained_on: "Trained | None" = None
    """What :func:`pyro_vae.fit` trained it on, as hashes; no part of its state."""

    def __init__(self, *, prior: nn.Module, decoder: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        for role, part in {"prior": prior, "decoder": decoder, "encoder": encoder}.items():
            if not isinstance(part, nn.Module):
                raise ModelError(
                    f"the {role} is a {type(part).__name__}; it must be a torch.nn.Module that returns a distribution"
                )
        self.model = Generative(prior, decoder)
        self.guide = Inference(encoder)
        self._bind()

    def _bind(self) -> None:
        for part in (self.prior, self.encoder):
            if callable(bind := getattr(part, "bind", None)):
                bind(self)

    @property
    def prior(self) -> nn.Module:
        """``() → p(z)``."""
        return self.model.prior

    @property
    def decoder(self) -> nn.Module:
        """``z → p(x|z)``."""
        return self.model.decoder

    @property
    def encoder(self) -> nn.Module:
        """``x → q(z|x)``."""
        return self.guide.encoder

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.Module stores modules before it looks at properties, so the parts are sent home here.
        home = {"prior": "model", "decoder": "model", "encoder": "guide"}.get(name)
        if home is None:
            super().__setattr__(name, value)
        else:
            setattr(getattr(self, home), name, value)
            self._bind()

    def like(self, x: Tensor) -> Tensor:
        """``x`` on the device and in the precision of the parameters (itself, where it is so already)."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        own = next((t for t in tensors if t.is_floating_point()), torch.empty(()))
        return x.to(own.device, own.dtype)

    @torch.no_grad()
    def check(self, x: Tensor, context: Tensor | None = None) -> None:
        """Refuse data that do not fit the parts, and parts that do not fit each other.

        Args:
            x: data, shape ``(datum, *features)``; the first two rows are tried, with 0 for what is not finite.
            context: shape ``(datum, c)``.

        Raises:
            ModelError: naming both sides that do not fit.
        """
        from pyro_vae.core.compatibility import check

        check(self, x, context)
