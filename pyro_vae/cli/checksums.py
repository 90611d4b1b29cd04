"""Record the SHA-256 checksum of each file of a run folder, in a file that ``sha256sum -c`` can check."""

import hashlib
import os
from pathlib import Path

from pyro_vae.data.limits import LARGEST_FILE, read_text, validate_regular, validate_size
from pyro_vae.errors import DataError
from pyro_vae.train.checkpoint.tensor_file import staged

SUMS = "SHA256SUMS"
"""The file of the checksums."""


def compute_checksum(path: Path) -> str:
    """Compute the SHA-256 checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(folder: Path) -> list[tuple[str, str]]:
    """Read the names and checksums; a file has two while it is being replaced, the old and the new one."""
    if not os.path.lexists(folder / SUMS):
        return []
    lines = read_text(folder / SUMS, errors="replace").splitlines()
    return [(name, digest) for digest, mark, name in (line.partition("  ") for line in lines) if mark]


def record_checksum(folder: Path, name: str, digest: str, *, replaces: bool = False) -> None:
    """Record the checksum of a file; with ``replaces``, keep that of the old file too, which is still there."""
    others = [line for line in read_checksums(folder) if line[0] != name or (replaces and line[1] != digest)]
    _write(folder, [*others, (name, digest)])


def drop_checksum(folder: Path, name: str) -> None:
    """Remove the checksums of a file that was deleted."""
    _write(folder, [line for line in read_checksums(folder) if line[0] != name])


def _write(folder: Path, lines: list[tuple[str, str]]) -> None:
    with staged(folder / SUMS) as part:
        part.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(lines)))


def validate_unchanged(path: Path) -> None:
    """Raise a DataError if a file of a run folder is missing, has no checksum, or has changed since it was written."""
    validate_size(path, validate_regular(path), LARGEST_FILE)
    recorded = {digest for name, digest in read_checksums(path.parent) if name == path.name}
    if not recorded:
        raise DataError(
            f"{path}: has no checksum in {path.parent / SUMS}, so damage cannot be detected; copy the run again"
        )
    try:
        checksum = compute_checksum(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); copy the run again") from error
    if checksum not in recorded:
        raise DataError(
            f"{path}: has changed since it was written; copy the run again, or, if you changed it yourself, put its "
            f"new checksum (sha256sum {path.name}) in {SUMS}"
        )
