"""Everything that asks for a GPU, in one go: ``make gpu``, or ``python -m benchmarks.gpu --out FOLDER``.

The tests marked ``cuda``, the races of ``benchmarks.train`` and Burda et al.'s model, one after another, each in a
process of its own, within its own time; when one fails the others still run. All of them write to one folder.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CONTESTANTS = [
    "ours, compiled", "pyro.infer.SVI", "torch by hand, torch.compile", "torch by hand, CUDA graph",
    "NumPyro, jitted epoch",
]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it may take."""

    name: str
    command: list[str]
    seconds: float


def parts(out: Path, *, tiny: bool) -> list[Part]:
    """The commands to run.

    Args:
        out: the folder for results and logs.
        tiny: a rehearsal on a CPU: the same commands, as short as they get.
    """
    races = ["--sets", "bars" if tiny else "gpu", "--repeats", "1" if tiny else "7", "--contestants", *CONTESTANTS]
    burda = ["--k", "1", "--passes", "1", "--images", "20"]
    if not tiny:
        burda = ["--k", "50", "--passes", "600", "--precision", "tf32", "--images", "10000"]
    python = [sys.executable, "-m"]
    # The versions there are the machine's own: their warnings are no failures, and notebooks need more packages.
    lenient = ["-W", "default", "--override-ini", "addopts=", "--ignore", "tests/contract/test_notebooks.py"]
    pytest = [*python, "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *lenient]
    return [
        Part("tests", [*pytest, "-m", "cuda", "-n", "auto", "tests"], 190),
        Part("races", [*python, "benchmarks.train", *races, "--out", str(out / "train_gpu.json")], 160),
        Part("burda", [*python, "benchmarks.burda", *burda, "--out", str(out / "burda_gpu.json")], 130),
    ]


def run(part: Part, out: Path, environment: dict[str, str]) -> str:
    """Run a part with its output in ``<name>.log``; return what went wrong, or an empty string."""
    with (out / f"{part.name}.log").open("wb") as log:
        try:
            code = subprocess.run(
                part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=part.seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return f"took more than {part.seconds:.0f} s"
    return f"ended with exit code {code}" if code else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses")
    parser.add_argument("--only", nargs="+", default=["tests", "races", "burda"])
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if chosen.device == "cpu" else {})
    failed = {}
    for part in parts(chosen.out.resolve(), tiny=chosen.device == "cpu"):
        if part.name not in chosen.only:
            continue
        started = time.perf_counter()
        if wrong := run(part, chosen.out, environment):
            failed[part.name] = wrong
        text = (chosen.out / f"{part.name}.log").read_text(errors="replace")
        print(f"=== {part.name}, {time.perf_counter() - started:.0f} s {wrong}\n{text[-6000:]}", flush=True)
    for name, wrong in failed.items():
        print(f"{name} {wrong}; see {name}.log")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
