"""Register the parameters of a module with Pyro, under a name that no other module has."""

import contextlib
import itertools
import weakref
from typing import Any

import pyro
from torch import nn

from pyro_vae.errors import ModelError


def store_name(module: nn.Module) -> str:
    """A name for Pyro's parameter store that no other module, copy or later module has."""
    if module not in _names:
        _forget_the_dead()
        _names[module] = name = f"{type(module).__name__.lower()}_{next(_numbers)}"
        weakref.finalize(module, _dead.append, name).atexit = False
    return _names[module]


class Unconstrained:
    """A weak reference from a parameter to itself, as Pyro's SVI calls it; a pickle holds an empty one.

    Pyro leaves a ``weakref.ref`` on each parameter of its store, and a network with such parameters cannot be pickled.

    Args:
        parameter: of a VAE; none in a copy by pickle, which Pyro does not know yet.
    """

    def __init__(self, parameter: nn.Parameter | None = None) -> None:
        self._parameter = (lambda: None) if parameter is None else weakref.ref(parameter)

    def __call__(self) -> nn.Parameter | None:
        return self._parameter()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Unconstrained, ()


class Picklable(nn.Module):
    """A module that can be pickled after Pyro has met its parameters, as a ``PyroModule`` can."""

    def __getstate__(self) -> dict[str, Any]:
        """The attributes; weak references of Pyro's store, which sets them anew at each look, are removed."""
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return dict(vars(self))


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
        parameter.unconstrained = Unconstrained(parameter)  # type: ignore[attr-defined]
