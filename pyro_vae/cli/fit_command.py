"""``pyro-vae fit``: start or resume a run."""

import os

from jsonargparse import Namespace

from pyro_vae.cli.fit import WriteSettings, build_untrained, saving_after_divergence, train
from pyro_vae.cli.interrupts import interruptible
from pyro_vae.cli.load_run import settings_of
from pyro_vae.cli.report import save_fit, show_baseline, show_fit, write_held_out_rows
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.core.format import Console
from pyro_vae.core.validation import whole
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.distributed.group import launched, writes
from pyro_vae.train.distributed.launch import launch


def run_fit(arguments: Namespace) -> int:
    """Train, and write the results to the run folder."""
    if "resume" not in arguments:
        if arguments.out is None and launched():
            raise SettingsError("out is not given, and each worker would choose its own folder; give --out")
        arguments.out = folder_for("fit", arguments.out)
    if whole("devices", arguments.devices, 1) > 1 and not launched():
        if "resume" not in arguments:
            with RunFolder(arguments.out):  # raises before the workers start, which takes seconds
                pass
        with interruptible(arguments.get("resume") or arguments.out):
            code: int = launch(arguments.devices, run_fit, arguments)
        return code
    resume, settings = arguments.get("resume"), _resolve(arguments)
    vae, data = build_untrained(settings, resume)
    checkpoints = Checkpoints(settings.out, steps=arguments.checkpoint_steps, minutes=arguments.checkpoint_minutes)
    if not writes():
        callbacks = [WriteSettings(None, settings)]
        result = train(settings, vae, data, checkpoints=checkpoints, resume=resume, callbacks=callbacks)
        return 130 if result.interrupted else 0
    with (
        interruptible(settings.out),
        RunFolder(settings.out) if resume is None else RunFolder.again(resume) as run,
        checkpoints.locked(),  # until all results are written
        saving_after_divergence(settings, vae, run),
    ):
        callbacks = [WriteSettings(run, settings)]
        result = train(settings, vae, data, checkpoints=checkpoints, resume=resume, callbacks=callbacks)
        show_fit(result, Console())
        if result.history.sizes["epoch"]:
            save_fit(run, result, data.held_out)
            write_held_out_rows(run, data)
            show_baseline(result, data.held_out, data.train, Console(), seed=settings.seed)
        run.show(Console())
        if result.interrupted:
            Console().print(f"Resume with: pyro-vae fit --resume {run.path}", soft_wrap=True)
    return 130 if result.interrupted else 0


def _resolve(arguments: Namespace) -> Namespace:
    """Return the settings to train with: those of the command line, or of the run that resumes."""
    if "resume" not in arguments:
        return arguments
    settings = settings_of(arguments.resume, arguments.trust)
    settings.out = arguments.resume
    if arguments.epochs is not None and settings.epochs is None:
        raise SettingsError(
            f"{arguments.resume} stops by its validation ELBO, not after a number of epochs; raise --steps"
        )
    if arguments.steps is not None and settings.epochs is not None:
        raise SettingsError(f"{arguments.resume} has {settings.epochs} epochs; raise --epochs, or leave --steps out")
    for name in ("data", "validation_data", "epochs", "steps", "device"):
        if arguments[name] is not None:
            settings[name] = arguments[name]
        elif "data" in name and settings[name] and not os.path.exists(settings[name]):
            raise DataError(f"{settings[name]}: no longer exists; give its new path with --{name}")
    return settings
