"""Supply the arguments of each step: the arguments of a call, or rows of resident data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.errors import DataError, SettingsError

Arguments: TypeAlias = Callable[..., tuple[Sequence[Any], dict[str, Any]]]
"""A function from the tensors of a step to the arguments of model and guide; equal functions share a trace."""

PLAIN = (bool, int, float, str, type(None))


class SameObject:
    """A wrapper that compares by identity and keeps its object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class CallArguments:
    """The arguments of a call of model and guide, with a placeholder for each tensor.

    Args:
        args, kwargs: arbitrarily nested arguments.

    Example:
        >>> pairs = [(torch.zeros(2), 3), (torch.ones(2), 3), (1, 3)]
        >>> first, second, third = (CallArguments(pair, {}) for pair in pairs)
        >>> first == second, first == third
        (True, False)
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flat = not kwargs and all(isinstance(value, (Tensor, *PLAIN)) for value in args)
        self.spec: pytree.TreeSpec | None
        self.leaves, self.spec = (list(args), None) if flat else pytree.tree_flatten((args, kwargs))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self.leaves[i].detach().contiguous() for i in self.places]
        rest = (
            (type(v), v) if isinstance(v, PLAIN) else SameObject(v) for v in self.leaves if not isinstance(v, Tensor)
        )
        self.key = (self.spec, tuple(self.places), *rest)

    def __call__(self, *tensors: Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return (leaves, {}) if self.spec is None else pytree.tree_unflatten(leaves, self.spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallArguments) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class BatchArguments:
    """Batches as positional arguments, and constant keyword arguments."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self.key = tuple((k, (type(v), v) if isinstance(v, PLAIN) else SameObject(v)) for k, v in kwargs.items())

    def __call__(self, *batch: Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        return batch, self.kwargs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchArguments) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class GatheredArguments:
    """Arguments from rows of the data, which are gathered by index inside the graph."""

    arguments: Arguments

    def __call__(self, index: Tensor, *data: Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        return self.arguments(*(tensor[index] for tensor in data))


class Feed:
    """Data that stay on the device of the steps.

    Args:
        tensors: tensors of equal length.
        device: the device.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.tensors, self.device = [tensor.detach().to(device).contiguous() for tensor in tensors], device

    def chunk(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return indices of rows, shape ``(steps, batch)``, and the tensors that they index."""
        return rows, self.tensors


def validate_run(tensors: Sequence[Tensor], steps: int, batch_size: int) -> None:
    """Raise if the tensors differ in length, or a number is out of range."""
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(f"the data have {sorted(lengths) or 'no'} rows; pass tensors of equal length, at least 1")
    if not isinstance(steps, int) or steps < 1:
        raise SettingsError(f"steps is {steps}; it must be a whole number of at least 1")
    if not isinstance(batch_size, int) or not 1 <= batch_size <= max(lengths):
        raise SettingsError(f"batch_size is {batch_size}; it must be from 1 to the number of data, {max(lengths)}")
