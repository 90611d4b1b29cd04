"""Format numbers to the digits that their standard errors support, and tables as text."""

import io
import math
import os
import sys
from contextlib import suppress
from typing import IO, Any

import rich.console
from rich.table import Table

from pyro_vae.errors import printable

DIGITS = 2
"""Significant digits of an error; its estimate ends at the same decimal place."""

EXACT = 1e-6
"""Below this relative error a number is shown with seven digits."""


def format_estimate(value: float, error: float, unit: str = "", *, over: str, signed: bool = False) -> str:
    """Format an estimate with its standard error and the source of its variation.

    Args:
        value: the number.
        error: its standard error; NaN or infinite if unknown.
        unit: the unit of both.
        over: the source of variation, such as "data", "100 draws" or "3 seeds"; empty only if the table heading or the
            sentence states it.
        signed: whether a positive number has a sign too.

    Example:
        >>> format_estimate(381.3, 117.2, "nats", over="data")
        '380 ± 120 nats (over data)'
        >>> format_estimate(-1.23456, 0.0996, over=""), format_estimate(0.5, float("nan"), over="")
        ('-1.23 ± 0.10', '0.50 ± ?')
    """
    number, spread = _pair(float(value), float(error), "+" if signed else "")
    text = f"{number} ± {spread} {unit}".rstrip()
    return f"{text} (over {over})" if over else text


def format_rounded(value: float, error: float) -> str:
    """Round a number to the decimal place of the second significant digit of its error.

    Args:
        value: the number.
        error: its standard error; NaN if unknown, for two significant digits.

    Example:
        >>> format_rounded(12.3456, 0.21), format_rounded(12.3456, float("nan"))
        ('12.35', '12')
    """
    return _pair(float(value), float(error), "")[0]


def format_p(p: float, draws: int = 0, error: float = math.nan) -> str:
    """Format a p-value; a finite number of draws never shows that it is 0.

    Args:
        p: the p-value.
        draws: the number of draws it was estimated from; 0 if it is not a Monte-Carlo estimate.
        error: its standard error over these draws.

    Example:
        >>> format_p(0.0, 500), format_p(1.0, 500), format_p(1e-25), format_p(0.032)
        ('p < 0.002', 'p > 0.998', 'p < 0.001', 'p = 0.032')
        >>> format_p(0.25, 500, 0.0194)
        'p = 0.250 ± 0.019 (over 500 draws)'
    """
    least = _rounded_up(1 / draws) if draws else 0.001
    if p < least and (not draws or p * draws < 1):
        return f"p < {least:g}"
    if draws and (1 - p) * draws < 1:
        return f"p > {1 - least:g}"
    if draws and math.isfinite(error):
        return f"p = {format_estimate(p, error, over=f'{draws} draws')}"
    return f"p = {p:.{DIGITS}g}"


def _rounded_up(value: float) -> float:
    """Return the smallest number of one digit that is not below ``value``."""
    unit: float = 10.0 ** math.floor(math.log10(value))
    return math.ceil(round(value / unit, 9)) * unit


def _pair(value: float, error: float, sign: str) -> tuple[str, str]:
    """Format a number and its error."""
    if not math.isfinite(value):
        return f"{value:{sign}}", "?"
    if not math.isfinite(error):
        return (_at(value, _decimals(value), sign) if value else "0"), "?"
    if error == 0:
        return f"{value:{sign}.7g}", "0"
    if error < EXACT * abs(value):
        return f"{value:{sign}.7g}", f"{error:.1g}"
    decimals = _decimals(error)
    if -6 < decimals < 8:
        return _at(value, decimals, sign), _at(error, decimals, "")
    power = -_decimals(max(abs(value), error)) + DIGITS - 1
    scaled = [_at(number / 10.0**power, decimals + power, sign) for number, sign in ((value, sign), (error, ""))]
    return f"{scaled[0]}e{power}", f"{scaled[1]}e{power}"


def _decimals(error: float) -> int:
    """Return the decimal place of the second significant digit of a number."""
    return DIGITS - 1 - int(f"{error:.{DIGITS - 1}e}".partition("e")[2])


def _at(value: float, decimals: int, sign: str) -> str:
    """Round a number to a decimal place, without a sign if the result is 0."""
    return f"{round(value, decimals) + 0.0:{sign}.{max(decimals, 0)}f}"


def discard(stream: IO[str]) -> None:
    """Redirect a stream to the null device, so that flushing it cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


class Console(rich.console.Console):
    """A console that prints text literally: no markup, and control characters escaped.

    Example:
        >>> import sys
        >>> Console(file=sys.stdout).print("runs/[red]\x1b[2J")
        runs/[red]\\x1b[2J
    """

    def __init__(self, **options: Any) -> None:
        shown: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False, **options}
        super().__init__(**shown)

    def _check_buffer(self) -> None:
        """Write; if the output cannot be written, because the disk is full for example, say so and continue."""
        try:
            super()._check_buffer()
        except OSError as error:
            self.on_broken_pipe()
            with suppress(OSError, AttributeError):  # the errors may go to the same place, or nowhere
                sys.stderr.write(f"pyro-vae: the output cannot be written ({error.strerror}); continuing without it\n")

    def on_broken_pipe(self) -> None:
        """Work on without a word where nobody reads any more, as behind ``| head -1``."""
        self.quiet = True
        discard(self.file)

    def render_str(self, text: str, **options: Any) -> Any:
        """Render a string with its control characters escaped."""
        return super().render_str(printable(text), **options)


def as_text(table: Table) -> str:
    """Render a table for ``print``, as wide as its cells.

    Example:
        >>> table = Table("model", title="log p(x)")
        >>> table.add_row("a")
        >>> "log p(x)" in as_text(table)
        True
    """
    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
