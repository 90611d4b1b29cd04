"""Shorten the parser's error messages to one sentence."""

import re

from jsonargparse import ArgumentParser, Namespace

from pyro_vae.errors import PyroVAEError, SettingsError


def instantiated(parser: ArgumentParser, settings: Namespace) -> Namespace:
    """Replace the names of classes in settings by objects.

    Raises:
        SettingsError: the error that a class raises for its settings, without the parser's wrapping.
    """
    try:
        return parser.instantiate(settings)
    except ValueError as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, PyroVAEError):
            reason = reason.__cause__ or reason.__context__
        raise SettingsError(str(reason) if reason else plain(error)) from error


# Replacements, in this order, that shorten the parser's messages.
PLAINER = (
    (r"- Expected a <class 'NoneType'>", ""),
    (r"Does not validate .*?Errors:\s*- (.*?)\n\s*(?:- |Given).*?Given value: ([^\n]*)", r"\1. Got value: \2"),
    (r'Key "(?:fit|compare|demo|swap|check|encode|reconstruct|impute|sample|score)\.(\w+)"', r"--\1"),
    (r"Type \S*Callable\[.*?\] expects a function or a callable class: ", ""),
    (r"\.* Got value: Namespace\([^\n]*\)+", ""),
    (r"Expected a (?=<class)", "expected "),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"\.+ Got value: ", ", got "),
    (r"Expected a dot import path string: ([^\s.,]+).*", r"there is no class \1"),
    (r"Unexpected config:.*", "not a table of settings, as 'epochs: 10'"),
    (r'in "<unicode string>", ', "in "),
    (r'Parser key "([\w.]+)":', r"\1:"),
    (r"Dict must include a class_path and optionally init_args, but", "no class is named,"),
    (r"Option '(\w+)' is not accepted", r"no class is named that has an option '\1'"),
    (r"NestedArg\(key='\w+', val='([^']*)'\)", r"\1"),
    (r":, got ", ": got "),
    (r"\s+", " "),
)


def plain(error: Exception) -> str:
    """Rewrite the error of a parser in one line."""
    text = str(error)
    for pattern, plainer in PLAINER:
        text = re.sub(pattern, plainer, text, flags=re.DOTALL)
    return text.strip().rstrip(".")
