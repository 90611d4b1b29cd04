"""Validate settings, and convert numbers of NumPy and torch to Python's."""

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

from pyro_vae.errors import SettingsError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def python_number(value: Any) -> Any:
    """Convert a number of NumPy or torch to a Python number; keep other values.

    Example:
        >>> import numpy as np
        >>> python_number(np.int64(3)), python_number(np.array(0.5)), python_number("three")
        (3, 0.5, 'three')
    """
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole(name: str, value: Any, least: int) -> int:
    """Validate that ``value`` is a whole number of at least ``least``, and return it.

    Raises:
        SettingsError: if it is not.

    Example:
        >>> whole("levels", 4, 2)
        4
    """
    number = python_number(value)
    if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
        raise SettingsError(f"{name} is {number!r}; it must be a whole number of at least {least}")
    return int(number)


def above_zero(name: str, value: Any) -> float:
    """Validate that ``value`` is a finite number above 0, and return it.

    Raises:
        SettingsError: if it is not.

    Example:
        >>> above_zero("scale", 0.5)
        0.5
    """
    given = python_number(value)
    try:
        number = float(given) if isinstance(given, Real) and not isinstance(given, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise SettingsError(f"{name} is {given!r}; it must be a finite number above 0")
    return number


def takes_settings(function: Callable[P, R], *, hints: Mapping[str, str] | None = None) -> Callable[P, R]:
    """Decorate a public function: convert numbers to Python's, and explain unknown and missing keywords.

    Arguments annotated as a number, or as a sequence of numbers, may come from NumPy or be tensors.

    Args:
        function: a function with annotated parameters.
        hints: what to write instead of an unknown keyword, by keyword; ``{value}`` stands for its value.

    Raises:
        SettingsError: in a call, if a keyword is unknown, or if a setting is given without its keyword.

    Example:
        >>> @takes_settings
        ... def train(*, epochs: int) -> str:
        ...     return type(epochs).__name__
        >>> import numpy as np
        >>> train(epochs=np.int64(3))
        'int'
        >>> train(epoch=3)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: train has no setting epoch; did you mean epochs=3?
        >>> train(3)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: train takes no argument without its name; name 3, for example as epochs=3
    """
    parameters = inspect.signature(function).parameters
    numbers = {name for name, parameter in parameters.items() if _is_numeric(parameter.annotation)}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unnamed = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    takes_more = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())

    @functools.wraps(function)
    def converted(*args: P.args, **kwargs: P.kwargs) -> R:
        if not takes_any and (unknown := next((name for name in kwargs if name not in parameters), None)):
            raise SettingsError(_name_unknown(function, unknown, kwargs[unknown], list(parameters), hints or {}))
        if not takes_more and not takes_any and len(unnamed) < len(args) <= len(parameters):
            value = args[len(unnamed)]
            likely = [name for name in list(parameters)[len(unnamed) :] if (name in numbers) == isinstance(value, Real)]
            raise SettingsError(_name_unnamed(function, unnamed, (likely or ["name"])[0], value))
        given = [_to_python(v) if n in numbers else v for v, n in zip(args, parameters, strict=False)]
        named = {name: _to_python(value) if name in numbers else value for name, value in kwargs.items()}
        return function(*given, *args[len(given) :], **named)  # type: ignore[arg-type]

    return converted


def _name_unknown(
    function: Callable[..., Any], name: str, value: Any, known: list[str], hints: Mapping[str, str]
) -> str:
    called = function.__qualname__.removesuffix(".__init__")
    if name in hints:
        return f"{called} has no setting {name}; give {hints[name].format(value=_short_repr(value))}"
    if meant := did_you_mean(name, known):
        return f"{called} has no setting {name}; did you mean {meant}={_short_repr(value)}?"
    return f"{called} has no setting {name}; it takes {', '.join(n for n in known if n != 'self')}"


def _name_unnamed(function: Callable[..., Any], unnamed: list[str], example: str, value: Any) -> str:
    called, first = function.__qualname__.removesuffix(".__init__"), [name for name in unnamed if name != "self"]
    takes = f"only {' and '.join(first)}" if first else "no argument"
    name, shown = "a name" if first else "its name", _short_repr(value)
    return f"{called} takes {takes} without {name}; name {shown}, for example as {example}={shown}"


def _short_repr(value: Any) -> str:
    text = repr(python_number(value))
    return text if len(text) <= 40 else "…"


def _is_numeric(annotation: Any) -> bool:
    """Return whether an annotation allows a number or a sequence of numbers, but no tensor."""
    if get_origin(annotation) not in (types.UnionType, Union, Sequence, tuple, list):
        return annotation in (int, float)
    inner = get_args(annotation)
    return any(map(_is_numeric, inner)) and not any(getattr(each, "__name__", "") == "Tensor" for each in inner)


def _to_python(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(python_number, value)) if type(value) in (list, tuple) else value
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return tuple(value.tolist())
    return python_number(value)
