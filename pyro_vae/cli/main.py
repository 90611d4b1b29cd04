"""The entry point of the command line ``pyro-vae``."""

import argparse
import io
import itertools
import os
import re
import sys
import tempfile
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
    SettingsError,
    UnboundedDensityWarning,
    UncapturedStepWarning,
    printable,
)

USER_WARNINGS = (
    AtomsWarning, CalibrationWarning, ConstantColumnsWarning, DuplicateRowsWarning, PrecisionWarning,
    UnboundedDensityWarning, UncapturedStepWarning,
)  # fmt: skip
"""Warnings to print in one sentence, without the line of code that raised them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the command line; by default ``sys.argv[1:]``. Without arguments, the help is printed.

    Returns:
        The exit code: 0 on success, 2 after an error (printed on stderr in one sentence), 130 after Ctrl-C.

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
    _replace_unencodable()
    try:
        with _importable_folder(), terminable(), _plain_warnings():
            _validate_encoding([*typed, _current_folder()])
            _validate_configs(flags)
            settings = parser(flags).parse_args(flags)
            return _run(settings.command, settings[settings.command])
    except argparse.ArgumentError as error:
        command = f"{typed[0]} " if typed and typed[0] in COMMANDS else ""
        message = printable(plain(error))
        advice = suggestion(message, options(flags))
        print(f"pyro-vae: {message}{advice}; see pyro-vae {command}--help".replace("?; see", "? See"), file=sys.stderr)
        return 2
    except PyroVAEError as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130


def _replace_unencodable() -> None:
    """Let streams that cannot encode a character, such as those of the C locale, write its code instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def _validate_encoding(texts: Sequence[str]) -> None:
    """Validate that names are UTF-8, the encoding of the settings of a run."""
    if odd := next((text for text in texts if HALVES.search(text)), None):
        raise SettingsError(f"{odd}: this name is not valid UTF-8, which the settings of a run need; rename it")


HALVES = re.compile("[\ud800-\udfff]")
"""What Python decodes invalid bytes to."""


def _validate_configs(flags: Sequence[str]) -> None:
    """Validate files of --config that lie in a run folder, as strictly as when the run resumes."""
    configs = [value for flag, value in itertools.pairwise([*flags, ""]) if flag == "--config"]
    configs += [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")]
    for config in map(Path, configs):
        if os.path.exists(config.parent / "SHA256SUMS"):
            from pyro_vae.cli.saved_settings import read_text, validate_settings

            validate_settings(config, read_text(config), advice=f"copy {config.name} to another folder, to allow")


def _run(command: str, settings: Namespace) -> int:
    """Import the command and call it."""
    from pyro_vae.core.device import validate_seed

    validate_seed(settings.get("seed", 0))
    if command not in TABLES:
        _validate_temporary_folder()
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


def _validate_temporary_folder() -> None:
    """Validate that there is a temporary folder, where torch and Matplotlib put caches if there is no other place."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SettingsError(
            f"no folder for temporary files can be written ({error.strerror}); set TMPDIR to one that can"
        ) from error


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise SettingsError("the current folder was deleted; change to another") from error


@contextmanager
def _importable_folder() -> Iterator[None]:
    """Put the current folder on ``sys.path``, as ``python -m`` does, so that the user's own classes can be imported."""
    here = _current_folder()
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
    """Print warnings for the user in one sentence on stderr, like errors."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        ours = category is UserWarning and Path(filename).is_relative_to(Path(pyro_vae.__file__).parent)
        if ours or issubclass(category, USER_WARNINGS):
            print(f"pyro-vae: {printable(str(message))}", file=sys.stderr)
        else:
            shown(message, category, filename, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
