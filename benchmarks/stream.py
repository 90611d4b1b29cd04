"""Streaming against memory: ``python -m benchmarks.stream`` (``--quick`` for a look, ``--help`` for more).

The same compiled steps take turns on rows in memory and on a stream: of a file of 40 GB, sparse so that it needs no
disk, and of files whose bytes lie on the disk, their pages dropped before. Each race is a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import SIZES

CASES = ("64-128-8", "784-400-20")
GIGABYTES = 40
ON_DISK = 2
BAR, MEMORY_BAR = 0.8, 2e9 / 2**20


def write_header(path: Path, features: int, gigabytes: float) -> tuple[int, int]:
    """A ``.npy`` file's header alone, for so many bytes of float32; how many rows there are, and where they begin."""
    rows = int(gigabytes * 1e9) // (4 * features)
    with path.open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": (rows, features)}
        np.lib.format.write_array_header_1_0(file, about)
        return rows, file.tell()


def sparse(path: Path, features: int, gigabytes: float) -> None:
    """A file of zeros that takes no room on the disk."""
    rows, begin = write_header(path, features, gigabytes)
    os.truncate(path, begin + 4 * rows * features)


def dense(path: Path, features: int, gigabytes: float) -> None:
    """A file of random bits, as float32, written out."""
    rows, _ = write_header(path, features, gigabytes)
    rng = np.random.default_rng(0)
    with path.open("ab") as file:
        for begin in range(0, rows, 10_000):
            file.write((rng.random((min(10_000, rows - begin), features)) < 0.2).astype("<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Have the system drop the pages of a file that it has kept."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_speed(path: Path) -> float:
    """Megabytes per second of reading the first 512 MB of a file, block after block."""
    started, left, block = time.perf_counter(), 512 * 10**6, bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while left > 0 and (got := file.readinto(block)):
            left -= got
    return 512 / (time.perf_counter() - started)


def mebibytes() -> float:
    """The most memory that this process has taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def race(path: str, name: str, threads: int, repeats: int, windows: int, drop: bool) -> dict[str, Any]:
    """Steps per second in memory and on the stream, in turns of so many windows each."""
    import torch

    import pyro_vae as pv
    from benchmarks.contestants import our_elbo, our_vae
    from pyro_vae.core.rows import Rows
    from pyro_vae.train.compiled.feed import Feed
    from pyro_vae.train.compiled.steps import RowArguments

    torch.set_num_threads(threads)
    case = SIZES[name]
    vae = our_vae(case)
    source = pv.data.stream(path).checked_for(vae).like(vae)
    svi = pv.CompiledSVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True), our_elbo(case))
    arguments = RowArguments(len(source), False, False)

    def steps(rows: Rows, order: torch.Tensor) -> int:
        """Only whole batches, so that a short last window is no other graph."""
        order = order[: len(order) // case.batch * case.batch]
        feed = Feed([rows.x], rows.x.device)
        return sum(len(losses) for losses in svi.steps_over(feed, order, case.batch, arguments))

    def endless() -> Iterator[Any]:
        for epoch in range(10**6):
            if drop:
                forget(Path(path))
            yield from source.windows(seed=epoch, batch_size=case.batch)

    stream, rates = endless(), {"memory": [], "stream": []}  # type: ignore[var-annotated]
    first = next(stream)
    held = Rows(first.rows.x.clone())
    steps(held, first.order[: 40 * case.batch])
    for _ in range(repeats):
        started = time.perf_counter()
        taken = sum(steps(held, torch.randperm(len(held))) for _ in range(windows))
        rates["memory"].append(taken / (time.perf_counter() - started))
        window = next(stream)  # it was read while the other had its turn
        steps(window.rows, window.order)
        started, taken = time.perf_counter(), 0
        for _ in range(windows):
            window = next(stream)
            taken += steps(window.rows, window.order)
        rates["stream"].append(taken / (time.perf_counter() - started))
    ratios = [b / a for a, b in zip(rates["memory"], rates["stream"], strict=True)]
    return {
        "steps_per_second": {kind: statistics.median(found) for kind, found in rates.items()}, "all": rates,
        "ratio": statistics.median(ratios), "all_ratios": ratios, "rows": len(source),
        "window_rows": source.window_rows(case.batch), "mebibytes_training": mebibytes(),
    }  # fmt: skip


def only_read(path: str, windows: int) -> dict[str, Any]:
    """The most memory of a process that only reads windows of a stream, and how fast it does."""
    import pyro_vae as pv

    imported, source = mebibytes(), pv.data.stream(path)
    started, taken = time.perf_counter(), 0
    for _, window in zip(range(windows), source.windows(seed=0, batch_size=128), strict=False):
        taken += len(window.order)
    megabytes = taken * 4 * source.features[0] / 1e6
    return {
        "mebibytes_imported": imported, "mebibytes_reading": mebibytes(),
        "megabytes_per_second": megabytes / (time.perf_counter() - started), "megabytes": megabytes,
    }  # fmt: skip


def apart(omp: int, what: str, **settings: Any) -> dict[str, Any]:
    """One of the two above, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.stream", "--one", what, json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": str(omp)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it ended"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder: Path, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The races, one after another."""
    for name in CASES:
        features = SIZES[name].features
        for kind, make, size in (("sparse", sparse, chosen.gigabytes), ("on disk", dense, chosen.on_disk)):
            path = folder / f"{features}.npy"
            make(path, features, size)
            about: dict[str, Any] = {"case": name, "file": kind, "gigabytes": size}
            if drop := kind == "on disk":
                forget(path)
                about["megabytes_per_second_cold"] = read_speed(path)
                about["megabytes_per_second_cached"] = read_speed(path)
            for threads in chosen.threads:
                turns = {"repeats": chosen.repeats, "windows": chosen.windows}
                found = apart(threads, "race", path=str(path), name=name, threads=threads, drop=drop, **turns)
                yield about | {"threads": threads} | found
            yield about | apart(1, "only_read", path=str(path), windows=40)
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="of the sparse file")
    parser.add_argument("--on-disk", type=float, default=ON_DISK, help="gigabytes of the file that is written out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--windows", type=int, default=3, help="per turn, of 134 MB each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--quick", action="store_true", help="2 repeats of 1 window, one thread, 1 GB on disk")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stream.json")
    chosen = parser.parse_args()
    if chosen.one:
        what, settings = chosen.one
        print(json.dumps({"race": race, "only_read": only_read}[what](**json.loads(settings))))
        return
    if chosen.quick:
        chosen.repeats, chosen.windows, chosen.threads, chosen.on_disk = 2, 1, [1], 1
    from benchmarks.report import machine, stream_figure, write

    results: dict[str, Any] = {"machine": machine(), "repeats": chosen.repeats, "windows": chosen.windows, "races": []}
    with tempfile.TemporaryDirectory() as folder:
        for result in measured(Path(folder), chosen):
            results["races"].append(result)
            print({key: value for key, value in result.items() if not key.startswith("all")}, flush=True)
            write(chosen.out, results)
    stream_figure(results["races"], chosen.out.with_suffix(".png"), bar=BAR, memory_bar=MEMORY_BAR)


if __name__ == "__main__":
    main()
