"""State trees in files: nested dicts and lists of tensors and numbers, each file whole under a checksum or refused."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from pyro_vae.errors import DataError, OutputError, SettingsError

Tree: TypeAlias = Any
"""Nested dicts and lists of tensors, ints, floats (NaN and infinities too), bools, strings and None."""

FORMAT = 1
"""The number of this format; a file of a higher one is refused."""

KIND = "pyro_vae"
"""Under which name the JSON stands in a file's metadata."""

# The checksum is the first of the header, so that its place is known without reading the header.
_START = b'{"__metadata__":{"checksum":"'
_PLACE, _HEX = 8 + len(_START), 64
_ZEROS = b"0" * _HEX

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip

_TYPES = {name: dtype for dtype, name in _DTYPES.items()}

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files",
}


def write_tree(path: str | Path, tree: Tree, about: dict[str, Any] | None = None) -> None:
    """Write a tree as one safetensors file, whole or not at all.

    Structure and ``about`` stand as JSON in the metadata, beside a BLAKE2b checksum of every other byte of the file.

    Args:
        path: of the file; one that is there is replaced at once, when the new one is safely on disk.
        tree: dicts (of strings, or whole numbers), lists and tuples (which become lists), tensors of any real dtype
            and shape, numbers, strings and None.
        about: what JSON holds, to be read beside the tree.

    Raises:
        OutputError: if it cannot be written; nothing is left of it, and what was there stays.
        SettingsError: if the tree holds anything else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tree(Path(folder, "a.safetensors"), {"rate": math.inf, "w": [torch.ones(2)]}, {"of": "a test"})
        ...     read_tree(Path(folder, "a.safetensors"))
        ({'rate': inf, 'w': [tensor([1., 1.])]}, {'of': 'a test'})
    """
    encoder = _Encoder()
    described = {"format": FORMAT, "about": about or {}, "tree": encoder.encoded(tree)}
    pieces = list(_pieces(json.dumps(described, allow_nan=False, separators=(",", ":")), encoder.tensors))
    digest = hashlib.blake2b(digest_size=_HEX // 2)
    for piece in pieces:
        digest.update(piece)
    with atomic(path) as file:
        file.write(pieces[0][:_PLACE] + digest.hexdigest().encode() + pieces[0][_PLACE + _HEX :])
        for piece in pieces[1:]:
            file.write(piece)


def read_tree(path: str | Path) -> tuple[Tree, dict[str, Any]]:
    """Read what :func:`write_tree` wrote, every byte of it checked; nothing in a file is ever run.

    Args:
        path: of the file.

    Returns:
        The tree, its tensors on the CPU, and what was told about it.

    Raises:
        DataError: if the file cannot be read, is not whole, is of a newer format or not of this library.
    """
    try:
        data = _bytes_of(path)
    except (OSError, ValueError) as error:  # ValueError: a path that no file system takes
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); give the path of a file that pyro-vae wrote") from error
    _refuse_damaged(path, data)
    try:
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size])
        described = json.loads(table.pop("__metadata__")[KIND])
        if described["format"] > FORMAT:
            raise DataError(
                f"{path}: is of format {described['format']}, and this pyro-vae knows formats up to {FORMAT}; "
                "read it with a newer pyro-vae"
            )
        return _decoded(described["tree"], _tensors(data, 8 + size, table), set()), described["about"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a checksum that holds, and yet not ours
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: was not written by pyro-vae ({type(error).__name__}: {error}); copy it again"
        ) from error


def refuse_unwritable(tree: Tree) -> None:
    """Refuse a tree that :func:`write_tree` would, without writing it.

    Raises:
        SettingsError: naming what in it has no place in a file.

    Example:
        >>> refuse_unwritable({"schedule": {"base": 1j}})
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: schedule.base of the state is a complex, ...
    """
    _Encoder().encoded(tree)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` when all of it lies safely on disk, and else leaves nothing behind.

    Its permissions are those that the user's umask gives a new file.

    Raises:
        OutputError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic(Path(folder, "note.txt")) as file:
        ...         _ = file.write(b"hello")
        ...     Path(folder, "note.txt").read_text()
        'hello'
    """
    path = Path(path)
    part = part_of(path)
    try:
        file = open(part, "wb")  # noqa: SIM115  (closed below)
    except (OSError, ValueError) as error:  # ValueError: a path that no file system takes
        raise unwritable(path, error) from error
    try:
        with file:
            yield file
            sync(file)
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def part_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f".{path.name}.part-{os.getpid()}")


def sync(file: Any) -> None:
    """What was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names in a folder are on disk, where its file system can be asked for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        OutputError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no file system takes
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> OutputError:
    """The sentence for a file that could not be written."""
    if isinstance(error, OutputError):  # of what lay in its place until it was whole
        error = error.__cause__ if isinstance(error.__cause__, OSError) else error
    told = re.search(r"errno = (\d+)", str(error))  # HDF5 hides it in its words
    number = int(told[1]) if told else getattr(error, "errno", None)
    why = os.strerror(number) if number else str(error).splitlines()[0]
    return OutputError(f"{path}: cannot be written ({why}); {_ADVICE.get(number or 0, 'choose another folder')}")


def _pieces(described: str, tensors: dict[str, Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file, zeros in the place of its checksum; those of tensors are views of them."""
    views: list[memoryview] = []
    table, offset = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # aligned without padding
        flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
        plain: Any = (
            (flat if len(flat) else flat.new_empty(0)).view(torch.uint8).numpy()
        )  # of nothing the stride may be 0
        view = memoryview(plain)
        end = offset + view.nbytes
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        views, offset = [*views, view], end
    rest = json.dumps({KIND: described}, separators=(",", ":"))[1:] + "," * bool(table)
    header = _START + _ZEROS + b'",' + rest.encode() + json.dumps(table, separators=(",", ":"))[1:].encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    yield from views


def _bytes_of(path: str | Path) -> bytearray:
    with open(path, "rb") as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        del data[file.readinto(data) :]
    return data


def _tensors(data: bytearray, start: int, table: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a table of names tells of, each in memory of its own."""
    tensors = {}
    for name, told in table.items():
        dtype, count = _TYPES[told["dtype"]], math.prod(told["shape"])
        first = start + told["data_offsets"][0]
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=first) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(told["shape"]).clone()
    return tensors


def _refuse_damaged(path: str | Path, data: bytearray) -> None:
    """Refuse bytes that are not those of a file of ours, all of them."""
    if data[8:_PLACE] != _START:
        raise DataError(f"{path}: is damaged, or no file of weights or a checkpoint of pyro-vae; copy it again")
    whole, digest = memoryview(data), hashlib.blake2b(digest_size=_HEX // 2)
    for piece in (whole[:_PLACE], _ZEROS, whole[_PLACE + _HEX :]):
        digest.update(piece)
    if digest.hexdigest().encode() != data[_PLACE : _PLACE + _HEX]:
        raise DataError(f"{path}: is damaged, as its checksum is not that of what it holds; copy it again")


class _Encoder:
    """A tree as what JSON holds, and its tensors by name; those of the same memory are one.

    An object with ``$`` stands for what JSON has no word for.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encoded(self, value: Tree, place: tuple[str, ...] = ()) -> Any:
        """What JSON holds of a value at a place in the tree."""
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, Tensor):
            return {"$": "tensor", "name": self._name(value, place)}
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else {"$": "float", "value": str(float(value))}
        if isinstance(value, list | tuple):
            return [self.encoded(item, (*place, str(i))) for i, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) or type(key) is int for key in value):
            items = {key: self.encoded(item, (*place, str(key))) for key, item in value.items()}
            plain = all(isinstance(key, str) for key in items) and "$" not in items
            return items if plain else {"$": "dict", "items": [[key, item] for key, item in items.items()]}
        where = ".".join(place) or "the tree"
        raise SettingsError(
            f"{where} of the state is a {type(value).__name__}, which no file of weights holds; "
            "make it a tensor, a number, a string, or a list or dict of them"
        )

    def _name(self, tensor: Tensor, place: tuple[str, ...]) -> str:
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            kind = f"a tensor of {tensor.layout}, {tensor.dtype}"
            raise SettingsError(f"{'.'.join(place)} of the state is {kind}; make it a dense one of real numbers")
        memory = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()
        if tensor.numel() and memory in self._names:
            return self._names[memory]
        name = (".".join(place) or "tensor").encode("utf-8", "replace").decode()  # half a character is no name there
        while name in self.tensors or name == "__metadata__":
            name += "'"
        self.tensors[name] = tensor
        return self._names.setdefault(memory, name)


def _decoded(value: Any, tensors: dict[str, Tensor], used: set[str]) -> Tree:
    """The tree that was encoded; no two of its tensors share memory."""
    if isinstance(value, list):
        return [_decoded(item, tensors, used) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get("$"):
        case None:
            return {key: _decoded(item, tensors, used) for key, item in value.items()}
        case "tensor":
            tensor = tensors[value["name"]]
            tensor = tensor.clone() if value["name"] in used else tensor
            used.add(value["name"])
            return tensor
        case "float":
            return float(value["value"])
        case "dict":
            return {key: _decoded(item, tensors, used) for key, item in value["items"]}
        case other:
            raise ValueError(f"{other!r} is no kind of value")
