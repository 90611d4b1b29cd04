"""``Run``: one training run, its steps, its state and its callbacks."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import __about__
from pyro_vae.core.device import derive_seed, describe_device, seeded
from pyro_vae.core.pair import Amortized
from pyro_vae.core.progress import Bar
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Loss, loss_name
from pyro_vae.data.sources import Source, Window
from pyro_vae.elbo.per_datum import per_datum_elbo
from pyro_vae.errors import DivergenceError
from pyro_vae.train.callbacks import Callback
from pyro_vae.train.callbacks._paired import difference
from pyro_vae.train.callbacks.schedules import advance
from pyro_vae.train.checkpoint.tensor_file import Tree
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.steps import DeviceRows, Engine, Steps
from pyro_vae.train.distributed.group import ALONE, Group
from pyro_vae.train.divergence_report import broken_weights, origin
from pyro_vae.train.overfitting import fall_of_validation, judge_overfitting
from pyro_vae.train.recovery import NotFiniteError, recover
from pyro_vae.train.run_state import copied, restore, state_of, try_step, validate_state

CheckpointHook = Callable[["Run"], None]
"""A function that is called after every few steps and may write a checkpoint."""


class Run:
    """One training run, as callbacks see it.

    Args:
        vae: the VAE, trained in place.
        source: the training data, on the device and in the precision of the VAE.
        watched: name → data whose ELBO is evaluated after each epoch.
        loss: the loss to minimize.
        optim: the optimizer.
        batch_size: data per step.
        seed: of the order of the data and of the noise.
        device: the device of the training.
        callbacks: the callbacks, in the order in which they are called.
        group: the processes that train together.

    Attributes:
        rank: the rank of this process, from 0; only the first writes.
        ranks: the number of processes.
        step: the number of steps taken.
        epoch: the current epoch, from 1, or the last.
        epochs: the rows of the history.
        values: name → the ELBO of each watched datum after the last epoch, nats, shape ``(datum,)``. Data and noise are
            the same each time, so that differences between epochs are paired.
        good: the state after the last good epoch.
        rollbacks: how often this process rolled back after a divergence.
        stopped: why the training ended before its last epoch; empty if it did not.
        due: returns whether a checkpoint is due on this process after a step; it must not refer to the run, whose
            VAE would then leave Pyro's parameter store at the next garbage collection only.
        best: the epoch with the highest mean validation ELBO so far, and its ELBO of each datum.
        weights_epoch: the epoch whose weights the VAE has at the end, if a callback replaced the last ones; 0 if they
            belong to no single epoch.
        folder: the run folder, if there is one.
    """

    folder: Path | None = None

    def __init__(
        self,
        vae: Amortized,
        source: Source,
        watched: dict[str, Rows],
        loss: Loss,
        optim: WholeOptimizer,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        callbacks: Sequence[Callback] = (),
        group: Group = ALONE,
    ) -> None:
        self.vae, self.source, self.watched, self.loss, self.optim = vae, source, watched, loss, optim
        self.batch_size, self.seed, self.device, self.callbacks = batch_size, seed, device, callbacks
        self.group, self.rank, self.ranks = group, group.rank, group.ranks
        self.due: Callable[[int], bool] = lambda step: False
        self.attributes = {
            "estimator": loss_name(loss),
            "optimizer": type(optim.optimizer).__name__,
            "batch_size": batch_size,
            "data": len(source),
            "seed": seed,
            "device": describe_device(device),
            "processes": group.ranks,
            **__about__.versions(),
        }
        self.epochs: list[dict[str, float]] = []
        self.values: dict[str, Tensor] = {}
        self.step, self.seen, self.total, self.seconds = 0, 0, 0.0, 0.0
        self.stopped = ""
        self.best: tuple[int, Tensor] | None = None
        self.weights_epoch: int | None = None
        self.last, self.rollbacks = 0, 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer."""
        made: torch.optim.Optimizer = self.optim.optimizer
        return made

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler, if there is one."""
        return self.optim.made if isinstance(self.optim.made, LRScheduler) else None

    @property
    def epoch(self) -> int:
        """The current epoch, from 1, or the last."""
        return min(len(self.epochs) + 1, self.last)

    def say(self, sentence: str) -> None:
        """Print a sentence above the progress bar."""
        self.bar.say(sentence)

    def stop(self, reason: str) -> None:
        """End the training after the current steps."""
        self.stopped = self.stopped or reason
        self.stop_requested.set()

    def fail(self, what: str) -> None:
        """Report a divergence.

        Raises:
            DivergenceError: always.
        """
        raise DivergenceError(what)

    def start(self, epochs: int, engine: Engine, precision: str, bar: Bar, stop_requested: threading.Event) -> None:
        """Prepare to train up to an epoch, or until a process of the group is asked to stop."""
        self.last, self.bar, self.stop_requested = epochs, bar, stop_requested
        self.ending = stop_requested if self.group.alone else threading.Event()
        self.stepping = Steps(
            self.vae, self.loss, self.optim, size=len(self.source), batch_size=self.batch_size, engine=engine,
            precision=precision, steps=epochs * self.steps_per_epoch, say=bar.say,
            group=self.group, wishes=lambda: (stop_requested.is_set(), self.due(self.step)),
        )  # fmt: skip
        for callback in self.callbacks:
            callback.start(self)
        self._mark_good()

    @property
    def over(self) -> bool:
        """Whether the last step was taken."""
        stopped = self.group.alone and bool(self.stopped)  # in a group, the next step must tell the others first
        return self.ending.is_set() or stopped or len(self.epochs) >= self.last

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps per epoch."""
        return -(-len(self.source) // self.batch_size)

    def train(self, write_checkpoint: CheckpointHook) -> None:
        """Train up to the last epoch, or until something ends it."""
        if self.stopped and self.seen:  # a callback stopped within an epoch that is not evaluated yet
            self._close_epoch(whole=False)
        while not self.over:
            try:
                whole = self._along_an_epoch(write_checkpoint)
                if not whole:  # before closing: a checkpoint must not hold the history row of a partial epoch
                    write_checkpoint(self)
                if self.seen:
                    self._close_epoch(whole)
            except DivergenceError as error:
                recover(self, error)
                self.rollbacks, self._is_good = self.rollbacks + 1, False
                write_checkpoint(self)  # a run that is killed now must not resume before the divergence
                continue
            if whole:
                write_checkpoint(self)
        for callback in self.callbacks:
            callback.end(self)
        if (found := fall_of_validation(self.history())) is not None:
            finding = judge_overfitting(found)
            if finding.level != "fine":
                self.say(str(finding))

    def _along_an_epoch(self, write_checkpoint: CheckpointHook) -> bool:
        """Take the remaining steps of an epoch; return whether it is complete."""
        started = time.perf_counter() - self.seconds
        for _, feed, segment in self.segments():
            for losses in self.stepping.steps_over(feed, segment):
                self._account(losses)
                if self.stepping.stopped:
                    self.ending.set()
                self.seconds = time.perf_counter() - started
                self.call_step_hooks()  # before a checkpoint, which holds the state of the callbacks
                if self.seen < len(self.source) and not self.ending.is_set():
                    write_checkpoint(self)
                if self.ending.is_set():
                    return self.seen == len(self.source)
        return not self.ending.is_set()

    def segments(self) -> Iterator[tuple[Window, DeviceRows, Tensor]]:
        """Yield the rest of an epoch in segments that end where a callback's ``step`` is due."""
        every = [callback.every for callback in self.callbacks if callback.every]
        seed = derive_seed(self.seed, "order of the data", self.epoch)
        for window in self.source.windows(seed=seed, batch_size=self.batch_size, skip=self.seen):
            feed, order = self.stepping.feed(window.rows), window.order
            while len(order):
                ahead = min((n - self.step % n for n in every), default=len(order)) * self.batch_size
                yield window, feed, order[:ahead]
                order = order[ahead:]

    def _account(self, losses: list[float]) -> None:
        n = len(self.source)
        for loss in losses:
            self.step += 1
            if not math.isfinite(loss):
                raise NotFiniteError(f"the loss became {loss} at step {self.step} (epoch {self.epoch})")
            size = min(self.batch_size, n - self.seen)
            self.total, self.seen, self._is_good = self.total - loss / n * size, self.seen + size, False
            self.bar.step(self.total / self.seen)

    def _close_epoch(self, whole: bool) -> None:
        row = {"objective": self.total / self.seen, "seconds": self.seconds, "step": self.step}
        for name, rows in self.watched.items():
            self.values[name] = values = self._elbo_on_first(rows)
            spread = values.std() if len(values) > 1 else values.new_tensor(math.nan)
            row[f"{name}_elbo"], row[f"{name}_elbo_se"] = values.mean().item(), (spread / len(values) ** 0.5).item()
        if not math.isfinite(row["train_elbo"]):
            what = f"the ELBO became {row['train_elbo']} after step {self.step} (epoch {self.epoch})"
            if broken_weights(self.vae):
                raise NotFiniteError(what)
            self.fail(f"{what}: {origin(self.vae, self.loss, self.watched['train'], size=len(self.source))}")
        row |= self._below_best()
        self.epochs.append(row)
        self.seen, self.total, self.seconds = 0, 0.0, 0.0
        self.bar.epoch(len(self.epochs), row)
        for callback in self.callbacks:
            callback.epoch(self)
        if whole and self.scheduler is not None:
            advance(self.scheduler, row.get("validation_elbo", row["train_elbo"]))
        self._agree()
        self._mark_good()

    def _below_best(self) -> dict[str, float]:
        """Measure how far the validation ELBO lies below its best so far, by paired differences."""
        values = self.values.get("validation")
        if values is None:
            return {}
        if not values.isfinite().all():
            return {"validation_below_best": math.nan, "validation_below_best_se": math.nan}
        if self.best is None or values.mean() > self.best[1].to(values.device).mean():
            self.best = len(self.epochs) + 1, values
        fall, error = difference(self.best[1], values)
        return {"validation_below_best": fall, "validation_below_best_se": error}

    def _agree(self) -> None:
        """Verify that all processes have the same weights, and stop all if one was stopped."""
        if self.group.alone:
            return
        self.group.validate_equal(self.vae.state_dict())
        if any(reasons := self.group.all_gather(self.stopped)):
            self.stopped = next(filter(None, reasons))
            self.ending.set()

    def _elbo_on_first(self, rows: Rows) -> Tensor:
        """Compute the ELBO of each datum; in a group, on the first process only."""
        if self.group.alone:
            return self._elbo(rows)
        values: Tensor = self.group.broadcast(self._elbo(rows).cpu() if self.group.first else None)
        return values

    def _elbo(self, rows: Rows) -> Tensor:
        with seeded(derive_seed(self.seed, "evaluation"), self.device):  # the same noise after each epoch
            return per_datum_elbo(self.vae, rows, size=len(self.source)).double()

    def call_step_hooks(self) -> None:
        """Call the ``step`` of each callback that is due after this step."""
        for callback in self.callbacks:
            if callback.every and self.step % callback.every == 0:
                callback.step(self)

    def state(self) -> Tree:
        """Collect the state to resume from, as a tree of tensors and plain values; views, not copies.

        If the last good state, the target of a rollback, differs from the current state, it is included.
        """
        return {**state_of(self), "good": None if self._is_good else self.good}

    @property
    def stateful_callbacks(self) -> list[Callback]:
        """The callbacks that define a state."""
        return [callback for callback in self.callbacks if type(callback).state is not Callback.state]

    def copy_state(self) -> Tree:
        """Copy the current state."""
        return copied(state_of(self))

    def _mark_good(self) -> None:
        """Make the current state the target of a rollback."""
        self.good, self._is_good = self.copy_state(), True

    def load(self, tree: Tree) -> None:
        """Restore a state, in place."""
        restore(self, tree)

    def resume(self, tree: Tree) -> None:
        """Resume from the state of an earlier process, with the same engine."""
        try_step(self.optimizer)
        for state in (tree, tree["good"]):
            if state is not None:
                validate_state(self, state)
                self.load(state)
                try_step(self.optimizer)
        self.load(tree)
        rows = self.source.head(self.batch_size).like(self.vae)
        if self.stepping.load(tree["engine"], rows):
            self.load(tree)
        if self.stopped:
            self.ending.set()
        self._mark_good()
        if tree["good"] is not None:
            self.good, self._is_good = tree["good"], False
        self.bar.resumed(len(self.epochs), self.step)

    def history(self) -> xr.Dataset:
        """Return the labelled history of the epochs so far."""
        columns = ["objective", *(f"{name}_elbo{end}" for name in self.watched for end in ("", "_se"))]
        if "validation" in self.watched:
            columns += ["validation_below_best", "validation_below_best_se"]
        nats = {"units": "nats per datum"}
        variables = {c: ("epoch", [r.get(c, math.nan) for r in self.epochs], nats) for c in columns}
        variables["seconds"] = ("epoch", [r["seconds"] for r in self.epochs], {"units": "s"})
        coordinates = {
            "epoch": range(1, len(self.epochs) + 1),
            "step": ("epoch", [int(r["step"]) for r in self.epochs]),
        }
        engine = {"engine": self.stepping.used, "engine_reason": self.stepping.reason, "stopped": self.stopped}
        ended = {"weights_epoch": len(self.epochs) if self.weights_epoch is None else self.weights_epoch}
        return xr.Dataset(variables, coordinates, self.attributes | engine | ended)
