"""The number of threads for a computation of a given size."""

import functools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALL_STEP = 32_000_000
"""A step with fewer operations uses one thread, because distributing the work takes as long as doing it."""

WITH_GRADIENT = 6
"""Operations per weight and datum: one multiplication and one addition forward, twice as many backward."""

ENDING = 0.05
"""The seconds before a fork in which torch's threads end that belonged to an ended thread."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of threads of torch and of the BLAS inside."""
    if threading.current_thread() is not threading.main_thread():
        _pause_before_forks()
    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


@functools.cache
def _pause_before_forks() -> None:
    """Pause before each fork from now on: while threads end, MKL holds a lock that a forked child would wait for."""
    if hasattr(os, "register_at_fork"):  # missing on Windows
        os.register_at_fork(before=lambda: time.sleep(ENDING))


def threads_for_operations(operations: float) -> int:
    """Return the number of threads for a step: 1 if it is small, else torch's number.

    Example:
        >>> threads_for_operations(1e6), threads_for_operations(1e9) == torch.get_num_threads()
        (1, True)
    """
    return 1 if operations < SMALL_STEP else torch.get_num_threads()


@contextmanager
def threads_for_evaluations(weights: Iterable[Tensor], evaluations: int) -> Iterator[None]:
    """Use one thread inside if an evaluation with gradient is a small step.

    Args:
        weights: the weights of all evaluated networks; a convolution uses each weight many times, so it is never small.
        evaluations: the number of data times draws per forward pass.

    Example:
        >>> before = torch.get_num_threads()
        >>> with threads_for_evaluations([torch.zeros(13, 32)], 30):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    weights = list(weights)
    convolves = any(weight.ndim > 2 for weight in weights)
    operations = WITH_GRADIENT * sum(weight.numel() for weight in weights) * evaluations
    with threads(torch.get_num_threads() if convolves else threads_for_operations(operations)):
        yield
