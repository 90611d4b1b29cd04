"""Write nested states of tensors and numbers to safetensors files with a checksum, and read them."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pyro_vae.data.limits import free_memory, in_bytes, validate_regular, validate_size
from pyro_vae.errors import DataError, OutputError, SettingsError, type_of

Tree: TypeAlias = Any
"""Nested dicts, lists and tuples of tensors, ints, floats (NaN and infinities too), bools, strings and None."""

FORMAT = 2
"""The version of this format; files of newer formats are rejected."""

LARGEST_HEADER = 100 * 2**20
"""The largest header in bytes, the limit of safetensors."""

MOST_VALUES = 4 * 10**6
"""The largest number of values in a header, each of which takes some hundred bytes; 400,000 epochs of a history."""

KIND = "pyro_vae"
"""The metadata key of the JSON."""

_ZEROS = b"0" * 64
_START = b'{"__metadata__":{"pyro_vae":"{\\"sha256\\":\\"'
_START_OF_FORMAT_1 = b'{"__metadata__":{"checksum":"'

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files",
}


def write_tree(path: str | Path, tree: Tree, about: dict[str, Any] | None = None) -> None:
    """Write a tree to a safetensors file, which replaces an existing one once it is safely on disk.

    The metadata contain the structure and ``about`` as JSON, and the SHA-256 of every other byte of the file.

    Raises:
        OutputError: if the file cannot be written; no partial file remains, and an existing file is kept.
        SettingsError: if the tree holds a value that cannot be stored.
    """
    encoded, tensors = encode(tree)
    described = {"sha256": _ZEROS.decode(), "format": FORMAT, "about": about or {}, "tree": encoded}
    text = json.dumps(described, allow_nan=False, separators=(",", ":"))
    _validate_values(path, text.encode())
    data = bytearray(safetensors.torch.save(tensors, {KIND: text}))
    place, _ = _checksum_of(path, data)
    data[place] = hashlib.sha256(data).hexdigest().encode()
    with staged(path) as part:
        part.write_bytes(data)


def read_tree(path: str | Path) -> tuple[Tree, dict[str, Any]]:
    """Read a tree, with tensors on the CPU, and ``about``; verify every byte and run no code.

    Raises:
        DataError: if the file cannot be read, is damaged, has a newer format or was not written by this library.
    """
    data = _read_whole(Path(path))
    _validate_checksum(path, data)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header["__metadata__"][KIND])
        if described["format"] <= FORMAT:
            tensors = safetensors.torch.load(bytes(data))
            _validate_sharing(described["tree"], tensors)
            return decode(described["tree"], tensors), dict(described["about"])
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        kind = type(error).__name__  # the checksum is right, but the content is not ours
        raise DataError(f"{path}: was not written by pyro-vae ({kind}: {error}); copy it again") from error
    raise DataError(
        f"{path}: has format {described['format']}, but this pyro-vae reads formats up to {FORMAT}; "
        "use a newer pyro-vae"
    )


def _read_whole(path: Path) -> bytearray:
    """Read a file after verifying its first bytes and its length against the header."""
    try:
        size = validate_regular(path, links=True, advice="pass a file that pyro-vae wrote")
        with open(path, "rb") as file:
            start = file.read(8 + len(_START))
            _checksum_of(path, start)
            length = int.from_bytes(start[:8], "little")
            if length > LARGEST_HEADER:
                raise DataError(f"{path}: is damaged (header of {in_bytes(length)}); copy it again")
            text = (start + file.read(8 + length - len(start)))[8 : 8 + length]
            _validate_values(path, text)
            header = json.loads(text)
            end = max([of["data_offsets"][1] for name, of in header.items() if name != "__metadata__"], default=0)
        validate_size(path, size, free_memory())
        if size != 8 + length + end:
            raise DataError(f"{path}: is damaged ({size} bytes instead of {8 + length + end}); copy it again")
        return bytearray(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be read ({reason}); pass a file that pyro-vae wrote") from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is damaged ({type(error).__name__} in its header); copy it again") from error


def _validate_values(path: str | Path, text: bytes) -> None:
    """Count the values of JSON before it is parsed: of `[[],[],…]` each byte would take 50 bytes of memory."""
    if sum(text.count(start) for start in (b",", b"[", b"{")) > MOST_VALUES:
        raise DataError(f"{path}: has more than {MOST_VALUES:,} values in its header, the maximum; write fewer")


def _validate_sharing(tree: Any, tensors: dict[str, Tensor]) -> None:
    """Raise if copies of repeatedly named tensors would fill the memory."""
    stored = sum(tensor.nbytes for tensor in tensors.values())
    if (named := _named_bytes(tree, tensors)) > 4 * stored + 2**28:
        raise ValueError(f"names {named / 2**30:.1f} GiB of tensors, but stores {stored / 2**30:.1f} GiB")


def _named_bytes(value: Any, tensors: dict[str, Tensor]) -> int:
    if isinstance(value, list):
        return sum(_named_bytes(item, tensors) for item in value)
    if not isinstance(value, dict):
        return 0
    if value.get("$") == "tensor":
        return tensors[value["name"]].nbytes
    return sum(_named_bytes(item, tensors) for item in value.values())


def _checksum_of(path: str | Path, data: bytes | bytearray) -> tuple[slice, Callable[..., Any]]:
    """Return the place and the algorithm of a file's checksum; format 1 had another algorithm."""
    for start, algorithm in ((_START, hashlib.sha256), (_START_OF_FORMAT_1, _blake2b)):
        if data[8 : 8 + len(start)] == start:
            return slice(8 + len(start), 8 + len(start) + len(_ZEROS)), algorithm
    raise DataError(f"{path}: is damaged, or not a weights or checkpoint file of pyro-vae; copy it again")


def _validate_checksum(path: str | Path, data: bytearray) -> None:
    place, algorithm = _checksum_of(path, data)
    checksum, data[place] = bytes(data[place]), _ZEROS
    if algorithm(data).hexdigest().encode() != checksum:
        raise DataError(f"{path}: is damaged (wrong checksum); copy it again")


def _blake2b(data: bytearray) -> Any:
    return hashlib.blake2b(data, digest_size=len(_ZEROS) // 2)


def encode(tree: Tree) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into JSON and named tensors; a SettingsError names a value that cannot be stored."""
    encoder = _Encoder()
    return encoder.encoded(tree), encoder.tensors


class _Encoder:
    """Encode a tree as JSON and tensors; objects with the key ``$`` encode types that JSON lacks."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encoded(self, value: Tree, place: tuple[str, ...] = ()) -> Any:
        """Encode the value at a place in the tree."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Tensor):
            return {"$": "tensor", "name": self._name(value, place)}
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else {"$": "float", "value": str(float(value))}
        if isinstance(value, list | tuple):
            items = [self.encoded(item, (*place, str(i))) for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$": "tuple", "items": items}
        if isinstance(value, dict) and all(isinstance(key, str) or type(key) is int for key in value):
            named = {key: self.encoded(item, (*place, str(key))) for key, item in value.items()}
            if all(isinstance(key, str) for key in named) and "$" not in named and not isinstance(value, Counter):
                return named
            return {"$": "counter" if isinstance(value, Counter) else "dict", "items": [*map(list, named.items())]}
        where = ".".join(place) or "the tree"
        raise SettingsError(
            f"{where} of the state is {type_of(value)}, which cannot be stored; "
            "make it a tensor, a number, a string, or a list or dict of them"
        )

    def _name(self, tensor: Tensor, place: tuple[str, ...]) -> str:
        if tensor.is_complex() or tensor.layout != torch.strided:
            kind = f"a tensor of {tensor.layout}, {tensor.dtype}"
            raise SettingsError(f"{'.'.join(place)} of the state is {kind}; make it a dense, real tensor")
        memory = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()
        if tensor.numel() and memory in self._names:
            return self._names[memory]
        name = (".".join(place) or "tensor").encode("utf-8", "replace").decode()  # safetensors needs valid UTF-8
        while name in self.tensors or name == "__metadata__":
            name += "'"
        dense = tensor.detach().cpu().resolve_neg()
        self.tensors[name] = dense.clone(memory_format=torch.contiguous_format)  # safetensors rejects shared memory
        return self._names.setdefault(memory, name)


def decode(value: Any, tensors: dict[str, Tensor]) -> Tree:
    """Rebuild a tree from JSON and named tensors; no two tensors of the tree share memory."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get("$"):
        case None:
            return {key: decode(item, tensors) for key, item in value.items()}
        case "tensor":
            return tensors[value["name"]].clone()
        case "float":
            return float(value["value"])
        case "tuple":
            return tuple(decode(value["items"], tensors))
        case "dict" | "counter" as kind:
            items = {key: decode(item, tensors) for key, item in value["items"]}
            return Counter(items) if kind == "counter" else items
        case other:
            raise ValueError(f"unknown kind of value {other!r}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, including NaN and signed zeros."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or {one.layout, other.layout} != {torch.strided}:
        return False
    first, second = (tensor.to(other.device).contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


@contextlib.contextmanager
def staged(path: str | Path, ready: Callable[[Path], None] = lambda part: None) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` once it is safely on disk.

    ``ready`` is called with the temporary path just before. After an error the file is removed, and an OutputError
    says why it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    with contextlib.suppress(OSError):
        part.unlink()  # writing would follow a link of this name
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        ready(part)
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # HDF5 raises a RuntimeError if closing a file fails
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system supports it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; an OutputError says why it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> OutputError:
    """Make an OutputError that says why a file cannot be written."""
    if isinstance(error, OutputError):  # about the temporary file
        error = error.__cause__ if isinstance(error.__cause__, OSError) else error
    match = re.search(r"errno = (\d+)", str(error))  # HDF5 gives it in the message only
    number = int(match[1]) if match else getattr(error, "errno", None)
    why = os.strerror(number) if number else str(error).splitlines()[0]
    return OutputError(f"{path}: cannot be written ({why}); {_ADVICE.get(number or 0, 'choose another folder')}")
