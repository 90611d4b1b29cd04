"""The checkpoints of a run, the last good few of them, and the lock that keeps two runs out of one folder."""

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyro_vae.core.validation import above_zero, whole
from pyro_vae.errors import DataError, OutputError
from pyro_vae.train.checkpoint.tensor_file import Tree, make_folder, read_tree, unwritable, write_tree

FOLDER = "checkpoints"
"""Where in a run folder they lie."""

LOCK = ".lock"
"""The file in a run folder that a run holds locked."""

_NAME = re.compile(r"step-(\d{9,})\.safetensors")


def _warn(sentence: str) -> None:
    print(f"pyro-vae: {sentence}", file=sys.stderr)


class Checkpoints:
    """The training state of a run every so many steps or minutes, each in a file of its own under a checksum.

    They are ordered by the step in their names, and minutes are told by a clock that only goes forward, so a
    wrong clock changes nothing.

    Args:
        folder: the run folder; they lie in its ``checkpoints``, which is made with the first of them.
        steps: one is due after every so many steps, at least 1; not if None.
        minutes: one is due after so many minutes, above 0; not if None.
        keep: how many are kept, at least 1: the newest.
        say: told in a sentence of each file that is damaged and passed over.

    Raises:
        SettingsError: if a number is out of its range.

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
        """The run folder, which must be there, kept from every other run; who holds it already holds it on.

        Raises:
            OutputError: if another run holds it, or it cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoints = Checkpoints(folder)
            ...     with checkpoints.locked(), checkpoints.locked():
            ...         (checkpoints.run / LOCK).exists()
            True
        """
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
        """Whether one is to be written now.

        Args:
            step: how many steps have been taken.
        """
        if self.steps is not None and step // self.steps > self._step // self.steps:
            return True
        return self.minutes is not None and time.monotonic() - self._at >= 60 * self.minutes

    def written(self, step: int) -> None:
        """Count from this step on, and from now."""
        self._step, self._at = step, time.monotonic()

    def write(self, step: int, tree: Tree, about: dict[str, Any]) -> Path:
        """Write one, and then remove those that are too many, and those of later steps, which this run is behind.

        Args:
            step: how many steps have been taken.
            tree: the state.
            about: what is to be read beside it.

        Returns:
            Where it lies.

        Raises:
            OutputError: if it cannot be written; those before it stay as they are.
        """
        path = self.folder / f"step-{step:09d}.safetensors"
        make_folder(self.folder)
        clear(self.folder)  # of a run that was killed while it wrote; only one writes here
        write_tree(path, tree, {**about, "step": step})
        self.written(step)
        files = self.files()
        before = [known for known in files if known <= step]
        for other in {*files} - {*before[-self.keep :]}:
            with contextlib.suppress(OSError):
                files[other].unlink()
        return path

    def newest(self) -> tuple[int, Tree, dict[str, Any], Path] | None:
        """The newest that is whole: its step, its state, what is told about it and where it lies; None without any.

        Raises:
            DataError: if there are some and none is whole.
        """
        files, wrong = self.files(), None
        for step, path in reversed(files.items()):
            try:
                tree, about = read_tree(path)
                if about.get("step") != step:
                    raise DataError(f"{path}: holds step {about.get('step')}, which is not that of its name; rename it")
            except DataError as error:
                wrong = wrong or error
                if path != next(iter(files.values())):
                    self.say(f"{error}; the checkpoint before it is taken")
                continue
            self.written(step)
            return step, tree, about, path
        if wrong is None:
            return None
        raise DataError(f"{self.folder}: none of its {len(files)} checkpoints is whole; {wrong}")

    def files(self) -> dict[int, Path]:
        """The files by their step, the oldest first."""
        try:
            found = {int(match[1]): path for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be read ({error.strerror}); see to its permissions") from error
        return dict(sorted(found.items()))


def clear(folder: Path) -> None:
    """Remove what was never written to its end; only one that holds the lock may do so."""
    for part in folder.glob(".*.part-*"):
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def locked(folder: str | Path, say: Callable[[str], None] = _warn) -> Iterator[None]:
    """A run folder that no other run writes to inside; the lock goes with the process, however that ends.

    What a killed run left half written there is removed.

    Args:
        folder: of the run; it must be there.
        say: told in a sentence where the file system has no locks.

    Raises:
        OutputError: if another run holds it, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(folder), locked(folder):
        ...     pass
        Traceback (most recent call last):
        pyro_vae.errors.OutputError: ... another run is writing to this folder ...
    """
    path = Path(folder) / LOCK
    descriptor = _taken(path, say)
    try:
        clear(path.parent)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _taken(path: Path, say: Callable[[str], None]) -> int:
    """The open file of a lock that is held; one that its holder removed meanwhile is asked for anew."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        fcntl = None  # type: ignore[assignment]
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                f"{path.parent}: another run is writing to this folder; wait for its end, or choose another folder"
            ) from error
        except OSError as error:
            say(
                f"{path.parent}: its file system has no locks ({error.strerror}), so nothing keeps a second run out; "
                "start none there"
            )
            return descriptor
        os.close(descriptor)
