"""Stop as Ctrl-C does, and say how to go on."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def interruptible(folder: str) -> Iterator[None]:
    """While results are written too, SIGTERM interrupts as Ctrl-C does, and then it is said how to go on."""
    with terminable():
        try:
            yield
        except KeyboardInterrupt:
            if (Path(folder) / "config.yaml").exists():
                print(f"pyro-vae: go on with pyro-vae fit --resume {folder}", file=sys.stderr)
            raise


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main_thread else None
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
