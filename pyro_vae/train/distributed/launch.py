"""Start workers on this machine with torchrun's launcher, and report how they ended."""

import atexit
import dataclasses
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae import errors
from pyro_vae.core.signals import deliver_again, ending_signals
from pyro_vae.errors import DivergenceError, ProcessError, PyroVAEError, SettingsError
from pyro_vae.train.distributed.group import LostPeerError, threads_per_process

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortized
    from pyro_vae.train.fit import Fit

GRACE = 2.0
"""The seconds that a worker waits after losing a peer, so that the launcher sees the peer's failure first."""

ENDING = 60.0
"""The seconds that workers have for a last checkpoint after SIGINT or SIGTERM."""

SHARED = ("validation_data", "context", "mask")
"""Arguments of ``fit`` whose tensors, like those of ``data``, all workers share in memory."""


def fit_on_workers(
    workers: int, fit: "Callable[..., Fit]", vae: "Amortized", data: Any, settings: dict[str, Any]
) -> "Fit":
    """Run ``fit`` on several workers, and load their weights into ``vae``, also after a divergence."""
    shared = {"data": data, **{name: settings.pop(name) for name in SHARED}}
    weights, seen, result = launch(workers, _fit, fit, vae, settings, shared=shared)
    vae.load_state_dict(weights)
    vars(vae).update(seen)
    if isinstance(result, DivergenceError):
        raise result
    return dataclasses.replace(result, vae=vae)


def _fit(
    fit: "Callable[..., Fit]", vae: "Amortized", settings: dict[str, Any], **shared: Any
) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """Train on one worker; return the weights, what the model knows of the data, and the fit or its divergence."""
    result: Any
    try:
        result = dataclasses.replace(fit(vae, **settings, **shared), vae=None)
    except DivergenceError as error:
        result = error
    seen: dict[str, Any] = {
        name: vars(vae)[name] for name in ("trained_on", "blank_row", "global_sites") if name in vars(vae)
    }
    seen |= {name: value.cpu() for name, value in seen.items() if isinstance(value, Tensor)}
    return {name: value.cpu() for name, value in vae.state_dict().items()}, seen, result


def launch(workers: int, function: Callable[..., Any], *args: Any, shared: dict[str, Any] | None = None) -> Any:
    """Call a function on each of several workers, which connect through torchrun's environment.

    Args:
        workers: the number of workers, at least 1.
        function: a function of a module that workers can import.
        args: its arguments, which are pickled.
        shared: its keyword arguments, whose tensors go to shared memory; workers must not write to them.

    Returns:
        The result of worker 0.

    Raises:
        PyroVAEError: if a worker raises an error of this library.
        SettingsError: if an argument cannot be sent to a worker.
        ProcessError: if a worker dies; the others are stopped.
        KeyboardInterrupt: if workers were killed after a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    validate_main_guard()
    with (
        forward_signals(workers) as received,
        tempfile.TemporaryDirectory(prefix="pyro-vae-") as folder,
        _quiet_torch(),
    ):
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=workers, max_restarts=0, run_id=uuid.uuid4().hex,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, workers), Std.ALL)),
            signals_to_handle="",  # forward_signals handles them, and leaves workers time for a checkpoint
        )  # fmt: skip
        try:
            sent = pickle.dumps((function, args))  # with the launcher's pickle, workers would share the weights
            return elastic_launch(config, _work)(sent, shared or {}, threads_per_process(workers))[0]
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise SettingsError(
                f"the arguments cannot be sent to workers ({error}); build them from classes and functions of a "
                "module, such as functools.partial(torch.optim.Adam, lr=1e-3), or use devices=1"
            ) from error
        except ChildFailedError as error:
            raise _failure(*error.get_first_failure(), workers, bool(received)) from error


def validate_main_guard() -> None:
    """Raise if a worker that is importing the user's script starts workers itself."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingsError(
            'devices: workers import this script; move the code that starts them under if __name__ == "__main__":'
        )


def _work(sent: bytes, shared: dict[str, Any], threads: int) -> Any:
    """Run the function in this worker."""
    os.setpgid(0, 0)  # Ctrl-C goes to the launching process, which forwards it
    signal.signal(signal.SIGTERM, _interrupt)  # fit returns after SIGTERM, so that the launching process gets weights
    try:
        return _call(sent, shared, threads)
    except LostPeerError:
        time.sleep(GRACE)
        raise
    except KeyboardInterrupt:  # also while the function is imported
        sys.exit(128 + signal.SIGINT)  # torch would treat it as a success without a result, and wait


def _call(sent: bytes, shared: dict[str, Any], threads: int) -> Any:
    """Call the function; return its result on worker 0."""
    atexit.register(gc.freeze)  # otherwise the last garbage collection takes a second of each worker
    _exit_if_orphaned()
    torch.set_num_threads(threads)
    try:
        function, args = pickle.loads(sent)  # noqa: S301  (sent by the launching process)
    except (AttributeError, ImportError) as error:
        raise SettingsError(f"a worker cannot import an argument ({error}); define it in a module (.py)") from error
    result = function(*args, **shared)
    _exit_if_orphaned()
    return result if os.environ["RANK"] == "0" else None


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends another one as soon as a worker has ended
    raise KeyboardInterrupt


def _exit_if_orphaned() -> None:
    """Exit if the launching process has died; torch would wait for it."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)


def _failure(rank: int, failure: Any, workers: int, interrupted: bool) -> BaseException:
    """Make the error of a failed worker: its own if it is of this library, else how the worker ended."""
    message = failure.error_file_data["message"]
    text: str = message["message"] if isinstance(message, dict) else "before it started; its output gives the reason"
    name, _, reason = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, PyroVAEError):
        return kind(reason)
    if interrupted:
        return KeyboardInterrupt("the processes were killed; resume from the last checkpoint")
    how = f"ended with exit code {failure.exitcode} ({text.splitlines()[0]})"
    if failure.exitcode < 0:
        how = f"was ended by {failure.signal_name()}" + ", perhaps for lack of memory" * (failure.exitcode == -9)
    return ProcessError(
        f"process {rank} of {workers} {how}, and the others were stopped; "
        "resume from the last checkpoint, or start again"
    )


@contextmanager
def forward_signals(workers: int) -> Iterator[list[int]]:
    """Forward a termination signal to workers; kill them at a second one or after :data:`ENDING` seconds.

    Args:
        workers: the number of workers that start inside the block; the signal also ends those that start after it.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    others, ended = {*multiprocessing.active_children()}, threading.Event()

    def forward(number: int, _: Any = None) -> None:
        received.append(number)
        if len(received) == 1:
            threading.Thread(target=end_workers, daemon=True).start()
            return
        for worker in {*multiprocessing.active_children()} - others:
            worker.kill()

    def end_workers() -> None:
        deadline, asked = time.monotonic() + ENDING, set[Any]()
        while len(asked) < workers and time.monotonic() < deadline and not ended.wait(0.05):
            started = {*multiprocessing.active_children()} - others - asked
            for worker in started:
                worker.terminate()
            asked |= started
        if not ended.wait(max(0.0, deadline - time.monotonic())):
            forward(signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in ending_signals()}
    try:
        yield received
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        deliver_again(received, before)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence the launcher's log, which prints a page for an error that is one sentence here."""
    names = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
