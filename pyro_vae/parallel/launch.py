"""Starting processes by torchrun's engine, and telling in a sentence what became of them."""

import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp

from pyro_vae._numbers import whole
from pyro_vae.errors import ProcessError, PyroVAEError, SettingsError
from pyro_vae.parallel.group import LostError, share_of_cores

GRACE = 2.0
"""So many seconds a process that has lost another waits, so that the other one is noticed first and told of."""

LAST = 10.0
"""So many seconds processes have for a last checkpoint when the one that has started them is gone."""


@dataclass(frozen=True)
class Machines:
    """On how many processes, of how many machines.

    Args:
        devices: processes on each machine, at least 1.
        nodes: machines, at least 1; the same command runs on each.
        node_rank: which machine this is, from 0; that writes.
        rendezvous: ``host:port`` of machine 0, a free port of it; needed with more than one machine.

    Raises:
        SettingsError: if they do not fit each other.

    Example:
        >>> Machines(2).processes, Machines(8, 4, 0, "a.example:29500").processes
        (2, 32)
        >>> Machines(8, 4)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: nodes is 4, and nothing says where they meet; give rendezvous as host:port ...
    """

    devices: int = 1
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None

    def __post_init__(self) -> None:
        whole("devices", self.devices, 1)
        whole("nodes", self.nodes, 1)
        if whole("node_rank", self.node_rank, 0) >= self.nodes:
            raise SettingsError(f"node_rank is {self.node_rank} of {self.nodes} nodes; they are counted from 0")
        if self.nodes > 1 and not self.rendezvous:
            raise SettingsError(
                f"nodes is {self.nodes}, and nothing says where they meet; give rendezvous as host:port of node 0"
            )
        if self.rendezvous and not self.rendezvous.rpartition(":")[2].isdigit():
            raise SettingsError(f"rendezvous is {self.rendezvous}; give host:port of node 0, as node0:29500")

    @property
    def processes(self) -> int:
        """How many there are on all machines together."""
        return self.devices * self.nodes


def launch(machines: Machines, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in each of several processes, which find each other by torchrun's environment.

    One that dies stops all. SIGINT and SIGTERM are handed on to them, and what they then give is given back.

    Args:
        machines: how many processes, and where.
        function: of a module that processes can import; it is given ``args``.
        args: what pickle takes.

    Returns:
        What it gives on the first process of this machine.

    Raises:
        PyroVAEError: what a process raised.
        ProcessError: if a process died: which, how, and what to do.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _refuse_no_guard()
    heard, failed = _Heard(), None
    with (
        tempfile.TemporaryDirectory(prefix="pyro-vae-") as folder,
        _quiet_engine(),
        heard.listening() as queue,
        _handing_on(heard) as signals,
    ):
        given = (queue, os.getpid(), share_of_cores(machines.devices), function, args)
        try:
            elastic_launch(_config(machines, folder), _process)(*given)
        except ChildFailedError as error:
            failed = error
    return _outcome(heard.came, failed, machines, bool(signals))


def _config(machines: Machines, folder: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    alone = machines.nodes == 1 and machines.rendezvous is None
    return LaunchConfig(
        min_nodes=machines.nodes,
        max_nodes=machines.nodes,
        nproc_per_node=machines.devices,
        run_id=uuid.uuid4().hex if alone else "pyro-vae",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else str(machines.rendezvous),
        rdzv_configs={} if alone else {"rank": machines.node_rank},
        local_addr="localhost" if alone else None,
        max_restarts=0,
        monitor_interval=0.05,
        signals_to_handle="SIGQUIT",  # the others are handed on here, so that the processes end by themselves
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


class _Heard:
    """What processes tell: their numbers at the beginning, and what came of them at the end."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self.came: dict[int, Any] = {}
        self.ends: list[threading.Timer] = []

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """A queue that they tell it by."""
        queue = mp.get_context("spawn").SimpleQueue()
        reader = threading.Thread(target=self._read, args=(queue,), daemon=True)
        reader.start()
        try:
            yield queue
        finally:
            queue.put(None)
            reader.join()
            for end in self.ends:
                end.cancel()

    def _read(self, queue: Any) -> None:
        while (one := queue.get()) is not None:
            rank, pid, told = one
            self.pids[rank] = pid
            if told is not None:
                self.came[rank] = pickle.loads(told)  # noqa: S301  (of a process that this one has started)
                if isinstance(self.came[rank], PyroVAEError):
                    self.ends.append(threading.Timer(3 * GRACE, self._stop_others))
                    self.ends[-1].start()

    def _stop_others(self) -> None:
        """End those that would wait for one that has met an error."""
        for rank, pid in self.pids.items():
            if rank not in self.came:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _process(queue: Any, parent: int, threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What each process does; it tells what came of it by the queue, errors of this library included."""
    os.setpgid(0, 0)  # Ctrl-C goes to the first process, which hands it on
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    queue.put((rank, os.getpid(), None))
    try:
        with _silent(rank != 0):
            came: Any = function(*args)
    except LostError:
        time.sleep(GRACE)
        raise
    except PyroVAEError as error:
        came = error
    except Exception:
        traceback.print_exc()
        raise
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is left is to wait for the others
    kept = came if local == 0 or isinstance(came, PyroVAEError) else None
    queue.put((rank, os.getpid(), pickle.dumps(kept)))


def _end_with(parent: int, last: float = LAST) -> None:
    """End this process after another that had no time to say so; torch may have asked it to (SIGINT), too early."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(last)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def _outcome(came: dict[int, Any], failed: Any, machines: Machines, interrupted: bool) -> Any:
    errors = [came[rank] for rank in sorted(came) if isinstance(came[rank], PyroVAEError)]
    if errors:
        raise errors[0]
    if failed is None:
        return came[min(came)]
    if interrupted:
        raise KeyboardInterrupt
    rank, failure = failed.get_first_failure()
    raise ProcessError(
        f"process {rank} of {machines.processes} {_how(failure)}, and the others were stopped; "
        "go on from the last checkpoint (resume), or start again"
    )


def _how(failure: Any) -> str:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"was ended by {name}{', as it is when memory runs out' if name == 'SIGKILL' else ''}"
    message: Any = failure.message
    with suppress(TypeError, ValueError):
        message = json.loads(message)
    message = message.get("message", "") if isinstance(message, dict) else str(message)
    said = next((line for line in reversed(message.splitlines()) if line.strip()), "")
    return f"ended with exit code {failure.exitcode}" + (f" ({said.strip()})" if said else "")


@contextmanager
def _quiet_engine() -> Iterator[None]:
    """Without the engine's log, which says by the page what is told here in a sentence."""
    logs = [logging.getLogger(f"torch.{name}") for name in ("distributed.elastic", "multiprocessing.spawn")]
    before, environment = [log.level for log in logs], set(os.environ)
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
        for name in set(os.environ) - environment:
            if name.startswith("TORCHELASTIC"):
                del os.environ[name]


@contextmanager
def _handing_on(heard: _Heard) -> Iterator[list[int]]:
    """Hand SIGINT and SIGTERM on to the processes; which came is told."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def hand_on(number: int, _: Any) -> None:
        came.append(number)
        for pid in heard.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


GUARD = (
    'processes begin by importing the script that starts them: put what it does under if __name__ == "__main__": '
    "so that they do not do it all again"
)


def _refuse_no_guard() -> None:
    """Refuse a script that would start processes each of which would start processes.

    Raises:
        SettingsError: naming the line.
    """
    if getattr(mp.current_process(), "_inheriting", False):
        raise SettingsError(GUARD)
    main = sys.modules.get("__main__")
    frame: Any = sys._getframe()
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    if frame is None or getattr(main, "__spec__", None) is not None or not hasattr(main, "__file__"):
        return
    if not _guarded(frame.f_code.co_filename, frame.f_lineno):
        raise SettingsError(f"{frame.f_code.co_filename}, line {frame.f_lineno}: {GUARD}")


def _guarded(path: str, line: int) -> bool:
    """Whether a line of a script is in an ``if`` on its name."""
    import ast

    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return True  # no file that a process could import again
    conditions = (n for n in tree.body if isinstance(n, ast.If) and n.lineno <= line <= (n.end_lineno or n.lineno))
    return any(isinstance(name, ast.Name) and name.id == "__name__" for n in conditions for name in ast.walk(n.test))
