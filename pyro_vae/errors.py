"""What can go wrong, as types: each message says what, where, and how to mend it."""

import difflib
import re
from collections.abc import Collection
from typing import Any

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it: control characters, marks of the direction of text, half characters."""


def printable(text: str) -> str:
    r"""Escape characters that a terminal would obey, as names of files and columns may hold them; lines are kept.

    >>> print(printable("a\x1b[2Jb\r"))
    a\x1b[2Jb\r
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class PyroVAEError(Exception):
    """The base of every error this library raises on purpose.

    >>> issubclass(DataError, PyroVAEError) and issubclass(DataError, ValueError)
    True
    """

    def __str__(self) -> str:
        # Where an error passes through Pyro's trace, Pyro raises it anew with a table of shapes behind its sentence.
        return printable(re.split(r"\n\s*Trace Shapes:", super().__str__())[0]).replace("\n", "\\n")


class DataError(PyroVAEError, ValueError):
    """The data cannot be used as they are.

    >>> raise DataError("row 3, column 2 is nan")
    Traceback (most recent call last):
    pyro_vae.errors.DataError: row 3, column 2 is nan
    """


class ModelError(PyroVAEError, ValueError):
    """The parts of a model do not fit each other, the data or the estimator.

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
    """Training met a number that is not finite; ``history`` holds the epochs before it.

    >>> raise DivergenceError("the loss became nan at step 7")
    Traceback (most recent call last):
    pyro_vae.errors.DivergenceError: the loss became nan at step 7
    """

    history: Any = None


class OutputError(PyroVAEError, OSError):
    """A result cannot be written where it was asked for.

    >>> raise OutputError("runs/a already holds a run; choose another folder")
    Traceback (most recent call last):
    pyro_vae.errors.OutputError: runs/a already holds a run; choose another folder
    """


class CompileError(PyroVAEError, RuntimeError):
    """A training step cannot be compiled; it can still be trained uncompiled.

    >>> raise CompileError("the model reads a value of a tensor in Python, at model.py:12")
    Traceback (most recent call last):
    pyro_vae.errors.CompileError: the model reads a value of a tensor in Python, at model.py:12
    """


class ProcessError(PyroVAEError, RuntimeError):
    """One of several processes that work together cannot go on, and so none of them.

    >>> raise ProcessError("process 1 of 2 was ended by SIGKILL; go on from the last checkpoint")
    Traceback (most recent call last):
    pyro_vae.errors.ProcessError: process 1 of 2 was ended by SIGKILL; go on from the last checkpoint
    """


class WeightsOnlyWarning(UserWarning):
    """A VAE was saved as weights only, since a part of it has no description.

    >>> issubclass(WeightsOnlyWarning, UserWarning)
    True
    """


class UnfinishedRunWarning(UserWarning):
    """The weights of a finished run were loaded, which has gone on since and has not come to its new end.

    >>> issubclass(UnfinishedRunWarning, UserWarning)
    True
    """


class DuplicateRowsWarning(UserWarning):
    """The data hold rows several times, so a standard error that takes all rows for independent is too small.

    >>> issubclass(DuplicateRowsWarning, UserWarning)
    True
    """


class AtomsWarning(UserWarning):
    """Models are compared by their densities at values that many rows share exactly.

    >>> issubclass(AtomsWarning, UserWarning)
    True
    """


class ConstantColumnsWarning(UserWarning):
    """Columns that are standardized hold one value each, which tells nothing of their spread.

    >>> issubclass(ConstantColumnsWarning, UserWarning)
    True
    """


class UnboundedDensityWarning(UserWarning):
    """A likelihood is far narrower than its column: the density grows without bound, which is no progress.

    >>> issubclass(UnboundedDensityWarning, UserWarning)
    True
    """


class PrecisionWarning(UserWarning):
    """A column loses most of what tells its values apart in the precision of the VAE.

    >>> issubclass(PrecisionWarning, UserWarning)
    True
    """


class CalibrationWarning(UserWarning):
    """Some data have no p-value, since no held-out row is comparable with them.

    >>> issubclass(CalibrationWarning, UserWarning)
    True
    """


class UncapturedStepWarning(UserWarning):
    """The compiled step cannot be captured as a CUDA graph; it is launched kernel by kernel, and is slower.

    >>> issubclass(UncapturedStepWarning, UserWarning)
    True
    """


def did_you_mean(word: str, words: Collection[str]) -> str:
    """The word that a mistyped one was probably meant for, or nothing.

    Example:
        >>> did_you_mean("adm", ["Adam", "SGD"])
        'Adam'
    """
    lower = {each.lower(): each for each in words}
    return lower[close[0]] if (close := difflib.get_close_matches(word.lower(), lower, 1)) else ""
