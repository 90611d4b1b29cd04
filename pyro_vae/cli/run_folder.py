"""Run folders, whose files are written atomically and never overwrite an earlier run."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from pyro_vae.cli.checksums import SUMS, compute_checksum, drop_checksum, record_checksum, validate_unchanged
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data.limits import validate_hdf5
from pyro_vae.errors import DataError, OutputError, printable
from pyro_vae.train.checkpoint.rotation import LOCK, locked
from pyro_vae.train.checkpoint.save_load import write_vae
from pyro_vae.train.checkpoint.tensor_file import staged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunFolder:
    """A new folder for the results of one run.

    Args:
        path: of the folder, which is created if it does not exist. It must be empty, except for the files of a run
            that was killed before its first checkpoint.

    Raises:
        OutputError: if the folder cannot be created or written, or holds other files.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RunFolder(Path(folder, "run")) as run:
        ...         run.text("note.txt", "hello")
        ...     sorted(p.name for p in run.path.iterdir())
        ['SHA256SUMS', 'note.txt']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_new, self.made = True, not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.path)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OutputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a path that no file system takes
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{self.path}: cannot be written ({reason}); choose another folder") from error
        _validate_empty(self.path)

    @classmethod
    def again(cls, path: str | Path) -> "RunFolder":
        """Open the folder of a run that resumes; files that it writes again replace the old ones.

        Args:
            path: of the run folder.

        Example:
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RunFolder.again(folder).text("note.txt", "hello")
        """
        run = cls.__new__(cls)
        run.path, run.is_new, run.made = Path(path), False, False
        return run

    def within(self, name: str) -> "RunFolder":
        """Return a subfolder, which is created if it does not exist."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return RunFolder.again(path)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder if an error left it empty."""
        if self.made and not any(self.path.iterdir()):
            self.path.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs inside the block.

        Raises:
            OutputError: if another run holds the lock, or has written to the new folder since this object was made.
        """
        with locked(self.path):
            if self.is_new:
                _validate_empty(self.path)
            yield

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a temporary path, rename it to ``name`` after the block, and record its checksum just before."""
        path = self.path / name
        replaces = path.exists()
        with staged(
            path, lambda part: record_checksum(self.path, name, compute_checksum(part), replaces=replaces)
        ) as part:
            yield part
        if replaces:  # until here both checksums are valid, so that a kill leaves a readable folder
            record_checksum(self.path, name, compute_checksum(path))

    def remove(self, name: str) -> None:
        """Delete a file, or a subfolder, and its checksum."""
        path = self.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        drop_checksum(self.path, name)

    def show(self, console: Console) -> None:
        """Print the files of the folder."""
        names = ", ".join(sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")))
        console.print(f"Written to {self.path}: {names}", soft_wrap=True)

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        with self.file(name) as path:
            path.write_text(text, encoding="utf-8")

    def dataset(self, name: str, dataset: xr.Dataset) -> None:
        """Write a dataset as netCDF."""
        with self.file(name) as path:
            dataset.to_netcdf(path, engine="h5netcdf")

    def figure(self, name: str, figure: "Figure") -> None:
        """Write a figure as PNG."""
        with self.file(name) as path:
            figure.savefig(path, format="png", dpi=130)

    def weights(self, name: str, vae: VAE, step: int | None = None) -> None:
        """Write a VAE, as :func:`pyro_vae.save` does, and the step at which its run ended."""
        with self.file(name) as path:
            why = write_vae(vae, path, step)
        if why:
            print(printable(f"pyro-vae: {self.path / name}: {why}"), file=sys.stderr)


def read_dataset(path: Path) -> xr.Dataset:
    """Read a dataset of a run folder from an untrusted source.

    Raises:
        DataError: if it is damaged, or cannot be read.
    """
    validate_unchanged(path)
    validate_hdf5(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf") as found:
            return found.load()
    except Exception as error:  # what xarray and h5netcdf raise has no common base
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); copy the run again"
        ) from error


BEGUN = {LOCK, SUMS, "run.json", "sweep.json"}
"""Files that a run or a sweep writes before ``config.yaml``, which it needs to resume."""


def _remove_abandoned(folder: Path) -> None:
    """Remove the files of a run that was killed before it could be resumed; they hold no results."""
    names = {path.name for path in folder.iterdir()}
    unfinished = {name for name in names if name.startswith(".") and ".part-" in name}
    if names and names <= BEGUN | unfinished:
        with locked(folder):
            for name in names & BEGUN - {LOCK}:
                (folder / name).unlink()


def _validate_empty(folder: Path) -> None:
    """Raise if a new folder holds files besides the lock."""
    if existing := next((path.name for path in folder.iterdir() if path.name != LOCK), None):
        raise OutputError(f"{folder}: already holds {existing}; nothing is overwritten, choose another folder")


def folder_for(command: str, out: str | None, run: str | None = None) -> str:
    """Return the folder for the results of a command.

    Args:
        command: its name.
        out: the folder that the user named, which is returned unchanged.
        run: the run folder that the command reads.

    Returns:
        By default ``runs/COMMAND``, or ``RUN/COMMAND`` if the command reads a run; a number is added if it exists.

    Example:
        >>> folder_for("fit", "mine")
        'mine'
    """
    return str(first_free(Path(run or "runs") / command)) if out is None else out


def first_free(path: Path) -> Path:
    """Return ``path``, or the first of ``path-2``, ``path-3``, … that does not exist.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first_free(Path(folder)).name == Path(folder).name + "-2"
        True
    """
    names = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, 10**6))
    return next(name for name in names if not name.exists())
