"""Build a VAE from its description, using allowed classes only; a description holds no code."""

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
from pyro_vae.errors import DataError, type_of
from pyro_vae.nn import conv_decoder, conv_encoder, mlp
from pyro_vae.train.checkpoint.tensor_file import Tree

MAKERS = "torch.nn", "pyro_vae", "zuko"
"""Packages whose ``nn.Module`` classes a description may name."""

PIECES = "zuko", "torch.distributions", "pyro.distributions"
"""Packages whose distributions and transforms a description may also name."""

FUNCTIONS = {f"pyro_vae.nn.{function.__name__}": function for function in (mlp, conv_encoder, conv_decoder)} | {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (torch, torch.nn.functional)
    for name in (
        "celu", "elu", "exp", "gelu", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish", "relu", "relu6",
        "selu", "sigmoid", "silu", "sin", "softmax", "softplus", "softsign", "tanh", "tanhshrink",
    )
    if hasattr(module, name)
}  # fmt: skip
"""Functions that a description may name; no others of torch, as some read and write files."""


MOST_MODULES = 10**4
"""The largest number of copies of modules that one module may make; those with weights count as tensors too."""

SPARE_BYTES = 2**28
"""The bytes that building a VAE may take beyond twice its weights."""


def make_vae(tree: Tree, weights: dict[str, Tensor], classes: Iterable[type] = ()) -> VAE:
    """Build the VAE of a description and fill it with weights.

    Raises:
        DataError: if the description names a class that is neither in :data:`MAKERS` nor in ``classes``, or if the VAE
            cannot be built.
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
    except Exception as error:  # a user's class may raise anything
        raise DataError(f"the VAE cannot be rebuilt ({in_a_line(error)})") from error
    if not isinstance(vae, VAE):
        raise DataError(f"describes {type_of(vae)}, not a VAE")
    return vae


def function_path(function: Any) -> str:
    """Return the path of one of :data:`FUNCTIONS`, or an empty string."""
    return next((path for path, known in FUNCTIONS.items() if known is function), "")


def path_of(cls: Any) -> str:
    """Return the shortest path that exports a class or function, such as ``torch.nn.Linear``."""
    names, name = cls.__module__.split("."), cls.__qualname__
    for i in range(1, len(names)):
        module = ".".join(names[:i])
        if getattr(sys.modules.get(module), name, None) is cls:
            return f"{module}.{name}"
    return f"{cls.__module__}.{name}"


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _fill(vae: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill a VAE with tensors, in their precision."""
    current = dict(named_tensors(vae))
    if odd := sorted({*current} ^ {name for name in tensors if not name.endswith("_extra_state")}):
        raise DataError(f"its constructors and its weights disagree on whether it has {odd[0]}")
    for name, tensor in current.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data = tensors[name].detach().cpu().clone()


class _Maker:
    """Build the modules of a description, in its order."""

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
        positional = self.value(tree.get("positional", []))
        if is_under(cls.__module__, ("torch.nn",)):
            _validate_copies(positional, named)
        return cls(*positional, **named)

    def _restored(self, cls: Any, tree: Tree) -> nn.Module:
        """Rebuild a zuko module from its attributes, without calling its constructor."""
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
        ((kind, content),) = tree.items()
        match kind:
            case "module":
                return self.module(content)
            case "class":
                return self._class(content, (nn.Module, Distribution, Transform))
            case "dtype":
                return {str(dtype): dtype for dtype in _DTYPES}[f"torch.{content}"]
            case "function":
                return self._function(content)
            case "partial":
                path, positional, named = content
                keywords = {key: self.value(item) for key, item in named}
                return partial(self._function(path), *self.value(positional), **keywords)
            case "tuple":
                return tuple(self.value(content))
            case "dict":
                return dict(self.value(content))
        raise DataError(f"contains the unknown kind {kind!r}")

    def _function(self, path: str) -> Any:
        """Return an allowed function by its path, or else a class by :meth:`_class`."""
        return FUNCTIONS.get(path) or self._class(path, (nn.Module, Distribution, Transform))

    def _class(self, path: str, bases: tuple[type, ...]) -> Any:
        """Return a class by its path: one of the user's, or one of an allowed package."""
        if handed := next((cls for cls in self.classes if _is_called(cls, path)), None):
            return handed
        module, _, name = path.rpartition(".")
        if not is_under(module, MAKERS + PIECES):
            raise DataError(
                f"contains {path}, a class that is not part of this library; if you trust it, pass classes=[{name}]"
            )
        found = part_called(module, name)
        if not (isinstance(found, type) and issubclass(found, bases if is_under(module, PIECES) else nn.Module)):
            raise DataError(f"contains {path}, which this version of the library does not have")
        return found


def _validate_copies(positional: list[Any], named: dict[str, Any]) -> None:
    """Raise before torch copies a module too often, as for the layers of a ``TransformerEncoder``."""
    modules = sum(
        1 for value in (*positional, *named.values()) if isinstance(value, nn.Module) for _ in value.modules()
    )
    counts = [*positional, *(value for name, value in named.items() if name.endswith("layers"))]
    copies = max((value for value in counts if type(value) is int), default=1)
    if modules * copies > MOST_MODULES:
        raise DataError(f"describes {modules * copies:,} modules; the maximum is {MOST_MODULES:,}")


_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


def is_under(module: str, packages: tuple[str, ...]) -> bool:
    """Return whether a module belongs to one of the packages."""
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _is_called(cls: Any, path: str) -> bool:
    """Return whether a path names a class; in a script, the name of the module does not matter."""
    if path_of(cls) == path:
        return True
    return "__main__" in (cls.__module__, path.partition(".")[0]) and path.endswith(f".{cls.__qualname__}")


def part_called(module: str, name: str) -> Any:
    """Return an attribute of a module; only modules of this library and zuko are imported."""
    if is_under(module, ("zuko",)):
        _import_zuko()
    if is_under(module, ("pyro_vae",)):
        with suppress(ImportError):
            importlib.import_module(module)
    return getattr(sys.modules.get(module), name, None)


def _import_zuko() -> None:
    """Import zuko and restore the validation of distributions, which zuko switches off."""
    before = Distribution._validate_args
    try:
        import zuko  # noqa: F401
    except ImportError as error:
        raise DataError("contains flows of zuko, which is not installed; pip install pyro-vae[flows]") from error
    finally:
        Distribution.set_default_validate_args(before)
