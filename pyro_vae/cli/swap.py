"""``pyro-vae swap``: a grid of choices of parts, trained alike and ranked."""

import copy
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli.build import Part, assemble, names_of
from pyro_vae.cli.fit import Loaded, loaded, refuse, refuse_estimator, refuse_overlap, report_reading, train
from pyro_vae.cli.kept_jobs import KeptJobs, hash_of, is_sweep, places_of, stopped_sweep, sweep_folder, tell_done
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import as_yaml, command, swap_settings
from pyro_vae.cli.sweep import Outcome, run_jobs, say, seeds_of, with_seed
from pyro_vae.compare.swap import rank, ranking_figure, ranking_table, refuse_one_row, with_failures
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.errors import DivergenceError, ModelError, SettingsError
from pyro_vae.evidence import refuse_particles
from pyro_vae.train.checkpoint.save_load import load

WEIGHTS = "weights.safetensors"
"""The file of a trained VAE, written last: a folder that has it is whole."""


@dataclass
class Trained:
    """What has come of a grid.

    Args:
        vaes: those wholly trained, by name, one of each seed.
        folders: where each of these is kept, within the folder of the sweep.
        diverged: why others were not, by name.
        interrupted: whether Ctrl-C ended it early.
    """

    vaes: dict[str, list[VAE]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_swap(asked: Namespace) -> int:
    """Every combination of parts, trained alike and ranked by the evidence of held-out data."""
    goes_on = "resume" in asked
    settings = stopped_sweep("swap", swap_settings, asked.resume, asked.workers, asked.trust) if goes_on else asked
    refuse_particles(settings.particles)
    seeds = seeds_of(settings)
    data = loaded(settings)
    report_reading(*data.files)
    refuse_one_row(len(data.held_out.x))
    vaes = _grid(settings, data.train)
    for name, vae in vaes.items():
        _refuse(settings, name, vae, data)
    refuse_overlap(settings, data)
    with sweep_folder("swap", settings.out, goes_on=goes_on) as run:
        kept = KeptJobs(run, "swap", swap_settings, settings, {"data": hash_of(data.files)})
        trained = _trained(settings, [*vaes], seeds, data, kept)
        if trained.interrupted:
            done = f"{len(trained.vaes)} of {len(vaes)} combinations"
            say(f"interrupted: {done} are wholly trained, and no other is ranked")
        if trained.interrupted and is_sweep(run.path):
            say(f"go on with pyro-vae swap {run.path}")
        if trained.vaes:
            _write(trained, data.held_out, kept)
        elif not trained.interrupted:
            raise DivergenceError(f"every combination diverged, the first so: {next(iter(trained.diverged.values()))}")
    return 130 if trained.interrupted else 0


Parts: TypeAlias = tuple[Part, Part, Part]
"""A prior, a likelihood and a posterior."""


def _grid(settings: Namespace, data: Data) -> dict[str, VAE]:
    """The VAEs by name."""
    return {name: assemble(settings, data, *parts) for name, parts in _combinations(settings).items()}


def _combinations(settings: Namespace) -> dict[str, Parts]:
    """The parts by name: of those that there is a choice of, or of all where there is none."""
    made = instantiated(command("swap", swap_settings), settings)
    kinds = "priors", "likelihoods", "posteriors"
    choices = [_choices(made, settings, kind) for kind in kinds]
    named = [list(zip(names_of(parts, kind), parts, strict=True)) for parts, kind in zip(choices, kinds, strict=True)]
    chosen = [len(parts) > 1 or all(len(other) == 1 for other in choices) for parts in choices]
    combinations: dict[str, Parts] = {}
    for combination in itertools.product(*named):
        names, parts = zip(*combination, strict=True)
        combinations[" · ".join(itertools.compress(names, chosen))] = parts
    return combinations


def _choices(made: Namespace, settings: Namespace, name: str) -> list[Part]:
    if made[name] is None:
        return [(None, None)]
    if not made[name]:
        raise SettingsError(f"{name} is empty; name at least one class")
    return list(zip(made[name], settings[name], strict=True))


def _refuse(settings: Namespace, name: str, vae: VAE, data: Loaded) -> None:
    """Refuse what can be seen before any combination is trained."""
    try:
        refuse(settings, vae, data)
        refuse_estimator(settings, vae, data.train)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def _trained(settings: Namespace, names: list[str], seeds: list[int], data: Loaded, kept: KeptJobs) -> Trained:
    """Train all that are not kept yet, past those that diverge and until Ctrl-C, and keep each when it is trained."""
    jobs = {_called(name, seed, seeds): (name, seed) for name in names for seed in seeds}
    places, parts = places_of("models", jobs), _combinations(settings)
    done = {
        job: _loaded(settings, *jobs[job], data, path)
        for job, place in places.items()
        if (path := kept.path(place, WEIGHTS))
    }
    tell_done(len(done), len(jobs))

    def keep(job: str, found: tuple[VAE, xr.Dataset]) -> None:
        name, seed = jobs[job]
        _keep(kept.folder(places[job]), with_seed(settings, seed), parts[name], *found)

    sweep = run_jobs(settings, train_one, {job: jobs[job] for job in jobs if job not in done}, data, keep)
    sweep.results = {**done, **{job: vae for job, (vae, _) in sweep.results.items()}}
    trained = Trained(interrupted=sweep.interrupted)
    for job, why in sweep.failures.items():
        trained.diverged.setdefault(jobs[job][0], why)
    for name in names:
        of_seeds = [_called(name, seed, seeds) for seed in seeds]
        if all(job in sweep.results for job in of_seeds):
            trained.vaes[name] = [sweep.results[job] for job in of_seeds]
            trained.folders[name] = [places[job] for job in of_seeds]
    return trained


def _loaded(settings: Namespace, name: str, seed: int, data: Loaded, path: Path) -> VAE:
    """A VAE that was trained before the sweep was stopped."""
    vae = _grid(with_seed(settings, seed), data.train)[name]
    load(path, into=vae)
    return vae


def _keep(folder: RunFolder, settings: Namespace, parts: Parts, vae: VAE, history: xr.Dataset) -> None:
    """Write a trained VAE as fit does, so that check and compare take its folder; the weights say that it is whole."""
    own = copy.deepcopy(settings)
    own.prior, own.likelihood, own.posterior = (part[1] for part in parts)
    own.out = str(folder.path)
    folder.text("config.yaml", as_yaml(own))
    folder.dataset("history.nc", history)
    folder.weights(WEIGHTS, vae, int(history.step[-1]))


def _called(name: str, seed: int, seeds: list[int]) -> str:
    return name if len(seeds) == 1 else f"{name} (seed {seed})"


def train_one(settings: Namespace, name: str, seed: int, data: Loaded | None) -> Outcome:
    """Train one VAE of a grid.

    Args:
        settings: of ``pyro-vae swap``.
        name: of the combination.
        seed: of its training.
        data: None in a worker, which then loads them and sends the VAE back from its CPU.

    Returns:
        The VAE and the history of its training.
    """
    here, data, own = data is not None, data or loaded(settings), with_seed(settings, seed)
    vae = _grid(own, data.train)[name]
    try:
        fitted = train(own, vae, data, progress=here)
    except DivergenceError as error:
        return Outcome(failure=str(error))
    sent = vae if here else copy.deepcopy(vae).cpu()  # without the weak references by which Pyro knows its parameters
    return Outcome((sent, fitted.history), interrupted=fitted.interrupted)


def _write(trained: Trained, held_out: Data, kept: KeptJobs) -> None:
    settings, run = kept.settings, kept.run
    ranked = rank(trained.vaes, held_out, num_particles=settings.particles, seed=settings.seed)
    ranked = with_failures(ranked, trained.diverged)
    folders = [", ".join(trained.folders.get(str(name), [])) for name in ranked.model.values]
    ranked = ranked.assign(folder=("model", folders))
    Console().print(ranking_table(ranked))
    kept.write_settings()
    run.dataset("ranking.nc", ranked)
    run.text("ranking.csv", _as_csv(ranked))
    run.figure("ranking.png", ranking_figure(ranked))
    best = str(ranked.model.values[0])
    where = ", ".join(str(run.path / place) for place in trained.folders[best])
    Console().print(f"{_best_of(ranked)}, kept in {where}", soft_wrap=True)
    run.show(Console())


def _best_of(ranked: xr.Dataset) -> str:
    """The best model, and those whose difference from it is within two standard errors."""
    best, *others = map(str, ranked.model.values)
    near = (abs(ranked.difference) <= 2 * ranked.difference_se).values[1:]
    tied = ", ".join(itertools.compress(others, near))
    return f"Best: {best}" + (f" (not told apart from {tied} by 2 standard errors)" if tied else "")


def _as_csv(ranked: xr.Dataset) -> str:
    """The ranking as a table, best first, with the folder of each model."""
    columns = ["log_evidence", "se", "difference", "difference_se", "mcse", "kind", "note", "folder"]
    table = ranked[columns].to_dataframe()[columns]
    table.insert(0, "rank", range(1, len(table) + 1))
    csv: str = table.to_csv(index_label="model")
    return csv
