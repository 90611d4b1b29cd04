"""x, context and mask of what data sets and iterables give."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.data.rows import Data, reason
from pyro_vae.errors import DataError

TENSORS = (Tensor, np.ndarray)

Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""x, context and mask."""


def parts_of(given: Any, name: str) -> Parts:
    """x, context and mask of what a data set or an iterable gives: a datum or a batch of them.

    Args:
        given: a tensor or an array; :class:`Rows` or :class:`Data`; a mapping with ``"x"`` and perhaps
            ``"context"`` and ``"mask"``; or a tuple or list whose first is x, and whose others are left out.
        name: for messages.

    Raises:
        DataError: if it is no such thing.

    Example:
        >>> x, context, mask = parts_of(([1.0, 2.0], "a label"), "data")
        >>> x, context, mask
        (array([1., 2.]), None, None)
    """
    if isinstance(given, Rows | Data):
        given = {"x": given.x, "context": given.context, "mask": given.mask}
    if isinstance(given, Mapping):
        if "x" not in given:
            raise DataError(f"{name}: it gives a mapping with {sorted(map(str, given))}; name the data x")
        x, context, mask = (None if (v := given.get(k)) is None else _array(v, name) for k in ("x", "context", "mask"))
        assert x is not None
        return x, context, mask
    if (isinstance(given, tuple) and given) or (isinstance(given, list) and isinstance(next(iter(given), 0), TENSORS)):
        given = given[0]
    return _array(given, name), None, None


@contextmanager
def own_noise(name: str) -> Iterator[None]:
    """Warn of a draw from torch's own generator inside, which is then undone.

    A thread would draw there while steps do, so that neither could be repeated.

    Args:
        name: of what is read inside.
    """
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        warnings.warn(
            f"{name}: it draws from torch's own generator, which the steps draw from meanwhile, so no training can be "
            "repeated or resumed to the bit; let it draw from a torch.Generator of its own",
            stacklevel=2,
        )


def as_numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array, in float32 where NumPy has not its precision.

    Example:
        >>> as_numpy(torch.ones(1, dtype=torch.bfloat16)).dtype
        dtype('float32')
    """
    value = value.detach().cpu()
    array: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


def _array(value: Any, name: str) -> np.ndarray:
    try:
        array = as_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: it gives a {type(value).__name__}, no array ({reason(error)})") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name}: the values are of type {array.dtype}; give real numbers")
    return array
