"""``pyro-vae swap``: train every combination of components and rank the VAEs."""

import copy
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.build import Part, assemble, names_of
from pyro_vae.cli.fit import train, validate_estimator, validate_held_out, validate_training
from pyro_vae.cli.kept_jobs import KeptJobs, hash_of, is_sweep, places_of, stopped_sweep, sweep_folder, tell_done
from pyro_vae.cli.load_data import Loaded, load_data, report_reading
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import as_yaml, command, swap_settings
from pyro_vae.cli.sweep import Outcome, run_jobs, say, seeds_of, with_seed
from pyro_vae.compare.held_out import validate_several_rows
from pyro_vae.compare.swap import rank, ranking_figure, ranking_table, with_failures
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.errors import DivergenceError, ModelError, SettingsError
from pyro_vae.evidence import validate_particles
from pyro_vae.train.checkpoint.save_load import load

WEIGHTS = "weights.safetensors"
"""The file of a trained VAE, written last: a folder that has it is complete."""


@dataclass
class Trained:
    """The results of training a grid.

    Args:
        vaes: the trained VAEs of each combination, one per seed; only combinations with all seeds are here.
        folders: the folders of these VAEs, relative to that of the sweep.
        diverged: the reason why a combination has no VAEs, by name.
        interrupted: whether Ctrl-C ended the sweep early.
    """

    vaes: dict[str, list[VAE]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_swap(arguments: Namespace) -> int:
    """Train every combination of components, and rank them by held-out evidence."""
    resumes = "resume" in arguments
    settings = stopped_sweep("swap", arguments.resume, arguments) if resumes else arguments
    validate_particles(settings.particles)
    seeds = seeds_of(settings)
    data = load_data(settings)
    report_reading(*data.files)
    validate_several_rows(len(data.held_out.x), "the held-out part")
    vaes = _grid(settings, data.train)
    for name, vae in vaes.items():
        _validate(settings, name, vae, data)
    validate_held_out(settings, data)
    with sweep_folder("swap", settings.out, resumes=resumes) as run:
        finished = KeptJobs(run, "swap", settings, {"data": hash_of(data.files)})
        trained = _train_grid(settings, [*vaes], seeds, data, finished)
        if trained.interrupted:
            done = f"{len(trained.vaes)} of {len(vaes)} combinations"
            say(f"interrupted: {done} are trained and ranked, the others are left out")
        if trained.interrupted and is_sweep(run.path):
            say(f"resume with pyro-vae swap {run.path}")
        if trained.vaes:
            _write(trained, data.held_out, finished)
        elif not trained.interrupted:
            raise DivergenceError(
                f"every combination diverged; the first error: {next(iter(trained.diverged.values()))}"
            )
    return 130 if trained.interrupted else 0


Parts: TypeAlias = tuple[Part, Part, Part]
"""A prior, a likelihood and a posterior."""


def _grid(settings: Namespace, data: Data) -> dict[str, VAE]:
    """Build the VAEs, by name."""
    return {name: assemble(settings, data, *parts) for name, parts in _combinations(settings).items()}


def _combinations(settings: Namespace) -> dict[str, Parts]:
    """Return the combinations by name; a name lists the components that vary, or all if none varies."""
    made = instantiated(command("swap", swap_settings), settings)
    kinds = "priors", "likelihoods", "posteriors"
    choices = [_choices(made, settings, kind) for kind in kinds]
    named = [list(zip(names_of(parts, kind), parts, strict=True)) for parts, kind in zip(choices, kinds, strict=True)]
    varies = [len(parts) > 1 or all(len(other) == 1 for other in choices) for parts in choices]
    combinations: dict[str, Parts] = {}
    for combination in itertools.product(*named):
        names, parts = zip(*combination, strict=True)
        combinations[" · ".join(itertools.compress(names, varies))] = parts
    return combinations


def _choices(made: Namespace, settings: Namespace, name: str) -> list[Part]:
    if made[name] is None:
        return [(None, None)]
    if not made[name]:
        raise SettingsError(f"{name} is empty; name at least one class")
    return list(zip(made[name], settings[name], strict=True))


def _validate(settings: Namespace, name: str, vae: VAE, data: Loaded) -> None:
    """Raise the errors that training a combination would raise, with its name."""
    try:
        validate_training(settings, vae, data)
        validate_estimator(settings, vae, data.train)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def _train_grid(settings: Namespace, names: list[str], seeds: list[int], data: Loaded, finished: KeptJobs) -> Trained:
    """Train the VAEs that have not been written yet, and write each one; continue after a divergence."""
    jobs = {_job_name(name, seed, seeds): (name, seed) for name in names for seed in seeds}
    places, parts = places_of("models", jobs), _combinations(settings)
    done = {
        job: _load_vae(settings, *jobs[job], data, path)
        for job, place in places.items()
        if (path := finished.path(place, WEIGHTS))
    }
    tell_done(len(done), len(jobs))

    def keep(job: str, result: tuple[VAE, xr.Dataset]) -> None:
        name, seed = jobs[job]
        _write_vae(finished.folder(places[job]), with_seed(settings, seed), parts[name], *result)

    sweep = run_jobs(settings, train_one, {job: jobs[job] for job in jobs if job not in done}, data, keep)
    sweep.results = {**done, **{job: vae for job, (vae, _) in sweep.results.items()}}
    trained = Trained(interrupted=sweep.interrupted)
    for job, why in sweep.failures.items():
        trained.diverged.setdefault(jobs[job][0], why)
    for name in names:
        of_seeds = [_job_name(name, seed, seeds) for seed in seeds]
        if all(job in sweep.results for job in of_seeds):
            trained.vaes[name] = [sweep.results[job] for job in of_seeds]
            trained.folders[name] = [places[job] for job in of_seeds]
    return trained


def _load_vae(settings: Namespace, name: str, seed: int, data: Loaded, path: Path) -> VAE:
    """Load a VAE that was trained before the sweep was interrupted."""
    vae = _grid(with_seed(settings, seed), data.train)[name]
    load(path, into=vae)
    return vae


def _write_vae(folder: RunFolder, settings: Namespace, parts: Parts, vae: VAE, history: xr.Dataset) -> None:
    """Write a trained VAE as a run folder, for check and compare; the weights come last, to mark it complete."""
    of_vae = copy.deepcopy(settings)
    of_vae.prior, of_vae.likelihood, of_vae.posterior = (part[1] for part in parts)
    of_vae.out = str(folder.path)
    folder.text("config.yaml", as_yaml(of_vae))
    folder.dataset("history.nc", history)
    folder.weights(WEIGHTS, vae, int(history.step[-1]))


def _job_name(name: str, seed: int, seeds: list[int]) -> str:
    return name if len(seeds) == 1 else f"{name} (seed {seed})"


def train_one(settings: Namespace, name: str, seed: int, data: Loaded | None) -> Outcome:
    """Train one VAE of a grid.

    Args:
        settings: of ``pyro-vae swap``.
        name: of the combination.
        seed: of its training.
        data: None in a worker, which loads the data itself and returns the VAE on the CPU.

    Returns:
        The VAE and the history of its training.
    """
    is_local, data, settings = data is not None, data or load_data(settings), with_seed(settings, seed)
    vae = _grid(settings, data.train)[name]
    try:
        fitted = train(settings, vae, data, progress=is_local)
    except DivergenceError as error:
        return Outcome(failure=str(error))
    # A copy has no weak references of Pyro's parameter store, which cannot be pickled.
    returned = vae if is_local else copy.deepcopy(vae).cpu()
    return Outcome((returned, fitted.history), interrupted=fitted.interrupted)


def _write(trained: Trained, held_out: Data, finished: KeptJobs) -> None:
    settings, run = finished.settings, finished.run
    ranked = rank(trained.vaes, held_out, num_particles=settings.particles, seed=settings.seed)
    ranked = with_failures(ranked, trained.diverged)
    folders = [", ".join(trained.folders.get(str(name), [])) for name in ranked.model.values]
    ranked = ranked.assign(folder=("model", folders))
    Console().print(ranking_table(ranked))
    finished.write_settings()
    run.dataset("ranking.nc", ranked)
    run.text("ranking.csv", _as_csv(ranked))
    run.figure("ranking.png", ranking_figure(ranked))
    best = str(ranked.model.values[0])
    where = ", ".join(str(run.path / place) for place in trained.folders[best])
    Console().print(f"{_best_of(ranked)}, saved in {where}", soft_wrap=True)
    run.show(Console())


def _best_of(ranked: xr.Dataset) -> str:
    """Name the best model, and the models within two standard errors of it."""
    best, *others = map(str, ranked.model.values)
    near = (abs(ranked.difference) <= 2 * ranked.difference_se).values[1:]
    tied = ", ".join(itertools.compress(others, near))
    return f"Best: {best}" + (f" (within 2 standard errors of {tied})" if tied else "")


def _as_csv(ranked: xr.Dataset) -> str:
    """Write the ranking as CSV, best first, with the folder of each model."""
    columns = ["log_evidence", "se", "difference", "difference_se", "mcse", "bad_khat", "kind", "note", "folder"]
    table = ranked[columns].to_dataframe()[columns]
    table.insert(0, "rank", range(1, len(table) + 1))
    csv: str = table.to_csv(index_label="model")
    return csv
