"""The steps of ``fit``: Pyro's own, or compiled where that pays."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from pyro.infer import SVI
from torch import Tensor

from pyro_vae.core import VAE
from pyro_vae.engine.feed import Feed
from pyro_vae.engine.optimizers import WholeOptimizer
from pyro_vae.engine.svi import CHUNK, CompiledSVI
from pyro_vae.errors import CompileError, ModelError, SettingsError
from pyro_vae.parallel.group import ALONE, Group
from pyro_vae.parallel.reduce import Together
from pyro_vae.rows import Rows
from pyro_vae.traces import Loss

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


class Steps:
    """Steps of training a VAE, by one of two engines that give the same numbers.

    Args:
        vae, loss, optim: what is trained, by what.
        rows: the data, on the device of the VAE.
        batch_size: data per step.
        engine: ``"eager"`` is Pyro's SVI, ``"compiled"`` is :class:`CompiledSVI`, and ``"auto"`` the second
            as soon as more steps are left than :func:`steps_that_pay`, if it can be compiled at all.
        steps: how many there will be.
        say: told, in a sentence, what takes a while or goes another way.
        group: the processes that take them together, each on its part of each batch.
        stopping: whether this process was asked to stop; :attr:`stopped` is whether any was, known to all of them.
    """

    def __init__(
        self,
        vae: VAE,
        loss: Loss,
        optim: WholeOptimizer,
        rows: Rows,
        *,
        batch_size: int,
        engine: Engine,
        steps: int,
        say: Callable[[str], None],
        group: Group = ALONE,
        stopping: Callable[[], bool] = bool,
    ) -> None:
        self.rows, self.batch_size, self.engine, self.left, self.say = rows, batch_size, engine, steps, say
        self.loss, self.svi = loss, SVI(vae.model, vae.guide, optim, loss)
        self.group, self.stopping, self.together = group, stopping, None
        if not group.alone:
            parameters = [p for p in vae.parameters() if p.requires_grad]
            self.together = Together(group, loss, self.svi.loss_and_grads, parameters, stopping)
            self.svi.loss_and_grads = self.together
        self.compiled: CompiledSVI | None = None
        self.seconds: list[float] = []
        self.reason = {"eager": "asked for", "compiled": "asked for"}.get(engine, "too few steps for compiling to pay")
        tensors = [t for t in (rows.x, rows.context, rows.mask) if t is not None]
        self._feed = Feed(tensors, rows.x.device)
        self._arguments = RowArguments(len(rows), rows.context is not None, rows.mask is not None)
        if engine == "compiled":
            self._compile()

    @property
    def stopped(self) -> bool:
        """Whether this process was asked to stop, or in a group any of them before its last step."""
        return self.stopping() if self.together is None else self.together.stopped

    @property
    def used(self) -> str:
        """The engine of the next step."""
        return "eager" if self.compiled is None else "compiled"

    def along(self, order: Tensor) -> Iterator[list[float]]:
        """One pass over the data in this order; the losses, some steps at a time."""
        while len(order):
            if self.compiled is None:
                losses = [self._eager(self.group.part(order[: self.batch_size]))]
            else:
                try:
                    losses = self._chunk(order).tolist()
                except CompileError as error:
                    self._fall_back(error)
                    continue
            self.left -= len(losses)
            order = order[len(losses) * self.batch_size :]
            yield losses

    def _chunk(self, order: Tensor) -> Tensor:
        """The losses of some compiled steps, of whole batches or of the last."""
        assert self.compiled is not None
        batch = min(self.batch_size, len(order))
        if self.group.alone:
            return next(self.compiled.along(self._feed, order, batch, self._arguments))
        assert self.together is not None
        self.together.ask()
        own, size = self.group.parts(order[: min(CHUNK, len(order) // batch) * batch], batch)
        return next(self.compiled.along(self._feed, own, size, replace(self._arguments, batch=batch)))

    def _eager(self, index: Tensor) -> float:
        started = time.perf_counter()
        loss: float = self.svi.step(*self.rows.take(index).arguments(len(self.rows)))
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
            self.compiled = CompiledSVI(self.svi.model, self.svi.guide, self.svi.optim, self.loss)
            if self.together is not None:
                self.compiled.spread(self.together)
        except (ModelError, SettingsError) as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        if self.engine == "compiled":
            raise error
        self.compiled, self.reason = None, str(error)
        self.say(f"Training goes on without compiling: {error}.")
