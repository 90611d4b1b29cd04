"""Stop on SIGTERM and SIGHUP as on Ctrl-C, and print how to resume."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_vae.errors import printable


@contextmanager
def interruptible(folder: str) -> Iterator[None]:
    """Interrupt on SIGTERM and SIGHUP as on Ctrl-C, and then print how to resume the run."""
    with terminable():
        try:
            yield
        except KeyboardInterrupt:
            if os.path.exists(Path(folder) / "config.yaml"):
                print(printable(f"pyro-vae: resume with pyro-vae fit --resume {folder}"), file=sys.stderr)
            raise


@contextmanager
def terminable() -> Iterator[None]:
    """Interrupt on SIGTERM and SIGHUP as on Ctrl-C, inside the block."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    # Repeats core/signals.py, whose import would load torch before --help is printed.
    signals = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    before = {number: signal.signal(number, interrupt) for number in signals if main_thread}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
