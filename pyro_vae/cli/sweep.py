"""What the commands that train several times have in common: seeds, and trainings side by side."""

import copy
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from pyro_vae.compare.pool import Cluster, Workers, as_they_come
from pyro_vae.core.device import refuse_seed
from pyro_vae.core.progress import ticking
from pyro_vae.core.validation import whole
from pyro_vae.errors import SettingsError


def seeds_of(settings: Namespace) -> list[int]:
    """The seeds to train with.

    Raises:
        SettingsError: if there is none, one is twice, or the number of processes is out of its range.
    """
    whole("workers", settings.workers, 1)
    seeds = [settings.seed] if settings.seeds is None else list(settings.seeds)
    for seed in seeds:
        refuse_seed(seed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds is {seeds}; name at least one, and each once")
    return seeds


def with_seed(settings: Namespace, seed: int) -> Namespace:
    """The settings with another seed of weights, order and noise; data are split before."""
    other = copy.deepcopy(settings)
    other.seed = seed
    return other


def is_side_by_side(settings: Namespace) -> bool:
    """Whether trainings go on in processes of their own."""
    return settings.workers > 1 or settings.cluster is not None


def side_by_side(
    settings: Namespace, function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]]
) -> Generator[tuple[str, Any], None, None]:
    """What a function of a module gives of each job, by name, as they are done, with a line for each.

    Args:
        settings: of a command with ``workers`` and ``cluster``.
        function: called in processes of its own.
        jobs: name → its arguments.
    """
    executor = Workers(min(settings.workers, len(jobs))) if settings.cluster is None else Cluster(settings.cluster)
    tell(f"{len(jobs)} trainings, side by side")
    with executor, ticking("trained", len(jobs), sys.stderr.isatty()) as tick:
        for i, (job, came) in enumerate(as_they_come(executor, function, jobs), 1):
            tick()
            tell(f"{i} of {len(jobs)}: {job}")
            yield job, came


def tell(what: str) -> None:
    """How far long work has come."""
    Console(stderr=True).print(what, highlight=False, markup=False, soft_wrap=True)


def say(what: str) -> None:
    """What did not go as it was asked."""
    print(f"pyro-vae: {what}", file=sys.stderr)
