"""``pyro-vae compare``: compare estimators along one training, or along several with different seeds."""

import copy

import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.auto_likelihood import settle_likelihood
from pyro_vae.cli.build import build
from pyro_vae.cli.fit import saving_after_divergence, train, validate_held_out, validate_training
from pyro_vae.cli.kept_jobs import KeptJobs, hash_of, is_sweep, places_of, stopped_sweep, sweep_folder, tell_done
from pyro_vae.cli.load_data import Loaded, load_data, report_reading
from pyro_vae.cli.load_run import trained_run
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.report import in_double, save_comparison, show_comparison, show_fit
from pyro_vae.cli.run_folder import RunFolder, folder_for, read_dataset
from pyro_vae.cli.settings import OF_COMPARE, command, compare_settings, with_absolute_paths
from pyro_vae.cli.sweep import Outcome, Sweep, is_side_by_side, run_jobs, say, seeds_of, with_seed
from pyro_vae.compare.cells import cells, step_of
from pyro_vae.compare.elbos import compare_elbos, default_elbos, validate_choices
from pyro_vae.compare.pair import subject_of
from pyro_vae.compare.seeds import over_seeds, stacked
from pyro_vae.compare.table import as_comparison
from pyro_vae.core.device import seeded
from pyro_vae.core.format import Console
from pyro_vae.core.traces import Loss, called
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.errors import DivergenceError, ModelError, SettingsError
from pyro_vae.train.callbacks import Callback
from pyro_vae.train.callbacks.base import Run
from pyro_vae.train.fit import Fit
from pyro_vae.train.summary import in_one_line

QUIET = Console(quiet=True)
"""The console for the tables of single seeds, which are not shown."""


def run_compare(arguments: Namespace) -> int:
    """Compare estimators at the start, middle and end of training."""
    settings = _resolve(arguments)
    _validate_settings(settings)
    if settings.run is not None:
        return _compare_run(settings)
    if settings.data is None:
        raise SettingsError("compare needs RUN, a run folder that pyro-vae fit wrote, or --data to train a VAE on")
    seeds = seeds_of(settings)
    if len(seeds) == 1 and is_side_by_side(settings):
        raise SettingsError(
            "--workers and --cluster need several trainings, and there is one; pass --seeds, or leave them out"
        )
    data = load_data(settings)
    report_reading(*data.files)
    settle_likelihood(settings, data.files[0])
    vaes = {seed: _build_untrained(with_seed(settings, seed), data) for seed in seeds}
    validate_held_out(settings, data)
    _validate_estimators(settings, vaes[seeds[0]], data.held_out)
    if len(seeds) > 1:
        return _compare_seeds(settings, seeds, data, resumes=settings is not arguments)
    seeded_settings, vae = with_seed(settings, seeds[0]), vaes[seeds[0]]
    with (
        RunFolder(folder_for("compare", settings.out)) as run,
        run.locked(),
        saving_after_divergence(seeded_settings, vae, run),
    ):
        moments, fitted = _train(seeded_settings, vae, data)
        show_fit(fitted, Console())
        _write(settings, _compare_moments(seeded_settings, moments, data.held_out, Console()), run)
        run.show(Console())
    return 0


def _resolve(arguments: Namespace) -> Namespace:
    """Return the settings, or those of RUN if RUN is an interrupted comparison over seeds."""
    if "resume" in arguments:
        return stopped_sweep("compare", arguments.resume, arguments)
    if arguments.run is not None and is_sweep(arguments.run):
        _validate_no_training_settings(arguments)
        return stopped_sweep("compare", arguments.run, Namespace(trust=arguments.trust))
    return arguments


def _validate_settings(settings: Namespace) -> None:
    """Raise a SettingsError before the data are read, if a setting is out of its range."""
    if settings.precision not in ("float32", "float64"):
        raise SettingsError(f"precision is {settings.precision}; it must be float32 or float64")
    if settings.draws < 2 or settings.rows < 2:
        raise SettingsError(f"draws is {settings.draws} and rows {settings.rows}; each must be at least 2")
    elbos = _elbos(settings)
    validate_choices(default_elbos() if elbos is None else elbos, settings.particles)


def _elbos(settings: Namespace) -> dict[str, Loss] | None:
    made = instantiated(command("compare", compare_settings), settings).elbos
    return None if made is None else {called(loss): loss for loss in made}


def _compare_run(settings: Namespace) -> int:
    _validate_no_training_settings(settings)
    first, vae, held_out, _ = trained_run(settings.run, settings.data, settings.missing, settings.trust)
    with RunFolder(folder_for("compare", settings.out, settings.run)) as run, run.locked():
        _write(settings, _compare_moments(settings, {"start": first, "end": vae}, held_out, Console()), run)
        run.show(Console())
    return 0


def _validate_no_training_settings(settings: Namespace) -> None:
    """Raise a SettingsError for a training setting, which has no effect on a trained run."""
    defaults, used = command("compare", compare_settings).get_defaults(), {"run", "data", "missing", "out", *OF_COMPARE}
    changed = [name for name, value in settings.items(branches=False) if value != defaults.get(name)]
    ignored = sorted({name.split(".")[0] for name in changed} - used - {"config", "seed"})
    if ignored:
        raise SettingsError(f"RUN already sets {', '.join(ignored)}; leave --{ignored[0]} out, or leave RUN out")


def _build_untrained(settings: Namespace, data: Loaded) -> VAE:
    vae = build(settings, data.train)
    validate_training(settings, vae, data)
    return vae


def _validate_estimators(settings: Namespace, vae: VAE, held_out: Data) -> None:
    """Raise a ModelError before training, if an estimator is not valid for the VAE."""
    if (elbos := _elbos(settings)) is None:
        return
    subject = subject_of(vae, held_out.rows(torch.arange(min(len(held_out.x), 2))), None)
    with subject.evaluating(), seeded(settings.seed, subject.device):
        for cell in cells(elbos, settings.particles)[0]:
            step_of(subject, cell.loss)


def _train(settings: Namespace, vae: VAE, data: Loaded, *, progress: bool = True) -> tuple[dict[str, VAE], Fit]:
    """Train, and return copies of the VAE at the start, middle and end."""
    moments = {"start": copy.deepcopy(vae)}
    copies: dict[int, VAE] = {}
    fitted = train(settings, vae, data, callbacks=[_Halfway(copies, settings.epochs)], progress=progress)
    end = fitted.history.attrs["weights_epoch"] or fitted.history.sizes["epoch"]
    before = [epoch for epoch in copies if epoch < end]
    if before:
        moments["middle"] = copies[min(before, key=lambda epoch: abs(epoch - end / 2))]
    return {**moments, "end": vae}, fitted


class _Halfway(Callback):
    """Copies the VAE in the middle of training, or after epochs 1, 2, 4, … if the number of epochs is unknown."""

    def __init__(self, copies: dict[int, VAE], epochs: int | None) -> None:
        self.copies, self.epochs = copies, epochs

    def epoch(self, run: Run) -> None:
        epoch = len(run.epochs)
        if epoch & (epoch - 1) == 0 if self.epochs is None else epoch == self.epochs // 2 and self.epochs > 1:
            assert isinstance(run.vae, VAE)  # the command line trains nothing else
            self.copies[epoch] = copy.deepcopy(run.vae)


def _compare_moments(
    settings: Namespace, moments: dict[str, VAE], held_out: Data, console: Console, *, progress: bool = True
) -> xr.Dataset:
    """Compare the estimators at each moment, and print each comparison."""
    shown, tables = held_out.rows(torch.arange(min(len(held_out.x), settings.rows))), []
    for moment, vae in moments.items():
        converted = in_double(vae) if settings.precision == "float64" else vae
        comparison = compare_elbos(
            converted, shown, _elbos(settings), particles=settings.particles, draws=settings.draws, seed=settings.seed,
            progress=progress,
        )  # fmt: skip
        _show(moment, comparison, console)
        tables.append(comparison)
    return xr.concat(tables, xr.Variable("moment", list(moments)), combine_attrs="drop_conflicts")


def _show(moment: str, comparison: xr.Dataset, console: Console) -> None:
    console.print(f"\nAt the {moment} of training:")
    show_comparison(comparison, console)


def _compare_seeds(settings: Namespace, seeds: list[int], data: Loaded, *, resumes: bool) -> int:
    """Compare with each seed, and average over the seeds whose training finished."""
    with sweep_folder("compare", settings.out, resumes=resumes) as run:
        finished = KeptJobs(run, "compare", settings, {"data": hash_of(data.files)})
        sweep = _sweep(settings, {f"seed {seed}": (seed,) for seed in seeds}, data, finished)
        found = [sweep.results[job] for seed in seeds if (job := f"seed {seed}") in sweep.results]
        diverged = [f"{job}: {why}" for job, why in sweep.failures.items()]
        if not found and sweep.interrupted:
            raise KeyboardInterrupt
        if not found:
            raise DivergenceError(f"every seed failed; the first error: {diverged[0]}")
        if sweep.interrupted:
            say(f"resume with pyro-vae compare {run.path}")
        if len(found) < len(seeds):
            say(f"{len(found)} of {len(seeds)} seeds finished; the comparison leaves the others out")
        about = {"diverged": "; ".join(diverged), "timed_beside": "other seeds" if is_side_by_side(settings) else ""}
        mean = (over_seeds(found) if len(found) > 1 else found[0]).assign_attrs(about)
        for i, moment in enumerate(mean.moment.values):
            _show(str(moment), mean.isel(moment=i), Console())
        run.dataset("seeds.nc", stacked(found))
        _write(settings, mean, run)
        run.show(Console())
    return 130 if sweep.interrupted else 0


def _sweep(settings: Namespace, jobs: dict[str, tuple[int]], data: Loaded, finished: KeptJobs) -> Sweep:
    """Compare with the seeds that have not finished yet, and write each comparison as soon as it is computed."""
    places = places_of("seeds", jobs)
    done = {
        job: as_comparison(read_dataset(path))
        for job, place in places.items()
        if (path := finished.path(place, "comparison.nc"))
    }
    tell_done(len(done), len(jobs))

    def keep(job: str, comparison: xr.Dataset) -> None:
        finished.folder(places[job]).dataset("comparison.nc", comparison)

    sweep = run_jobs(settings, compare_one, {job: jobs[job] for job in jobs if job not in done}, data, keep)
    sweep.results = {**done, **sweep.results}
    return sweep


def compare_one(settings: Namespace, seed: int, data: Loaded | None) -> Outcome:
    """Train and compare with one seed.

    Args:
        settings: of ``pyro-vae compare``.
        seed: of weights, order and noise.
        data: None in a worker, which loads the data itself.
    """
    is_local, data, settings = data is not None, data or load_data(settings), with_seed(settings, seed)
    try:
        moments, fitted = _train(settings, build(settings, data.train), data, progress=is_local)
        if fitted.interrupted:  # the mean has only finished trainings
            return Outcome(interrupted=True)
        message = in_one_line(fitted.history, fitted.device)
        return Outcome(_compare_moments(settings, moments, data.held_out, QUIET, progress=is_local), message)
    except (DivergenceError, ModelError) as error:  # ModelError: the trained VAE cannot be evaluated
        return Outcome(failure=str(error))


def _write(settings: Namespace, comparison: xr.Dataset, run: RunFolder) -> None:
    run.text("config.yaml", command("compare", compare_settings).dump(with_absolute_paths(settings)))
    save_comparison(run, comparison)
