"""``pyro-vae fit``: start or resume a run."""

from pathlib import Path

from jsonargparse import Namespace

from pyro_vae.cli.fit import WriteSettings, build_untrained, saving_after_divergence, settings_of, train
from pyro_vae.cli.interrupts import interruptible
from pyro_vae.cli.report import save_fit, show_baseline, show_fit, write_held_out_rows
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.core.format import Console
from pyro_vae.core.validation import whole
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.distributed.group import launched, writes
from pyro_vae.train.distributed.launch import launch


def run_fit(asked: Namespace) -> int:
    """Train, and write the results to the run folder."""
    if "resume" not in asked:
        if asked.out is None and launched():
            raise SettingsError("out is not given, and each worker would choose its own folder; give --out")
        asked.out = folder_for("fit", asked.out)
    if whole("devices", asked.devices, 1) > 1 and not launched():
        if "resume" not in asked:
            with RunFolder(asked.out):  # raises before the workers start, which takes seconds
                pass
        with interruptible(asked.get("resume") or asked.out):
            code: int = launch(asked.devices, run_fit, asked)
        return code
    resume, settings = asked.get("resume"), _resolve(asked)
    vae, data = build_untrained(settings, resume)
    checkpoints = Checkpoints(settings.out, steps=asked.checkpoint_steps, minutes=asked.checkpoint_minutes)
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


def _resolve(asked: Namespace) -> Namespace:
    """Return the settings to train with: those of the command line, or of the run that resumes."""
    if "resume" not in asked:
        return asked
    settings = settings_of(asked.resume, asked.trust)
    settings.out = asked.resume
    if asked.epochs is not None and settings.epochs is None:
        raise SettingsError(f"{asked.resume} stops by its validation ELBO, not after a number of epochs; raise --steps")
    if asked.steps is not None and settings.epochs is not None:
        raise SettingsError(f"{asked.resume} has {settings.epochs} epochs; raise --epochs, or leave --steps out")
    for name in ("data", "validation_data", "epochs", "steps", "device"):
        if asked[name] is not None:
            settings[name] = asked[name]
        elif "data" in name and settings[name] and not Path(settings[name]).exists():
            raise DataError(f"{settings[name]}: no longer exists; give its new path with --{name}")
    return settings
