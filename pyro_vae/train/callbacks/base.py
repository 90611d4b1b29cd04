"""``Callback``: what is told of a training while it goes on."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pyro_vae.core.validation import python_number, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.checkpoint.tensor_file import Tree

if TYPE_CHECKING:
    from pyro_vae.train.run import Run
else:
    Run = Any

__all__ = ["Callback", "Run", "Tree"]


class Callback:
    """What :func:`pyro_vae.fit` tells of a training while it goes on; every hook may be left out.

    ``start`` comes first; where a training is resumed or put back, ``load`` comes after it. What a
    checkpoint is to hold of a callback is in its ``state``; one that has a state must be made of the same
    numbers, words, and lists of them, where a training is resumed. A hook may stop the training by
    ``run.stop(reason)``, say a sentence by ``run.say(sentence)``, and change weights in place; it draws
    no random numbers of its own.

    Attributes:
        every: ``step`` is called after every so many steps, counted from the first of the training; never
            if None. Compiled steps are taken up to 16 at a time; a smaller number makes them fewer. After a
            divergence some steps are taken once more, to see where it came from, and then undone by ``load``.

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
    """Which weights it puts into the VAE at the end, in words, if it does; one callback of a training may."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep what it is made of, so that a checkpoint can tell it; copies keep it too."""
        callback = super().__new__(cls)
        vars(callback)["_made_of"] = args, kwargs
        return callback

    def start(self, run: Run) -> None:
        """Before the first step: refuse what cannot be, and forget an earlier training."""

    def step(self, run: Run) -> None:
        """After every so many steps."""

    def epoch(self, run: Run) -> None:
        """After each epoch and its evaluation."""

    def diverged(self, run: Run, error: Exception) -> bool:
        """When a loss or an ELBO is not finite or out of bounds: true if it is put right, and training goes on."""
        return False

    def end(self, run: Run) -> None:
        """After the last step, however it came to be the last; what it changes is in no checkpoint."""

    def state(self) -> Tree:
        """What it remembers, for a checkpoint."""
        return {}

    def load(self, state: Tree) -> None:
        """Remember what ``state`` of a callback of the same settings gave: a copy, whose tensors may lie on the CPU."""


def made_of(callback: Callback) -> dict[str, str]:
    """The arguments of a callback's constructor, each in words; an object without words counts by its class.

    Example:
        >>> class Patient(Callback):
        ...     def __init__(self, epochs, *, judge=max, weights=None):
        ...         self.left = epochs
        >>> made_of(Patient(5, weights=[0.5, {}]))
        {'epochs': '5', 'judge': 'max', 'weights': '[0.5, {}]'}
    """
    args, kwargs = vars(callback).get("_made_of", ((), {}))
    try:
        bound = inspect.signature(type(callback).__init__).bind(callback, *args, **kwargs)
    except TypeError:  # of one that was not made by its constructor
        return {}
    bound.apply_defaults()
    return {name: in_words(value) for name, value in list(bound.arguments.items())[1:]}


def in_words(value: Any) -> str:
    """A setting as text, the same for equal ones in each process.

    Example:
        >>> in_words({"rates": (0.1, float("inf")), "made by": partial(dict, a=1), "of": object()})
        "{'made by': dict([], {'a': 1}), 'of': object, 'rates': [0.1, inf]}"
    """
    value = python_number(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}({in_words(value.value)})"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, partial):
        return f"{in_words(value.func)}({in_words(value.args)}, {in_words(value.keywords)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{in_words(key)}: {in_words(item)}' for key, item in value.items()))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(in_words, value)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_words, value))}]"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def refuse_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse what is no list of callbacks, one that is given twice, and steps that cannot be counted.

    Raises:
        SettingsError: saying which.

    Example:
        >>> refuse_callbacks([Callback])
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: callbacks: Callback is a class; give an instance, Callback(...)
    """
    if not isinstance(callbacks, Iterable):
        raise SettingsError(f"callbacks is a {type(callbacks).__name__}; give a list of callbacks")
    for callback in callbacks:
        if isinstance(callback, type):
            raise SettingsError(
                f"callbacks: {callback.__name__} is a class; give an instance, {callback.__name__}(...)"
            )
        if not isinstance(callback, Callback):
            raise SettingsError(f"callbacks: a {type(callback).__name__} is no pyro_vae.callbacks.Callback; derive it")
        for name in (name for name in dir(Callback) if inspect.isfunction(vars(Callback).get(name))):
            if not callable(getattr(type(callback), name)):
                raise SettingsError(f"callbacks: {name} of {type(callback).__name__} is no method; make it one")
        if callback.every is not None:
            whole(f"every of {type(callback).__name__}", callback.every, 1)
    if len({*map(id, callbacks)}) < len(callbacks):
        raise SettingsError("callbacks: one is given twice, and would be told of each step twice; make two of them")
