"""The signals that ask a process to end."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any


def ending_signals() -> list[signal.Signals]:
    """List SIGINT (Ctrl-C), SIGTERM, and SIGHUP (closed terminal) unless ignored.

    Example:
        >>> signal.SIGTERM in ending_signals()
        True
    """
    hangup = getattr(signal, "SIGHUP", None)  # missing on Windows
    is_handled = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if is_handled else [])]


def end_process_if_asked(received: Sequence[int], handlers: Mapping[signal.Signals, Any]) -> None:
    """End the process by the first received signal, if that is SIGTERM or SIGHUP and had its default handler.

    Python code that handles these signals, and a caller of the command line, decide for themselves.

    Args:
        received: the received signals, first to last.
        handlers: the handlers that were there before, and are there again.

    Example:
        >>> end_process_if_asked([signal.SIGINT], {signal.SIGINT: signal.default_int_handler})
    """
    if received and received[0] != signal.SIGINT and handlers.get(signal.Signals(received[0])) == signal.SIG_DFL:
        signal.raise_signal(received[0])
