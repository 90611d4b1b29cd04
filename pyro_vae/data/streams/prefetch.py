"""Fill the next window in a thread while steps run on the present one."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from pyro_vae.core.rows import Rows

PATIENCE = 2.0
"""Seconds that the thread is given to end; one that waits for a user's iterable ends when that gives something."""

Fill = Callable[[int, Rows], Iterator[Any]]
"""Fills a place with the window of a number, a block at each turn, so that it can be stopped between."""

Window = tuple[int, Rows]


def prefetch(fill: Fill, numbers: range, places: Sequence[Rows]) -> Generator[Window, None, None]:
    """Yield windows one after another, each filled in a thread while those before it are used.

    An error in the thread is raised here. The thread ends with the last window, and when this iterator is
    closed or dropped. The place of a window is filled anew once the next window was asked for.
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
        except BaseException as error:  # whatever it is, the steps are to end by it
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
