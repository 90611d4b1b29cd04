"""Validate the type of a file, and its size in memory before it is read."""

import inspect
import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pyro_vae.data import trial_read
from pyro_vae.errors import DataError, type_of

LARGEST_TEXT = 2**24
"""The maximum size, in bytes, of a file of settings or notes in a run folder."""

LARGEST_FILE = 2**30
"""The maximum size, in bytes, of other files in a run folder, except weights and checkpoints."""

MOST_ENTRIES = 10**5
"""The maximum number of files in a run folder."""

UNPACKED = 2**29
"""The size, in bytes, to which a file of any size may unpack."""

MOST_CELLS = 5 * 10**7
"""The number of cells that a packed text table of any size may have; parsing each takes 20 bytes besides the number."""

LONGEST_CELL = 2**26
"""The number of bytes that a packed text table may have between two separators; reading takes ten times as many."""

RATIO = 100
"""The maximum ratio of unpacked to packed size above ``UNPACKED``; data that shrink more are nearly constant."""

TRIAL_SECONDS = 30
"""How long a small file may be read in a process of its own."""

HIGHEST_RATIO = 1032
"""The highest ratio of unpacked to packed size that gzip and zip can reach."""


def validate_regular(path: Path, *, links: bool = False, advice: str = "copy the run again") -> int:
    """Validate that a path is a regular file, and return its size in bytes.

    Args:
        path: the path of the file.
        links: whether to follow links.
        advice: what to do if the file cannot be read, for the message.

    Raises:
        DataError: if the path is a link, a folder, a FIFO or a device, or does not exist.

    Example:
        >>> validate_regular(Path("/dev/zero"))
        Traceback (most recent call last):
        pyro_vae.errors.DataError: /dev/zero: is a device, not a file; ...
    """
    try:
        about = path.stat() if links else path.lstat()
    except (OSError, ValueError) as error:  # ValueError: a path that no file system takes
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); {advice}") from error
    _validate_mode(path, about)
    return about.st_size


def _validate_mode(path: Path, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(about.st_mode), "a device")
        raise DataError(f"{path}: is {kind}, not a file; replace it by a copy of the file")


def validate_folder(folder: Path, *, links: bool = False, most: int = MOST_ENTRIES) -> None:
    """Validate that a folder contains only files and folders, so that reading it never blocks.

    Args:
        folder: a run folder, or a folder of data.
        links: whether files may be links to files, as in a folder of data. In a run folder nothing outside is read or
            written.
        most: the maximum number of files and folders in it.

    Raises:
        DataError: if it contains a FIFO, a socket, a device or another link, or too many files.
    """
    entries = 0
    for place, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        for name in (*folders, *files):
            path = Path(place, name)
            if name in files and links:
                validate_regular(path, links=True, advice="copy it again")
            elif name in files or path.is_symlink():
                with suppress(FileNotFoundError):  # a file that is being replaced
                    _validate_mode(path, path.lstat())
        if entries > most:
            raise DataError(f"{folder}: contains more than {most:,} files; copy it again")


def validate_size(path: Path, size: int, most: int) -> None:
    """Validate that the size of a file, in bytes, is within a limit.

    Raises:
        DataError: if the size is above ``most``.

    Example:
        >>> validate_size(Path("a"), 2**40, 2**30)
        Traceback (most recent call last):
        pyro_vae.errors.DataError: a: has 1 TiB, above the limit of 1 GiB; ...
    """
    if size > most:
        raise DataError(f"{path}: has {in_bytes(size)}, above the limit of {in_bytes(most)}; give a smaller file")


def validate_unpacked(path: Path, size: int, packed: int | None = None) -> None:
    """Validate that unpacking a file neither inflates it suspiciously nor exceeds the free memory.

    A file may unpack to 512 MiB or to 100 times its size, whichever is larger.

    Args:
        path: the path of the file.
        size: the unpacked size in bytes, from its header.
        packed: the size of the file in bytes; that of ``path`` if not given.

    Raises:
        DataError: if a limit is exceeded.
    """
    packed = path.stat().st_size if packed is None else packed
    if size > most_unpacked(packed):
        raise DataError(
            f"{path}: unpacks from {in_bytes(packed)} to {in_bytes(size)}, more than {RATIO} times as much; if you "
            "trust the file, unpack it first, or save the numbers as .npy"
        )
    if size > (left := free_memory()):
        raise DataError(
            f"{path}: needs {in_bytes(size)} of memory, but only {in_bytes(left)} is free; save it as .npy or Parquet, "
            "which can be streamed"
        )


def most_unpacked(packed: int) -> int:
    """Return the size in bytes to which a file may unpack."""
    return max(UNPACKED, RATIO * packed)


class Unpacking(io.RawIOBase):
    """A packed text file that raises a DataError once its text or its cells take more memory than allowed."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.unpacked = file, path, 0
        self.separators = self.newlines = self.returns = 0
        self.quoted, self.cell = False, 0  # whether a quote is open, and the length of the last cell so far
        self.packed = path.stat().st_size

    def readable(self) -> bool:
        """Return true, as ``io`` requires."""
        return True

    def readinto(self, into: Any) -> int:
        """Read at most as many bytes as ``into`` has."""
        data = self.file.read(len(into))
        into[: len(data)] = data
        self.unpacked += len(data)
        self.separators += sum(data.count(end) for end in b",;|\t ")
        self.newlines, self.returns = self.newlines + data.count(b"\n"), self.returns + data.count(b"\r")
        cells = self.separators + max(self.newlines, self.returns)
        self.quoted ^= data.count(b'"') % 2 == 1
        ends = b'"' if self.quoted else b",;|\t \n\r"
        last = max(data.rfind(end) for end in ends)
        self.cell = len(data) - last - 1 if last >= 0 else self.cell + len(data)
        if self.cell > LONGEST_CELL:
            raise DataError(
                f"{self.path}: has a cell of more than {in_bytes(LONGEST_CELL)}; correct its separators and quotes"
            )
        if self.unpacked > UNPACKED:
            validate_unpacked(self.path, self.unpacked)
        if cells > MOST_CELLS and 8 * cells > RATIO * self.packed:
            raise DataError(
                f"{self.path}: has more than {MOST_CELLS:,} cells in {in_bytes(self.packed)}; if you trust the file, "
                "unpack it first"
            )
        return len(data)


def free_memory() -> int:
    """Return the free memory in bytes, without swap."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def in_bytes(size: int) -> str:
    """Format a size in bytes with its unit.

    Example:
        >>> in_bytes(3 * 2**29), in_bytes(700)
        ('1.5 GiB', '700 bytes')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size} bytes"


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a small text file of a run folder.

    Args:
        path: the path of the file.
        errors: how to handle decoding errors, as in ``open``.

    Raises:
        DataError: if the path is not a file, or the file is too large or not UTF-8.
    """
    validate_size(path, validate_regular(path), LARGEST_TEXT)
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the run again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a run folder.

    Raises:
        DataError: if the file does not contain one.
    """
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not valid JSON ({type(error).__name__}); copy the run again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: contains {type_of(found)}, not a JSON object; copy the run again")
    return found


def validate_hdf5(path: Path) -> None:
    """Validate that an HDF5 file is whole and contains all its data, within the limit on the unpacked size.

    Raises:
        DataError: if the file is damaged, links to other files, or is too large once unpacked.
    """
    validate_unpacked(path, try_reading("hdf5", path, "HDF5 file", most_unpacked(path.stat().st_size)))


def try_reading(reader: str, path: Path, kind: str, allowed: int, without: Sequence[str] = ()) -> int:
    """Read a file in a process of its own, which a damaged file may crash, and return the size of its data in bytes.

    Args:
        reader: the name of a reader of :mod:`~pyro_vae.data.trial_read`.
        path: the path of the file.
        kind: the kind of file, for messages.
        allowed: the size in bytes above which the data are not read.
        without: the columns that are not read.

    Raises:
        DataError: if reading the file raises an exception, ends the process, takes longer than 30 s plus one second per
            10 MB, or takes more memory than the data plus 1 GiB; or if Python cannot be started.
    """
    seconds = TRIAL_SECONDS + path.stat().st_size // 10**7
    packages = json.dumps([place for place in sys.path if isinstance(place, str) and place])
    arguments = [reader, str(path.resolve()), str(allowed), str(2 * seconds), packages, *without]
    try:
        process = subprocess.run(
            [*trial_command(), *arguments], timeout=seconds, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path}: could not be read within {seconds} s; copy or make it again") from error
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: Python cannot be started to try the file ({error}); set sys.executable") from error
    answer = _answer(path, process)
    if "elsewhere" in answer:
        raise DataError(f"{path}: {answer['elsewhere']}; give a file that contains all its data")
    if "error" in answer:
        raise DataError(f"{path}: not a valid {kind} ({answer['error'][:200]}); copy or make it again")
    return int(answer["bytes"])


def trial_command() -> list[str]:
    """Return the command that runs :mod:`~pyro_vae.data.trial_read`."""
    return [sys.executable, "-P", "-W", "ignore", "-c", inspect.getsource(trial_read)]


def _answer(path: Path, process: "subprocess.CompletedProcess[bytes]") -> dict[str, Any]:
    """Return what the process printed last; what its libraries printed before is ignored."""
    lines = process.stdout.decode(errors="replace").splitlines()
    if trial_read.STARTED not in lines:
        why = " ".join(process.stderr.decode(errors="replace").split())[-200:]
        raise DataError(f"{path}: Python cannot be started to try the file ({why}); see whether {sys.executable} works")
    if process.returncode:
        return {"error": "reading it crashes the process"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
