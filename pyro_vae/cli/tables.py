"""``pyro-vae encode | reconstruct | impute | sample | score``: apply a trained VAE and write the result to a table."""

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
from pyro_vae.cli.load_data import read_like, report_reading, streamed
from pyro_vae.cli.load_run import load_weights, settings_of, trained_run
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
    main = next((dataset[name].values for name in ("x", "z") if name in dataset), None)
    with open(path, "wb") as file:
        np.save(file, as_table(dataset, decode=False).to_numpy(float) if main is None else main, allow_pickle=False)


WRITERS: dict[str, Callable[[xr.Dataset, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".npy": _write_npy,
}
"""The functions that write a table, by the extension of its file; a .npy file holds only x or z."""

UNUSUAL = 0.05
"""The p-value at or below which a row is counted as unusual."""

SAMPLES = 1000
"""The number of rows to draw if neither a number nor contexts are given."""

NOT_PASSED = ("run", "data", "out", "missing", "n", "config", "trust")
"""Settings of a command that are not passed to its function as keyword arguments."""


def run_table(command: str, settings: Namespace) -> int:
    """Call the function of a command, and write the table that it returns.

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
        argument = rows if settings.n is None else settings.n
    else:
        vae, argument = _vae_and_data(settings, command)
        if settings.data is not None and "held_out" in inspect.signature(function).parameters:
            options["held_out"] = _held_out(settings, vae, argument)
    found = function(vae, argument, progress=True, **options)
    if labels is not None and len(labels) == found.sizes["datum"]:
        found = found.assign_coords(datum=labels)
    with staged(path, lambda _: validate_new(path)) as part:
        WRITERS[path.suffix.lower()](found, part)
    _report(found, path)
    return 0


def new_file(command: str, out: str | None, run: str, endings: Sequence[str]) -> Path:
    """Return the file to write: ``out``, or ``RUN/COMMAND`` with the first ending and a number added if it exists.

    Args:
        command: the name of the command.
        out: the file that the user named, if any.
        run: the run folder.
        endings: the allowed extensions.

    Raises:
        SettingsError: if the file has another extension.
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
        raise SettingsError(f"out is {out}, whose file type is unknown; use the extension {allowed}")
    validate_new(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it, or choose another")
    return path


def validate_new(path: Path) -> None:
    """Raise an OutputError if the file exists.

    Example:
        >>> validate_new(Path("nowhere.csv"))
    """
    if path.exists():
        raise OutputError(f"{path}: already exists, and nothing is overwritten; choose another name")


def _vae(run: str, trust: str | None) -> VAE:
    """Load the VAE of a run, from its weights alone unless it has classes that they cannot describe."""
    settings_of(run, trust)
    try:
        return load_weights(run)
    except DataError:  # the user's own classes, which only the settings name
        return trained_run(run, None, trust=trust)[1]


def _contexts(settings: Namespace, vae: VAE) -> tuple[Tensor | None, np.ndarray | None]:
    """Read the contexts and the row labels of --data, whose other columns are ignored."""
    if settings.data is None:
        return None, None
    known, of_run = vae.trained_on, settings_of(settings.run, settings.trust)
    if known is None or not known.context_columns:
        raise SettingsError(f"--data {settings.data}: the run {settings.run} has no context; leave --data out")
    of_run.context = of_run.drop = of_run.label = of_run.missing = None
    of_run.columns = [*known.context_columns]
    like = Data(torch.empty(0), columns=known.context_columns, categories=known.categories, source=of_run.data)
    data = read_like(settings.data, of_run, like)
    for name in known.context_columns:
        validate_kind(name, data.categories.get(name), known.categories.get(name), data.source, like.source)
    report_reading(data)
    return one_hot_context(data), data.row_labels


def _vae_and_data(settings: Namespace, command: str) -> tuple[VAE, Data | Streamed]:
    """Load the VAE of a run, and the data to apply it to."""
    if settings.data is None:
        if settings.missing is not None:
            raise SettingsError("--missing applies to --data, which is not given; give --data, or leave --missing out")
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
    """Return the held-out data of a run, to compare with; None if some of ``data`` are training data."""
    if training_rows := trained_on(vae, row_hashes(rows_for(vae, data))):
        Console().print(f"No p-values: {training_rows}; give rows that were not", soft_wrap=True)
        return None
    return trained_run(settings.run, None, trust=settings.trust)[2]


def _stream(settings: Namespace, vae: VAE, command: str) -> Streamed:
    """Stream data that are too large for memory; Parquet columns are matched by name."""
    if settings.missing is not None:
        raise SettingsError(f"{settings.data}: --missing does not apply to streamed data; leave it out")
    columns = None if vae.trained_on is None else vae.trained_on.columns
    by_name = columns is not None and Path(settings.data).suffix.lower() != ".npy"
    return stream(settings.data, columns=columns if by_name else None, nan_is_missing=command == "impute")


def _report(found: xr.Dataset, path: Path) -> None:
    """Print what was written, and how many rows are unreliable or unusual."""
    print_line: Any = Console(soft_wrap=True).print
    if "khat" in found and (bad := int((found.khat > BAD).sum())):
        number = int(found.khat.notnull().sum())
        print_line(f"{bad} of {number} rows with a khat are unreliable: their khat is above {BAD}")
    if "p_value" in found:
        smallest = 1 / (1 + int(found.held_out_rows.max()))
        print_line(
            f"p-values by comparison with {found.attrs['held_out']} held-out rows (so none below {smallest:.2g}): "
            f"{int((found.p_value <= UNUSUAL).sum())} of {found.sizes['datum']} rows at {UNUSUAL} or below; "
            f"at most {UNUSUAL * found.sizes['datum']:.3g} are expected by chance"
        )
    print_line(f"Written to {path}: {found.sizes['datum']} rows")
