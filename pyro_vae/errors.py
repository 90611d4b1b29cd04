"""Exceptions and warnings; each message says what is wrong, where, and what to do."""

import difflib
import re
from collections.abc import Collection
from typing import Any

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal interprets: control characters, bidirectional marks, lone surrogates."""


def printable(text: str) -> str:
    r"""Escape characters that a terminal would interpret; keep line breaks.

    Names of files and columns may contain such characters.

    >>> print(printable("a\x1b[2Jb\r"))
    a\x1b[2Jb\r
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def type_of(value: object) -> str:
    """Name the type of a value with its article.

    >>> type_of(3), type_of([])
    ('an int', 'a list')
    """
    name = type(value).__name__
    starts_with_vowel = name[0] in "aeioAEIO" and not name.startswith("One")
    return f"{'an' if starts_with_vowel or name == 'ndarray' else 'a'} {name}"


class PyroVAEError(Exception):
    """Base class of the errors that this library raises.

    >>> issubclass(DataError, PyroVAEError) and issubclass(DataError, ValueError)
    True
    """

    def __str__(self) -> str:
        # Pyro re-raises an error from inside a trace with a table of shapes appended to its message.
        return printable(re.split(r"\n\s*Trace Shapes:", super().__str__())[0]).replace("\n", "\\n")


class DataError(PyroVAEError, ValueError):
    """The data cannot be used.

    >>> raise DataError("row 3, column 2 is nan")
    Traceback (most recent call last):
    pyro_vae.errors.DataError: row 3, column 2 is nan
    """


class ModelError(PyroVAEError, ValueError):
    """The components of a model do not fit each other, the data or the estimator.

    >>> raise ModelError("the encoder gives 4 latents, the prior has 8")
    Traceback (most recent call last):
    pyro_vae.errors.ModelError: the encoder gives 4 latents, the prior has 8
    """


class SettingsError(PyroVAEError, ValueError):
    """A setting is out of its range.

    >>> raise SettingsError("epochs is 0; it must be at least 1")
    Traceback (most recent call last):
    pyro_vae.errors.SettingsError: epochs is 0; it must be at least 1
    """


class DivergenceError(PyroVAEError, ArithmeticError):
    """Training reached a non-finite number; ``history`` holds the epochs before it.

    >>> raise DivergenceError("the loss became nan at step 7")
    Traceback (most recent call last):
    pyro_vae.errors.DivergenceError: the loss became nan at step 7
    """

    history: Any = None


class OutputError(PyroVAEError, OSError):
    """A result cannot be written to the requested place.

    >>> raise OutputError("runs/a already holds a run; choose another folder")
    Traceback (most recent call last):
    pyro_vae.errors.OutputError: runs/a already holds a run; choose another folder
    """


class CompileError(PyroVAEError, RuntimeError):
    """A training step cannot be compiled; uncompiled training remains possible.

    >>> raise CompileError("the model reads a value of a tensor in Python, at model.py:12")
    Traceback (most recent call last):
    pyro_vae.errors.CompileError: the model reads a value of a tensor in Python, at model.py:12
    """


class ProcessError(PyroVAEError, RuntimeError):
    """A process of a group failed, which stops the whole group.

    >>> raise ProcessError("process 1 of 2 was ended by SIGKILL; resume from the last checkpoint")
    Traceback (most recent call last):
    pyro_vae.errors.ProcessError: process 1 of 2 was ended by SIGKILL; resume from the last checkpoint
    """


class WeightsOnlyWarning(UserWarning):
    """A VAE was saved as weights only, because one of its components has no description.

    >>> issubclass(WeightsOnlyWarning, UserWarning)
    True
    """


class UnfinishedRunWarning(UserWarning):
    """The loaded weights are those of a finished run that was resumed and has not finished again.

    >>> issubclass(UnfinishedRunWarning, UserWarning)
    True
    """


class DuplicateRowsWarning(UserWarning):
    """The data contain duplicate rows, so a standard error that assumes independent rows is too small.

    >>> issubclass(DuplicateRowsWarning, UserWarning)
    True
    """


class AtomsWarning(UserWarning):
    """Models are compared by densities at values that many rows share exactly.

    >>> issubclass(AtomsWarning, UserWarning)
    True
    """


class ConstantColumnsWarning(UserWarning):
    """Columns to standardize are constant, so their spread is unknown.

    >>> issubclass(ConstantColumnsWarning, UserWarning)
    True
    """


class UnboundedDensityWarning(UserWarning):
    """A likelihood is far narrower than its column, so its density grows without bound.

    >>> issubclass(UnboundedDensityWarning, UserWarning)
    True
    """


class PrecisionWarning(UserWarning):
    """The precision of the VAE merges distinct values of a column.

    >>> issubclass(PrecisionWarning, UserWarning)
    True
    """


class CalibrationWarning(UserWarning):
    """Some data have no p-value, because no held-out row is comparable with them.

    >>> issubclass(CalibrationWarning, UserWarning)
    True
    """


class UncapturedStepWarning(UserWarning):
    """The compiled step cannot be captured as a CUDA graph; its kernels are launched one by one, more slowly.

    >>> issubclass(UncapturedStepWarning, UserWarning)
    True
    """


def did_you_mean(word: str, words: Collection[str]) -> str:
    """Return the known word closest to a mistyped one, or an empty string.

    Example:
        >>> did_you_mean("adm", ["Adam", "SGD"])
        'Adam'
    """
    lower = {each.lower(): each for each in words}
    return lower[close[0]] if (close := difflib.get_close_matches(word.lower(), lower, 1)) else ""
