"""Stop as Ctrl-C does, and say how to go on."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_vae.errors import printable


@contextmanager
def interruptible(folder: str) -> Iterator[None]:
    """While results are written too, SIGTERM and SIGHUP interrupt as Ctrl-C does, and then it is said how to go on."""
    with terminable():
        try:
            yield
        except KeyboardInterrupt:
            if (Path(folder) / "config.yaml").exists():
                print(printable(f"pyro-vae: go on with pyro-vae fit --resume {folder}"), file=sys.stderr)
            raise


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    # As core/signals.py has it, which would import torch before the help is shown.
    heard = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    before = {number: signal.signal(number, interrupt) for number in heard if main_thread}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
