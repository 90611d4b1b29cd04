"""Limits on what is read from files: kinds of files, and sizes that are measured before memory is taken."""

import io
import json
import math
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pyro_vae.errors import DataError

LARGEST_TEXT = 2**24
"""The most bytes of a file of settings or notes in a run folder."""

LARGEST_FILE = 2**30
"""The most bytes of the other files of a run folder, weights and checkpoints apart."""

MOST_ENTRIES = 10**5
"""The most files of a run folder."""

UNPACKED = 2**29
"""A file may unpack to so many bytes, however small it is."""

RATIO = 100
"""A larger one may unpack to at most so many times its size; what shrinks more holds little but one value."""

HIGHEST_RATIO = 1032
"""What gzip and zip files unpack to, at most, times their size."""


def validate_regular(path: Path, *, links: bool = False, advice: str = "copy the run again") -> int:
    """Return the size of a file.

    Args:
        path: of the file.
        links: whether it may be a link to one.
        advice: what to do if it cannot be read.

    Raises:
        DataError: if it is a link, a folder, a FIFO or a device, or cannot be found.

    Example:
        >>> validate_regular(Path("/dev/zero"))
        Traceback (most recent call last):
        pyro_vae.errors.DataError: /dev/zero: cannot be read, as it is a device; ...
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
        raise DataError(f"{path}: cannot be read, as it is {kind}; put a copy of the file itself there")


def validate_folder(folder: Path, *, links: bool = False, most: int = MOST_ENTRIES) -> None:
    """Validate that a folder holds only files and folders, so that nothing in it is waited for without end.

    Args:
        folder: of a run, or of data.
        links: whether files may be links to files, as those of data may. In a run folder nothing outside it is read or
            written.
        most: files and folders that it may hold.

    Raises:
        DataError: if it holds a FIFO, a socket, a device or another link, or too many files.
    """
    entries = 0
    for place, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        for name in (*folders, *files):
            path = Path(place, name)
            if name in files and links:
                validate_regular(path, links=True, advice="copy it again")
            elif name in files or path.is_symlink():
                with suppress(FileNotFoundError):  # a file that is just being replaced
                    _validate_mode(path, path.lstat())
        if entries > most:
            raise DataError(f"{folder}: holds more than {most:,} files, which is too many; copy it again")


def validate_size(path: Path, size: int, most: int) -> None:
    """Raise a DataError if a size in bytes is above a limit.

    Example:
        >>> validate_size(Path("a"), 2**40, 2**30)
        Traceback (most recent call last):
        pyro_vae.errors.DataError: a: takes 1 TiB, and at most 1 GiB is read; ...
    """
    if size > most:
        raise DataError(f"{path}: takes {in_bytes(size)}, and at most {in_bytes(most)} is read; give a smaller file")


def validate_unpacked(path: Path, size: int, packed: int | None = None) -> None:
    """Raise a DataError if a file would unpack to far more bytes than it has, or to more than the memory holds.

    It may unpack to 512 MiB, or to 100 times its size.

    Args:
        path: of the file.
        size: bytes of the numbers, as its header says.
        packed: bytes of the file, if not those of ``path``.
    """
    packed = path.stat().st_size if packed is None else packed
    if size > max(UNPACKED, RATIO * packed):
        raise DataError(
            f"{path}: unpacks from {in_bytes(packed)} to {in_bytes(size)}, more than {RATIO} times as much; unpack it "
            "yourself if it is what it should be"
        )
    if size > (left := free_memory()):
        raise DataError(
            f"{path}: takes {in_bytes(size)} of memory, and {in_bytes(left)} is free; write it as .npy or Parquet, "
            "which are streamed"
        )


class Unpacking(io.RawIOBase):
    """A packed file, read until it has given more bytes than it may unpack to."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.given = file, path, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, into: Any) -> int:
        """Read what fits into ``into``."""
        data = self.file.read(len(into))
        into[: len(data)] = data
        self.given += len(data)
        if self.given > UNPACKED:
            validate_unpacked(self.path, self.given)
        return len(data)


def free_memory() -> int:
    """Return the bytes of memory that are free, swap apart."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def in_bytes(size: int) -> str:
    """Write a size in its unit.

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
        path: of the file.
        errors: of the decoding, as of ``open``.

    Raises:
        DataError: if it is no file, too large, or not UTF-8.
    """
    validate_size(path, validate_regular(path), LARGEST_TEXT)
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the run again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run folder, which holds one object.

    Raises:
        DataError: if it does not.
    """
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: holds no JSON ({type(error).__name__}); copy the run again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__} and no object; copy the run again")
    return found


def validate_hdf5(path: Path) -> None:
    """Validate that an HDF5 file holds all its data itself, and no more of them than it may unpack to.

    Raises:
        DataError: if it is damaged, leads to other files, or is too large once unpacked.
    """
    import h5py  # type: ignore[import-untyped]

    try:
        with h5py.File(path, "r") as file:
            size = _hdf5_bytes(path, file, set())
    except DataError:
        raise
    except Exception as error:  # what h5py raises for a damaged file has no common base
        raise DataError(f"{path}: not a whole HDF5 file ({' '.join(str(error).split())}); copy it again") from error
    validate_unpacked(path, size)


def _hdf5_bytes(path: Path, group: Any, seen: set[Any]) -> int:
    import h5py

    size = 0
    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            raise DataError(f"{path}: leads to another file at {name!r}; give a file that holds its data itself")
        found = group.get(name)
        if found is None or (key := h5py.h5o.get_info(found.id).addr) in seen:
            continue
        seen.add(key)
        if isinstance(found, h5py.Group):
            size += _hdf5_bytes(path, found, seen)
        elif isinstance(found, h5py.Dataset):
            if found.external or found.is_virtual:
                raise DataError(f"{path}: {name!r} lies in another file; give a file that holds its data itself")
            size += math.prod(found.shape or (0,)) * found.dtype.itemsize
    return size
