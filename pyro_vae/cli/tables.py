"""``pyro-vae encode | reconstruct | impute | sample | score``: what a trained VAE is used for, written to a table."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jsonargparse import Namespace
from torch import Tensor

import pyro_vae
from pyro_vae.cli.fit import load_weights, read_like, report_reading, settings_of, streamed, trained_run
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data, rows_for, stream
from pyro_vae.data.context import one_hot_context, validate_kind
from pyro_vae.data.fingerprint import row_hashes, trained_on
from pyro_vae.data.streams import Streamed
from pyro_vae.errors import DataError, OutputError, SettingsError
from pyro_vae.evidence.psis import BAD
from pyro_vae.train.checkpoint.tensor_file import staged
from pyro_vae.use.labelled import as_table


def _write_csv(dataset: xr.Dataset, path: Path) -> None:
    as_table(dataset).to_csv(path)


def _write_parquet(dataset: xr.Dataset, path: Path) -> None:
    as_table(dataset).to_parquet(path, engine="pyarrow")


def _write_npy(dataset: xr.Dataset, path: Path) -> None:
    own = next((dataset[name].values for name in ("x", "z") if name in dataset), None)
    with open(path, "wb") as file:
        np.save(file, as_table(dataset, decode=False).to_numpy(float) if own is None else own, allow_pickle=False)


WRITERS: dict[str, Callable[[xr.Dataset, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".npy": _write_npy,
}
"""How a table is written, by the ending of its file; .npy holds only numbers, and of each row only x or z."""

UNUSUAL = 0.05
"""Rows with a p-value of at most this are counted."""

SAMPLES = 1000
"""How many rows are drawn where neither a number nor contexts are given."""

NOT_PASSED = ("run", "data", "out", "missing", "n", "config", "trust")
"""Settings of a command that its function has no arguments for, or by position."""


def run_table(command: str, settings: Namespace) -> int:
    """Call the function of a command, and write the table that it gives.

    Args:
        command: the name of the function in :mod:`pyro_vae`.
        settings: the run, the data and the file, and the arguments of the function.
    """
    path = new_file(command, settings.out, settings.run, [*WRITERS])
    function = getattr(pyro_vae, command)
    options = {name: value for name, value in vars(settings).items() if name not in NOT_PASSED and value is not None}
    labels = None
    if "n" in settings:
        vae = _vae(settings.run, settings.trust)
        options["context"], labels = _contexts(settings, vae)
        rows = SAMPLES if settings.data is None else len(options["context"])
        given = rows if settings.n is None else settings.n
    else:
        vae, given = _vae_and_data(settings, command)
        if settings.data is not None and "held_out" in inspect.signature(function).parameters:
            options["held_out"] = _held_out(settings, vae, given)
    found = function(vae, given, progress=True, **options)
    if labels is not None and len(labels) == found.sizes["datum"]:
        found = found.assign_coords(datum=labels)
    with staged(path, lambda _: refuse_existing(path)) as part:
        WRITERS[path.suffix.lower()](found, part)
    _report(found, path)
    return 0


def new_file(command: str, out: str | None, run: str, endings: Sequence[str]) -> Path:
    """Return the file to write: the one that was asked for, or the next free ``RUN/COMMAND`` with the first ending.

    Args:
        command: its name.
        out: the file that the user named, if any.
        run: the folder of the run.
        endings: those that a file may have.

    Raises:
        SettingsError: if the file has another ending.
        OutputError: if it exists already, or its folder does not.

    Example:
        >>> new_file("explore", None, "runs/none", [".html"]).as_posix()
        'runs/none/explore.html'
    """
    if out is None:
        names = (Path(run) / f"{command}{'' if i == 1 else f'-{i}'}{endings[0]}" for i in range(1, 10**6))
        return next(path for path in names if not path.exists())
    path = Path(out)
    if path.suffix.lower() not in endings:
        *others, last = endings
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise SettingsError(f"out is {out}, of which the ending does not say what to write; end it in {allowed}")
    refuse_existing(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it, or choose another")
    return path


def refuse_existing(path: Path) -> None:
    """Raise an OutputError if there is a file already.

    Example:
        >>> refuse_existing(Path("nowhere.csv"))
    """
    if path.exists():
        raise OutputError(f"{path}: is there already, and nothing is overwritten; choose another name")


def _vae(run: str, trust: str | None) -> VAE:
    """The VAE of a run, made from its data only where its weights do not say what it is made of."""
    settings_of(run, trust)
    try:
        return load_weights(run)
    except DataError:  # of classes of the user's own, which the settings name
        return trained_run(run, None, trust=trust)[1]


def _contexts(settings: Namespace, vae: VAE) -> tuple[Tensor | None, np.ndarray | None]:
    """The contexts of the rows of --data, of which no other columns are read, and the row labels."""
    if settings.data is None:
        return None, None
    known, of_run = vae.trained_on, settings_of(settings.run, settings.trust)
    if known is None or not known.context_columns:
        raise SettingsError(f"data is {settings.data}, and the run {settings.run} has no context; leave --data out")
    of_run.context = of_run.drop = of_run.label = of_run.missing = None
    of_run.columns = [*known.context_columns]
    like = Data(torch.empty(0), columns=known.context_columns, categories=known.categories, source=of_run.data)
    data = read_like(settings.data, of_run, like)
    for name in known.context_columns:
        validate_kind(name, data.categories.get(name), known.categories.get(name), data.source, like.source)
    report_reading(data)
    return one_hot_context(data), data.row_labels


def _vae_and_data(settings: Namespace, command: str) -> tuple[VAE, Data | Streamed]:
    """The VAE of a run, and the data to use it on."""
    if settings.data is None:
        if settings.missing is not None:
            raise SettingsError("missing is of --data, which is not given; name the data too, or leave --missing out")
        _, vae, held_out, _ = trained_run(settings.run, None, trust=settings.trust)
        return vae, held_out
    of_run = settings_of(settings.run, settings.trust)
    vae = _vae(settings.run, settings.trust)
    if streamed(Path(settings.data)):
        return vae, _stream(settings, vae, command)
    of_run.missing = settings.missing or of_run.missing or ("nan" if command == "impute" else None)
    known = vae.trained_on
    like = Data(torch.empty(0), source=of_run.data)
    if known is not None:
        like = Data(
            torch.empty(0), columns=known.columns, categories=known.categories, context_columns=known.context_columns,
            source=of_run.data,
        )  # fmt: skip
    data = read_like(settings.data, of_run, like)
    report_reading(data)
    return vae, data


def _held_out(settings: Namespace, vae: VAE, data: Any) -> Data | None:
    """The held-out data of a run, to compare data with; none where some of these were trained on."""
    if told := trained_on(vae, row_hashes(rows_for(vae, data))):
        Console().print(f"No p-values: {told}; give rows that were not", soft_wrap=True)
        return None
    return trained_run(settings.run, None, trust=settings.trust)[2]


def _stream(settings: Namespace, vae: VAE, command: str) -> Streamed:
    """Data that are too large for memory, of Parquet with the columns of the run."""
    if settings.missing is not None:
        raise SettingsError(f"{settings.data}: is streamed, to which --missing does not apply; leave it out")
    columns = None if vae.trained_on is None else vae.trained_on.columns
    by_name = columns is not None and Path(settings.data).suffix.lower() != ".npy"
    return stream(settings.data, columns=columns if by_name else None, nan_is_missing=command == "impute")


def _report(found: xr.Dataset, path: Path) -> None:
    """Say what was written, and of what the answer cannot be relied on."""
    say: Any = Console(soft_wrap=True).print
    if "khat" in found and (bad := int((found.khat > BAD).sum())):
        number = int(found.khat.notnull().sum())
        say(f"Of {number} rows with a khat {bad} cannot be relied on: theirs is above {BAD}")
    if "p_value" in found:
        smallest = 1 / (1 + int(found.held_out_rows.max()))
        say(
            f"p-values by comparison with {found.attrs['held_out']} held-out rows (so none below {smallest:.2g}): "
            f"{int((found.p_value <= UNUSUAL).sum())} of {found.sizes['datum']} rows at {UNUSUAL} or below, "
            f"where chance has {UNUSUAL * found.sizes['datum']:.3g} at most"
        )
    say(f"Written to {path}: {found.sizes['datum']} rows")
