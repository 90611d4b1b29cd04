"""Take the steps of ``fit`` with Pyro's SVI, or compiled if compiling pays."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from pyro.infer import SVI
from torch import Tensor

from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.threads import threads_for_evaluations
from pyro_vae.core.traces import Loss, particles_of
from pyro_vae.errors import CompileError, ModelError, SettingsError
from pyro_vae.train.compiled.feed import Feed
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.precision import computing_in
from pyro_vae.train.compiled.svi import CHUNK, CompiledSVI
from pyro_vae.train.distributed.group import ALONE, Group
from pyro_vae.train.distributed.reduce import GradientAllReduce, Wishes, no_wishes

Engine: TypeAlias = Literal["auto", "compiled", "eager"]
ENGINES = ("auto", "compiled", "eager")

COMPILE_SECONDS = 15.0
"""The expected seconds of compiling."""
HANDLERS_SECONDS = 3e-3
"""The most seconds of a step that are attributed to Python."""
SAVED = 0.6
"""The fraction of Python's time that compiling is expected to save."""
TIMED = 40
"""The steps after which ``auto`` decides, from the times of the last half of them."""


def steps_that_pay(step_seconds: float) -> float:
    """Compute how many steps must be left for compiling to pay.

    .. math:: n \\, s \\min(t, t_h) > T

    with T = 15 s to compile, t the seconds of an uncompiled step, t_h = 3 ms the most of it that is Python's, and
    s = 0.6 the fraction that compiling saves.

    Example:
        >>> round(steps_that_pay(2e-3)), round(steps_that_pay(1.0))
        (12500, 8333)
    """
    return COMPILE_SECONDS / (SAVED * min(step_seconds, HANDLERS_SECONDS))


@dataclass(frozen=True)
class RowArguments:
    """Make the arguments of model and guide from batches of x and, if present, context and mask.

    Args:
        size: the n of n/m.
        context, mask: whether there is one.
        batch: the rows of the global batch, if processes share it; all of them retrace the step when it changes.
    """

    size: int
    context: bool
    mask: bool
    batch: int = 0

    def __call__(self, *batch: Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        x, *rest = batch
        context = rest.pop(0) if self.context else None
        return Rows(x, context, rest.pop(0) if self.mask else None).arguments(self.size), {}


@dataclass(frozen=True)
class DeviceRows:
    """Rows on the device of the steps.

    Args:
        rows: the rows, on the device of the VAE.
        feed: their tensors, for compiled steps.
        arguments: makes the arguments of model and guide from a batch.
    """

    rows: Rows
    feed: Feed
    arguments: RowArguments


class Steps:
    """The training steps, by one of two engines that give the same numbers.

    Args:
        vae, loss, optim: the VAE to train, the loss and the optimizer.
        size: the n of n/m.
        batch_size: data per step.
        engine: ``"eager"`` is Pyro's SVI, ``"compiled"`` is :class:`CompiledSVI`, and ``"auto"`` switches to the
            latter once more steps are left than :func:`steps_that_pay`, if the step can be compiled.
        precision: as in :class:`CompiledSVI`.
        steps: the total number of steps.
        say: prints a sentence about compiling or a change of the engine.
        group: the processes that take the steps together, each on its part of each batch.
        wishes: returns whether this process requests a stop, and a checkpoint; see :class:`GradientAllReduce`.
    """

    def __init__(
        self,
        vae: Amortized,
        loss: Loss,
        optim: WholeOptimizer,
        *,
        size: int,
        batch_size: int,
        engine: Engine,
        precision: str,
        steps: int,
        say: Callable[[str], None],
        group: Group = ALONE,
        wishes: Wishes = no_wishes,
    ) -> None:
        self.vae, self.size, self.batch_size, self.engine, self.left = vae, size, batch_size, engine, steps
        self.precision, self.say = precision, say
        self.loss, self.svi = loss, SVI(vae.model, vae.guide, optim, loss)
        self.group, self.all_reduce = group, None
        if not group.alone:
            parameters = [p for p in vae.parameters() if p.requires_grad]
            self.all_reduce = GradientAllReduce(group, loss, self.svi.loss_and_grads, parameters, wishes)
            self.svi.loss_and_grads = self.all_reduce
        self.compiled: CompiledSVI | None = None
        self.seconds: list[float] = []
        self.reason = {"eager": "requested", "compiled": "requested"}.get(engine, "too few steps for compiling to pay")
        if engine == "compiled":
            self._compile()

    @property
    def stopped(self) -> bool:
        """Whether any process of a group requested a stop before the last step; equal on all."""
        return self.all_reduce is not None and self.all_reduce.stopped

    @property
    def wanted(self) -> bool:
        """Whether any process of a group requested a checkpoint before the last step; equal on all."""
        return self.all_reduce is not None and self.all_reduce.wanted

    @property
    def used(self) -> str:
        """The engine of the next step."""
        return "eager" if self.compiled is None else "compiled"

    def feed(self, rows: Rows) -> DeviceRows:
        """Prepare rows for steps."""
        rows = rows.like(self.vae)
        tensors = [t for t in (rows.x, rows.context, rows.mask) if t is not None]
        arguments = RowArguments(self.size, rows.context is not None, rows.mask is not None)
        return DeviceRows(rows, Feed(tensors, rows.x.device), arguments)

    def steps_over(self, fed: DeviceRows, order: Tensor) -> Iterator[list[float]]:
        """Take steps over the rows in this order; yield the losses of a few steps at a time."""
        while len(order):
            if self.compiled is None:
                losses = [self._eager(fed, self.group.part(order[: self.batch_size]))]
            else:
                try:
                    losses = self._chunk(fed, order).tolist()
                except CompileError as error:
                    self._fall_back(error)
                    continue
            self.left -= len(losses)
            order = order[len(losses) * self.batch_size :]
            yield losses

    def state(self) -> dict[str, Any]:
        """Return the state that another process needs to take the same steps."""
        begun = self.compiled is not None and self.compiled.has_started
        return {"used": self.used, "reason": self.reason, "seconds": self.seconds, "left": self.left, "begun": begun}

    def load(self, state: dict[str, Any], rows: Rows) -> bool:
        """Restore :meth:`state`; return whether this took a step, whose effects the caller must undo.

        Args:
            state: the state of another process.
            rows: a batch of the data.
        """
        self.seconds, self.reason, self.left = list(state["seconds"]), state["reason"], state["left"]
        if state["used"] == "compiled" and self.compiled is None:
            self._compile()
        if state["used"] == "eager":
            self.compiled = None
        if self.compiled is None or not state["begun"]:
            return False
        self.compiled.step(*rows.arguments(self.size))
        return True

    def refresh(self) -> None:
        """Update after weights and the optimizer's state were restored in place."""
        if self.compiled is not None:
            self.compiled.refresh()

    def _chunk(self, fed: DeviceRows, order: Tensor) -> Tensor:
        """Take some compiled steps, on whole batches or on the last, smaller batch; return the losses."""
        assert self.compiled is not None
        batch = min(self.batch_size, len(order))
        if self.all_reduce is None:
            return next(self.compiled.steps_over(fed.feed, order, batch, fed.arguments))
        self.all_reduce.ask()
        own, size = self.group.parts(order[: min(CHUNK, len(order) // batch) * batch], batch)
        return next(self.compiled.steps_over(fed.feed, own, size, replace(fed.arguments, batch=batch)))

    def _eager(self, fed: DeviceRows, index: Tensor) -> float:
        started = time.perf_counter()
        evaluations = len(index) * particles_of(self.loss)
        with (
            computing_in(self.precision, index.device.type),
            threads_for_evaluations(self.vae.parameters(), evaluations),
        ):
            loss: float = self.svi.step(*fed.rows.take(index).arguments(self.size))
        if self.engine == "auto" and len(self.seconds) < TIMED:
            self.seconds.append(time.perf_counter() - started)
            if len(self.seconds) == TIMED:
                self._decide(self.group.broadcast(statistics.median(self.seconds[TIMED // 2 :])))
        return loss

    def _decide(self, typical: float) -> None:
        if self.left > steps_that_pay(typical):
            self.reason = f"{self.left} steps of {1e3 * typical:.1f} ms were left"
            self._compile()

    def _compile(self) -> None:
        self.say("Compiling the training step; this takes about 10 seconds ...")
        try:
            self.compiled = CompiledSVI(
                self.svi.model, self.svi.guide, self.svi.optim, self.loss, precision=self.precision
            )
            if self.all_reduce is not None:
                self.compiled.distribute(self.all_reduce)
        except (ModelError, SettingsError) as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        if self.engine == "compiled":
            raise error
        self.compiled, self.reason = None, str(error)
        self.say(f"Training continues without compiling: {error}.")
