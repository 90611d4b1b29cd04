"""Keep the newest good checkpoints of a run, delete the rest, and lock the run folder."""

import contextlib
import errno
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.data.limits import validate_folder
from pyro_vae.errors import DataError, OutputError, printable
from pyro_vae.train.checkpoint.tensor_file import Tree, make_folder, read_tree, unwritable, write_tree

FOLDER = "checkpoints"
"""The subfolder of a run folder that holds the checkpoints."""

LOCK = ".lock"
"""The lock file in a run folder."""

_NAME = re.compile(r"step-(\d{9,})\.safetensors")


def _warn(sentence: str) -> None:
    print(f"pyro-vae: {printable(sentence)}", file=sys.stderr)


class Checkpoints:
    """The checkpoints of a run, written at intervals of steps or minutes, each in a file with a checksum.

    Checkpoints are ordered by the step in the file name, and minutes are counted by a monotonic clock, so a wrong
    system clock does no harm.

    Args:
        folder: the run folder; the checkpoints are in its subfolder ``checkpoints``, created with the first one.
        steps: the steps between two checkpoints, at least 1; None to ignore steps.
        minutes: the minutes between two checkpoints, above 0; None to ignore time.
        keep: the number of newest checkpoints to keep, at least 1.
        say: called with a sentence about each damaged file that is skipped.

    Raises:
        SettingsError: if a number is out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder, steps=10, keep=2)
        ...     for step in (10, 20, 30):
        ...         _ = checkpoints.write(step, {"step": step}, {})
        ...     step, tree, about, path = checkpoints.newest()
        ...     step, tree, path.name, len(list(path.parent.iterdir()))
        (30, {'step': 30}, 'step-000000030.safetensors', 2)
    """

    @takes_settings
    def __init__(
        self,
        folder: str | Path,
        *,
        steps: int | None = None,
        minutes: float | None = 5.0,
        keep: int = 3,
        say: Callable[[str], None] = _warn,
    ) -> None:
        self.run = Path(folder)
        self.folder = self.run / FOLDER
        self.steps = None if steps is None else whole("steps between checkpoints", steps, 1)
        self.minutes = None if minutes is None else above_zero("minutes between checkpoints", minutes)
        self.keep, self.say = whole("keep, the number of checkpoints,", keep, 1), say
        self._step, self._at, self._locked = 0, time.monotonic(), False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run folder, as :func:`locked` does, unless this object holds the lock already."""
        if self._locked:
            yield
            return
        with locked(self.run):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        if self.steps is not None and step // self.steps > self._step // self.steps:
            return True
        return self.minutes is not None and time.monotonic() - self._at >= 60 * self.minutes

    def written(self, step: int) -> None:
        """Restart the counts of steps and minutes."""
        self._step, self._at = step, time.monotonic()

    def write(self, step: int, tree: Tree, about: dict[str, Any]) -> Path:
        """Write a checkpoint; delete the oldest beyond ``keep``, and those of later steps that a rollback undid.

        Raises:
            OutputError: if the file cannot be written; earlier checkpoints are not changed.
        """
        path = self.folder / f"step-{step:09d}.safetensors"
        make_folder(self.folder)
        _clear(self.folder)  # partial files of a killed run; no other run writes here
        write_tree(path, tree, {**about, "step": step})
        self.written(step)
        files = self.files()
        before = [known for known in files if known <= step]
        for other in {*files} - {*before[-self.keep :]}:
            with contextlib.suppress(OSError):
                files[other].unlink()
        return path

    def newest(self) -> tuple[int, Tree, dict[str, Any], Path] | None:
        """Read the newest intact checkpoint: its step, state, ``about`` and path; None if there is no file.

        Raises:
            DataError: if there are files, but none is intact.
        """
        validate_folder(self.folder)
        files, wrong = self.files(), None
        for step, path in reversed(files.items()):
            try:
                tree, about = read_tree(path)
                if about.get("step") != step:
                    raise DataError(f"{path}: holds step {about.get('step')}, unlike its name; rename the file")
            except DataError as error:
                wrong = wrong or error
                if path != next(iter(files.values())):
                    self.say(f"{error}; trying the previous checkpoint")
                continue
            self.written(step)
            return step, tree, about, path
        if wrong is None:
            return None
        raise DataError(f"{self.folder}: none of the {len(files)} checkpoints is intact; {wrong}")

    def files(self) -> dict[int, Path]:
        """Return step → file, oldest first."""
        if self.folder.is_symlink():
            raise DataError(f"{self.folder}: is a symbolic link; replace it with a copy of the folder")
        try:
            found = {int(match[1]): path for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be read ({error.strerror}); check its permissions") from error
        return dict(sorted(found.items()))


def _clear(folder: Path) -> None:
    """Remove partially written files; only the holder of the lock may do so."""
    for part in folder.glob(".*.part-*"):
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def locked(folder: str | Path, say: Callable[[str], None] = _warn) -> Iterator[None]:
    """Lock a run folder against other runs, and remove partially written files.

    Raises:
        OutputError: if another run holds the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    validate_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{folder}: another run is writing to this folder; wait until it ends, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK):
            raise unwritable(folder / LOCK, error) from error
        say(f"{folder}: the file system has no locks ({error.strerror}); do not start a second run there")
    try:
        _clear(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # before the release: a process that locks an unlinked file retries
        lock.release()
