"""``make mutants``: plant a sample of bugs, run the tests of their module, list what survives."""

import argparse
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from mutants.operators import Mutant, mutants, planted
from mutants.table import REASONS, sources, tests

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "mutants.json"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers --doctest-modules", "-m", "not slow"]
KILLED, SURVIVED, SLOW = "killed", "survived", "killed: too slow"


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import one module with a bug in it."""

    def __init__(self, mutant: Mutant, path: Path) -> None:
        self.mutant, self.path = mutant, path

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != self.mutant.module:
            return None
        package = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=package)

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]
        tree = planted(self.path.read_text(), self.mutant.index)
        exec(compile(tree, str(self.path), "exec"), vars(module))


@dataclass(frozen=True)
class Job:
    """Tests to run, with a mutant planted or without any.

    Args:
        files: the test files.
        mutant: the planted bug.
        path: the file of its module.
    """

    files: tuple[str, ...]
    mutant: Mutant | None = None
    path: Path | None = None


def _run(job: Job) -> None:
    """Run tests until one fails; the exit code is pytest's."""
    import pytest

    if job.mutant and job.path:
        sys.meta_path.insert(0, _Planted(job.mutant, job.path))
        importlib.import_module(
            job.mutant.module
        )  # before pytest, which loads the files it is given by a loader of its own
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = pytest.main([*OPTIONS, *job.files])
    os._exit(int(code))


def ended(jobs: Iterable[Job], workers: int, seconds: float) -> Iterator[tuple[Job, int | None]]:
    """Run each job in a process of its own; give its exit code, or None after so many seconds."""
    waiting, running = iter(jobs), dict[Job, tuple[BaseProcess, float]]()
    while True:
        for job in islice(waiting, workers - len(running)):
            process = get_context("fork").Process(target=_run, args=(job,))
            process.start()
            running[job] = process, time.monotonic() + seconds
        if not running:
            return
        time.sleep(0.02)
        for job, (process, deadline) in list(running.items()):
            if not process.is_alive() or time.monotonic() > deadline:
                code = process.exitcode
                process.kill()
                process.join()
                del running[job]
                yield job, code


def chosen(share: float, least: int, seed: int, only: str) -> list[Job]:
    """A share of the mutants of each module, and at least so many of each (or all, where there are fewer)."""
    found: list[Job] = []
    for module, path in sources(ROOT).items():
        if only in module:
            every = mutants(module, path.read_text())
            count = min(len(every), max(least, round(share * len(every))))
            sample = random.Random(f"{seed} {module}").sample(every, count)
            files = (*tests(ROOT, module), str(path))  # its doctests last
            found += [Job(files, mutant, path) for mutant in sorted(sample, key=lambda m: m.index)]
    return found


def preload() -> None:
    """Import once what every process needs, but nothing of the package."""
    import arviz  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pyro.infer  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import xarray  # noqa: F401
    import zuko  # noqa: F401

    torch.set_num_threads(1)


def run() -> int:
    """Run the sample; 1 if fewer than 95 % are killed, survivors with a stated reason left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.04, help="of each module's mutants")
    parser.add_argument("--least", type=int, default=4, help="of each module's mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="modules whose name contains this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=300.0, help="after which a mutant counts as killed")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    preload()
    jobs, start = chosen(asked.share, asked.least, asked.seed, asked.only), time.monotonic()
    controls = dict.fromkeys(Job(job.files[:-1]) for job in jobs)
    broken = [job.files for job, code in ended(controls, asked.workers, 10 * asked.seconds) if code != 0]
    if broken:
        print("These tests fail without a planted bug; mend them first:", *broken, sep="\n")
        return 2
    counts: Counter[str] = Counter()
    survivors: list[dict[str, object]] = []
    for done, (job, code) in enumerate(ended(jobs, asked.workers, asked.seconds), 1):
        assert job.mutant
        found = SLOW if code is None else KILLED if code else SURVIVED
        reason = REASONS.get((job.mutant.module, job.mutant.before, job.mutant.after), "") if not code else ""
        counts[found] += 1
        print(f"{done}/{len(jobs)} {time.monotonic() - start:5.0f} s  {found}: {job.mutant}", flush=True)
        if found == SURVIVED:
            survivors.append({**asdict(job.mutant), "reason": reason})
    unexplained = sum(not mutant["reason"] for mutant in survivors)
    killed = counts[KILLED] + counts[SLOW]
    share = killed / max(killed + unexplained, 1)
    print(f"{dict(counts)}; {share:.1%} of those without a reason are killed")
    asked.out.write_text(json.dumps({"counts": counts, "killed": share, "survivors": survivors}, indent=1) + "\n")
    return int(share < 0.95)


if __name__ == "__main__":
    raise SystemExit(run())
