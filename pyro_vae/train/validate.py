"""Validate the settings of ``fit`` before it starts."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from pyro.infer import RenyiELBO
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.core.device import validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.traces import Loss
from pyro_vae.elbo import Estimator
from pyro_vae.errors import SettingsError, did_you_mean, type_of
from pyro_vae.train.callbacks.schedules import validate_no_plateau
from pyro_vae.train.compiled.optimizers import validate_clip_norm
from pyro_vae.train.compiled.precision import validate_precision
from pyro_vae.train.compiled.steps import ENGINES

BuiltOptimizer: TypeAlias = torch.optim.Optimizer | LRScheduler
Optimizer: TypeAlias = Callable[[Iterable[Tensor]], BuiltOptimizer] | BuiltOptimizer | PyroOptim


def validate_settings(vae: Amortized, elbo: Loss | None, epochs: int, batch_size: int, n: int, seed: int) -> None:
    """Raise if a number is out of range, or the VAE cannot be trained.

    Raises:
        SettingsError: naming the first invalid setting.
    """
    for name, number in {"epochs": epochs, "batch_size": batch_size}.items():
        if not isinstance(number, int):
            raise SettingsError(f"{name} is {number!r}; it must be a whole number")
    if epochs < 1:
        raise SettingsError(f"epochs is {epochs}; it must be at least 1")
    if not 1 <= batch_size <= n:
        raise SettingsError(f"batch_size is {batch_size}; it must be from 1 to the number of training data, {n}")
    validate_seed(seed)
    if getattr(elbo, "num_particles", 1) < 1:
        number = elbo.num_particles  # type: ignore[union-attr]
        raise SettingsError(f"elbo: num_particles is {number}; it must be at least 1")
    if isinstance(elbo, RenyiELBO) and batch_size < n:
        raise SettingsError(
            "elbo: Pyro's RenyiELBO is not a bound on minibatches, as n/m enters inside its logarithm; "
            f"pass batch_size={n}"
        )
    if torch.is_inference_mode_enabled():
        raise SettingsError("fit cannot train in inference mode; call it outside torch.inference_mode()")
    if unowned := getattr(vae, "unowned", []):
        raise SettingsError(
            f"parameter {unowned[0]!r} is in Pyro's parameter store but in no module, so fit can neither save nor "
            "restore it; make model and guide modules (pyro.nn.PyroModule) that own it, or train with pyro.infer.SVI; "
            "if another module of that name was made before, call pyro.clear_param_store() first"
        )
    if unregistered := getattr(vae, "unregistered", []):
        raise SettingsError(
            f"neither model nor guide registers parameter {unregistered[0]!r} with Pyro, so it would not be trained; "
            "call pyro.module with a name and its module in both, make the module a pyro.nn.PyroModule, or freeze the "
            "parameter (requires_grad_(False))"
        )
    if not any(p.requires_grad for p in vae.parameters()):
        raise SettingsError("every parameter of the VAE is frozen; set requires_grad on those to train")


def validate_schedules(elbo: Loss | None, steps: int) -> None:
    """Raise if a schedule of the objective is longer than the training.

    Raises:
        SettingsError: naming the schedule.
    """
    for schedule in elbo.schedules() if isinstance(elbo, Estimator) else ():
        if schedule.steps > steps:
            raise SettingsError(
                f"elbo: {schedule} ends after {schedule.steps} steps, but training has only {steps} and would never "
                "reach the final objective; shorten the schedule or train longer"
            )


def validate_engine(engine: str, clip_norm: float | None, precision: str) -> None:
    """Raise if the engine, the clipping norm or the precision is invalid.

    Raises:
        SettingsError: naming the valid values.
    """
    validate_precision(precision)
    if engine not in ENGINES:
        raise SettingsError(f"engine is {engine!r}; it must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    validate_clip_norm(clip_norm)


def build_optimizer(vae: Amortized, optimizer: Any) -> BuiltOptimizer:
    """Build the optimizer of all trainable parameters, or its learning-rate schedule.

    Raises:
        SettingsError: if the result is not an optimizer, needs a closure, holds other parameters, or has a plateau
            schedule with a relative threshold.
    """
    made = _build([p for p in vae.parameters() if p.requires_grad], optimizer)
    whole = getattr(made, "optimizer", made)
    if not isinstance(whole, torch.optim.Optimizer):
        raise SettingsError(
            f"optimizer returned {type_of(made)}; it must return a torch optimizer, such as optimizer=torch.optim.Adam"
        )
    if isinstance(whole, torch.optim.LBFGS):
        raise SettingsError("optimizer: LBFGS needs a closure and fixed noise; use Adam or another without a closure")
    validate_no_plateau(made)
    return made


def is_built(optimizer: Any) -> bool:
    """Return whether this is an optimizer or schedule instance, with its own parameters and state."""
    return isinstance(optimizer, torch.optim.Optimizer | LRScheduler)


def _build(parameters: list[Tensor], optimizer: Any) -> Any:
    if is_built(optimizer):
        return _validated_instance(parameters, optimizer)
    if isinstance(optimizer, PyroOptim):
        return _from_pyro(parameters, optimizer)
    if _is_subclass(optimizer, LRScheduler):
        raise SettingsError(
            f"optimizer is {optimizer.__name__}, a schedule; pass "
            f"optimizer=lambda p: torch.optim.lr_scheduler.{optimizer.__name__}(torch.optim.Adam(p), ...)"
        )
    if callable(optimizer):
        return optimizer(parameters)
    kinds = "a class, a function from parameters to a torch optimizer, or an optimizer of the VAE's parameters"
    if isinstance(optimizer, float):
        line = f"functools.partial(torch.optim.Adam, lr={optimizer})"
        raise SettingsError(f"optimizer is {optimizer}; pass optimizer={line}. fit accepts {kinds}")
    names = [name for name, value in vars(torch.optim).items() if _is_subclass(value, torch.optim.Optimizer)]
    meant = did_you_mean(optimizer, names) if isinstance(optimizer, str) else ""
    advice = f"did you mean optimizer=torch.optim.{meant}?" if meant else "pass optimizer=torch.optim.Adam."
    raise SettingsError(f"optimizer is {optimizer!r}; {advice} fit accepts {kinds}")


def _validated_instance(parameters: list[Tensor], made: BuiltOptimizer) -> BuiltOptimizer:
    """Raise if an optimizer instance holds other parameters; move its state to the parameters' device."""
    trainable = {id(parameter) for parameter in parameters}
    whole = made if isinstance(made, torch.optim.Optimizer) else made.optimizer
    held = [p for group in whole.param_groups for p in group["params"] if p.requires_grad]
    if not {id(parameter) for parameter in held} <= trainable:
        raise SettingsError(
            "the optimizer holds parameters of another VAE, perhaps of a copy; build it from vae.parameters(), or pass "
            "a class or function, such as optimizer=torch.optim.Adam"
        )
    if whole.state:
        whole.load_state_dict(whole.state_dict())  # moves the state to the device of the parameters
    return made


def _from_pyro(parameters: list[Tensor], optimizer: PyroOptim) -> Any:
    """Build one torch optimizer over all parameters from a Pyro optimizer, which has one per parameter."""
    if callable(optimizer.pt_optim_args) or callable(optimizer.pt_clip_args):
        raise SettingsError(
            "optimizer is a Pyro optimizer with settings per parameter name; pass a function from parameters to a "
            "torch optimizer with parameter groups"
        )
    if optimizer.pt_clip_args:
        raise SettingsError(
            f"optimizer is a Pyro optimizer that clips each tensor separately ({optimizer.pt_clip_args}); remove this, "
            "and pass clip_norm= to fit, which scales the gradient of all parameters together"
        )
    made = optimizer.pt_optim_constructor(parameters, **optimizer.pt_optim_args)
    if isinstance(optimizer, PyroLRScheduler):
        return optimizer.pt_scheduler_constructor(made, **optimizer.kwargs)
    return made


def _is_subclass(value: Any, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind) and value is not kind
