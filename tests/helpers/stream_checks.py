"""The same rows as every kind of stream, for tests of data and of training."""

import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv


class Counting(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


class Mappings(Dataset):
    """Items with a context and a mask."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "context": self.x[i, :1] * 10, "mask": self.x[i] >= 0}


def npy(x, folder):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def files(x, folder):
    """Three Parquet files of small row groups, in a folder and one below it."""
    (folder / "more").mkdir()
    names = ["a.parquet", "b.parquet", "more/c.parquet"]
    for name, part in zip(names, np.array_split(x, 3), strict=True):
        parquet.write_table(table_of(part), folder / name, row_group_size=4)
    return folder


def table_of(x, names="abcdefgh"):
    return pa.table({names[j]: x[:, j] for j in range(x.shape[1])})


def zarr_array(x, folder, version=3):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(str(folder / "x"), shape=x.shape, chunks=(5, 1), dtype=x.dtype, zarr_format=version)
    array[:] = x
    return folder / "x"


def cut(x, rows=4):
    return [torch.from_numpy(part) for part in np.array_split(x, max(len(x) // rows, 1))]


KINDS = {
    "npy": lambda x, f: pv.data.stream(npy(x, f), block_rows=3),
    "npy of doubles": lambda x, f: pv.data.stream(npy(x.astype(np.float64), f)),
    "npy, high byte first": lambda x, f: pv.data.stream(npy(x.astype(">f4"), f), block_rows=3),
    "npy of integers": lambda x, f: pv.data.stream(npy(x.astype(np.int32), f), block_rows=2),
    "memory-mapped": lambda x, f: pv.data.stream(np.load(npy(x, f), mmap_mode="r"), block_rows=3),
    "array": lambda x, f: pv.data.stream(x, block_rows=3),
    "parquet": lambda x, f: pv.data.stream(files(x, f)),
    "zarr": lambda x, f: pv.data.stream(zarr_array(x, f), block_rows=3),
    "zarr 2": lambda x, f: pv.data.stream(zarr_array(x, f, 2), block_rows=3),
    "data set": lambda x, f: pv.data.stream(TensorDataset(torch.from_numpy(x), torch.zeros(len(x))), block_rows=3),
    "mappings": lambda x, f: pv.data.stream(Mappings(torch.from_numpy(x)), block_rows=3),
    "batches": lambda x, f: pv.data.stream(cut(x), size=len(x)),
    "generator function": lambda x, f: pv.data.stream(lambda: (b for b in cut(x)), size=len(x)),
    "loader": lambda x, f: pv.data.stream(DataLoader(TensorDataset(torch.from_numpy(x)), batch_size=4, shuffle=True)),
    "iterable data set": lambda x, f: pv.data.stream(Counting(torch.from_numpy(x)), size=len(x)),
}


def narrow(source, window):
    """The same stream with windows of so many rows at most."""
    object.__setattr__(source, "window_bytes", window * source._row_bytes)
    return source


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("pyro-vae")]
