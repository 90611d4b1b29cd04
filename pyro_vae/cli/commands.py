"""The commands and their parsers, without importing what a command needs in order to run."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from pyro_vae.__about__ import __version__
from pyro_vae.cli.parsers import STRICT, parser_of

COMMANDS = {
    "demo": "Train the note's VAE on handwritten digits, compare its ELBOs, check them, and draw it all.",
    "fit": "Train a VAE on your data, and write its weights, history and figures to a new folder.",
    "compare": "Compare estimators at the start, the middle and the end of training: which one to train with?",
    "swap": "Train every combination of parts on your data, and rank them by the evidence of held-out data.",
    "check": "Check a trained VAE's posteriors and predictions, and write a report to look at.",
    "explore": "Write a page to explore a trained VAE: its latent space, its rows, and what the decoder draws.",
}
"""The name of each command, and what it does."""

EPILOGUE = """
Examples:
  pyro-vae demo
  pyro-vae fit --data table.csv --out runs/first --latent_dim 4  (until the validation ELBO stops rising)
  pyro-vae fit --data table.csv --out runs/second --epochs 200
  pyro-vae fit --data mnist/ --out runs/mnist --hidden [400] --optimizer.lr 1e-3
  pyro-vae fit runs/first                    (after a stop: on to the same weights; or further, with --epochs 400)
  pyro-vae compare runs/first
  pyro-vae compare --data table.csv --out runs/seeds --seeds "[0, 1, 2]" --workers 3
  pyro-vae swap --data table.csv --out runs/swap --priors "[StandardNormal, Laplace, GaussianMixture]"
  pyro-vae swap runs/swap                    (after a stop: trains what is left; so does compare runs/seeds)
  pyro-vae check runs/first
  pyro-vae explore runs/first                (one HTML file to click in; needs pip install 'pyro-vae[explore]')
  pyro-vae encode runs/first --data new.csv --out latents.csv
  pyro-vae impute runs/first --data gaps.csv --missing "NA,-999" --out filled.parquet
  pyro-vae fit --print_config > fit.yaml     (then edit, and: pyro-vae fit --config fit.yaml)

A run folder is given right after the command: fit and swap go on with it, the others look at it or use it. (In full:
--resume RUN and --run RUN.) Without --out, results go to runs/COMMAND, or, of a run, to RUN/COMMAND; if that is taken,
to the next free name.
"""


def demo_settings(out: str | None = None, *, epochs: int = 200, seed: int = 0, device: str = "auto") -> None:
    """Train the note's VAE on handwritten digits, compare its ELBOs, check them, and draw it all.

    Args:
        out: a new folder for the results; by default runs/demo, or the next free name.
        epochs: passes over the training data.
        seed: of the split, the weights, the order of the data and the noise.
        device: auto (CUDA where there is one), cpu or cuda.
    """


def resume_settings(
    resume: str,
    *,
    data: str | None = None,
    validation_data: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    device: str | None = None,
    trust: str | None = None,
) -> None:
    """Go on with a run that was stopped or killed, from its newest whole checkpoint.

    Args:
        resume: the folder of the run.
        data: where its data are now, if they were moved; they must be the same rows.
        validation_data: the same of its held-out data.
        epochs: passes over the data, those before included; by default as many as it was begun with.
        steps: the new limit on all steps of the run, if it stops by its validation ELBO.
        device: auto, cpu or cuda; by default the one it was begun on. Another gives slightly different numbers.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def resume_sweep_settings(resume: str, *, workers: int | None = None, trust: str | None = None) -> None:
    """Go on with a swap, or a compare over seeds, that was stopped or killed; the trainings that are done are kept.

    Args:
        resume: the folder of its results.
        workers: how many trainings run at the same time; by default as before.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def check_settings(
    run: str,
    *,
    data: str | None = None,
    missing: str | None = None,
    out: str | None = None,
    rows: int = 200,
    budget: float = 180.0,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Check a trained VAE's posteriors and predictions, and write a report to look at.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        data: held-out data, as for fit; by default those of the run.
        missing: values of --data that say that a value is missing, as for fit; by default those of the run.
        out: a new folder for the report; by default RUN/check, or the next free name.
        rows: at most so many of the held-out data.
        budget: seconds; diagnostics that would take longer than what is left of them are left out by name.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def explore_settings(
    run: str,
    *,
    data: str | None = None,
    missing: str | None = None,
    out: str | None = None,
    rows: int = 2000,
    num_particles: int = 1000,
    draws: int = 100,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Write a page to explore a trained VAE: its latent space, its rows, and what the decoder draws.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        data: held-out data, as for fit; by default those of the run.
        missing: values of --data that say that a value is missing, as for fit; by default those of the run.
        out: a new file for the page, .html; by default RUN/explore.html, or the next free name.
        rows: at most so many of the held-out rows, chosen at random; fewer where more do not fit into 5 MB.
        num_particles: draws per row for khat, the effective sample size and log p(x).
        draws: for each row, for its reconstruction and its ELBO.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def encode_settings(
    run: str,
    *,
    data: str | None = None,
    out: str | None = None,
    missing: str | None = None,
    draws: int = 1000,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Write the latents of data, the mean and standard deviation of q(z|x), to a table.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        data: as for fit, with the columns of the run, which are found by name; by default the run's held-out data.
        out: a new file for the table, .csv, .parquet or .npy (which holds z alone); by default RUN/encode.csv, or the
            next free name.
        missing: values of --data that say that a value is missing, as for fit; by default those of the run.
        draws: for each row, where q(z|x) has no mean in closed form.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def reconstruct_settings(
    run: str,
    *,
    data: str | None = None,
    out: str | None = None,
    missing: str | None = None,
    draws: int = 100,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Write what a trained VAE expects of each feature, given the whole row, to a table.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        data: as for fit, with the columns of the run, which are found by name; by default the run's held-out data.
        out: a new file for the table, .csv, .parquet or .npy (which holds x alone); by default RUN/reconstruct.csv, or
            the next free name.
        missing: values of --data that say that a value is missing, as for fit; by default those of the run.
        draws: of z for each row.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def impute_settings(
    run: str,
    *,
    data: str | None = None,
    out: str | None = None,
    missing: str | None = None,
    draws: int = 1000,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Fill in the missing values of data by what a trained VAE expects of them, and write the table.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        data: as for fit, with the columns of the run, which are found by name; by default the run's held-out data.
        out: a new file for the table, .csv, .parquet or .npy (which holds x alone); by default RUN/impute.csv, or the
            next free name.
        missing: values of --data that say that a value is missing, as for fit, besides empty cells and NaN; by default
            those of the run.
        draws: of z for each row in which something is missing.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def sample_settings(
    run: str,
    *,
    n: int | None = None,
    data: str | None = None,
    out: str | None = None,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Draw new rows from a trained VAE, and write them to a table.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        n: how many rows; by default 1000, or one for each row of --data.
        data: of a run with a context, a table with its context columns, found by name: a row is drawn in the context
            of each; if the table has one row, all n in its context.
        out: a new file for the table, .csv, .parquet or .npy; by default RUN/sample.csv, or the next free name.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


def score_settings(
    run: str,
    *,
    data: str | None = None,
    out: str | None = None,
    missing: str | None = None,
    method: Literal["iw", "psis", "ais", "ais_prior"] = "iw",
    num_particles: int | None = None,
    draws: int = 100,
    seed: int = 0,
    trust: str | None = None,
) -> None:
    """Write log p(x) of each row, its ELBO and its reconstruction, and how unusual it is, to a table.

    Args:
        run: the folder of a run that pyro-vae fit wrote.
        data: as for fit, with the columns of the run, which are found by name; by default the run's held-out data. Rows
            that were not trained on get a p-value, by comparison with the run's held-out data: small for anomalies.
        out: a new file for the table, .csv, .parquet or .npy; by default RUN/score.csv, or the next free name.
        missing: values of --data that say that a value is missing, as for fit; by default those of the run.
        method: of log p(x), as in pyro_vae.log_evidence.
        num_particles: draws or chains per row for log p(x); by default 500 draws or 32 chains.
        draws: for each row, for its ELBO and its reconstruction.
        seed: of all draws.
        trust: packages of your own whose classes the settings of the run may name, and folders outside it that its
            callbacks may write to, as "mypackage,logs"; of the run folder itself no code is ever run.
    """


TABLES: dict[str, Callable[..., None]] = {
    "encode": encode_settings,
    "reconstruct": reconstruct_settings,
    "impute": impute_settings,
    "sample": sample_settings,
    "score": score_settings,
}
"""The commands that write a table, each by the function of :mod:`pyro_vae` that has its name, and their settings."""

COMMANDS |= {name: (settings.__doc__ or "").splitlines()[0] for name, settings in TABLES.items()}

RUN_FLAGS = {"fit": "--resume", "compare": "--run", "swap": "--resume"} | dict.fromkeys(
    ("check", "explore", *TABLES), "--run"
)
"""The flag of the run folder that stands right after a command."""


def parser(flags: Sequence[str] = ()) -> ArgumentParser:
    """The command line, in which only the command that the flags begin with has its settings."""
    about = sys.modules["pyro_vae"].__doc__
    program = ArgumentParser(prog="pyro-vae", description=about, epilog=EPILOGUE, version=__version__, **STRICT)
    program.formatter_class = _keep_lines(program.formatter_class)
    commands = program.add_subcommands(dest="command", required=True)
    for name, text in COMMANDS.items():
        asked = [*flags[:1]] == [name]
        commands.add_subcommand(name, _parser_of(name, flags) if asked else ArgumentParser(**STRICT), help=text)
    return program


def options(flags: Sequence[str]) -> list[str]:
    """The names of the commands, or of the settings of the one that the flags begin with."""
    if not flags or flags[0] not in COMMANDS:
        return list(COMMANDS)
    every = (option for action in _parser_of(flags[0], flags)._actions for option in action.option_strings)
    return [option.removeprefix("--") for option in every if option.startswith("--")]


def _parser_of(name: str, flags: Sequence[str]) -> ArgumentParser:
    """The settings of a command; ``fit --resume`` has others than a new run, which brings its own."""
    if name == "demo":
        return parser_of(demo_settings)
    if name == "check":
        return parser_of(check_settings)
    if name == "explore":
        return parser_of(explore_settings)
    if name in TABLES:
        return parser_of(TABLES[name])
    from pyro_vae.cli import settings

    resumes = any(flag.split("=")[0] == "--resume" for flag in flags)
    if resumes and name == "fit":
        return settings.command("fit", resume_settings)
    if resumes:
        return parser_of(resume_sweep_settings)
    functions: dict[str, Callable[..., Any]] = {
        "fit": settings.fit_settings, "compare": settings.compare_settings, "swap": settings.swap_settings,
    }  # fmt: skip
    return settings.command(name, functions[name])


def with_named_run(flags: Sequence[str]) -> list[str]:
    """Name the run folder by its flag where it is given by its place, right after the command or at the end.

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
    if len(settings) > 1 and not settings[-2].startswith("-") and Path(settings[-1]).is_dir():
        return [command, flag, settings[-1], *settings[:-1]]
    return list(flags)


def _keep_lines(formatter: type) -> type:
    """The formatter, but leaving the examples as they are typed."""

    class Formatter(formatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text if "\n" in text else super()._fill_text(text, width, indent)

    return Formatter
