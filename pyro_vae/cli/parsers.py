"""Parsers of flags and YAML files, built from the signature and the docstring of a function."""

import argparse
from collections.abc import Callable
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile, ArgumentParser, get_loader, set_loader

from pyro_vae.cli.messages import plain


def _load(text: str) -> Any:
    """Load the value of a flag or the text of a file from YAML, where the flag ``--drop "#n"`` is not a comment."""
    return text if text.lstrip().startswith("#") and "\n" not in text.strip() else get_loader("yaml")(text)


set_loader("pyro-vae", _load, (yaml.YAMLError,))

# Errors are raised, so that main can print them in one sentence; abbreviations would make new settings ambiguous.
STRICT: Any = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": "pyro-vae"}


class ConfigFile(ActionConfigFile):
    """The flag ``--config``, whose error messages name the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            super().__call__(parser, cfg, values, option_string)
        except (TypeError, KeyError, UnicodeError, argparse.ArgumentError) as error:
            raise TypeError(f"{values}: {plain(error)}") from error


def parser_of(*functions: Callable[..., Any]) -> ArgumentParser:
    """Return a parser of the arguments of functions, from flags or a YAML file; the first describes the command."""
    parser = ArgumentParser(description=(functions[0].__doc__ or "").splitlines()[0], **STRICT)
    parser.add_argument("--config", action=ConfigFile, help="a YAML file of these settings; flags after it override it")
    for function in functions:
        parser.add_function_arguments(function, as_positional=False)
    return parser


def trust_settings(*, trust: str | None = None) -> None:
    """What to trust in a run folder.

    Args:
        trust: your own packages whose classes the run's settings may name, and folders outside the run that its
            callbacks may write to, e.g. "mypackage,logs". Code inside the run folder is never run.
    """
