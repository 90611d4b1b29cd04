"""The signals that ask a process to end."""

import signal


def ending_signals() -> list[signal.Signals]:
    """List SIGINT (Ctrl-C), SIGTERM, and SIGHUP (closed terminal) unless ignored.

    Example:
        >>> signal.SIGTERM in ending_signals()
        True
    """
    hangup = getattr(signal, "SIGHUP", None)  # missing on Windows
    is_handled = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if is_handled else [])]
