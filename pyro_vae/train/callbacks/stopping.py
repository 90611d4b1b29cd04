"""``EarlyStopping``: stop training when the validation ELBO no longer rises, and keep the best weights."""

import math

from torch import Tensor

from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks._paired import copied, difference, refuse_second
from pyro_vae.train.callbacks.base import Callback, Run, Tree


class EarlyStopping(Callback):
    """Stops when the validation ELBO has not grown for some epochs by more than its own error.

    .. math:: d_i = \\mathcal L_i - \\mathcal L_i^*, \\qquad
        \\text{better:}\\ \\bar d > c \\, \\mathrm{sd}(d) / \\sqrt n

    The ELBO of each validation datum is compared with that of the best epoch so far, with the same
    noise: what makes one datum harder than another leaves the difference, and its error is far below
    that of the ELBO itself. Growth that is too slow for one epoch counts once it has summed up, since
    the best epoch stays what all are compared with. An epoch whose ELBO is not finite is not better.

    It stops once there was no better epoch for ``patience`` epochs and for ``steps`` steps, whichever is longer. A
    small data set has few steps in an epoch, so that epochs alone would stop it before it has begun. The validation
    data choose the epoch, so the ELBO of these data is a little too high there.

    Args:
        patience: so many epochs without a better one, at least 1.
        steps: and so many steps without a better epoch, at least 0.
        errors: c, the standard errors that better means, at least 0.
        restore: whether the VAE gets the weights of the best epoch at the end, also of a training that came
            to its last epoch.

    Raises:
        SettingsError: if a setting is out of its range; at the start, if there are not two validation data, or
            another callback would end with other weights.

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
        """Refuse to begin without validation data."""
        if run.watched.get("validation") is None or len(run.watched["validation"]) < 2:
            raise SettingsError("EarlyStopping needs validation data to judge by, at least two; give validation_data")
        refuse_second(run, self)
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
            f"EarlyStopping: after epoch {epoch} the validation ELBO has for {self.waited} epochs not been better than "
            f"that of epoch {self.best}{best} by more than {self.errors:g} standard errors of the difference; "
            f"the last difference is {format_estimate(mean, error, over='data, in pairs')}"
        )

    def end(self, run: Run) -> None:
        """Put back the weights of the best epoch, in place."""
        if self.weights and self.best != len(run.epochs):
            run.vae.load_state_dict(self.weights)
            run.weights_epoch = self.best
            run.say(
                f"EarlyStopping: the weights are those after epoch {self.best} of {len(run.epochs)}; none later was "
                f"better by more than {self.errors:g} standard errors."
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
