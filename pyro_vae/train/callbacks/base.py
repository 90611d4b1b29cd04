"""``Callback``: the base class of callbacks, and the description of their settings."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pyro_vae.core.validation import python_number, whole
from pyro_vae.errors import SettingsError, type_of
from pyro_vae.train.checkpoint.tensor_file import Tree

if TYPE_CHECKING:
    from pyro_vae.train.run import Run
else:
    Run = Any

__all__ = ["Callback", "Run", "Tree"]


class Callback:
    """The base class of callbacks, whose hooks :func:`pyro_vae.fit` calls during the training.

    Override the hooks that you need. ``start`` is called first; if a training is resumed or rolled back, ``load``
    follows. A checkpoint stores the return value of ``state``. To resume a training, construct a callback that has a
    state with the same arguments. A hook may stop the training with ``run.stop(reason)``, print a sentence with
    ``run.say(sentence)``, and change weights in place; it must not draw random numbers.

    Attributes:
        every: the number of steps between two calls of ``step``, counted from the start of the training; None for no
            calls. Compiled steps run in chunks of up to 16; a smaller ``every`` makes the chunks smaller. After a
            divergence some steps are repeated to find its origin, and then undone by ``load``.

    Example:
        >>> class Epochs(Callback):
        ...     seen = 0
        ...     def epoch(self, run):
        ...         self.seen += 1
        ...     def state(self):
        ...         return {"seen": self.seen}
        ...     def load(self, state):
        ...         self.seen = state["seen"]
        >>> first, second = Epochs(), Epochs()
        >>> first.epoch(None)
        >>> second.load(first.state())
        >>> second.seen
        1
    """

    every: int | None = None
    final: str = ""
    """The weights that the callback restores at the end, in words; empty if none. Only one callback may restore."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Store the constructor's arguments for checkpoints; copies have them too."""
        callback = super().__new__(cls)
        vars(callback)["_made_of"] = args, kwargs
        return callback

    def start(self, run: Run) -> None:
        """Run before the first step: validate the settings and reset the state."""

    def step(self, run: Run) -> None:
        """Run after every ``every`` steps."""

    def epoch(self, run: Run) -> None:
        """Run after each epoch and its evaluation."""

    def diverged(self, run: Run, error: Exception) -> bool:
        """Run after a divergence; return true to continue the training, after recovering from it."""
        return False

    def end(self, run: Run) -> None:
        """Run after the last step, also of a stopped training; checkpoints do not hold its changes."""

    def state(self) -> Tree:
        """Return the state to store in a checkpoint."""
        return {}

    def load(self, state: Tree) -> None:
        """Restore a copy of what ``state`` returned; its tensors may be on the CPU."""


def describe_arguments(callback: Callback) -> dict[str, str]:
    """Describe the arguments of a callback's constructor as text; other objects by their class.

    Example:
        >>> class Patient(Callback):
        ...     def __init__(self, epochs, *, judge=max, weights=None):
        ...         self.left = epochs
        >>> describe_arguments(Patient(5, weights=[0.5, {}]))
        {'epochs': '5', 'judge': 'max', 'weights': '[0.5, {}]'}
    """
    args, kwargs = vars(callback).get("_made_of", ((), {}))
    try:
        bound = inspect.signature(type(callback).__init__).bind(callback, *args, **kwargs)
    except TypeError:  # not made by its constructor
        return {}
    bound.apply_defaults()
    return {name: describe_value(value) for name, value in list(bound.arguments.items())[1:]}


def describe_value(value: Any) -> str:
    """Describe a setting as text that is equal for equal settings in every process.

    Example:
        >>> describe_value({"rates": (0.1, float("inf")), "made by": partial(dict, a=1), "of": object()})
        "{'made by': dict([], {'a': 1}), 'of': object, 'rates': [0.1, inf]}"
    """
    value = python_number(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}({describe_value(value.value)})"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, partial):
        return f"{describe_value(value.func)}({describe_value(value.args)}, {describe_value(value.keywords)})"
    if isinstance(value, Mapping):
        return (
            f"{{{', '.join(sorted(f'{describe_value(key)}: {describe_value(item)}' for key, item in value.items()))}}}"
        )
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(describe_value, value)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe_value, value))}]"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def validate_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise unless ``callbacks`` is a list of distinct callbacks whose ``every`` is valid.

    Raises:
        SettingsError: naming the first invalid callback.

    Example:
        >>> validate_callbacks([Callback])
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: callbacks: Callback is a class; pass an instance, Callback(...)
    """
    if not isinstance(callbacks, Iterable):
        raise SettingsError(f"callbacks is {type_of(callbacks)}; pass a list of callbacks")
    for callback in callbacks:
        if isinstance(callback, type):
            raise SettingsError(
                f"callbacks: {callback.__name__} is a class; pass an instance, {callback.__name__}(...)"
            )
        if not isinstance(callback, Callback):
            raise SettingsError(
                f"callbacks: {type(callback).__name__} is not a Callback; subclass pyro_vae.callbacks.Callback"
            )
        for name in (name for name in dir(Callback) if inspect.isfunction(vars(Callback).get(name))):
            if not callable(getattr(type(callback), name)):
                raise SettingsError(f"callbacks: {type(callback).__name__}.{name} is not a method; define it as one")
        if callback.every is not None:
            whole(f"every of {type(callback).__name__}", callback.every, 1)
    if len({*map(id, callbacks)}) < len(callbacks):
        raise SettingsError("callbacks: the same instance is listed twice; pass two instances")
