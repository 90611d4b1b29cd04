"""The commands and their parsers; importing this module does not import what the commands need to run."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from pyro_vae.__about__ import __version__
from pyro_vae.cli.parsers import STRICT, parser_of, trust_settings

COMMANDS = {
    "demo": "Train the note's VAE on handwritten digits, compare and check its ELBOs, and draw the figures.",
    "fit": "Train a VAE on your data, and write its weights, history and figures to a new folder.",
    "compare": "Compare estimators at the start, middle and end of training, to choose one to train with.",
    "swap": "Train every combination of components on your data, and rank them by held-out evidence.",
    "check": "Check a trained VAE's posteriors and predictions, and write an HTML report.",
    "explore": "Write an interactive HTML page of a trained VAE: its latent space, rows and decoder.",
}
"""The name of each command, and what it does."""

EPILOGUE = """
Examples:
  pyro-vae demo
  pyro-vae fit --data table.csv --out runs/first --latent_dim 4  (trains until the validation ELBO stops rising)
  pyro-vae fit --data table.csv --out runs/second --epochs 200
  pyro-vae fit --data mnist/ --out runs/mnist --hidden [400] --optimizer.lr 1e-3
  pyro-vae fit runs/first                    (resumes an interrupted run; with --epochs 400, trains for longer)
  pyro-vae compare runs/first
  pyro-vae compare --data table.csv --out runs/seeds --seeds "[0, 1, 2]" --workers 3
  pyro-vae swap --data table.csv --out runs/swap --priors "[StandardNormal, Laplace, GaussianMixture]"
  pyro-vae swap runs/swap                    (resumes an interrupted sweep; so does compare runs/seeds)
  pyro-vae check runs/first
  pyro-vae check runs/first/check            (resumes an interrupted check)
  pyro-vae explore runs/first                (an interactive page; needs pip install 'pyro-vae[explore]')
  pyro-vae encode runs/first --data new.csv --out latents.csv
  pyro-vae impute runs/first --data gaps.csv --missing "NA,-999" --out filled.parquet
  pyro-vae fit --print_config > fit.yaml     (edit the file, then: pyro-vae fit --config fit.yaml)

Give a run folder right after the command: fit and swap resume it, the other commands read it (long forms: --resume RUN
and --run RUN). Without --out, results go to runs/COMMAND, or to RUN/COMMAND for a command that reads a run; if that
name is taken, a number is added.
"""


def demo_settings(out: str | None = None, *, epochs: int = 200, seed: int = 0, device: str = "auto") -> None:
    """Train the note's VAE on handwritten digits, compare and check its ELBOs, and draw the figures.

    Args:
        out: a new folder for the results; by default runs/demo, with a number added if that name is taken.
        epochs: passes over the training data.
        seed: the seed of the split, the initial weights, the order of the data and the noise.
        device: auto (CUDA if available), cpu or cuda.
    """


def trained_settings(run: str, *, data: str | None = None, missing: str | None = None, seed: int = 0) -> None:
    """Which trained VAE, data and seed to use.

    Args:
        run: a run folder that pyro-vae fit wrote; for check also the folder of an interrupted check, to resume it.
        data: data with the columns of the run, matched by name; by default the run's held-out data.
        missing: the codes for a missing value in --data, as for fit; by default those of the run.
        seed: the seed of all draws.
    """


def table_settings(*, out: str | None = None) -> None:
    """Where to write the table.

    Args:
        out: a new file, .csv, .parquet or .npy (which holds only x or z, if the table has one of them); by default
            RUN/COMMAND.csv, with a number added if that name is taken.
    """


def resume_settings(
    resume: str,
    *,
    data: str | None = None,
    validation_data: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    device: str | None = None,
) -> None:
    """Resume a run that was stopped or killed, from its newest valid checkpoint.

    Args:
        resume: the run folder.
        data: the new path of the data, if they were moved; the rows must be the same.
        validation_data: the new path of the held-out data, if they were moved.
        epochs: the total number of passes over the data, including those already done; by default that of the run.
        steps: the new limit on the total number of steps, for a run that stops by its validation ELBO.
        device: auto, cpu or cuda; by default that of the run. Another device gives slightly different numbers.
    """


def resume_sweep_settings(resume: str, *, workers: int | None = None, cluster: str | None = None) -> None:
    """Resume a swap, or a compare over seeds, that was stopped or killed; finished trainings are not repeated.

    Args:
        resume: the folder of its results.
        workers: how many trainings run at the same time; by default as many as before, and at most one per core.
        cluster: the address of a Ray cluster to run them on; by default none.
    """


def check_settings(*, out: str | None = None, rows: int = 200, budget: float = 180.0) -> None:
    """Check a trained VAE's posteriors and predictions, and write an HTML report.

    Args:
        out: a new folder for the report; by default RUN/check, with a number added if that name is taken.
        rows: the largest number of held-out rows to check.
        budget: the time limit in seconds; diagnostics that would exceed the remaining time are skipped and listed.
    """


def explore_settings(*, out: str | None = None, rows: int = 2000, num_particles: int = 1000, draws: int = 100) -> None:
    """Write an interactive HTML page of a trained VAE: its latent space, rows and decoder.

    Args:
        out: a new file, .html; by default RUN/explore.html, with a number added if that name is taken.
        rows: the largest number of held-out rows to show, chosen at random; fewer if the page would exceed 5 MB.
        num_particles: draws per row for k̂, the effective sample size and log p(x).
        draws: draws of z per row for the reconstruction and the ELBO.
    """


def encode_settings(*, draws: int = 1000) -> None:
    """Encode data: write the mean and standard deviation of q(z|x) to a table.

    Args:
        draws: the number of draws for each row, used if the mean of q(z|x) has no closed form.
    """


def reconstruct_settings(*, draws: int = 100) -> None:
    """Reconstruct data: write the posterior predictive mean of each feature to a table.

    Args:
        draws: the number of draws of z for each row.
    """


def impute_settings(*, draws: int = 1000) -> None:
    """Impute missing values by their mean given the observed values, and write the completed table.

    Empty cells and NaN are missing, in addition to the codes of --missing.

    Args:
        draws: the number of draws of z for each row with a missing value.
    """


def sample_settings(run: str, *, n: int | None = None, data: str | None = None, seed: int = 0) -> None:
    """Sample new rows from a trained VAE, and write them to a table.

    Args:
        run: a run folder that pyro-vae fit wrote.
        n: the number of rows; by default 1000, or one for each row of --data.
        data: for a conditional VAE, a table with the context columns, matched by name: one row is drawn for each
            context, or all n rows for a single context.
        seed: the seed of all draws.
    """


def score_settings(
    *, method: Literal["iw", "psis", "ais", "ais_prior"] = "iw", num_particles: int | None = None, draws: int = 100
) -> None:
    """Score data: write log p(x), the ELBO, the reconstruction and a p-value of each row to a table.

    New rows get a p-value by comparison with the run's held-out data; a small one marks an anomaly.

    Args:
        method: the estimator of log p(x), as in pyro_vae.log_evidence.
        num_particles: draws or chains per row for log p(x); by default 500 draws or 32 chains.
        draws: draws of z per row for the ELBO and the reconstruction.
    """


TABLES: dict[str, Callable[..., None]] = {
    "encode": encode_settings,
    "reconstruct": reconstruct_settings,
    "impute": impute_settings,
    "sample": sample_settings,
    "score": score_settings,
}
"""The commands that write a table, and their settings; each calls the function of :mod:`pyro_vae` with its name."""

NOT_TRAINING: dict[str, tuple[Callable[..., None], ...]] = {
    "demo": (demo_settings,),
    "check": (check_settings, trained_settings, trust_settings),
    "explore": (explore_settings, trained_settings, trust_settings),
    **{name: (function, trained_settings, table_settings, trust_settings) for name, function in TABLES.items()},
    "sample": (sample_settings, table_settings, trust_settings),
}
"""The settings of all commands but fit, compare and swap."""

COMMANDS |= {name: (settings.__doc__ or "").splitlines()[0] for name, settings in TABLES.items()}

RUN_FLAGS = {"fit": "--resume", "compare": "--run", "swap": "--resume"} | dict.fromkeys(
    ("check", "explore", *TABLES), "--run"
)
"""The flag for a run folder that is given right after a command."""


def parser(flags: Sequence[str] = ()) -> ArgumentParser:
    """Return the parser of the command line; only the command at the start of ``flags`` gets its settings."""
    about = sys.modules["pyro_vae"].__doc__
    program = ArgumentParser(prog="pyro-vae", description=about, epilog=EPILOGUE, version=__version__, **STRICT)
    program.formatter_class = _keep_lines(program.formatter_class)
    commands = program.add_subcommands(dest="command", required=True)
    for name, text in COMMANDS.items():
        is_chosen = [*flags[:1]] == [name]
        commands.add_subcommand(name, parser_for(name, flags) if is_chosen else ArgumentParser(**STRICT), help=text)
    return program


def options(flags: Sequence[str]) -> list[str]:
    """Return the names of the commands, or of the settings of the command at the start of ``flags``."""
    if not flags or flags[0] not in COMMANDS:
        return list(COMMANDS)
    every = (option for action in parser_for(flags[0], flags)._actions for option in action.option_strings)
    return [option.removeprefix("--") for option in every if option.startswith("--")]


def parser_for(name: str, flags: Sequence[str] = ()) -> ArgumentParser:
    """Return the parser of a command; a run that is resumed has its settings already, and takes fewer.

    Example:
        >>> parser_for("check").get_defaults().rows
        200
    """
    if name in NOT_TRAINING:
        return parser_of(*NOT_TRAINING[name])
    from pyro_vae.cli import settings

    resumes = any(flag.split("=")[0] == "--resume" for flag in flags)
    if resumes and name == "fit":
        return parser_of(resume_settings, settings.run_settings, trust_settings)
    if resumes:
        return parser_of(resume_sweep_settings, trust_settings)
    functions: dict[str, Callable[..., Any]] = {
        "fit": settings.fit_settings, "compare": settings.compare_settings, "swap": settings.swap_settings,
    }  # fmt: skip
    return settings.command(name, functions[name])


def with_named_run(flags: Sequence[str]) -> list[str]:
    """Put the flag before a run folder that is given without it, right after the command or at the end.

    Example:
        >>> with_named_run(["check", "runs/first", "--rows", "50"])
        ['check', '--run', 'runs/first', '--rows', '50']
        >>> with_named_run(["fit", "--epochs", "5"])
        ['fit', '--epochs', '5']
    """
    flag = RUN_FLAGS.get(next(iter(flags), ""))
    if flag is None:
        return list(flags)
    command, *settings = flags
    if settings and not settings[0].startswith("-"):
        return [command, flag, *settings]
    if len(settings) > 1 and not settings[-2].startswith("-") and os.path.isdir(settings[-1]):
        return [command, flag, settings[-1], *settings[:-1]]
    return list(flags)


def _keep_lines(formatter: type) -> type:
    """Return a formatter that keeps the line breaks of the examples."""

    class Formatter(formatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text if "\n" in text else super()._fill_text(text, width, indent)

    return Formatter
