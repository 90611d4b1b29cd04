"""Build a VAE from settings, validate them, and train, for all commands that train."""

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from jsonargparse import Namespace
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.cli.auto_likelihood import settle_likelihood
from pyro_vae.cli.build import build, first_line
from pyro_vae.cli.checksums import validate_unchanged
from pyro_vae.cli.load_data import Loaded, load_data, report_reading
from pyro_vae.cli.load_run import stored_bytes
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import as_yaml, instances
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import whole
from pyro_vae.data import Data
from pyro_vae.data.fingerprint import Trained, mostly_trained_on, overlap, row_hashes
from pyro_vae.data.limits import read_json
from pyro_vae.data.rows import rows_for, rows_of
from pyro_vae.data.sources import hashes_of
from pyro_vae.elbo import Trace_ELBO
from pyro_vae.errors import (
    DataError,
    DivergenceError,
    SettingsError,
    printable,
)
from pyro_vae.train.callbacks import Callback, EarlyStopping
from pyro_vae.train.callbacks.schedules import try_schedule, validate_no_plateau
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.distributed.group import writes
from pyro_vae.train.fit import Fit, fit
from pyro_vae.train.resume import validation_hash
from pyro_vae.train.run_state import try_step

ABOUT = "run.json"
"""The file with the versions, the seed and the hash of the data."""


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
    if not settings.validation_data:
        return
    trained = row_hashes(rows_of(data.train)) if data.stream is None else hashes_of(data.stream)
    sampled = 1.0 if data.stream is None else len(trained) / len(data.stream)
    known, hashes = Trained.on(trained), row_hashes(rows_of(data.held_out))
    shared = overlap(known, hashes, data.held_out.row_labels)
    if shared and mostly_trained_on(known, hashes, sampled):
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
        try_step(optimizer(list(vae.parameters())))
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(f"the optimizer cannot be used ({first_line(error)}); change its settings") from error
    except OSError as error:  # torch's optimizers import its compiler, which makes a folder
        raise SettingsError(
            f"torch cannot create its cache folder ({first_line(error)}); set TMPDIR or TORCHINDUCTOR_CACHE_DIR to a "
            "folder that can be written"
        ) from error


def _validate_scheduler(made: Namespace, vae: VAE) -> None:
    try:
        optimizer = _optimizer(made)(list(vae.parameters()))
        optimizer.state_dict()  # as for a checkpoint
        validate_no_plateau(optimizer)
        if isinstance(optimizer, LRScheduler):
            try_schedule(optimizer, made.epochs)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
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
