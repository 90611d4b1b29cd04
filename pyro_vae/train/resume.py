"""Write the checkpoints of a run, and resume the run from them if its settings are unchanged."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import __about__
from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.traces import Loss, TensorELBO, particles_of
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.streams.base import Streamed
from pyro_vae.errors import DataError, OutputError, PyroVAEError, SettingsError
from pyro_vae.train.callbacks.base import describe_arguments, describe_value
from pyro_vae.train.checkpoint.describe import describe_again, describe_vae
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.save_load import VAE_KEY, read_trained_on, validate_weights
from pyro_vae.train.checkpoint.tensor_file import encode, make_folder
from pyro_vae.train.distributed.group import ALONE, Group
from pyro_vae.train.divergence_report import broken_weights
from pyro_vae.train.run import Run

MUST_AGREE = ("estimator", "optimizer", "batch_size", "data", "data_hash", "seed", "precision")
"""Attributes that must be equal in a resumed run."""

STATE = 2
"""The version of the training state in a checkpoint; other versions cannot be resumed."""


class Journal:
    """Write and read the checkpoints of a run, if it has a run folder.

    Args:
        checkpoints: a new run folder, or the schedule and folder of the checkpoints.
        resume: a run folder with checkpoints, to resume.
        group: the processes that train together; only the first writes, and reads for all.

    Raises:
        SettingsError: if the two name different folders.
        OutputError: if the folder cannot be written, or another run writes to it.
    """

    def __init__(
        self, checkpoints: Checkpoints | str | Path | None, resume: str | Path | None, group: Group = ALONE
    ) -> None:
        given = resume if checkpoints is None else checkpoints
        self.saved = given if given is None or isinstance(given, Checkpoints) else Checkpoints(given)
        self.resumes = resume is not None
        if self.resumes and self.saved is not None and self.saved.run != Path(str(resume)):
            raise SettingsError(f"resume is {resume}, but checkpoints go to {self.saved.run}; use the same folder")
        self.written, self.group = (-1, 0), group
        self.begun_with: dict[str, Any] = {}
        self.found: tuple[Path, Any, dict[str, Any]] | None = None
        self._held = ExitStack()

    def __enter__(self) -> "Journal":
        if self.saved is not None and self.group.first:
            if self.resumes and not os.path.isdir(self.saved.run):
                raise DataError(f"{self.saved.run}: not a folder, so there is no run to resume; pass a run folder")
            make_folder(self.saved.run)
            self._held.enter_context(self.saved.locked())
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    def find(self, run: Run, say: Callable[[str], None]) -> None:
        """Find the newest intact checkpoint, if any, and validate the run against it.

        Raises:
            OutputError: if a new run finds checkpoints of another run.
            DataError: if no checkpoint is intact, or if it has another architecture or an earlier pyro-vae wrote it.
            SettingsError: if the run was started with other settings.
        """
        if self.saved is None:
            return
        self.saved.say = say
        self.begun_with, self.described = _begun_with(run), describe_vae(run.vae)[0]
        self.found = self._newest()
        if self.found is None:
            if self.resumes:
                say(f"{self.saved.run} holds no checkpoint yet; training starts from step 0")
            return
        if not self.resumes:
            raise OutputError(
                f"{self.saved.run}: already holds checkpoints of a run; resume it with resume=, or choose another "
                "folder"
            )
        path, tree, about = self.found
        if about.get("state") != STATE:
            raise DataError(
                f"{self.saved.run} was started by an earlier pyro-vae and cannot be resumed by this version; load its "
                "weights with pyro_vae.load, and train them in a new run"
            )
        own = {name: run.attributes[name] for name in MUST_AGREE}
        with _refusing_damage(path):
            _validate_settings({**about, **about["begun_with"]}, {**own, **self.begun_with}, self.saved.run)
            _tell_other_versions(run, about, self.saved.run, say)
            validate_weights(run.vae, tree["weights"], self.saved.run)
            _validate_parts(self.described, tree[VAE_KEY], self.saved.run)
            _validate_callbacks(run, tree)

    def begin(self, run: Run) -> None:
        """Resume from the checkpoint that was found.

        Raises:
            SettingsError: if a checkpoint cannot hold the state of the run, or its callbacks had other settings.
        """
        if self.saved is None:
            return
        callbacks = {"callbacks": _callbacks(run)}  # known only after their start, where Schedule makes its scheduler
        self.begun_with |= callbacks
        if self.found is not None:
            with _refusing_damage(self.found[0]):
                _validate_settings(self.found[2]["begun_with"], callbacks, self.saved.run)
        encode(run.state())  # fail now, not at the first checkpoint minutes later
        run.due = self.due
        if self.found is None:
            return
        path, tree, about = self.found
        self.found = None  # free the memory: the run now holds the state
        run.vae.trained_on = read_trained_on(about, path) or run.vae.trained_on
        with _refusing_damage(path):
            if tree["progress"]["step"] != about["step"]:
                raise ValueError(f"it holds the state of step {tree['progress']['step']}")
            if tree["good"] is not None:
                validate_weights(run.vae, tree["good"]["weights"], path)
            run.resume(tree)
        self.written = run.step, run.rollbacks
        run.say(f"Resuming from step {run.step} of {self.saved.run}")
        if (then := about.get("processes")) != run.ranks:
            run.say(f"resuming with {run.ranks} processes (started with {then}): the random draws will differ")

    def _newest(self) -> tuple[Path, Any, dict[str, Any]] | None:
        """Read the newest checkpoint on the first process, for all."""
        found = None
        with self.group.raise_together(PyroVAEError):
            if self.saved is not None and self.group.first and (newest := self.saved.newest()) is not None:
                _, tree, about, path = newest
                found = path, tree, about
        found = self.group.broadcast(found)
        if found is not None and self.saved is not None:
            self.saved.written(found[2]["step"])
        return found

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due on this process."""
        return self.group.first and self.saved is not None and self.saved.due(step)

    def write_if_due(self, run: Run) -> None:
        """Write a checkpoint when one is due, after a rollback, and at the end."""
        now = run.step, run.rollbacks
        if self.saved is None or now == self.written:
            return
        due = self.saved.due(run.step) if self.group.alone else run.stepping.wanted
        if not (due or run.over or run.rollbacks != self.written[1]):
            return
        if broken_weights(run.vae):
            return  # the next step reports them
        state = run.state()
        with self.group.raise_together(PyroVAEError):
            if self.group.first:
                known = run.vae.trained_on
                about = {
                    "state": STATE,
                    "trained_on": known.as_text() if known else None,
                    "begun_with": self.begun_with,
                }
                described = describe_again(run.vae) if self.described else None
                self.saved.write(run.step, {**state, VAE_KEY: described}, {**run.attributes, **about})
        self.saved.written(run.step)
        self.written = now


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Raise a DataError that names the checkpoint, if its state is not of a training of this VAE."""
    try:
        yield
    except (PyroVAEError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: the state of the training is damaged, or not of this VAE ({in_a_line(error)}); delete it to "
            "resume from the checkpoint before it, or train anew"
        ) from error


def validation_hash(run: Run) -> str:
    """Hash the validation data of a run."""
    held_out = run.watched.get("validation")
    return "none" if held_out is None else data_hash(row_hashes(held_out))


def _begun_with(run: Run) -> dict[str, Any]:
    """Collect further settings that must be equal in a resumed run."""
    return {
        "particles": particles_of(run.loss),
        "settings of the estimator": _of_estimator(run.loss),
        "settings of the optimizer": {name: describe_value(value) for name, value in run.optimizer.defaults.items()},
        "schedule of the learning rate": _schedule(run.scheduler),
        "clip_norm": run.optim.clip_norm,
        "validation data": validation_hash(run),
        "order of the data": run.source.ordered(run.batch_size) if isinstance(run.source, Streamed) else "in memory",
        "frozen parameters": [name for name, value in run.vae.named_parameters() if not value.requires_grad],
        "parts in evaluation mode": [name for name, part in run.vae.named_modules() if not part.training],
    }


def _of_estimator(loss: Loss) -> dict[str, str]:
    """Collect the settings of a Pyro estimator or a partial function, whose name does not contain them."""
    if isinstance(loss, partial):
        given = [*enumerate(loss.args), *loss.keywords.items()]
        return {str(name): describe_value(value) for name, value in given}
    if isinstance(loss, TensorELBO) or not isinstance(loss, ELBO):
        return {}
    names = inspect.signature(type(loss)).parameters.keys() - {"max_plate_nesting"}  # set from the model
    return {name: describe_value(vars(loss)[name]) for name in sorted(names & vars(loss).keys())}


def _schedule(scheduler: LRScheduler | None) -> Any:
    """Collect the initial state of a learning-rate schedule."""
    if scheduler is None:
        return "none"
    return {"class": type(scheduler).__name__, **{k: describe_value(v) for k, v in scheduler.state_dict().items()}}


def _callbacks(run: Run) -> dict[str, Any]:
    """Collect the settings of each stateful callback, by its class."""
    found: dict[str, Any] = {}
    for callback in run.stateful_callbacks:
        name = type(callback).__name__
        while name in found:  # a second callback of the class
            name += "'"
        own = getattr(callback, "scheduler", None)
        found[name] = {
            **describe_arguments(callback),
            "its schedule": _schedule(own if isinstance(own, LRScheduler) else None),
        }
    return found


def _validate_parts(now: Any, then: Any, folder: Any) -> None:
    """Raise if a VAE has other components, or other settings of them, even where its weights have the same shapes."""
    if then is not None and (other := _other(then["made"], (now or then)["made"], "vae")):
        raise SettingsError(f"{folder} was started with {other}; resume it with the original VAE")


def _other(then: Any, now: Any, where: str) -> str:
    """Say where two descriptions differ, or return an empty string; of tensors, compare only the shapes."""
    if isinstance(then, Tensor) and isinstance(now, Tensor):
        return "" if then.shape == now.shape else f"{where} of shape {tuple(then.shape)}, not {tuple(now.shape)}"
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys():
        inner = ((key, then[key], now[key]) for key in then)
    elif isinstance(then, list) and isinstance(now, list | tuple) and len(then) == len(now):
        inner = ((i, *pair) for i, pair in enumerate(zip(then, now, strict=True)))
    else:
        return "" if repr(then) == repr(now) else f"{where} {_short(then)}, not {_short(now)}"
    return next(filter(None, (_other(a, b, _place(where, key)) for key, a, b in inner)), "")


def _place(where: str, key: Any) -> str:
    return where if key in ("module", "modules", "arguments", "attributes", "class") else f"{where}.{key}"


def _short(value: Any) -> str:
    kind = value.get("class") if isinstance(value, dict) else None
    return str(kind or value)[:80]


def _validate_settings(then: dict[str, Any], now: dict[str, Any], folder: Any) -> None:
    """Raise if a setting differs from the one that a run was started with."""
    for name, value in now.items():
        if name in then and (other := _other(then[name], value, name)):
            raise SettingsError(f"{folder} was started with {other}; resume it with the original settings")


def _validate_callbacks(run: Run, tree: Any) -> None:
    """Raise if a run had other callbacks."""
    then, now = (
        [name for name, _ in tree["callbacks"]],
        [type(callback).__name__ for callback in run.stateful_callbacks],
    )
    if then != now:
        raise SettingsError(
            f"the run was started with the callbacks {then}, not {now}; resume it with the original callbacks"
        )


def _tell_other_versions(run: Run, about: dict[str, Any], folder: Any, say: Callable[[str], None]) -> None:
    changed = [name for name in (*__about__.versions(), "device") if about.get(name) != run.attributes[name]]
    if changed:
        name = changed[0]
        say(
            f"{folder} was started with {name} {about.get(name)}; with {run.attributes[name]} the numbers may differ "
            "in the last bits"
        )
