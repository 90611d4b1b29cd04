"""Limit the memory of networks before it is allocated."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MOST_TENSORS = 10**4
"""The maximum number of tensors of one VAE."""


class EagerMode(TorchDispatchMode):
    """A dispatch mode that does not import torch's compiler, which takes a second or more; nothing inside is compiled.

    Example:
        >>> class Names(EagerMode):
        ...     def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        ...         print(function)
        ...         return function(*args, **(kwargs or {}))
        >>> with Names():
        ...     made = torch.ones(2)
        aten.ones.default
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class AllocationLimit(EagerMode):
    """Raise a MemoryError before tensors created inside exceed a limit together.

    The size of a tensor is computed on the ``meta`` device before its memory is allocated.

    Args:
        most: the limit, in bytes.

    Example:
        >>> with AllocationLimit(2**20):
        ...     torch.nn.Linear(10**6, 10**6)
        Traceback (most recent call last):
        MemoryError: its tensors take 3725.3 GiB of memory or more; the limit is 0.0 GiB
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.taken, self.tensors = most, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named, schema = kwargs or {}, function._schema
        if any(argument.name == "device" for argument in schema.arguments):  # a factory, whose sizes are arguments
            self._count(function(*args, **{**named, "device": torch.device("meta")}))
            return function(*args, **named)
        made = function(*args, **named)
        if isinstance(made, torch.Tensor) and not any(returned.alias_info for returned in schema.returns):
            self._count(made)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        self.taken += math.prod(tensor.shape) * tensor.itemsize
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise MemoryError(f"it has more than {MOST_TENSORS:,} tensors, the maximum")
        if self.taken > self.most:
            taken, most = self.taken / 2**30, self.most / 2**30
            raise MemoryError(f"its tensors take {taken:.1f} GiB of memory or more; the limit is {most:.1f} GiB")
