"""The Python values that a trace has baked in: seen to change, they make it stale."""

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from pyro_vae.elbo.nested import losses_in
from pyro_vae.errors import CompileError

Namespace = dict[str, Any]
PLAIN = (bool, int, float, str, type(None))
"""Types of values that a trace bakes in and that can be compared at each step."""


class Watch:
    """What a model, a guide, a loss and an optimizer are made of: structure and plain values.

    Args:
        roots: model, guide and loss; of functions, the modules and plain values that they name are seen too.
        others: further namespaces: what to call each, it, and the names in it that matter.
    """

    def __init__(self, roots: Iterable[Any], others: Iterable[tuple[str, Namespace, Iterable[str]]] = ()) -> None:
        self._before: list[tuple[str, Namespace, Namespace]] = []
        for module in dict.fromkeys(module for root in roots for module in _modules_of(root)):
            for space in (module.__dict__, module._parameters, module._buffers, module._modules):
                self._before.append((type(module).__name__, space, dict(space)))
        for root in roots:
            self._before += [(type(owner).__name__, vars(owner), dict(vars(owner))) for owner in losses_in(root)]
            self._before += _named_by(_function_of(root))
        self._places = [
            (owner, space, name, value)
            for owner, space, before in self._before
            for name, value in before.items()
            if isinstance(value, (*PLAIN, Tensor, nn.Module))
        ]
        self._places += [(owner, space, name, space.get(name)) for owner, space, names in others for name in names]

    def changed(self) -> str:
        """The name of a value that is another than when this was made, or nothing."""
        for owner, space, name, then in self._places:
            now = space.get(name)
            if now is not then and (not isinstance(then, PLAIN) or now != then):
                return f"{owner}.{name}"
        return ""

    def restore(self) -> None:
        """Put back what tracing has put in the place of a value.

        Raises:
            CompileError: if that was a number, a buffer or a public tensor: the step is another at each call, or
                leaves something behind that a compiled one would not. Private tensors are taken for caches.
        """
        moved = [
            (owner, space, name, then)
            for owner, space, before in self._before
            for name, then in before.items()
            if space.get(name) is not then
        ]
        for _, space, name, then in moved:
            space[name] = then
        for owner, _, name, then in moved:
            if isinstance(then, PLAIN) or (isinstance(then, Tensor) and not name.startswith("_")):
                raise CompileError(
                    f"{owner}.{name} gets a new value at every step, which a compiled step would not see; "
                    "make it a buffer that is changed in place"
                )


def _modules_of(root: Any) -> Iterator[nn.Module]:
    owner = getattr(root, "__self__", root)
    if isinstance(owner, nn.Module):
        yield from owner.modules()
    if (function := _function_of(root)) is not None:
        named = inspect.getclosurevars(function)
        for value in (*named.nonlocals.values(), *named.globals.values()):
            if isinstance(value, nn.Module):
                yield from value.modules()


def _function_of(root: Any) -> Any:
    """The Python function at the bottom of a callable; none for a module, whose attributes are watched."""
    while isinstance(root, functools.partial):
        root = root.func
    root = getattr(root, "__func__", root)
    return root if inspect.isfunction(root) else None


def _named_by(function: Any) -> list[tuple[str, Namespace, Namespace]]:
    """The plain global values that a function names."""
    if function is None:
        return []
    space = function.__globals__
    names = [name for name in function.__code__.co_names if isinstance(space.get(name), PLAIN)]
    return [(function.__name__, space, {name: space[name] for name in names if name in space})]
