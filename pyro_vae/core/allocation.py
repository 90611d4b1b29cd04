"""Limit what networks take while they are built, before memory is taken."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MOST_TENSORS = 10**4
"""The most tensors of one VAE."""


class AllocationLimit(TorchDispatchMode):
    """Raise a MemoryError when tensors that are made inside would take more than so many bytes together.

    A tensor is measured on the ``meta`` device before it is made.

    Args:
        most: bytes.

    Example:
        >>> with AllocationLimit(2**20):
        ...     torch.nn.Linear(10**6, 10**6)
        Traceback (most recent call last):
        MemoryError: its tensors take 3725.3 GiB of memory or more, and at most 0.0 GiB may be taken
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.taken, self.tensors = most, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named, schema = kwargs or {}, function._schema
        if any(argument.name == "device" for argument in schema.arguments):  # it makes a tensor of given sizes
            self._take(function(*args, **{**named, "device": torch.device("meta")}))
            return function(*args, **named)
        made = function(*args, **named)
        if isinstance(made, torch.Tensor) and not any(returned.alias_info for returned in schema.returns):
            self._take(made)
        return made

    def _take(self, tensor: torch.Tensor) -> None:
        self.taken += math.prod(tensor.shape) * tensor.itemsize
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise MemoryError(f"it has more than {MOST_TENSORS:,} tensors, and at most so many are made")
        if self.taken > self.most:
            taken, most = self.taken / 2**30, self.most / 2**30
            raise MemoryError(
                f"its tensors take {taken:.1f} GiB of memory or more, and at most {most:.1f} GiB may be taken"
            )
