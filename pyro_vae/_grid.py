"""``pyro-vae swap``: a grid of choices of parts, trained alike and ranked."""

import itertools
import sys
from dataclasses import dataclass, field

from jsonargparse import Namespace
from rich.console import Console

from pyro_vae._parts import Part, assemble, names_of
from pyro_vae._settings import command, instantiated, swap_settings, with_absolute_paths
from pyro_vae._training import Loaded, loaded, refuse, refuse_estimator, train
from pyro_vae.core import VAE
from pyro_vae.data import Data
from pyro_vae.errors import DivergenceError, ModelError, SettingsError
from pyro_vae.evidence import refuse_particles
from pyro_vae.runs import RunFolder
from pyro_vae.swap import rank, ranking_figure, ranking_table, refuse_one_row, with_failures


@dataclass
class Trained:
    """What has come of a grid.

    Args:
        vaes: those wholly trained, by name.
        diverged: why others were not, by name.
        interrupted: whether Ctrl-C ended it early.
    """

    vaes: dict[str, VAE] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_swap(settings: Namespace) -> int:
    """Every combination of parts, trained alike and ranked by the evidence of held-out data."""
    refuse_particles(settings.particles)
    data = loaded(settings)
    refuse_one_row(len(data.held_out.x))
    vaes = _grid(settings, data.train)
    for name, vae in vaes.items():
        _refuse(settings, name, vae, data)
    with RunFolder(settings.out) as run:
        trained = _trained(settings, vaes, data)
        if trained.interrupted:
            done = f"{len(trained.vaes)} of {len(vaes)} combinations"
            _say(f"interrupted: {done} are wholly trained, and no other is ranked")
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


def _trained(settings: Namespace, vaes: dict[str, VAE], data: Loaded) -> Trained:
    """Train one after the other, past those that diverge and until Ctrl-C."""
    trained = Trained()
    for i, (name, vae) in enumerate(vaes.items(), 1):
        Console(stderr=True).print(f"{i} of {len(vaes)}: {name}", highlight=False, markup=False)
        try:
            trained.interrupted = train(settings, vae, data).interrupted
        except DivergenceError as error:
            trained.diverged[name] = str(error)
            _say(f"{name}: {error}")
            continue
        if trained.interrupted:
            break
        trained.vaes[name] = vae
    return trained


def _say(what: str) -> None:
    print(f"pyro-vae: {what}", file=sys.stderr)


def _write(settings: Namespace, trained: Trained, held_out: Data, run: RunFolder) -> None:
    ranked = rank(trained.vaes, held_out, num_particles=settings.particles, seed=settings.seed)
    ranked = with_failures(ranked, trained.diverged)
    Console().print(ranking_table(ranked))
    run.text("config.yaml", command("swap", swap_settings).dump(with_absolute_paths(settings)))
    run.dataset("ranking.nc", ranked)
    run.figure("ranking.png", ranking_figure(ranked))
    run.show(Console())
