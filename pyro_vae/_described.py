"""A VAE as a description, classes and their arguments, from which it is made again; no code is ever in one."""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_vae._check import in_a_line
from pyro_vae._state import unsaved
from pyro_vae._trees import Tree
from pyro_vae.core import VAE
from pyro_vae.errors import DataError

MAKERS = "torch.nn", "pyro_vae", "zuko"
"""Whose modules a description may name without asking."""

PIECES = "zuko", "torch.distributions"
"""Whose distributions and transforms a flow may name besides."""

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict

_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_NO_ATTRIBUTES = _EVERY_MODULE_HAS | {"_made_of", "trained_on"}


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
    describer = _Describer()
    try:
        tree = {"made": describer.module(vae, "vae"), **_besides(vae)}
        again = make_vae(tree, dict(vae.state_dict()), describer.classes.values())
    except (_Undescribed, DataError) as error:
        return None, str(error)
    if difference := _difference(vae, again):
        return None, difference
    return tree, ""


def make_vae(tree: Tree, weights: dict[str, Tensor], classes: Iterable[type] = ()) -> VAE:
    """The VAE of a description, with these weights.

    Args:
        tree: from :func:`describe_vae`.
        weights: its ``state_dict()``.
        classes: of the user's own, which it may be made of besides those of the library and of torch.

    Raises:
        DataError: if it names any other class, or cannot be made.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            vae = _Maker(classes).module(tree["made"])
        _fill(vae, {**weights, **tree["buffers"]})
        vae.load_state_dict(weights)
        for name, parameter in vae.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in tree["frozen"])
        for name, module in vae.named_modules(remove_duplicate=False):
            module.training = name not in tree["evaluating"]
    except DataError:
        raise
    except Exception as error:  # a class may be the user's own, and raise anything
        raise DataError(f"it cannot be made again ({in_a_line(error)})") from error
    if not isinstance(vae, VAE):
        raise DataError(f"it describes a {type(vae).__name__}, which is no VAE")
    return vae


def path_of(cls: type) -> str:
    """By what a class is found: the shortest path under which it is exported.

    Example:
        >>> import pyro_vae as pv
        >>> path_of(nn.Linear), path_of(pv.likelihoods.Normal), path_of(pv.VAE)
        ('torch.nn.Linear', 'pyro_vae.likelihoods.Normal', 'pyro_vae.VAE')
    """
    names = cls.__module__.split(".")
    for i in range(1, len(names)):
        module = ".".join(names[:i])
        if getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
            return f"{module}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved too, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _besides(vae: VAE) -> dict[str, Tree]:
    """What neither the constructors nor ``state_dict()`` tell."""
    return {
        "buffers": unsaved(vae),
        "frozen": [name for name, p in vae.named_parameters(remove_duplicate=False) if not p.requires_grad],
        "evaluating": [name for name, part in vae.named_modules(remove_duplicate=False) if not part.training],
    }


def _fill(vae: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in their places, in their own precision."""
    own = dict(_tensors(vae))
    if odd := sorted({*own} ^ {name for name in tensors if not name.endswith("_extra_state")}):
        raise DataError(f"its constructors and its weights do not agree on whether it has {odd[0]}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} is of shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data = tensors[name].detach().cpu().clone()


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


class _Maker:
    """Modules of what :class:`_Describer` made, in the same order."""

    def __init__(self, classes: Iterable[type]) -> None:
        self.made: list[nn.Module] = []
        self.classes = list(classes)

    def module(self, tree: Tree) -> nn.Module:
        if "same" in tree:
            return self.made[tree["same"]]
        cls = self._class(tree["class"], (nn.Module,))
        self.made.append(made := self._made(cls, tree))
        return made

    def _made(self, cls: Callable[..., Any], tree: Tree) -> nn.Module:
        if "attributes" in tree:
            return self._restored(cls, tree)
        if "modules" in tree:
            modules = OrderedDict((name, self.value(child)) for name, child in tree["modules"].items())
            return cls(list(modules.values()) if cls is nn.ModuleList else modules)
        named = {name: self.value(value) for name, value in tree["arguments"].items()}
        return cls(*[self.value(value) for value in tree.get("positional", [])], **named)

    def _restored(self, cls: Any, tree: Tree) -> nn.Module:
        """A module of its attributes, without its constructor."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name, value in tree["attributes"].items():
            setattr(module, name, self.value(value))
        for name, tensor in tree["parameters"].items():
            module.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        for name, tensor in tree["buffers"].items():
            module.register_buffer(name, tensor, persistent=name not in tree["unsaved"])
        for name, child in tree["modules"].items():
            module.register_module(name, self.value(child))
        return module

    def value(self, tree: Tree) -> Any:
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        ((kind, told),) = tree.items()
        match kind:
            case "module":
                return self.module(told)
            case "class":
                return self._class(told, (nn.Module, Distribution, Transform))
            case "dtype":
                return {str(dtype): dtype for dtype in _DTYPES}[f"torch.{told}"]
            case "partial":
                path, positional, named = told
                cls = self._class(path, (nn.Module, Distribution, Transform))
                return partial(cls, *self.value(positional), **{key: self.value(item) for key, item in named})
            case "tuple":
                return tuple(self.value(item) for item in told)
            case "dict":
                return {self.value(key): self.value(item) for key, item in told}
        raise DataError(f"it holds a {kind!r}, which no description has")

    def _class(self, path: str, bases: tuple[type, ...]) -> Any:
        """A class by its path: one handed over, or one of those that may be named without asking."""
        if handed := next((cls for cls in self.classes if _is_called(cls, path)), None):
            return handed
        module, _, name = path.rpartition(".")
        if not _under(module, MAKERS + PIECES):
            raise DataError(
                f"it is made of {path}, a class that is not of this library; if you trust it, hand it over, as "
                f"classes=[{path.rpartition('.')[2]}]"
            )
        if _under(module, ("zuko",)):
            _import_zuko()
        found = getattr(sys.modules.get(module), name, None)
        wanted = bases if _under(module, PIECES) else (nn.Module,)
        if not (isinstance(found, type) and issubclass(found, wanted)):
            raise DataError(f"it is made of {path}, which is no part that this version has")
        return found


_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


def _under(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _is_called(cls: type, path: str) -> bool:
    """Whether a path means a class; of one in a script the script's name does not matter."""
    if path_of(cls) == path:
        return True
    return "__main__" in (cls.__module__, path.partition(".")[0]) and path.endswith(f".{cls.__qualname__}")


def _import_zuko() -> None:
    """Import zuko, which switches the validation of all distributions off, without that."""
    before = Distribution._validate_args
    try:
        import zuko  # noqa: F401
    except ImportError as error:
        raise DataError("it is made of flows of zuko, which is not installed: pip install pyro-vae[flows]") from error
    finally:
        Distribution.set_default_validate_args(before)


def _difference(one: nn.Module, other: nn.Module) -> str:
    """In what a VAE is not as its description has it, or nothing."""
    mine, theirs = (dict(vae.named_modules(remove_duplicate=False)) for vae in (one, other))
    if _pattern(mine) != _pattern(theirs) or _pattern(dict(_tensors(one))) != _pattern(dict(_tensors(other))):
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
