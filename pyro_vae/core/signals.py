"""The signals that ask a process to end."""

import contextlib
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


def deliver_again(received: Sequence[int], handlers: Mapping[signal.Signals, Any]) -> None:
    """Deliver SIGTERM or SIGHUP to the handler that was there before: by default, it ends the process.

    A KeyboardInterrupt of the handler is dropped, since the training has ended already.

    Args:
        received: the received signals, first to last.
        handlers: the handlers that were there before, and are there again.

    Example:
        >>> deliver_again([signal.SIGTERM], {signal.SIGTERM: lambda number, frame: print("asked to end")})
        asked to end
    """
    ending = [number for number in received if number != signal.SIGINT and number in handlers]
    if not ending:
        return
    handler = handlers[signal.Signals(ending[0])]
    if handler == signal.SIG_DFL:
        signal.raise_signal(ending[0])
    elif callable(handler):
        with contextlib.suppress(KeyboardInterrupt):
            handler(ending[0], None)
