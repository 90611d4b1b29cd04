"""Watch the Python values that are constants of a trace: a change makes the trace stale."""

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from pyro_vae.elbo.nested import losses_in
from pyro_vae.errors import CompileError

Namespace = dict[str, Any]
PLAIN = (bool, int, float, str, type(None))
"""Types of constants that can be compared at each step."""


class Watch:
    """The structure and plain values of a model, a guide, a loss and an optimizer.

    Args:
        roots: model, guide and loss; for functions, the modules and plain values that they use are watched too.
        others: further namespaces as (owner, namespace, watched names).
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
        """Return the name of a value that has changed, or an empty string."""
        for owner, space, name, then in self._places:
            now = space.get(name)
            if now is not then and (not isinstance(then, PLAIN) or now != then):
                return f"{owner}.{name}"
        return ""

    def restore(self) -> None:
        """Restore the values that tracing replaced.

        Raises:
            CompileError: if tracing replaced a number, a buffer or a public tensor: a compiled step would not repeat
                this side effect. Private tensors are assumed to be caches.
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
                    f"{owner}.{name} gets a new value at every step, which a compiled step would miss; "
                    "make it a buffer and change it in place"
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
    """Return the Python function inside a callable; None for a module, whose attributes are watched."""
    while isinstance(root, functools.partial):
        root = root.func
    root = getattr(root, "__func__", root)
    return root if inspect.isfunction(root) else None


def _named_by(function: Any) -> list[tuple[str, Namespace, Namespace]]:
    """List the plain global values that a function uses."""
    if function is None:
        return []
    space = function.__globals__
    names = [name for name in function.__code__.co_names if isinstance(space.get(name), PLAIN)]
    return [(function.__name__, space, {name: space[name] for name in names if name in space})]
