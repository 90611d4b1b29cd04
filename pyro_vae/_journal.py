"""What a run writes while it goes on, so that another process can go on from there."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyro_vae import __about__
from pyro_vae._checkpoints import Checkpoints, locked
from pyro_vae._described import describe_vae
from pyro_vae._hashes import Trained
from pyro_vae._origin import broken_weights
from pyro_vae._trees import make_folder
from pyro_vae.checkpoint import VAE_KEY
from pyro_vae.errors import OutputError, PyroVAEError, SettingsError
from pyro_vae.parallel.group import ALONE, Group
from pyro_vae.training import Run

MUST_AGREE = ("estimator", "optimizer", "batch_size", "data", "data_hash", "seed", "precision")
"""What a run must be resumed with as it was begun."""


class Journal:
    """The checkpoints of a run, if it has any.

    Args:
        checkpoints: a run folder to keep them in that has none yet, or how often to keep them where.
        resume: a run folder that has some, to go on from.
        group: the processes that train together; the first alone writes, and reads for all.

    Raises:
        SettingsError: if the two are of different folders.
        OutputError: if the folder cannot be written, or another run writes to it.
    """

    def __init__(
        self, checkpoints: Checkpoints | str | Path | None, resume: str | Path | None, group: Group = ALONE
    ) -> None:
        given = resume if checkpoints is None else checkpoints
        self.saved = given if given is None or isinstance(given, Checkpoints) else Checkpoints(given)
        self.resumes = resume is not None
        if self.resumes and self.saved is not None and self.saved.run != Path(str(resume)):
            raise SettingsError(f"resume is {resume}, and checkpoints are to go to {self.saved.run}; give one folder")
        self.written, self.group = -1, group
        self._held = ExitStack()

    def __enter__(self) -> "Journal":
        if self.saved is not None and self.group.first:
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
        found = self._newest()
        run.due = lambda: self.group.first and self.saved is not None and self.saved.due(run.step)
        if found is None:
            if self.resumes:
                run.say(f"{self.saved.run} holds no checkpoint yet; training begins at its first step")
            return
        if not self.resumes:
            raise OutputError(
                f"{self.saved.run}: already holds checkpoints of a run; go on from them with resume, "
                "or choose another folder"
            )
        step, tree, about = found
        _refuse_other(run, about, self.saved.run)
        if known := about.get("trained_on"):
            run.vae.trained_on = Trained.from_text(known)
        run.resume(tree)
        self.written = step
        run.say(f"Going on from step {step} of {self.saved.run}")
        if (then := about.get("processes")) != run.ranks:
            run.say(f"It was begun by {then} and is gone on with by {run.ranks} processes, so with other noise")

    def _newest(self) -> tuple[int, Any, dict[str, Any]] | None:
        """What the first process finds."""
        found = None
        with self.group.alike(PyroVAEError):
            if self.saved is not None and self.group.first and (whole := self.saved.newest()) is not None:
                found = whole[:3]
        found = self.group.agreed(found)
        if found is not None and self.saved is not None:
            self.saved.written(found[0])
        return found

    def keep(self, run: Run) -> None:
        """Write a checkpoint where one is due, and at the end."""
        if self.saved is None or run.step == self.written:
            return
        if not (run.over or (self.saved.due(run.step) if self.group.alone else run.stepping.wanted)):
            return
        if broken_weights(run.vae):
            return  # the next step will say so
        state = run.state()
        with self.group.alike(PyroVAEError):
            if self.group.first:
                self.saved.write(run.step, {**state, VAE_KEY: describe_vae(run.vae)[0]}, _about(run))
        self.saved.written(run.step)
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
