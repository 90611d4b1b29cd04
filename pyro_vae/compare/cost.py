"""Measure the cost of a step: seconds and peak memory."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from pyro_vae.core.allocation import EagerMode


def median_seconds(
    steps: Sequence[Callable[[], Any]], device: torch.device, repeats: int
) -> tuple[list[float], list[float]]:
    """Time steps in turns, and return the median seconds of each and their standard errors.

    The turns spread disturbances of the machine over all steps. The error is that of a median of normals,
    ``1.2533 σ / √n``, with σ from the interquartile range, which, like the median, is robust to outliers.

    Example:
        >>> [len(part) for part in median_seconds([lambda: None, lambda: None], torch.device("cpu"), 3)]
        [2, 2]
    """

    def once(step: Callable[[], Any]) -> float:
        _synchronise(device)
        started = time.perf_counter()
        step()
        _synchronise(device)
        return time.perf_counter() - started

    rounds = [[once(step) for step in steps] for _ in range(repeats)]
    each = [sorted(times) for times in zip(*rounds, strict=True)]
    return [statistics.median(times) for times in each], [_error_of_median(times) for times in each]


def _error_of_median(times: list[float]) -> float:
    middle_half = times[-1 - len(times) // 4] - times[len(times) // 4]
    return 1.2533 * middle_half / 1.349 / math.sqrt(len(times))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Measure the peak bytes of the tensors that a step allocates.

    Tensors are counted one by one, in the same way on every device; the rounding of an allocator and the workspace
    of a kernel are not included.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000).sum())
        4004
    """
    with _PeakMemory() as watch:
        step()
    return watch.peak


class _PeakMemory(EagerMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return made
