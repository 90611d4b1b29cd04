"""Files that unpack to far more than they hold are refused with their size, before memory is taken."""

import base64
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import scipy.io
import scipy.sparse
import torch
import zarr
from PIL import Image
from pyarrow import parquet

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.data import limits, trial_read
from pyro_vae.data.rows import data_of
from pyro_vae.errors import DataError

ZEROS = np.zeros((2**16, 64))  # 32 MiB


def npz(path: Path) -> None:
    np.savez_compressed(path, x=ZEROS)


def idx(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 2**15, 32, 32) + bytes(2**25)))


def text(path: Path) -> None:
    path.write_bytes(gzip.compress(b"a,b\n" + b"0,0\n" * 2**23))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", b"a,b\n" + b"0,0\n" * 2**23)


def table(path: Path) -> None:
    parquet.write_table(pa.table({f"c{i}": column for i, column in enumerate(ZEROS.T)}), path)


def matlab(path: Path) -> None:
    scipy.io.savemat(path, {"x": ZEROS}, do_compression=True)


@pytest.mark.parametrize(
    ("name", "make"),
    [("x.npz", npz), ("x.idx.gz", idx), ("x.csv.gz", text), ("x.zip", zipped), ("x.parquet", table), ("x.mat", matlab)],
)
def test_a_file_that_unpacks_to_far_more_is_refused_with_its_size(name, make, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "UNPACKED", 2**20)
    monkeypatch.setattr("pyro_vae.data.readers.UNPACKED", 2**20)
    make(tmp_path / name)
    with pytest.raises(DataError):  # which imports the reader
        pv.data.load(tmp_path / name)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"unpacks from .* to \d+(\.\d+)? MiB, more than 100 times as much"):
        pv.data.load(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}])
def test_text_that_unpacks_to_far_more_is_refused_before_it_is_read(options, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "UNPACKED", 2**22)
    path = tmp_path / "x.parquet"
    table = pa.table({"a": ["x" * 2000 + "a", "x" * 2000 + "b"] * 2000, "b": np.arange(4000.0)})
    parquet.write_table(table, path, **options)
    assert path.stat().st_size < 80_000
    with pytest.raises(DataError, match=r"x\.parquet: unpacks from .* to 7\.6\d MiB, more than 100 times as much"):
        pv.data.load(path)
    assert pv.data.load(path, drop="a").columns == ["b"]
    monkeypatch.setattr(limits, "UNPACKED", 2**23)
    assert pv.data.load(path).x[:2, 0].tolist() == [0, 1]


def test_pages_of_parquet_are_tried_where_a_codec_may_inflate_them(tmp_path):
    """The sizes in a footer may be too small."""
    for codec, tried in [("snappy", False), ("none", False), ("zstd", True), ("gzip", True)]:
        parquet.write_table(pa.table({"a": [1.0, 2.0]}), tmp_path / "x.parquet", compression=codec)
        assert pv.data.load(tmp_path / "x.parquet").x.tolist() == [[1], [2]]
        # In a process of its own it limits the memory.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial_read, "_limit_memory", lambda _: None)
            assert (trial_read.parquet_bytes(str(tmp_path / "x.parquet"), 100) >= 16) == tried


CRASHES = (
    "c-oaw!AiqG5S`tI5Q~SlI3Wvr$i<-0R;yG*1ew&TMa3E@;xUwvDrjS>_ILackA9G!;7(H8ix=NvW_Y{r&4U?I)IketxN(INp#k7%"
    "DDZuPfDLq;#j}mJ_MG3B)#S>pKiGQRv^8IvS`k75TB_Lv&z_AZ$y1DmsBTs~5rb<ft#kkytEvljO&JoUYq_7o{Sv`p;QVi^;<UgE"
    "z=W1?yltyMat?O10>`+5(%w2n(aqganaBGOJB)o|+){~4qB(^roe`zfOA9UxiLQC*5e*7r)eZVwMvH00I-|c}pTaj>I8*<$_!*{4"
    "5iRxMgy^3A&$*Wv5O{tT=Pz%`YipcktvJu8bN@ZbXAje7fA65Z+wLgMhkFzNLvzy~0A^UM"
)
"""A Parquet file of 472 bytes with a wrong count of definition levels in its footer, which ends Arrow's process."""


@pytest.mark.parametrize("read", [pv.data.load, pv.data.stream])
def test_a_footer_that_ends_the_process_is_tried_in_another(read, tmp_path):
    (tmp_path / "x.parquet").write_bytes(zlib.decompress(base64.b85decode(CRASHES)))
    with pytest.raises(DataError, match=r"x\.parquet: not a valid Parquet file \(reading it crashes the process\)"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("read", [pv.data.load, pv.data.stream])
@pytest.mark.parametrize("value", [[1.0, 2.0], {"b": 1.0}, [{"c": [1.0]}]])
def test_lists_in_a_table_are_refused_before_they_are_read(value, read, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet.ParquetFile, "read", lambda *_, **__: pytest.fail("values were read"))
    parquet.write_table(pa.table({"a": [value], "b": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'a' has type .*, not "):
        read(tmp_path / "x.parquet")


def test_lists_that_are_dropped_are_no_obstacle(tmp_path):
    parquet.write_table(pa.table({"a": [[1.0, 2.0]] * 3, "b": [1.0, 2.0, 3.0]}), tmp_path / "x.parquet")
    assert pv.data.load(tmp_path / "x.parquet", drop="a").x.tolist() == [[1], [2], [3]]
    with pytest.raises(DataError, match="there is no column 'c'"):
        pv.data.load(tmp_path / "x.parquet", drop="a,c")


@pytest.mark.parametrize("read", [pv.data.load, pv.data.stream])
def test_columns_have_as_many_values_as_rows(read, tmp_path):
    """Arrow takes the number of values from the footer, which is written last."""
    parquet.write_table(pa.table({"a": np.arange(77.0)}), tmp_path / "x.parquet", compression="none")
    data = (tmp_path / "x.parquet").read_bytes()
    at = data.rindex(b"\x16\x9a\x01\x16")  # Thrift's code of 77, then the next field
    (tmp_path / "x.parquet").write_bytes(data[:at] + b"\x16\x9c\x01\x16" + data[at + 4 :])
    with pytest.raises(DataError, match=r"not a valid Parquet file \(column 'a' has 78 values in 77 rows\)"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("read", [pv.data.load, pv.data.stream])
def test_a_column_of_numbers_takes_no_more_bytes_than_they(read, tmp_path, monkeypatch):
    parquet.write_table(pa.table({"a": np.arange(1000.0)}), tmp_path / "x.parquet", compression="none")
    assert read(tmp_path / "x.parquet") is not None
    monkeypatch.setattr("pyro_vae.data.parquet.SLACK", 2**20 - 64_000)
    assert read(tmp_path / "x.parquet") is not None
    monkeypatch.setattr("pyro_vae.data.parquet.SLACK", 7000 - 64_000)
    with pytest.raises(
        DataError, match=r"column 'a' has .* KiB for numbers of 6\.84 KiB at most; copy or make it again"
    ):
        read(tmp_path / "x.parquet")


def test_text_takes_about_as_many_bytes_as_are_stored(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"a": ["x", "y"] * 500}), tmp_path / "x.parquet", compression="none")
    monkeypatch.setattr("pyro_vae.data.parquet.UNPACKED", -20_000)
    with pytest.raises(DataError, match=r"x\.parquet: .* are stored for 7\.81 KiB of values; copy or make it again"):
        pv.data.load(tmp_path / "x.parquet")


def test_decimals_become_numbers_before_pandas_sees_them(tmp_path, monkeypatch):
    """In pandas each decimal is an object; those of row labels stay text, of which doubles would merge some."""
    texts, ids = ["-0.10", "12.34", "0.07", "-9999.90"], [f"{10**20 + i}" for i in range(4)]
    table = pa.table({
        "id": pa.array(map(Decimal, ids), pa.decimal128(38, 0)),
        "a": pa.array(map(Decimal, texts), pa.decimal128(9, 2)),
        "b": pa.array([Decimal(1), None, Decimal(3), Decimal(4)], pa.decimal256(40, 1)),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "x.parquet")
    seen = []
    monkeypatch.setattr(
        "pyro_vae.data.memory.data_of", lambda given, **more: seen.append(given) or data_of(given, **more)
    )
    data = pv.data.load(tmp_path / "x.parquet", index="id", missing="-9999.9")
    assert [str(kind) for kind in seen[0].schema.types] == ["string", "double", "double"]
    assert data.row_labels.tolist() == ids
    assert data.mask.tolist() == [[True, True], [True, False], [True, True], [False, True]]
    assert data.exact[:3, 0].tolist() == [-0.1, 12.34, 0.07]
    streamed = pv.data.stream(tmp_path / "x.parquet", columns=["a"])
    assert replace(streamed, dtype=torch.float64).head(4).x.flatten().tolist() == [float(text) for text in texts]


def test_dates_count_as_the_objects_they_become(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"a": pa.array([0] * 1000, pa.date32())}), tmp_path / "x.parquet")
    monkeypatch.setattr(limits, "UNPACKED", 63_000)
    monkeypatch.setattr(limits, "RATIO", 1)
    with pytest.raises(DataError, match=r"to 62\.5 KiB"):
        pv.data.load(tmp_path / "x.parquet")


BYTES = np.zeros((2**13, 64), np.uint8)  # 512 KiB, 2 MiB in single precision
IDX = struct.pack(">IIII", 0x00000803, 2**13, 8, 8) + bytes(2**19)


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("x.npz", lambda path: np.savez_compressed(path, x=BYTES), 2),
        ("x.npz", lambda path: np.savez_compressed(path, x=BYTES.astype("i4")[:2048]), 1),
        ("x.mat", lambda path: scipy.io.savemat(path, {"x": BYTES}, do_compression=True), 2),
        ("x.idx.gz", lambda path: path.write_bytes(gzip.compress(IDX)), 2),
    ],
)
def test_bytes_count_as_the_numbers_they_become(name, make, size, tmp_path, monkeypatch):
    make(tmp_path / name)
    monkeypatch.setattr(limits, "UNPACKED", size * 2**20)
    assert pv.data.load(tmp_path / name).x.numel() >= 2**17
    monkeypatch.setattr(limits, "UNPACKED", size * 2**20 - 1)
    with pytest.raises(DataError, match=rf"unpacks from .* to {size} MiB, more than 100 times as much"):
        pv.data.load(tmp_path / name)


@pytest.mark.parametrize("line", [b"7\n", b"7\r", b"7\r\n", b"0,0\n", b"0;0\n", b"0|0\n", b"0\t0\n", b"0 0\n"])
def test_cells_of_packed_text_are_counted(line, tmp_path, monkeypatch):
    cells = len(line.split()) if b" " in line else len(line.strip()) // 2 + 1
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(line * 10**4))
    monkeypatch.setattr(limits, "MOST_CELLS", cells * 10**4)
    assert pv.data.load(tmp_path / "x.csv.gz").x.numel() == cells * 10**4
    monkeypatch.setattr(limits, "MOST_CELLS", cells * 10**4 - 1)
    with pytest.raises(DataError, match=r"x\.csv\.gz: has more than \d+,999 cells in \d+ bytes; if you trust the file"):
        pv.data.load(tmp_path / "x.csv.gz")


def whole(path: Path, kind: str = "u1") -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("X", data=np.arange(2**19).reshape(2**13, 64).astype(kind), chunks=(64, 64), compression=9)


def test_bytes_of_hdf5_count_as_the_numbers_they_become(tmp_path, monkeypatch):
    whole(tmp_path / "x.h5")
    limits.validate_hdf5(tmp_path / "x.h5")
    monkeypatch.setattr(limits, "UNPACKED", 2**20)
    monkeypatch.setattr(limits, "RATIO", 1)
    with pytest.raises(DataError, match=r"unpacks from .* to 4 MiB, more than 1 times as much"):
        limits.validate_hdf5(tmp_path / "x.h5")


def test_all_data_of_an_hdf5_file_are_tried_unless_they_are_too_large(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    whole(path)
    with h5py.File(path) as file:
        chunk = file["X"].id.get_chunk_info(100)
    damaged = bytearray(path.read_bytes())
    damaged[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"x\.h5: not a valid HDF5 file \(.*\); copy or make it again"):
        limits.validate_hdf5(path)
    monkeypatch.setattr(limits, "UNPACKED", 2**20)
    monkeypatch.setattr(limits, "RATIO", 1)
    with pytest.raises(DataError, match="unpacks from"):
        limits.validate_hdf5(path)


def test_text_of_variable_length_is_read(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["names"] = [f"cell{i}" for i in range(1000)]
    assert limits.try_reading("hdf5", tmp_path / "x.h5", "HDF5 file", 10**9) == 150 * 1000


def test_the_process_finds_the_packages_of_its_parent(tmp_path, monkeypatch):
    """Filters of HDF5 are such a package; entries of sys.path that Python ignores are no error."""
    (tmp_path / "hdf5plugin.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nprint('a word')")
    monkeypatch.setattr("sys.path", [*sys.path, tmp_path, str(tmp_path)])
    whole(tmp_path / "x.h5")
    limits.validate_hdf5(tmp_path / "x.h5")
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("executable", ["", None, "/no/python", "/bin/false"])
def test_a_python_that_cannot_be_started_is_not_blamed_on_the_file(executable, tmp_path, monkeypatch):
    whole(tmp_path / "x.h5")
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(DataError, match="Python cannot be started to try the file"):
        limits.validate_hdf5(tmp_path / "x.h5")


ENDS = {
    r"could not be read within 1 s;": "import time; time.sleep(60)",
    r"not a valid HDF5 file \(reading it crashes the process\);": "import os; os.kill(os.getpid(), 11)",
    r"not a valid HDF5 file \(MemoryError\);": "bytearray(2**31)",
    r"not a valid HDF5 file \(one, two\);": "raise OSError('one,\\n two')",
}


@pytest.mark.parametrize("why", ENDS)
def test_a_reader_that_crashes_or_hangs_is_stopped(why, tmp_path, monkeypatch):
    *command, program = limits.trial_command()
    program = program.replace("    with h5py.File(", f"    {ENDS[why]}\n    with h5py.File(")
    monkeypatch.setattr(limits, "trial_command", lambda: [*command, program])
    monkeypatch.setattr(limits, "TRIAL_SECONDS", 1 if "within" in why else 30)
    (tmp_path / "x.h5").write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"x\.h5: {why} copy or make it again"):
        limits.validate_hdf5(tmp_path / "x.h5")


def test_a_trial_ends_by_itself_when_its_time_is_over(tmp_path):
    """Nothing of it is left when its parent was killed."""
    *command, program = limits.trial_command()
    program = program.replace("    with h5py.File(", "    while True: pass\n    with h5py.File(")
    arguments = ["hdf5", str(tmp_path / "x.h5"), "0", "1", json.dumps(sys.path)]
    process = subprocess.run([*command, program, *arguments], capture_output=True, check=False, timeout=60)
    assert process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_sparse_matrix_in_a_matlab_file_is_read(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"x": scipy.sparse.csc_array(np.eye(3))})
    assert pv.data.load(tmp_path / "x.mat").x.tolist() == np.eye(3).tolist()


def test_images_are_measured_before_their_pixels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "UNPACKED", 2**20)
    for i in range(4):
        Image.new("L", (1000, 1000)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match=r"unpacks from .* to 45\.8 MiB, more than 100 times"):
        pv.data.load(tmp_path)


def test_an_array_that_is_shorter_than_its_header_says_is_refused(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 2)))
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (10**9, 10**3)})
        file.write(bytes(64))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    with zipfile.ZipFile(tmp_path / "bare.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "x")
        archive.writestr("notes.txt", "no array")
    for name in ("x.npy", "x.npz", "bare.npz"):
        with pytest.raises(DataError, match=r"the header announces 7\.28 TiB, but the file has"):
            pv.data.load(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [["x.npy", "x.npy"], ["x", "x.npy"], ["y.npy", "x.npy", "y"], [".npy", ".npy"]])
def test_an_array_that_is_in_an_archive_twice_is_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for i, name in enumerate(names):
            np.save(tmp_path / "a.npy", np.full((2, 2), i))
            archive.write(tmp_path / "a.npy", name)
    name = names[0].removesuffix(".npy")
    with pytest.raises(DataError, match=rf"x\.npz: 2 arrays have the name '{name}'; save each with its own name"):
        pv.data.load(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(0, 2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_idx_files_of_impossible_shapes_are_refused(shape, tmp_path):
    (tmp_path / "a-idx3").write_bytes(b"\0\0\x08\x03" + struct.pack(">III", *shape))
    with pytest.raises(DataError, match=r"the shape is \(0, |needs .* TiB of memory|unpacks from 16 bytes to"):
        pv.data.load(tmp_path / "a-idx3")


def stored(folder: Path, shape: tuple[int, int], chunks: tuple[int, int]) -> Path:
    array = zarr.create_array(str(folder), shape=shape, chunks=chunks, dtype="f4")
    if np.prod(shape) < 10**6:
        array[:] = np.random.default_rng(0).normal(size=shape)
    return folder


def test_a_missing_chunk_is_no_data(tmp_path):
    folder = stored(tmp_path / "x.zarr", (100, 4), (10, 4))
    assert len(pv.data.stream(folder)) == 100
    next(path for path in (folder / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(DataError, match="1 of its 10 chunks are missing, so their values are unknown; copy it again"):
        pv.data.stream(folder)


def packed(folder: Path, codec: str) -> zarr.Array:
    """An array of one chunk, of a version of Zarr that has the codec."""
    compressor = {
        "gzip 3": zarr.codecs.GzipCodec(),
        "zstd 3": zarr.codecs.ZstdCodec(),
        "blosc 3": zarr.codecs.BloscCodec(),
    }
    compressor |= {
        f"{name} 2": numcodecs.get_codec({"id": name}) for name in ("gzip", "zlib", "bz2", "zstd", "lz4", "blosc")
    }
    settings = {"shape": (50, 4), "chunks": (50, 4), "dtype": "f4", "zarr_format": int(codec[-1])}
    array = zarr.create_array(str(folder), compressors=compressor[codec], **settings)
    array[:] = np.arange(200).reshape(50, 4)
    return array


@pytest.mark.parametrize(
    "codec", ["gzip 2", "zlib 2", "bz2 2", "zstd 2", "lz4 2", "blosc 2", "gzip 3", "zstd 3", "blosc 3"]
)
def test_a_chunk_that_unpacks_to_more_than_its_numbers_is_refused(codec, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.data.streams.zarr_chunks.UNPACKED", 0)
    packed(tmp_path, codec)
    path = tmp_path / ("c/0/0" if codec[-1] == "3" else "0.0")
    assert pv.data.stream(tmp_path).head(50).x.flatten().tolist() == [*range(200)]
    bomb = bytes(numcodecs.get_codec({"id": codec[:-2]}).encode(np.zeros(2**20, "u1")))
    empty = bytes(numcodecs.get_codec({"id": codec[:-2]}).encode(np.zeros(1, "u1")))
    for data in (bomb, empty + bomb) if codec[:-2] in ("gzip", "bz2", "zstd") else (bomb,):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"/0.0: a chunk of .* unpacks to more than its numbers, .* copy it again"):
            pv.data.stream(tmp_path).head()


def test_a_file_larger_than_its_chunk_is_refused_before_it_is_read(tmp_path):
    folder = stored(tmp_path / "x.zarr", (100, 4), (10, 4))
    os.truncate(folder / "c/3/0", 3 * 2**30)
    with pytest.raises(DataError, match=r"c/3/0: has 3 GiB, but its numbers take 64\.\d KiB at most; copy it again"):
        pv.data.stream(folder)


def test_a_chunk_is_packed_once_and_of_numbers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Zarr's, on codecs that its specification lacks
        for name, filters in {
            "twice": [numcodecs.Zlib()],
            "text": [numcodecs.AsType(encode_dtype="f4", decode_dtype="S100000000")],
        }.items():
            zarr.create_array(str(tmp_path / name), shape=(4, 2), chunks=(4, 2), dtype="f4", zarr_format=2)[:] = 1
            about = json.loads((tmp_path / name / ".zarray").read_text())
            about["filters"] = [one.get_config() for one in filters]
            (tmp_path / name / ".zarray").write_text(json.dumps(about))
            with pytest.raises(DataError, match=r"in an unusual order|converts to \|S100000000; store numbers"):
                pv.data.stream(tmp_path / name)


SHARDS = {"shape": (70, 6), "chunks": (10, 2), "shards": {"shape": (40, 4), "index_location": "end"}, "dtype": "f4"}


@pytest.mark.parametrize("where", ["start", "end"])
def test_shards_are_read_whole_or_refused(where, tmp_path):
    """A chunk that is missing in a shard would be read as zeros."""
    config = {**SHARDS, "shards": {**SHARDS["shards"], "index_location": where}}
    x = np.arange(420).reshape(70, 6)
    zarr.create_array(str(tmp_path / "whole"), **config)[:] = x + 1
    assert pv.data.stream(tmp_path / "whole").head(70).x.flatten().tolist() == [*range(1, 421)]
    array = zarr.create_array(str(tmp_path / "part"), **config)
    array[:] = x + 1
    array[40:50] = 0
    with pytest.raises(DataError, match=r"c/1/0: 2 of its 6 chunks are missing, so their values are unknown; copy it "):
        pv.data.stream(tmp_path / "part")
    zarr.create_array(str(tmp_path / "zeros"), config={"write_empty_chunks": True}, **config)[:] = 0
    assert not pv.data.stream(tmp_path / "zeros").head(70).x.any()


def test_the_index_of_a_shard_is_validated(tmp_path):
    array = zarr.create_array(str(tmp_path), **SHARDS)
    array[:] = np.arange(1, 421).reshape(70, 6)
    path = tmp_path / "c/0/0"
    data = path.read_bytes()
    path.write_bytes(data[:-20] + struct.pack("<QQ", 0, 2**40) + data[-4:])
    with pytest.raises(DataError, match=r"c/0/0: a chunk has 1 TiB, more than its shard or its numbers; copy it again"):
        pv.data.stream(tmp_path)
    path.write_bytes(data[:20])
    with pytest.raises(DataError, match="is shorter than the index of its chunks"):
        pv.data.stream(tmp_path)


ODD = {
    "FIFO": (os.mkfifo, "is a FIFO, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to a folder": (lambda path: path.symlink_to("/etc"), "is a link, not a file"),
}


@pytest.mark.parametrize("name", ["c/0/0", "c/3/0", "c/extra"])
@pytest.mark.parametrize(("make", "told"), ODD.values(), ids=ODD.keys())
def test_files_of_a_zarr_store_are_files(make, told, name, tmp_path):
    folder = stored(tmp_path / "x.zarr", (100, 4), (10, 4))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(DataError, match=told):
        pv.data.stream(folder)


def test_a_link_to_a_chunk_is_that_chunk(tmp_path):
    """As git-annex and others keep large files."""
    folder = stored(tmp_path / "x.zarr", (100, 4), (10, 4))
    (folder / "c/0/0").rename(tmp_path / "elsewhere")
    (folder / "c/0/0").symlink_to(tmp_path / "elsewhere")
    assert len(pv.data.stream(folder)) == 100


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "folder/b.parquet"])
def test_a_fifo_of_data_is_not_waited_for(name, tmp_path):
    (tmp_path / "folder").mkdir()
    parquet.write_table(pa.table({"a": [1.0, 2.0]}), tmp_path / "folder" / "a.parquet")
    os.mkfifo(tmp_path / name)
    source = tmp_path / name.split("/")[0]
    if source.is_dir():  # where pyarrow lists files alone
        assert len(pv.data.stream(source)) == 2
    else:
        for read in (pv.data.load, pv.data.stream):
            with pytest.raises(DataError, match=r"is a FIFO|is empty"):
                read(source)


@pytest.mark.parametrize("shape", [[10**30, 4], [10**15, 4], [10, 10**9], [-1, 4]])
def test_zarr_arrays_of_impossible_shapes_are_refused(shape, tmp_path):
    folder = stored(tmp_path / "x.zarr", (10, 4), (5, 4))
    about = json.loads((folder / "zarr.json").read_text())
    (folder / "zarr.json").write_text(json.dumps({**about, "shape": shape}))
    with pytest.raises(DataError, match=r"x\.zarr: .*; "):
        pv.data.stream(folder)


def test_an_hdf5_file_that_leads_elsewhere_is_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.arange(3.0)
    plants = {
        "link": lambda file: file.__setitem__("x", h5py.ExternalLink(str(tmp_path / "other.h5"), "x")),
        "storage": lambda file: file.create_dataset("x", (3,), "f8", external=[(str(tmp_path / "other.h5"), 0, 24)]),
        "virtual": lambda file: file.create_virtual_dataset("x", virtual(str(tmp_path / "other.h5"))),
    }
    for name, plant in plants.items():
        with h5py.File(tmp_path / name, "w") as file:
            plant(file.create_group("deep"))
        with pytest.raises(DataError, match="give a file that contains all its data"):
            limits.validate_hdf5(tmp_path / name)
    with h5py.File(tmp_path / "circle", "w") as file:
        file["deep"] = file
        file["x"] = np.arange(3.0)
    limits.validate_hdf5(tmp_path / "circle")


def virtual(path: str) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(path, "x", (3,))
    return layout


def test_more_columns_than_can_be_looked_at_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.data.text.MOST_COLUMNS", 100)
    row = ",".join(["1.5"] * 101)
    (tmp_path / "wide.csv").write_text(f"{','.join(f'c{i}' for i in range(101))}\n{row}\n{row}\n")
    with pytest.raises(DataError, match="has 101 columns, above the limit of 100 for text files; save the numbers"):
        pv.data.load(tmp_path / "wide.csv")


def test_text_that_is_none_is_refused(tmp_path):
    """A code point beyond Unicode's last, in a column of a structured array."""
    array = np.array([("a", 1.0), ("b", 2.0)], dtype=[("name", "U1"), ("x", "f8")])
    np.save(tmp_path / "x.npy", array)
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data.replace(b"a\0\0\0", b"a\0\0\xff"))
    with pytest.raises(DataError, match=r"x\.npy: the ndarray is not a table; "):
        pv.data.load(tmp_path / "x.npy")


def test_a_cell_without_an_end_is_refused(tmp_path):
    """A quote that is never closed takes in the rest of the file."""
    rows = "".join(f"{i},{i % 7}\n" for i in range(30_000))
    (tmp_path / "x.csv").write_text(f'a,b\n1,2\n3,"4\n{rows}')
    with pytest.raises(DataError, match=r"x\.csv: not a table "):
        pv.data.load(tmp_path / "x.csv")


def test_the_whole_file_system_is_no_data(capsys):
    assert main(["fit", "--data", "/", "--out", "nowhere"]) == 2
    *_, told = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("pyro-vae: /: ")


def test_a_packed_cell_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "LONGEST_CELL", 2**20)
    for name, cell, says in [("a", "x" * 2**21, "x"), ("b", f'"{"1," * 2**20}"', "x"), ("c", f'"{"x" * 2**19}"', "")]:
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(f"a,b\n1,2\n3,{cell}\n".encode()))
        with pytest.raises(DataError, match="has a cell of more than 1 MiB; correct" if says else "not a number"):
            pv.data.load(tmp_path / f"{name}.csv.gz")


def test_more_columns_of_text_than_can_be_looked_at_are_refused(monkeypatch):
    monkeypatch.setattr("pyro_vae.data.tables.MOST_TEXT_COLUMNS", 3)
    with pytest.raises(DataError, match="4 columns are not numbers, above the limit of 3; encode them first"):
        pv.data.load({f"c{i}": ["a", "b"] * 3 for i in range(4)})


@pytest.mark.parametrize("wrong", [3, -1, 10**8])
@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr"])
def test_a_sparse_matrix_with_entries_outside_is_refused(wrong, kind, tmp_path):
    """SciPy would write them somewhere in memory."""
    good = scipy.sparse.csc_array(np.array([[1.0, 0], [0, 2], [3, 0]]))
    assert pv.data.load(good.asformat(kind)).x.tolist() == [[1, 0], [0, 2], [3, 0]]
    bad = good.asformat(kind)
    (bad.coords[0] if kind == "coo" else bad.indices)[-1] = wrong
    with pytest.raises(DataError, match=r"the sparse matrix is damaged \(.*\); make it again"):
        pv.data.load(bad)
    if kind == "csc":
        scipy.io.savemat(tmp_path / "x.mat", {"x": bad})
        with pytest.raises(DataError, match=r"x\.mat: "):
            pv.data.load(tmp_path / "x.mat")


def test_a_zarr_array_of_a_billion_empty_rows_is_refused(tmp_path):
    zarr.create_array(str(tmp_path / "x"), shape=(10**9, 0), chunks=(4, 3), dtype="f8")
    with pytest.raises(DataError, match=r"has shape \(1000000000, 0\), so its rows are empty; give"):
        pv.data.stream(tmp_path / "x")
