"""``RollBack``: recover from a divergence; ``Explosion``: report a finite but very low ELBO as one."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from pyro_vae.core.device import derive_seed
from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks.base import Callback, Run, Tree

OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""The keys of learning rates in a parameter group: the current rate, and the rates that schedules use."""
OF_SCHEDULES = ("base_lrs", "max_lrs", "_last_lr")
"""The attributes of learning rates in a schedule."""


class RollBack(Callback):
    """Roll back to the last good state after a divergence, with lower learning rates and new noise.

    .. math:: \\eta \\leftarrow f \\, \\eta

    The last good state is the one after the last epoch with a finite ELBO, or the start. All learning rates are
    multiplied by f, including those stored in schedules, which would otherwise undo the change. The new noise seed
    is derived from the seed of the training, the step of the good state and the number of divergences, so that the
    training stays reproducible. The order of the data does not change. A checkpoint is written at once; within an
    epoch it also holds the last good state and is twice as large.

    Args:
        factor: f, above 0 and at most 1.
        times: the number of divergences to recover from, at least 1; the next one ends the training.

    Raises:
        SettingsError: if a setting is out of range.

    Example:
        >>> RollBack(0.1, times=2).state()
        {'divergences': 0}
    """

    @takes_settings
    def __init__(self, factor: float = 0.5, *, times: int = 3) -> None:
        if above_zero("factor", factor) > 1:
            raise SettingsError(f"factor is {factor!r}; it must be above 0 and at most 1")
        self.factor, self.times = float(factor), whole("times", times, 1)
        self._divergences = self._lowered = 0

    @property
    def divergences(self) -> int:
        """The number of divergences so far."""
        return self._divergences

    def start(self, run: Run) -> None:
        """Reset the state."""
        self._divergences = self._lowered = 0

    def diverged(self, run: Run, error: Exception) -> bool:
        """Roll back and lower the learning rates, at most ``times`` times."""
        if self._divergences == self.times:
            run.say(f"RollBack: the training diverged again after {self.times} rollbacks, at {_rates(run)}; it ends.")
            return False
        run.load(run.good)  # sets _lowered: how often the rates of the good state were lowered
        self._divergences += 1
        lower_rates(run, self.factor ** (self._divergences - self._lowered))
        self._lowered = self._divergences
        torch.manual_seed(derive_seed(run.seed, "noise after a divergence", run.rank, run.step, self._divergences))
        run.say(
            f"RollBack {self._divergences} of {self.times}: {error}; rolled back to step {run.step}, at {_rates(run)}."
        )
        return True

    def state(self) -> Tree:
        return {"divergences": self._divergences}

    def load(self, state: Tree) -> None:
        self._lowered = state["divergences"]
        self._divergences = max(self._divergences, self._lowered)


def _rates(run: Run) -> str:
    rates = dict.fromkeys(f"{float(group['lr']):.3g}" for group in run.optimizer.param_groups)
    return f"a learning rate of {', '.join(rates)}"


def lower_rates(run: Run, factor: float) -> None:
    """Multiply all learning rates, including those stored in schedules."""
    schedules = [run.scheduler, *(getattr(callback, "scheduler", None) for callback in getattr(run, "callbacks", ()))]
    for group in run.optimizer.param_groups:
        group.update({name: group[name] * factor for name in OF_GROUPS if name in group})
    for schedule in [inner for outer in schedules if outer is not None for inner in _nested(outer)]:
        for name in OF_SCHEDULES:
            if isinstance(rates := getattr(schedule, name, None), list):
                setattr(schedule, name, [rate * factor for rate in rates])


def _nested(schedule: Any) -> Iterator[Any]:
    """Yield a schedule and its inner schedules."""
    yield schedule
    for inner in getattr(schedule, "_schedulers", ()):
        yield from _nested(inner)


class Explosion(Callback):
    """Report a divergence when the training ELBO falls far below its best, though it is finite.

    .. math:: \\bar{\\mathcal L}_t < \\bar{\\mathcal L}^* - c \\, \\mathrm{sd}(\\mathcal L^*)

    After each epoch the mean training ELBO is compared with that of the best epoch, in units of the standard
    deviation over data in that epoch. Without :class:`RollBack` the divergence ends the training. An annealed KL
    lowers the ELBO on purpose while its weight is small: use a larger c then.

    Args:
        spreads: c, the tolerated fall in standard deviations of the ELBO of a datum, above 0.

    Raises:
        SettingsError: if a setting is out of range.

    Example:
        >>> Explosion(5.0).state()
        {'best': None, 'spread': 0.0, 'epoch': 0}
    """

    @takes_settings
    def __init__(self, spreads: float = 3.0) -> None:
        self.spreads = above_zero("spreads", spreads)
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.spread, self.at = 0.0, 0

    def start(self, run: Run) -> None:
        """Reset the state."""
        self._forget()

    def epoch(self, run: Run) -> None:
        """Compare the epoch with the best one so far."""
        values, epoch = run.values["train"].double(), len(run.epochs)
        mean = values.mean().item()
        if self.best is not None and not mean >= self.best - self.spreads * self.spread:
            run.fail(
                f"the ELBO fell to {mean:.4g} nats per datum in epoch {epoch}, more than {self.spreads:g} standard "
                f"deviations over data ({self.spread:.4g}) below the {self.best:.4g} of epoch {self.at}"
            )
        if self.best is None or mean > self.best:
            spread = values.std().item() if len(values) > 1 else math.inf
            self.best, self.spread, self.at = mean, spread, epoch

    def state(self) -> Tree:
        return {"best": self.best, "spread": self.spread, "epoch": self.at}

    def load(self, state: Tree) -> None:
        self.best, self.spread, self.at = state["best"], state["spread"], state["epoch"]
