"""The command line: ``pyro-vae demo | fit | compare | swap``."""

import argparse
import copy
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jsonargparse import Namespace
from rich.console import Console

from pyro_vae import nn
from pyro_vae._settings import command, compare_settings, fit_settings, instantiated, parser, plain, swap_settings
from pyro_vae.compare import compare_elbos, default_elbos, refuse_choices
from pyro_vae.core import VAE
from pyro_vae.data import Data, load, load_held_out, split
from pyro_vae.demo import demo
from pyro_vae.device import refuse_seed, seeded
from pyro_vae.elbo import Trace_ELBO
from pyro_vae.errors import DataError, DivergenceError, PyroVAEError, SettingsError
from pyro_vae.evidence import refuse_particles
from pyro_vae.likelihoods import Normal
from pyro_vae.report import in_double, save_comparison, save_fit, show_comparison, show_fit
from pyro_vae.runs import RunFolder, load_weights
from pyro_vae.swap import rank, ranking_figure, ranking_table
from pyro_vae.traces import Loss, loss_name
from pyro_vae.train import Fit, fit

# Units of the user's data are unknown, so their noise is learned unless a likelihood is named.
_learned_normal = partial(Normal, scale=0.5, learn_scale=True)


OF_COMPARE = ("run", "elbos", "particles", "draws", "rows", "precision")
OF_SWAP = ("priors", "likelihoods", "posteriors", "particles")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as typed; those of the process if not given.

    Returns:
        The exit code: 0, 2 for an error in one sentence on stderr, 130 after Ctrl-C.

    Example:
        >>> main(["fit", "--data", "nowhere.csv", "--out", "nowhere"])
        2
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"demo": _run_demo, "fit": _run_fit, "compare": _run_compare, "swap": _run_swap}
    flags = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in typed]
    try:
        settings = parser().parse_args(flags)
        chosen = settings[settings.command]
        refuse_seed(chosen.seed)
        return commands[settings.command](chosen)
    except argparse.ArgumentError as error:
        command = f"{typed[0]} " if typed and typed[0] in commands else ""
        print(f"pyro-vae: {plain(error)}; see pyro-vae {command}--help", file=sys.stderr)
        return 2
    except PyroVAEError as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyro-vae: interrupted", file=sys.stderr)
        return 130


def _run_demo(settings: Namespace) -> int:
    demo(settings.out, epochs=settings.epochs, seed=settings.seed, device=settings.device)
    return 0


def _run_fit(settings: Namespace) -> int:
    vae, train, held_out = _untrained(settings)
    with RunFolder(settings.out) as run:
        result = _train(settings, vae, train, held_out, run)
        run.text("config.yaml", _as_yaml(settings))
        show_fit(result, Console())
        save_fit(run, result, held_out)
        run.show(Console())
    return 130 if result.interrupted else 0


def _train(
    settings: Namespace,
    vae: VAE,
    train: Data,
    held_out: Data,
    run: RunFolder,
    *,
    on_epoch: Callable[[int, VAE], None] | None = None,
) -> Fit:
    """Train; after a divergence the run folder still gets the settings, the last good weights and the history."""
    made = _instances(settings)
    try:
        return fit(
            vae, train, validation_data=held_out, elbo=made.elbo or Trace_ELBO(), optimizer=made.optimizer,
            epochs=settings.epochs, batch_size=settings.batch_size, device=settings.device, seed=settings.seed,
            on_epoch=on_epoch,
            engine=settings.engine,
        )  # fmt: skip
    except DivergenceError as error:
        run.text("config.yaml", _as_yaml(settings))
        run.weights("weights.safetensors", vae)
        if error.history is not None:
            run.dataset("history.nc", error.history)
        raise


def _untrained(settings: Namespace) -> tuple[VAE, Data, Data]:
    """The VAE, the training data and the held-out data, seen to fit each other and the optimizer."""
    train, held_out = _data(settings)
    _refuse_other_width(held_out, train.x.shape[1], train.source)
    vae = build(settings, train)
    vae.check(train.x)
    _refuse_optimizer(_instances(settings).optimizer, copy.deepcopy(vae))
    return vae, train, held_out


def _refuse_other_width(data: Data, features: int, of: str) -> None:
    if data.x.shape[1] != features:
        raise DataError(
            f"{data.source}: a row has {data.x.shape[1]} numbers, and {features} in {of}; give data of the same columns"
        )


def _refuse_optimizer(optimizer: Any, vae: VAE) -> None:
    """Try a step on a copy: torch's optimizers refuse settings when made, and networks when they step."""
    try:
        for parameter in vae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer(list(vae.parameters())).step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(f"optimizer: it cannot be used ({_first_line(error)}); change its settings") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _run_compare(settings: Namespace) -> int:
    if settings.precision not in ("float32", "float64"):
        raise SettingsError(f"precision is {settings.precision}; it must be float32 or float64")
    if settings.draws < 2 or settings.rows < 2:
        raise SettingsError(f"draws is {settings.draws} and rows {settings.rows}; each must be at least 2")
    made = instantiated(command("compare", compare_settings), settings).elbos
    elbos = default_elbos() if made is None else {loss_name(loss): loss for loss in made}
    refuse_choices(elbos, settings.particles)
    if settings.run is None:
        if settings.data is None:
            raise SettingsError("compare needs --run, a folder that pyro-vae fit wrote, or --data to train on first")
        vae, train, held_out = _untrained(settings)
        moments = {"start": copy.deepcopy(vae)}
        with RunFolder(settings.out) as run:
            show_fit(
                _train(settings, vae, train, held_out, run, on_epoch=_halfway(moments, settings.epochs)), Console()
            )
            _compare(settings, elbos if made else None, {**moments, "end": vae}, held_out, run)
    else:
        first, vae, held_out = _trained(settings)
        with RunFolder(settings.out) as run:
            _compare(settings, elbos if made else None, {"start": first, "end": vae}, held_out, run)
    return 0


def _halfway(moments: dict[str, VAE], epochs: int) -> Callable[[int, VAE], None]:
    """What keeps a copy of the VAE in the middle of training."""

    def keep(epoch: int, vae: VAE) -> None:
        if epoch == epochs // 2 and epochs > 1:
            moments["middle"] = copy.deepcopy(vae)

    return keep


def _compare(
    settings: Namespace, elbos: dict[str, Loss] | None, moments: dict[str, VAE], held_out: Data, run: RunFolder
) -> None:
    shown, tables = held_out.rows(torch.arange(min(len(held_out.x), settings.rows))), []
    for moment, vae in moments.items():
        judged = in_double(vae) if settings.precision == "float64" else vae
        comparison = compare_elbos(
            judged, shown, elbos, particles=settings.particles, draws=settings.draws, seed=settings.seed, progress=True
        )
        Console().print(f"\nAt the {moment} of training:", highlight=False)
        show_comparison(comparison, Console())
        tables.append(comparison)
    every = xr.concat(tables, xr.Variable("moment", list(moments)), combine_attrs="drop_conflicts")
    save_comparison(run, every)
    run.show(Console())


def _refuse_training_settings(settings: Namespace) -> None:
    """A trained run is as it is: a setting that would be ignored is refused."""
    defaults, used = command("compare", compare_settings).get_defaults(), {"run", "data", "out", *OF_COMPARE}
    changed = [name for name, value in settings.items(branches=False) if value != defaults.get(name)]
    ignored = sorted({name.split(".")[0] for name in changed} - used - {"config", "seed"})
    if ignored:
        raise SettingsError(f"--run brings its own {', '.join(ignored)}; leave --{ignored[0]} out, or leave out --run")


def _trained(settings: Namespace) -> tuple[VAE, VAE, Data]:
    """The VAE of a run folder, before and after, and the data to compare on: its held-out ones, or those given."""
    _refuse_training_settings(settings)
    config = Path(settings.run) / "config.yaml"
    if not config.is_file():
        raise DataError(f"{settings.run}: holds no config.yaml; give the folder of a run that pyro-vae fit wrote")
    try:
        of_run = command("fit", fit_settings).parse_path(str(config))
    except (argparse.ArgumentError, TypeError, UnicodeError) as error:
        raise DataError(f"{config}: not the settings of a run ({plain(error)}); copy the run again") from error
    train, held_out = _data(of_run)
    first = build(of_run, train)
    vae = copy.deepcopy(first)
    load_weights(vae, Path(settings.run) / "weights.safetensors")
    if settings.data is not None:
        held_out = load(settings.data)
        _refuse_other_width(held_out, train.x.shape[1], train.source)
    return first, vae, held_out


Part = tuple[Any, Namespace | type | None]
"""A maker of a part, and the settings it was made of."""


def build(settings: Namespace, train: Data) -> VAE:
    """The VAE that the settings describe, its networks as wide as its parts need them.

    Args:
        settings: of ``pyro-vae fit``.
        train: the data, for their width and for parts that start from them.

    Raises:
        SettingsError: if a part or a network cannot be made of its settings.

    Example:
        >>> parser = command("fit", fit_settings)
        >>> settings = parser.parse_args(["--data", "x.npy", "--out", "run", "--latent_dim", "3"])
        >>> build(settings, Data(torch.zeros(4, 10))).prior()
        Independent(Normal(loc: torch.Size([3]), scale: torch.Size([3])), 1)
    """
    made = _instances(settings)
    parts = ((made[name], settings[name]) for name in ("prior", "likelihood", "posterior"))
    return _assemble(settings, train, *parts)


def _assemble(settings: Namespace, train: Data, prior: Part, likelihood: Part, posterior: Part) -> VAE:
    latents, hidden, features = settings.latent_dim, list(settings.hidden), train.x.shape[1]
    try:
        with seeded(settings.seed, torch.device("cpu")):
            first = train.x if getattr(_class_of(prior), "takes_data", False) else latents
            made_prior = prior[0](first)
            decoder_net = nn.mlp(latents, hidden[::-1], _outputs(likelihood, features))
            encoder_net = nn.mlp(features, hidden, _outputs(posterior, latents))
            decoder = (likelihood[0] or _learned_normal)(decoder_net)
            return VAE(prior=made_prior, decoder=decoder, encoder=posterior[0](encoder_net))
    except PyroVAEError:
        raise
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        sizes = f"latent_dim {latents} and hidden {hidden}"
        raise SettingsError(
            f"no VAE can be made of these parts ({_first_line(error)}); change them, {sizes}"
        ) from error


def _instances(settings: Namespace) -> Namespace:
    """The settings of a fit, with the makers of parts where there were names of classes."""
    return instantiated(command("fit", fit_settings), _without(settings, *OF_COMPARE, *OF_SWAP))


def _class_of(part: Part) -> Any:
    if part[1] is None:
        return _learned_normal.func
    if isinstance(part[1], type):  # a default
        return part[1]
    module, _, name = part[1].class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _outputs(part: Part, size: int) -> int:
    """How many numbers the network of a part gives, as its class and its settings say."""
    outputs = _class_of(part).outputs
    known = inspect.signature(outputs).parameters
    return outputs(size, **{name: value for name, value in _settings_of(part).items() if name in known})


def _settings_of(part: Part) -> dict[str, Any]:
    return part[1].get("init_args", Namespace()).as_dict() if isinstance(part[1], Namespace) else {}


def _run_swap(settings: Namespace) -> int:
    """Every combination of parts, trained alike and ranked by the evidence of held-out data."""
    refuse_particles(settings.particles)
    train, held_out = _data(settings)
    _refuse_other_width(held_out, train.x.shape[1], train.source)
    made = command("swap", swap_settings).instantiate(settings)
    choices = [_parts(made, settings, name) for name in ("priors", "likelihoods", "posteriors")]
    grid = list(itertools.product(*choices))
    vaes = {_name_of_combination(parts, choices): _assemble(settings, train, *parts) for parts in grid}
    for vae in vaes.values():
        vae.check(train.x)
    with RunFolder(settings.out) as run:
        for i, (name, vae) in enumerate(vaes.items(), 1):
            Console(stderr=True).print(f"{i} of {len(vaes)}: {name}", highlight=False)
            _train(settings, vae, train, held_out, run)
        ranked = rank(vaes, held_out, num_particles=settings.particles, seed=settings.seed)
        Console().print(ranking_table(ranked))
        run.text("config.yaml", command("swap", swap_settings).dump(_with_absolute_paths(settings)))
        run.dataset("ranking.nc", ranked)
        run.figure("ranking.png", ranking_figure(ranked))
        run.show(Console())
    return 0


def _name_of_combination(parts: Sequence[Part], choices: Sequence[Sequence[Part]]) -> str:
    """The parts that there is a choice of, or all of them where there is none."""
    chosen = [part for part, of in zip(parts, choices, strict=True) if len(of) > 1] or parts
    return " · ".join(_name_of(part) for part in chosen)


def _parts(made: Namespace, settings: Namespace, name: str) -> list[Part]:
    if made[name] is None:
        return [(None, None)]
    if not made[name]:
        raise SettingsError(f"{name} is empty; name at least one class")
    return list(zip(made[name], settings[name], strict=True))


def _name_of(part: Part) -> str:
    """The class, and the settings that are not its defaults."""
    cls = _class_of(part)
    if part[1] is None:
        return f"{cls.__name__}(learn_scale=True)"
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    own = ", ".join(f"{name}={value}" for name, value in _settings_of(part).items() if value != defaults.get(name))
    return cls.__name__ + (f"({own})" if own else "")


def _without(settings: Namespace, *names: str) -> Namespace:
    kept = copy.deepcopy(settings)
    for name in names:
        kept.pop(name, None)
    return kept


def _data(settings: Namespace) -> tuple[Data, Data]:
    """The training data and the held-out data."""
    data = load(settings.data)
    held_out = load(settings.validation_data) if settings.validation_data else load_held_out(settings.data)
    return split(data, settings.held_out, seed=settings.seed) if held_out is None else (data, held_out)


def _with_absolute_paths(settings: Namespace) -> Namespace:
    kept = _without(settings, "config")
    for name in ("data", "validation_data"):
        if kept[name]:
            kept[name] = str(Path(kept[name]).resolve())
    return kept


def _as_yaml(settings: Namespace) -> str:
    """The settings of a fit, from which the run can be made again."""
    return command("fit", fit_settings).dump(_without(_with_absolute_paths(settings), *OF_COMPARE, *OF_SWAP))
