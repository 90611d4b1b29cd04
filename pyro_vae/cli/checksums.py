"""List the SHA-256 of each file of a run folder, in a file that ``sha256sum -c`` checks too."""

import hashlib
import os
from pathlib import Path

from pyro_vae.data.limits import LARGEST_FILE, read_text, validate_regular, validate_size
from pyro_vae.errors import DataError
from pyro_vae.train.checkpoint.tensor_file import staged

SUMS = "SHA256SUMS"
"""The file of the list."""


def sum_of(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path) -> list[tuple[str, str]]:
    """Read the names and checksums of a list; a file that was just to be replaced is there twice, before and after."""
    if not os.path.lexists(folder / SUMS):
        return []
    lines = read_text(folder / SUMS, errors="replace").splitlines()
    return [(name, digest) for digest, mark, name in (line.partition("  ") for line in lines) if mark]


def put(folder: Path, name: str, digest: str, *, replaces: bool = False) -> None:
    """List the checksum of a file, beside that of the file which it ``replaces`` and is still there."""
    others = [line for line in listed(folder) if line[0] != name or (replaces and line[1] != digest)]
    _write(folder, [*others, (name, digest)])


def drop(folder: Path, name: str) -> None:
    """Take a file that is gone off the list."""
    _write(folder, [line for line in listed(folder) if line[0] != name])


def _write(folder: Path, lines: list[tuple[str, str]]) -> None:
    with staged(folder / SUMS) as part:
        part.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(lines)))


def validate_unchanged(path: Path) -> None:
    """Raise a DataError if a file of a run folder is gone, not on the list, or not as the run wrote it."""
    validate_size(path, validate_regular(path), LARGEST_FILE)
    wanted = {digest for name, digest in listed(path.parent) if name == path.name}
    if not wanted:
        raise DataError(
            f"{path}: is not in {path.parent / SUMS}, so nothing tells whether it is whole; copy the run again"
        )
    try:
        found = sum_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); copy the run again") from error
    if found not in wanted:
        raise DataError(
            f"{path}: is not as it was written; copy the run again, or, if you changed it yourself, put its new "
            f"sum (sha256sum {path.name}) in {SUMS}"
        )
