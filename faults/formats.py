"""Each kind of file that is read: valid ones, where their bytes are put, and what reads them."""

import gzip
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

import pyro_vae as pv
from faults.kill import fit
from pyro_vae.cli import main
from pyro_vae.cli.check import _history
from pyro_vae.cli.checksums import compute_checksum, record_checksum, validate_unchanged
from pyro_vae.cli.fit import settings_of
from pyro_vae.data.limits import read_json
from pyro_vae.train.checkpoint import tensor_file

X = np.random.default_rng(0).normal(size=(12, 3))


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        name: of the kind.
        seeds: the bytes of valid ones.
        place: write bytes, in whatever holds them, into an empty folder.
        read: what reads the folder.
        modules: whose lines are counted, as paths below ``pyro_vae``.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    place: Callable[[Path, bytes], object]
    read: Callable[[Path], object]
    modules: Sequence[str]


def _file(name: str) -> Callable[[Path, bytes], object]:
    return lambda folder, data: (folder / name).write_bytes(data)


def _load(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        data = pv.data.load(folder / name)
        assert data.x.ndim == 2, data.x.shape
        assert data.x.numel(), data.x.shape
        assert data.x.isfinite().all(), "a number that is none"

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
    held = io.BytesIO()
    np.save(held, array)
    return held.getvalue()


def _npz() -> list[bytes]:
    held = io.BytesIO()
    np.savez_compressed(held, x=X, y=np.arange(12))
    return [held.getvalue()]


def _npz_of(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
        archive.writestr("y.npy", _npy(np.arange(12)))


def _structured() -> np.ndarray:
    return np.array([(i, i / 3, "ab"[i % 2]) for i in range(12)], dtype=[("a", "i4"), ("b", "f8"), ("c", "U1")])


def _parquets() -> list[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    tables = [
        pa.table(dict(zip("abc", X.T, strict=True))),
        pa.table({"a": pa.array([1, None] * 6), "b": [*"xy"] * 6, "c": pa.array([True, False] * 6)}),
    ]
    held = [io.BytesIO() for _ in tables]
    for table, into in zip(tables, held, strict=True):
        parquet.write_table(table, into, row_group_size=5)
    return [into.getvalue() for into in held]


def _matlabs() -> list[bytes]:
    from scipy.io import savemat

    found = []
    for more in ({"do_compression": True}, {}, {"format": "4"}):
        held = io.BytesIO()
        savemat(held, {"x": X, "y": np.arange(12)}, **more)
        found.append(held.getvalue())
    return found


def _idx(array: np.ndarray) -> bytes:
    code = {"u1": 8, "i2": 11, "f4": 13}[array.dtype.str[1:]]
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def _idxs() -> list[bytes]:
    image = np.arange(48, dtype="u1").reshape(3, 4, 4)
    return [_idx(image), _idx(image.astype("i2")), _idx(X.astype("f4")), gzip.compress(_idx(image))]


def _images() -> list[bytes]:
    from PIL import Image

    found = []
    for mode in ("L", "RGB", "P"):
        picture = Image.fromarray(np.arange(192, dtype="u1").reshape(8, 8, 3)).convert(mode)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"):
            held = io.BytesIO()
            picture.convert("RGB" if kind in ("JPEG", "PPM") else mode).save(held, kind)
            found.append(held.getvalue())
    return found


def _image(folder: Path, data: bytes) -> None:
    """Beside another; which suffix a file has says nothing to Pillow."""
    (folder / "x").mkdir()
    (folder / "x" / "a.png").write_bytes(data)
    (folder / "x" / "b.png").write_bytes(_images()[0])


def _stream(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        rows = pv.data.stream(folder / name).sample(8)
        assert rows.x.isfinite().all(), "a number that is none"

    return read


def _zarr(version: int) -> Path:
    import tempfile

    import zarr

    folder = Path(tempfile.mkdtemp()) / "x"
    array = zarr.create_array(str(folder), shape=X.shape, chunks=(4, 3), dtype="f8", zarr_format=version)
    array[:] = X
    return folder


def _zarr_of(part: str) -> tuple[Callable[[], Sequence[bytes]], Callable[[Path, bytes], object]]:
    """A file of a Zarr array, as ``zarr.json`` or the first chunk, and the array with other bytes in it."""
    version = 2 if part in (".zarray", "0.0") else 3
    held: list[Path] = []

    def whole() -> Path:
        if not held:
            held.append(_zarr(version))
        return held[0]

    def plant(folder: Path, data: bytes) -> None:
        shutil.copytree(whole(), folder / "x")
        (folder / "x" / part).write_bytes(data)

    return lambda: [(whole() / part).read_bytes()], plant


def _runs() -> Callable[[], Path]:
    """A finished run, made once."""
    import tempfile

    held: list[Path] = []

    def run() -> Path:
        if not held:
            folder = Path(tempfile.mkdtemp())
            assert main(fit(folder, "eager", epochs=1)) == 0
            for picture in (folder / "run").glob("*.png"):
                picture.unlink()
            held.append(folder / "run")
        return held[0]

    return run


RUN = _runs()


def _of_run(name: str) -> tuple[Callable[[], Sequence[bytes]], Callable[[Path, bytes], object]]:
    """A file of a run folder, and the folder with other bytes in it, whose sum a stranger has made anew."""

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
    """The JSON of a file of tensors, its metadata unfolded so that they are changed like the rest, and the tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    about = header["__metadata__"]
    about[tensor_file.KIND] = json.loads(about[tensor_file.KIND])
    return json.dumps(header).encode(), data[end:]


def _signed(name: Callable[[], str]) -> tuple[Callable[[], Sequence[bytes]], Callable[[Path, bytes], object]]:
    """The description in a file of tensors, and the run with another one, as a stranger can sign it."""

    def seeds() -> list[bytes]:
        return [_header((RUN() / name()).read_bytes())[0]]

    def plant(folder: Path, data: bytes) -> None:
        run = Path(shutil.copytree(RUN(), folder / "run"))
        _, tensors = _header((run / name()).read_bytes())
        try:
            header = json.loads(data)
            about = header["__metadata__"]
            about[tensor_file.KIND] = json.dumps(about[tensor_file.KIND])
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
    assert all(weight.isfinite().all() for weight in vae.parameters()), "a weight that is no number"


def _resumed(folder: Path) -> None:
    """Without figures, which take longer than the training."""
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


DATA = ("data/readers.py", "data/tables.py", "data/columns.py", "data/memory.py", "data/limits.py")
OF_RUN = ("data/limits.py", "cli/checksums.py")
TENSORS = ("train/checkpoint/tensor_file.py", "train/checkpoint/save_load.py", "train/checkpoint/rebuild.py")
STREAMS = ("data/streams/tables.py", "data/streams/__init__.py")
SETTINGS = ("cli/saved_settings.py", "cli/trust.py", *OF_RUN)
ZARR = ("data/streams/zarr_store.py", *STREAMS)
OF_ZARR = ("zarr.json", ".zarray", "c/0/0", "0.0")

FORMATS = (
    Format("text", _texts, _file("x.csv"), _load("x.csv"), ("data/text.py", *DATA)),
    Format("text, gzipped", lambda: [*map(gzip.compress, _texts())], _file("x.csv.gz"), _load("x.csv.gz"), DATA),
    Format("text, zipped", _texts, _zipped, _load("x.zip"), ("data/text.py", *DATA)),
    Format("npy", lambda: [_npy(), _npy(_structured())], _file("x.npy"), _load("x.npy"), DATA),
    Format("npz", _npz, _file("x.npz"), _load("x.npz"), DATA),
    Format("npz, its array", lambda: [_npy()], _npz_of, _load("x.npz"), DATA),
    Format("npy, streamed", lambda: [_npy()], _file("x.npy"), _stream("x.npy"), STREAMS),
    Format("Parquet", _parquets, _file("x.parquet"), _load("x.parquet"), DATA),
    Format(
        "Parquet, streamed", _parquets, _file("x.parquet"), _stream("x.parquet"),
        ("data/streams/parquet.py", *STREAMS),
    ),
    Format("mat", _matlabs, _file("x.mat"), _load("x.mat"), DATA),
    Format("IDX", _idxs, _file("x-idx3-ubyte"), _load("x-idx3-ubyte"), DATA),
    Format("images", _images, _image, _load("x"), ("data/images.py", *DATA)),
    *(Format(f"Zarr, {part}", *_zarr_of(part), _stream("x"), ZARR) for part in OF_ZARR),
    Format("config.yaml", *_of_run("config.yaml"), lambda folder: settings_of(folder / "run"), SETTINGS),
    Format("run.json", *_of_run("run.json"), lambda folder: read_json(folder / "run" / "run.json"), OF_RUN),
    Format("SHA256SUMS", *_of_run("SHA256SUMS"), _read_sums, OF_RUN),
    Format("history.nc", *_of_run("history.nc"), _read_history, ("cli/check.py", "cli/run_folder.py", *OF_RUN)),
    Format("weights, bytes", *_of_run("weights.safetensors"), _weights, TENSORS),
    Format("weights, signed", *_signed(lambda: "weights.safetensors"), _weights, TENSORS),
    Format("checkpoint, signed", *_signed(_newest), _checkpoint, ("train/checkpoint/rotation.py", *TENSORS)),
    Format("checkpoint, resumed", *_signed(_newest), _resumed, ("train/run_state.py", "train/resume.py", *TENSORS)),
)  # fmt: skip
"""The kinds of files; AnnData's are HDF5 files, as ``history.nc`` is."""
