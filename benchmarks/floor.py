"""What no step can go below: the operations of its products of matrices, at the speed of torch's largest ones."""

import statistics
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case
from benchmarks.contestants import by_hand, networks


def flops(case: Case) -> int:
    """Of one step, forward and backward: a multiplication and an addition each, products and convolutions alone."""
    loss = by_hand(*networks(case), case)
    x = torch.from_numpy(np.zeros((case.batch, case.features), np.float32))
    with FlopCounterMode(display=False) as counter:
        loss(x).backward()
    return int(counter.get_total_flops())


def flops_per_second(threads: int) -> float:
    """What ``torch.mm`` reaches here in single precision, 1024 × 1024 by 1024 × 1024, the median of 15."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, times = torch.randn(1024, 1024), []
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * 1024**3 / statistics.median(times[5:])
