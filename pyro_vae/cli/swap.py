"""``pyro-vae swap``: a grid of choices of parts, trained alike and ranked."""

import itertools
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jsonargparse import Namespace
from rich.console import Console

from pyro_vae.cli.build import Part, assemble, names_of
from pyro_vae.cli.fit import Loaded, loaded, refuse, refuse_estimator, train
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import command, swap_settings, with_absolute_paths
from pyro_vae.cli.sweep import is_side_by_side, say, seeds_of, side_by_side, tell, with_seed
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


@dataclass
class Came:
    """What has come of one training, as a process sends it: arrays, since tensors would share its memory."""

    weights: dict[str, Any]
    trained_on: Any
    diverged: str = ""
    interrupted: bool = False


def _trained(settings: Namespace, names: list[str], seeds: list[int], data: Loaded) -> Trained:
    """Train all, past those that diverge and until Ctrl-C."""
    jobs = {_called(name, seed, seeds): (name, seed) for name in names for seed in seeds}
    trained, vaes = Trained(), dict[str, VAE]()
    of_seed = {seed: _grid(with_seed(settings, seed), data.train) for seed in seeds}
    apart = is_side_by_side(settings)
    with closing((_side_by_side if apart else _in_turn)(settings, jobs, of_seed, data)) as coming:
        try:
            for job, came in coming:
                name, seed = jobs[job]
                if came.diverged:
                    trained.diverged.setdefault(name, came.diverged)
                    say(f"{job}: {came.diverged}")
                elif came.interrupted:
                    trained.interrupted = True
                    break
                else:
                    vaes[job] = of_seed[seed][name]
        except KeyboardInterrupt:
            if not apart:
                raise
            trained.interrupted = True
    for name in names:
        every = [vaes.get(_called(name, seed, seeds)) for seed in seeds]
        if len(of_all := [vae for vae in every if vae is not None]) == len(seeds):
            trained.vaes[name] = of_all
    return trained


def _called(name: str, seed: int, seeds: list[int]) -> str:
    return name if len(seeds) == 1 else f"{name} (seed {seed})"


Jobs: TypeAlias = dict[str, tuple[str, int]]
Grids: TypeAlias = dict[int, dict[str, VAE]]
Coming: TypeAlias = Generator[tuple[str, Came], None, None]


def _in_turn(settings: Namespace, jobs: Jobs, vaes: Grids, data: Loaded) -> Coming:
    for i, (job, (name, seed)) in enumerate(jobs.items(), 1):
        tell(f"{i} of {len(jobs)}: {job}")
        try:
            fitted = train(with_seed(settings, seed), vaes[seed][name], data)
            yield job, Came({}, None, interrupted=fitted.interrupted)
        except DivergenceError as error:
            yield job, Came({}, None, str(error))


def _side_by_side(settings: Namespace, jobs: Jobs, vaes: Grids, data: Loaded) -> Coming:
    """By processes that make data and VAEs anew of the settings, and so come to what one process comes to."""
    settings = with_absolute_paths(settings)
    sent = {job: (settings, name, seed) for job, (name, seed) in jobs.items()}
    for job, came in side_by_side(settings, train_one, sent):
        name, seed = jobs[job]
        with torch.no_grad():
            vaes[seed][name].load_state_dict({key: torch.from_numpy(value) for key, value in came.weights.items()})
        vaes[seed][name].trained_on = came.trained_on
        yield job, came


def train_one(settings: Namespace, name: str, seed: int) -> Came:
    """Train one of a grid, in a process of its own.

    Args:
        settings: of ``pyro-vae swap``.
        name: of the combination.
        seed: of its training.
    """
    data, own = loaded(settings), with_seed(settings, seed)
    vae, diverged, interrupted = _grid(own, data.train)[name], "", False
    try:
        interrupted = train(own, vae, data, progress=False).interrupted
    except DivergenceError as error:
        diverged = str(error)
    weights = {key: value.detach().cpu().numpy() for key, value in vae.state_dict().items()}
    return Came(weights, vae.trained_on, diverged, interrupted)


def _write(settings: Namespace, trained: Trained, held_out: Data, run: RunFolder) -> None:
    ranked = rank(trained.vaes, held_out, num_particles=settings.particles, seed=settings.seed)
    ranked = with_failures(ranked, trained.diverged)
    Console().print(ranking_table(ranked))
    run.text("config.yaml", command("swap", swap_settings).dump(with_absolute_paths(settings)))
    run.dataset("ranking.nc", ranked)
    run.figure("ranking.png", ranking_figure(ranked))
    run.show(Console())
