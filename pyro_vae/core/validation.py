"""Settings that are numbers, refused in one sentence where they are out of their range."""

import math
from numbers import Integral, Real
from typing import Any

from pyro_vae.errors import SettingsError


def whole(name: str, value: Any, least: int) -> int:
    """``value``, if it is a whole number of at least ``least``.

    Raises:
        SettingsError: if it is not.

    Example:
        >>> whole("levels", 4, 2)
        4
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SettingsError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def above_zero(name: str, value: Any) -> float:
    """``value``, if it is a finite number above 0.

    Raises:
        SettingsError: if it is not.

    Example:
        >>> above_zero("scale", 0.5)
        0.5
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise SettingsError(f"{name} is {value!r}; it must be a finite number above 0")
    return number
