"""Load data, validate settings and train, for all commands that train or read a run."""

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from jsonargparse import Namespace

from pyro_vae.cli.auto_likelihood import settle_likelihood
from pyro_vae.cli.build import build, first_line
from pyro_vae.cli.checksums import validate_unchanged
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.saved_settings import read_settings
from pyro_vae.cli.settings import as_yaml, instances, training
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import whole
from pyro_vae.data import Data, load, load_held_out, split, stream
from pyro_vae.data.fingerprint import Trained, overlap, row_hashes
from pyro_vae.data.limits import read_json, read_text
from pyro_vae.data.rows import rows_for, rows_of
from pyro_vae.data.streams import Streamed
from pyro_vae.data.streams.parquet import parquet_fragments
from pyro_vae.data.streams.zarr_store import is_zarr
from pyro_vae.elbo import Trace_ELBO
from pyro_vae.errors import (
    ConstantColumnsWarning,
    DataError,
    DivergenceError,
    SettingsError,
    UnfinishedRunWarning,
    printable,
)
from pyro_vae.train.callbacks import Callback, EarlyStopping
from pyro_vae.train.callbacks.schedules import validate_no_plateau
from pyro_vae.train.checkpoint import save_load
from pyro_vae.train.checkpoint.rebuild import SPARE_BYTES
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.distributed.group import writes
from pyro_vae.train.fit import Fit, fit
from pyro_vae.train.resume import validation_hash

ABOUT = "run.json"
"""The file with the versions, the seed and the hash of the data."""


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
    if path.is_dir():
        return is_zarr(path) or bool(parquet_fragments(path))
    return path.suffix.lower() in (".npy", ".parquet") and path.is_file() and path.stat().st_size > STREAMED_BYTES


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


def build_untrained(settings: Namespace, folder: str | None = None) -> tuple[VAE, Loaded]:
    """Load the data, build the VAE and validate both; ``likelihood: auto`` is replaced in the settings.

    Args:
        settings: of a training.
        folder: of the run that resumes.
    """
    data = load_data(settings)
    if writes():
        report_reading(*data.files)
    settle_likelihood(settings, data.files[0])
    vae = build(settings, data.train, None if folder is None else stored_bytes(Path(folder)))
    validate_training(settings, vae, data)
    validate_held_out(settings, data)
    return vae, data


def validate_held_out(settings: Namespace, data: Loaded) -> None:
    """Raise if most held-out rows are training data, and print a warning if some are.

    Raises:
        DataError: with the number of such rows.
    """
    if not settings.validation_data or data.stream is not None:
        return
    known, hashes = Trained.on(row_hashes(rows_of(data.train))), row_hashes(rows_of(data.held_out))
    shared = overlap(known, hashes, data.held_out.row_labels)
    if shared and np.isin(hashes, known.rows).mean() > 0.5:
        raise DataError(f"{settings.validation_data}: {shared}, are training data; give rows that --data does not hold")
    if shared and writes():
        print(printable(f"pyro-vae: {settings.validation_data}: {shared}, are training data"), file=sys.stderr)


def validate_training(settings: Namespace, vae: VAE, data: Loaded) -> None:
    """Raise the errors that training would raise, for data by their place in the file.

    Raises:
        DataError: if data are outside the support of the likelihood.
        ModelError: if the components do not fit each other or the data.
        SettingsError: if the optimizer or the scheduler cannot be used.
    """
    for file in data.files:
        rows_for(vae, file)
    made = instances(settings)
    _validate_optimizer(made.optimizer, copy.deepcopy(vae))
    _validate_scheduler(made, copy.deepcopy(vae))


def _validate_optimizer(optimizer: Any, vae: VAE) -> None:
    """Take a step on a copy: torch's optimizers reject settings when created, but parameters only when they step."""
    try:
        for parameter in vae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer(list(vae.parameters())).step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(f"the optimizer cannot be used ({first_line(error)}); change its settings") from error


def _validate_scheduler(made: Namespace, vae: VAE) -> None:
    try:
        optimizer = _optimizer(made)(list(vae.parameters()))
        optimizer.state_dict()  # as for a checkpoint
        validate_no_plateau(optimizer)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"the scheduler cannot be used ({first_line(error)}); change its settings") from error


def _optimizer(made: Namespace) -> Any:
    """Return a function that makes the optimizer, or its scheduler."""
    if made.scheduler is None:
        return made.optimizer
    return lambda parameters: made.scheduler(made.optimizer(parameters))


def validate_estimator(settings: Namespace, vae: VAE, data: Data) -> None:
    """Evaluate the estimator on two rows, to find out whether it is valid for the VAE.

    Raises:
        ModelError: if the estimator is not valid for the VAE.
    """
    elbo = instances(settings).elbo or Trace_ELBO()
    rows = rows_of(data).take(slice(2)).like(vae)
    with seeded(settings.seed, rows.x.device), evaluating(vae), pyro.validation_enabled(False), torch.no_grad():
        elbo.loss(vae.model, vae.guide, *rows.arguments(len(data.x)))


def train(settings: Namespace, vae: VAE, data: Loaded, **more: Any) -> Fit:
    """Train a VAE with the settings of a command.

    Args:
        settings: of ``pyro-vae fit``.
        vae: the VAE, which is trained in place.
        data: the training and validation data.
        more: further arguments of :func:`~pyro_vae.fit`.
    """
    made = instances(settings)
    chosen = list(made.callbacks or ())
    # The callback that writes the first files of the run folder comes last.
    callbacks = [*chosen, *_stopping(settings, chosen), *more.pop("callbacks", ())]
    return fit(
        vae, data.train if data.stream is None else data.stream, validation_data=data.held_out,
        elbo=made.elbo or Trace_ELBO(), optimizer=_optimizer(made), epochs=epochs_of(settings, data),
        batch_size=settings.batch_size, device=settings.device, seed=settings.seed, engine=settings.engine,
        clip_norm=made.clip_norm, precision=made.precision, callbacks=callbacks, **more,
    )  # fmt: skip


def epochs_of(settings: Namespace, data: Loaded) -> int:
    """Return the largest number of epochs: the setting, or as many as are needed for all steps.

    Example:
        >>> rows = Data(torch.zeros(300, 2))
        >>> epochs_of(Namespace(epochs=None, steps=1000, batch_size=None), Loaded(rows, rows, files=()))
        334
    """
    if settings.epochs is not None:
        return int(settings.epochs)
    number = len(data.train.x) if data.stream is None else len(data.stream)
    batch = min(128, number) if settings.batch_size is None else max(1, settings.batch_size)
    return -(-whole("steps", settings.steps, 1) // -(-number // batch))


def _stopping(settings: Namespace, callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the default early stopping, unless the settings have a number of epochs or an EarlyStopping."""
    if settings.epochs is not None or any(isinstance(callback, EarlyStopping) for callback in callbacks):
        return []
    patience = whole("patience", settings.patience, 1)
    return [EarlyStopping(10, steps=patience, restore=not any(callback.final for callback in callbacks))]


def settings_of(folder: str | Path, trust: str | None = None) -> Namespace:
    """Read the settings of a run folder.

    Args:
        folder: of the run.
        trust: the user's own packages and folders that the settings may name, e.g. ``"mypackage,logs"``.

    Raises:
        DataError: if the folder is not a run folder, or its settings are damaged.
        SettingsError: if the settings name code that is not trusted.
    """
    config = Path(folder) / "config.yaml"
    if not os.path.lexists(config):
        raise DataError(f"{folder}: holds no config.yaml; give a run folder that pyro-vae fit wrote")
    settings = read_settings(config, training(), trust)
    if "\nstandardize:" not in read_text(config):  # written by a version that did not standardize
        settings.standardize = False
    return settings


def load_weights(folder: str, into: VAE | None = None) -> VAE:
    """Load the VAE of a run folder, and warn on stderr if the run was resumed since its weights were written.

    Raises:
        DataError: if the weights cannot be read, or only with ``into``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UnfinishedRunWarning)
        warnings.showwarning = lambda message, *_: print(f"pyro-vae: {printable(str(message))}", file=sys.stderr)
        return save_load.load(Path(folder) / "weights.safetensors", into=into)


def stored_bytes(folder: Path) -> int | None:
    """Return the memory limit in bytes for the VAE of a run, from its largest file of weights, or None without one."""
    paths = [*Checkpoints(folder).files().values(), folder / "weights.safetensors"]
    sizes = [path.lstat().st_size for path in paths if os.path.lexists(path)]
    return 2 * max(sizes) + SPARE_BYTES if sizes else None


def trained_run(
    folder: str, data: str | None, missing: str | None = None, trust: str | None = None
) -> tuple[VAE, VAE, Data, Data]:
    """Load the VAE of a run folder and data to evaluate it on.

    Args:
        folder: of the run.
        data: the path of the data; None for the held-out data of the run.
        missing: codes for a missing value in ``data``; by default those of the run.
        trust: the user's own packages and folders that the settings may name.

    Returns:
        The VAE before training, the trained VAE, the data to evaluate it on, and its training data.

    Raises:
        DataError: if the folder is not a run folder, or the data have other columns.
        SettingsError: if ``missing`` is given without ``data``.
    """
    if missing is not None and data is None:
        raise SettingsError("--missing applies to --data, which is not given; give --data, or leave --missing out")
    settings = settings_of(folder, trust)
    of_run = load_data(settings)
    with warnings.catch_warnings(action="ignore", category=ConstantColumnsWarning):  # fit has warned already
        first = build(settings, of_run.train, stored_bytes(Path(folder)))
    vae = load_weights(folder, into=copy.deepcopy(first))
    if data is None:
        return first, vae, of_run.held_out, of_run.train
    settings.missing = settings.missing if missing is None else missing
    held_out = read_like(data, settings, of_run.files[0])
    report_reading(held_out)
    rows_for(vae, held_out)  # validates all rows, of which the caller may use only some
    return first, vae, held_out, of_run.train


def _validate_same_data(run: Any, about: Path) -> None:
    """Raise a SettingsError if a run that was killed before its first checkpoint is resumed with other data."""
    validate_unchanged(about)
    recorded = read_json(about)
    for name, now in {"data_hash": run.attributes["data_hash"], "validation_hash": validation_hash(run)}.items():
        if (then := recorded.get(name, now)) != now:
            raise SettingsError(f"{about.parent} was started with {name} {then}, not {now}; resume it with its data")


class WriteSettings(Callback):
    """Writes the settings, versions and data hashes of a run when training starts, after everything is validated.

    Without a folder, it writes nothing.
    """

    def __init__(self, run: RunFolder | None, settings: Namespace) -> None:
        self.folder, self.settings = run, settings

    def start(self, run: Any) -> None:
        if self.folder is None:
            return
        about = self.folder.path / ABOUT
        if not about.exists():  # a run that resumes has it already
            recorded = {name: value for name, value in run.attributes.items() if name != "device"}
            self.folder.text(ABOUT, json.dumps({**recorded, "validation_hash": validation_hash(run)}, indent=2) + "\n")
        elif not Checkpoints(self.folder.path).files():  # a checkpoint validates the data itself
            _validate_same_data(run, about)
        self.folder.text("config.yaml", as_yaml(self.settings))


@contextmanager
def saving_after_divergence(settings: Namespace, vae: VAE, run: RunFolder) -> Iterator[None]:
    """Write the settings, the last good weights and the history if training diverges inside the block."""
    try:
        yield
    except DivergenceError as error:
        run.text("config.yaml", as_yaml(settings))
        run.weights("weights.safetensors", vae)
        if error.history is not None:
            run.dataset("history.nc", error.history)
        raise
