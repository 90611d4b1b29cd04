"""``make fuzz``: run each file reader on mutated files for a given time.

A reader must return finite numbers or raise an exception of :mod:`pyro_vae.errors` with a one-sentence message, within
one minute and 1 GiB of memory besides the data, in double precision. Any other exception and any crash is a fault.
Files that reach new lines of the reader join the corpus and are mutated further.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import pyro_vae
from faults.formats import FORMATS, RUN, Format
from pyro_vae.errors import CONTROLS, PyroVAEError

HERE = Path(pyro_vae.__file__).parent
SECONDS = 60
"""Time limit per file."""
MEBIBYTES = 1024
"""Limit of memory per file, besides the data."""

TOKENS = (
    b"", b"-1", b"0", b"1", b"255", b"65536", b"1000000000", b"1000000000000000000000000000000", b"1e400", b"-1e308",
    b"0.5", b"nan", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""', b'"x"', b"[1]", b"x", b"\0", b"\xff",
    b"\n", b"\r", b",", b";", b":", b"'", b'"', b"#", b" ", b"\t", b"../..", b"/dev/zero", b"[" * 2000, b"9" * 5000,
    b"tensor", b"os.system", b"torch.nn.Linear", b"|O", b">f2", b"<c16", b"V8", b"U99999",
)  # fmt: skip
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
WORD = re.compile(rb'"[^"\n]{0,60}"|[A-Za-z_.]{2,60}')


def mutate(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """Apply one to four random mutations."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        data = _mutate_once(data, others, chance)
    return data


def _mutate_once(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    place, length = chance.randrange(len(data) + 1), chance.choice([1, 1, 2, 4, 8, 64, 512])
    kind = chance.randrange(9)
    if kind == 0:
        return data[:place]
    if kind == 1 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + chance.randbytes(min(length, len(data) - place)) + data[place + length :]
    if kind == 3:
        number = chance.choice([0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
        size = next(size for size in (1, 2, 4, 8) if number < 2 ** (8 * size))
        return data[:place] + number.to_bytes(size, chance.choice(["little", "big"])) + data[place + size :]
    if kind == 4:
        return data[:place] + chance.choice(TOKENS) + data[place:]
    if kind in (5, 6) and (matches := [*(NUMBER if kind == 5 else WORD).finditer(data[:100_000])]):
        match = chance.choice(matches)
        new = chance.choice(TOKENS) if chance.random() < 0.7 else chance.choice(matches)[0]
        return data[: match.start()] + new + data[match.end() :]
    if kind == 7:
        return data[:place] + data[place : place + length] * chance.choice([0, 2, 9]) + data[place + length :]
    other = chance.choice(others)
    return data[:place] + other[chance.randrange(len(other) + 1) :]


class Lines:
    """Record which lines of some modules run."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.files = {str(HERE / module) for module in modules}
        self.run: set[tuple[str, int]] = set()

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        """Record lines of these modules only; a trace function for ``sys.settrace``."""
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.run.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def all(self) -> set[tuple[str, int]]:
        """Return the lines of all functions of the modules."""
        return {(file, line) for file in self.files for line in _lines(compile(Path(file).read_text(), file, "exec"))}


def _lines(code: CodeType, *, inside: bool = False) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno} if inside else set()
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return lines.union(*(_lines(one, inside=not _is_class(one)) for one in inner))


def _is_class(code: CodeType) -> bool:
    return "__qualname__" in code.co_names and "__module__" in code.co_names


def describe_fault(error: BaseException) -> str | None:
    """Return the fault of an exception, or None if it is a one-sentence error of this library."""
    if isinstance(error, PyroVAEError):
        text = str(error)
        return (
            None
            if "\n" not in text and "; " in text and not CONTROLS.search(text)
            else f"not one sentence: {text[:300]!r}"
        )
    *_, last = traceback.extract_tb(error.__traceback__)
    ours = [step for step in traceback.extract_tb(error.__traceback__) if step.filename.startswith(str(HERE))]
    at = ", ".join(f"{Path(step.filename).name}:{step.lineno}" for step in [*ours[-1:], last])
    return f"{type(error).__name__} at {at}: {str(error)[:200]!r}"


def read_once(kind: Format, folder: Path, data: bytes) -> tuple[str | None, int]:
    """Read one file; return its fault (None if there is none), and the size of its data in MiB."""
    current = folder / "current"
    shutil.rmtree(current, ignore_errors=True)
    current.mkdir()
    kind.place(current, data)
    signal.alarm(SECONDS)  # SIGALRM ends the process
    try:
        read = kind.read(current)
    except Exception as error:
        return describe_fault(error), 0
    finally:
        signal.alarm(0)
    return None, 8 * read.x.numel() // 2**20 if isinstance(read, pyro_vae.data.Data) else 0


def _fuzz(kind: Format, folder: Path, seconds: float, seed: int) -> None:
    """Read mutated files until the time is over, and write the faults to ``result.json``; runs in a child process."""
    chance, lines, found = random.Random(seed), Lines(kind.modules), dict[str, str]()
    corpus, counts = [*kind.seeds()], {"files": 0, "read": 0}
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit = _peak() + 4 * MEBIBYTES
    end = time.monotonic() + seconds
    while time.monotonic() < end or counts["files"] < 2 * len(kind.seeds()):
        whole = counts["files"] < len(corpus) and counts["files"] < len(kind.seeds())
        data = corpus[counts["files"]] if whole else mutate(chance.choice(corpus), corpus, chance)
        (folder / "data").write_bytes(data)
        known, before = len(lines.run), _peak()
        sys.settrace(lines.trace)
        try:
            problem, size = read_once(kind, folder, data)
        finally:
            sys.settrace(None)
        if _peak() - before - size > MEBIBYTES or _peak() - size > limit:
            problem = problem or f"takes {_peak() - before} MiB for {size} MiB of data"
        counts["files"] += 1
        counts["read"] += problem is None
        if len(lines.run) > known and len(data) < 10**6:
            corpus.append(data)
        if (
            problem
            and (key := re.sub(r"\d+", "#", problem.split(": ")[0] if " at " in problem else problem)) not in found
        ):
            found[key] = problem
            (folder.parent / f"find-{kind.name.replace('/', '-')}-{abs(hash(key)) % 10**8}").write_bytes(data)
    every = lines.all()
    (folder / "result.json").write_text(
        json.dumps({**counts, "lines": sorted(lines.run & every), "found": [*found.values()]})
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz(kind: Format, out: Path, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Fuzz one reader.

    Args:
        kind: the kind of its files.
        out: a folder for the files that reveal a fault.
        seconds: the total time.
        seed: seed of the mutations.

    Returns:
        A dict: the number of ``files``, the number ``read`` without a fault, the ``lines`` of the modules that ran, and
        the faults ``found``.
    """
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        folder = Path(temporary)
        if not (child := os.fork()):
            code = 1
            try:
                torch.set_num_threads(1)
                warnings.simplefilter("ignore")
                with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
                    _fuzz(kind, folder, seconds, seed)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            result: dict[str, Any] = json.loads((folder / "result.json").read_text())
            return result
        shutil.copy(folder / "data", out / f"find-{kind.name.replace('/', '-')}-ended")
        ended = f"takes more than {SECONDS} s" if code == -signal.SIGALRM else f"ends the process ({code})"
        return {"files": 0, "read": 0, "lines": [], "found": [ended]}


def run() -> int:
    """Fuzz each reader for its share of the time; return 1 if there is any fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="total time for all readers")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the mutations")
    parser.add_argument("--only", default="", help="prefix of the names of readers to run")
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="folder for the files that reveal a fault")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    chosen = [kind for kind in FORMATS if kind.name.startswith(arguments.only)]
    RUN()  # make the shared run before forking
    ran: dict[str, set[tuple[str, int]]] = {}
    problems = 0
    for kind in chosen:
        result = fuzz(kind, arguments.out, 60 * arguments.minutes / len(chosen), arguments.seed)
        problems += len(result["found"])
        for file, line in result["lines"]:
            ran.setdefault(file, set()).add((file, line))
        print(f"{kind.name:24} {result['files']:6} files, {len(result['found'])} found", flush=True)
        for problem in result["found"]:
            print(f"    {problem}", flush=True)
    print("\nLines that ran:")
    for module in sorted({module for kind in chosen for module in kind.modules}):
        lines = Lines([module])
        every, covered = lines.all(), ran.get(str(HERE / module), set())
        print(f"{module:40} {len(covered):4} of {len(every):4} ({len(covered) / max(len(every), 1):.0%})")
    return int(problems > 0)


if __name__ == "__main__":
    raise SystemExit(run())
