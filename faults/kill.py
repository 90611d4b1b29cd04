"""Training killed with SIGKILL at random moments and resumed, until it ends, against one that was never killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from faults.damage import state
from pyro_vae.train.checkpoint.tensor_file import read_tree

Start = Callable[[Sequence[str]], int]
"""Starts ``pyro-vae`` with arguments, and gives the id of its process."""


def forked(arguments: Sequence[str]) -> int:
    """In a process of its own that need not import everything again."""
    if child := os.fork():
        return child
    code = 99
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        from pyro_vae.cli import main

        code = main(arguments)
    finally:
        os._exit(code)


def spawned(arguments: Sequence[str]) -> int:
    """As a user starts it."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "pyro_vae", *arguments], stdout=quiet, stderr=quiet).pid


def _ended(process: int, seconds: float) -> int | None:
    """The exit code, if it ends in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoints/step-*")}


def _under_way(process: int, run: Path) -> tuple[int | None, float]:
    """Wait for the first checkpoint that a process writes; its exit code if it ended, and the seconds."""
    began, before = time.monotonic(), _checkpoints(run)
    while _checkpoints(run) <= before:
        if (code := _ended(process, 0.01)) is not None:
            return code, time.monotonic() - began
    return None, time.monotonic() - began


def _killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def fit(folder: Path, engine: str, *, epochs: int = 40) -> list[str]:
    """The arguments of a small fit that keeps its state after every step."""
    data = folder / "data.npy"
    if not data.exists():
        np.save(data, np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    return [
        "fit", "--data", str(data), "--out", str(folder / "run"), "--epochs", str(epochs), "--batch_size", "16",
        "--hidden", "[8]", "--latent_dim", "2", "--engine", engine, "--device", "cpu", "--checkpoint_steps", "1",
    ]  # fmt: skip


def result(run: Path) -> object:
    """The weights of a run, to the bit."""
    tree, _ = read_tree(run / "weights.safetensors")
    return state(tree)


def kills(
    folder: Path, number: int, *, engine: str, start: Start = forked, in_training: bool = False, seed: int = 0
) -> dict[str, float]:
    """Kill and resume a training until it ends, over again until there were so many kills.

    Args:
        folder: to work in.
        number: of kills, at least.
        engine: ``"eager"`` or ``"compiled"``.
        start: how a training is started.
        in_training: whether the moments lie after the first checkpoint of a process, as where starting takes long.
        seed: of the moments.

    Returns:
        The counts: ``kills``, of them ``while a file was being written``, trainings ``begun again`` since nothing was
        written yet, ``ended``, and of these ``equal to the bit`` to the one never killed.
    """
    chance, arguments, run = random.Random(seed), fit(folder, engine), folder / "run"
    began = time.monotonic()
    process = start(arguments)
    code, starting = _under_way(process, run) if in_training else (None, 0.0)
    code = _ended(process, 600) if code is None else code
    if code != 0:
        raise RuntimeError(f"the training that is not killed ends with {code}")
    whole, truth = time.monotonic() - began - starting, result(run)
    shutil.rmtree(run)
    told = {"kills": 0, "while a file was being written": 0, "begun again": 0, "ended": 0, "equal to the bit": 0}
    while told["kills"] < number:
        resumes = (run / "config.yaml").is_file()
        if not resumes and run.exists():
            shutil.rmtree(run)
            told["begun again"] += 1
        process = start(["fit", "--resume", str(run), "--checkpoint_steps", "1"] if resumes else arguments)
        code = _under_way(process, run)[0] if in_training else None
        code = _ended(process, chance.uniform(0, 0.7 * whole)) if code is None else code
        if code is None:
            _killed(process)
            told["kills"] += 1
            told["while a file was being written"] += any(run.rglob(".*.part-*"))
        elif code != 0:
            raise RuntimeError(f"a resumed training ends with {code}")
        else:
            told["ended"] += 1
            told["equal to the bit"] += result(run) == truth
            shutil.rmtree(run)
    return {**told, "seconds": round(time.monotonic() - began, 1)}
