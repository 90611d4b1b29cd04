"""Load the data that a command trains or evaluates on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from pyro_vae.core.format import Console
from pyro_vae.data import Data, load, load_held_out, split, stream
from pyro_vae.data.streams import Streamed
from pyro_vae.data.streams.parquet import parquet_fragments
from pyro_vae.data.streams.zarr_store import is_zarr
from pyro_vae.errors import (
    DataError,
    SettingsError,
)


@dataclass(frozen=True)
class Loaded:
    """The data of a command.

    Args:
        train: the training data.
        held_out: the held-out data.
        files: the data in the order of their files, so that messages give the row numbers of the file.
        stream: the training data as a stream, of which ``train`` holds only some rows.
    """

    train: Data
    held_out: Data
    files: tuple[Data, ...]
    stream: Streamed | None = None


STREAMED_BYTES = 2**30
"""Larger files are streamed instead of read into memory."""
SHOWN_ROWS = 2048
"""The number of rows of a stream that are read before training, to initialize the VAE and validate the settings."""


def streamed(path: Path) -> bool:
    """Return whether the data are streamed: a folder of Parquet files, a Zarr store, or a large file.

    Example:
        >>> streamed(Path("nowhere.npy"))
        False
    """
    if os.path.isdir(path):
        return is_zarr(path) or bool(parquet_fragments(path))
    return path.suffix.lower() in (".npy", ".parquet") and os.path.isfile(path) and path.stat().st_size > STREAMED_BYTES


def load_data(settings: Namespace) -> Loaded:
    """Load the data that the settings name, and split off held-out data if the settings name none.

    Raises:
        DataError: if the data cannot be read, or the held-out data have another number of columns.
    """
    if streamed(Path(settings.data)):
        return _streamed(settings)
    data = load(settings.data, **_reading_options(settings))
    new = settings.validation_data
    held_out = read_like(new, settings, data) if new else load_held_out(settings.data)
    if held_out is None:
        seed = settings.seed if settings.split_seed is None else settings.split_seed
        return Loaded(*split(data, settings.held_out, seed=seed), files=(data,))
    return Loaded(data, held_out, files=(data, held_out))


READING = ("index", "label", "drop", "columns", "missing", "context", "sep", "decimal", "header", "key")
"""The settings that say how to read a file."""


def _reading_options(settings: Namespace) -> dict[str, Any]:
    return {name: settings[name] for name in READING if settings.get(name) is not None}


def read_like(path: str, settings: Namespace, like: Data) -> Data:
    """Read new data like those of a run, with the same columns and categories, matched by name.

    Args:
        path: of the new data.
        settings: of the run.
        like: data of the run, or data without rows that have its columns and categories.

    Raises:
        DataError: if the data cannot be read, or have other columns.
    """
    options = _reading_options(settings)
    if Path(path).suffix != Path(settings.data).suffix:  # detect the format of another type of file again
        options = {name: value for name, value in options.items() if name not in ("sep", "decimal", "header", "key")}
    data = load(path, like=like, **options)
    if len(like.x):
        _validate_width(data, like)
    return data


def report_reading(*data: Data) -> None:
    """Print a line for each file: what was read, and which options were detected."""
    for one in data:
        if one.summary:
            Console().print(f"{one.source}: {one.summary}", soft_wrap=True)


def _streamed(settings: Namespace) -> Loaded:
    if options := _reading_options(settings):
        raise SettingsError(f"{settings.data}: --{next(iter(options))} does not apply to streamed data; leave it out")
    if not settings.validation_data:
        raise DataError(f"{settings.data}: streamed data are not split; name held-out data with --validation_data")
    whole_stream = stream(settings.data)
    some = Data(whole_stream.sample(SHOWN_ROWS).x, columns=whole_stream.columns, source=whole_stream.source)
    held_out = read_like(settings.validation_data, settings, some)
    return Loaded(some, held_out, files=(some, held_out), stream=whole_stream)


def _validate_width(data: Data, like: Data) -> None:
    """Raise a DataError if two data sets have different numbers of columns."""
    width, expected = data.x.shape[1], like.x.shape[1]
    if width != expected:
        raise DataError(
            f"{data.source}: a row has {width} numbers, and {expected} in {like.source}; give data of the same columns"
        )
