"""Read the settings of a run folder from an untrusted source."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace

from pyro_vae.cli import settings
from pyro_vae.cli.checksums import validate_unchanged
from pyro_vae.cli.messages import plain
from pyro_vae.cli.trust import Trust
from pyro_vae.data.limits import read_text, validate_folder
from pyro_vae.data.memory import as_list
from pyro_vae.errors import DataError

DEEPEST, MOST_VALUES = 64, 10**5
"""The largest depth of settings, and the largest number of values with aliases expanded."""

MOST_BITS = 64
"""The size of the largest integer in settings, in bits; Python refuses to print integers of more than 4,300 digits."""


LONGEST_NUMBER, NUMBERS = 1000, frozenset("0123456789abcdefABCDEFxo_+-.: \t\n")
"""The longest number in settings, and the characters of numbers; YAML takes ``1:1:1…`` for one of base 60, slowly."""


def read_settings(config: Path, parser: ArgumentParser, trust: str | None = None) -> Namespace:
    """Read the settings of a run folder; they are validated before any class that they name is imported.

    Args:
        config: the file.
        parser: of the settings.
        trust: the user's own packages and folders that the settings may name, e.g. ``"mypackage,logs"``.

    Raises:
        DataError: if the file is damaged, or holds no settings.
        SettingsError: if the settings name code that is not trusted.
    """
    validate_folder(config.parent)
    validate_unchanged(config)
    text = read_text(config)
    validate_settings(config, text, trust)
    try:
        return parser.parse_string(text)
    except (argparse.ArgumentError, TypeError, UnicodeError, RecursionError) as error:
        raise DataError(f"{config}: not the settings of a run ({plain(error)}); copy the run again") from error


def validate_settings(config: Path, text: str, trust: str | None = None, **advice: str) -> None:
    """Raise a SettingsError or DataError if the settings of a run folder are too large or name untrusted code."""
    _validate_no_code(config.parent)
    Trust(config, as_list(trust) or [], **advice).validate(read_yaml(config, text), _hints())


def _hints() -> dict[str, Any]:
    """Return the types of the settings of all commands that train."""
    functions = (
        settings.compare_settings, settings.swap_settings, settings.spread_settings, settings.run_settings,
        settings.fit_settings,
    )  # fmt: skip
    return {name: hint for function in functions for name, hint in get_type_hints(function).items()}


def _validate_no_code(folder: Path) -> None:
    """Raise a DataError if the run folder holds code and is on ``sys.path``, as the current folder is."""
    here = folder.resolve()
    if any(Path(place or ".").resolve().is_relative_to(here) for place in sys.path):
        code = next((path for ending in ("py", "pyc", "so") for path in here.rglob(f"*.{ending}")), None)
        if code is not None:
            raise DataError(
                f"{folder}: holds code ({code.relative_to(here)}), which is never run from a run folder; "
                "call the command from another folder"
            )


def read_yaml(path: Path, text: str) -> Any:
    """Parse YAML, after validating its depth and its number of values with aliases expanded.

    Raises:
        DataError: if the text is too large, or is not YAML.

    Example:
        >>> read_yaml(Path("a.yaml"), "epochs: 3")
        {'epochs': 3}
    """
    try:
        _validate_counts(path, text)
        found = yaml.safe_load(text)
        if any(number.bit_length() > MOST_BITS for number in _integers(found)):
            raise DataError(f"{path}: has an integer of more than {MOST_BITS} bits; give a smaller one")
        return found
    except DataError:
        raise
    except Exception as error:  # besides YAML's errors, those of Python's numbers and dates
        raise DataError(
            f"{path}: not the settings of a run ({' '.join(str(error).split())}); copy the run again"
        ) from error


def _integers(tree: Any) -> Iterator[int]:
    if isinstance(tree, int):
        yield tree
    elif isinstance(tree, dict | list | tuple | set):
        for part in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            yield from _integers(part)


def _validate_counts(path: Path, text: str) -> None:
    levels: list[list[Any]] = [[None, 0]]  # the anchor and the number of values of each open collection
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = levels.pop()
            sizes[anchor] = size
            levels[-1][1] += size
        elif isinstance(event, yaml.AliasEvent):
            levels[-1][1] += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            levels[-1][1] += 1
            if len(event.value) > LONGEST_NUMBER and NUMBERS.issuperset(event.value):
                raise DataError(f"{path}: has a number of more than {LONGEST_NUMBER:,} characters; give a smaller one")
        if len(levels) > DEEPEST or levels[-1][1] > MOST_VALUES:
            raise DataError(
                f"{path}: has more than {MOST_VALUES:,} values or {DEEPEST} levels, too many for settings; shorten it"
            )
