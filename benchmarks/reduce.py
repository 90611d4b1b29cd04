"""How long processes take to add up a gradient: ``python -m benchmarks.reduce --processes 2 --parameters 652_824``."""

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from pyro_vae.train.distributed.group import joined
from pyro_vae.train.distributed.launch import launch


def seconds(parameters: int, repeats: int) -> list[float]:
    """Of each all-reduce of so many float32, on this process."""
    found = []
    with joined(torch.device("cpu")):
        buffer = torch.ones(parameters)
        for _ in range(repeats):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(buffer)
            found.append(time.perf_counter() - started)
    return found[repeats // 10 :]


def main() -> None:
    """Print the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=652_824)
    parser.add_argument("--repeats", type=int, default=200)
    given = parser.parse_args()
    found = launch(given.processes, seconds, given.parameters, given.repeats)
    print(f"{given.processes} processes, {given.parameters} float32: {1e3 * statistics.median(found):.2f} ms (gloo)")


if __name__ == "__main__":
    main()
