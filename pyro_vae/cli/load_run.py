"""Load the settings, the VAE and the data of a run folder."""

import copy
import os
import sys
import warnings
from pathlib import Path

from jsonargparse import Namespace

from pyro_vae.cli.build import build
from pyro_vae.cli.load_data import load_data, read_like, report_reading
from pyro_vae.cli.saved_settings import read_settings
from pyro_vae.cli.settings import training
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.data.limits import read_text
from pyro_vae.data.rows import rows_for
from pyro_vae.errors import (
    ConstantColumnsWarning,
    DataError,
    SettingsError,
    UnfinishedRunWarning,
    printable,
)
from pyro_vae.train.checkpoint import save_load
from pyro_vae.train.checkpoint.rebuild import SPARE_BYTES
from pyro_vae.train.checkpoint.rotation import Checkpoints


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
