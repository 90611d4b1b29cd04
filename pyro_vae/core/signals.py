"""Name the signals that ask a process to end."""

import signal


def ending_signals() -> list[signal.Signals]:
    """List Ctrl-C's signal, SIGTERM, and SIGHUP, which a closed terminal sends, unless nohup has it ignored.

    Example:
        >>> signal.SIGTERM in ending_signals()
        True
    """
    hangup = getattr(signal, "SIGHUP", None)  # which Windows has not
    heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if heard else [])]
