"""``pyro-vae check``: run the diagnostics of a trained VAE and write a report."""

import shlex
from pathlib import Path

import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.checksums import read_checksums, validate_unchanged
from pyro_vae.cli.fit import trained_run
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.core.format import Console
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.data import Data
from pyro_vae.data.limits import validate_hdf5
from pyro_vae.diagnose.check import check, is_history
from pyro_vae.errors import DataError


def run_check(settings: Namespace) -> int:
    """Check the VAE of a run folder, and write the results and the report."""
    from pyro_vae.plots.html_report import as_html

    whole("rows", settings.rows, 2)
    above_zero("budget", settings.budget)
    _, vae, held_out, trained = trained_run(settings.run, settings.data, settings.missing, settings.trust)
    shown = held_out.rows(torch.arange(min(len(held_out.x), settings.rows)))
    with RunFolder(folder_for("check", settings.out, settings.run)) as run:
        tree = check(
            vae, shown, history=_history(Path(settings.run)), train=trained, budget=settings.budget,
            seed=settings.seed, progress=True,
        )  # fmt: skip
        with run.file("check.nc") as path:
            tree.to_netcdf(path, engine="h5netcdf")
        head = _head(settings, held_out, len(shown.x))
        title = f"Check of {settings.run}"
        run.text("report.html", as_html(tree, title, image_shape=held_out.image_shape, head=head))
        run.show(Console())
    return 0


def _head(settings: Namespace, held_out: Data, rows: int) -> dict[str, object]:
    """Describe the data, the rows and the commands that trained and checked the VAE."""
    own = {name: settings.get(name) for name in ("rows", "budget", "seed", "data", "missing", "trust")}
    flags = [text for name, value in own.items() if value is not None for text in (f"--{name}", str(value))]
    check_again = shlex.join(["pyro-vae", "check", str(settings.run), *flags])
    return {
        "data": settings.data or held_out.source,
        "rows": f"the first {rows} of {len(held_out.x)} held-out rows",
        "trained by": shlex.join(["pyro-vae", "fit", "--config", str(Path(settings.run) / "config.yaml")]),
        "checked by": check_again,
    }


def _history(folder: Path) -> xr.Dataset | None:
    path = folder / "history.nc"
    if not path.is_file() and path.name not in dict(read_checksums(folder)):
        return None
    validate_unchanged(path)
    validate_hdf5(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf") as history:
            found = history.load()
    except Exception as error:  # what xarray and h5netcdf raise has no common base
        raise DataError(f"{path}: the history cannot be read ({error}); copy the run again") from error
    if not is_history(found):
        raise DataError(f"{path}: not the history of a run (it has no ELBO by epoch); copy the run again")
    return found
