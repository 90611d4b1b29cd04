"""Describe a VAE as classes and arguments, from which it can be rebuilt; a description holds no code."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.core.pair import Amortized
from pyro_vae.errors import DataError, SettingsError, type_of
from pyro_vae.train.checkpoint.rebuild import function_path, make_vae, named_tensors, path_of
from pyro_vae.train.checkpoint.tensor_file import Tree, decode, encode, same_bits

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NOT_COMPARED = {"_parameters", "_buffers", "_modules", "training", "_made_of", "_given", "trained_on"}


class _Undescribed(Exception):
    """An object has no description; the message says why."""


def describe_vae(vae: Amortized) -> tuple[Tree, str]:
    """Describe a VAE and verify that it can be rebuilt; return the description or None, and the reason for None."""
    describer = _Describer()
    try:
        tree = describer.vae(vae)
        again = make_vae(decode(*encode(tree)), dict(vae.state_dict()), describer.classes)
    except (_Undescribed, DataError, SettingsError) as error:
        return None, str(error)
    why = _difference(vae, again)
    return (None, why) if why else (tree, "")


def describe_again(vae: Amortized) -> Tree:
    """Describe a VAE without verifying the description; return None if it has none."""
    try:
        return _Describer().vae(vae)
    except _Undescribed:
        return None


def unsaved(module: nn.Module) -> dict[str, Tensor]:
    """Collect the non-persistent buffers, which ``state_dict()`` omits, under each of their names."""
    saved = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers(remove_duplicate=False) if name not in saved}


class _Describer:
    """Describe modules as classes and arguments; a repeated module is described by its number."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.classes: set[Any] = set()

    def vae(self, vae: Amortized) -> Tree:
        return {
            "made": self.module(vae, "vae"),
            "buffers": unsaved(vae),
            "frozen": [name for name, p in vae.named_parameters(remove_duplicate=False) if not p.requires_grad],
            "evaluating": [name for name, part in vae.named_modules(remove_duplicate=False) if not part.training],
        }

    def module(self, module: nn.Module, where: str) -> Tree:
        if id(module) in self.known:
            return {"same": self.known[id(module)]}
        described = {"class": self._path(type(module)), **self._contents(module, where)}
        self.known[id(module)] = len(self.known)
        return described

    def _path(self, cls: Any) -> str:
        self.classes.add(cls)
        return path_of(cls)

    def _maker(self, function: Any, where: str) -> str:
        """Return the path of a class or function; ``load`` needs the user's own functions in ``classes``."""
        if isinstance(function, type):
            return self._path(function)
        if path := function_path(function):
            return path
        if not inspect.isfunction(function) or "<" in function.__qualname__:
            name = getattr(function, "__qualname__", type(function).__name__)
            raise _Undescribed(f"{where} is the function {name}, which has no description")
        return self._path(function)

    def _contents(self, module: nn.Module, where: str) -> dict[str, Tree]:
        if type(module) in CONTAINERS:
            return {"modules": self._values(module._modules, where)}
        if path_of(type(module)).startswith("zuko."):
            return self._flow(module, where)
        return {"arguments": self._values(_arguments(module, where), where)}

    def _flow(self, module: nn.Module, where: str) -> dict[str, Tree]:
        """Describe a zuko module by its attributes, as it does not store its constructor's arguments."""
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        return {
            "attributes": self._values(attributes, where),
            "parameters": dict(module._parameters),
            "buffers": dict(module._buffers),
            "unsaved": sorted(module._non_persistent_buffers_set),
            "modules": self._values(module._modules, where),
        }

    def _values(self, values: dict[str, Any], where: str) -> dict[str, Tree]:
        return {name: self.value(value, f"{where}.{name}") for name, value in values.items()}

    def value(self, value: Any, where: str) -> Tree:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str | Tensor):
            return value
        if isinstance(value, nn.Module):
            return {"module": self.module(value, where)}
        if isinstance(value, type):
            return {"class": self._path(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if type(value) is partial:
            given = self.value(list(value.args), where), self._items(value.keywords, where)
            return {"partial": [self._maker(value.func, where), *given]}
        if (path := function_path(value)) or inspect.isfunction(value):
            return {"function": path or self._maker(value, where)}
        if type(value) in (tuple, torch.Size):
            return {"tuple": self.value(list(value), where)}
        if type(value) is list:
            return [self.value(item, where) for item in value]
        if type(value) in (dict, OrderedDict):
            return {"dict": self._items(value, where)}
        name = getattr(value, "__qualname__", None)
        kind = f"the function {name}" if name else type_of(value)
        raise _Undescribed(f"{where} is {kind}, which has no description")

    def _items(self, value: dict[Any, Any], where: str) -> Tree:
        return [[self.value(key, where), self.value(item, f"{where}.{key}")] for key, item in value.items()]


def _arguments(module: nn.Module, where: str) -> dict[str, Any]:
    """Return a module's constructor arguments: as stored by a component, else from attributes of the same names."""
    signature = inspect.signature(type(module).__init__)
    parameters = list(signature.parameters.values())[1:]
    if (made_of := vars(module).get("_made_of")) is None:
        return dict(_read_back(module, parameters, where))
    if {p.kind for p in parameters} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        raise _Undescribed(f"{where} is {type_of(module)}, whose arguments have no names")
    bound = signature.bind(module, *made_of[0], **made_of[1])
    given = {**dict(zip((p.name for p in parameters), bound.args[1:], strict=False)), **bound.kwargs}
    for name, value in given.items():
        if isinstance(value, nn.Module) and isinstance(now := getattr(module, name, None), nn.Module):
            given[name] = now  # the network may have been replaced
    return given


def _read_back(module: nn.Module, parameters: list[inspect.Parameter], where: str) -> Iterator[tuple[str, Any]]:
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, parameter.name, parameter.empty)
        if isinstance(parameter.default, bool) and (value is None or isinstance(value, Tensor)):
            value = value is not None  # bias: the argument is a bool, the attribute a tensor
        if value is not parameter.empty:
            yield parameter.name, value
        elif parameter.default is parameter.empty:
            raise _Undescribed(
                f"{where} is {type_of(module)}, which does not store its argument {parameter.name} as an "
                "attribute of the same name"
            )


def _difference(one: nn.Module, other: nn.Module) -> str:
    """Say how a VAE differs from the one rebuilt from its description; return an empty string if it does not."""
    mine, theirs = (dict(vae.named_modules(remove_duplicate=False)) for vae in (one, other))
    if _shared(mine) != _shared(theirs) or _shared(dict(named_tensors(one))) != _shared(dict(named_tensors(other))):
        return "its modules or tensors, or how they are shared, differ from what its constructors make"
    for name, module in mine.items():
        again, where = theirs[name], f"vae.{name}".rstrip(".")
        if type(module) is not type(again):
            return f"{where} is {type_of(module)}, but its arguments make {type_of(again)}"
        current, rebuilt = _attributes(module), _attributes(again)
        for key in {**current, **rebuilt}:
            if not _equal(current.get(key, ...), rebuilt.get(key, ...)):
                return f"{where}.{key} was changed after construction, or cannot be compared"
    return ""


def _shared(named: dict[str, Any]) -> dict[str, str]:
    """Map each name to the first name of the same object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named.items()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Collect a module's attributes other than tensors and modules; private ones of this library are not state."""
    ours = path_of(type(module)).startswith("pyro_vae.")
    hidden = {name for name in vars(module) if ours and name.startswith("_") and name not in _OF_EVERY_MODULE}
    return {name: value for name, value in vars(module).items() if name not in _NOT_COMPARED | hidden}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, partial):
        return _equal([one.func, one.args, one.keywords], [other.func, other.args, other.keywords])
    return one is other or bool(np.array_equal(one, other))
