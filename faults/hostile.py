"""Run folders as a hostile stranger may write them: what the commands make of each is counted."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from pyro_vae.cli import main
from pyro_vae.cli.checksums import compute_checksum, record_checksum
from pyro_vae.data.limits import trial_command
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree

REFUSED, RIGHT, WRONG = "refused", "right", "wrong"
SECONDS = 60
"""A command that takes longer is killed, and wrong."""

PAYLOAD = "import pathlib\n\npathlib.Path('RAN').touch()\n\nfrom pyro_vae.priors import StandardNormal as Own\n"
WATCHED = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "webbrowser.open"}
"""Audit events that reading a run folder must not raise, except for the process of ``trial_read``."""

CLASSES = (
    "runs.hostile.payload.Own", "payload.Own", "os.system", "os._exit", "builtins.exec", "builtins.print",
    "subprocess.Popen", "antigravity.fly", "json.JSONDecoder", "pickle.Unpickler", "pathlib.Path", "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load", "torch.jit.ScriptModule", "torch.package.PackageImporter", "numpy.memmap",
    "pyro_vae.errors.DataError", "pyro_vae.cli.main.main", "pyro_vae.cli.run_folder.RunFolder",
    "pyro_vae.cli.fit.json.loads",     "pyro.infer.SVI", "importlib.import_module", "runpy.run_path",
)  # fmt: skip
"""Paths of what is no part of a VAE or a training."""

PLACES = ("prior", "likelihood", "posterior", "optimizer", "elbo", "callbacks")
CALLABLES = (
    "os._exit",
    "os.system",
    "builtins.print",
    "builtins.exec",
    "time.sleep",
    "runs.hostile.payload.Own",
    "sys.exit",
)
FILES = ("config.yaml", "run.json", "SHA256SUMS", "weights.safetensors", "history.nc", ".lock", "checkpoints")
COMMANDS = {"weights.safetensors": ["sample", "--n", "2", "--run"], "history.nc": ["check", "--rows", "2", "--run"]}
RESUME = ["fit", "--epochs", "2", "--resume"]

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """A hostile folder.

    Args:
        kind: of hostility, under which it is counted.
        name: of this one.
        change: what makes a good run folder hostile.
        command: that reads it.
        right: whether the command should go on, as if nothing were there.
    """

    kind: str
    name: str
    change: Change
    command: Sequence[str]
    right: bool = False


def _settings(**changed: Any) -> Change:
    def change(run: Path) -> None:
        settings = yaml.safe_load((run / "config.yaml").read_text())
        _text("config.yaml", yaml.safe_dump({**settings, **changed}))(run)

    return change


def _text(name: str, text: str) -> Change:
    def change(run: Path) -> None:
        (run / name).write_text(text)
        record_checksum(run, name, compute_checksum(run / name))

    return change


def classes() -> Iterator[Hostile]:
    """Class paths, in each place that takes a class, by their names alone, and within another class."""
    for place in PLACES:
        for path in CLASSES:
            named = {"class_path": path}
            yield Hostile(
                "class paths",
                f"{place}: {path}",
                _settings(**{place: [named] if place == "callbacks" else named}),
                RESUME,
            )
    for path in CLASSES:
        inside = {"class_path": "pyro_vae.likelihoods.Blocks", "init_args": {"blocks": [[{"class_path": path}, 6]]}}
        yield Hostile("class paths", f"inside: {path}", _settings(likelihood=inside), RESUME)
        yield Hostile("class paths", f"text: {path}", _settings(prior=path), RESUME)
        yield Hostile("class paths", f"YAML in text: {path}", _settings(prior=f"{{class_path: {path}}}"), RESUME)


def callables() -> Iterator[Hostile]:
    """Callables of schedules, which torch would call."""
    for schedule in ("LambdaLR", "MultiplicativeLR"):
        for path in CALLABLES:
            for given in (path, [path]):
                named = {"class_path": f"torch.optim.lr_scheduler.{schedule}", "init_args": {"lr_lambda": given}}
                yield Hostile("callables", f"{schedule}: {given}", _settings(scheduler=named), RESUME)
    full, short = "pyro_vae.callbacks.TensorBoard", "TensorBoard"
    for path, folder in (
        *((full, f"{up}elsewhere") for up in ("/tmp/", "../", "~/")),
        (short, "elsewhere"),
        (short, "1"),
    ):
        named = {"class_path": path, "init_args": {"folder": folder}}
        yield Hostile("callables", f"{path}: {folder}", _settings(callbacks=[named]), RESUME)


def _file(name: str, make: Change) -> Change:
    def change(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return change


def _giant(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


KINDS: dict[str, Change] = {
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to("/etc"),
    "dangling link": lambda path: path.symlink_to("/tmp/pyro-vae-elsewhere"),
    "sparse giant": _giant,
}


def files() -> Iterator[Hostile]:
    """Files of a run folder that are no files, or giants."""
    for name in FILES:
        for kind, make in KINDS.items():
            if name in (".lock", "run.json") and kind == "sparse giant":  # neither is read where checkpoints are
                yield Hostile("links, FIFOs, devices, giants", f"{name}: {kind}", _file(name, make), RESUME, right=True)
            else:
                yield Hostile(
                    "links, FIFOs, devices, giants", f"{name}: {kind}", _file(name, make), COMMANDS.get(name, RESUME)
                )
    newest = "checkpoints/step-999999999.safetensors"
    yield Hostile("links, FIFOs, devices, giants", "newest: sparse giant", _file(newest, _giant), RESUME, right=True)


def _tree(change: Callable[[dict[str, Any]], object]) -> Change:
    def plant(run: Path) -> None:
        tree, about = read_tree(run / "weights.safetensors")
        change(tree)
        write_tree(run / "weights.safetensors", tree, about)

    return plant


def _layer(path: str, **arguments: Any) -> Change:
    described = {"module": {"class": path, "arguments": arguments}}
    return _tree(lambda tree: tree["vae"]["made"]["arguments"]["encoder"]["module"]["arguments"].update(net=described))


def _history(run: Path) -> None:
    with h5py.File(run / "history.nc", "a") as file:
        file.create_dataset("many", (2 * 10**9,), "f8", chunks=(10**6,), compression="gzip")
    record_checksum(run, "history.nc", compute_checksum(run / "history.nc"))


def _elsewhere(run: Path) -> None:
    with h5py.File(run / "history.nc", "a") as file:
        del file["step"]
        file["step"] = h5py.ExternalLink("/etc/hostname", "x")
    record_checksum(run, "history.nc", compute_checksum(run / "history.nc"))


def bombs() -> Iterator[Hostile]:
    """Sizes and nests that would fill the memory, and weights that are no numbers.

    Where a description cannot be used, the weights are loaded into the VAE of the settings, which is right.
    """
    sample, check = COMMANDS["weights.safetensors"], COMMANDS["history.nc"]
    growing = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))
    deep = {"config.yaml": "seed: " + "[" * 3000 + "]" * 3000, "run.json": "[" * 10**5 + "]" * 10**5}
    yield Hostile("bombs", "aliases that grow", _text("config.yaml", growing), RESUME)
    for name, text in deep.items():
        yield Hostile(
            "bombs",
            f"{name}: many levels",
            lambda run, n=name, t=text: (_no_checkpoints(run), _text(n, t)(run)),
            RESUME,
        )
    for sizes in ({"latent_dim": 10**9}, {"latent_dim": 10**15}, {"hidden": [10**9]}, {"hidden": [10**5, 10**5]}):
        yield Hostile("bombs", f"config.yaml: {sizes}", _settings(**sizes), check)
    layers = {
        "Linear": {"in_features": 10**5, "out_features": 10**4},
        "Embedding": {"num_embeddings": 10**9, "embedding_dim": 10**3},
    }
    for name, arguments in layers.items():
        yield Hostile("bombs", f"weights of {name}", _layer(f"torch.nn.{name}", **arguments), sample, right=True)
    one = torch.zeros(2**18)
    yield Hostile(
        "bombs",
        "many names of one tensor",
        _tree(lambda tree: tree.update({f"n{i}": one for i in range(2000)})),
        sample,
    )
    for number in (np.nan, np.inf):
        yield Hostile("bombs", f"weights that are {number}", _tree(lambda tree, n=number: _fill(tree, n)), sample)
    for described in ([1], "x", {}, {"made": {"class": "os.system", "arguments": {}}}, 7):
        yield Hostile(
            "bombs",
            f"description: {described}",
            _tree(lambda tree, d=described: tree.update(vae=d)),
            sample,
            right=True,
        )
    yield Hostile("bombs", "history of 2e9 epochs", _history, check)
    yield Hostile("bombs", "history that leads elsewhere", _elsewhere, check)
    for text in ("[1]", "null", "{}"):
        yield Hostile(
            "bombs",
            f"run.json: {text}",
            lambda run, t=text: (_no_checkpoints(run), _text("run.json", t)(run)),
            RESUME,
            right=text == "{}",
        )
    yield Hostile("bombs", "an untouched folder", lambda run: None, RESUME, right=True)


def _no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _fill(tree: dict[str, Any], number: float) -> None:
    name = next(name for name in tree if name.endswith("weight"))
    tree[name] = torch.full_like(tree[name], number)


def every() -> list[Hostile]:
    """All hostile folders."""
    return [*classes(), *callables(), *files(), *bombs()]


def _is_watched(event: str, given: tuple[Any, ...]) -> bool:
    if event == "subprocess.Popen":
        own = trial_command()
        return [*given[1]][: len(own)] != own
    return event in WATCHED


def _child(arguments: Sequence[str], said: Path) -> None:
    """Run a command, and write what it came to."""
    heard: list[str] = []
    sys.addaudithook(lambda event, given: heard.append(event) if _is_watched(event, given) else None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(said.with_suffix(".out"), "w") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            code: object = main(arguments)
        except BaseException as error:  # a traceback for the user
            code = f"{type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    said.write_text(json.dumps({"code": code, "heard": heard, "grown": grown}))


def outcome(folder: Path, hostile: Hostile, good: Path) -> tuple[str, bool, float]:
    """What comes of a hostile folder: the column it is counted in, whether code was run, and MiB of memory."""
    run, said = folder / "runs" / "hostile", folder / "said.json"
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.copytree(good, run)
    (run / "payload.py").write_text(PAYLOAD)
    hostile.change(run)
    for left in (said, folder / "RAN"):
        left.unlink(missing_ok=True)
    if not (child := os.fork()):
        try:
            os.chdir(folder)
            _child([*hostile.command, "runs/hostile"], said)
        finally:
            os._exit(0)
    if not _ended(child):
        return WRONG, (folder / "RAN").exists(), float("nan")
    found = json.loads(said.read_text()) if said.exists() else {"code": "ended without a word", "heard": [], "grown": 0}
    last = (said.with_suffix(".out").read_text(errors="replace").strip().splitlines() or [""])[-1]
    refused = found["code"] == 2 and last.startswith("pyro-vae: ") and "; " in last
    column = RIGHT if hostile.right and found["code"] == 0 else REFUSED if refused and not hostile.right else WRONG
    if column == WRONG:
        print(f"wrong: {hostile.kind}, {hostile.name}: {found['code']}, {last}", file=sys.stderr)
    return column, bool(found["heard"]) or (folder / "RAN").exists(), found["grown"]


def _ended(child: int) -> bool:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def counts(folder: Path, good: Path, hostiles: Sequence[Hostile]) -> dict[str, dict[str, float]]:
    """Give each hostile folder to its command.

    Args:
        folder: to work in.
        good: a finished run, which stays as it is.
        hostiles: the folders.

    Returns:
        By kind, how many were ``refused`` in a sentence, ``right`` and ``wrong``, in how many ``code run``, and the
        largest ``peak memory`` in MiB above that of the program.
    """
    found: dict[str, Counter[str]] = {}
    peaks: dict[str, float] = {}
    for hostile in hostiles:
        column, ran, grown = outcome(folder, hostile, good)
        count = found.setdefault(hostile.kind, Counter({REFUSED: 0, RIGHT: 0, WRONG: 0, "code run": 0}))
        count[column] += 1
        count["code run"] += ran
        peaks[hostile.kind] = max(peaks.get(hostile.kind, 0.0), grown)
    return {kind: {**count, "peak memory, MiB": round(peaks[kind])} for kind, count in found.items()}
