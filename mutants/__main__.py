"""``make mutants``: plant a sample of bugs, run the tests of their module, list what survives.

It takes hours and may be ended: the results are written after each bug, and the next run goes on where this one was,
with the bugs of modules that have changed since and with those that survived.
"""

import argparse
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
KILLED, SURVIVED, SLOW, EXPLAINED = "killed", "survived", "killed: too slow", "not run: no test need see it"


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
        seconds: of processor time that it may take; on a busy machine it is given more time to use them.
    """

    files: tuple[str, ...]
    mutant: Mutant | None = None
    path: Path | None = None
    seconds: int = 3000


def _run(job: Job) -> None:
    """Run tests until one fails; the exit code is pytest's."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (job.seconds, job.seconds))
    if job.mutant and job.path:
        sys.meta_path.insert(0, _Planted(job.mutant, job.path))
        importlib.import_module(
            job.mutant.module
        )  # before pytest, which loads the files it is given by a loader of its own
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = pytest.main([*OPTIONS, *job.files])
    os._exit(int(code))


def ended(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, int | None]]:
    """Run each job in a process of its own; give its exit code, or None if it hangs."""
    waiting, running = iter(jobs), dict[Job, tuple[BaseProcess, float]]()
    while True:
        for job in islice(waiting, workers - len(running)):
            process = get_context("fork").Process(target=_run, args=(job,))
            process.start()
            running[job] = process, time.monotonic() + 20 * job.seconds
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


def chosen(share: float, least: int, seed: int, only: str, seconds: int) -> list[Job]:
    """A share of the mutants of each module, and at least so many of each (or all, where there are fewer)."""
    found: list[Job] = []
    for module, path in sources(ROOT).items():
        if only in module:
            every = mutants(module, path.read_text())
            count = min(len(every), max(least, round(share * len(every))))
            sample = random.Random(f"{seed} {module}").sample(every, count)
            files = (*tests(ROOT, module), str(path))  # its doctests last
            found += [Job(files, mutant, path, seconds) for mutant in sorted(sample, key=lambda m: m.index)]
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
    """Run what of the sample no earlier run killed; 1 if fewer than 95 % are killed, those with a reason left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.04, help="of each module's mutants")
    parser.add_argument("--least", type=int, default=4, help="of each module's mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="modules whose name contains this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=int, default=300, help="of the processor; a mutant that takes more is killed")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    preload()
    jobs, start = chosen(asked.share, asked.least, asked.seed, asked.only, asked.seconds), time.monotonic()
    before = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    seen: dict[str, str] = before.get("seen", {})
    seen |= {key(job): EXPLAINED for job in jobs if reason_of(job.mutant)}
    todo = [job for job in jobs if seen.get(key(job), SURVIVED) == SURVIVED]
    print(f"{len(jobs)} bugs, {len(todo)} to try: the others were killed before, or have a reason", flush=True)
    controls = {control_key(job): job for job in (Job(job.files[:-1]) for job in todo)}
    passed: list[str] = before.get("controls", [])
    for job, code in ended([job for name, job in controls.items() if name not in passed], asked.workers):
        if code != 0:
            print("These tests fail without a planted bug; mend them first:", *job.files, sep="\n")
            return 2
        passed.append(control_key(job))
        write(asked.out, jobs, seen, passed)
    for done, (job, code) in enumerate(ended(todo, asked.workers), 1):
        seen[key(job)] = SLOW if code in (None, -signal.SIGKILL, -signal.SIGXCPU) else KILLED if code else SURVIVED
        print(f"{done}/{len(todo)} {time.monotonic() - start:5.0f} s  {seen[key(job)]}: {job.mutant}", flush=True)
        write(asked.out, jobs, seen, passed)
    share = write(asked.out, jobs, seen, passed)
    print(f"{share:.1%} of those without a reason are killed")
    return int(share < 0.95)


def key(job: Job) -> str:
    """Name a mutant; the name changes when its module does."""
    assert job.mutant
    assert job.path
    return f"{job.mutant.module} {job.mutant.index} {hashlib.sha256(job.path.read_bytes()).hexdigest()[:12]}"


def control_key(job: Job) -> str:
    """Name tests without a bug; the name changes when they or the package do."""
    files = [*map(Path, job.files), *sorted((ROOT / "pyro_vae").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def reason_of(mutant: Mutant | None) -> str:
    """Why no test need see a bug, or nothing."""
    return REASONS.get((mutant.module, mutant.before, mutant.after), "") if mutant else ""


def write(out: Path, jobs: Sequence[Job], seen: dict[str, str], passed: Sequence[str]) -> float:
    """Write the results so far; return the share killed, leaving out survivors with a stated reason."""
    tried = {key(job): job.mutant for job in jobs if key(job) in seen and job.mutant}
    survivors = [
        {**asdict(mutant), "reason": reason_of(mutant)}
        for name, mutant in tried.items()
        if seen[name] in (SURVIVED, EXPLAINED)
    ]
    counts = Counter(seen[name] for name in tried)
    killed = counts[KILLED] + counts[SLOW]
    share = killed / max(killed + sum(not survivor["reason"] for survivor in survivors), 1)
    counts["not tried yet"] = len(jobs) - len(tried)
    found = {"counts": counts, "killed": share, "survivors": survivors}
    found |= {"controls": list(passed), "seen": {name: seen[name] for name in tried}}
    beside = out.with_suffix(".new")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(out)
    return share


if __name__ == "__main__":
    raise SystemExit(run())
