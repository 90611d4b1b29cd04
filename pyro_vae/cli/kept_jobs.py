"""Write each finished job of a sweep or a check to its folder, so that an interrupted one can resume."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from pyro_vae.cli.checksums import validate_unchanged
from pyro_vae.cli.commands import parser_for
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.cli.saved_settings import read_settings
from pyro_vae.cli.settings import with_absolute_paths, without
from pyro_vae.cli.sweep import tell
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.limits import read_json
from pyro_vae.data.rows import rows_of
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.train.distributed.group import available_cores

ABOUT = "sweep.json"
"""The file that marks the folder of a sweep: the command, and hashes of its data and model."""


def is_sweep(folder: str | Path) -> bool:
    """Return whether a folder is that of a sweep which can go on.

    Example:
        >>> is_sweep("nowhere")
        False
    """
    return os.path.isfile(Path(folder) / ABOUT) and os.path.isfile(Path(folder) / "config.yaml")


def stopped_sweep(name: str, folder: str, given: Namespace) -> Namespace:
    """Read the settings of a sweep that resumes.

    Args:
        name: the name of the command.
        folder: the folder of the sweep.
        given: the flags: ``trust``, ``cluster``, which no folder names, and ``workers``, by default as many as before,
            but at most one per core.

    Raises:
        DataError: if the folder is not of a sweep of this command, or its settings are damaged.
    """
    config = Path(folder) / "config.yaml"
    if not is_sweep(folder):
        raise DataError(f"{folder}: holds no {ABOUT}; give the folder of an interrupted pyro-vae {name}")
    if (other := _about(Path(folder))["command"]) != name:
        raise DataError(f"{folder}: was written by pyro-vae {other}; resume with pyro-vae {other} {folder}")
    settings = read_settings(config, parser_for(name), given.trust)
    settings.out = str(folder)
    if "workers" in settings:
        settings.cluster = given.get("cluster")
        most = settings.workers if settings.cluster else min(settings.workers, available_cores())
        settings.workers = given.get("workers") or most
    return settings


def _about(folder: Path) -> dict[str, str]:
    """Read and validate the file that marks the folder of a sweep."""
    validate_unchanged(folder / ABOUT)
    about = {name: str(value) for name, value in read_json(folder / ABOUT).items()}
    if not {"command", "data_hash"} <= {*about}:
        raise DataError(f"{folder / ABOUT}: names no command and no data; copy the folder again")
    return about


@contextmanager
def sweep_folder(name: str, out: str | None, *, resumes: bool) -> Iterator[RunFolder]:
    """Yield the locked folder of a sweep, a new one unless the sweep resumes."""
    folder = folder_for(name, out)
    with RunFolder.again(folder) if resumes else RunFolder(folder) as run, run.locked():
        yield run


def tell_done(done: int, jobs: int) -> None:
    """Print how many trainings of a resumed sweep have finished already."""
    if done:
        tell(f"{done} of {jobs} trainings are done already")


def places_of(kind: str, jobs: Iterable[str]) -> dict[str, str]:
    """Name the folder of each job, relative to that of the sweep.

    Args:
        kind: the name of the folder that holds the folders of all jobs.
        jobs: the names of the jobs.

    Example:
        >>> places_of("models", ["StudentT(df=4.0)", "Laplace · DiagNormal"])
        {'StudentT(df=4.0)': 'models/00-StudentT-df=4.0', 'Laplace · DiagNormal': 'models/01-Laplace-DiagNormal'}
    """
    return {
        job: f"{kind}/{i:02d}-{re.sub(r'[^A-Za-z0-9_.=]+', '-', job).strip('-')[:80]}" for i, job in enumerate(jobs)
    }


def hash_of(data: Iterable[Any]) -> str:
    """Return one hash of all rows of several data."""
    return data_hash(np.concatenate([row_hashes(rows_of(each)) for each in data]))


@dataclass(frozen=True)
class KeptJobs:
    """The finished jobs of a sweep or a check.

    Args:
        run: its folder.
        name: the name of the command.
        settings: the settings.
        hashes: hashes of the data and of everything else that the results depend on, by name.

    Raises:
        SettingsError: if the folder was started with other hashes.
    """

    run: RunFolder
    name: str
    settings: Namespace
    hashes: Mapping[str, str]

    def __post_init__(self) -> None:
        if not is_sweep(self.run.path):
            return
        started = _about(self.run.path)
        for name, now in self.hashes.items():
            if started.get(f"{name}_hash") != now:
                raise SettingsError(
                    f"{self.run.path} was started with other {name}; resume with the same {name}, or start anew"
                )

    def folder(self, place: str) -> RunFolder:
        """Return the folder to write a finished job to; write the settings before the first job."""
        if not is_sweep(self.run.path):
            about = {"command": self.name, **{f"{name}_hash": now for name, now in self.hashes.items()}}
            self.run.text(ABOUT, json.dumps(about, indent=2) + "\n")
            self.write_settings()  # last: a run that is killed before this line can be started anew
        return self.run.within(place)

    def write_settings(self) -> None:
        """Write the settings, from which the sweep can be resumed or repeated."""
        self.run.text("config.yaml", parser_for(self.name).dump(without(with_absolute_paths(self.settings), "cluster")))

    def path(self, place: str, file: str) -> Path | None:
        """Return a file of a finished job, or None if the job is not finished."""
        path = self.run.path / place / file
        if not os.path.isfile(path):
            return None
        validate_unchanged(path)
        return path
