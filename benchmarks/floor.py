"""What no step can go below: its matrix products and convolutions, each timed alone where the step runs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import Case
from benchmarks.contestants import by_hand, captured, device, networks

Call = Callable[[], Any]
ADAM_TOUCHES = 7
"""Adam reads parameter, gradient and two averages, and writes all but the gradient."""


class _Products(TorchDispatchMode):
    """Keeps each product or convolution that is computed, with its operands, and counts its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.calls.append(lambda: func(*args, **(kwargs or {})))
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def floor(case: Case, threads: int) -> dict[str, float]:
    """Measure the floor of one step, in milliseconds; on a GPU also the time of a launch and of the bytes moved.

    Args:
        case: the race.
        threads: how many torch may use.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        encoder, decoder = (net.to(device()) for net in networks(case))
        x = torch.from_numpy(np.zeros((case.batch, case.features), np.float32)).to(device())
        with _Products() as products:
            by_hand(encoder, decoder, case)(x).backward()
        found = {
            "flops_per_step": products.flops,
            "products": len(products.calls),
            "milliseconds_floor": 1e3 * sum(map(_seconds, products.calls)),
        }
        if device().type == "cuda":
            numbers = sum(p.numel() for net in (encoder, decoder) for p in net.parameters())
            found |= _of_a_gpu(4 * numbers * ADAM_TOUCHES + 4 * x.numel())
        return found
    finally:
        torch.set_num_threads(before)


def _of_a_gpu(touched: int) -> dict[str, float]:
    """The time of one launch inside a CUDA graph, and of the bytes that Adam and the batch must touch."""
    one = torch.zeros(1, device="cuda")
    large = torch.empty(2**28, device="cuda")  # 1 GiB
    copy = _seconds(lambda: large[: 2**27].copy_(large[2**27 :]))
    return {
        "milliseconds_per_launch": 1e3 * _seconds(lambda: one.add_(1)),
        "bytes_per_step": touched,
        "milliseconds_of_bytes": 1e3 * touched * copy / (2**30),
    }


def _seconds(call: Call) -> float:
    """The median time of a call, without Python's share on a GPU, where 20 are launched as one graph."""
    with torch.no_grad():
        return _seconds_of_graph(call) if device().type == "cuda" else _seconds_on_cpu(call)


def _seconds_on_cpu(call: Call) -> float:
    times = []
    for _ in range(25):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:])


def _seconds_of_graph(call: Call, calls: int = 20) -> float:
    replay = captured(call, calls)
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times[5:])
