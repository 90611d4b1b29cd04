"""What a run writes while it goes on, so that another process can go on from there."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyro_vae import __about__
from pyro_vae._checkpoints import Checkpoints, locked
from pyro_vae._described import describe_vae
from pyro_vae._hashes import Trained
from pyro_vae._trees import make_folder
from pyro_vae.checkpoint import VAE_KEY
from pyro_vae.errors import OutputError, SettingsError
from pyro_vae.training import Run

MUST_AGREE = ("estimator", "optimizer", "batch_size", "data", "data_hash", "seed", "precision")
"""What a run must be resumed with as it was begun."""


class Journal:
    """The checkpoints of a run, if it has any.

    Args:
        checkpoints: a run folder to keep them in that has none yet, or how often to keep them where.
        resume: a run folder that has some, to go on from.

    Raises:
        SettingsError: if the two are of different folders.
        OutputError: if the folder cannot be written, or another run writes to it.
    """

    def __init__(self, checkpoints: Checkpoints | str | Path | None, resume: str | Path | None) -> None:
        given = resume if checkpoints is None else checkpoints
        self.saved = given if given is None or isinstance(given, Checkpoints) else Checkpoints(given)
        self.resumes = resume is not None
        if self.resumes and self.saved is not None and self.saved.run != Path(str(resume)):
            raise SettingsError(f"resume is {resume}, and checkpoints are to go to {self.saved.run}; give one folder")
        self.written = -1
        self._held = ExitStack()

    def __enter__(self) -> "Journal":
        if self.saved is not None:
            make_folder(self.saved.run)
            self._held.enter_context(locked(self.saved.run))
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def begin(self, run: Run) -> None:
        """Go on from the newest whole checkpoint, or see that there is none.

        Raises:
            OutputError: if a new run finds checkpoints of another.
            DataError: if there are some, and none is whole.
            SettingsError: if the run was begun with other settings.
        """
        if self.saved is None:
            return
        self.saved.say = run.say
        found = self.saved.newest()
        if found is None:
            if self.resumes:
                run.say(f"{self.saved.run} holds no checkpoint yet; training begins at its first step")
            return
        if not self.resumes:
            raise OutputError(
                f"{self.saved.run}: already holds checkpoints of a run; go on from them with resume, "
                "or choose another folder"
            )
        step, tree, about, _ = found
        _refuse_other(run, about, self.saved.run)
        if known := about.get("trained_on"):
            run.vae.trained_on = Trained.from_text(known)
        run.resume(tree)
        self.written = step
        run.say(f"Going on from step {step} of {self.saved.run}")

    def keep(self, run: Run) -> None:
        """Write a checkpoint where one is due, and at the end."""
        if self.saved is None or run.step == self.written or not (run.over or self.saved.due(run.step)):
            return
        if not all(weight.isfinite().all() for weight in run.vae.state_dict().values()):
            return  # the next step will say so
        self.saved.write(run.step, {**run.state(), VAE_KEY: describe_vae(run.vae)[0]}, _about(run))
        self.written = run.step


def _about(run: Run) -> dict[str, Any]:
    known = run.vae.trained_on
    return {**run.attributes, "trained_on": known.as_text() if known else None}


def _refuse_other(run: Run, about: dict[str, Any], folder: Any) -> None:
    for name in MUST_AGREE:
        if run.attributes[name] != about.get(name):
            then, now = (str(value) for value in (about.get(name), run.attributes[name]))
            raise SettingsError(f"{folder} was begun with {name} {then}, not {now}; resume it with what it had")
    changed = [name for name, version in __about__.versions().items() if about.get(name) != version]
    if changed:
        name = changed[0]
        run.say(f"{folder} was begun with {name} {about.get(name)}; with {run.attributes[name]} bits may differ")
