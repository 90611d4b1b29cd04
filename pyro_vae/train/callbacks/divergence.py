"""What is done when a training diverges, ``RollBack``, and what else counts as that, ``Explosion``."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from pyro_vae.core.device import derive_seed
from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks.base import Callback, Run, Tree

OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""The rates of a group of parameters: the present one, and those that a schedule works with."""
OF_SCHEDULES = ("base_lrs", "max_lrs", "_last_lr")
"""The rates that a schedule keeps to itself."""


class RollBack(Callback):
    """After a divergence, back to the last good state with lower rates and new noise.

    .. math:: \\eta \\leftarrow f \\, \\eta

    The last good state is that after the last epoch whose ELBO was finite, or the start. All learning
    rates are multiplied by f, those that a schedule works with included, so that it does not undo it. The
    noise then comes from another seed, derived from that of the training, the step of the good state and the
    number of divergences: the same settings give the same numbers again. The order of the data is as before.
    A checkpoint is written at once; within an epoch it holds the last good state too, and is twice as large.

    Args:
        factor: f, above 0 and at most 1.
        times: so many divergences are put right, at least 1; the next one ends the training.

    Raises:
        SettingsError: if a setting is out of its range.

    Example:
        >>> RollBack(0.1, times=2).state()
        {'divergences': 0}
    """

    @takes_settings
    def __init__(self, factor: float = 0.5, *, times: int = 3) -> None:
        if above_zero("factor", factor) > 1:
            raise SettingsError(f"factor is {factor!r}; it must be above 0 and at most 1")
        self.factor, self.times = float(factor), whole("times", times, 1)
        self._met = self._lowered = 0

    @property
    def divergences(self) -> int:
        """How many there were."""
        return self._met

    def start(self, run: Run) -> None:
        """Forget an earlier training."""
        self._met = self._lowered = 0

    def diverged(self, run: Run, error: Exception) -> bool:
        """Go back and lower the rates, if that was not done too often."""
        if self._met == self.times:
            run.say(f"RollBack: it has diverged after {self.times} times already, at {_rates(run)}, and ends.")
            return False
        run.load(run.good)  # of a good state the rates are as often lowered as it remembers
        self._met += 1
        lower_rates(run, self.factor ** (self._met - self._lowered))
        self._lowered = self._met
        torch.manual_seed(derive_seed(run.seed, "noise after a divergence", run.rank, run.step, self._met))
        run.say(f"RollBack {self._met} of {self.times}: {error}; back to step {run.step}, at {_rates(run)}.")
        return True

    def state(self) -> Tree:
        return {"divergences": self._met}

    def load(self, state: Tree) -> None:
        self._lowered = state["divergences"]
        self._met = max(self._met, self._lowered)


def _rates(run: Run) -> str:
    rates = dict.fromkeys(f"{float(group['lr']):.3g}" for group in run.optimizer.param_groups)
    return f"a learning rate of {', '.join(rates)}"


def lower_rates(run: Run, factor: float) -> None:
    """Multiply all learning rates, and those that schedules work with."""
    schedules = [run.scheduler, *(getattr(callback, "scheduler", None) for callback in getattr(run, "callbacks", ()))]
    for group in run.optimizer.param_groups:
        group.update({name: group[name] * factor for name in OF_GROUPS if name in group})
    for schedule in [inner for outer in schedules if outer is not None for inner in _nested(outer)]:
        for name in OF_SCHEDULES:
            if isinstance(rates := getattr(schedule, name, None), list):
                setattr(schedule, name, [rate * factor for rate in rates])


def _nested(schedule: Any) -> Iterator[Any]:
    """A schedule and those that it is made of."""
    yield schedule
    for inner in getattr(schedule, "_schedulers", ()):
        yield from _nested(inner)


class Explosion(Callback):
    """Takes a loss that is finite but far out for a divergence.

    .. math:: \\bar{\\mathcal L}_t < \\bar{\\mathcal L}^* - c \\, \\mathrm{sd}(\\mathcal L^*)

    After each epoch the mean ELBO of training data is compared with that of the best epoch; the spread
    from datum to datum in that epoch is the measure of what is far. Without :class:`RollBack` it ends the
    training. An annealed KL lowers the ELBO on purpose while it is small: take a larger c then.

    Args:
        spreads: c, the standard deviations of the ELBO of a datum that are too far, above 0.

    Raises:
        SettingsError: if a setting is out of its range.

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
        """Forget an earlier training."""
        self._forget()

    def epoch(self, run: Run) -> None:
        """Compare the epoch with the best one so far."""
        values, epoch = run.values["train"].double(), len(run.epochs)
        mean = values.mean().item()
        if self.best is not None and not mean >= self.best - self.spreads * self.spread:
            run.fail(
                f"the ELBO fell to {mean:.4g} nats per datum in epoch {epoch}, more than {self.spreads:g} times the "
                f"spread of a datum, {self.spread:.4g}, below the {self.best:.4g} of epoch {self.at}"
            )
        if self.best is None or mean > self.best:
            spread = values.std().item() if len(values) > 1 else math.inf
            self.best, self.spread, self.at = mean, spread, epoch

    def state(self) -> Tree:
        return {"best": self.best, "spread": self.spread, "epoch": self.at}

    def load(self, state: Tree) -> None:
        self.best, self.spread, self.at = state["best"], state["spread"], state["epoch"]
