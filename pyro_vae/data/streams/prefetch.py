"""Prefetch the next window in a thread while training uses the current one."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from pyro_vae.core.rows import Rows

PATIENCE = 2.0
"""Seconds to wait for the thread to end; it may be blocked in a user's iterable, and then ends later."""

Fill = Callable[[int, Rows], Iterator[Any]]
"""Fills a buffer with the window of a number, block by block, so that it can be stopped in between."""

Window = tuple[int, Rows]


def prefetch(fill: Fill, numbers: range, places: Sequence[Rows]) -> Generator[Window, None, None]:
    """Iterate over windows, each filled in a thread while the ones before it are used.

    An error in the thread is raised here. The thread ends after the last window, or when this iterator is closed or
    deleted. The buffer of a window is reused as soon as the next window is requested.
    """
    free: SimpleQueue[Rows | None] = SimpleQueue()
    full: SimpleQueue[Window | BaseException] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            for number in numbers:
                if (place := free.get()) is None:
                    return
                for _ in fill(number, place):
                    if stop.is_set():
                        return
                full.put((number, place))
        except BaseException as error:  # any error must end the training
            full.put(error)

    for place in places:
        free.put(place)
    thread = threading.Thread(target=work, name="pyro-vae: prefetch", daemon=True)
    thread.start()
    try:
        for _ in numbers:
            window = full.get()
            if isinstance(window, BaseException):
                raise window
            yield window
            free.put(window[1])
    finally:
        stop.set()
        free.put(None)
        thread.join(PATIENCE)
