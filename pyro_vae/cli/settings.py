"""The settings of the commands that train, from the command line or a YAML file."""

import copy
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from pyro.infer import ELBO

from pyro_vae import elbo as _estimators  # noqa: F401  (so that the parser finds the estimators by class name)
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.parsers import parser_of, trust_settings
from pyro_vae.likelihoods import Likelihood
from pyro_vae.posteriors import DiagNormal, Posterior
from pyro_vae.priors import Prior, StandardNormal
from pyro_vae.train.callbacks import Callback

PriorMaker = Callable[[int], Prior]
LikelihoodMaker = Callable[[torch.nn.Module], Likelihood]
PosteriorMaker = Callable[[torch.nn.Module], Posterior]
OptimizerMaker = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]
SchedulerMaker = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

OF_COMPARE = ("run", "elbos", "particles", "draws", "rows", "precision", "trust")
OF_SWAP = ("priors", "likelihoods", "posteriors", "particles")
OF_SPREAD = ("seeds", "workers", "cluster")
OF_RUN = ("checkpoint_steps", "checkpoint_minutes", "devices")


def fit_settings(
    data: str,
    *,
    out: str | None = None,
    validation_data: str | None = None,
    held_out: float = 0.2,
    index: str | None = None,
    label: str | None = None,
    drop: str | None = None,
    columns: str | None = None,
    missing: str | None = None,
    context: str | None = None,
    context_to: str = "encoder,decoder",
    sep: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    key: str | None = None,
    latent_dim: int = 8,
    hidden: list[int] = [128],  # noqa: B006  (jsonargparse shows it as the default)
    prior: PriorMaker = StandardNormal,
    likelihood: LikelihoodMaker | Literal["auto"] | None = None,
    posterior: PosteriorMaker = DiagNormal,
    standardize: bool = True,
    elbo: ELBO | None = None,
    optimizer: OptimizerMaker = torch.optim.Adam,
    epochs: int | None = None,
    steps: int = 20_000,
    patience: int = 1000,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    split_seed: int | None = None,
    engine: Literal["auto", "compiled", "eager"] = "auto",
    scheduler: SchedulerMaker | None = None,
    clip_norm: float | None = None,
    precision: Literal["float32", "tf32", "bf16"] = "float32",
    callbacks: list[Callback] | None = None,
) -> None:
    """Train a VAE on your data, and write its weights, history and figures to a new folder.

    Args:
        data: a .csv, .tsv or .txt file (also gzipped or zipped), a .parquet, .npy, .npz, .mat or .h5ad file, an IDX
            file of images, MNIST's folder, or a folder of images (its subfolders are the labels). A folder of Parquet
            files, a Zarr store, and a .npy or .parquet file above 1 GiB are streamed and need --validation_data.
        out: a new folder for the results; by default runs/COMMAND (RUN/COMMAND for a command that reads a run), with a
            number added if that name is taken.
        validation_data: held-out data, as --data; by default a random share of --data (for MNIST, its test images).
        held_out: the share of --data to hold out, between 0 and 1.
        index: the column of row labels, "" for none; by default the first column if it has no name.
        label: the column of class labels, used only to colour figures.
        drop: columns to drop, e.g. "id,date".
        columns: columns to use; by default all others.
        missing: codes for a missing value, e.g. "NA,?,-999"; NaN and empty cells are always missing too, and "nan"
            means those alone. By default, missing values are an error.
        context: context columns, e.g. "age,sex": the VAE conditions on them and does not model them. Numbers are
            standardized by the training data (unless --standardize false), categories are one-hot encoded.
        context_to: the networks that see the context: encoder, decoder or both. The prior
            pyro_vae.priors.ContextNormal always sees it.
        sep: the separator of a text file: one character, tabs or spaces; detected by default.
        decimal: the decimal separator of a text file, a point or a comma; detected by default.
        header: whether the first line of a text file names the columns; detected by default.
        key: the array of a .npz or .mat file, by default x or the only one; or the layer of an .h5ad file, by default
            its X.
        latent_dim: the number of latents.
        hidden: the widths of the encoder's hidden layers; the decoder has them in reverse order.
        prior: the class of p(z), called with the number of latents.
        likelihood: the class of p(x|z), called with the decoder network; by default a Normal with a learned scale. auto
            chooses a likelihood for each column (counts, categories, heavy tails, …) and prints the choice.
        posterior: the class of q(z|x), called with the encoder network.
        standardize: whether the networks work with standardized real columns and context columns (mean 0 and standard
            deviation 1 in the training data). Densities stay in the units of the data; the scale of a likelihood is in
            standard deviations. Images are never standardized.
        elbo: the estimator; by default Trace_ELBO.
        optimizer: a class of torch.optim, called with the parameters.
        epochs: a fixed number of passes over the data. By default, training stops when the validation ELBO stops
            rising (no epoch in the last --patience steps, and at least 10 epochs, beat the best one by more than one
            standard error of the paired difference), and keeps the weights of the best epoch.
        steps: the largest number of steps, if --epochs is not given.
        patience: the number of steps without a better validation ELBO before training stops, if --epochs is not given.
        batch_size: rows per step; by default 128, or all rows if there are fewer, or slightly fewer than 128 if the
            last batch would hold a single row.
        device: auto (CUDA if available), cpu or cuda.
        seed: the seed of the split, the initial weights, the order of the data and the noise.
        split_seed: the seed of the split alone; by default --seed.
        engine: auto (compiles the step if the run is long enough to repay it), compiled or eager.
        scheduler: a class of torch.optim.lr_scheduler, called with the optimizer; it steps after each epoch.
        clip_norm: the largest norm of the gradient of all parameters; larger gradients are scaled down to it.
        precision: the precision of the arithmetic; tf32 (matrix products on CUDA) and bf16 are coarser. The weights
            stay float32.
        callbacks: classes of pyro_vae.callbacks, e.g. "[EarlyStopping, RollBack]", with settings in a YAML file or as
            --callbacks+=EarlyStopping --callbacks.patience 5.
    """


def run_settings(
    *,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float | None = 5.0,
    devices: int = 1,
) -> None:
    """When to write checkpoints, and on how many devices to train.

    Args:
        checkpoint_steps: the number of steps between checkpoints.
        checkpoint_minutes: the number of minutes between checkpoints; one more is written at the end.
        devices: the number of workers on this machine that share each batch, one per GPU or share of the cores. For
            several machines, use torchrun --nnodes M --nproc-per-node N -m pyro_vae fit. After Ctrl-C or SIGTERM,
            workers have a minute to write a last checkpoint; a second signal ends them at once.
    """


def swap_settings(
    priors: list[PriorMaker] = [StandardNormal],  # noqa: B006
    likelihoods: list[LikelihoodMaker] | None = None,
    posteriors: list[PosteriorMaker] = [DiagNormal],  # noqa: B006
    *,
    particles: int = 500,
) -> None:
    """Train every combination of components on your data, and rank them by held-out evidence.

    Args:
        priors: classes of p(z), e.g. "[StandardNormal, Laplace]", or with settings in a YAML file.
        likelihoods: classes of p(x|z); by default a Normal with a learned scale.
        posteriors: classes of q(z|x).
        particles: the number of particles of the importance-weighted bound on log p(x).
    """


def spread_settings(
    *,
    seeds: list[int] | None = None,
    workers: int = 1,
    cluster: str | None = None,
) -> None:
    """Which seeds to train with, and how many trainings to run at the same time.

    Args:
        seeds: train once per seed, e.g. "[0, 1, 2]", so that the standard errors include the variation between
            trainings; by default once, with --seed.
        workers: the number of trainings to run at the same time, each in a process with its share of the cores.
        cluster: the address of a Ray cluster (started by ray start --head) to run the trainings on, or auto.
    """


def compare_settings(
    run: str | None = None,
    *,
    elbos: list[ELBO] | None = None,
    particles: list[int] = [1, 8],  # noqa: B006
    draws: int = 100,
    rows: int = 512,
    precision: str = "float64",
) -> None:
    """Compare estimators at the start, middle and end of training, to choose one to train with.

    Args:
        run: a run folder that pyro-vae fit wrote, to compare at its start and end. Without it, a VAE is trained first,
            as by fit, and compared in the middle too.
        elbos: the estimators, e.g. "[ELBO, IWAE, DReG]", or with settings in a YAML file; by default Trace_ELBO,
            TraceMeanField_ELBO, HandDerivedELBO, STL, IWAE, DReG, Renyi and Thermodynamic.
        particles: the numbers of particles to compare each estimator with.
        draws: the number of independent draws of the noise.
        rows: the largest number of held-out rows to use.
        precision: the precision of the comparison: float64 shows agreement to the last digits; training uses float32.
    """


def command(name: str, function: Callable[..., Any]) -> ArgumentParser:
    """Return the parser of a command: the settings of its function, and those of ``fit`` if it trains."""
    parser = parser_of(function)
    if name == "fit":
        parser.add_function_arguments(run_settings, as_positional=False)
    if name in ("compare", "swap"):
        parser.add_function_arguments(spread_settings, as_positional=False)
    if name == "swap":
        parser.add_function_arguments(fit_settings, as_positional=False, skip={"prior", "likelihood", "posterior"})
    if name == "compare":
        parser.add_function_arguments(trust_settings, as_positional=False)
        parser.add_function_arguments(fit_settings, as_positional=False, skip={"data", "precision"})
        parser.add_argument("--data", type=str | None, help="data, as for fit; by default the held-out data of --run")
    return parser


def without(settings: Namespace, *names: str) -> Namespace:
    """Copy settings, without some of them."""
    others = copy.deepcopy(settings)
    for name in names:
        others.pop(name, None)
    return others


@functools.cache
def training() -> ArgumentParser:
    """Return the parser of the settings of a training, which all commands that train share."""
    return command("training", fit_settings)


def of_training(settings: Namespace) -> Namespace:
    """Return the settings of a training among those of a command."""
    selected = without(settings, *OF_COMPARE, *OF_SWAP, *OF_SPREAD, *OF_RUN)
    # The precision of compare concerns the comparison, not the training.
    selected.precision = "float32" if "elbos" in settings else settings.precision
    return selected


def instances(settings: Namespace) -> Namespace:
    """Return the settings of a training, with the names of classes replaced by functions that make components."""
    return instantiated(training(), of_training(settings))


def with_absolute_paths(settings: Namespace) -> Namespace:
    """Copy settings with absolute paths, so that they mean the same in any folder."""
    absolute = without(settings, "config", "trust")
    for name in ("data", "validation_data", "run"):
        if absolute.get(name):
            absolute[name] = str(Path(absolute[name]).resolve())
    return absolute


def as_yaml(settings: Namespace) -> str:
    """Write the settings of a training as YAML, from which the run can be repeated."""
    return training().dump(of_training(with_absolute_paths(settings)))
