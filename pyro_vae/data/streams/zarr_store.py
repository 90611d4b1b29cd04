"""Open Zarr arrays in folders, with known codecs only."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyro_vae.data.limits import LARGEST_TEXT, in_bytes, validate_folder, validate_regular, validate_size
from pyro_vae.data.streams.zarr_chunks import ZarrRows, packing_of
from pyro_vae.data.values import reason
from pyro_vae.errors import DataError, SettingsError

CODECS = frozenset(
    {
        "bytes", "transpose", "sharding_indexed", "gzip", "zstd", "blosc", "zlib", "lz4", "bz2", "shuffle", "delta",
        "fixedscaleoffset", "quantize", "astype", "packbits", "bitround", "crc32", "crc32c", "adler32", "fletcher32",
        "jenkins_lookup3",
    }
)  # fmt: skip
"""The allowed codecs; others, such as pickle, could run code from a file, or unpack without bound."""

MOST_BYTES = 2**30
"""The maximum size, in bytes, of a chunk or a row, which must fit into the memory of a stream."""

MOST_CHUNKS = 10**7
"""The maximum number of chunks, each of which is a file."""


def is_zarr(folder: Path) -> bool:
    """Return whether a folder is a Zarr store."""
    return any(os.path.isfile(folder / name) for name in ("zarr.json", ".zarray", ".zgroup"))


def open_zarr(folder: Path) -> Any:
    """Open a Zarr array, reading only its metadata; raise on codecs that are not known to be safe."""
    try:
        import zarr
    except ImportError as error:
        raise SettingsError("reading Zarr arrays needs zarr; pip install pyro-vae[zarr]") from error
    about = _description(folder)
    validate_folder(folder, links=True, most=2 * MOST_CHUNKS)
    try:
        array = zarr.open_array(str(folder), mode="r")
        _validate_chunks(folder, array)
        return ZarrRows(folder, array, packing_of(folder, about, array.dtype.itemsize))
    except DataError:
        raise
    except Exception as error:  # zarr's errors have no common base class
        raise DataError(f"{folder}: not a valid Zarr array ({reason(error)}); copy or make it again") from error


def _validate_chunks(folder: Path, array: Any) -> None:
    """Validate that chunks and rows fit into memory, and that none is missing (Zarr would read fill values)."""
    if 0 in array.shape[1:]:
        raise DataError(f"{folder}: has shape {array.shape}, so its rows are empty; give at least one column")
    for what, shape in (("chunk", array.chunks), ("row", array.shape[1:])):
        if (size := math.prod(shape) * array.dtype.itemsize) > MOST_BYTES:
            raise DataError(f"{folder}: a {what} has {in_bytes(size)}; write the array again with smaller {what}s")
    stored = array.shards or array.chunks
    number = math.prod(-(-n // size) for n, size in zip(array.shape, stored, strict=True))
    if number > MOST_CHUNKS:
        raise DataError(
            f"{folder}: has {number:,} chunks, above the limit of {MOST_CHUNKS:,}; write it again with larger chunks"
        )
    here = array.nchunks_initialized * number // array.nchunks
    if here < number:
        raise DataError(
            f"{folder}: {number - here} of its {number} chunks are missing, so their values are unknown; copy it "
            "again, or, if they are fill values, write it again with config={'write_empty_chunks': True}"
        )


def _description(folder: Path) -> dict[str, Any]:
    """Read the description of an array, and validate its codecs."""
    for name in (".zattrs", ".zmetadata"):  # which zarr reads
        if (folder / name).exists():
            validate_size(folder / name, validate_regular(folder / name, links=True), LARGEST_TEXT)
    path = next(folder / name for name in ("zarr.json", ".zarray", ".zgroup") if os.path.isfile(folder / name))
    try:
        validate_size(path, validate_regular(path, links=True), LARGEST_TEXT)
        about = json.loads(path.read_text(encoding="utf-8"))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}); copy or make it again") from error
    if path.name == ".zgroup" or not isinstance(about, dict) or about.get("node_type") == "group":
        arrays = sorted(p.parent.name for name in ("zarr.json", ".zarray") for p in folder.glob(f"*/{name}"))
        raise DataError(f"{folder}: is a Zarr group with the arrays {arrays}; give the folder of one array")
    for name in _codecs([about.get(key) for key in ("codecs", "filters", "compressor", "storage_transformers")]):
        if name.removeprefix("numcodecs.") not in CODECS:
            raise DataError(f"{folder}: the codec {name!r} is not known to be safe; write the array with another codec")
    return about


def _codecs(described: Any) -> Iterator[str]:
    """Iterate over the names of codecs, including nested ones."""
    if isinstance(described, list):
        for one in described:
            yield from _codecs(one)
    elif isinstance(described, dict):
        yield str(described.get("name", described.get("id", "a codec without a name")))
        inner = described.get("configuration")
        for key in ("codecs", "index_codecs"):
            yield from _codecs(inner.get(key) if isinstance(inner, dict) else None)
