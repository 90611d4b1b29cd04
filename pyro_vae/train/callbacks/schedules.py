"""``Schedule``: a learning-rate schedule that advances with each step; and epoch schedules of ``fit``."""

import warnings
from collections.abc import Callable
from typing import TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError, type_of
from pyro_vae.train.callbacks.base import Callback, Run, Tree

ScheduleMaker: TypeAlias = Callable[[Optimizer], LRScheduler]

LARGEST_RATE = 1e30
"""A larger learning rate overflows single precision within a step."""


class Schedule(Callback):
    """A learning-rate schedule of torch that advances with each step.

    Use it for schedules over steps, such as ``OneCycleLR``, ``CyclicLR`` and warm-ups. Pass a schedule over epochs
    as ``optimizer=`` of :func:`pyro_vae.fit`.

    Args:
        scheduler: a function from the optimizer to the scheduler, whose settings, such as ``total_steps``, count
            steps.
        every: the number of steps that share a rate; the schedule then advances by as many. With 1, each step has its
            own rate, and each compiled step returns to Python, which takes about 0.1 ms.

    Raises:
        SettingsError: if a setting is out of range; at the start, if the optimizer has a schedule already, or if
            ``scheduler`` makes something other than a torch schedule that needs no metric.

    References:
        | Super-Convergence (Smith & Topin, 2017), https://arxiv.org/abs/1708.07120

    Example:
        >>> import torch
        >>> from torch.optim.lr_scheduler import OneCycleLR
        >>> Schedule(lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=1000)).every
        1
    """

    @takes_settings
    def __init__(self, scheduler: ScheduleMaker, *, every: int = 1) -> None:
        self.make, self.every = scheduler, whole("every", every, 1)
        self.scheduler: LRScheduler | None = None

    def start(self, run: Run) -> None:
        """Make the schedule, which sets the first rate."""
        others = [other for other in getattr(run, "callbacks", ()) if isinstance(other, Schedule) and other is not self]
        if run.scheduler is not None or others:
            raise SettingsError(
                "callbacks: two schedules would set the same learning rate; pass a plain optimizer and one Schedule"
            )
        try:
            made = self.make(run.optimizer)
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise SettingsError(f"Schedule: cannot make the schedule ({error}); change its settings") from error
        if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
            raise SettingsError(
                f"Schedule: scheduler made {type_of(made)}; make one of torch.optim.lr_scheduler that needs no metric"
            )
        steps, end = _count_steps(run, self.every or 1), getattr(made, "total_steps", None)
        if end is not None and steps > end:
            raise SettingsError(
                f"Schedule: {type(made).__name__} ends after {end} steps, but this training takes {steps}; make the "
                "schedule as long"
            )
        self.scheduler = made

    def step(self, run: Run) -> None:
        """Advance by the number of steps taken."""
        assert self.scheduler is not None
        try:
            for _ in range(self.every or 1):
                self.scheduler.step()
        except (ArithmeticError, ValueError) as error:
            raise SettingsError(
                f"Schedule: the schedule has ended by step {run.step} ({error}); make it longer"
            ) from error

    def state(self) -> Tree:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load(self, state: Tree) -> None:
        if self.scheduler is not None and state:
            self.scheduler.load_state_dict(state)


def _count_steps(run: Run, every: int) -> int:
    """Count the steps that a schedule takes in the whole training."""
    return getattr(run, "last", 0) * getattr(run, "steps_per_epoch", 0) // every * every


def validate_no_plateau(scheduler: object) -> None:
    """Raise for a ``ReduceLROnPlateau`` with a relative threshold: the negative ELBO may be below 0.

    Torch would then count slightly worse epochs as better, and never reduce the rate at a plateau.

    Raises:
        SettingsError: naming the setting to change.
    """
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.threshold_mode == "rel" and scheduler.threshold:
        raise SettingsError(
            "ReduceLROnPlateau: threshold_mode='rel' needs a positive loss, but the negative ELBO may be below 0; "
            "set threshold_mode='abs', with threshold in nats per datum"
        )


def try_schedule(scheduler: LRScheduler, epochs: int) -> None:
    """Advance a schedule up to twice: torch divides by its settings only then.

    Raises:
        SettingsError: if it cannot advance.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a schedule that advances without a step
        for _ in range(min(2, epochs)):
            advance(scheduler, 0.0)


def advance(scheduler: LRScheduler, elbo: float) -> None:
    """Advance a schedule after an epoch that ended with this ELBO.

    Args:
        scheduler: a torch schedule.
        elbo: the validation ELBO, or the training ELBO without validation data, nats per datum.

    Raises:
        SettingsError: if the schedule has ended, or gives a negative or a far too large learning rate.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> plateau = ReduceLROnPlateau(adam, patience=1, threshold_mode="abs", factor=0.5)
        >>> for elbo in (-3.0, -2.0, -2.5, -2.5):
        ...     advance(plateau, elbo)
        >>> adam.param_groups[0]["lr"]
        0.5
    """
    name = type(scheduler).__name__
    try:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(-elbo if scheduler.mode == "min" else elbo)
        else:
            scheduler.step()
        rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    except (ArithmeticError, ValueError) as error:
        raise SettingsError(f"{name}: the schedule cannot advance ({error}); change its settings") from error
    if odd := [rate for rate in rates if not 0 <= rate <= LARGEST_RATE]:
        raise SettingsError(f"{name}: the learning rate becomes {odd[0]}; change the settings of the schedule")
