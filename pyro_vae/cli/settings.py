"""What can be set, from the command line or a YAML file, of the commands that train."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from pyro.infer import ELBO

from pyro_vae import elbo as _estimators  # noqa: F401  (found by the names of their classes)
from pyro_vae.cli.messages import instantiated
from pyro_vae.cli.parsers import parser_of
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
            file of images, MNIST's folder, or a folder of images (subfolders are labels); a folder of Parquet files, of
            Zarr, and a .npy or .parquet file of more than 1 GiB are streamed, which takes --validation_data.
        out: a new folder for the results; by default runs/COMMAND (of a run, RUN/COMMAND), or the next free name.
        validation_data: held-out data, as --data; by default a random share of --data (MNIST: its test images).
        held_out: that share, between 0 and 1.
        index: the column of the row labels, "" for none; by default a first column without a name, if it is unique.
        label: the column of the labels, for colours in figures only.
        drop: columns to leave out, as "id,date".
        columns: columns to take; by default all others.
        missing: values that say that a value is missing, as "NA,?,-999"; nan for NaN and empty cells alone, which are
            always among them. By default a missing value is refused.
        context: columns that are no data, but given to the networks besides, as "age,sex": numbers standardized inside
            the model, in sds of the training data (--standardize false: as they are), categories one-hot.
        context_to: the networks that see them, encoder, decoder or both; the prior pyro_vae.priors.ContextNormal does,
            too.
        sep: what stands between the columns of a text file, one character, tabs or spaces; found by default.
        decimal: its decimal point, a point or a comma; found by default.
        header: whether its first line names the columns; found by default.
        key: the array of a .npz or .mat file, by default x or the only one; or the layer of an .h5ad file, by default
            its X.
        latent_dim: the number of latents.
        hidden: the widths of the hidden layers, of the encoder in this order and of the decoder in reverse.
        prior: the class of p(z), called with the number of latents.
        likelihood: the class of p(x|z), called with the decoder network; by default a Normal whose scale is learned.
            auto takes what each column suggests (counts, categories, heavy tails, …) and says so.
        posterior: the class of q(z|x), called with the encoder network.
        standardize: whether the networks see and describe columns of real numbers, and see context columns of numbers,
            by their distance from the mean, in sds of the training data; the density remains one of the data in their
            own units, and the scale of a likelihood is in those sds. Images are left alone.
        elbo: the estimator; Trace_ELBO if not given.
        optimizer: a class of torch.optim, called with the parameters.
        epochs: passes over the data, all of which are made. By default training ends when the validation ELBO stops
            rising, and the weights are those of the best epoch: it ends after --patience steps, and 10 epochs, in which
            no epoch was better than the best by more than one standard error of the paired difference.
        steps: at most so many, where --epochs is not given.
        patience: steps without a better validation ELBO that end training, where --epochs is not given.
        batch_size: data per step; by default 128, or all data where there are fewer, or slightly less where 128 would
            leave a last batch of one row.
        device: auto (CUDA where there is one), cpu or cuda.
        seed: of the split, the weights, the order of the data and the noise.
        split_seed: of the split alone; by default --seed.
        engine: auto (compiles the step where the run is long enough for it to pay), compiled or eager.
        scheduler: a class of torch.optim.lr_scheduler, called with the optimizer, that goes on after each epoch.
        clip_norm: the gradient of all parameters together is scaled down to at most this norm.
        precision: of the arithmetic; tf32 (matrix products on CUDA) and bf16 are coarser, the weights stay as they are.
        callbacks: classes of pyro_vae.callbacks, as "[EarlyStopping, RollBack]", with settings in a YAML file or as
            --callbacks+=EarlyStopping --callbacks.patience 5.
    """


def run_settings(
    *,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float | None = 5.0,
    devices: int = 1,
) -> None:
    """How a run is kept, and on how many devices it goes on.

    Args:
        checkpoint_steps: keep the state of the training after every so many steps.
        checkpoint_minutes: keep it after every so many minutes; and at the end.
        devices: workers on this machine that share each batch, one per GPU or share of the cores; for several machines,
            torchrun --nnodes M --nproc-per-node N -m pyro_vae fit. After Ctrl-C or SIGTERM, workers have a minute
            for a last checkpoint; a second signal ends them at once.
    """


def swap_settings(
    priors: list[PriorMaker] = [StandardNormal],  # noqa: B006
    likelihoods: list[LikelihoodMaker] | None = None,
    posteriors: list[PosteriorMaker] = [DiagNormal],  # noqa: B006
    *,
    particles: int = 500,
) -> None:
    """Train every combination of parts on your data, and rank them by the evidence of held-out data.

    Args:
        priors: classes of p(z), as "[StandardNormal, Laplace]" or, with settings, in a YAML file.
        likelihoods: classes of p(x|z); by default a Normal whose scale is learned.
        posteriors: classes of q(z|x).
        particles: of the importance-weighted bound on log p(x).
    """


def spread_settings(
    *,
    seeds: list[int] | None = None,
    workers: int = 1,
    cluster: str | None = None,
) -> None:
    """With which seeds to train, and how many at a time.

    Args:
        seeds: train once per seed, as "[0, 1, 2]", so that the errors hold how much trainings differ too; by default
            once, with --seed.
        workers: train so many side by side, each in a process with its share of the cores.
        cluster: train side by side on a Ray cluster, begun by ray start --head: its address, or auto.
    """


def compare_settings(
    run: str | None = None,
    *,
    elbos: list[ELBO] | None = None,
    particles: list[int] = [1, 8],  # noqa: B006
    draws: int = 100,
    rows: int = 512,
    precision: str = "float64",
    trust: str | None = None,
) -> None:
    """Compare estimators at the start, the middle and the end of training: which one to train with?

    Args:
        run: the folder of a run that pyro-vae fit wrote, compared at its start and end; without it a VAE is
            trained first, as fit would, and compared in the middle too.
        elbos: the estimators, as "[ELBO, IWAE, DReG]" or, with settings, in a YAML file; by default Pyro's two, the
            hand-derived one, STL, IWAE, DReG, Renyi and Thermodynamic.
        particles: the numbers of particles to compare each with.
        draws: independent draws of the noise.
        rows: at most so many of the held-out data.
        precision: float64 shows agreement to the last digits; float32 is what training uses.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def command(name: str, function: Callable[..., Any]) -> ArgumentParser:
    """The settings of one command: those of its function, and of a fit where it trains."""
    parser = parser_of(function)
    if name == "fit":
        parser.add_function_arguments(run_settings, as_positional=False)
    if name in ("compare", "swap"):
        parser.add_function_arguments(spread_settings, as_positional=False)
    if name == "swap":
        parser.add_function_arguments(fit_settings, as_positional=False, skip={"prior", "likelihood", "posterior"})
    if name == "compare":
        parser.add_function_arguments(fit_settings, as_positional=False, skip={"data", "precision"})
        parser.add_argument("--data", type=str | None, help="as for fit; by default the held-out data of --run")
    return parser


def without(settings: Namespace, *names: str) -> Namespace:
    """A copy of settings that lacks some."""
    kept = copy.deepcopy(settings)
    for name in names:
        kept.pop(name, None)
    return kept


def training() -> ArgumentParser:
    """The settings of a training, wherever it is done."""
    return command("training", fit_settings)


def of_training(settings: Namespace) -> Namespace:
    """The settings of a training among those of a command."""
    kept = without(settings, *OF_COMPARE, *OF_SWAP, *OF_SPREAD, *OF_RUN)
    kept.precision = "float32" if "elbos" in settings else settings.precision  # that of compare is of what it compares
    return kept


def instances(settings: Namespace) -> Namespace:
    """The settings of a fit, with the makers of parts where there were names of classes."""
    return instantiated(training(), of_training(settings))


def with_absolute_paths(settings: Namespace) -> Namespace:
    """A copy of settings that holds wherever it is read."""
    kept = without(settings, "config", "trust")
    for name in ("data", "validation_data", "run"):
        if kept.get(name):
            kept[name] = str(Path(kept[name]).resolve())
    return kept


def as_yaml(settings: Namespace) -> str:
    """The settings of a fit, from which the run can be made again."""
    return training().dump(of_training(with_absolute_paths(settings)))
