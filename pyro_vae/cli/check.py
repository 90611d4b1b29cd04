"""``pyro-vae check``: a trained VAE looked at from all sides, and a report."""

import hashlib
import shlex
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.checksums import listed
from pyro_vae.cli.commands import check_settings
from pyro_vae.cli.fit import trained_run
from pyro_vae.cli.kept_jobs import ABOUT, KeptJobs, hash_of, is_sweep, stopped_sweep, sweep_folder
from pyro_vae.cli.parsers import parser_of
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
"""The folder of the diagnostics that are done, within that of a check which is not finished."""


def run_check(asked: Namespace) -> int:
    """Check the VAE of a run folder, and write the results and the report."""
    from pyro_vae.plots.html_report import as_html

    goes_on = is_sweep(asked.run)
    settings = _stopped(asked) if goes_on else asked
    whole("rows", settings.rows, 2)
    above_zero("budget", settings.budget)
    _, vae, held_out, trained = trained_run(settings.run, settings.data, settings.missing, settings.trust)
    shown = held_out.rows(torch.arange(min(len(held_out.x), settings.rows)))
    history = _history(Path(settings.run))
    out = settings.out or _free(settings.run)
    with sweep_folder("check", out, goes_on=goes_on) as run, _saying_how_to_go_on(run):
        kept = _Kept(KeptJobs(run, "check", check_settings, settings, _hashes(settings.run, vae, shown, trained)))
        if goes_on:
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
def _saying_how_to_go_on(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if is_sweep(run.path):
            say(f"go on with pyro-vae check {run.path}")
        raise


def _stopped(asked: Namespace) -> Namespace:
    """The settings of a check that was stopped; it brings its own."""
    defaults = parser_of(check_settings).get_defaults()
    changed = [name for name, value in asked.items() if value != defaults.get(name) and name not in ("run", "trust")]
    if changed:
        raise SettingsError(f"{asked.run} is a stopped check with its own {changed[0]}; leave --{changed[0]} out")
    return stopped_sweep("check", check_settings, asked.run, trust=asked.trust)


def _free(run: str) -> str:
    """The next free folder, and a word of one before it that holds a stopped check."""
    free = folder_for("check", None, run)
    for stopped in sorted(path for path in Path(run).glob("check*") if is_sweep(path)):
        say(f"{stopped} holds a check that was stopped; go on with it by pyro-vae check {stopped}")
    return free


def _hashes(run: str, vae: VAE, shown: Data, trained: Data) -> dict[str, str]:
    """What the results depend on besides the settings."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    history = dict(listed(Path(run))).get("history.nc", "")
    return {"data": hash_of([shown, trained]), "weights": weights.hexdigest(), "history": history}


class _Kept(MutableMapping[str, xr.Dataset]):
    """The diagnostics that are done, each in a file."""

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
        """Remove them, and the settings to go on with."""
        for name in (ABOUT, "config.yaml", KEPT):
            self.jobs.run.remove(name)


def _head(settings: Namespace, held_out: Data, rows: int) -> dict[str, object]:
    """Which data and rows were checked, and the commands that trained and checked."""
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
    if not path.is_file() and path.name not in dict(listed(folder)):
        return None
    found = read_dataset(path)
    if not is_history(found):
        raise DataError(f"{path}: not the history of a run, as it holds no ELBO by epoch; copy the run again")
    return found
