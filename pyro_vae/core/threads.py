"""How many threads a piece of work is worth."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALL_STEP = 32_000_000
"""A step of fewer operations is taken by one thread: handing out its work takes as long as doing it."""

WITH_GRADIENT = 6
"""Operations per weight and datum: a multiplication and an addition forward, twice as many backward."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads inside, of torch and of the BLAS."""
    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


def threads_for_operations(operations: float) -> int:
    """Return how many threads a step of so many operations is taken by: one, or as many as torch is set to.

    Example:
        >>> threads_for_operations(1e6), threads_for_operations(1e9) == torch.get_num_threads()
        (1, True)
    """
    return 1 if operations < SMALL_STEP else torch.get_num_threads()


@contextmanager
def threads_for_evaluations(weights: Iterable[Tensor], evaluations: int) -> Iterator[None]:
    """Use one thread inside where an evaluation with gradient is a small step, else as many as torch is set to.

    Args:
        weights: of all networks that are evaluated; a convolution, which uses each weight many times, is never small.
        evaluations: how many data, times draws of each, go through the networks at once.

    Example:
        >>> before = torch.get_num_threads()
        >>> with threads_for_evaluations([torch.zeros(13, 32)], 30):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    every = list(weights)
    convolves = any(weight.ndim > 2 for weight in every)
    operations = WITH_GRADIENT * sum(weight.numel() for weight in every) * evaluations
    with threads(torch.get_num_threads() if convolves else threads_for_operations(operations)):
        yield
