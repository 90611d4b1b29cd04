"""Schedules of settings over training steps."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_vae.core.validation import takes_settings
from pyro_vae.errors import SettingsError

__all__ = ["Cyclical", "Linear", "Schedule"]


class Schedule(ABC):
    """A number that changes during training, computed from the step by tensor operations.

    Args:
        steps: the number of steps until its last change.

    Example:
        >>> class Halving(Schedule):
        ...     def at(self, step):
        ...         return 0.5 ** (step / self.steps)
        >>> Halving(10).at(torch.tensor(20.0))
        tensor(0.2500)
    """

    @takes_settings
    def __init__(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise SettingsError(f"{type(self).__name__}: steps is {steps}; it must be a whole number of at least 1")
        self.steps = steps

    @abstractmethod
    def at(self, step: Tensor) -> Tensor:
        """Return the number at a step, counted from 0; a tensor of shape ``()``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in vars(self).items())})"


class Linear(Schedule):
    """A linear schedule from one number to another, then constant.

    .. math:: \\beta_t = a + (b - a) \\min(t / T, 1)

    Args:
        steps: the number of steps T, at least 1.
        start: the first number a.
        end: the last number b.

    References:
        | Generating Sentences from a Continuous Space (Bowman et al., 2016), https://arxiv.org/abs/1511.06349
        | Ladder Variational Autoencoders (Sønderby et al., 2016), https://arxiv.org/abs/1602.02282

    Example:
        >>> [Linear(10).at(torch.tensor(t)).item() for t in (0.0, 5.0, 20.0)]
        [0.0, 0.5, 1.0]
    """

    @takes_settings
    def __init__(self, steps: int, *, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(steps)
        self.start, self.end = float(start), float(end)

    def at(self, step: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1)


class Cyclical(Schedule):
    """A cyclical schedule: each cycle rises linearly and then stays constant, as does the end of the last cycle.

    .. math:: \\beta_t = a + (b - a) \\min(\\tau / R, 1), \\qquad \\tau = (t \\bmod T / C) / (T / C)

    Args:
        steps: the number of steps T of all cycles together, at least 1.
        cycles: the number of cycles C, at least 1.
        ramp: the rising share R of a cycle, above 0 and at most 1.
        start: the first number a of a cycle.
        end: the last number b of a cycle.

    Raises:
        SettingsError: if a setting is out of range.

    References:
        | Cyclical Annealing Schedule (Fu et al., 2019), https://arxiv.org/abs/1903.10145

    Example:
        >>> [Cyclical(100, cycles=2).at(torch.tensor(t)).item() for t in (0.0, 12.5, 30.0, 50.0, 200.0)]
        [0.0, 0.5, 1.0, 0.0, 1.0]
    """

    @takes_settings
    def __init__(self, steps: int, *, cycles: int = 4, ramp: float = 0.5, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(steps)
        if not isinstance(cycles, int) or cycles < 1 or not 0 < ramp <= 1:
            raise SettingsError(
                f"Cyclical: cycles is {cycles} and ramp {ramp}; cycles must be a whole number of at least 1, "
                "ramp above 0 and at most 1"
            )
        self.cycles, self.ramp, self.start, self.end = cycles, float(ramp), float(start), float(end)

    def at(self, step: Tensor) -> Tensor:
        period = self.steps / self.cycles
        within = torch.where(step < self.steps, (step % period) / period, 1.0)
        return self.start + (self.end - self.start) * (within / self.ramp).clamp(max=1)
