"""Write each finished job of a sweep to the folder of the sweep, so that an interrupted sweep can resume."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from pyro_vae.cli.checksums import validate_unchanged
from pyro_vae.cli.fit import Loaded
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.cli.saved_settings import read_settings
from pyro_vae.cli.settings import command, with_absolute_paths
from pyro_vae.cli.sweep import tell
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.limits import read_json
from pyro_vae.data.rows import rows_of
from pyro_vae.errors import DataError, SettingsError

ABOUT = "sweep.json"
"""The file that marks the folder of a sweep, with the command and the hash of the data."""


def is_sweep(folder: str | Path) -> bool:
    """Return whether a folder is that of a sweep, finished or not.

    Example:
        >>> is_sweep("nowhere")
        False
    """
    return (Path(folder) / ABOUT).is_file()


def stopped_sweep(
    name: str, function: Callable[..., Any], folder: str, workers: int | None = None, trust: str | None = None
) -> Namespace:
    """Read the settings of a sweep that resumes.

    Args:
        name: of the command.
        function: the function whose arguments are the settings.
        folder: of the sweep.
        workers: a new number of workers; by default that of the sweep.
        trust: the user's own packages and folders that the settings may name.

    Raises:
        DataError: if the folder is not of a sweep of this command, or its settings are damaged.
    """
    config = Path(folder) / "config.yaml"
    if not is_sweep(folder):
        raise DataError(f"{folder}: holds no {ABOUT}; give the folder of an interrupted pyro-vae {name}")
    if (other := _about(Path(folder))["command"]) != name:
        raise DataError(f"{folder}: was written by pyro-vae {other}; resume with pyro-vae {other} {folder}")
    settings = read_settings(config, command(name, function), trust)
    settings.out = str(folder)
    settings.workers = workers or settings.workers
    return settings


def _about(folder: Path) -> dict[str, str]:
    """Read and validate the file that marks the folder of a sweep."""
    validate_unchanged(folder / ABOUT)
    about = {name: str(value) for name, value in read_json(folder / ABOUT).items()}
    if not {"command", "data_hash"} <= {*about}:
        raise DataError(f"{folder / ABOUT}: names no command and no data; copy the folder again")
    return about


def sweep_folder(name: str, out: str | None, *, goes_on: bool) -> RunFolder:
    """Return the folder of a sweep, a new one unless the sweep resumes."""
    folder = folder_for(name, out)
    return RunFolder.again(folder) if goes_on else RunFolder(folder)


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


@dataclass(frozen=True)
class KeptJobs:
    """The finished jobs of a sweep.

    Args:
        run: the folder of the sweep.
        name: of the command.
        function: the function whose arguments are the settings.
        settings: of the sweep.
        data: the data of the sweep; a sweep that resumes must have the same.

    Raises:
        SettingsError: if the sweep was started with other data.
    """

    run: RunFolder
    name: str
    function: Callable[..., Any]
    settings: Namespace
    data: Loaded

    def __post_init__(self) -> None:
        if is_sweep(self.run.path) and _about(self.run.path)["data_hash"] != self._data_hash():
            raise SettingsError(
                f"{self.run.path} was started with other data than {self.settings.data}; resume it with the same data"
            )

    def _data_hash(self) -> str:
        return data_hash(np.concatenate([row_hashes(rows_of(file)) for file in self.data.files]))

    def folder(self, place: str) -> RunFolder:
        """Return the folder to write a finished job to; write the settings of the sweep before the first job."""
        if not is_sweep(self.run.path):
            self.write_settings()
            about = {"command": self.name, "data_hash": self._data_hash()}
            self.run.text(ABOUT, json.dumps(about, indent=2) + "\n")
        return self.run.within(place)

    def write_settings(self) -> None:
        """Write the settings, from which the sweep can be resumed or repeated."""
        self.run.text("config.yaml", command(self.name, self.function).dump(with_absolute_paths(self.settings)))

    def path(self, place: str, file: str) -> Path | None:
        """Return a file of a finished job, or None if the job is not finished."""
        path = self.run.path / place / file
        if not path.is_file():
            return None
        validate_unchanged(path)
        return path
