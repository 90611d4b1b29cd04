"""Which bytes the files of a run folder hold, in a list that ``sha256sum -c`` checks too."""

import hashlib
from pathlib import Path

from pyro_vae.errors import DataError
from pyro_vae.train.checkpoint.tensor_file import atomic

SUMS = "SHA256SUMS"
"""The file of the list."""


def sum_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     sum_of(Path(file.name))[:8]
        'e3b0c442'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """The files of a list with their sums; none where there is no list.

    Example:
        >>> listed(Path("nowhere"))
        {}
    """
    return dict(_lines(folder))


def _lines(folder: Path) -> list[tuple[str, str]]:
    """Names and sums as they are listed; a file that was just to be replaced may be there twice, before and after."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [(name, digest) for digest, mark, name in (line.partition("  ") for line in lines) if mark]


def put(folder: Path, name: str, digest: str, *, replaces: bool = False) -> None:
    """List a file that is about to be what its sum says.

    Args:
        folder: of the list.
        name: of the file.
        digest: its sum.
        replaces: whether it is still what was listed before, which is then kept beside.

    Raises:
        OutputError: if the list cannot be written.
    """
    others = [line for line in _lines(folder) if line[0] != name or (replaces and line[1] != digest)]
    with atomic(folder / SUMS) as file:
        file.write("".join(f"{digest}  {name}\n" for name, digest in sorted([*others, (name, digest)])).encode())


def refuse_changed(path: Path) -> None:
    """Refuse a file of a run folder that is not as the run wrote it.

    Raises:
        DataError: if it is another, gone, or not on the list.

    Example:
        >>> refuse_changed(Path("nowhere/config.yaml"))
        Traceback (most recent call last):
        pyro_vae.errors.DataError: nowhere/config.yaml: is not in nowhere/SHA256SUMS, ...
    """
    wanted = {digest for name, digest in _lines(path.parent) if name == path.name}
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
