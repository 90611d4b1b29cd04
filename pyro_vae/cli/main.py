"""The command line: ``pyro-vae demo | fit | compare | swap | check``."""

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from pyro_vae.cli.check import run_check
from pyro_vae.cli.compare import run_compare
from pyro_vae.cli.demo import demo
from pyro_vae.cli.fit import Begin, keeping, settings_of, train, untrained
from pyro_vae.cli.messages import plain
from pyro_vae.cli.report import save_fit, show_fit
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import fit_settings, parser, resume_settings
from pyro_vae.cli.swap import run_swap
from pyro_vae.core.device import refuse_seed
from pyro_vae.core.validation import whole
from pyro_vae.errors import DataError, DuplicateRowsWarning, PyroVAEError, UncapturedStepWarning
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.distributed.group import launched, writes
from pyro_vae.train.distributed.launch import launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as typed; those of the process if not given.

    Returns:
        The exit code: 0, 2 for an error in one sentence on stderr, 130 after Ctrl-C.

    Example:
        >>> main(["fit", "--data", "nowhere.csv", "--out", "nowhere"])
        2
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"demo": _run_demo, "fit": _run_fit, "compare": run_compare, "swap": run_swap, "check": run_check}
    flags = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in typed]
    try:
        with _own_classes(), _terminable(), _plain_warnings():
            settings = _asked(flags)
            chosen = settings[settings.command]
            refuse_seed(chosen.get("seed", 0))
            return commands[settings.command](chosen)
    except argparse.ArgumentError as error:
        command = f"{typed[0]} " if typed and typed[0] in commands else ""
        print(f"pyro-vae: {plain(error)}; see pyro-vae {command}--help", file=sys.stderr)
        return 2
    except PyroVAEError as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130


@contextmanager
def _own_classes() -> Iterator[None]:
    """The current folder among the places of modules, as ``python -m`` has it: there the user's own classes lie."""
    here = os.getcwd()
    known = here in sys.path or "" in sys.path
    if not known:
        sys.path.append(here)
    try:
        yield
    finally:
        if not known:
            sys.path.remove(here)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings that are for the user, as one sentence on stderr, as errors are."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, (DuplicateRowsWarning, UncapturedStepWarning)):
            print(f"pyro-vae: {message}", file=sys.stderr)
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _run_demo(settings: Namespace) -> int:
    demo(settings.out, epochs=settings.epochs, seed=settings.seed, device=settings.device)
    return 0


def _asked(flags: list[str]) -> Namespace:
    """The settings: ``fit --resume`` has others than a new run, which brings its own."""
    resumes = flags[:1] == ["fit"] and any(flag.split("=")[0] == "--resume" for flag in flags)
    return parser(resume_settings if resumes else fit_settings).parse_args(flags)


def _run_fit(asked: Namespace) -> int:
    if whole("devices", asked.devices, 1) > 1 and not launched():
        if "resume" not in asked:
            with RunFolder(asked.out):  # refused before processes begin, which takes a while
                pass
        with _interruptible(asked.get("resume") or asked.out):
            code: int = launch(asked.devices, _run_fit, asked)
        return code
    resume, settings = asked.get("resume"), _settled(asked)
    vae, data = untrained(settings)
    checkpoints = Checkpoints(settings.out, steps=asked.checkpoint_steps, minutes=asked.checkpoint_minutes)
    if not writes():
        callbacks = [Begin(None, settings)]
        again = train(settings, vae, data, checkpoints=checkpoints, resume=resume, callbacks=callbacks)
        return 130 if again.interrupted else 0
    with (
        _interruptible(settings.out),
        RunFolder(settings.out) if resume is None else RunFolder.again(resume) as run,
        checkpoints.locked(),  # until all is written
        keeping(settings, vae, run),
    ):
        callbacks = [Begin(run, settings)]
        result = train(settings, vae, data, checkpoints=checkpoints, resume=resume, callbacks=callbacks)
        show_fit(result, Console())
        if result.history.sizes["epoch"]:
            save_fit(run, result, data.held_out)
        run.show(Console())
        if result.interrupted:
            Console().print(f"Go on with: pyro-vae fit --resume {run.path}", highlight=False, soft_wrap=True)
    return 130 if result.interrupted else 0


@contextmanager
def _interruptible(folder: str) -> Iterator[None]:
    """While results are written too, SIGTERM interrupts as Ctrl-C does, and then it is said how to go on."""
    with _terminable():
        try:
            yield
        except KeyboardInterrupt:
            if (Path(folder) / "config.yaml").exists():
                print(f"pyro-vae: go on with pyro-vae fit --resume {folder}", file=sys.stderr)
            raise


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main_thread else None
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _settled(asked: Namespace) -> Namespace:
    """What a run is trained with: what is asked for, or the settings of the run that is to go on."""
    if "resume" not in asked:
        return asked
    settings = settings_of(asked.resume)
    settings.out = asked.resume
    for name in ("data", "validation_data", "epochs", "device"):
        if asked[name] is not None:
            settings[name] = asked[name]
        elif "data" in name and settings[name] and not Path(settings[name]).exists():
            raise DataError(f"{settings[name]}: is no longer there; name where it is now with --{name}")
    return settings
