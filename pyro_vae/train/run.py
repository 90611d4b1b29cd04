"""``Run``: what a training run is made of, its steps, its state, and what is done when it goes wrong."""

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
from pyro_vae.core.pair import Amortised
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
from pyro_vae.train.compiled.steps import Engine, Fed, Steps
from pyro_vae.train.distributed.group import ALONE, Group
from pyro_vae.train.divergence_report import broken_weights, origin
from pyro_vae.train.overfitting import fall_of_validation, judge_overfitting
from pyro_vae.train.recovery import NotFiniteError, put_right
from pyro_vae.train.run_state import copied, restore, state_of

Keep = Callable[["Run"], None]
"""What is told after each few steps, and may write a checkpoint."""


class Run:
    """One training run, as callbacks see it.

    Args:
        vae: what is trained, in place.
        source: the training data, as the VAE takes them.
        watched: data by name, whose ELBO is evaluated after each epoch.
        loss: what is minimised.
        optim: by what.
        batch_size: data per step.
        seed: of the order of the data and of the noise.
        device: where.
        callbacks: told of what goes on.
        group: the processes that train together.

    Attributes:
        rank: which of them this is, from 0; the first alone writes.
        ranks: how many they are.
        step: steps taken.
        epoch: the epoch under way, from 1, or the last.
        epochs: the rows of the history.
        values: of what is watched, the ELBO of each datum after the last epoch, nats, shape ``(datum,)``: of the same
            data with the same noise each time, so that differences between epochs are paired.
        good: the state after the last good epoch.
        put_back: how often this process has put training back after a divergence.
        stopped: why training was ended before its last epoch, or nothing.
        due: whether it is time for a checkpoint, as this process has it.
        best: the highest mean validation ELBO so far: after which epoch, and the ELBO of each datum then.
        weights_epoch: the epoch whose weights the VAE has at the end, where a callback put others than the last into
            it; 0 where they are of no single epoch.
        folder: that of the run, if it has one.
    """

    folder: Path | None = None

    def __init__(
        self,
        vae: Amortised,
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
        self.due: Callable[[], bool] = bool
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
        self.last, self.put_back = 0, 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer."""
        made: torch.optim.Optimizer = self.optim.optimizer
        return made

    @property
    def scheduler(self) -> LRScheduler | None:
        """Of the learning rate, if there is one."""
        return self.optim.made if isinstance(self.optim.made, LRScheduler) else None

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1, or the last."""
        return min(len(self.epochs) + 1, self.last)

    def say(self, sentence: str) -> None:
        """A sentence above the bar."""
        self.bar.say(sentence)

    def stop(self, reason: str) -> None:
        """End training after the steps under way."""
        self.stopped = self.stopped or reason
        self.asked.set()

    def fail(self, what: str) -> None:
        """Have this taken as divergence.

        Raises:
            DivergenceError: always.
        """
        raise DivergenceError(what)

    def start(self, epochs: int, engine: Engine, precision: str, bar: Bar, asked: threading.Event) -> None:
        """Make ready to train for so many epochs, or until this process or another of its group is asked to stop."""
        self.last, self.bar, self.asked = epochs, bar, asked
        self.ending = asked if self.group.alone else threading.Event()
        self.stepping = Steps(
            self.vae, self.loss, self.optim, size=len(self.source), batch_size=self.batch_size, engine=engine,
            precision=precision, steps=epochs * self.steps_per_epoch, say=bar.say,
            group=self.group, wishes=lambda: (asked.is_set(), self.due()),
        )  # fmt: skip
        for callback in self.callbacks:
            callback.start(self)
        self._mark_good()

    @property
    def over(self) -> bool:
        """Whether no step is to follow."""
        stopped = self.group.alone and bool(self.stopped)  # in a group the next step has the others know first
        return self.ending.is_set() or stopped or len(self.epochs) >= self.last

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch has."""
        return -(-len(self.source) // self.batch_size)

    def train(self, keep: Keep) -> None:
        """Train up to the last epoch, or until something ends it."""
        if self.stopped and self.seen:  # by a callback, within an epoch that this process has not looked at yet
            self._close_epoch(whole=False)
        while not self.over:
            try:
                whole = self._along_an_epoch(keep)
                if not whole:  # what is kept must not hold the row of a part of an epoch
                    keep(self)
                if self.seen:
                    self._close_epoch(whole)
            except DivergenceError as error:
                put_right(self, error)
                self.put_back, self._is_good = self.put_back + 1, False
                keep(self)  # so that one that is killed does not diverge again
                continue
            if whole:
                keep(self)
        for callback in self.callbacks:
            callback.end(self)
        if (found := fall_of_validation(self.history())) is not None:
            finding = judge_overfitting(found)
            if finding.level != "fine":
                self.say(str(finding))

    def _along_an_epoch(self, keep: Keep) -> bool:
        """The steps of an epoch that are left; whether it came to its end."""
        started = time.perf_counter() - self.seconds
        for _, feed, segment in self.segments():
            for losses in self.stepping.along(feed, segment):
                self._account(losses)
                if self.stepping.stopped:
                    self.ending.set()
                self.seconds = time.perf_counter() - started
                self.tell_of_steps()  # before a checkpoint, which is to hold what they make of it
                if self.seen < len(self.source) and not self.ending.is_set():
                    keep(self)
                if self.ending.is_set():
                    return self.seen == len(self.source)
        return not self.ending.is_set()

    def segments(self) -> Iterator[tuple[Window, Fed, Tensor]]:
        """What is left of an epoch, in pieces that end where a callback wants to be told."""
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
        """How far the validation ELBO lies below its best so far, by paired differences."""
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
        """See that all processes still train one VAE, and end together where one was stopped."""
        if self.group.alone:
            return
        self.group.refuse_apart(self.vae.state_dict())
        if any(reasons := self.group.gathered(self.stopped)):
            self.stopped = next(filter(None, reasons))
            self.ending.set()

    def _elbo_on_first(self, rows: Rows) -> Tensor:
        """The ELBO of each datum, of many processes by the first alone."""
        if self.group.alone:
            return self._elbo(rows)
        values: Tensor = self.group.agreed(self._elbo(rows).cpu() if self.group.first else None)
        return values

    def _elbo(self, rows: Rows) -> Tensor:
        with seeded(derive_seed(self.seed, "evaluation"), self.device):  # the same noise after each epoch
            return per_datum_elbo(self.vae, rows, size=len(self.source)).double()

    def tell_of_steps(self) -> None:
        """Segments end where a callback wants to be told, and nowhere within."""
        for callback in self.callbacks:
            if callback.every and self.step % callback.every == 0:
                callback.step(self)

    def state(self) -> Tree:
        """All that training goes on from, as a tree of tensors and plain values; views, not copies.

        The last good state, which a later divergence goes back to, is part of it where it is another.
        """
        return {**state_of(self), "good": None if self._is_good else self.good}

    @property
    def remembering(self) -> list[Callback]:
        """The callbacks that have a state."""
        return [callback for callback in self.callbacks if type(callback).state is not Callback.state]

    def kept(self) -> Tree:
        """A copy of the state of now."""
        return copied(state_of(self))

    def _mark_good(self) -> None:
        """Have a divergence go back to the state of now."""
        self.good, self._is_good = self.kept(), True

    def load(self, tree: Tree) -> None:
        """Go back, or on, to a state, in place."""
        restore(self, tree)

    def resume(self, tree: Tree) -> None:
        """Go on from a state of an earlier process, by the engine that it had."""
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
        """The epochs so far, labelled."""
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
