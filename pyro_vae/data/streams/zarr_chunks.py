"""Measure the stored chunks of a Zarr array before they are unpacked."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.limits import HIGHEST_RATIO, UNPACKED, in_bytes
from pyro_vae.data.values import reason
from pyro_vae.errors import DataError

HEADERS = {"blosc": 4, "lz4": 0}
"""Codecs that start with the unpacked size, and its position."""

STREAMS = {"gzip": "gzip", "zlib": "gzip", "bz2": "bz2", "zstd": "zstd"}
"""Codecs that must be unpacked to be measured, and Arrow's names of them."""

CHECKSUMS = frozenset({"crc32c", "fletcher32", "jenkins_lookup3"})
"""Codecs that may follow those: they append four bytes."""

MOST_INDEX = 2**26
"""The maximum size, in bytes, of the index of a shard, which has 16 bytes per chunk."""

SLACK = 2**16
"""The size, in bytes, by which a chunk may exceed its numbers."""


@dataclass(frozen=True)
class Packing:
    """How the chunks of a Zarr array are stored.

    Args:
        codec: the codec that packs a chunk, if any.
        widest: the size, in bytes, of the widest number that a codec stores or reads.
        checksums: the size, in bytes, of what follows a packed chunk.
        index_last: whether the index of a shard is at its end; None without shards.
        index_order: the byte order of the index.
        index_rest: the size, in bytes, of the checksum of the index.
    """

    codec: str | None
    widest: int
    checksums: int = 0
    index_last: bool | None = None
    index_order: str = "<"
    index_rest: int = 0


def packing_of(folder: Path, about: Mapping[str, Any], itemsize: int) -> Packing:
    """Read the codecs in the description of an array, and validate that they unpack a chunk once.

    Raises:
        DataError: if several codecs unpack a chunk, or in an unknown order, or to other types than numbers.
    """
    if "codecs" not in about:
        chain = [*(about.get("filters") or []), *([about["compressor"]] if about.get("compressor") else [])]
        return _packing(folder, chain, itemsize)
    (last, *others) = reversed(about["codecs"])
    if "sharding_indexed" not in map(_name, about["codecs"]):
        return _packing(folder, about["codecs"], itemsize)
    within = last.get("configuration", {})
    index = within.get("index_codecs", [{"name": "bytes"}, {"name": "crc32c"}])
    if _name(last) != "sharding_indexed" or others or [_name(one) for one in index][:2] not in (
        ["bytes"], ["bytes", "crc32c"],
    ) or len(index) > 2:  # fmt: skip
        raise DataError(f"{folder}: the codecs of its shards are unusual; write the array with zarr's own shards")
    inner = _packing(folder, within.get("codecs", []), itemsize)
    order = {"big": ">"}.get(index[0].get("configuration", {}).get("endian", "little"), "<")
    ends = within.get("index_location", "end") == "end"
    return Packing(inner.codec, inner.widest, inner.checksums, ends, order, 4 * (len(index) - 1))


def _name(codec: Mapping[str, Any]) -> str:
    return str(codec.get("name", codec.get("id"))).removeprefix("numcodecs.")


def _packing(folder: Path, chain: Sequence[Any], itemsize: int) -> Packing:
    """Return the packing of a chain of codecs, in the order of writing."""
    names = [_name(one) for one in chain]
    packers = [i for i, name in enumerate(names) if name in HEADERS or name in STREAMS]
    after = chain[packers[0] + 1 :] if packers else []
    settings = [one.get("configuration") or one for one in after]
    if len(packers) > 1 or any(
        _name(one) not in CHECKSUMS or each.get("location", "end") != "end"
        for one, each in zip(after, settings, strict=True)
    ):
        raise DataError(
            f"{folder}: the codecs {names} pack its chunks in an unusual order; write the array again with one "
            "compressor, and filters before it"
        )
    widest = max([itemsize, *_widths(folder, chain)])
    return Packing(names[packers[0]] if packers else None, widest, 4 * len(after))


def _widths(folder: Path, chain: Sequence[Any]) -> Iterator[int]:
    """Iterate over the sizes, in bytes, of the types between which codecs convert."""
    for one in chain:
        given = one.get("configuration") or one
        for key in ("dtype", "astype", "encode_dtype", "decode_dtype"):
            if key in given:
                kind = np.dtype(given[key])
                if kind.kind not in "fiub":
                    raise DataError(f"{folder}: the codec {_name(one)!r} converts to {kind}; store numbers as numbers")
                yield kind.itemsize


class ZarrRows:
    """A Zarr array of numbers whose stored chunks are measured before they are first unpacked.

    Args:
        folder: the folder of the array.
        array: the array.
        packing: how its chunks are stored.
    """

    def __init__(self, folder: Path, array: Any, packing: Packing) -> None:
        self.shape, self.dtype, self.chunks, self.attrs = array.shape, array.dtype, array.chunks, _attributes(array)
        self._folder, self._array, self._packing = folder, array, packing
        self._stored = array.shards or array.chunks
        self._measured = np.zeros(-(-array.shape[0] // self._stored[0]), bool)
        numbers = math.prod(array.chunks)
        self._most = numbers * packing.widest + numbers * packing.widest // 8 + SLACK
        self._per_shard = math.prod(n // of for n, of in zip(self._stored, array.chunks, strict=True))
        self._validate_files()

    def __getitem__(self, rows: slice) -> Any:
        first, last, _ = rows.indices(self.shape[0])
        for i in range(first // self._stored[0], -(-last // self._stored[0])):
            if not self._measured[i]:
                for place in self._places(i):
                    self._measure(place)
                self._measured[i] = True
        return self._array[rows]

    def _places(self, row: int) -> Iterator[tuple[int, ...]]:
        """Iterate over the numbers of the files of a row of chunks."""
        counts = (range(-(-n // of)) for n, of in zip(self.shape[1:], self._stored[1:], strict=True))
        return itertools.product([row], *counts)

    def _path(self, place: tuple[int, ...]) -> Path:
        return self._folder / str(self._array.metadata.encode_chunk_key(place))

    def _validate_files(self) -> None:
        """Validate the sizes of files, and the index of each shard."""
        if 16 * self._per_shard > MOST_INDEX:
            raise DataError(
                f"{self._folder}: a shard has {self._per_shard:,} chunks; write it again with larger chunks"
            )
        most = self._most if self._packing.index_last is None else 2 * self._per_shard * self._most
        for place in itertools.chain.from_iterable(map(self._places, range(len(self._measured)))):
            path = self._path(place)
            if (size := path.stat().st_size) > most:
                raise DataError(
                    f"{path}: has {in_bytes(size)}, but its numbers take {in_bytes(most)} at most; copy it again"
                )
            if self._packing.index_last is not None:
                self._spans(place)

    def _spans(self, place: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the position and size, in bytes, of each chunk in a file, validated."""
        path, packing = self._path(place), self._packing
        whole, length = path.stat().st_size, 16 * self._per_shard
        if packing.index_last is None:
            return [(0, whole)]
        with path.open("rb") as file:
            file.seek(max(0, whole - length - packing.index_rest) if packing.index_last else 0)
            found = file.read(length)
        if len(found) != length:
            raise DataError(f"{path}: is shorter than the index of its chunks; copy it again")
        index = np.frombuffer(found, f"{packing.index_order}u8")
        used = index.reshape(-1, 2)[self._inside(place)]
        if missing := int((used[:, 0] == 2**64 - 1).sum()):
            raise DataError(
                f"{path}: {missing} of its {len(used)} chunks are missing, so their values are unknown; copy it "
                "again, or, if they are fill values, write it again with config={'write_empty_chunks': True}"
            )
        spans = [(begin, size) for begin, size in used.tolist()]
        for begin, size in spans:
            if begin + size > whole or size > self._most:
                raise DataError(
                    f"{path}: a chunk has {in_bytes(size)}, more than its shard or its numbers; copy it again"
                )
        return spans

    def _inside(self, place: tuple[int, ...]) -> np.ndarray:
        """Return which chunks of a shard have values of the array, in the order of its index."""
        inside = np.ones((), bool)
        for n, at, of, chunk in zip(self.shape, place, self._stored, self.chunks, strict=True):
            inside = np.logical_and.outer(inside, at * of + np.arange(0, of, chunk) < n)
        return inside.ravel()

    def _measure(self, place: tuple[int, ...]) -> None:
        """Validate that each chunk in a file unpacks to no more than its numbers."""
        if (codec := self._packing.codec) is None:
            return
        path = self._path(place)
        with path.open("rb") as file:
            for begin, size in self._spans(place):
                file.seek(begin)
                if codec in HEADERS:
                    unpacked = int.from_bytes(file.read(min(size, 8))[HEADERS[codec] :][:4], "little")
                elif codec in ("gzip", "zlib") and size * HIGHEST_RATIO < self._most + UNPACKED:
                    continue
                else:
                    unpacked = _unpack(path, file.read(size - self._packing.checksums), STREAMS[codec], self._most)
                if unpacked > self._most:
                    raise DataError(
                        f"{path}: a chunk of {in_bytes(size)} unpacks to more than its numbers, which take "
                        f"{in_bytes(self._most)} at most; copy it again"
                    )


def _attributes(array: Any) -> dict[str, Any]:
    """Return the attributes of an array, with the code of missing values that xarray writes as Zarr's fill value."""
    attributes = dict(array.attrs)
    if array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes and array.fill_value not in (None, 0):
        attributes["_FillValue"] = array.fill_value
    return attributes


def _unpack(path: Path, packed: bytes, codec: str, most: int) -> int:
    """Unpack data to nowhere until they exceed a size in bytes, and return how many there were."""
    import pyarrow as pa

    unpacked = 0
    try:
        with pa.CompressedInputStream(pa.BufferReader(packed), codec) as stream:
            while unpacked <= most and (part := stream.read(2**20)):
                unpacked += len(part)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be unpacked ({reason(error)}); copy it again") from error
    return unpacked
