"""The record that describes a diagnostic to `check`, the report and the tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xarray as xr

from pyro_vae.core.finding import Finding
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.evidence.estimate import log_evidence
from pyro_vae.train.overfitting import fall_of_validation

PARTICLES = 1000
"""The number of importance weights of each datum."""

EPOCHS = 20
"""The fewest epochs from which convergence can be judged."""


@dataclass(frozen=True)
class CheckInput:
    """The arguments that :func:`pyro_vae.check` passes to each diagnostic.

    Args:
        vae: the trained VAE or :class:`pyro_vae.Pair`.
        x: held-out data, in the user's form.
        rows: the same data, on the device and in the precision of the VAE.
        evaluation: the seconds to evaluate log p(x, z) - log q(z | x) for one z of one datum.
        history: the history of the fit, or None.
        gold: the number of data to sample with NUTS, the first of ``x``.
        draws: the number of posterior draws per datum.
        seed: of all draws.
        train: the training data, or None.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> CheckInput(vae, torch.ones(4, 5), Rows(torch.ones(4, 5)), evaluation=0.25).each_datum
        1.0
    """

    vae: Amortized
    x: Any
    rows: Rows
    evaluation: float
    history: xr.Dataset | None = None
    gold: int = 0
    draws: int = 100
    seed: int = 0
    train: Any = None

    @property
    def each_datum(self) -> float:
        """The seconds to evaluate each datum once."""
        return self.evaluation * len(self.rows)

    @cached_property
    def log_evidence(self) -> xr.Dataset:
        """The importance-weighted log p(x) of each datum, estimated once for all diagnostics."""
        return log_evidence(self.vae, self.x, num_particles=PARTICLES, seed=self.seed)

    @property
    def long_history(self) -> bool:
        """Whether the history is long enough to judge convergence."""
        return self.history is not None and self.history.sizes["epoch"] >= EPOCHS

    @property
    def validated(self) -> bool:
        """Whether the history has paired differences of a validation ELBO."""
        return self.history is not None and fall_of_validation(self.history) is not None


def _always(given: CheckInput) -> bool:
    return True


@dataclass(frozen=True)
class Diagnostic:
    """A row of the table of diagnostics.

    Args:
        name: the name of its group in the tree that :func:`pyro_vae.check` returns.
        about: the title of its section in the report.
        run: the function that computes the result.
        judge: the function that turns the result into a :class:`~pyro_vae.diagnose.Finding`.
        seconds: the function that predicts the run time.
        applies: the function that returns whether the diagnostic can run.
        needs: the input that is missing if the diagnostic cannot run, for the list of those left out; empty if the
            user switched it off.
        fault: the fault that the diagnostic detects; diagnostics that detect the same fault use the same words.

    Example:
        >>> import pyro_vae as pv
        >>> pv.diagnose.DIAGNOSTICS[0].about
        'Importance weights of q'
    """

    name: str
    about: str
    run: Callable[[CheckInput], xr.Dataset]
    judge: Callable[[xr.Dataset], Finding]
    seconds: Callable[[CheckInput], float]
    applies: Callable[[CheckInput], bool] = _always
    needs: str = ""
    fault: str = ""
