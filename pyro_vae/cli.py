"""The command line: ``pyro-vae demo | fit | compare``."""

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from pyro.infer import ELBO
from rich.console import Console

from pyro_vae import nn
from pyro_vae.compare import compare_elbos
from pyro_vae.core import VAE
from pyro_vae.data import Data, load, load_held_out, split
from pyro_vae.demo import demo
from pyro_vae.elbo import Trace_ELBO
from pyro_vae.errors import DataError, DivergenceError, PyroVAEError, SettingsError
from pyro_vae.likelihoods import Likelihood, Normal
from pyro_vae.posteriors import DiagNormal, Posterior
from pyro_vae.priors import Prior, StandardNormal
from pyro_vae.report import in_double, save_comparison, save_fit, show_comparison, show_fit
from pyro_vae.runs import RunFolder, load_weights
from pyro_vae.train import Fit, fit

PriorMaker = Callable[[int], Prior]
LikelihoodMaker = Callable[[torch.nn.Module], Likelihood]
PosteriorMaker = Callable[[torch.nn.Module], Posterior]
OptimizerMaker = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]

EPILOGUE = """
Examples:
  pyro-vae demo
  pyro-vae fit --data table.csv --out runs/first --latent_dim 4 --epochs 200
  pyro-vae fit --data mnist/ --out runs/mnist --hidden [400] --optimizer.lr 1e-3
  pyro-vae compare --run runs/first --out runs/first-compared
  pyro-vae fit --print_config > fit.yaml     (then edit, and: pyro-vae fit --config fit.yaml)
"""


def _fit_settings(
    data: str,
    out: str,
    *,
    validation_data: str | None = None,
    held_out: float = 0.2,
    latent_dim: int = 8,
    hidden: list[int] = [128],  # noqa: B006  (jsonargparse shows it as the default)
    prior: PriorMaker = StandardNormal,
    likelihood: LikelihoodMaker = Normal,
    posterior: PosteriorMaker = DiagNormal,
    elbo: ELBO | None = None,
    optimizer: OptimizerMaker = torch.optim.Adam,
    epochs: int = 100,
    batch_size: int = 128,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Train a VAE on your data, and write its weights, history and figures to a new folder.

    Args:
        data: a .npy, .npz, .csv or .parquet file, an IDX file of images, or MNIST's folder.
        out: the folder for the results; it must be new or empty.
        validation_data: held-out data, as --data; by default a random share of --data (MNIST: its test images).
        held_out: that share, between 0 and 1.
        latent_dim: the number of latents.
        hidden: the widths of the hidden layers, of the encoder in this order and of the decoder in reverse.
        prior: the class of p(z), called with the number of latents.
        likelihood: the class of p(x|z), called with the decoder network.
        posterior: the class of q(z|x), called with the encoder network.
        elbo: the estimator; Trace_ELBO if not given.
        optimizer: a class of torch.optim, called with the parameters.
        epochs: passes over the data.
        batch_size: data per step.
        device: auto (CUDA where there is one), cpu or cuda.
        seed: of the split, the weights, the order of the data and the noise.
    """


def _compare_settings(run: str | None = None, *, draws: int = 100, precision: str = "float64") -> None:
    """Compare Pyro's ELBOs with the hand-derived one, for a trained run or a VAE trained here.

    Args:
        run: the folder of a run that pyro-vae fit wrote; without it a VAE is trained first, as fit would.
        draws: independent draws of the noise.
        precision: float64 shows agreement to the last digits; float32 is what training uses.
    """


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="pyro-vae", description=sys.modules["pyro_vae"].__doc__, epilog=EPILOGUE)
    parser.formatter_class = _keep_lines(parser.formatter_class)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, function in ("demo", demo), ("fit", _fit_settings), ("compare", _compare_settings):
        commands.add_subcommand(name, _command(name, function), help=(function.__doc__ or "").splitlines()[0])
    return parser


def _keep_lines(formatter: type) -> type:
    """The formatter, but leaving the examples as they are typed."""

    class Formatter(formatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text if "\n" in text else super()._fill_text(text, width, indent)

    return Formatter


def _command(name: str, function: Callable[..., Any]) -> ArgumentParser:
    parser = ArgumentParser(description=(function.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file of these settings; flags after it override it")
    parser.add_function_arguments(function, as_positional=False)
    if name == "compare":
        parser.add_function_arguments(_fit_settings, as_positional=False, skip={"data"})
        parser.add_argument("--data", type=str | None, help="as for fit; by default the held-out data of --run")
    if name != "demo":
        learned = {"class_path": "pyro_vae.likelihoods.Normal", "init_args": {"scale": 0.5, "learn_scale": True}}
        parser.set_defaults(likelihood=learned)
    return parser


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
    flags = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in typed]
    settings = _parser().parse_args(flags)
    commands = {"demo": _run_demo, "fit": _run_fit, "compare": _run_compare}
    try:
        return commands[settings.command](settings[settings.command])
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
    train, held_out = _data(settings)
    vae = build(settings, train.x.shape[1])
    vae.check(train.x)
    run = RunFolder(settings.out)
    run.text("config.yaml", _as_yaml(settings))
    console = Console()
    result = _train(settings, vae, train, held_out, run)
    show_fit(result, console)
    save_fit(run, result, held_out)
    console.print(f"Written to {run.path}: {', '.join(sorted(p.name for p in run.path.iterdir()))}", soft_wrap=True)
    return 130 if result.interrupted else 0


def _train(settings: Namespace, vae: VAE, train: Data, held_out: Data, run: RunFolder) -> Fit:
    """Train; after a divergence the run folder still gets the last good weights and the history."""
    made = _command("fit", _fit_settings).instantiate(_without(settings, "run", "draws", "precision"))
    try:
        return fit(
            vae, train.x, validation_data=held_out.x, elbo=made.elbo or Trace_ELBO(), optimizer=made.optimizer,
            epochs=settings.epochs, batch_size=settings.batch_size, device=settings.device, seed=settings.seed,
        )  # fmt: skip
    except DivergenceError as error:
        run.weights("weights.safetensors", vae)
        if error.history is not None:
            run.dataset("history.nc", error.history)
        raise


def _run_compare(settings: Namespace) -> int:
    if settings.precision not in ("float32", "float64"):
        raise SettingsError(f"precision is {settings.precision}; it must be float32 or float64")
    if settings.run is None:
        if settings.data is None:
            raise SettingsError("compare needs --run, a folder that pyro-vae fit wrote, or --data to train on first")
        train, held_out = _data(settings)
        vae = build(settings, train.x.shape[1])
        vae.check(train.x)
        run = RunFolder(settings.out)
        show_fit(_train(settings, vae, train, held_out, run), Console())
    else:
        vae, held_out = _trained(settings)
        run = RunFolder(settings.out)
    comparison = compare_elbos(
        in_double(vae) if settings.precision == "float64" else vae, held_out.x, draws=settings.draws, seed=settings.seed
    )
    show_comparison(comparison, Console())
    save_comparison(run, comparison)
    Console().print(f"Written to {run.path}: {', '.join(sorted(p.name for p in run.path.iterdir()))}", soft_wrap=True)
    return 0


def _trained(settings: Namespace) -> tuple[VAE, Data]:
    """The VAE of a run folder, and the data to compare on: its held-out ones, or those given."""
    config = Path(settings.run) / "config.yaml"
    if not config.is_file():
        raise DataError(f"{settings.run}: holds no config.yaml; give the folder of a run that pyro-vae fit wrote")
    of_run = _command("fit", _fit_settings).parse_path(str(config))
    train, held_out = _data(of_run)
    vae = build(of_run, train.x.shape[1])
    load_weights(vae, Path(settings.run) / "weights.safetensors")
    return vae, held_out if settings.data is None else load(settings.data)


def build(settings: Namespace, features: int) -> VAE:
    """The VAE that the settings describe, its networks as wide as its parts need them.

    Args:
        settings: of ``pyro-vae fit``.
        features: numbers per datum.

    Raises:
        SettingsError: if a part or a network cannot be made of its settings.

    Example:
        >>> parser = _command("fit", _fit_settings)
        >>> settings = parser.parse_args(["--data", "x.npy", "--out", "run", "--latent_dim", "3"])
        >>> build(settings, 10).prior()
        Independent(Normal(loc: torch.Size([3]), scale: torch.Size([3])), 1)
    """
    made = _command("fit", _fit_settings).instantiate(_without(settings, "run", "draws", "precision"))
    latents, hidden = settings.latent_dim, list(settings.hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        prior = made.prior(latents)
        decoder_net = nn.mlp(latents, hidden[::-1], _class_of(settings.likelihood).outputs(features))
        encoder_net = nn.mlp(features, hidden, _class_of(settings.posterior).outputs(latents))
        return VAE(prior=prior, decoder=made.likelihood(decoder_net), encoder=made.posterior(encoder_net))


def _class_of(part: Namespace) -> Any:
    module, _, name = part.class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


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


def _as_yaml(settings: Namespace) -> str:
    """The settings, from which the run can be made again, its paths made absolute."""
    kept = _without(settings, "config")
    for name in ("data", "validation_data"):
        if kept[name]:
            kept[name] = str(Path(kept[name]).resolve())
    return _command("fit", _fit_settings).dump(kept)
