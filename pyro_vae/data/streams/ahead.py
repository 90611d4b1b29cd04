"""The next window is filled in a thread while steps run on the one that is here."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from pyro_vae.core.rows import Rows

PATIENCE = 2.0
"""So many seconds the thread is given to end; one that waits for somebody's iterable ends when that gives something."""

Fill = Callable[[int, Rows], Iterator[Any]]
"""Of a window's number and a place for it: fills the place, a block at each turn, so that it can be stopped between."""


def ahead(fill: Fill, numbers: range, places: Sequence[Rows]) -> Generator[tuple[int, Rows], None, None]:
    """Windows one after another, each filled in a thread while those before it are used.

    What goes wrong in the thread is raised here. The thread ends with the last window, and when this
    iterator is closed or dropped.

    Args:
        fill: what fills them.
        numbers: of the windows.
        places: to be filled in turn; a window's place is filled anew once the next window was asked for.

    Example:
        >>> import torch
        >>> def fill(number, place):
        ...     yield place.x.fill_(number)
        >>> [rows.x.item() for _, rows in ahead(fill, range(3), [Rows(torch.zeros(1, 1)), Rows(torch.zeros(1, 1))])]
        [0.0, 1.0, 2.0]
    """
    free: SimpleQueue[Rows | None] = SimpleQueue()
    full: SimpleQueue[tuple[int, Rows] | BaseException] = SimpleQueue()
    stop = threading.Event()
    for place in places:
        free.put(place)
    work = threading.Thread(target=_work, args=(fill, numbers, free, full, stop), name="pyro-vae: ahead", daemon=True)
    work.start()
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
        work.join(PATIENCE)


def _work(
    fill: Fill,
    numbers: range,
    free: "SimpleQueue[Rows | None]",
    full: "SimpleQueue[tuple[int, Rows] | BaseException]",
    stop: threading.Event,
) -> None:
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
