"""The file formats to fuzz: valid files, how to place mutated bytes, and the reader of each."""

import gzip
import importlib.util
import io
import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np

import pyro_vae as pv
from faults.generated import read_array, read_table
from faults.kill import fit
from pyro_vae.cli import main
from pyro_vae.cli.check import _history
from pyro_vae.cli.checksums import compute_checksum, record_checksum, validate_unchanged
from pyro_vae.cli.load_run import settings_of
from pyro_vae.data.limits import read_json
from pyro_vae.train.checkpoint import tensor_file

X = np.random.default_rng(0).normal(size=(12, 3))


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        name: name of the format.
        seeds: return the bytes of valid files.
        place: write bytes to a file in an empty folder, inside an archive or a run folder if need be.
        read: read the folder.
        modules: modules whose lines are counted, as paths below ``pyro_vae``.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    place: Callable[[Path, bytes], object]
    read: Callable[[Path], object]
    modules: Sequence[str]


def _file(name: str) -> Callable[[Path, bytes], object]:
    return lambda folder, data: (folder / name).write_bytes(data)


def _load(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> pv.data.Data:
        data = pv.data.load(folder / name)
        assert data.x.ndim == 2, data.x.shape
        assert data.x.numel(), data.x.shape
        assert data.x.isfinite().all(), "a number is not finite"
        return data

    return read


def _texts() -> list[bytes]:
    rows = "\n".join(",".join(f"{x:.4g}" for x in row) for row in X)
    words = "\n".join(f'{i},"a, b",{i % 3}.5,{"xyz"[i % 3]},2020-01-{i + 1:02d}' for i in range(12))
    european = rows.replace(",", ";").replace(".", ",")
    texts = [f"a,b,c\n{rows}\n", rows, f"id,name,x,kind,day\n{words}\n", f"a;b;c\r\n{european}", f"# made\n{rows}"]
    return [text.encode() for text in texts] + [texts[0].replace(",", "\t").encode("utf-16")]


def _zipped(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("a.csv", data)


def _npy(array: np.ndarray = X) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz() -> list[bytes]:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=X, y=np.arange(12))
    return [buffer.getvalue()]


def _npz_of(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
        archive.writestr("y.npy", _npy(np.arange(12)))


def _structured() -> np.ndarray:
    return np.array([(i, i / 3, "ab"[i % 2]) for i in range(12)], dtype=[("a", "i4"), ("b", "f8"), ("c", "U1")])


def _parquets() -> list[bytes]:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    tables = [
        pa.table(dict(zip("abc", X.T, strict=True))),
        pa.table({"a": pa.array([1, None] * 6), "b": [*"xy"] * 6, "c": pa.array([True, False] * 6)}),
    ]
    frame = pd.DataFrame(X, columns=[*"abc"], index=pd.Index([f"row{i}" for i in range(12)], name="row"))
    tables += [pa.Table.from_pandas(frame), pa.Table.from_pandas(frame.assign(kind=pd.Categorical([*"xy"] * 6)))]
    buffers = [io.BytesIO() for _ in tables]
    for table, buffer in zip(tables, buffers, strict=True):
        parquet.write_table(table, buffer, row_group_size=5)
    return [buffer.getvalue() for buffer in buffers]


def _matlabs() -> list[bytes]:
    from scipy import sparse
    from scipy.io import savemat

    files = []
    for options in ({"do_compression": True}, {}, {"format": "4"}):
        buffer = io.BytesIO()
        savemat(buffer, {"x": X, "y": np.arange(12)}, **options)
        files.append(buffer.getvalue())
    buffer = io.BytesIO()
    others = {"s": {"a": 1.0, "b": "text"}, "c": np.array([X, "text"], dtype=object), "t": sparse.csc_array(X)}
    savemat(buffer, {"x": X.astype("f4"), "z": X * 1j, "flag": X > 0, **others})
    files.append(buffer.getvalue())
    return files


def _annotated() -> list[bytes]:
    """Return an AnnData file as anndata writes it, as far as a small matrix and its table of cells go."""
    import h5py

    files = []
    for options in ({}, {"chunks": (4, 3), "compression": "gzip"}):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            file.create_dataset("X", data=X, **options).attrs["encoding-type"] = "array"
            for name, index in (("obs", [f"cell{i}" for i in range(12)]), ("var", ["a", "b", "c"])):
                table = file.create_group(name)
                table["_index"] = index
                table.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.2.0"})
            file["obs/depth"] = np.arange(12.0)
        files.append(buffer.getvalue())
    return files


def _load_annotated(folder: Path) -> object:
    """Load an AnnData file; where anndata is not installed, h5py reads the matrix and the names in its place."""
    if importlib.util.find_spec("anndata"):
        return _load("x.h5ad")(folder)
    stand_in = ModuleType("anndata")
    stand_in.read_h5ad = _read_with_h5py  # type: ignore[attr-defined]
    with patch.dict(sys.modules, anndata=stand_in):
        return _load("x.h5ad")(folder)


def _read_with_h5py(path: Path) -> SimpleNamespace:
    import h5py
    import pandas as pd

    with h5py.File(path) as file:
        names = [file[name]["_index"].asstr()[:] for name in ("obs", "var")]
        obs = pd.DataFrame({"depth": file["obs/depth"][:]}, index=names[0])
        return SimpleNamespace(X=file["X"][:], layers={}, obs=obs, obs_names=names[0], var_names=names[1])


def _idx(array: np.ndarray) -> bytes:
    code = {"u1": 8, "i2": 11, "f4": 13}[array.dtype.str[1:]]
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def _idxs() -> list[bytes]:
    image = np.arange(48, dtype="u1").reshape(3, 4, 4)
    return [_idx(image), _idx(image.astype("i2")), _idx(X.astype("f4")), gzip.compress(_idx(image))]


def _images() -> list[bytes]:
    from PIL import Image

    files = []
    for mode in ("L", "RGB", "P"):
        picture = Image.fromarray(np.arange(192, dtype="u1").reshape(8, 8, 3)).convert(mode)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"):
            buffer = io.BytesIO()
            picture.convert("RGB" if kind in ("JPEG", "PPM") else mode).save(buffer, kind)
            files.append(buffer.getvalue())
    return files


def _image(folder: Path, data: bytes) -> None:
    """Place the bytes beside a valid image; Pillow ignores the suffix."""
    (folder / "x").mkdir()
    (folder / "x" / "a.png").write_bytes(data)
    (folder / "x" / "b.png").write_bytes(_images()[0])


def _stream(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        rows = pv.data.stream(folder / name).sample(8)
        assert rows.x.isfinite().all(), "a number is not finite"

    return read


def _zarr(version: int) -> Path:
    import tempfile

    import zarr

    folder = Path(tempfile.mkdtemp()) / "x"
    array = zarr.create_array(str(folder), shape=X.shape, chunks=(4, 3), dtype="f8", zarr_format=version)
    array[:] = X
    return folder


def _zarr_of(part: str) -> tuple[Callable[[], Sequence[bytes]], Callable[[Path, bytes], object]]:
    """Return the seeds and ``place`` of a file inside a Zarr array, such as ``zarr.json`` or the first chunk."""
    version = 2 if part in (".zarray", "0.0") else 3
    cache: list[Path] = []

    def whole() -> Path:
        if not cache:
            cache.append(_zarr(version))
        return cache[0]

    def plant(folder: Path, data: bytes) -> None:
        shutil.copytree(whole(), folder / "x")
        (folder / "x" / part).write_bytes(data)

    return lambda: [(whole() / part).read_bytes()], plant


def _runs() -> Callable[[], Path]:
    """Return a function that makes a finished run at its first call."""
    import tempfile

    cache: list[Path] = []

    def run() -> Path:
        if not cache:
            folder = Path(tempfile.mkdtemp())
            assert main(fit(folder, "eager", epochs=1)) == 0
            for picture in (folder / "run").glob("*.png"):
                picture.unlink()
            cache.append(folder / "run")
        return cache[0]

    return run


RUN = _runs()


def _of_run(name: str) -> tuple[Callable[[], Sequence[bytes]], Callable[[Path, bytes], object]]:
    """Return the seeds and ``place`` of a file inside a run folder; the checksum is updated, as an attacker would."""

    def plant(folder: Path, data: bytes) -> None:
        run = Path(shutil.copytree(RUN(), folder / "run"))
        (run / name).write_bytes(data)
        if "/" not in name and name != "SHA256SUMS":
            record_checksum(run, name, compute_checksum(run / name))

    def seeds() -> list[bytes]:
        return [(RUN() / name).read_bytes()]

    return seeds, plant


def _newest() -> str:
    return f"checkpoints/{sorted((RUN() / 'checkpoints').iterdir())[-1].name}"


def _header(data: bytes) -> tuple[bytes, bytes]:
    """Split a file of tensors into its JSON header, with decoded metadata for mutations to reach, and its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    metadata[tensor_file.KIND] = json.loads(metadata[tensor_file.KIND])
    return json.dumps(header).encode(), data[end:]


def _signed(name: Callable[[], str]) -> tuple[Callable[[], Sequence[bytes]], Callable[[Path, bytes], object]]:
    """Return the seeds and ``place`` of the header of a file of tensors, with all checksums updated."""

    def seeds() -> list[bytes]:
        return [_header((RUN() / name()).read_bytes())[0]]

    def plant(folder: Path, data: bytes) -> None:
        run = Path(shutil.copytree(RUN(), folder / "run"))
        _, tensors = _header((run / name()).read_bytes())
        try:
            header = json.loads(data)
            metadata = header["__metadata__"]
            metadata[tensor_file.KIND] = json.dumps(metadata[tensor_file.KIND])
            data = json.dumps(header, separators=(",", ":")).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        data += b" " * (-len(data) % 8)
        whole = bytearray(len(data).to_bytes(8, "little") + data + tensors)
        try:
            place, algorithm = tensor_file._checksum_of("x", whole)
            whole[place] = tensor_file._ZEROS
            whole[place] = algorithm(whole).hexdigest().encode()
        except pv.errors.DataError:
            pass
        (run / name()).write_bytes(whole)
        if "/" not in name():
            record_checksum(run, name(), compute_checksum(run / name()))

    return seeds, plant


def _weights(folder: Path) -> None:
    vae = pv.load(folder / "run")
    assert all(weight.isfinite().all() for weight in vae.parameters()), "a weight is not finite"


def _resume(folder: Path) -> None:
    """Resume the run without figures, which take longer than the training."""
    with patch("pyro_vae.cli.fit_command.save_fit"), patch("pyro_vae.cli.fit_command.show_baseline"):
        assert main(["fit", "--resume", str(folder / "run"), "--epochs", "2"]) in (0, 2)


def _checkpoint(folder: Path) -> None:
    (folder / "run" / "weights.safetensors").unlink()
    pv.load(folder / "run")


def _read_history(folder: Path) -> None:
    _history(folder / "run")


def _read_sums(folder: Path) -> None:
    for name in ("config.yaml", "weights.safetensors", "history.nc"):
        validate_unchanged(folder / "run" / name)


DATA = ("data/readers.py", "data/frames.py", "data/tables.py", "data/columns.py", "data/memory.py", "data/limits.py")
RUN_FILES = ("data/limits.py", "cli/checksums.py")
TENSORS = ("train/checkpoint/tensor_file.py", "train/checkpoint/save_load.py", "train/checkpoint/rebuild.py")
STREAMS = ("data/streams/tables.py", "data/streams/__init__.py")
SETTINGS = ("cli/saved_settings.py", "cli/trust.py", *RUN_FILES)
ZARR = ("data/streams/zarr_store.py", *STREAMS)
ZARR_PARTS = ("zarr.json", ".zarray", "c/0/0", "0.0")

FORMATS = (
    Format("text", _texts, _file("x.csv"), _load("x.csv"), ("data/text.py", *DATA)),
    Format("text, gzipped", lambda: [*map(gzip.compress, _texts())], _file("x.csv.gz"), _load("x.csv.gz"), DATA),
    Format("text, zipped", _texts, _zipped, _load("x.zip"), ("data/text.py", *DATA)),
    Format("npy", lambda: [_npy(), _npy(_structured())], _file("x.npy"), _load("x.npy"), DATA),
    Format("npz", _npz, _file("x.npz"), _load("x.npz"), DATA),
    Format("npz, its array", lambda: [_npy(), _npy(_structured())], _npz_of, _load("x.npz"), DATA),
    Format("npy, streamed", lambda: [_npy()], _file("x.npy"), _stream("x.npy"), STREAMS),
    Format("arrays", lambda: [*map(bytes, range(9))], _file("seed"), read_array, DATA),
    Format("tables", lambda: [*map(bytes, range(9))], _file("seed"), read_table, DATA),
    Format("Parquet", _parquets, _file("x.parquet"), _load("x.parquet"), DATA),
    Format(
        "Parquet, streamed", _parquets, _file("x.parquet"), _stream("x.parquet"),
        ("data/streams/parquet.py", *STREAMS),
    ),
    Format("mat", _matlabs, _file("x.mat"), _load("x.mat"), DATA),
    Format("h5ad", _annotated, _file("x.h5ad"), _load_annotated, DATA),
    Format("IDX", _idxs, _file("x-idx3-ubyte"), _load("x-idx3-ubyte"), DATA),
    Format("images", _images, _image, _load("x"), ("data/images.py", *DATA)),
    *(Format(f"Zarr, {part}", *_zarr_of(part), _stream("x"), ZARR) for part in ZARR_PARTS),
    Format("config.yaml", *_of_run("config.yaml"), lambda folder: settings_of(folder / "run"), SETTINGS),
    Format("run.json", *_of_run("run.json"), lambda folder: read_json(folder / "run" / "run.json"), RUN_FILES),
    Format("SHA256SUMS", *_of_run("SHA256SUMS"), _read_sums, RUN_FILES),
    Format("history.nc", *_of_run("history.nc"), _read_history, ("cli/check.py", "cli/run_folder.py", *RUN_FILES)),
    Format("weights, bytes", *_of_run("weights.safetensors"), _weights, TENSORS),
    Format("weights, signed", *_signed(lambda: "weights.safetensors"), _weights, TENSORS),
    Format("checkpoint, signed", *_signed(_newest), _checkpoint, ("train/checkpoint/rotation.py", *TENSORS)),
    Format("checkpoint, resumed", *_signed(_newest), _resume, ("train/run_state.py", "train/resume.py", *TENSORS)),
)  # fmt: skip
"""All formats."""
