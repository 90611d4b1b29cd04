"""Starting processes by torchrun's engine, and telling in a sentence what became of them."""

import json
import logging
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.core.validation import whole
from pyro_vae.errors import ProcessError, PyroVAEError, SettingsError
from pyro_vae.train.distributed.group import LostError, share_of_cores
from pyro_vae.train.distributed.guard import refuse_no_guard
from pyro_vae.train.distributed.heard import GRACE, Heard, handing_on
from pyro_vae.train.distributed.meeting import met

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


def launch(machines: Machines, function: Callable[..., Any], *args: Any, folder: str | None = None) -> Any:
    """Call a function in each of several processes, which find each other by torchrun's environment.

    One that dies stops all. SIGINT and SIGTERM are handed on to them, and what they then give is given back; those
    that have not ended a minute later are killed, and at a second signal all are at once.

    Args:
        machines: how many processes, and where.
        function: of a module that processes can import; it is given ``args``.
        args: what pickle takes.
        folder: of what they are given, which goes with the last of them; one of its own where there is none.

    Returns:
        What it gives on the first process of this machine.

    Raises:
        PyroVAEError: what a process raised.
        ProcessError: if a process died: which, how, and what to do; if another machine does not come.
        KeyboardInterrupt: if they were killed after a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    refuse_no_guard()
    heard, failed = Heard(), None
    with (
        nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="pyro-vae-") as place,
        _quiet_engine(),
        met(machines),
        heard.listening(machines.devices) as pipes,
        handing_on(heard),
    ):
        starter = Starter(os.getpid(), place, share_of_cores(machines.devices))
        try:
            elastic_launch(_config(machines, place), _process)(pipes, starter, function, args)
        except ChildFailedError as error:
            failed = error
    return _outcome(heard, failed, machines)


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


@dataclass(frozen=True)
class Starter:
    """What processes know of the one that has started them.

    Args:
        pid: its number.
        folder: what it would remove at its end.
        threads: how many each of them is to have.
    """

    pid: int
    folder: str
    threads: int

    def gone(self) -> bool:
        """Whether it has ended before them; what it would have removed is then removed here."""
        if os.getppid() == self.pid:
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


def _process(pipes: list[Any], starter: Starter, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What each process does; it tells what came of it by its pipe, errors of this library included."""
    os.setpgid(0, 0)  # Ctrl-C goes to the first process, which hands it on
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    torch.set_num_threads(starter.threads)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    pipes[local].send((rank, os.getpid(), None))
    try:
        with _silent(rank != 0):
            came: Any = function(*args)
    except (LostError, KeyboardInterrupt):  # the second where its starter was killed, which is just about to be gone
        time.sleep(GRACE)
        raise
    except PyroVAEError as error:
        came = error
    except Exception:
        traceback.print_exc()
        raise
    finally:
        starter.gone()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is left is to wait for the others
    kept = came if local == 0 or isinstance(came, PyroVAEError) else None
    pipes[local].send((rank, os.getpid(), pickle.dumps(kept)))


def _end_with(starter: Starter, last: float = LAST) -> None:
    """End this process after another that had no time to say so; torch may have asked it to (SIGINT), too early."""
    while not starter.gone():
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


def _outcome(heard: Heard, failed: Any, machines: Machines) -> Any:
    came = heard.came
    errors = [came[rank] for rank in sorted(came) if isinstance(came[rank], PyroVAEError)]
    if errors:
        raise errors[0]
    if failed is None:
        return came[min(came)]
    if heard.asked is not None:
        raise KeyboardInterrupt("the processes were killed; go on from the last checkpoint (resume)")
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
