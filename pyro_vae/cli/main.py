"""The command line: ``pyro-vae demo | fit | compare | swap | check | explore``, and those that write tables."""

import argparse
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

import pyro_vae
from pyro_vae.cli.commands import COMMANDS, TABLES, options, parser, with_named_run
from pyro_vae.cli.interrupts import terminable
from pyro_vae.cli.messages import plain
from pyro_vae.cli.suggestions import suggestion
from pyro_vae.errors import (
    AtomsWarning,
    CalibrationWarning,
    ConstantColumnsWarning,
    DuplicateRowsWarning,
    PrecisionWarning,
    PyroVAEError,
    UnboundedDensityWarning,
    UncapturedStepWarning,
    printable,
)

SAID_PLAINLY = (
    AtomsWarning, CalibrationWarning, ConstantColumnsWarning, DuplicateRowsWarning, PrecisionWarning,
    UnboundedDensityWarning, UncapturedStepWarning,
)  # fmt: skip
"""Warnings that are for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as typed; those of the process if not given.

    Returns:
        The exit code: 0, also without arguments, which prints the help; 2 for an error in one sentence on stderr; 130
        after Ctrl-C.

    Example:
        >>> main(["fit", "--data", "nowhere.csv", "--out", "nowhere"])
        2
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    flags = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in typed]
    flags = with_named_run(flags)
    if not flags:
        parser().print_help()
        return 0
    _encode_anything()
    try:
        with _own_classes(), terminable(), _plain_warnings():
            _validate_configs(flags)
            settings = parser(flags).parse_args(flags)
            return _run(settings.command, settings[settings.command])
    except argparse.ArgumentError as error:
        command = f"{typed[0]} " if typed and typed[0] in COMMANDS else ""
        told = printable(plain(error))
        meant = suggestion(told, options(flags))
        print(f"pyro-vae: {told}{meant}; see pyro-vae {command}--help".replace("?; see", "? See"), file=sys.stderr)
        return 2
    except PyroVAEError as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130


def _encode_anything() -> None:
    """Let streams that cannot hold a character, as those of the C locale, write its code instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def _validate_configs(flags: Sequence[str]) -> None:
    """Validate files of --config that lie in a run folder as strictly as where the run goes on."""
    named = [value for flag, value in itertools.pairwise([*flags, ""]) if flag == "--config"]
    named += [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")]
    for config in map(Path, named):
        if (config.parent / "SHA256SUMS").exists():
            from pyro_vae.cli.saved_settings import read_text, validate_settings

            validate_settings(config, read_text(config), advice=f"copy {config.name} to another folder, to allow")


def _run(command: str, settings: Namespace) -> int:
    """Import the command and call it."""
    from pyro_vae.core.device import refuse_seed

    refuse_seed(settings.get("seed", 0))
    if command == "demo":
        from pyro_vae.cli.demo import run_demo

        return run_demo(settings)
    if command == "fit":
        from pyro_vae.cli.fit_command import run_fit

        return run_fit(settings)
    if command == "compare":
        from pyro_vae.cli.compare import run_compare

        return run_compare(settings)
    if command == "swap":
        from pyro_vae.cli.swap import run_swap

        return run_swap(settings)
    if command in TABLES:
        from pyro_vae.cli.tables import run_table

        return run_table(command, settings)
    if command == "explore":
        from pyro_vae.cli.explore import run_explore

        return run_explore(settings)
    from pyro_vae.cli.check import run_check

    return run_check(settings)


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

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        ours = category is UserWarning and Path(filename).is_relative_to(Path(pyro_vae.__file__).parent)
        if ours or issubclass(category, SAID_PLAINLY):
            print(f"pyro-vae: {printable(str(message))}", file=sys.stderr)
        else:
            shown(message, category, filename, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
