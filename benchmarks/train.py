"""Training speed, side by side: ``python -m benchmarks.train`` (``--quick`` for a look, ``--help`` for more).

Every contestant trains the same architecture, on the same data, in the same batches, for the same number of steps, in a
process of its own; they take turns, so that what disturbs the machine disturbs all alike, and wait idle between.
On a GPU they make ready side by side, so that the seconds to their first pass are not comparable there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BATCHES, SIZES, Case
from benchmarks.floor import floor
from benchmarks.report import BASE, figure, machine, table, write

NAMES = [
    "ours, compiled", "ours, eager", "pyro.infer.SVI", "pyro.infer.SVI, validation on", "torch by hand",
    "torch by hand, torch.compile", "torch by hand, CUDA graph", "NumPyro, jitted epoch", "pythae's trainer",
]  # fmt: skip
GPU_RACES = 3
"""On a GPU, start the contestants of this many races at once: each needs a CPU core to get ready."""


class Contestant:
    """A worker process, which trains a pass when it is told to."""

    def __init__(self, name: str, case: Case, threads: int) -> None:
        self.name, self.passes = name, []  # type: ignore[var-annotated]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # JAX would take most of a GPU that others share
        }
        command = [sys.executable, "-m", "benchmarks.worker", name, json.dumps(case.settings()), str(threads)]
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  a full pipe would stop it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    @cached_property
    def first(self) -> dict[str, Any]:
        """Wait until it is ready; return its first message."""
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        errors = self.errors.read().strip()
        print(errors, file=sys.stderr)
        return {"left_out": (errors.splitlines() or ["it ended"])[-1]}

    def take_turn(self, *, counts: bool = True) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        if counts:
            self.passes.append(answer)

    def end(self) -> dict[str, Any]:
        self.process.communicate()
        self.errors.close()
        if "left_out" in self.first:
            return self.first
        milliseconds = [1e3 * one["seconds"] for one in self.passes]
        return {
            "milliseconds_per_step": statistics.median(milliseconds),
            "all_milliseconds": milliseconds,
            "seconds_to_first_pass": self.first["ready"],
            "elbo": [self.first["elbo"], *(one["elbo"] for one in self.passes)],
            "mebibytes": self.passes[-1]["mebibytes"],
        }


def entered(case: Case, names: list[str], threads: int) -> list[Contestant]:
    """Start the contestants of a race; on a CPU, one after another."""
    contestants = []
    for name in names:
        contestants.append(Contestant(name, case, threads))
        if not torch.cuda.is_available():
            _ = contestants[-1].first
    return contestants


def race(case: Case, contestants: list[Contestant], repeats: int, threads: int) -> dict[str, Any]:
    """The contestants' times on one case, taken in turns."""
    for contestant in contestants:
        print(f"  {contestant.name}: {contestant.first}", file=sys.stderr, flush=True)
    running = [c for c in contestants if "left_out" not in c.first]
    for contestant in running:  # while others made ready its memory has grown cold
        contestant.take_turn(counts=False)
    for repeat in range(repeats):
        for contestant in running[repeat % len(running) :] + running[: repeat % len(running)]:
            contestant.take_turn()
    results = {contestant.name: contestant.end() for contestant in contestants}
    ours = results.get(BASE, {}).get("milliseconds_per_step")
    for result in results.values():
        if ours and "milliseconds_per_step" in result:
            result["times_ours"] = result["milliseconds_per_step"] / ours
    lowest = floor(case, threads)
    for result in results.values():
        if "milliseconds_per_step" in result:
            result["times_floor"] = result["milliseconds_per_step"] / lowest["milliseconds_floor"]
    return {"case": case.settings() | {"name": case.name}, "threads": threads, "floor": lowest, "contestants": results}


def cases(chosen: str) -> list[Case]:
    """The races of a set: ``bars`` are those the project holds itself to."""
    small, middle = SIZES["64-128-8"], SIZES["784-400-20"]
    if chosen == "bars":
        return [small, middle]
    if chosen == "sizes":
        return list(SIZES.values())
    if chosen == "batches":
        return [replace(middle, batch=b, steps=max(8192 // b, 4) if b != 20 else 256) for b in BATCHES]
    if chosen == "estimators":
        return [replace(SIZES["784-200-200-50"], estimator=e, steps=16) for e in ("trace", "analytic", "iwae50")]
    if chosen == "gpu":
        return [
            replace(SIZES[name], batch=b, steps=64) for name in ("784-400-20", "64-128-8", "conv") for b in (128, 4096)
        ]
    raise SystemExit(f"there are the sets bars, sizes, batches, estimators and gpu, not {chosen}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["bars", "sizes", "batches", "estimators"])
    parser.add_argument("--contestants", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--quick", action="store_true", help="the bars only, 5 repeats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train.json")
    settings = parser.parse_args()
    sets, repeats = (["bars"], 5) if settings.quick else (settings.sets, settings.repeats)
    races, together = [], GPU_RACES if torch.cuda.is_available() else 1
    chosen = dict.fromkeys(case for name in sets for case in cases(name))
    starts = [(case, threads) for case in chosen for threads in settings.threads]
    for first in range(0, len(starts), together):
        group = [(*start, entered(start[0], settings.contestants, start[1])) for start in starts[first:][:together]]
        for _, _, contestants in group:  # while one races, none may still make ready
            for contestant in contestants:
                _ = contestant.first
        for case, threads, contestants in group:
            print(f"{case.name}, {threads} thread{'s' * (threads > 1)}", file=sys.stderr, flush=True)
            races.append(race(case, contestants, repeats, threads))
            print(table(races[-1]), flush=True)
            write(settings.out, {"machine": machine(), "repeats": repeats, "races": races})
    figure(races, settings.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
