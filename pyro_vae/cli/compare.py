"""``pyro-vae compare``: estimators along a training, or along several that differ in their seed."""

import copy
from pathlib import Path

import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.auto_likelihood import settle_likelihood
from pyro_vae.cli.build import build
from pyro_vae.cli.fit import Loaded, keeping, loaded, refuse, refuse_overlap, report_reading, train, trained_run
from pyro_vae.cli.kept_jobs import KeptJobs, is_sweep, places_of, stopped_sweep, sweep_folder, tell_done
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.report import in_double, save_comparison, show_comparison, show_fit
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.cli.settings import OF_COMPARE, command, compare_settings, with_absolute_paths
from pyro_vae.cli.sweep import Outcome, Sweep, is_side_by_side, run_jobs, say, seeds_of, with_seed
from pyro_vae.compare.cells import cells, step_of
from pyro_vae.compare.elbos import compare_elbos, default_elbos, refuse_choices
from pyro_vae.compare.pair import subject_of
from pyro_vae.compare.seeds import over_seeds, stacked
from pyro_vae.compare.table import as_comparison
from pyro_vae.core.device import seeded
from pyro_vae.core.format import Console
from pyro_vae.core.traces import Loss, called
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.data.limits import validate_hdf5
from pyro_vae.errors import DataError, DivergenceError, ModelError, SettingsError
from pyro_vae.train.callbacks import Callback
from pyro_vae.train.callbacks.base import Run
from pyro_vae.train.fit import Fit
from pyro_vae.train.summary import in_one_line

QUIET = Console(quiet=True)
"""Where tables of one seed of several go."""


def run_compare(asked: Namespace) -> int:
    """Estimators at the start, the middle and the end of training."""
    settings = _settled(asked)
    _refuse(settings)
    if settings.run is not None:
        return _of_run(settings)
    if settings.data is None:
        raise SettingsError("compare needs RUN, a folder that pyro-vae fit wrote, or --data to train on first")
    seeds = seeds_of(settings)
    if len(seeds) == 1 and is_side_by_side(settings):
        raise SettingsError("there is one training and nothing beside it; give --seeds, or no --workers and --cluster")
    data = loaded(settings)
    report_reading(*data.files)
    settle_likelihood(settings, data.files[0])
    vaes = {seed: _untrained(with_seed(settings, seed), data) for seed in seeds}
    refuse_overlap(settings, data)
    _refuse_estimators(settings, vaes[seeds[0]], data.held_out)
    if len(seeds) > 1:
        return _of_seeds(settings, seeds, data, goes_on=settings is not asked)
    own, vae = with_seed(settings, seeds[0]), vaes[seeds[0]]
    with RunFolder(folder_for("compare", settings.out)) as run, keeping(own, vae, run):
        moments, fitted = _trained(own, vae, data)
        show_fit(fitted, Console())
        _write(settings, _compared(own, moments, data.held_out, Console()), run)
        run.show(Console())
    return 0


def _settled(asked: Namespace) -> Namespace:
    """Return the settings, or those of RUN if RUN is a comparison over seeds that was stopped."""
    if "resume" in asked:
        return stopped_sweep("compare", compare_settings, asked.resume, asked.workers, asked.trust)
    if asked.run is not None and is_sweep(asked.run):
        _refuse_training_settings(asked)
        return stopped_sweep("compare", compare_settings, asked.run, trust=asked.trust)
    return asked


def _refuse(settings: Namespace) -> None:
    """Refuse, before anything is read, what nothing can be made of."""
    if settings.precision not in ("float32", "float64"):
        raise SettingsError(f"precision is {settings.precision}; it must be float32 or float64")
    if settings.draws < 2 or settings.rows < 2:
        raise SettingsError(f"draws is {settings.draws} and rows {settings.rows}; each must be at least 2")
    elbos = _elbos(settings)
    refuse_choices(default_elbos() if elbos is None else elbos, settings.particles)


def _elbos(settings: Namespace) -> dict[str, Loss] | None:
    made = instantiated(command("compare", compare_settings), settings).elbos
    return None if made is None else {called(loss): loss for loss in made}


def _of_run(settings: Namespace) -> int:
    _refuse_training_settings(settings)
    first, vae, held_out, _ = trained_run(settings.run, settings.data, settings.missing, settings.trust)
    with RunFolder(folder_for("compare", settings.out, settings.run)) as run:
        _write(settings, _compared(settings, {"start": first, "end": vae}, held_out, Console()), run)
        run.show(Console())
    return 0


def _refuse_training_settings(settings: Namespace) -> None:
    """A trained run is as it is: a setting that would be ignored is refused."""
    defaults, used = command("compare", compare_settings).get_defaults(), {"run", "data", "missing", "out", *OF_COMPARE}
    changed = [name for name, value in settings.items(branches=False) if value != defaults.get(name)]
    ignored = sorted({name.split(".")[0] for name in changed} - used - {"config", "seed"})
    if ignored:
        raise SettingsError(f"RUN brings its own {', '.join(ignored)}; leave --{ignored[0]} out, or leave RUN out")


def _untrained(settings: Namespace, data: Loaded) -> VAE:
    vae = build(settings, data.train)
    refuse(settings, vae, data)
    return vae


def _refuse_estimators(settings: Namespace, vae: VAE, held_out: Data) -> None:
    """Refuse an estimator that does not hold for the VAE before it is trained, and not after."""
    if (elbos := _elbos(settings)) is None:
        return
    subject = subject_of(vae, held_out.rows(torch.arange(min(len(held_out.x), 2))), None)
    with subject.evaluating(), seeded(settings.seed, subject.device):
        for cell in cells(elbos, settings.particles)[0]:
            step_of(subject, cell.loss)


def _trained(settings: Namespace, vae: VAE, data: Loaded, *, progress: bool = True) -> tuple[dict[str, VAE], Fit]:
    """Train, and what was kept on the way, by its moment."""
    moments = {"start": copy.deepcopy(vae)}
    copies: dict[int, VAE] = {}
    fitted = train(settings, vae, data, callbacks=[_Halfway(copies, settings.epochs)], progress=progress)
    end = fitted.history.attrs["weights_epoch"] or fitted.history.sizes["epoch"]
    before = [epoch for epoch in copies if epoch < end]
    if before:
        moments["middle"] = copies[min(before, key=lambda epoch: abs(epoch - end / 2))]
    return {**moments, "end": vae}, fitted


class _Halfway(Callback):
    """Keeps a copy of the VAE in the middle of training, or after epochs 1, 2, 4, … where its end is not known."""

    def __init__(self, copies: dict[int, VAE], epochs: int | None) -> None:
        self.copies, self.epochs = copies, epochs

    def epoch(self, run: Run) -> None:
        epoch = len(run.epochs)
        if epoch & (epoch - 1) == 0 if self.epochs is None else epoch == self.epochs // 2 and self.epochs > 1:
            assert isinstance(run.vae, VAE)  # the command line trains nothing else
            self.copies[epoch] = copy.deepcopy(run.vae)


def _compared(
    settings: Namespace, moments: dict[str, VAE], held_out: Data, console: Console, *, progress: bool = True
) -> xr.Dataset:
    """The comparison of each moment, shown as it is had."""
    shown, tables = held_out.rows(torch.arange(min(len(held_out.x), settings.rows))), []
    for moment, vae in moments.items():
        judged = in_double(vae) if settings.precision == "float64" else vae
        comparison = compare_elbos(
            judged, shown, _elbos(settings), particles=settings.particles, draws=settings.draws, seed=settings.seed,
            progress=progress,
        )  # fmt: skip
        _show(moment, comparison, console)
        tables.append(comparison)
    return xr.concat(tables, xr.Variable("moment", list(moments)), combine_attrs="drop_conflicts")


def _show(moment: str, comparison: xr.Dataset, console: Console) -> None:
    console.print(f"\nAt the {moment} of training:")
    show_comparison(comparison, console)


def _of_seeds(settings: Namespace, seeds: list[int], data: Loaded, *, goes_on: bool) -> int:
    """The mean over seeds of those that came to their end."""
    with sweep_folder("compare", settings.out, goes_on=goes_on) as run:
        kept = KeptJobs(run, "compare", compare_settings, settings, data)
        sweep = _sweep(settings, {f"seed {seed}": (seed,) for seed in seeds}, data, kept)
        found = [sweep.results[job] for seed in seeds if (job := f"seed {seed}") in sweep.results]
        diverged = [f"{job}: {why}" for job, why in sweep.failures.items()]
        if not found and sweep.interrupted:
            raise KeyboardInterrupt
        if not found:
            raise DivergenceError(f"every seed failed, the first so: {diverged[0]}")
        if sweep.interrupted:
            say(f"go on with pyro-vae compare {run.path}")
        if len(found) < len(seeds):
            say(f"of {len(seeds)} seeds {len(found)} came to the end, and no other is in the comparison")
        about = {"diverged": "; ".join(diverged), "timed_beside": "other seeds" if is_side_by_side(settings) else ""}
        mean = (over_seeds(found) if len(found) > 1 else found[0]).assign_attrs(about)
        for i, moment in enumerate(mean.moment.values):
            _show(str(moment), mean.isel(moment=i), Console())
        run.dataset("seeds.nc", stacked(found))
        _write(settings, mean, run)
        run.show(Console())
    return 130 if sweep.interrupted else 0


def _sweep(settings: Namespace, jobs: dict[str, tuple[int]], data: Loaded, kept: KeptJobs) -> Sweep:
    """Compare with the seeds that are not done yet, and keep each comparison as soon as it is made."""
    places = places_of("seeds", jobs)
    done = {job: _read(path) for job, place in places.items() if (path := kept.path(place, "comparison.nc"))}
    tell_done(len(done), len(jobs))

    def keep(job: str, comparison: xr.Dataset) -> None:
        kept.folder(places[job]).dataset("comparison.nc", comparison)

    sweep = run_jobs(settings, compare_one, {job: jobs[job] for job in jobs if job not in done}, data, keep)
    sweep.results = {**done, **sweep.results}
    return sweep


def _read(path: Path) -> xr.Dataset:
    validate_hdf5(path)
    try:
        with xr.open_dataset(path, engine="h5netcdf") as comparison:
            return as_comparison(comparison.load())
    except Exception as error:  # what xarray and h5netcdf raise has no common base
        raise DataError(f"{path}: not a comparison ({type(error).__name__}: {error}); delete it") from error


def compare_one(settings: Namespace, seed: int, data: Loaded | None) -> Outcome:
    """Train and compare with one seed.

    Args:
        settings: of ``pyro-vae compare``.
        seed: of weights, order and noise.
        data: None in a worker, which then loads them.
    """
    here, data, own = data is not None, data or loaded(settings), with_seed(settings, seed)
    try:
        moments, fitted = _trained(own, build(own, data.train), data, progress=here)
        if fitted.interrupted:  # which is in no mean
            return Outcome(interrupted=True)
        message = in_one_line(fitted.history, fitted.device)
        return Outcome(_compared(own, moments, data.held_out, QUIET, progress=here), message)
    except (DivergenceError, ModelError) as error:  # the second where what it was trained to cannot be evaluated
        return Outcome(failure=str(error))


def _write(settings: Namespace, comparison: xr.Dataset, run: RunFolder) -> None:
    run.text("config.yaml", command("compare", compare_settings).dump(with_absolute_paths(settings)))
    save_comparison(run, comparison)
