"""``EMA`` and ``SWA``: averages of the weights during the training."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks._paired import copied, validate_single_restore
from pyro_vae.train.callbacks.base import Callback, Run, Tree


class Average(Callback, ABC):
    """The base class of averages of the weights; a subclass defines the weight of each sample.

    .. math:: \\bar\\theta_k = \\bar\\theta_{k-1} + w_k (\\theta_{t_k} - \\bar\\theta_{k-1}), \\qquad w_1 = 1

    Floating-point buffers, such as the running means of batch norm, are averaged too; integer buffers keep their last
    values. The ELBOs of the history use the current weights, not the average.

    Args:
        restore: whether the VAE gets the average at the end; if not, the average is only in ``averaged_state``.
    """

    def __init__(self, *, restore: bool = True) -> None:
        self.restore = restore
        self.final = f"the average of {type(self).__name__}" if restore else ""
        self._forget()

    def _forget(self) -> None:
        self.looks = 0
        self.averaged_state: dict[str, Tensor] = {}

    @abstractmethod
    def weight(self, look: int) -> float:
        """Return the weight of a sample in the average so far; samples count from 1, and the first has weight 1."""

    def start(self, run: Run) -> None:
        """Reset the state."""
        validate_single_restore(run, self)
        self._forget()

    @torch.no_grad()
    def look(self, run: Run) -> None:
        """Add the current weights to the average."""
        self.looks += 1
        now = run.vae.state_dict()
        if self.looks == 1:
            self.averaged_state = copied(run.vae)
            return
        names = [name for name, value in now.items() if value.is_floating_point()]
        # Averages from a checkpoint are on the CPU.
        averages = [self.averaged_state[name].to(now[name].device) for name in names]
        self.averaged_state.update(zip(names, averages, strict=True))
        torch._foreach_lerp_(averages, [now[name] for name in names], self.weight(self.looks))

    def end(self, run: Run) -> None:
        """Load the average into the VAE, in place."""
        if self.looks == 0:
            run.say(f"{type(self).__name__}: the training ended before the first sample of the weights.")
        elif self.restore:
            numbers = {name: value for name, value in self.averaged_state.items() if value.is_floating_point()}
            run.vae.load_state_dict({**run.vae.state_dict(), **numbers})
            run.weights_epoch = 0
            run.say(f"{type(self).__name__}: the VAE has the average of {self.looks} samples of the weights.")

    def state(self) -> Tree:
        return {"looks": self.looks, "average": self.averaged_state}

    def load(self, state: Tree) -> None:
        self.looks, self.averaged_state = state["looks"], dict(state["average"])


class EMA(Average):
    """The exponential moving average of the weights, corrected for its initial bias.

    .. math:: \\bar\\theta = \\sum_k d^{e (K - k)} \\theta_{ke} \\Big/ \\sum_k d^{e (K - k)}

    Args:
        decay: d per step, above 0 and below 1; the half-life is log 2 / (1 - d) steps, 693 for 0.999.
        every: e, the steps between two samples of the weights, which hardly change within 16 steps.
        restore: whether the VAE gets the average at the end; if not, the average is only in ``averaged_state``.

    Raises:
        SettingsError: if a setting is out of range; at the start, if another callback also restores weights.

    References:
        | Acceleration of Stochastic Approximation by Averaging (Polyak & Juditsky, 1992),
          https://doi.org/10.1137/0330046
        | The Exponential Moving Average of Weights (Morales-Brotons et al., 2024), https://arxiv.org/abs/2411.18704

    Example:
        >>> ema = EMA(0.9, every=1)
        >>> [round(ema.weight(look), 3) for look in (1, 2, 1000)]
        [1.0, 0.526, 0.1]
    """

    @takes_settings
    def __init__(self, decay: float = 0.999, *, every: int = 16, restore: bool = True) -> None:
        if not 0 < decay < 1:
            raise SettingsError(f"decay is {decay!r}; it must be a number above 0 and below 1")
        self.decay, self.every = float(decay), whole("every", every, 1)
        self._rate = self.every * math.log(self.decay)
        super().__init__(restore=restore)

    def weight(self, look: int) -> float:
        return math.expm1(self._rate) / math.expm1(self._rate * look)

    def step(self, run: Run) -> None:
        """Add the current weights."""
        self.look(run)


class SWA(Average):
    """Stochastic weight averaging: the mean of the weights from a given epoch on.

    .. math:: \\bar\\theta = \\frac1K \\sum_k \\theta_{t_k}

    Use it with a constant high or a cyclical learning rate, such as ``torch.optim.swa_utils.SWALR``.

    Args:
        start: the first epoch to average over, from 1.
        every: the steps between two samples of the weights; by default one sample after each epoch.
        restore: whether the VAE gets the average at the end; if not, the average is only in ``averaged_state``.

    Raises:
        SettingsError: if a setting is out of range; at the start, if another callback also restores weights.

    References:
        | Averaging Weights Leads to Wider Optima and Better Generalization (Izmailov et al., 2018),
          https://arxiv.org/abs/1803.05407

    Example:
        >>> [SWA(10).weight(look) for look in (1, 2, 4)]
        [1.0, 0.5, 0.25]
    """

    @takes_settings
    def __init__(self, start: int, *, every: int | None = None, restore: bool = True) -> None:
        self.first, self.every = whole("start", start, 1), None if every is None else whole("every", every, 1)
        super().__init__(restore=restore)

    def weight(self, look: int) -> float:
        return 1 / look

    def step(self, run: Run) -> None:
        """Add the current weights, from epoch ``start`` on."""
        if run.epoch >= self.first:
            self.look(run)

    def epoch(self, run: Run) -> None:
        """Add the current weights, from epoch ``start`` on, unless ``every`` is given."""
        if self.every is None and len(run.epochs) >= self.first:
            self.look(run)
