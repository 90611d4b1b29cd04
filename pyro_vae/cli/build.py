"""Build VAEs from settings, with networks of the right width, and name their components."""

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
"""A function that makes a component, and the settings it came from."""


def build(settings: Namespace, train: Data, most: int | None = None) -> VAE:
    """Build the VAE that the settings describe, with networks as wide as its components need.

    Args:
        settings: of ``pyro-vae fit``.
        train: the training data, for the number of columns and for components that are initialized from data.
        most: the memory limit in bytes; by default a quarter of the free memory, since training takes four times as
            much as the VAE.

    Raises:
        SettingsError: if a component or a network cannot be built from its settings.

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
    """Build the VAE with these components.

    Raises:
        SettingsError: if a component or a network cannot be built from its settings.
    """
    latents, hidden, features = settings.latent_dim, list(settings.hidden), train.x.shape[1]
    context_of = _contexts(settings, train)
    try:
        limit = AllocationLimit(free_memory() // 4 if most is None else most)
        with seeded(settings.seed, torch.device("cpu")), limit:
            made_prior = prior[0](_prior_argument(_class_of(prior), settings, train))
            decoder_net = _net(latents, hidden[::-1], _outputs(likelihood, features), context_of["decoder"])
            encoder_net = _net(features, hidden, _outputs(posterior, latents), context_of["encoder"])
            decoder = (likelihood[0] or learned_normal)(decoder_net)
            encoder = posterior[0](encoder_net)
            return VAE(prior=made_prior, decoder=decoder, encoder=encoder, standardize=_units(settings, train, decoder))
    except PyroVAEError:
        raise
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        sizes = f"latent_dim {latents} and hidden {hidden}"
        raise SettingsError(
            f"cannot build a VAE from these components ({first_line(error)}); change them, {sizes}"
        ) from error


def _units(settings: Namespace, train: Data, decoder: Likelihood) -> Standardize | None:
    """Return the standardization of the real columns, or None if there are none or it is switched off."""
    return units_for(decoder, train) if settings.standardize and train.image_shape is None else None


@dataclass(frozen=True)
class Context:
    """The context of a network.

    Args:
        size: the number of context values, 0 without a context.
        seen: whether the network sees the context.
        units: the standardization of the context; None for raw values.
    """

    size: int
    seen: bool
    units: Standardize | None


def _contexts(settings: Namespace, train: Data) -> dict[str, Context]:
    """Return the context of each network."""
    networks, chosen = ("encoder", "decoder"), as_list(settings.context_to) or []
    if not chosen or {*chosen} - {*networks}:
        raise SettingsError(
            f"context_to is {settings.context_to!r}; name encoder, decoder or both (the prior ContextNormal always "
            "takes the context)"
        )
    size = 0 if train.context is None else train.context.shape[1]
    units = context_units(train) if settings.standardize else None
    return {name: Context(size, name in chosen, units) for name in networks}


def _net(features: int, hidden: list[int], outputs: int, context: Context) -> Module:
    """Build a network that standardizes its context, or drops it if the network must not see it."""
    net = nn.mlp(features + context.size * context.seen, hidden, outputs)
    if not context.size:
        return net
    if not context.seen:
        return nn.WithoutContext(net, features)
    return net if context.units is None else nn.StandardizedContext(net, features, context.units)


def _prior_argument(cls: Any, settings: Namespace, train: Data) -> Any:
    """Return the argument of a class of priors: the number of latents, the data, or a network of the context."""
    if getattr(cls, "takes_data", False):
        return train
    if not (isinstance(cls, type) and issubclass(cls, ContextNormal)):
        return settings.latent_dim
    if train.context is None:
        raise SettingsError(f"the prior {cls.__name__} depends on a context; name its columns with --context")
    units = context_units(train) if settings.standardize else None
    return _net(0, list(settings.hidden), 2 * settings.latent_dim, Context(train.context.shape[1], True, units))


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the type of the error if it has no message.

    Example:
        >>> first_line(MemoryError())
        'MemoryError'
    """
    return (str(error).splitlines() or [type(error).__name__])[0]


def _class_of(part: Part) -> Any:
    if part[1] is None:
        return class_of(learned_normal)
    return part[1] if isinstance(part[1], type) else _import_class(part[1].class_path)  # a type is a default


def _import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _outputs(part: Part, size: int) -> int:
    """Count the outputs that a component needs from its network."""
    # The maker holds the arguments of the class; the settings of the parser may still name classes in their place.
    return count_outputs(part[0], size, cls=_class_of(part))


def names_of(parts: Sequence[Part], among: str) -> list[str]:
    """Name components by class and settings that differ from the defaults; equal class names get their module.

    Raises:
        SettingsError: if two components have the same name.

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
    arguments = part[1].get("init_args", Namespace()) if isinstance(part[1], Namespace) else Namespace()
    return (f"{cls.__module__}.{cls.__qualname__}" if path else cls.__name__) + _format_arguments(cls, vars(arguments))


def _format_arguments(cls: Any, arguments: dict[str, Any]) -> str:
    """Format the arguments that differ from the defaults of a class."""
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    changed = [f"{name}={_format(value)}" for name, value in arguments.items() if value != defaults.get(name)]
    return f"({', '.join(changed)})" if changed else ""


def _format(value: Any) -> str:
    """Format an argument; it may name classes itself, as the blocks of Blocks do."""
    if isinstance(value, Namespace) and "class_path" in value:
        return _name_of((None, value))
    return f"[{', '.join(map(_format, value))}]" if isinstance(value, list | tuple) else str(value)
