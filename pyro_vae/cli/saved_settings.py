"""Read the settings of a run folder, which a stranger may have written."""

import argparse
import sys
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
"""The most levels of settings, and the most values once aliases are written out."""


def read_settings(config: Path, parser: ArgumentParser, trust: str | None = None) -> Namespace:
    """Read the settings of a run folder; nothing that they name is imported before it is known to be harmless.

    Args:
        config: the file.
        parser: of the settings.
        trust: packages of the user's own, and folders, that they may name besides, as ``"mypackage,logs"``.

    Raises:
        DataError: if the file is damaged, or holds no settings.
        SettingsError: if they name what may not be run.
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
    """Raise a SettingsError or DataError if settings of a run folder are too many, or name what may not be run."""
    _refuse_code(config.parent)
    Trust(config, as_list(trust) or [], **advice).validate(read_yaml(config, text), _hints())


def _hints() -> dict[str, Any]:
    """The settings of all commands that train, and their types."""
    functions = (
        settings.compare_settings, settings.swap_settings, settings.spread_settings, settings.run_settings,
        settings.fit_settings,
    )  # fmt: skip
    return {name: hint for function in functions for name, hint in get_type_hints(function).items()}


def _refuse_code(folder: Path) -> None:
    """Refuse a run folder that Python would import from, as it looks for modules where the command is called."""
    here = folder.resolve()
    if any(Path(place or ".").resolve().is_relative_to(here) for place in sys.path):
        code = next((path for ending in ("py", "pyc", "so") for path in here.rglob(f"*.{ending}")), None)
        if code is not None:
            raise DataError(
                f"{folder}: holds code, {code.relative_to(here)}, and no code of a run folder is run; "
                "call the command from another folder"
            )


def read_yaml(path: Path, text: str) -> Any:
    """Read the text of a YAML file, once its levels and its values, aliases written out, are counted.

    Raises:
        DataError: if there are too many, or it is no YAML.

    Example:
        >>> read_yaml(Path("a.yaml"), "epochs: 3")
        {'epochs': 3}
    """
    try:
        _validate_counts(path, text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(
            f"{path}: not the settings of a run ({' '.join(str(error).split())}); copy the run again"
        ) from error


def _validate_counts(path: Path, text: str) -> None:
    levels: list[list[Any]] = [[None, 0]]  # of each its anchor and how many values it holds
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
        if len(levels) > DEEPEST or levels[-1][1] > MOST_VALUES:
            raise DataError(
                f"{path}: holds more than {MOST_VALUES:,} values or {DEEPEST} levels of them, which no settings do; "
                "shorten it"
            )
