"""Many trainings side by side: over processes of this machine, or over a cluster by Ray."""

import itertools
import logging
import multiprocessing as mp
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import torch
import torch.multiprocessing

from pyro_vae.core.validation import whole
from pyro_vae.errors import ProcessError, SettingsError
from pyro_vae.train.distributed.group import share_of_cores
from pyro_vae.train.distributed.launch import validate_main_guard


class Workers(ProcessPoolExecutor):
    """Processes of this machine, each with its share of the cores, as an executor of :mod:`concurrent.futures`.

    Args:
        number: how many, at least 1.

    Raises:
        SettingsError: if it is out of its range.

    Example:
        >>> Workers(0)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: workers is 0; it must be a whole number of at least 1
    """

    def __init__(self, number: int) -> None:
        whole("workers", number, 1)
        validate_main_guard()
        context = mp.get_context("spawn")
        self._begun, self._numbers, self._at = context.SimpleQueue(), itertools.count(), dict[int, int]()
        super().__init__(number, context, _begin, (share_of_cores(number), self._begun))

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Call a function of a module in one of the processes."""
        return super().submit(_announced, next(self._numbers), function, args, kwargs)

    def hear(self) -> None:
        """Take notice of which process has begun with what."""
        while not self._begun.empty():
            pid, number = self._begun.get()
            self._at[pid] = number

    @property
    def own(self) -> list[Any]:
        """Its processes."""
        return list((self._processes or {}).values())

    def died(self, processes: list[Any]) -> tuple[int | None, str]:
        """Of processes, the number of what the one was at that did not end by itself, and how it ended."""
        self.hear()
        for process in processes:
            process.join(1.0)
            if (code := process.exitcode) is not None and code not in (0, -signal.SIGTERM):
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return self._at.get(process.pid), f"was ended by {how}"
        return None, "died"

    def stop(self) -> None:
        """End what is under way, and begin nothing else."""
        own = self.own
        self.shutdown(wait=False, cancel_futures=True)
        for process in own:
            process.kill()  # one that is asked to end would go on with what the queue holds already


_begun: Any = None


def _begin(threads: int, begun: Any) -> None:
    global _begun
    _begun = begun
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]  # with its parent
    with suppress(PermissionError):
        os.setpgid(0, 0)  # Ctrl-C goes to the first process, which ends the others
    torch.set_num_threads(threads)


def _announced(number: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _begun.put((os.getpid(), number))
    return function(*args, **kwargs)


class Cluster(Executor):
    """A Ray cluster as an executor of :mod:`concurrent.futures`; each call has one core.

    Start Ray by ``ray start --head`` on one machine and ``ray start --address=HOST:6379`` on the others, with this
    library and the data on each. No usage statistics are sent, and no dashboard is begun.

    Args:
        address: of a cluster, as ``ray.init`` takes it: ``"auto"`` is the one that was started on this machine.
        settings: of ``ray.init``, as ``num_cpus=2`` with ``address=None`` for a cluster of this process' own.

    Raises:
        SettingsError: if Ray is not installed, or there is no cluster.

    References:
        | Ray: A Distributed Framework for Emerging AI Applications (Moritz et al., 2018),
          https://arxiv.org/abs/1712.05889
    """

    def __init__(self, address: str | None = "auto", **settings: Any) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise SettingsError("a cluster needs Ray; pip install pyro-vae[cluster]") from error
        own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
        if address is None:
            settings = {"include_dashboard": False, **settings}
        try:
            ray.init(
                address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": own}, **settings
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise SettingsError(
                f"cluster {address}: Ray does not answer there ({what}); start it by ray start --head"
            ) from error
        self._ray = ray

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Call a function of a module on some machine."""
        remote = self._ray.remote(function).options(num_cpus=1, max_retries=0)
        future: Future[Any] = remote.remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; one that was started elsewhere stays."""
        self._ray.shutdown()

    def stop(self) -> None:
        """End what is under way, and begin nothing else."""
        self._ray.shutdown()


def as_they_come(
    executor: Workers | Cluster, function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, Any]]:
    """What a function gives of each job, by name, in the order in which they are done.

    Args:
        executor: where it is called.
        function: of a module.
        jobs: name → its arguments.

    Raises:
        ProcessError: if a process dies, naming its job.
        KeyboardInterrupt: after Ctrl-C; what was under way is then ended.
    """
    try:
        futures = {executor.submit(function, *arguments): name for name, arguments in jobs.items()}
        processes = executor.own if isinstance(executor, Workers) else []
        for future in as_completed(futures):
            name = futures[future]
            try:
                result = future.result()
            except BrokenProcessPool as error:
                number, how = executor.died(processes) if isinstance(executor, Workers) else (None, "died")
                name = "one of them" if number is None else [*jobs][number]
                raise ProcessError(f"the process that trained {name} {how}; {AGAIN}") from error
            except Exception as error:
                if type(error).__name__ not in ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError"):
                    raise
                raise ProcessError(f"the process that trained {name} died ({type(error).__name__}); {AGAIN}") from error
            if isinstance(executor, Workers):
                executor.hear()
            yield name, result
    except BaseException:
        executor.stop()
        raise


AGAIN = "start again, with fewer side by side if memory was short"
