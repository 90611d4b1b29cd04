"""VAEs made of settings: their parts, as wide as they must be, and what a part is called."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from torch.nn import Module

from pyro_vae import nn
from pyro_vae.cli.settings import instances
from pyro_vae.core.allocation import AllocationLimit
from pyro_vae.core.device import seeded
from pyro_vae.core.standardize import Standardize
from pyro_vae.core.vae import VAE
from pyro_vae.data.limits import free_memory
from pyro_vae.data.memory import as_list
from pyro_vae.data.spread import context_units, units_for
from pyro_vae.data.values import Data
from pyro_vae.errors import PyroVAEError, SettingsError
from pyro_vae.likelihoods import Likelihood, Normal
from pyro_vae.priors import ContextNormal
from pyro_vae.use.makers import class_of, count_outputs, learned_normal

Part = tuple[Any, Namespace | type | None]
"""A maker of a part, and the settings it was made of."""


def build(settings: Namespace, train: Data, most: int | None = None) -> VAE:
    """The VAE that the settings describe, its networks as wide as its parts need them.

    Args:
        settings: of ``pyro-vae fit``.
        train: the data, for their width and for parts that start from them.
        most: bytes that it may take; by default a quarter of the free memory, since training takes four times as much.

    Raises:
        SettingsError: if a part or a network cannot be made of its settings.

    Example:
        >>> from pyro_vae.cli.settings import training
        >>> settings = training().parse_args(["--data", "x.npy", "--out", "run", "--latent_dim", "3"])
        >>> build(settings, Data(torch.randn(4, 10))).prior()
        Independent(Normal(loc: torch.Size([3]), scale: torch.Size([3])), 1)
    """
    made = instances(settings)
    prior, likelihood, posterior = ((made[name], settings[name]) for name in ("prior", "likelihood", "posterior"))
    return assemble(settings, train, prior, likelihood, posterior, most)


def assemble(
    settings: Namespace, train: Data, prior: Part, likelihood: Part, posterior: Part, most: int | None = None
) -> VAE:
    """The VAE of these parts.

    Raises:
        SettingsError: if a part or a network cannot be made of its settings.
    """
    latents, hidden, features = settings.latent_dim, list(settings.hidden), train.x.shape[1]
    given = _contexts(settings, train)
    try:
        limit = AllocationLimit(free_memory() // 4 if most is None else most)
        with seeded(settings.seed, torch.device("cpu")), limit:
            made_prior = prior[0](_of_prior(_class_of(prior), settings, train))
            decoder_net = _net(latents, hidden[::-1], _outputs(likelihood, features), given["decoder"])
            encoder_net = _net(features, hidden, _outputs(posterior, latents), given["encoder"])
            decoder = (likelihood[0] or learned_normal)(decoder_net)
            encoder = posterior[0](encoder_net)
            return VAE(prior=made_prior, decoder=decoder, encoder=encoder, standardize=_units(settings, train, decoder))
    except PyroVAEError:
        raise
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        sizes = f"latent_dim {latents} and hidden {hidden}"
        raise SettingsError(f"no VAE can be made of these parts ({first_line(error)}); change them, {sizes}") from error


def _units(settings: Namespace, train: Data, decoder: Likelihood) -> Standardize | None:
    """The units of the columns, if they are to be standardized and some are of real numbers."""
    return units_for(decoder, train) if settings.standardize and train.image_shape is None else None


@dataclass(frozen=True)
class Context:
    """The context of a network.

    Args:
        size: how many numbers it has, 0 where there is none.
        seen: whether the network sees them.
        units: in which it sees them; as they are, if not given.
    """

    size: int
    seen: bool
    units: Standardize | None


def _contexts(settings: Namespace, train: Data) -> dict[str, Context]:
    """The context of each network."""
    networks, asked = ("encoder", "decoder"), as_list(settings.context_to) or []
    if not asked or {*asked} - {*networks}:
        raise SettingsError(
            f"context_to is {settings.context_to!r}; name encoder, decoder or both (the prior ContextNormal always "
            "takes the context)"
        )
    size = 0 if train.context is None else train.context.shape[1]
    units = context_units(train) if settings.standardize else None
    return {name: Context(size, name in asked, units) for name in networks}


def _net(features: int, hidden: list[int], outputs: int, context: Context) -> Module:
    """A network that sees the context in standard units; one that is not to see it drops it."""
    net = nn.mlp(features + context.size * context.seen, hidden, outputs)
    if not context.size:
        return net
    if not context.seen:
        return nn.WithoutContext(net, features)
    return net if context.units is None else nn.StandardizedContext(net, features, context.units)


def _of_prior(cls: Any, settings: Namespace, train: Data) -> Any:
    """What a class of priors is made of: the number of latents, data, or a network of the context."""
    if getattr(cls, "takes_data", False):
        return train
    if not (isinstance(cls, type) and issubclass(cls, ContextNormal)):
        return settings.latent_dim
    if train.context is None:
        raise SettingsError(f"the prior {cls.__name__} depends on a context; name its columns with --context")
    units = context_units(train) if settings.standardize else None
    return _net(0, list(settings.hidden), 2 * settings.latent_dim, Context(train.context.shape[1], True, units))


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing.

    Example:
        >>> first_line(MemoryError())
        'MemoryError'
    """
    return (str(error).splitlines() or [type(error).__name__])[0]


def _class_of(part: Part) -> Any:
    if part[1] is None:
        return class_of(learned_normal)
    return part[1] if isinstance(part[1], type) else _found(part[1].class_path)  # a type is a default


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _outputs(part: Part, size: int) -> int:
    """How many numbers the network of a part gives, as its class and its settings say."""
    # The maker holds the settings as the class is given them, where those of the parser still name classes.
    return count_outputs(part[0], size, cls=_class_of(part))


def names_of(parts: Sequence[Part], among: str) -> list[str]:
    """What parts are called: by their class, by the path of that where it would not do, and their own settings.

    Raises:
        SettingsError: if two are the same.

    Example:
        >>> names_of([(None, None)], "likelihoods")
        ['Normal(learn_scale=True)']
    """
    short = [_name_of(part) for part in parts]
    names = [_name_of(p, path=short.count(name) > 1) for p, name in zip(parts, short, strict=True)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"{among} holds {twice} twice; leave one out")
    return names


def _name_of(part: Part, *, path: bool = False) -> str:
    if part[1] is None:
        return f"{Normal.__name__}(learn_scale=True)"
    cls = _class_of(part)
    given = part[1].get("init_args", Namespace()) if isinstance(part[1], Namespace) else Namespace()
    return (f"{cls.__module__}.{cls.__qualname__}" if path else cls.__name__) + _own(cls, vars(given))


def _own(cls: Any, given: dict[str, Any]) -> str:
    """The settings that are not the defaults of a class."""
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    own = ", ".join(f"{name}={_said(value)}" for name, value in given.items() if value != defaults.get(name))
    return f"({own})" if own else ""


def _said(value: Any) -> str:
    """A setting in words; it may name classes itself, as that of blocks does."""
    if isinstance(value, Namespace) and "class_path" in value:
        return _name_of((None, value))
    return f"[{', '.join(map(_said, value))}]" if isinstance(value, list | tuple) else str(value)
