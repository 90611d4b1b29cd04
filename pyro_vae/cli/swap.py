"""``pyro-vae swap``: a grid of choices of parts, trained alike and ranked."""

import copy
import itertools
from dataclasses import dataclass, field

from jsonargparse import Namespace
from rich.console import Console

from pyro_vae.cli.build import Part, assemble, names_of
from pyro_vae.cli.fit import Loaded, loaded, refuse, refuse_estimator, report_reading, train
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import command, swap_settings, with_absolute_paths
from pyro_vae.cli.sweep import Outcome, run_jobs, say, seeds_of, with_seed
from pyro_vae.compare.swap import rank, ranking_figure, ranking_table, refuse_one_row, with_failures
from pyro_vae.core.vae import VAE
from pyro_vae.data import Data
from pyro_vae.errors import DivergenceError, ModelError, SettingsError
from pyro_vae.evidence import refuse_particles


@dataclass
class Trained:
    """What has come of a grid.

    Args:
        vaes: those wholly trained, by name, one of each seed.
        diverged: why others were not, by name.
        interrupted: whether Ctrl-C ended it early.
    """

    vaes: dict[str, list[VAE]] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_swap(settings: Namespace) -> int:
    """Every combination of parts, trained alike and ranked by the evidence of held-out data."""
    refuse_particles(settings.particles)
    seeds = seeds_of(settings)
    data = loaded(settings)
    report_reading(*data.files)
    refuse_one_row(len(data.held_out.x))
    vaes = _grid(settings, data.train)
    for name, vae in vaes.items():
        _refuse(settings, name, vae, data)
    with RunFolder(settings.out) as run:
        trained = _trained(settings, [*vaes], seeds, data)
        if trained.interrupted:
            done = f"{len(trained.vaes)} of {len(vaes)} combinations"
            say(f"interrupted: {done} are wholly trained, and no other is ranked")
        if trained.vaes:
            _write(settings, trained, data.held_out, run)
        elif not trained.interrupted:
            raise DivergenceError(f"every combination diverged, the first so: {next(iter(trained.diverged.values()))}")
    return 130 if trained.interrupted else 0


def _grid(settings: Namespace, data: Data) -> dict[str, VAE]:
    """The VAEs by name: of the parts that there is a choice of, or of all where there is none."""
    made = instantiated(command("swap", swap_settings), settings)
    kinds = "priors", "likelihoods", "posteriors"
    choices = [_choices(made, settings, kind) for kind in kinds]
    named = [list(zip(names_of(parts, kind), parts, strict=True)) for parts, kind in zip(choices, kinds, strict=True)]
    chosen = [len(parts) > 1 or all(len(other) == 1 for other in choices) for parts in choices]
    vaes = {}
    for combination in itertools.product(*named):
        names, parts = zip(*combination, strict=True)
        vaes[" · ".join(itertools.compress(names, chosen))] = assemble(settings, data, *parts)
    return vaes


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


def _trained(settings: Namespace, names: list[str], seeds: list[int], data: Loaded) -> Trained:
    """Train all, past those that diverge and until Ctrl-C."""
    jobs = {_called(name, seed, seeds): (name, seed) for name in names for seed in seeds}
    sweep = run_jobs(settings, train_one, jobs, data)
    trained = Trained(interrupted=sweep.interrupted)
    for job, why in sweep.failures.items():
        trained.diverged.setdefault(jobs[job][0], why)
    for name in names:
        of_seeds = [_called(name, seed, seeds) for seed in seeds]
        if all(job in sweep.results for job in of_seeds):
            trained.vaes[name] = [sweep.results[job] for job in of_seeds]
    return trained


def _called(name: str, seed: int, seeds: list[int]) -> str:
    return name if len(seeds) == 1 else f"{name} (seed {seed})"


def train_one(settings: Namespace, name: str, seed: int, data: Loaded | None) -> Outcome:
    """Train one VAE of a grid.

    Args:
        settings: of ``pyro-vae swap``.
        name: of the combination.
        seed: of its training.
        data: None in a worker, which then loads them and sends the VAE back from its CPU.
    """
    here, data, own = data is not None, data or loaded(settings), with_seed(settings, seed)
    vae = _grid(own, data.train)[name]
    try:
        fitted = train(own, vae, data, progress=here)
    except DivergenceError as error:
        return Outcome(failure=str(error))
    sent = vae if here else copy.deepcopy(vae).cpu()  # without the weak references by which Pyro knows its parameters
    return Outcome(sent, interrupted=fitted.interrupted)


def _write(settings: Namespace, trained: Trained, held_out: Data, run: RunFolder) -> None:
    ranked = rank(trained.vaes, held_out, num_particles=settings.particles, seed=settings.seed)
    ranked = with_failures(ranked, trained.diverged)
    Console().print(ranking_table(ranked))
    run.text("config.yaml", command("swap", swap_settings).dump(with_absolute_paths(settings)))
    run.dataset("ranking.nc", ranked)
    run.figure("ranking.png", ranking_figure(ranked))
    run.show(Console())
