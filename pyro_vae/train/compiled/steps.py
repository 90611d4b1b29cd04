"""The steps of ``fit``: Pyro's own, or compiled where that pays."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from pyro.infer import SVI
from torch import Tensor

from pyro_vae.core.pair import Amortised
from pyro_vae.core.rows import Rows
from pyro_vae.core.threads import threads_for_evaluations
from pyro_vae.core.traces import Loss, particles_of
from pyro_vae.errors import CompileError, ModelError, SettingsError
from pyro_vae.train.compiled.feed import Feed
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.precision import computing_in
from pyro_vae.train.compiled.svi import CHUNK, CompiledSVI
from pyro_vae.train.distributed.group import ALONE, Group
from pyro_vae.train.distributed.reduce import Together, Wishes, no_wishes

Engine: TypeAlias = Literal["auto", "compiled", "eager"]
ENGINES = ("auto", "compiled", "eager")

COMPILE_SECONDS = 15.0
"""What compiling may take."""
HANDLERS_SECONDS = 3e-3
"""At most so much of a step is taken for Python's share of it ..."""
SAVED = 0.6
"""... and this share of that is expected to be saved."""
TIMED = 40
"""After so many steps ``auto`` looks at what the last half of them took."""


def steps_that_pay(step_seconds: float) -> float:
    """How many steps must be left for compiling to pay, where an uncompiled one takes so long.

    .. math:: n \\, s \\min(t, t_h) > T

    with T = 15 s to compile, t_h = 3 ms for Python's share of a step at most and s = 0.6 of it saved.

    Example:
        >>> round(steps_that_pay(2e-3)), round(steps_that_pay(1.0))
        (12500, 8333)
    """
    return COMPILE_SECONDS / (SAVED * min(step_seconds, HANDLERS_SECONDS))


@dataclass(frozen=True)
class RowArguments:
    """Of batches of x and, where there are any, context and mask, the arguments of model and guide.

    Args:
        size: the n of n/m.
        context, mask: whether there is one.
        batch: of how many rows the batch is that these are part of, where processes share it: with another number
            of rows on one of them, all of them trace their step anew.
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
class Fed:
    """Rows where the steps are taken.

    Args:
        rows: on the device of the VAE.
        feed: their tensors, for compiled steps.
        arguments: of a batch of those.
    """

    rows: Rows
    feed: Feed
    arguments: RowArguments


class Steps:
    """Steps of training a VAE, by one of two engines that give the same numbers.

    Args:
        vae, loss, optim: what is trained, by what.
        size: the n of n/m.
        batch_size: data per step.
        engine: ``"eager"`` is Pyro's SVI, ``"compiled"`` is :class:`CompiledSVI`, and ``"auto"`` the second
            as soon as more steps are left than :func:`steps_that_pay`, if it can be compiled at all.
        precision: as :class:`CompiledSVI` takes it.
        steps: how many there will be.
        say: told, in a sentence, what takes a while or goes another way.
        group: the processes that take them together, each on its part of each batch.
        wishes: whether this process wants all to stop, and whether a checkpoint; see :class:`Together`.
    """

    def __init__(
        self,
        vae: Amortised,
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
        self.group, self.together = group, None
        if not group.alone:
            parameters = [p for p in vae.parameters() if p.requires_grad]
            self.together = Together(group, loss, self.svi.loss_and_grads, parameters, wishes)
            self.svi.loss_and_grads = self.together
        self.compiled: CompiledSVI | None = None
        self.seconds: list[float] = []
        self.reason = {"eager": "asked for", "compiled": "asked for"}.get(engine, "too few steps for compiling to pay")
        if engine == "compiled":
            self._compile()

    @property
    def stopped(self) -> bool:
        """Whether any process of a group wanted to stop before the last step; the same on all."""
        return self.together is not None and self.together.stopped

    @property
    def wanted(self) -> bool:
        """Whether any process of a group wanted a checkpoint before the last step; the same on all."""
        return self.together is not None and self.together.wanted

    @property
    def used(self) -> str:
        """The engine of the next step."""
        return "eager" if self.compiled is None else "compiled"

    def feed(self, rows: Rows) -> Fed:
        """Rows made ready to be taken steps along."""
        rows = rows.like(self.vae)
        tensors = [t for t in (rows.x, rows.context, rows.mask) if t is not None]
        arguments = RowArguments(self.size, rows.context is not None, rows.mask is not None)
        return Fed(rows, Feed(tensors, rows.x.device), arguments)

    def along(self, fed: Fed, order: Tensor) -> Iterator[list[float]]:
        """Steps along rows in this order; the losses, some steps at a time."""
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
        """What another process needs to take the same steps."""
        begun = self.compiled is not None and self.compiled.begun
        return {"used": self.used, "reason": self.reason, "seconds": self.seconds, "left": self.left, "begun": begun}

    def load(self, state: dict[str, Any], rows: Rows) -> bool:
        """Go on from :meth:`state` of another process; whether a step was taken, whose traces are to be undone.

        Args:
            state: of the other process.
            rows: some of the data.
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

    def moved(self) -> None:
        """Take notice that weights and the optimizer's state were put back, in place."""
        if self.compiled is not None:
            self.compiled.moved()

    def _chunk(self, fed: Fed, order: Tensor) -> Tensor:
        """The losses of some compiled steps, of whole batches or of the last."""
        assert self.compiled is not None
        batch = min(self.batch_size, len(order))
        if self.together is None:
            return next(self.compiled.along(fed.feed, order, batch, fed.arguments))
        self.together.ask()
        own, size = self.group.parts(order[: min(CHUNK, len(order) // batch) * batch], batch)
        return next(self.compiled.along(fed.feed, own, size, replace(fed.arguments, batch=batch)))

    def _eager(self, fed: Fed, index: Tensor) -> float:
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
                self._decide(self.group.agreed(statistics.median(self.seconds[TIMED // 2 :])))
        return loss

    def _decide(self, typical: float) -> None:
        if self.left > steps_that_pay(typical):
            self.reason = f"{self.left} steps of {1e3 * typical:.1f} ms were left"
            self._compile()

    def _compile(self) -> None:
        self.say("Compiling the training step, which takes some 10 seconds ...")
        try:
            self.compiled = CompiledSVI(
                self.svi.model, self.svi.guide, self.svi.optim, self.loss, precision=self.precision
            )
            if self.together is not None:
                self.compiled.spread(self.together)
        except (ModelError, SettingsError) as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        if self.engine == "compiled":
            raise error
        self.compiled, self.reason = None, str(error)
        self.say(f"Training goes on without compiling: {error}.")
