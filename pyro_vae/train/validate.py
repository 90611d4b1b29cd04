"""What ``fit`` refuses of its settings before anything is begun."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from pyro.infer import RenyiELBO
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.core.device import refuse_seed
from pyro_vae.core.pair import Amortised
from pyro_vae.core.traces import Loss
from pyro_vae.elbo import Estimator
from pyro_vae.errors import SettingsError, did_you_mean
from pyro_vae.train.callbacks.schedules import refuse_plateau
from pyro_vae.train.compiled.optimizers import refuse_clip_norm
from pyro_vae.train.compiled.precision import refuse_precision
from pyro_vae.train.compiled.steps import ENGINES

Made: TypeAlias = torch.optim.Optimizer | LRScheduler
Optimizer: TypeAlias = Callable[[Iterable[Tensor]], Made] | Made | PyroOptim


def refuse_settings(vae: Amortised, elbo: Loss | None, epochs: int, batch_size: int, n: int, seed: int) -> None:
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
    if getattr(elbo, "num_particles", 1) < 1:
        raise SettingsError(f"elbo: num_particles is {elbo.num_particles}; it must be at least 1")  # type: ignore[union-attr]
    if isinstance(elbo, RenyiELBO) and batch_size < n:
        raise SettingsError(f"Pyro's RenyiELBO is no bound on minibatches: n/m enters inside its logarithm; take {n}")
    if torch.is_inference_mode_enabled():
        raise SettingsError("inference mode is on, where nothing can be trained; call fit outside of it")
    if loose := getattr(vae, "loose", []):
        raise SettingsError(
            f"parameter {loose[0]!r} is in Pyro's store and of no module, so it can be neither saved nor put back; "
            "make model and guide modules (pyro.nn.PyroModule) that have it, or train by pyro.infer.SVI; if another "
            "module of that name was made before, call pyro.clear_param_store() first"
        )
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


def made_for(vae: Amortised, optimizer: Any) -> Made:
    """The optimizer of all that is to be trained, or its schedule.

    Raises:
        SettingsError: if it is none, takes no step by itself, is of other parameters, or its schedule looks at shares
            of a loss.
    """
    made = _made([p for p in vae.parameters() if p.requires_grad], optimizer)
    whole = getattr(made, "optimizer", made)
    if not isinstance(whole, torch.optim.Optimizer):
        raise SettingsError(
            f"optimizer made a {type(made).__name__} of the parameters; let it make a torch optimizer, as "
            "optimizer=torch.optim.Adam does"
        )
    if isinstance(whole, torch.optim.LBFGS):
        raise SettingsError("LBFGS needs a closure and noise that is fixed; take Adam, or another that steps alone")
    refuse_plateau(made)
    return made


def is_made(optimizer: Any) -> bool:
    """Whether this is an optimizer already, or its schedule, with parameters and a state of its own."""
    return isinstance(optimizer, torch.optim.Optimizer | LRScheduler)


def _made(parameters: list[Tensor], optimizer: Any) -> Any:
    if is_made(optimizer):
        return _of_these(parameters, optimizer)
    if isinstance(optimizer, PyroOptim):
        return _of_pyro(parameters, optimizer)
    if _is_kind_of(optimizer, LRScheduler):
        raise SettingsError(
            f"optimizer is {optimizer.__name__}, a schedule; give "
            f"optimizer=lambda p: torch.optim.lr_scheduler.{optimizer.__name__}(torch.optim.Adam(p), ...)"
        )
    if callable(optimizer):
        return optimizer(parameters)
    kinds = "a class, a function from parameters to a torch optimizer, or an optimizer of the VAE's parameters"
    if isinstance(optimizer, float):
        line = f"functools.partial(torch.optim.Adam, lr={optimizer})"
        raise SettingsError(f"optimizer is {optimizer}; give optimizer={line}: {kinds}")
    names = [name for name, value in vars(torch.optim).items() if _is_kind_of(value, torch.optim.Optimizer)]
    meant = did_you_mean(optimizer, names) if isinstance(optimizer, str) else ""
    asked = f"did you mean optimizer=torch.optim.{meant}?" if meant else "give optimizer=torch.optim.Adam."
    raise SettingsError(f"optimizer is {optimizer!r}; {asked} fit takes {kinds}")


def _of_these(parameters: list[Tensor], made: Made) -> Made:
    """An optimizer that was made before, seen to hold parameters of the VAE, its state on their device."""
    own = {id(parameter) for parameter in parameters}
    whole = made if isinstance(made, torch.optim.Optimizer) else made.optimizer
    held = [p for group in whole.param_groups for p in group["params"] if p.requires_grad]
    if not {id(parameter) for parameter in held} <= own:
        raise SettingsError(
            "the optimizer holds parameters that are not of this VAE, as those of a copy are not; make it of "
            "vae.parameters(), or give what makes it, as optimizer=torch.optim.Adam"
        )
    if whole.state:
        whole.load_state_dict(whole.state_dict())  # which moves it to where the parameters are
    return made


def _of_pyro(parameters: list[Tensor], optimizer: PyroOptim) -> Any:
    """The torch optimizer of all parameters that one of Pyro's makes of each."""
    if callable(optimizer.pt_optim_args) or callable(optimizer.pt_clip_args):
        raise SettingsError(
            "optimizer is one of Pyro's with settings by the parameters' names; give a function from parameters to a "
            "torch optimizer with groups"
        )
    if optimizer.pt_clip_args:
        raise SettingsError(
            f"optimizer is one of Pyro's that clips each tensor by itself ({optimizer.pt_clip_args}); leave that out, "
            "and give fit clip_norm=, which scales the gradient of all parameters together"
        )
    made = optimizer.pt_optim_constructor(parameters, **optimizer.pt_optim_args)
    if isinstance(optimizer, PyroLRScheduler):
        return optimizer.pt_scheduler_constructor(made, **optimizer.kwargs)
    return made


def _is_kind_of(value: Any, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind) and value is not kind
