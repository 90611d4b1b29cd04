"""Register the parameters of a module with Pyro under a unique name."""

import contextlib
import itertools
import weakref
from typing import Any

import pyro
from torch import nn

from pyro_vae.errors import ModelError


def store_name(module: nn.Module) -> str:
    """Return a name for Pyro's parameter store that no other module, copy or later module has."""
    if module not in _names:
        _drop_collected()
        _names[module] = name = f"{type(module).__name__.lower()}_{next(_numbers)}"
        weakref.finalize(module, _collected.append, name).atexit = False
    return _names[module]


class Unconstrained:
    """A weak reference to a parameter, in the form that Pyro's SVI calls, that can be pickled.

    Pyro sets a ``weakref.ref`` on each parameter of its store, and a network with such parameters cannot be pickled.
    A pickle of this reference is empty, because Pyro does not know the unpickled parameter yet.

    Args:
        parameter: a parameter of a VAE; None for an empty reference.
    """

    def __init__(self, parameter: nn.Parameter | None = None) -> None:
        self._parameter = (lambda: None) if parameter is None else weakref.ref(parameter)

    def __call__(self) -> nn.Parameter | None:
        return self._parameter()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Unconstrained, ()


class Picklable(nn.Module):
    """A module that can be pickled after Pyro has registered its parameters, as a ``PyroModule`` can."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, without the weak references that Pyro's store sets at each access."""
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return dict(vars(self))


_names: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_numbers = itertools.count()
_collected: list[str] = []


def _drop_collected() -> None:
    """Drop the parameters of garbage-collected modules; finalizers must not, since they may run at any time."""
    store, dead = pyro.get_param_store(), {_collected.pop() for _ in range(len(_collected))}
    for name in [name for name in store if name.split("$$$")[0] in dead]:
        with contextlib.suppress(KeyError):  # modules that share a parameter: its reverse entry is already deleted
            del store[name]


def register(module: nn.Module) -> None:
    """Register each trainable parameter of ``module`` with Pyro.

    ``pyro.module`` would give a second module of the same name the weights of the first, and train them. Here the name
    follows the identity of the module, so the store always holds the module's own tensors.
    """
    store, prefix = pyro.get_param_store(), store_name(module)
    for name, parameter in module.named_parameters():
        # torch.func replaces parameters by plain tensors, which Pyro must not train.
        if not (parameter.requires_grad and isinstance(parameter, nn.Parameter)):
            continue
        if not parameter.is_contiguous():
            raise ModelError(f"parameter {name} is not contiguous, so Pyro would train a copy; call .contiguous()")
        full = f"{prefix}$$${name}"
        if full in store and (store[full].unconstrained() is not parameter or store.param_name(parameter) is None):
            store[full] = parameter
        pyro.param(full, parameter)
        parameter.unconstrained = Unconstrained(parameter)  # type: ignore[attr-defined]
