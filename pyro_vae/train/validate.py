"""What ``fit`` refuses of its settings before anything is begun."""

from collections.abc import Callable, Iterable

import torch
from pyro.infer import RenyiELBO
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.core.device import refuse_seed
from pyro_vae.core.traces import Loss
from pyro_vae.core.vae import VAE
from pyro_vae.elbo import Estimator
from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks.schedules import refuse_plateau
from pyro_vae.train.compiled.optimizers import refuse_clip_norm
from pyro_vae.train.compiled.precision import refuse_precision
from pyro_vae.train.compiled.steps import ENGINES

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer | LRScheduler]


def refuse_settings(vae: VAE, elbo: Loss | None, epochs: int, batch_size: int, n: int, seed: int) -> None:
    """Refuse numbers that are out of their range, and what cannot be trained.

    Raises:
        SettingsError: naming the first.
    """
    for name, number in {"epochs": epochs, "batch_size": batch_size}.items():
        if not isinstance(number, int):
            raise SettingsError(f"{name} is {number!r}; it must be a whole number")
    if epochs < 1:
        raise SettingsError(f"epochs is {epochs}; it must be at least 1")
    if not 1 <= batch_size <= n:
        raise SettingsError(f"batch_size is {batch_size}; it must be from 1 to the number of training data, {n}")
    refuse_seed(seed)
    if isinstance(elbo, type):
        raise SettingsError(f"elbo is a class; give an instance, {elbo.__name__}()")
    if getattr(elbo, "num_particles", 1) < 1:
        raise SettingsError(f"elbo: num_particles is {elbo.num_particles}; it must be at least 1")  # type: ignore[union-attr]
    if isinstance(elbo, RenyiELBO) and batch_size < n:
        raise SettingsError(f"Pyro's RenyiELBO is no bound on minibatches: n/m enters inside its logarithm; take {n}")
    if torch.is_inference_mode_enabled():
        raise SettingsError("inference mode is on, where nothing can be trained; call fit outside of it")
    if not any(p.requires_grad for p in vae.parameters()):
        raise SettingsError("every parameter of the VAE is frozen; set requires_grad on those to be trained")


def refuse_schedules(elbo: Loss | None, steps: int) -> None:
    """Refuse a schedule of the objective that is longer than the training.

    Raises:
        SettingsError: naming it.
    """
    for schedule in elbo.schedules() if isinstance(elbo, Estimator) else ():
        if schedule.steps > steps:
            raise SettingsError(
                f"elbo: {schedule} would end after {schedule.steps} steps, and training has {steps}, so it would end "
                "before its objective is the one that was meant; shorten it or train longer"
            )


def refuse_engine(engine: str, clip_norm: float | None, precision: str) -> None:
    """Refuse an engine, a norm or a precision that there is not.

    Raises:
        SettingsError: naming those that there are.
    """
    refuse_precision(precision)
    if engine not in ENGINES:
        raise SettingsError(f"engine is {engine!r}; it must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    refuse_clip_norm(clip_norm)


def made_for(vae: VAE, optimizer: Optimizer) -> torch.optim.Optimizer | LRScheduler:
    """The optimizer of all that is to be trained, or its schedule.

    Raises:
        SettingsError: if it takes no step by itself, or its schedule looks at shares of a loss.
    """
    made = optimizer([p for p in vae.parameters() if p.requires_grad])
    if isinstance(getattr(made, "optimizer", made), torch.optim.LBFGS):
        raise SettingsError("LBFGS needs a closure and noise that is fixed; take Adam, or another that steps alone")
    refuse_plateau(made)
    return made
