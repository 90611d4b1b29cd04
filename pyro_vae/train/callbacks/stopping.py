"""``EarlyStopping``: stop when the validation ELBO no longer rises, and restore the best weights."""

import math

from torch import Tensor

from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks._paired import copied, difference, validate_single_restore
from pyro_vae.train.callbacks.base import Callback, Run, Tree


class EarlyStopping(Callback):
    """Stop when the validation ELBO has not risen significantly for some epochs.

    .. math:: d_i = \\mathcal L_i - \\mathcal L_i^*, \\qquad
        \\text{better:}\\ \\bar d > c \\, \\mathrm{sd}(d) / \\sqrt n

    The ELBO of each validation datum is compared with its ELBO in the best epoch so far, with the same noise.
    Differences in difficulty between data cancel, so the error of the mean difference is far below that of the
    ELBO itself. A rise too slow for one epoch counts once it has added up, because every epoch is compared with the
    best one. An epoch whose ELBO is not finite is not better.

    The training stops after ``patience`` epochs and ``steps`` steps without a better epoch, whichever is longer. With
    a small data set an epoch has few steps, and ``patience`` alone would stop too early. Because the validation data
    select the epoch, their ELBO is slightly too high there.

    Args:
        patience: the number of epochs without a better one, at least 1.
        steps: the least number of steps without a better epoch, at least 0. With few data an epoch has few steps, and
            ``patience`` alone ends the training too early; the command line uses 1000.
        errors: c, the standard errors by which a better epoch must exceed the best one, at least 0.
        restore: whether the VAE gets the weights of the best epoch at the end, even if the training was not stopped.

    Raises:
        SettingsError: if a setting is out of range; at the start, if there are fewer than two validation data, or if
            another callback also restores weights.

    References:
        | Early Stopping - But When? (Prechelt, 1998), https://doi.org/10.1007/3-540-49430-8_3

    Example:
        >>> EarlyStopping(patience=5).state()
        {'best': 0, 'best_step': 0, 'waited': 0, 'values': None, 'weights': {}}
    """

    @takes_settings
    def __init__(self, patience: int = 10, *, steps: int = 0, errors: float = 1.0, restore: bool = True) -> None:
        self.patience, self.steps = whole("patience", patience, 1), whole("steps", steps, 0)
        if not 0 <= errors < math.inf:
            raise SettingsError(f"errors is {errors!r}; it must be a finite number of at least 0")
        self.errors, self.restore = float(errors), restore
        self.final = "the weights of the best epoch" if restore else ""
        self._forget()

    def _forget(self) -> None:
        self.best, self.best_step, self.waited = 0, 0, 0
        self.values: Tensor | None = None
        self.weights: dict[str, Tensor] = {}

    def start(self, run: Run) -> None:
        """Raise if there are no validation data."""
        if run.watched.get("validation") is None or len(run.watched["validation"]) < 2:
            raise SettingsError("EarlyStopping needs at least two validation data; pass validation_data=")
        validate_single_restore(run, self)
        self._forget()

    def epoch(self, run: Run) -> None:
        """Compare the epoch with the best so far."""
        values = run.values["validation"]
        if not values.isfinite().all():
            mean, error = -math.inf, math.nan
        elif self.values is None:
            mean, error = math.inf, 0.0
        else:
            mean, error = difference(values, self.values)
        if mean > self.errors * error:
            self.best, self.best_step, self.waited, self.values = len(run.epochs), run.step, 0, values.clone()
            self.weights = copied(run.vae) if self.restore else {}
            return
        self.waited += 1
        if self.waited >= self.patience and run.step - self.best_step >= self.steps:
            run.stop(self._reason(len(run.epochs), mean, error))

    def _reason(self, epoch: int, mean: float, error: float) -> str:
        best = "" if self.values is None else f" ({_mean(self.values)})"
        return (
            f"EarlyStopping: by epoch {epoch}, the validation ELBO has not exceeded that of epoch {self.best}{best} by "
            f"more than {self.errors:g} standard errors of the difference for {self.waited} epochs; "
            f"the last difference is {format_estimate(mean, error, over='data, in pairs')}"
        )

    def end(self, run: Run) -> None:
        """Restore the weights of the best epoch, in place."""
        if self.weights and self.best != len(run.epochs):
            run.vae.load_state_dict(self.weights)
            run.weights_epoch = self.best
            run.say(
                f"EarlyStopping: the VAE has the weights after epoch {self.best} of {len(run.epochs)}; no later epoch "
                f"was better by more than {self.errors:g} standard errors."
            )

    def state(self) -> Tree:
        return {
            "best": self.best, "best_step": self.best_step, "waited": self.waited, "values": self.values,
            "weights": self.weights,
        }  # fmt: skip

    def load(self, state: Tree) -> None:
        self.best, self.best_step, self.waited = state["best"], state.get("best_step", 0), state["waited"]
        self.values, self.weights = state["values"], dict(state["weights"])


def _mean(values: Tensor) -> str:
    error = values.double().std().item() / len(values) ** 0.5
    return format_estimate(values.double().mean().item(), error, "nats per datum", over="data")
