"""What processes tell the one that has started them, and how that one ends them."""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.errors import ProcessError, PyroVAEError

GRACE = 2.0
"""So many seconds a process that has lost another waits, so that the other one is noticed first and told of."""

ENDING = 60.0
"""So many seconds processes have to end with a last checkpoint and their results, once they were asked to."""


class Heard:
    """What processes tell: their numbers at the beginning, and what came of them at the end."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self.came: dict[int, Any] = {}
        self.asked: int | None = None
        self._timers: list[threading.Timer] = []

    @contextmanager
    def listening(self, processes: int) -> Iterator[list[Connection]]:
        """What each tells it by: a pipe of its own, as one that is killed while it writes leaves it as it is.

        Args:
            processes: how many; inside they begin and end.
        """
        pipes = [mp.get_context("spawn").Pipe(duplex=False) for _ in range(processes)]
        readers = [threading.Thread(target=self._read, args=(given,), daemon=True) for given, _ in pipes]
        for reader in readers:
            reader.start()
        try:
            yield [written for _, written in pipes]
        finally:
            for _, written in pipes:
                written.close()  # the last that could write to it
            for reader in readers:
                reader.join(ENDING)
            for timer in self._timers:
                timer.cancel()

    def _read(self, pipe: Connection) -> None:
        with pipe, suppress(EOFError, OSError):  # the second where it ends within what was told
            while True:
                self._take(*pipe.recv())

    def _take(self, rank: int, pid: int, told: bytes | None) -> None:
        """What a process tells."""
        self.pids[rank] = pid
        if told is None and self.asked is not None:  # before there was anybody to ask
            _signal(pid, signal.SIGTERM)
        if told is not None:
            self.came[rank] = _read_back(rank, told)
            if isinstance(self.came[rank], PyroVAEError):
                self._after(3 * GRACE, self._stop_others)

    def _after(self, seconds: float, call: Any) -> None:
        self._timers.append(timer := threading.Timer(seconds, call))
        timer.daemon = True
        timer.start()

    def _stop_others(self) -> None:
        """End those that would wait for one that has met an error."""
        for rank, pid in [*self.pids.items()]:
            if rank not in self.came:
                _signal(pid, signal.SIGKILL)

    def ask(self, number: int) -> None:
        """Ask processes to end, and end those that have not done so after a while; at the second time at once."""
        if self.asked is not None:
            self._end()
            return
        self.asked = number
        for pid in [*self.pids.values()]:
            _signal(pid, number)
        self._after(ENDING, self._end)

    def _end(self) -> None:
        for pid in [*self.pids.values()]:
            _signal(pid, signal.SIGKILL)


def _read_back(rank: int, told: bytes) -> Any:
    """What a process gives; an error of the user's own, which may not be made again of its sentence, becomes ours."""
    try:
        return pickle.loads(told)  # noqa: S301  (of a process that this one has started)
    except Exception as error:
        return ProcessError(f"what process {rank} gave back cannot be read ({in_a_line(error)}); make it plain")


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def handing_on(heard: Heard) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to the processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        kind: signal.signal(kind, lambda number, _: heard.ask(number)) for kind in (signal.SIGINT, signal.SIGTERM)
    }
    before[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
