"""Describe a diagnostic to `check`, the report and the tests: one record each, in the table of `pyro_vae.diagnose`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xarray as xr

from pyro_vae.core.finding import Finding
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.evidence.estimate import log_evidence
from pyro_vae.train.overfitting import fall_of_validation

PARTICLES = 1000
"""Importance weights of each datum."""

EPOCHS = 20
"""The fewest epochs whose history shows whether training has converged."""


@dataclass(frozen=True)
class CheckInput:
    """What :func:`pyro_vae.check` hands to each diagnostic.

    Args:
        vae: the trained VAE.
        x: held-out data, as the user gave them.
        rows: the same data, on the device and in the precision of the VAE.
        evaluation: seconds that one evaluation of log p(x, z) - log q(z | x) takes, for one datum and one z.
        history: of the fit, where there is one.
        gold: how many of the first data NUTS samples.
        draws: draws of the posterior of each datum.
        seed: of all draws.
        train: what the VAE was trained on, where it is known.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> CheckInput(vae, torch.ones(4, 5), Rows(torch.ones(4, 5)), evaluation=0.25).each_datum
        1.0
    """

    vae: VAE
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
        """Seconds that one evaluation for each datum takes."""
        return self.evaluation * len(self.rows)

    @cached_property
    def log_evidence(self) -> xr.Dataset:
        """The importance-weighted log p(x) of each datum, estimated once for all that use it."""
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
        name: of its group in the tree that :func:`pyro_vae.check` returns.
        about: its subject, in a few words; the title of its section in the report.
        run: compute it.
        judge: turn its result into a :class:`~pyro_vae.diagnose.Finding`.
        seconds: predict how long ``run`` takes.
        applies: whether it can be run at all.
        needs: what it lacks where it does not apply, for the list of what was left out; empty where the user chose so.
        fault: what is wrong where it is not fine, in the words of all diagnostics that see the same fault.

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
