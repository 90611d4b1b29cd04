"""Read a whole file and print the size of its data: a script for a process of its own.

Damaged files crash the C libraries that read them, make them loop without end or take all memory. So
:func:`pyro_vae.data.limits.try_reading` runs this text first. It imports nothing of this package, to start fast.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

STARTED = "started"
"""The first line that this program prints."""

BYTES_PER_TEXT = 150
"""The memory, in bytes, of a text of variable length."""

TAME = ("UNCOMPRESSED", "SNAPPY")
"""Codecs of Parquet that cannot inflate numbers to many times their size."""

ROWS = 2**12
"""The number of rows of a Parquet file that are read at once."""


class StoredElsewhere(ValueError):
    """Data that a file takes from another file."""


def hdf5_bytes(path: str, allowed: int) -> int:
    """Return the size in bytes of all data of an HDF5 file as doubles, and read them if the size is allowed.

    Raises:
        StoredElsewhere: if data are stored in another file.
    """
    import h5py  # type: ignore[import-untyped]

    with suppress(ImportError):
        import hdf5plugin  # type: ignore[import-not-found]  # noqa: F401  # filters that the parent may have imported
    with h5py.File(path, "r") as file:
        size = _group_bytes(file, set())
        if size <= allowed:
            _limit_memory(2**30 + size)
            _read("", file)
            file.visititems(_read)
    return size


def _group_bytes(group: Any, seen: set[Any]) -> int:
    import h5py

    size = 0
    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            raise StoredElsewhere(f"{name!r} links to another file")
        found = group.get(name)
        if found is None or (key := h5py.h5o.get_info(found.id).addr) in seen:
            continue
        seen.add(key)
        if isinstance(found, h5py.Group):
            size += _group_bytes(found, seen)
        elif isinstance(found, h5py.Dataset):
            if found.external or found.is_virtual:
                raise StoredElsewhere(f"{name!r} is stored in another file")
            each = BYTES_PER_TEXT if found.dtype.kind == "O" else max(8, found.dtype.itemsize)
            size += math.prod(found.shape or (0,)) * each
    return size


def _read(_: str, found: Any) -> None:
    import h5py

    for name in found.attrs:
        with suppress(TypeError):  # a type that NumPy lacks
            found.attrs[name]
    if isinstance(found, h5py.Dataset):
        found[()]


def mat_bytes(path: str, allowed: int) -> int:
    """Read a MATLAB file, and return the size of its arrays in bytes."""
    from scipy.io import loadmat

    _limit_memory(2**30 + allowed)
    return sum(getattr(array, "nbytes", 0) for array in loadmat(path).values())


def parquet_bytes(path: str, allowed: int, *without: str) -> int:
    """Read the footer of a Parquet file, and the values if the footer does not bound their size, which is returned.

    Args:
        path: the path of the file.
        allowed: the size in bytes above which the rest is not read.
        without: the columns that are not read.
    """
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve more memory than they use
    from pyarrow import parquet

    _limit_memory(2**30 + allowed)
    size = 0
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        if all(codec in TAME and kind != "BYTE_ARRAY" for codec, kind in _column_chunks(file.metadata)):
            return 0
        names = [name for name in file.schema_arrow.names if name not in without]
        for batch in file.iter_batches(ROWS, columns=names, use_threads=False):
            size += batch.nbytes
            if size > allowed:
                break
    return size


def footer_bytes(path: str, allowed: int) -> int:
    """Read the footers of all Parquet files in a folder, or of one file; return 0."""
    from pyarrow import parquet

    files = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names] or [path]
    for name in filter(os.path.isfile, files):
        with suppress(OSError), open(name, "rb") as start:
            if start.read(4) == b"PAR1":
                with parquet.ParquetFile(name) as file:
                    _column_chunks(file.metadata)
    return 0


def _column_chunks(footer: Any) -> list[tuple[str, str]]:
    """Return the codec and the type of each column in each row group; Arrow crashes on some damaged ones."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(footer.num_columns)]
    return [(chunk.compression, chunk.physical_type) for chunk in chunks]


def _limit_memory(more: int) -> None:
    """Allow this process ``more`` bytes of memory in addition to what it uses now; does nothing outside Linux.

    The limit stays, so only a process of its own may call this.
    """
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(seconds: int) -> None:
    """End this process with its parent, or after a number of seconds of computing; does nothing outside Linux."""
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import ctypes
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


READERS: dict[str, Callable[..., int]] = {
    "hdf5": hdf5_bytes,
    "mat": mat_bytes,
    "parquet": parquet_bytes,
    "footers": footer_bytes,
}


def run(reader: str, path: str, allowed: str, seconds: str, packages: str, *without: str) -> dict[str, Any]:
    """Read a file, and return the size of its data or the error."""
    sys.path[:] = json.loads(packages)
    _limit_memory(2**30)
    _limit_time(int(seconds))
    try:
        return {"bytes": READERS[reader](path, int(allowed), *without)}
    except StoredElsewhere as error:
        return {"elsewhere": str(error)}
    except BaseException as error:  # errors of these libraries have no common base class
        return {"error": " ".join(str(error).split()) or type(error).__name__}


if __name__ == "__main__":
    print(STARTED, flush=True)
    print("\n" + json.dumps(run(*sys.argv[1:])))
