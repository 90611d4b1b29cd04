"""A VAE as a description, classes and their arguments, from which it is made again; no code is ever in one."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.core.vae import VAE
from pyro_vae.errors import DataError
from pyro_vae.train.checkpoint.optimizer_state import unsaved
from pyro_vae.train.checkpoint.rebuild import make_vae, named_tensors, path_of
from pyro_vae.train.checkpoint.tensor_file import Tree

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict

_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_NO_ATTRIBUTES = _EVERY_MODULE_HAS | {"_made_of", "_given", "trained_on"}


class _Undescribed(Exception):
    """What has no description, and why."""


def describe_vae(vae: VAE) -> tuple[Tree, str]:
    """What a VAE can be made again of, tried out; where it cannot, why not.

    Args:
        vae: a VAE; it is left as it is.

    Returns:
        A tree, or None, and a reason, or nothing.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae(diagonal=True)
        >>> tree, why = describe_vae(vae)
        >>> tree["made"]["arguments"]["prior"]
        {'module': {'class': 'pyro_vae.priors.StandardNormal', 'arguments': {'latent_dim': 1}}}
    """
    return Describing().of(vae)


class Describing:
    """:func:`describe_vae` of one VAE again and again: making it is tried anew where something of it has changed."""

    def __init__(self) -> None:
        self._again: VAE | None = None
        self._made_of: Tree = None

    def of(self, vae: VAE) -> tuple[Tree, str]:
        """What :func:`describe_vae` gives.

        Args:
            vae: the same each time.
        """
        describer = _Describer()
        try:
            tree = {"made": describer.module(vae, "vae"), **_besides(vae)}
            shapes = {name: list(tensor.shape) for name, tensor in named_tensors(vae)}
            made_of = [_constructed(tree["made"]), shapes]
            if self._again is not None and _alike(made_of, self._made_of) and not _difference(vae, self._again):
                return tree, ""
            again = make_vae(_as_read(tree), dict(vae.state_dict()), describer.classes.values())
        except (_Undescribed, DataError) as error:
            return None, str(error)
        if difference := _difference(vae, again):
            return None, difference
        for _, tensor in named_tensors(again):
            tensor.data = tensor.new_empty(0)  # its weights are not looked at again
        self._again, self._made_of = again, _as_read(made_of)
        return tree, ""


def _constructed(made: Tree) -> Tree:
    """What constructors are given; what is put in its place without one may change."""
    if isinstance(made, list):
        return [_constructed(item) for item in made]
    if not isinstance(made, dict):
        return made
    placed = {"parameters", "buffers"} if {"class", "attributes"} <= made.keys() else set()
    return {name: _constructed(item) for name, item in made.items() if name not in placed}


def _as_read(tree: Tree) -> Tree:
    """A description as a file gives it: with tensors of its own."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu().clone()
    if isinstance(tree, list):
        return [_as_read(item) for item in tree]
    return {name: _as_read(item) for name, item in tree.items()} if isinstance(tree, dict) else tree


def _besides(vae: VAE) -> dict[str, Tree]:
    """What neither the constructors nor ``state_dict()`` tell."""
    return {
        "buffers": unsaved(vae),
        "frozen": [name for name, p in vae.named_parameters(remove_duplicate=False) if not p.requires_grad],
        "evaluating": [name for name, part in vae.named_modules(remove_duplicate=False) if not part.training],
    }


class _Describer:
    """Modules as classes and arguments; one that was met before is told by its number."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.classes: dict[str, type] = {}

    def module(self, module: nn.Module, where: str) -> Tree:
        if id(module) in self.known:
            return {"same": self.known[id(module)]}
        described = {"class": self._path(type(module)), **self._contents(module, where)}
        self.known[id(module)] = len(self.known)
        return described

    def _path(self, cls: type) -> str:
        path = path_of(cls)
        self.classes[path] = cls
        return path

    def _contents(self, module: nn.Module, where: str) -> dict[str, Tree]:
        if type(module) in CONTAINERS:
            return {"modules": self._children(module, where)}
        if path_of(type(module)).startswith("zuko."):
            return self._attributes(module, where)
        positional, named = _arguments(module, where)
        told = {"arguments": {name: self.value(value, f"{where}.{name}") for name, value in named.items()}}
        return {**told, "positional": [self.value(value, where) for value in positional]} if positional else told

    def _children(self, module: nn.Module, where: str) -> Tree:
        return {name: self.value(child, f"{where}.{name}") for name, child in module._modules.items()}

    def _attributes(self, module: nn.Module, where: str) -> dict[str, Tree]:
        """Flows keep no arguments of their constructors, and what they keep is plain."""
        own = {name: value for name, value in vars(module).items() if name not in _EVERY_MODULE_HAS}
        return {
            "attributes": {name: self.value(value, f"{where}.{name}") for name, value in own.items()},
            "parameters": dict(module._parameters),
            "buffers": dict(module._buffers),
            "unsaved": sorted(module._non_persistent_buffers_set),
            "modules": self._children(module, where),
        }

    def value(self, value: Any, where: str) -> Tree:
        if value is None or isinstance(value, bool | int | float | str | Tensor):
            return value
        if isinstance(value, nn.Module):
            return {"module": self.module(value, where)}
        if isinstance(value, type):
            return {"class": self._path(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, partial) and isinstance(value.func, type):
            given = [self.value(item, where) for item in value.args], self._items(value.keywords, where)
            return {"partial": [self._path(value.func), *given]}
        if type(value) in (tuple, torch.Size):
            return {"tuple": [self.value(item, where) for item in value]}
        if type(value) is list:
            return [self.value(item, where) for item in value]
        if type(value) in (dict, OrderedDict):
            return {"dict": self._items(value, where)}
        raise _Undescribed(f"{where} is {_called(value)}, which has no description")

    def _items(self, value: dict[Any, Any], where: str) -> Tree:
        return [[self.value(key, where), self.value(item, f"{where}.{key}")] for key, item in value.items()]


def _called(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"the function {name}" if name else f"a {type(value).__name__}"


def _arguments(module: nn.Module, where: str) -> tuple[list[Any], dict[str, Any]]:
    """What a module was made of, by position and by name: as a part keeps it, else by attributes of the same names."""
    signature = inspect.signature(type(module).__init__)
    parameters = list(signature.parameters.values())
    if (made_of := vars(module).get("_made_of")) is None:
        return [], dict(_read_back(module, parameters[1:], where))
    bound = signature.bind(module, *made_of[0], **made_of[1])
    for name, value in bound.arguments.items():
        if isinstance(value, nn.Module) and isinstance(now := getattr(module, name, None), nn.Module):
            bound.arguments[name] = now  # a network that was put in the place of another
    if {p.kind for p in parameters} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        return list(bound.args[1:]), bound.kwargs
    by_position = dict(zip(list(signature.parameters)[1:], bound.args[1:], strict=False))
    return [], {**by_position, **bound.kwargs}


def _read_back(module: nn.Module, parameters: list[inspect.Parameter], where: str) -> Iterator[tuple[str, Any]]:
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, parameter.name, parameter.empty)
        if isinstance(parameter.default, bool) and (value is None or isinstance(value, Tensor)):
            value = value is not None  # bias, of which the attribute is the tensor
        if value is not parameter.empty:
            yield parameter.name, value
        elif parameter.default is parameter.empty:
            raise _Undescribed(
                f"{where} is of {type(module).__name__}, which keeps no attribute of the name of its argument "
                f"{parameter.name}"
            )


def _difference(one: nn.Module, other: nn.Module) -> str:
    """In what a VAE is not as its description has it, or nothing."""
    mine, theirs = (dict(vae.named_modules(remove_duplicate=False)) for vae in (one, other))
    if _pattern(mine) != _pattern(theirs) or _pattern(dict(named_tensors(one))) != _pattern(dict(named_tensors(other))):
        return "its modules or tensors are not those that its constructors make, or are shared otherwise"
    for name, module in mine.items():
        again, where = theirs[name], f"vae.{name}".rstrip(".")
        if type(module) is not type(again):
            return f"{where} is a {type(module).__name__}, and its arguments make a {type(again).__name__}"
        if _hooks(module) != _hooks(again):
            return f"{where} has hooks, which have no description"
        if wrong := _other_attribute(_attributes(module), _attributes(again)):
            return f"{where}.{wrong} was changed after it was made"
    return ""


def _pattern(named: dict[str, Any]) -> dict[str, str]:
    """Each name by the first that has the same object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named.items()}


def _hooks(module: nn.Module) -> dict[str, int]:
    return {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps besides tensors and modules; what is private in parts of the library is no state."""
    own = {name: value for name, value in vars(module).items() if name not in _NO_ATTRIBUTES}
    ours = path_of(type(module)).startswith("pyro_vae.")
    return {name: value for name, value in own.items() if not (ours and name.startswith("_"))}


def _other_attribute(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in {**one, **other} if name not in one or name not in other]
    return next(iter([*names, *(name for name in one if name in other and not _alike(one[name], other[name]))]), "")


def _alike(one: Any, other: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether attributes are equal; objects are by what they keep, and those that keep nothing by their class."""
    if type(one) is not type(other) and not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if isinstance(one, Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one.cpu(), other.cpu())
    if one is None or isinstance(one, bool | int | float | str | bytes | type | torch.dtype):
        return repr(one) == repr(other)
    if isinstance(one, set | frozenset) or inspect.isroutine(one):
        return bool(one is other or (isinstance(one, set | frozenset) and one == other))
    if isinstance(one, np.ndarray):
        return _alike(one.tolist(), other.tolist(), within) and (one.dtype, one.shape) == (other.dtype, other.shape)
    if id(one) in within:  # an object that is met within itself
        return True
    within |= {id(one)}
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_alike(a, b, within) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_alike(value, other[key], within) for key, value in one.items())
    if isinstance(one, partial):
        return _alike([one.func, one.args, one.keywords], [other.func, other.args, other.keywords], within)
    return _alike(getattr(one, "__dict__", {}), getattr(other, "__dict__", {}), within)
