"""Train several VAEs, in turn or side by side: the seeds and the jobs of ``swap`` and ``compare``."""

import copy
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jsonargparse import Namespace

from pyro_vae.cli.load_data import Loaded
from pyro_vae.cli.settings import with_absolute_paths
from pyro_vae.cli.worker import start_worker
from pyro_vae.core.device import validate_seed
from pyro_vae.core.format import Console
from pyro_vae.core.progress import ticking
from pyro_vae.core.validation import whole
from pyro_vae.errors import ProcessError, SettingsError, printable


@dataclass
class Outcome:
    """The outcome of one job, as a worker sends it.

    Args:
        result: None if the job failed or was interrupted.
        message: how training ended.
        failure: why there is no result.
        interrupted: whether Ctrl-C ended the job.
    """

    result: Any = None
    message: str = ""
    failure: str = ""
    interrupted: bool = False


@dataclass
class Sweep:
    """The outcomes of all jobs, by the name of the job.

    Args:
        results: of the jobs that were finished.
        failures: why other jobs gave no result.
        interrupted: whether Ctrl-C ended the sweep early.
    """

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


Job: TypeAlias = Callable[..., Outcome]
Jobs: TypeAlias = Mapping[str, tuple[Any, ...]]
Keep: TypeAlias = Callable[[str, Any], None]
Outcomes: TypeAlias = Generator[tuple[str, Outcome], None, None]


def seeds_of(settings: Namespace) -> list[int]:
    """Return the seeds to train with.

    Raises:
        SettingsError: if there is no seed, a seed is repeated, or the number of workers is out of its range.
    """
    whole("workers", settings.workers, 1)
    seeds = [settings.seed] if settings.seeds is None else list(settings.seeds)
    for seed in seeds:
        validate_seed(seed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds is {seeds}; name at least one, and each once")
    return seeds


def with_seed(settings: Namespace, seed: int) -> Namespace:
    """Copy the settings with another seed of weights, order and noise; the split of the data keeps its seed."""
    other = copy.deepcopy(settings)
    other.split_seed = settings.seed if settings.split_seed is None else settings.split_seed
    other.seed = seed
    return other


def is_side_by_side(settings: Namespace) -> bool:
    """Return whether each training runs in a worker."""
    return settings.workers > 1 or settings.cluster is not None


def run_jobs(settings: Namespace, function: Job, jobs: Jobs, data: Loaded, keep: Keep | None = None) -> Sweep:
    """Run each job; continue after a failure, and stop at Ctrl-C.

    The results do not depend on the number of workers.

    Args:
        settings: of a command with ``workers`` and ``cluster``.
        function: a function of a module, called as ``function(settings, *arguments, data)``; in a worker ``data`` is
            None, and the function loads the data from the settings.
        jobs: the arguments of each job, by name.
        data: the data of the settings.
        keep: called with the name and the result of each job as soon as it has finished.

    Raises:
        ProcessError: if a worker dies.
        SettingsError: if the cluster does not answer.
    """
    sweep = Sweep()
    if not jobs:
        return sweep
    apart = is_side_by_side(settings)
    outcomes = _side_by_side(settings, function, jobs) if apart else _in_turn(settings, function, jobs, data)
    with closing(outcomes):
        try:
            for job, outcome in outcomes:
                if outcome.interrupted:
                    raise KeyboardInterrupt
                if outcome.failure:
                    sweep.failures[job] = outcome.failure
                    say(f"{job}: {outcome.failure}")
                else:
                    sweep.results[job] = outcome.result
                    if keep is not None:
                        keep(job, outcome.result)
                    if outcome.message:
                        tell(f"{job}: {outcome.message}")
        except KeyboardInterrupt:
            sweep.interrupted = True
    return sweep


def _in_turn(settings: Namespace, function: Job, jobs: Jobs, data: Loaded) -> Outcomes:
    for i, (job, arguments) in enumerate(jobs.items(), 1):
        tell(f"{i} of {len(jobs)}: {job}")
        yield job, function(settings, *arguments, data)


def _side_by_side(settings: Namespace, function: Job, jobs: Jobs) -> Outcomes:
    """Run the jobs in workers, each with its share of the cores, and yield each outcome as soon as it arrives."""
    import joblib

    tell(f"{len(jobs)} trainings, side by side")
    sent = with_absolute_paths(settings)
    calls = [joblib.delayed(_work)(job, function, sent, *arguments) for job, arguments in jobs.items()]
    backend = _processes(settings.workers) if settings.cluster is None else _cluster(settings.cluster)
    with backend as workers, ticking("trained", len(jobs), sys.stderr.isatty()) as tick:
        number = min(workers, len(jobs))
        outcomes = joblib.Parallel(number, return_as="generator_unordered", batch_size=1, pre_dispatch=number)(calls)
        try:
            for i, (job, outcome) in enumerate(outcomes, 1):
                tick()
                tell(f"{i} of {len(jobs)}: {job}")
                yield job, outcome
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # joblib warns when running jobs are stopped
                outcomes.close()


def _work(job: str, function: Job, settings: Namespace, *arguments: Any) -> tuple[str, Outcome]:
    """Run a job in a worker."""
    return job, function(settings, *arguments, None)


@contextmanager
def _processes(workers: int) -> Iterator[int]:
    """Let joblib start workers on this machine."""
    import joblib

    try:
        with joblib.parallel_config("loky", initializer=start_worker, initargs=(os.getpid(),)):
            yield workers
    except BrokenExecutor as error:
        codes = re.search(r"\{(.+)\}", str(error))
        raise ProcessError(f"a worker died ({codes[1] if codes else 'of unknown cause'}); {AGAIN}") from error


@contextmanager
def _cluster(address: str) -> Iterator[int]:
    """Let joblib start workers on a Ray cluster, one per core.

    References:
        | Ray: A Distributed Framework for Emerging AI Applications (Moritz et al., 2018),
          https://arxiv.org/abs/1712.05889
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        from ray.util.joblib.ray_backend import RayBackend
    except ImportError as error:
        raise SettingsError("a cluster needs Ray; pip install pyro-vae[cluster]") from error
    import joblib

    own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": own})
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingsError(
            f"cluster {address}: Ray does not answer ({what}); start it with ray start --head"
        ) from error
    # Ray returns results as they finish, which joblib assumes no pool can do.
    generating = type("Generating", (RayBackend,), {"supports_return_generator": True})
    joblib.register_parallel_backend("ray", generating)
    try:
        with joblib.parallel_config("ray"):
            yield int(ray.cluster_resources()["CPU"])
    except ray.exceptions.RayError as error:
        raise ProcessError(f"a worker died ({type(error).__name__}); {AGAIN}") from error
    finally:
        ray.shutdown()


AGAIN = "start again, with fewer workers if memory ran out"


def tell(message: str) -> None:
    """Print the progress of a sweep on stderr."""
    Console(stderr=True).print(message, soft_wrap=True)


def say(message: str) -> None:
    """Print a failure or a stop of a sweep on stderr."""
    print(f"pyro-vae: {printable(message)}", file=sys.stderr)
