"""Updates of Adam, AdamW and SGD as tensor operations on the state of torch's optimizers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.errors import CompileError, SettingsError, type_of

Maker: TypeAlias = Callable[[Iterable[Tensor]], Any]
Group: TypeAlias = dict[str, Any]

COMPILED = (Adam, AdamW, SGD)
NAMES = "Adam, AdamW and SGD"

NUMBERS = 7
"""The count of numbers per clock and step; see :meth:`Clock.numbers`."""


class WholeOptimizer(PyroOptim):
    """One torch optimizer over all parameters; Pyro makes one per tensor.

    Args:
        optimizer: a torch optimizer, or a function from the parameters, in the order of the parameter store, to an
            optimizer or a learning-rate scheduler.
        clip_norm: scale the gradient of all parameters together down to at most this norm.
    """

    def __init__(self, optimizer: Optimizer | LRScheduler | Maker, clip_norm: float | None = None) -> None:
        super().__init__(type(optimizer), {})
        self.made: Any = optimizer
        self.clip_norm = clip_norm

    @property
    def optimizer(self) -> Any:
        """The torch optimizer; before the first step, perhaps the function that makes it."""
        return getattr(self.made, "optimizer", self.made)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.optimizer, Optimizer):
            used = set(params)  # SVI passes a set, which has no order; use that of the store
            every = dict.fromkeys(p for _, p in pyro.get_param_store().named_parameters())
            self.made = self.made([p for p in every if p in used])
            if not isinstance(self.optimizer, Optimizer):
                raise SettingsError(f"optim returned {type_of(self.made)}; it must return a torch optimizer")
        if self.clip_norm is not None:
            clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip_norm)
        self.optimizer.step()


def validate_clip_norm(clip_norm: float | None) -> None:
    """Raise if the norm is not a finite number above 0."""
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and 0 < clip_norm < math.inf):
        raise SettingsError(f"clip_norm is {clip_norm}; it must be a finite number above 0, or None")


@dataclass
class Member:
    """A parameter with its torch optimizer, parameter group and Pyro's settings of gradient clipping."""

    parameter: Tensor
    optimizer: Optimizer
    group: Group
    clip: dict[str, float]
    clock: int = 0

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state of the parameter."""
        return self.optimizer.state[self.parameter]


@dataclass
class Clock:
    """The step count of the parameters of one group."""

    group: Group
    steps: int

    def numbers(self, ahead: int) -> tuple[float, ...]:
        """Return lr, lr / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ), 1 - lr · decay, and the coefficients of the moving averages.

        They are the numbers of the next step for ``ahead=0``, computed in double precision as in torch.
        """
        rate, at = float(self.group["lr"]), self.steps + 1 + ahead
        keep = 1 - rate * self.group["weight_decay"]
        if "betas" not in self.group:
            return rate, rate, 1.0, keep, self.group["momentum"], 0.0, 0.0
        first, second = self.group["betas"]
        return rate, rate / (1 - first**at), (1 - second**at) ** -0.5, keep, 1 - first, second, 1 - second


class Updates:
    """The update of an optimizer, as tensor operations.

    Args:
        optim: a :class:`WholeOptimizer`, or a ``PyroOptim`` of Adam, AdamW or SGD, after its first step.
        trained: the parameters that had a gradient in that step.

    Raises:
        SettingsError: if it is another optimizer, has hooks, or is differentiable.
    """

    def __init__(self, optim: PyroOptim, trained: Sequence[Tensor]) -> None:
        known = {id(p) for p in trained if p.grad is not None}
        self.clip_norm = optim.clip_norm if isinstance(optim, WholeOptimizer) else None
        self.members = [member for member in _members(optim) if id(member.parameter) in known]
        self.clocks: list[Clock] = []
        for optimizer in {id(m.optimizer): m.optimizer for m in self.members}.values():
            _validate(optimizer)
        for member in self.members:
            _validate_parameter(member)
            member.clock = self._clock_of(member)
        self.known = [(m, key, v) for m in self.members for key, v in m.state.items() if isinstance(v, Tensor)]
        self.counts = [m.state["step"] for m in self.members if "step" in m.state]

    def recount(self) -> bool:
        """Read the step counts from the optimizer's state; return false if its tensors were replaced."""
        if not all(member.optimizer.state[member.parameter].get(key) is value for member, key, value in self.known):
            return False
        for member in self.members:
            self.clocks[member.clock].steps = int(member.state["step"]) if "step" in member.state else 0
        return True

    def _clock_of(self, member: Member) -> int:
        steps = int(member.state["step"]) if "step" in member.state else 0
        for i, clock in enumerate(self.clocks):
            if clock.group is member.group and clock.steps == steps:
                return i
        self.clocks.append(Clock(member.group, steps))
        return len(self.clocks) - 1

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters, in the optimizer's order."""
        return [member.parameter for member in self.members]

    def spaces(self) -> list[tuple[str, dict[str, Any], list[str]]]:
        """List the settings that are constants of a trace, for :class:`~pyro_vae.train.compiled.watch.Watch`."""
        groups = {id(m.group): m.group for m in self.members}.values()
        fixed = ("weight_decay", "decoupled_weight_decay", "eps", "amsgrad", "maximize", "nesterov", "dampening")
        settings = [("param_groups", group, [name for name in fixed if name in group]) for group in groups]
        optimizers = {id(m.optimizer): m.optimizer for m in self.members}.values()
        return [*settings, *((type(each).__name__, vars(each), ["state"]) for each in optimizers)]

    def numbers(self, steps: int) -> Tensor:
        """Compute the coefficients of the next steps, shape ``(steps, numbers)``."""
        rows = [[n for clock in self.clocks for n in clock.numbers(ahead)] for ahead in range(steps)]
        precisions = {p.dtype for p in self.parameters}
        return torch.tensor(rows, dtype=precisions.pop() if len(precisions) == 1 else torch.float64)

    def apply(self, gradients: Sequence[Tensor], numbers: Tensor) -> None:
        """Update the parameters and the state in place, like the optimizer's own step."""
        gradients = [_clipped(m, g) for m, g in zip(self.members, gradients, strict=True)]
        if self.clip_norm is not None:
            total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            scale = (self.clip_norm / (total + 1e-6)).clamp(max=1.0)
            gradients = [g * scale for g in gradients]
        for member, gradient in zip(self.members, gradients, strict=True):
            coefficients = numbers[NUMBERS * member.clock :][:NUMBERS].to(gradient.dtype).unbind()
            rule = _sgd if isinstance(member.optimizer, SGD) else _adam
            rule(member, -gradient if member.group["maximize"] else gradient, coefficients)

    def advance(self, steps: int) -> None:
        """Add steps to the step counts."""
        for clock in self.clocks:
            clock.steps += steps
        if self.counts:
            torch._foreach_add_(self.counts, steps)


def validate_optimizer(optim: PyroOptim) -> None:
    """Raise, before the first step, if the optimizer cannot be compiled.

    Raises:
        SettingsError: naming the optimizer.
    """
    if not isinstance(optim, WholeOptimizer):
        kind = optim.pt_optim_constructor
        if kind not in COMPILED:
            raise SettingsError(f"the optimizer is {getattr(kind, '__name__', kind)}; only {NAMES} can be compiled")
    elif isinstance(optim.optimizer, Optimizer):
        _validate(optim.optimizer)


def _members(optim: PyroOptim) -> list[Member]:
    if isinstance(optim, WholeOptimizer):
        whole = optim.optimizer
        return [Member(p, whole, group, {}) for group in whole.param_groups for p in group["params"]]
    each = [(p, getattr(one, "optimizer", one)) for p, one in optim.optim_objs.items()]
    return [Member(p, one, one.param_groups[0], dict(optim._get_grad_clip_args(p) or {})) for p, one in each]


def _validate(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer) not in COMPILED:
        raise SettingsError(f"the optimizer is {name}; only {NAMES} can be compiled")
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    if hooks:
        raise SettingsError(f"the optimizer, {name}, has hooks, which a compiled step does not call; remove them")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise SettingsError(f"the optimizer, {name}, is differentiable=True, which cannot be compiled; turn it off")


def _validate_parameter(member: Member) -> None:
    parameter = member.parameter
    if parameter.is_complex():
        raise SettingsError(
            f"a parameter of shape {tuple(parameter.shape)} is complex; only real parameters can be compiled"
        )
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise SettingsError(
            f"a parameter of shape {tuple(parameter.shape)} has a hook on its accumulated gradient, which a compiled "
            "step does not call; remove it"
        )


def _clipped(member: Member, gradient: Tensor) -> Tensor:
    """Clip a gradient like Pyro's optimizers: first its norm, then each value."""
    if gradient.layout != torch.strided:
        raise CompileError("a gradient is sparse; only dense gradients can be compiled")
    if (norm := member.clip.get("clip_norm")) is not None:
        gradient = gradient * (norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
    if (value := member.clip.get("clip_value")) is not None:
        gradient = gradient.clamp(-value, value)
    return gradient


def _adam(member: Member, gradient: Tensor, numbers: Sequence[Tensor]) -> None:
    """Apply Adam (Kingma & Ba, 2014), AdamW (Loshchilov & Hutter, 2017) or AMSGrad (Reddi et al., 2018)."""
    parameter, group, state = member.parameter, member.group, member.state
    _, size, root, keep, first, second, rest = numbers
    if decay := group["weight_decay"]:
        if isinstance(member.optimizer, AdamW) or group.get("decoupled_weight_decay"):
            parameter.mul_(keep)
        else:
            gradient = gradient + decay * parameter
    mean = state["exp_avg"]
    mean.add_((gradient - mean) * first)
    square = state["exp_avg_sq"].mul_(second).add_(rest * gradient * gradient)
    if group["amsgrad"]:
        largest = state["max_exp_avg_sq"]
        square = largest.copy_(torch.maximum(largest, square))
    parameter.sub_(size * (mean / (square.sqrt() * root + group["eps"])))


def _sgd(member: Member, gradient: Tensor, numbers: Sequence[Tensor]) -> None:
    """Apply SGD with momentum, optionally Nesterov's (Sutskever et al., 2013)."""
    parameter, group, (rate, _, _, _, momentum, *_) = member.parameter, member.group, numbers
    if decay := group["weight_decay"]:
        gradient = gradient + decay * parameter
    if group["momentum"]:
        # Not add_(gradient, alpha=…): if the gradient is a matrix product, inductor drops alpha.
        buffer = member.state["momentum_buffer"].mul_(momentum).add_((1 - group["dampening"]) * gradient)
        gradient = gradient + momentum * buffer if group["nesterov"] else buffer
    parameter.sub_(rate * gradient)
