"""``pyro-vae check``: run the diagnostics of a trained VAE and write a report."""

import hashlib
import os
import shlex
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.checksums import read_checksums
from pyro_vae.cli.commands import parser_for
from pyro_vae.cli.kept_jobs import ABOUT, KeptJobs, hash_of, is_sweep, stopped_sweep, sweep_folder
from pyro_vae.cli.load_run import trained_run
from pyro_vae.cli.run_folder import RunFolder, folder_for, read_dataset
from pyro_vae.cli.sweep import say, tell
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.data import Data
from pyro_vae.diagnose import DIAGNOSTICS
from pyro_vae.diagnose.check import check, is_history
from pyro_vae.errors import DataError, SettingsError

KEPT = "diagnostics"
"""The folder of the finished diagnostics, inside the folder of an unfinished check."""


def run_check(arguments: Namespace) -> int:
    """Check the VAE of a run folder, and write the results and the report."""
    from pyro_vae.plots.html_report import as_html

    resumes = is_sweep(arguments.run)
    settings = _interrupted_settings(arguments) if resumes else arguments
    whole("rows", settings.rows, 2)
    above_zero("budget", settings.budget)
    _, vae, held_out, trained = trained_run(settings.run, settings.data, settings.missing, settings.trust)
    shown = held_out.rows(torch.arange(min(len(held_out.x), settings.rows)))
    history = _history(Path(settings.run))
    out = settings.out or _free_folder(settings.run)
    with sweep_folder("check", out, resumes=resumes) as run, _say_how_to_resume(run):
        kept = _KeptDiagnostics(KeptJobs(run, "check", settings, _hashes(settings.run, vae, shown, trained)))
        if resumes:
            tell(f"done already: {', '.join(one.about for one in DIAGNOSTICS if one.name in kept) or 'nothing'}")
        tree = check(
            vae, shown, history=history, train=trained, budget=settings.budget, seed=settings.seed, progress=True,
            keep=kept,
        )  # fmt: skip
        with run.file("check.nc") as path:
            tree.to_netcdf(path, engine="h5netcdf")
        head = _head(settings, held_out, len(shown.x))
        title = f"Check of {settings.run}"
        run.text("report.html", as_html(tree, title, image_shape=held_out.image_shape, head=head))
        kept.clear()
        run.show(Console())
    return 0


@contextmanager
def _say_how_to_resume(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if is_sweep(run.path):
            say(f"resume with pyro-vae check {run.path}")
        raise


def _interrupted_settings(arguments: Namespace) -> Namespace:
    """Return the settings of an interrupted check; others are refused."""
    defaults = parser_for("check").get_defaults()
    changed = [
        name for name, value in arguments.items() if value != defaults.get(name) and name not in ("run", "trust")
    ]
    if changed:
        raise SettingsError(
            f"{arguments.run} is an interrupted check with its own {changed[0]}; leave --{changed[0]} out"
        )
    return stopped_sweep("check", arguments.run, arguments)


def _free_folder(run: str) -> str:
    """Return the next free folder; name the folders of interrupted checks."""
    free = folder_for("check", None, run)
    for stopped in sorted(path for path in Path(run).glob("check*") if is_sweep(path)):
        say(f"{stopped} holds an interrupted check; resume it with pyro-vae check {stopped}")
    return free


def _hashes(run: str, vae: VAE, shown: Data, trained: Data) -> dict[str, str]:
    """Return hashes of what the results depend on besides the settings."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    history = dict(read_checksums(Path(run))).get("history.nc", "")
    return {"data": hash_of([shown, trained]), "weights": weights.hexdigest(), "history": history}


class _KeptDiagnostics(MutableMapping[str, xr.Dataset]):
    """The finished diagnostics of a check, each in a file."""

    def __init__(self, jobs: KeptJobs) -> None:
        self.jobs = jobs

    def __getitem__(self, name: str) -> xr.Dataset:
        path = self.jobs.path(KEPT, f"{name}.nc")
        if path is None:
            raise KeyError(name)
        return read_dataset(path)

    def __setitem__(self, name: str, result: xr.Dataset) -> None:
        self.jobs.folder(KEPT).dataset(f"{name}.nc", result)

    def __delitem__(self, name: str) -> None:
        self.jobs.run.within(KEPT).remove(f"{name}.nc")

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted((self.jobs.run.path / KEPT).glob("[!.]*.nc")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Delete them, and the settings for resuming."""
        for name in (ABOUT, "config.yaml", KEPT):
            self.jobs.run.remove(name)


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
    if not os.path.isfile(path) and path.name not in dict(read_checksums(folder)):
        return None
    found = read_dataset(path)
    if "train_elbo" not in found or not is_history(found):
        raise DataError(f"{path}: not the history of a run (it has no ELBO by epoch); copy the run again")
    return found
