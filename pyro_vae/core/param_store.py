"""Register the parameters of a module with Pyro, under a name that no other module has."""

import contextlib
import itertools
import weakref

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
