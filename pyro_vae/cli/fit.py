"""What the commands that train have in common: data, what is refused of them, and the training."""

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
from pyro_vae.train.callbacks.schedules import refuse_plateau
from pyro_vae.train.checkpoint import save_load
from pyro_vae.train.checkpoint.rebuild import SPARE_BYTES
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.distributed.group import writes
from pyro_vae.train.fit import Fit, fit
from pyro_vae.train.resume import validation_hash

ABOUT = "run.json"
"""Where versions, seed and the hash of the data stand."""


@dataclass(frozen=True)
class Loaded:
    """The data of a command.

    Args:
        train: to train on.
        held_out: to judge by.
        files: the same as they lie in their files, so that a row is told by its number there.
        stream: what to train on, where ``train`` are only some rows of it.
    """

    train: Data
    held_out: Data
    files: tuple[Data, ...]
    stream: Streamed | None = None


STREAMED_BYTES = 2**30
"""Files of more are not read into memory."""
SHOWN_ROWS = 2048
"""Of what is streamed, so many are looked at before."""


def streamed(path: Path) -> bool:
    """Whether data are streamed: those of a folder of Parquet files, of Zarr, and of large files.

    Example:
        >>> streamed(Path("nowhere.npy"))
        False
    """
    if path.is_dir():
        return is_zarr(path) or bool(parquet_fragments(path))
    return path.suffix.lower() in (".npy", ".parquet") and path.is_file() and path.stat().st_size > STREAMED_BYTES


def loaded(settings: Namespace) -> Loaded:
    """The data that settings name, split where no held-out ones are named.

    Raises:
        DataError: if they cannot be read, or are not of as many columns.
    """
    if streamed(Path(settings.data)):
        return _streamed(settings)
    data = load(settings.data, **_reading(settings))
    new = settings.validation_data
    held_out = read_like(new, settings, data) if new else load_held_out(settings.data)
    if held_out is None:
        seed = settings.seed if settings.split_seed is None else settings.split_seed
        return Loaded(*split(data, settings.held_out, seed=seed), files=(data,))
    return Loaded(data, held_out, files=(data, held_out))


READING = ("index", "label", "drop", "columns", "missing", "context", "sep", "decimal", "header", "key")
"""The settings of how a file is read."""


def _reading(settings: Namespace) -> dict[str, Any]:
    return {name: settings[name] for name in READING if settings.get(name) is not None}


def read_like(path: str, settings: Namespace, like: Data) -> Data:
    """Read new data as those of a run, with its columns and categories by their names.

    Args:
        path: of the data.
        settings: of the run.
        like: data of the run, or data without rows that have its columns and categories.

    Raises:
        DataError: if they cannot be read, or are of other columns.
    """
    asked = _reading(settings)
    if Path(path).suffix != Path(settings.data).suffix:  # what only that kind of file has is found anew
        asked = {name: value for name, value in asked.items() if name not in ("sep", "decimal", "header", "key")}
    data = load(path, like=like, **asked)
    if len(like.x):
        refuse_other_width(data, like)
    return data


def report_reading(*data: Data) -> None:
    """Print one line for each file: what was read and what was inferred."""
    for one in data:
        if one.said:
            Console().print(f"{one.source}: {one.said}", soft_wrap=True)


def _streamed(settings: Namespace) -> Loaded:
    if asked := _reading(settings):
        raise SettingsError(
            f"{settings.data}: is streamed, to which --{next(iter(asked))} does not apply; leave it out"
        )
    if not settings.validation_data:
        raise DataError(
            f"{settings.data}: is streamed, and no share of it is held out; name held-out data with --validation_data"
        )
    every = stream(settings.data)
    some = Data(every.sample(SHOWN_ROWS).x, columns=every.columns, source=every.source)
    held_out = read_like(settings.validation_data, settings, some)
    return Loaded(some, held_out, files=(some, held_out), stream=every)


def refuse_other_width(data: Data, of: Data) -> None:
    """Refuse data of other columns than others have.

    Raises:
        DataError: naming both.
    """
    mine, theirs = data.x.shape[1], of.x.shape[1]
    if mine != theirs:
        raise DataError(
            f"{data.source}: a row has {mine} numbers, and {theirs} in {of.source}; give data of the same columns"
        )


def untrained(settings: Namespace, folder: str | None = None) -> tuple[VAE, Loaded]:
    """The VAE and the data, seen to fit each other and the optimizer; the settings then name the likelihood.

    Args:
        settings: of a training.
        folder: of the run that goes on.
    """
    data = loaded(settings)
    if writes():
        report_reading(*data.files)
    settle_likelihood(settings, data.files[0])
    vae = build(settings, data.train, None if folder is None else stored_bytes(Path(folder)))
    refuse(settings, vae, data)
    refuse_overlap(settings, data)
    return vae, data


def refuse_overlap(settings: Namespace, data: Loaded) -> None:
    """Refuse held-out data of which most rows are training data, and print if some are.

    Raises:
        DataError: with the number of such rows.
    """
    if not settings.validation_data or data.stream is not None:
        return
    known, hashes = Trained.on(row_hashes(rows_of(data.train))), row_hashes(rows_of(data.held_out))
    told = overlap(known, hashes, data.held_out.row_labels)
    if told and np.isin(hashes, known.rows).mean() > 0.5:
        raise DataError(f"{settings.validation_data}: {told}, are training data; give rows that --data does not hold")
    if told and writes():
        print(printable(f"pyro-vae: {settings.validation_data}: {told}, are training data"), file=sys.stderr)


def refuse(settings: Namespace, vae: VAE, data: Loaded) -> None:
    """Refuse what training would refuse: data by their place in the file, and an optimizer's settings.

    Raises:
        DataError: if data are outside the support of the likelihood.
        ModelError: if the parts do not fit each other or the data.
        SettingsError: if the optimizer cannot be used.
    """
    for file in data.files:
        rows_for(vae, file)
    made = instances(settings)
    _refuse_optimizer(made.optimizer, copy.deepcopy(vae))
    _refuse_scheduler(made, copy.deepcopy(vae))


def _refuse_optimizer(optimizer: Any, vae: VAE) -> None:
    """Try a step on a copy: torch's optimizers refuse settings when made, and networks when they step."""
    try:
        for parameter in vae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer(list(vae.parameters())).step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(f"optimizer: it cannot be used ({first_line(error)}); change its settings") from error


def _refuse_scheduler(made: Namespace, vae: VAE) -> None:
    try:
        optimizer = _optimizer(made)(list(vae.parameters()))
        optimizer.state_dict()  # which checkpoints hold
        refuse_plateau(optimizer)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"scheduler: it cannot be used ({first_line(error)}); change its settings") from error


def _optimizer(made: Namespace) -> Any:
    """What makes the optimizer, or a schedule of it."""
    if made.scheduler is None:
        return made.optimizer
    return lambda parameters: made.scheduler(made.optimizer(parameters))


def refuse_estimator(settings: Namespace, vae: VAE, data: Data) -> None:
    """Evaluate the estimator on two rows, as it refuses a pair that it does not hold for when it meets it.

    Raises:
        ModelError: if it does.
    """
    elbo = instances(settings).elbo or Trace_ELBO()
    rows = rows_of(data).take(slice(2)).like(vae)
    with seeded(settings.seed, rows.x.device), evaluating(vae), pyro.validation_enabled(False), torch.no_grad():
        elbo.loss(vae.model, vae.guide, *rows.arguments(len(data.x)))


def train(settings: Namespace, vae: VAE, data: Loaded, **more: Any) -> Fit:
    """Train as settings say.

    Args:
        settings: of ``pyro-vae fit``.
        vae: what is trained.
        data: to train on, and to watch.
        more: of :func:`~pyro_vae.fit`, besides what the settings say.
    """
    made = instances(settings)
    own = list(made.callbacks or ())
    # What begins the folder is to come last.
    callbacks = [*own, *_stopping(settings, own), *more.pop("callbacks", ())]
    return fit(
        vae, data.train if data.stream is None else data.stream, validation_data=data.held_out,
        elbo=made.elbo or Trace_ELBO(), optimizer=_optimizer(made), epochs=epochs_of(settings, data),
        batch_size=settings.batch_size, device=settings.device, seed=settings.seed, engine=settings.engine,
        clip_norm=made.clip_norm, precision=made.precision, callbacks=callbacks, **more,
    )  # fmt: skip


def epochs_of(settings: Namespace, data: Loaded) -> int:
    """How many epochs training has at most: those asked for, or as many as hold the steps.

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
    """What ends training where no number of epochs is asked for, unless the user chose how."""
    if settings.epochs is not None or any(isinstance(callback, EarlyStopping) for callback in callbacks):
        return []
    patience = whole("patience", settings.patience, 1)
    return [EarlyStopping(10, steps=patience, restore=not any(callback.final for callback in callbacks))]


def settings_of(folder: str | Path, trust: str | None = None) -> Namespace:
    """The settings of the run in a folder.

    Args:
        folder: of the run.
        trust: packages and folders of the user's own that they may name, as ``"mypackage,logs"``.

    Raises:
        DataError: if the folder is not of a run, or its settings are not whole.
        SettingsError: if they name code that may not be run.
    """
    config = Path(folder) / "config.yaml"
    if not os.path.lexists(config):
        raise DataError(f"{folder}: holds no config.yaml; give the folder of a run that pyro-vae fit wrote")
    settings = read_settings(config, training(), trust)
    if "\nstandardize:" not in read_text(config):  # of a version that could not
        settings.standardize = False
    return settings


def load_weights(folder: str, into: VAE | None = None) -> VAE:
    """Load the VAE of a run folder, and say on stderr if the run has gone on since.

    Raises:
        DataError: if it cannot be read, or not without ``into``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UnfinishedRunWarning)
        warnings.showwarning = lambda message, *_: print(f"pyro-vae: {printable(str(message))}", file=sys.stderr)
        return save_load.load(Path(folder) / "weights.safetensors", into=into)


def stored_bytes(folder: Path) -> int | None:
    """How many bytes the VAE of a run may take, as its largest file of weights shows; None where it has none."""
    paths = [*Checkpoints(folder).files().values(), folder / "weights.safetensors"]
    sizes = [path.lstat().st_size for path in paths if os.path.lexists(path)]
    return 2 * max(sizes) + SPARE_BYTES if sizes else None


def trained_run(
    folder: str, data: str | None, missing: str | None = None, trust: str | None = None
) -> tuple[VAE, VAE, Data, Data]:
    """The VAE of a run folder, before and after, data to judge it by (its held-out ones, or those given), and its own.

    Args:
        folder: of the run.
        data: the path of data; None for those of the run.
        missing: values of ``data`` that say that a value is missing; those of the run if not given.
        trust: packages and folders of the user's own that the settings may name.

    Raises:
        DataError: if the folder is not of a run, or the data are of other columns.
        SettingsError: if ``missing`` is given without ``data``.
    """
    if missing is not None and data is None:
        raise SettingsError("missing says how --data is read; give --data, or leave --missing out")
    settings = settings_of(folder, trust)
    of_run = loaded(settings)
    with warnings.catch_warnings(action="ignore", category=ConstantColumnsWarning):  # fit has named them
        first = build(settings, of_run.train, stored_bytes(Path(folder)))
    vae = load_weights(folder, into=copy.deepcopy(first))
    if data is None:
        return first, vae, of_run.held_out, of_run.train
    settings.missing = settings.missing if missing is None else missing
    held_out = read_like(data, settings, of_run.files[0])
    report_reading(held_out)
    rows_for(vae, held_out)  # all of them, though only some are looked at
    return first, vae, held_out, of_run.train


def _refuse_other_data(run: Any, about: Path) -> None:
    """Refuse other data than a run was begun with, which was killed before its first checkpoint."""
    validate_unchanged(about)
    begun = read_json(about)
    for name, now in {"data_hash": run.attributes["data_hash"], "validation_hash": validation_hash(run)}.items():
        if (then := begun.get(name, now)) != now:
            raise SettingsError(f"{about.parent} was begun with {name} {then}, not {now}; resume it with its data")


class Begin(Callback):
    """Writes the settings of a run, and what else it depends on, when nothing is left that could refuse it.

    Where there is no folder, it writes nothing.
    """

    def __init__(self, run: RunFolder | None, settings: Namespace) -> None:
        self.folder, self.settings = run, settings

    def start(self, run: Any) -> None:
        if self.folder is None:
            return
        about = self.folder.path / ABOUT
        if not about.exists():  # of one that goes on, how it was begun
            kept = {name: value for name, value in run.attributes.items() if name != "device"}
            self.folder.text(ABOUT, json.dumps({**kept, "validation_hash": validation_hash(run)}, indent=2) + "\n")
        elif not Checkpoints(self.folder.path).files():  # which would tell too
            _refuse_other_data(run, about)
        self.folder.text("config.yaml", as_yaml(self.settings))


@contextmanager
def keeping(settings: Namespace, vae: VAE, run: RunFolder) -> Iterator[None]:
    """After a divergence inside, the run folder still gets the settings, the last good weights and the history."""
    try:
        yield
    except DivergenceError as error:
        run.text("config.yaml", as_yaml(settings))
        run.weights("weights.safetensors", vae)
        if error.history is not None:
            run.dataset("history.nc", error.history)
        raise
