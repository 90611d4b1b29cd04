"""``Schedule``: learning rates that change from step to step; and how schedules go on after each epoch."""

from collections.abc import Callable
from typing import TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks.base import Callback, Run, Tree

ScheduleMaker: TypeAlias = Callable[[Optimizer], LRScheduler]


class Schedule(Callback):
    """A learning-rate schedule of torch that goes on with each step, where ``fit``'s goes on with each epoch.

    A schedule is made for steps or for epochs: ``OneCycleLR``, ``CyclicLR`` and warm-ups for steps. Give
    one for epochs as ``optimizer=`` of :func:`pyro_vae.fit`, which takes what makes one.

    Args:
        scheduler: what makes it of the optimizer; its numbers, as ``total_steps``, count steps.
        every: so many steps share one rate, the schedule then goes on by as many. With 1 each step has its
            own, and a compiled step must then come back to Python each time, which takes some 0.1 ms.

    Raises:
        SettingsError: if a setting is out of its range; at the start, if the optimizer has a schedule already, or
            it is none that steps alone.

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
        """Make it, which sets the first rate."""
        others = [other for other in getattr(run, "callbacks", ()) if isinstance(other, Schedule) and other is not self]
        if run.scheduler is not None or others:
            raise SettingsError("two schedules would set one learning rate; give a plain optimizer and one Schedule")
        try:
            made = self.make(run.optimizer)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"Schedule: it cannot be made ({error}); change its settings") from error
        if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
            raise SettingsError(
                f"Schedule made a {type(made).__name__}; make one of torch.optim.lr_scheduler that steps alone"
            )
        looks, end = _looks(run, self.every or 1), getattr(made, "total_steps", None)
        if end is not None and looks > end:
            raise SettingsError(
                f"Schedule: {type(made).__name__} ends after {end} steps, and goes on by {looks} in this training; "
                "make it as long"
            )
        self.scheduler = made

    def step(self, run: Run) -> None:
        """Go on by as many steps as were taken."""
        assert self.scheduler is not None
        try:
            for _ in range(self.every or 1):
                self.scheduler.step()
        except ValueError as error:
            raise SettingsError(f"Schedule: at step {run.step} it is at its end ({error}); make it longer") from error

    def state(self) -> Tree:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load(self, state: Tree) -> None:
        if self.scheduler is not None and state:
            self.scheduler.load_state_dict(state)


def _looks(run: Run, every: int) -> int:
    """How many steps a schedule takes in a whole training."""
    return getattr(run, "last", 0) * getattr(run, "steps_per_epoch", 0) // every * every


def refuse_plateau(scheduler: object) -> None:
    """Refuse a ``ReduceLROnPlateau`` whose threshold is a share of a loss: minus an ELBO may be below 0.

    Torch would then take what is a little worse for better, and at a plateau the rate would never be reduced.

    Raises:
        SettingsError: saying what to set.
    """
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.threshold_mode == "rel" and scheduler.threshold:
        raise SettingsError(
            "ReduceLROnPlateau: threshold_mode='rel' is made for losses above 0, and minus an ELBO may be below; "
            "set threshold_mode='abs', where threshold is in nats per datum"
        )


def advance(scheduler: LRScheduler, elbo: float) -> None:
    """Have a schedule go on after an epoch, which ended at this ELBO.

    Args:
        scheduler: of torch.
        elbo: of validation data, or of training data where there are none, nats per datum.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> plateau = ReduceLROnPlateau(adam, patience=1, threshold_mode="abs", factor=0.5)
        >>> for elbo in (-3.0, -2.0, -2.5, -2.5):
        ...     advance(plateau, elbo)
        >>> adam.param_groups[0]["lr"]
        0.5
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(-elbo if scheduler.mode == "min" else elbo)
    else:
        scheduler.step()
