"""Build a VAE from its description, of classes that may be named; a description holds no code."""

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_vae.core.allocation import AllocationLimit
from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.vae import VAE
from pyro_vae.errors import DataError
from pyro_vae.nn import conv_decoder, conv_encoder, mlp
from pyro_vae.train.checkpoint.tensor_file import Tree

MAKERS = "torch.nn", "pyro_vae", "zuko"
"""Packages whose modules a description may name."""

PIECES = "zuko", "torch.distributions", "pyro.distributions"
"""Packages whose distributions and transforms may be named besides."""

FUNCTIONS = {f"pyro_vae.nn.{function.__name__}": function for function in (mlp, conv_encoder, conv_decoder)} | {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (torch, torch.nn.functional)
    for name in (
        "celu", "elu", "exp", "gelu", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish", "relu", "relu6",
        "selu", "sigmoid", "silu", "sin", "softmax", "softplus", "softsign", "tanh", "tanhshrink",
    )
    if hasattr(module, name)
}  # fmt: skip
"""Functions that may be named; of torch no others, as some read and write files."""


SPARE_BYTES = 2**28
"""A VAE may take so many bytes more than twice its weights while it is built."""


def make_vae(tree: Tree, weights: dict[str, Tensor], classes: Iterable[type] = ()) -> VAE:
    """Build the VAE of a description and fill it with weights.

    Raises:
        DataError: if it names a class that is neither of :data:`MAKERS` nor among ``classes``, or cannot be built.
    """
    try:
        most = 2 * sum(value.nbytes for value in weights.values() if isinstance(value, Tensor)) + SPARE_BYTES
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), AllocationLimit(most):
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


def function_path(function: Any) -> str:
    """The path of one of :data:`FUNCTIONS`, or nothing."""
    return next((path for path, known in FUNCTIONS.items() if known is function), "")


def path_of(cls: Any) -> str:
    """The shortest path under which a class, or a function, is exported, as ``torch.nn.Linear``."""
    names, own = cls.__module__.split("."), cls.__qualname__
    for i in range(1, len(names)):
        module = ".".join(names[:i])
        if getattr(sys.modules.get(module), own, None) is cls:
            return f"{module}.{own}"
    return f"{cls.__module__}.{own}"


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _fill(vae: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in their places, in their own precision."""
    own = dict(named_tensors(vae))
    if odd := sorted({*own} ^ {name for name in tensors if not name.endswith("_extra_state")}):
        raise DataError(f"its constructors and its weights do not agree on whether it has {odd[0]}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} is of shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data = tensors[name].detach().cpu().clone()


class _Maker:
    """The modules of a description, in its order."""

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
        return cls(*self.value(tree.get("positional", [])), **named)

    def _restored(self, cls: Any, tree: Tree) -> nn.Module:
        """A flow of its attributes, without its constructor."""
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
            case "function":
                return self._function(told)
            case "partial":
                path, positional, named = told
                made = {key: self.value(item) for key, item in named}
                return partial(self._function(path), *self.value(positional), **made)
            case "tuple":
                return tuple(self.value(told))
            case "dict":
                return dict(self.value(told))
        raise DataError(f"it holds a {kind!r}, which no description has")

    def _function(self, path: str) -> Any:
        """What makes a part, by its path: a function that may be named, or as :meth:`_class`."""
        return FUNCTIONS.get(path) or self._class(path, (nn.Module, Distribution, Transform))

    def _class(self, path: str, bases: tuple[type, ...]) -> Any:
        """A class by its path: one of the user's, or of the packages that may be named."""
        if handed := next((cls for cls in self.classes if _is_called(cls, path)), None):
            return handed
        module, _, name = path.rpartition(".")
        if not is_under(module, MAKERS + PIECES):
            raise DataError(
                f"it is made of {path}, a class that is not of this library; if you trust it, hand it over, as "
                f"classes=[{name}]"
            )
        found = part_called(module, name)
        if not (isinstance(found, type) and issubclass(found, bases if is_under(module, PIECES) else nn.Module)):
            raise DataError(f"it is made of {path}, which is no part that this version has")
        return found


_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


def is_under(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module, or what it holds, is of one of some packages."""
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _is_called(cls: Any, path: str) -> bool:
    """Whether a path means a class; the name of a script does not matter."""
    if path_of(cls) == path:
        return True
    return "__main__" in (cls.__module__, path.partition(".")[0]) and path.endswith(f".{cls.__qualname__}")


def part_called(module: str, name: str) -> Any:
    """What a module has; only modules of this library and zuko are imported for it."""
    if is_under(module, ("zuko",)):
        _import_zuko()
    if is_under(module, ("pyro_vae",)):
        with suppress(ImportError):
            importlib.import_module(module)
    return getattr(sys.modules.get(module), name, None)


def _import_zuko() -> None:
    """Import zuko and undo that it switches the validation of all distributions off."""
    before = Distribution._validate_args
    try:
        import zuko  # noqa: F401
    except ImportError as error:
        raise DataError("it is made of flows of zuko, which is not installed: pip install pyro-vae[flows]") from error
    finally:
        Distribution.set_default_validate_args(before)
